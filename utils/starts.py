"""Starts that others published: their forms, their LoRAs, and what they were distilled for.

The extra of `--generator_init`, `--reference_unet` and `--preference_unet` where they name neither a folder
of diffusers nor a file with its names, of `--generator_prediction_type`, and of the evaluation's `--unet` and
`--lora`. docs/recipes.md lists the known starts.
"""

import collections
import contextlib
import dataclasses
import json
import re
from pathlib import Path

import diffusers
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file


FLAGS = {
    "generator_prediction_type": {"choices": ["epsilon", "v_prediction", "sample"],
        "help": "What the generator's network predicts (default: the start's own, else the reference's)."
                " Assistant and reference are read as the reference's scheduler says."},
}
WEIGHTS_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin",
              "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"
KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
ORIGINAL_PREFIXES = ("model.diffusion_model.", "input_blocks.", "joint_blocks.", "double_blocks.")


def trailing(steps):
    """Timesteps of a scheduler of `steps` steps with trailing spacing: 999 749 499 249 for four."""
    return [round(1000 - 1000 * step / steps) - 1 for step in range(steps)]


# (pattern of the end of a start's name, its flags); the first match counts. From the models' pages and their
# authors' code; LCM's timesteps are those of LCMScheduler.
KNOWN_STARTS = [
    (r"dmd2_sdxl_1step", {"generator_timesteps": [399]}),
    (r"dmd2_sdxl_4step", {"generator_timesteps": [999, 749, 499, 249]}),
    (r"sdv1\.5/laion6\.25_", {"generator_timesteps": [999]}),
    (r"(distar_(long|short)|sim|dipp|diff_instruct)_1step", {"generator_timesteps": [399]}),
    (r"Hyper-SDXL-1step-Unet", {"generator_timesteps": [800]}),
    (r"sdxl_lightning_1step(_unet)?_x0",
     {"generator_timesteps": [999], "generator_prediction_type": "sample"}),
    *((rf"(sdxl_lightning_|Hyper-SD(XL|15)-){steps}steps?[-_.]", {"generator_timesteps": trailing(steps)})
      for steps in (1, 2, 4, 8)),
    (r"lcm[-_]lora", {"generator_timesteps": [999, 759, 499, 259]}),
    (r"sd(xl)?[-_]turbo|sd_xl_turbo", {"generator_timesteps": [999], "resolution": 512}),
    (r"PixArt-Alpha-DMD", {"generator_timesteps": [400]}),
    (r"FLUX\.2-klein-4B", {"generator_timesteps": [1000, 967.38, 908.14, 767.19]}),
    (r"stable-diffusion-3\.5-large-turbo", {"generator_timesteps": [1000, 857.69, 602.15, 8.93]}),
]
DETERMINISTIC = r"sdxl_lightning|Hyper-SD"  # several steps of theirs; here each but the first adds noise
# Layers of the published LoRAs on SDXL: of rank 64 in half precision, the size of LCM-LoRA's file to 0.1%.
LORA_LAYERS = ("to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,"
               "downsamplers.0.conv,upsamplers.0.conv,time_emb_proj")
UNSUPPORTED = {r"instaflow": "InstaFlow predicts data minus noise, which no scheduler of the result reads;"
               " choose another start"}


# ------------------------------------------------------------------------------------------ what a start is

def look_up(family, args, script):
    """Set the generator's timesteps, resolution and prediction type where no flag does.

    The first source counts that has a value: the flag; the start's model card, then its configurations; the
    table of known starts; for the resolution, the reference's configuration. Else the value is left to the
    family's default. Returns warnings of contradictions and guesses; exits for a start that cannot be used.
    """
    warnings, start, pipeline, said = [], args.generator_init, args.pretrained_model_name_or_path, {}
    tail = tail_of(start)
    for pattern, reason in UNSUPPORTED.items():
        if re.search(pattern, tail, re.IGNORECASE):
            script.exit_with_error(f"--generator_init {start}: {reason}")
    places = script.load_extra("places", "a name") if script.extra_path("places").is_file() else None
    held = [place for place in (start, pipeline) if Path(place).exists() or places and place != "reference"
            and not places.fault_of(place)]
    pixels = pixels_per_latent(pipeline, args.revision) if pipeline in held else None
    of_pipeline = of_models(pipeline, family, pixels, args.revision) if pipeline in held else {}
    if start != "reference":
        card, faults = of_card(start, family) if start in held else ({}, [])
        said = of_known(tail) | (of_models(start, family, pixels) if start in held else {}) | card
        warnings += faults
    kind = "generator_prediction_type"
    own = of_pipeline.pop(kind, None)
    for place in filter(None, (args.reference_unet, args.preference_unet)):
        theirs = of_models(place, family, pixels).get(kind) if Path(place).exists() else None
        if theirs not in (None, own):
            warnings.append(f"the network of {place} predicts {theirs}, but is read as {own}, which the"
                            " reference pipeline's scheduler names")
    if said.get(kind) == own and args.generator_prediction_type is None:
        said.pop(kind, None)  # it is the reference's
    for name, value in (of_pipeline | said).items():
        given, source = getattr(args, name), start if name in said else pipeline
        if given is None:
            setattr(args, name, value)
        elif given != value:
            warnings.append(f"--{name} is {in_words(given)}, but {source} is made for {in_words(value)},"
                            " which is used without the flag")
    if args.generator_timesteps is None and start not in ("reference", family.defaults["generator_init"]):
        warnings.append(f"--generator_init {start} does not state its timesteps:"
                        f" {in_words(family.defaults['generator_timesteps'])} is used; if it was made for"
                        " others, give --generator_timesteps")
    warnings += of_last_step(family, args) if pipeline in held else []
    if re.search(DETERMINISTIC, tail) and len(args.generator_timesteps or ()) > 1:
        warnings.append(f"--generator_init {start} was distilled for deterministic steps; here each step but"
                        " the first adds new noise, in training and in the exported pipeline alike")
    return warnings


def tail_of(name):
    """The part of a start's name by which it is known; of a local file or folder, its own name."""
    path = Path(name)
    return path.name if path.exists() and path.name != "pytorch_model.bin" else "/".join(path.parts[-4:])


def of_known(tail):
    """The flags of a known start by its name; {} if it is not known."""
    return next((flags for pattern, flags in KNOWN_STARTS if re.search(pattern, tail, re.IGNORECASE)), {})


def of_last_step(family, args):
    """[warning] if rewarding the last step alone would hardly train the generator, else []."""
    timesteps = args.generator_timesteps or [0]
    if len(timesteps) < 2 or args.reward_steps == "all" or not (args.reward or args.reward_scale):
        return []
    with contextlib.suppress(OSError, ValueError, IndexError):  # the script names what is wrong
        process = family.process_class.from_scheduler(diffusers.DDPMScheduler.load_config(
            args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision))
        if args.generator_prediction_type:
            process = reading(process, args.generator_prediction_type)
        a, s = process.coefficients(torch.tensor(timesteps[-1:]))
        gain = process.clean_prediction(torch.ones(1), 0, a, s) - process.clean_prediction(
            torch.zeros(1), 0, a, s)
        if gain.abs() < 0.1:
            return [f"the generator's last call, at timestep {timesteps[-1]:g}, adds {gain.abs().item():.2g}"
                    " of the network's output to the sample, so that the reward trains almost nothing: give"
                    " --reward_steps all"]
    return []


def in_words(value):
    return " ".join(map(str, value)) if isinstance(value, list) else value


def of_card(start, family):
    """({flag: value}, faults) of the model card of a generator that these scripts trained."""
    place, data = Path(start), {}
    card = (place if place.is_dir() else place.parent) / "README.md"
    with contextlib.suppress(Exception):  # the card is optional
        data = ModelCard.load(card if place.exists() else "/".join(start.split("/")[:2])).data.to_dict()
    held = {name: data[name] for name in ("generator_timesteps", "resolution") if data.get(name) is not None}
    wrong = [name for name, value in held.items() if not (
        are_timesteps(value, family.process_class.fractional_timesteps) if name == "generator_timesteps"
        else type(value) is int and value > 0)]
    return ({name: value for name, value in held.items() if name not in wrong},
            [f"{name} {held[name]!r} in the model card of {start} is no such value, and is ignored"
             for name in wrong])


def are_timesteps(value, fractional=True):
    """Whether a card's value is a list of timesteps, each below the one before; whole unless `fractional`."""
    kinds = (int, float) if fractional else (int,)
    return (isinstance(value, list) and bool(value) and all(type(one) in kinds for one in value)
            and all(1001 > one > following for one, following in zip(value, [*value[1:], 0])))


def of_models(place, family, pixels, revision=None):
    """What the configurations of a network or pipeline say: its resolution, what its scheduler reads."""
    said = {}
    if Path(place).is_file() or place.endswith(WEIGHTS_FILES):
        return said
    with contextlib.suppress(OSError, KeyError, TypeError, AttributeError):
        config = diffusers.DDPMScheduler.load_config(place, subfolder="scheduler", revision=revision)
        if "FlowMatch" not in config["_class_name"]:
            said["generator_prediction_type"] = config.get("prediction_type", "epsilon")  # diffusers' default
    with contextlib.suppress(OSError, KeyError, TypeError):  # the script names a damaged configuration
        size = find_network(place, family.network_name, revision)[0]["sample_size"]
        if isinstance(size, int) and pixels:
            said["resolution"] = size * pixels
    return said


def pixels_per_latent(pipeline, revision):
    """Pixels per latent of a pipeline's VAE, from its configuration, or None."""
    with contextlib.suppress(OSError, KeyError, TypeError):
        config = diffusers.AutoencoderKL.load_config(pipeline, subfolder="vae", revision=revision)
        return 2**(len(config["block_out_channels"]) - 1)


def reading(process, prediction_type):
    """The reference's forward process, for a generator that predicts something else; ValueError for flows."""
    if not hasattr(process, "prediction_type"):
        raise ValueError("a flow-matching network predicts the velocity, and nothing else is supported")
    return dataclasses.replace(process, prediction_type=prediction_type)


# ------------------------------------------------------------------------------------------- files and names

def find_network(name_or_path, component, revision=None):
    """(configuration, subfolder) of the denoiser in a network or pipeline; OSError if there is none."""
    place = Path(name_or_path)
    if not place.is_dir() or (place / component).is_dir():  # else diffusers reads the folder's own for both
        with contextlib.suppress(OSError):
            return diffusers.UNet2DConditionModel.load_config(
                name_or_path, subfolder=component, revision=revision), component
    return diffusers.UNet2DConditionModel.load_config(name_or_path, revision=revision), None


def find_weights(name_or_path, component):
    """The file of weights or of a LoRA that a name stands for, downloaded if on the hub; None for a network.

    Raises OSError if it is neither.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if path.is_file():
        return path
    if not path.exists() and name.endswith(WEIGHTS_FILES):
        owner, repository, file = ["", "", *name.split("/", 2)][-3:]
        if owner in ("", ".", "..", "~"):
            raise OSError("there is no such file")
        return download(f"{owner}/{repository}", file)
    try:
        find_network(name, component)
        return None
    except OSError:
        return find_lora(name)


def find_lora(name_or_path):
    """The LoRA file in a folder or a repository of the hub; raises OSError if there is none."""
    for file in LORA_FILES:
        if Path(name_or_path, file).is_file():
            return Path(name_or_path, file)
        if not Path(name_or_path).exists():
            with contextlib.suppress(EntryNotFoundError):
                return download(name_or_path, file)
    raise OSError(f"it holds neither the configuration of a network nor a LoRA ({', '.join(LORA_FILES[:2])})")


def download(repository, file):
    """A file of a repository on the hub, and PEFT's configuration beside it."""
    if Path(file).name.startswith("adapter_model"):
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(repository, str(Path(file).with_name(PEFT_CONFIG)))
    return Path(hf_hub_download(repository, file))


def read_weights(path):
    """The state dict in a weights file; raises the libraries' errors if it is damaged or holds code."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(
        path, map_location="cpu", weights_only=True)


def unwrapped(weights):
    """A state dict without what trainers put around it: {"state_dict": weights}, names after `module.`."""
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"it holds no weights but a {type(weights).__name__} of nothing known")
    for name in ("state_dict", "model", "module"):
        if isinstance(weights.get(name), dict):
            weights = weights[name]
    while weights and all(key.startswith(("module.", "_orig_mod.")) for key in weights):
        weights = {key.partition(".")[2]: value for key, value in weights.items()}
    return weights


def understand(weights, path, network, component, pipeline_class):
    """(weights in diffusers' names, None) or ({}, a LoRA as `read_lora` has it) of a file for a network.

    Raises ValueError if it is a LoRA on another network, or a form that diffusers does not convert.
    """
    weights = unwrapped(weights)
    if any("lora" in key for key in weights):
        return {}, read_lora(weights, path, network, component, pipeline_class)
    if any(key.startswith(ORIGINAL_PREFIXES) for key in weights):
        return from_original(weights, network), None
    return weights, None


def from_original(weights, network):
    """A checkpoint in its authors' names, or its denoiser alone, as diffusers converts it for the network.

    Raises ValueError for a class of network that diffusers does not convert.
    """
    (prefix, *_), kind = ORIGINAL_PREFIXES, type(network).__name__
    if kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise ValueError(f"diffusers converts no file in its authors' names to {kind}")
    if inside := [key for key in weights if key.startswith(prefix)]:
        weights = {key.removeprefix(prefix): weights[key] for key in inside}
    if kind == "UNet2DConditionModel":  # the one converter that needs the prefix
        weights = {prefix + key: value for key, value in weights.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    return convert(checkpoint=weights, config=dict(network.config))


def replacement(name_or_path, network, component, pipeline_class):
    """A pipeline's network replaced by another: that of a pipeline or network, or a weights file.

    Raises ValueError if a file does not fit, or is a LoRA.
    """
    path = find_weights(name_or_path, component)
    if path is None:
        place = {"subfolder": find_network(name_or_path, component)[1], "torch_dtype": network.dtype,
                 "output_loading_info": True}
        try:
            found, report = type(network).from_pretrained(name_or_path, **place)
        except OSError as error:
            if "file named" not in str(error):
                raise  # else half-precision files may be there alone
            found, report = type(network).from_pretrained(name_or_path, variant="fp16", **place)
        if report["missing_keys"]:  # diffusers would leave them without values
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        check_finite(found.state_dict())
        return found
    weights, lora = understand(read_weights(path), path, network, component, pipeline_class)
    if lora:
        raise ValueError("it is a LoRA: give it as --lora")
    check_finite(weights)
    network.load_state_dict(weights)
    return network


def prediction_type_of(name_or_path):
    """What a known start predicts, or a pipeline by its scheduler; None if neither says it."""
    if kind := of_known(tail_of(name_or_path)).get("generator_prediction_type"):
        return kind
    with contextlib.suppress(OSError):
        if not str(name_or_path).endswith(WEIGHTS_FILES):
            config = diffusers.DDPMScheduler.load_config(name_or_path, subfolder="scheduler")
            return config.get("prediction_type")


def check_finite(weights):
    """Raise ValueError if one of the weights {name: tensor} is infinite or not a number."""
    if bad := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"not everything in it is a finite weight: {', '.join(bad[:3])}")


# -------------------------------------------------------------------------------------------------- LoRAs

def read_lora(weights, path, network, component, pipeline_class):
    """A LoRA in any trainer's naming: ({name: tensor} in PEFT's naming, settings of its LoraConfig).

    The pipeline's own `lora_state_dict` converts kohya's names and those of a model's authors. Others may
    begin with PEFT's prefix, the component's, `transformer.`, `diffusion_model.` or none. Alphas are kept.
    Raises ValueError with the names that are no layer of the network.
    """
    if odd := [key for key in weights if not re.search(r"lora[._](A|B|down|up)\b|\.alpha$", key)]:
        raise ValueError(f"it is more than a LoRA: {', '.join(odd[:3])}")
    kind, config = getattr(diffusers, pipeline_class), own_config(weights, path, component)
    if all(key.startswith(KOHYA_PREFIXES) for key in weights) and hasattr(kind, "lora_state_dict"):
        more = {"unet_config": network.config} if component == "unet" else {}
        found = kind.lora_state_dict(dict(weights), **more)
        weights, alphas = found if isinstance(found, tuple) else (found, {})
    else:
        alphas = {key: value for key, value in weights.items() if key.endswith(".alpha")}
        weights = {key: value for key, value in weights.items() if key not in alphas}
    state = {plain(name, component): value for name, value in weights.items()}
    if any(name.startswith(ORIGINAL_PREFIXES) for name in state) and hasattr(kind, "lora_state_dict"):
        state = kind.lora_state_dict({f"diffusion_model.{name}": value for name, value in state.items()})
        state = {plain(name, component): value for name, value in state.items()}
    alphas = {plain(name.removesuffix(".alpha"), component).removesuffix(".lora_A.weight"): float(value)
              for name, value in (alphas or {}).items()}
    ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in state.items()
             if name.endswith(".lora_A.weight")}
    known = ranks.keys() & {name for name, _ in network.named_modules()}
    foreign = [name for name in state if name.rpartition(".lora_")[0] not in known
               or not name.endswith((".lora_A.weight", ".lora_B.weight"))] + [*alphas.keys() - known]
    if foreign or not ranks or len(state) != 2 * len(ranks):
        raise ValueError(f"its names are not those of a LoRA on this network: {', '.join(foreign[:3])}")
    check_finite(state | {f"alpha of {name}": torch.tensor(value) for name, value in alphas.items()})
    return state, config or config_of(ranks, ranks | alphas)


def plain(name, component):
    """A LoRA tensor's name in PEFT's naming, without a prefix."""
    name = name.replace(".lora_down.", ".lora.down.").replace(".lora_up.", ".lora.up.")
    (name,) = convert_unet_state_dict_to_peft({name.replace(".default.weight", ".weight"): None})
    for prefix in ("base_model.model.", f"{component}.", "transformer.", "model.", "diffusion_model."):
        name = name.removeprefix(prefix)
    return name


def own_config(weights, path, component):
    """Settings of the LoraConfig that diffusers keeps in the file's header or PEFT beside it, or {}.

    Raises ValueError if PEFT's are lost: the file's scale is in them.
    """
    held, beside = {}, path.parent / PEFT_CONFIG
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            held = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if held:
        return {name.removeprefix(f"{component}."): value for name, value in held.items()
                if name.startswith(f"{component}.")}
    if not any(key.startswith("base_model.model.") for key in weights) or any(
            key.endswith(".alpha") for key in weights):
        return {}
    if not beside.is_file():
        raise ValueError(f"its alpha is in {PEFT_CONFIG}, which is not beside it")
    known = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")
    return {name: value for name, value in json.loads(beside.read_text()).items() if name in known}


def config_of(ranks, alphas):
    """Settings of a LoraConfig with a rank and an alpha for each layer."""
    common = {kind: collections.Counter(held.values()).most_common(1)[0][0]
              for kind, held in (("r", ranks), ("lora_alpha", alphas))}
    others = {kind: {f"^{name}": value for name, value in held.items() if value != common[kind]}
              for kind, held in (("r", ranks), ("lora_alpha", alphas))}
    return common | {"rank_pattern": others["r"], "alpha_pattern": others["lora_alpha"],
                     "target_modules": [*ranks]}


def load_lora(pipeline, network, component, name_or_path):
    """Load a LoRA into a pipeline: onto its network, or with a part for text encoders as diffusers does.

    Raises OSError if there is none, ValueError if it does not fit.
    """
    is_file = Path(name_or_path).is_file() or str(name_or_path).endswith(WEIGHTS_FILES)
    path = find_weights(name_or_path, component) if is_file else find_lora(name_or_path)
    weights = unwrapped(read_weights(path))
    own = {key: value for key, value in weights.items()
           if not key.startswith(("text_encoder", *KOHYA_PREFIXES[1:]))}
    state, config = read_lora(own, path, network, component, type(pipeline).__name__)
    if len(own) < len(weights):
        return pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    network.load_lora_adapter(state, prefix=None, adapter_name="default", metadata=config)
    network.to(network.dtype)
