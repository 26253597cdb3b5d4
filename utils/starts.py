"""Forms of weights files beside diffusers' own: the extra of `--generator_init` and its like."""


def unwrapped(weights):
    """A state dict without what trainers put around it: {"state_dict": weights}, names after `module.`."""
    for name in ("state_dict", "model", "module"):
        if isinstance(weights.get(name), dict):
            weights = weights[name]
    while weights and all(key.startswith(("module.", "_orig_mod.")) for key in weights):
        weights = {key.partition(".")[2]: value for key, value in weights.items()}
    return weights
