"""The implicit reward of a diffusion model tuned on preference pairs: the extra of --preference_unet.

Diffusion-DPO (arXiv 2311.12908) has the reward log p_preference(x_t | c) - log p_reference(x_t | c). It
enters as (3.6) does: L = - alpha w (S_preference - S_reference)^T x_t, scores detached.
"""

import torch


FLAGS = {
    "preference_unet": {
        "help": "Diffusion model tuned on preference pairs (Diffusion-DPO), in any form of --generator_init."
                " Adds its implicit reward log p(x_t | c) - log p_reference(x_t | c); with --reward_scale 0"
                " it is the only reward."},
    "preference_scale": {"type": "positive_float", "default": 1.0, "needs": "preference_unet",
        "help": "Weight of that implicit reward (not in the paper)."},
}


class ImplicitPreference:
    """A term of the generator's loss; `script.Term` supplies the rest of its contract."""

    name = "preference"

    def __init__(self, network, weight, method, implicit_reward_gradient):
        self.network, self.weight, self.method = network, weight, method
        self.implicit_reward_gradient, self.networks = implicit_reward_gradient, {"preference": network}

    def gradient(self, batch, predictions, predict):
        """The gradient (batch, C, H, W) at x0; no logs."""
        with torch.no_grad():
            d_preference = predict(self.network, predictions.x_t.detach(), batch.timesteps)
        direction = d_preference - predictions.reference
        return self.implicit_reward_gradient(predictions, direction, self.weight, self.method), {}


def check(args, script):
    """Raise ValueError if the preference model is the reference itself."""
    if args.preference_unet == "reference":
        raise ValueError("reference prefers nothing")


def build(args, models, script):
    """([the term], no observers); a LoRA goes on the shared base, or is merged into a separate network."""
    reference = getattr(models.pipeline, models.family.network_name)
    dtype = next(parameter.dtype for name, parameter in reference.named_parameters() if "lora_" not in name)
    name = f"--preference_{models.family.network_name} {args.preference_unet}"
    with script.exit_on_error(f"{name} does not fit the reference's network"):
        network, lora = script.load_network(models.family, args.preference_unet, reference, args.shared_base)
        if lora and args.shared_base:
            network = script.load_extra("lora", name).load(network, "preference", lora)
            network.requires_grad_(False)
        else:
            network = models.layout.place(script.freeze(models.family, network, lora, dtype))

    class Term(ImplicitPreference, script.Term):
        pass
    return [Term(network, args.preference_scale, script.method_of(args), script.implicit_reward_gradient)], {}


def card_lines(args, shown):
    """The terms that the model card lists."""
    return [f"{args.preference_scale:g} x the implicit reward of `{shown(args.preference_unet)}`"]
