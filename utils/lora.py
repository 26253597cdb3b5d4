"""LoRAs of generator and assistant, on separate bases or a shared one: the extra of the LoRA flags."""

import functools
import warnings

import diffusers
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file


FLAGS = {
    "generator_lora_rank": {"type": "non_negative_int", "default": 0,
        "help": "LoRA rank of the generator; 0 trains all weights."},
    "assistant_lora_rank": {"type": "non_negative_int", "default": 0,
        "help": "LoRA rank of the assistant; 0 trains all weights."},
    "lora_alpha": {"type": "positive_float", "needs": "generator_lora_rank/assistant_lora_rank",
        "help": "Alpha of both LoRAs (default: the rank); a LoRA in --generator_init keeps its own."},
    "lora_layers": {"needs": "generator_lora_rank/assistant_lora_rank",
        "help": "Comma-separated layers that get a LoRA (default: attention, and a UNet's convolutions)."},
    "shared_base": {
        "nargs": "?", "const": "all", "choices": ["all", "assistant"], "needs": "assistant_lora_rank",
        "help": "Hold frozen weights once. `assistant`: the reference is the assistant with its LoRA off."
                " `all` (the default value of the flag): the generator's LoRA shares these weights too."},
}

warnings.filterwarnings("ignore", "Already found a `peft_config`")  # one base holds two LoRAs


class LoRANetwork(torch.nn.Module):
    """One LoRA on a frozen base that several networks share; `adapter=None` is the base itself.

    The LoRA is switched before each forward and, for gradient checkpointing, its backward. PEFT's switches
    also change requires_grad, which silently zeroes the gradients of a later backward.
    """

    def __init__(self, base, adapter=None):
        super().__init__()
        self.base, self.adapter = base, adapter

    def named_parameters(self, *given, **more):
        """Parameters of the base and of this LoRA, without the base's other LoRAs."""
        for name, value in super().named_parameters(*given, **more):
            if "lora_" not in name or f".{self.adapter}." in name:
                yield name, value

    @functools.cached_property
    def layers(self):  # looked up at the first forward, when every adapter is in place
        return [layer for layer in self.base.modules() if isinstance(layer, BaseTunerLayer)]

    def switch(self, *_):
        for layer in self.layers:
            layer._disable_adapters, layer._active_adapter = self.adapter is None, [self.adapter]

    def forward(self, *inputs, **conditioning):
        self.switch()
        output = self.base(*inputs, **conditioning)
        if output.sample.requires_grad:
            output.sample.register_hook(self.switch)
        return output


def make(family, args, base, name, rank):
    """A new float32 LoRA, initially zero, on a frozen base; ValueError if --lora_layers does not fit it."""
    layers = [*map(str.strip, args.lora_layers.split(","))] if args.lora_layers else family.lora_targets
    names = [f".{name}" for name, _ in base.named_modules() if name]
    for layer in layers if args.lora_layers else []:
        if not any(held.endswith(f".{layer}") for held in names):  # PEFT ignores it beside one that matches
            raise ValueError(f"the {family.network_name} has no layer {layer or 'without a name'}")
    config = LoraConfig(r=rank, lora_alpha=args.lora_alpha or rank, init_lora_weights="gaussian",
                        target_modules=layers)
    base.add_adapter(config, adapter_name=name)
    return prepare(base, name)


def load(family, base, name, path, rank=None):
    """Load a LoRA file in diffusers' format onto a base; ValueError if it or its rank does not fit."""
    base.load_lora_adapter(str(path.parent), weight_name=path.name, prefix=family.network_name,
                           adapter_name=name)
    held = get_peft_model_state_dict(base, adapter_name=name)
    if {f"{family.network_name}.{key}" for key in held} != load_file(path).keys():  # the library only warns
        raise ValueError("its names are not those of a LoRA on this network")
    if rank not in (None, base.peft_config[name].r):
        raise ValueError(f"--{name}_lora_rank {rank}: the LoRA in the file has {base.peft_config[name].r}")
    return prepare(base, name)


def prepare(base, name):
    """Make all LoRAs of the base trainable, in float32, and freeze the rest."""
    for key, parameter in base.named_parameters():  # PEFT freezes an adapter when another one is added
        parameter.requires_grad_("lora_" in key)
    for module in base.modules():  # else PEFT casts to float32 what autocast then casts back, at each layer
        module.cast_input_dtype_enabled = False
    cast_training_params(base, dtype=torch.float32)
    return LoRANetwork(base.eval(), name)  # a given LoRA's dropout would not be a function of the seed


def fuse(family, base, path):
    """A plain float32 network with a LoRA file merged into its weights; consumes the base."""
    return fuse_lora(load(family, base, "fused", path))


def fuse_lora(network):
    """A plain float32 network with its LoRA merged into its weights; consumes the base."""
    fused = torch.nn.Module.to(network.base, "cpu", torch.float32)  # a GPU may have no room for it
    fused.fuse_lora(adapter_names=[network.adapter])
    fused.unload_lora()
    return fused


def export(family, network, folder):
    """Write the LoRA file into a folder; returns the network with the LoRA merged."""
    weights = get_peft_model_state_dict(network.base, adapter_name=network.adapter)
    name, metadata = family.network_name, network.base.peft_config[network.adapter].to_dict()
    getattr(diffusers, family.lora_saver).save_lora_weights(folder, **{
        f"{name}_lora_layers": {key: value.contiguous() for key, value in weights.items()},
        f"{name}_lora_adapter_metadata": metadata})
    return fuse_lora(network)
