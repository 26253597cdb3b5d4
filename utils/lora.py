"""LoRAs of generator and assistant, on separate bases or a shared one: the extra of the LoRA flags."""

import functools
import warnings
from pathlib import Path

import diffusers
import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_kohya
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file


WEIGHTS_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
FOREIGN_PREFIXES = ("state_dict", "model", "module", "_orig_mod", "input_blocks", "joint_blocks",
                    "double_blocks")
LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
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


def load(base, name, lora, rank=None):
    """Load a LoRA as utils/starts.py has read it onto a base; ValueError if it or its rank does not fit."""
    state, config = lora
    base.load_lora_adapter(dict(state), prefix=None, adapter_name=name, metadata=config)
    if get_peft_model_state_dict(base, adapter_name=name).keys() != state.keys():  # the library only warns
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


def fuse(base, lora):
    """A plain float32 network with a given LoRA merged into its weights; consumes the base."""
    return fuse_lora(load(base, "fused", lora))


def fuse_lora(network):
    """A plain float32 network with its LoRA merged into its weights; consumes the base."""
    fused = torch.nn.Module.to(network.base, "cpu", torch.float32)  # a GPU may have no room for it
    fused.fuse_lora(adapter_names=[network.adapter])
    fused.unload_lora()
    return fused


def export(family, network, folder, dtype=None):
    """Write the LoRA in diffusers' naming and, for a UNet, in kohya's; returns the merged network.

    ComfyUI, A1111 and the like read kohya's naming. The library's converter takes the rank for alpha, so the
    alphas are written anew.
    """
    name, adapter, folder = family.network_name, network.adapter, Path(folder)
    weights = {key: value.to(dtype or value.dtype).contiguous() for key, value in get_peft_model_state_dict(
        network.base, adapter_name=adapter).items()}
    getattr(diffusers, family.lora_saver).save_lora_weights(folder, **{
        f"{name}_lora_layers": weights,
        f"{name}_lora_adapter_metadata": network.base.peft_config[adapter].to_dict()})
    if name == "unet":
        renamed = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in weights.items()})
        alphas = {f"lora_unet_{path.replace('.', '_')}.alpha": torch.tensor(
            float(layer.scaling[adapter] * layer.r[adapter]))
            for path, layer in network.base.named_modules() if adapter in getattr(layer, "scaling", {})}
        save_file(renamed | alphas, folder / KOHYA_FILE)
    return fuse_lora(network)


def loading_code(run, name, absent, shown):
    """Lines of Python, for a card, that load the reference, the start and the LoRA in the repository `name`.

    `absent` are the pipeline's arguments for components that it lacks; `shown` makes a name publishable.
    """
    args, family, pipeline = run.args, run.models.family, run.models.pipeline
    kind, base = type(pipeline).__name__, shown(args.pretrained_model_name_or_path)
    scheduler = type(run.models.generator_process.exported_scheduler(pipeline.scheduler)).__name__
    imports, lines = start_code(args, family, shown)
    return "\n".join([
        *sorted([f"from diffusers import {', '.join(sorted({kind, scheduler}))}", *imports]), "",
        f"pipeline = {kind}.from_pretrained({base!r}{absent})", *lines,
        f"pipeline.scheduler = {scheduler}.from_pretrained({name!r}, subfolder='scheduler')",
        f"pipeline.load_lora_weights({name!r}, weight_name={LORA_FILE!r})"])


def start_code(args, family, shown):
    """(imports, lines) that put the network on which a LoRA was trained, if another, into the pipeline."""
    start = args.generator_init
    if start == "reference" or any("lora" in name for name in names_in(*locate(start))):
        start = args.reference_unet  # the trained LoRA holds the one it began as
    if not start:
        return [], []
    repository, file = locate(start)
    names = names_in(repository, file)
    if any("lora" in name for name in names):
        return [], [f"# The run's base has the LoRA {shown(start)} in it: load it and fuse it first."]
    if not repository or any(name.startswith(FOREIGN_PREFIXES) for name in names):
        return [], [f"# The run started from {shown(start)}: load its {family.network_name} into the pipeline"
                    " first."]
    reader, package = ("load_file(path)", "from safetensors.torch import load_file") if file.endswith(
        ".safetensors") else ("torch.load(path, weights_only=True)", "import torch")
    return ["from huggingface_hub import hf_hub_download", package], [
        f"path = hf_hub_download({repository!r}, {file!r})",
        f"pipeline.{family.network_name}.load_state_dict({reader})"]


def locate(start):
    """(hub repository or None, file) of the weights that a start names; of a LoRA's folder, its file."""
    path, files = Path(start), ("pytorch_lora_weights", "adapter_model")
    if not path.exists() and start.endswith(WEIGHTS_FILES):
        owner, name, file = start.split("/", 2)
        return f"{owner}/{name}", file
    if not (path / "model_index.json").exists():
        for file in (f"{name}.{kind}" for name in files for kind in ("safetensors", "bin")):
            held = path / file if path.is_dir() else try_to_load_from_cache(start, file)
            if isinstance(held, (str, Path)) and Path(held).is_file():
                return None, str(held)
    return None, start


def names_in(repository, file):
    """The names in a weights file, here or in a repository of the hub; [] if there is no such file."""
    path = Path(hf_hub_download(repository, file) if repository else file)
    if not path.is_file():
        return []
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as weights:
            return list(weights.keys())
    held = torch.load(path, map_location="meta", weights_only=True)
    return [*held, *(name for part in held.values() if isinstance(part, dict) for name in part)]
