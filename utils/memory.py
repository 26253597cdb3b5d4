"""Estimate a run's memory and disk space from the models' configurations alone: the extra of `--dry_run`.

One whole iteration runs on the meta device, whose tensors have sizes and no data, and every storage is
counted. Not counted are the CUDA context (about 0.5 GB), cuDNN's workspaces, fragmentation, DDP's buckets and
rewards other than `pickscore`. With `--sharding` gradients count in full, since batches accumulate unsharded.
"""

import contextlib
import copy
import functools
import math
import os
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


FLAGS = {
    "dry_run": {"action": "store_true", "help": "Print an estimate of memory and disk space, and exit."},
}

# Variables by which a launcher tells a process about the others; the estimate is for one process.
PROCESS_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PeakMemory(TorchDispatchMode):
    """Bytes of all live storages, `now` and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, WeakIdKeyDictionary()

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # for models that check whether a mask is all ones
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return output

    @contextlib.contextmanager
    def using(self, module):
        """What `--offload` does: the module is on the device during one use."""
        self.add(size_of(module.parameters()))
        yield
        self.add(-size_of(module.parameters()))


class StubTokenizer:
    """Stands in for a tokenizer, and for the processor of a CLIP-type reward."""

    def __init__(self, name_or_path, subfolder="", revision=None):
        where = {"subfolder": subfolder.replace("tokenizer", "text_encoder"), "revision": revision}
        config = diffusers.AutoencoderKL.load_config(name_or_path, **where)  # a dict, for any class of model
        self.model_max_length = config.get("text_config", config).get("max_position_embeddings", 77)
        side = config.get("vision_config", {}).get("image_size", 224)
        self.image_processor = SimpleNamespace(size={"shortest_edge": side}, crop_size={"height": side},
                                               image_mean=[0.5] * 3, image_std=[0.5] * 3)
        self.tokenizer = self

    def tokenize(self, prompt):
        return []

    def apply_chat_template(self, messages, **_):
        return ""

    def __call__(self, prompts, padding=None, max_length=None, **_):
        length = max_length or self.model_max_length if padding == "max_length" else 1
        tokens = torch.ones(1 if isinstance(prompts, str) else len(prompts), length).long()
        return transformers.BatchEncoding({"input_ids": tokens, "attention_mask": tokens})


class StatelessAdamW(torch.optim.AdamW):
    """AdamW without a state, which does nothing; `estimate` counts the state from the parameters."""

    def register_step_pre_hook(self, hook):
        """Ignore the hook that lends a first moment to a step."""

    def __init__(self, *given, fused=None, **more):
        super().__init__(*given, **more)

    def step(self, closure=None):
        pass


def diffusers_model(kind, name_or_path, output_loading_info=False, **more):
    more.pop("variant", None)
    model = kind.from_config(kind.load_config(name_or_path, **more))
    return (model, {"missing_keys": []}) if output_loading_info else model


def transformers_model(kind, name_or_path, output_loading_info=False, **more):
    more.pop("variant", None)
    more.pop("torch_dtype", None)
    model = kind(kind.config_class.from_pretrained(name_or_path, **more))
    return (model, {"missing_keys": []}) if output_loading_info else model


def blank(kind, name_or_path, **more):
    return StubTokenizer(name_or_path, **more)


@contextlib.contextmanager
def configurations_only():
    """Let the libraries' loaders build models from configurations, without weights, and stub tokenizers."""
    loaders = {diffusers.ModelMixin: diffusers_model, transformers.PreTrainedModel: transformers_model,
               transformers.PreTrainedTokenizerBase: blank, transformers.AutoTokenizer: blank,
               transformers.ProcessorMixin: blank}
    with contextlib.ExitStack() as stack:
        for owner, loader in loaders.items():
            stack.enter_context(mock.patch.object(owner, "from_pretrained", classmethod(loader)))
        yield


@contextlib.contextmanager
def meta_kernels(script):
    """Treat the meta device as a GPU: its autocast, its attention's memory, and an AdamW without a state.

    Autocast is `torch.autocast("cpu", ...)`, which checkpointing restores, with a cache: half-precision
    copies of trained weights stay until its end.
    """
    cache, start, leave = {}, torch.autocast.__init__, torch.autocast.__exit__

    def cast(value, dtype):
        if not isinstance(value, torch.Tensor) or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in cache:
            cache[id(value)] = value.to(dtype)
        return cache[id(value)]

    def casting(function, dtype):
        def run(*inputs, **more):
            if torch.is_autocast_enabled("cpu"):
                inputs = [cast(value, dtype) for value in inputs]
            return function(*inputs, **more)
        return run

    def begin(autocast, device_type, *given, **more):  # older releases of torch refuse "meta"
        start(autocast, "cpu" if device_type == "meta" else device_type, *given, **more)

    def exit(autocast, *error):
        leave(autocast, *error)
        if not torch.is_autocast_enabled("cpu"):
            cache.clear()

    def attention(query, key, value, *_, **__):
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]

    half = {name: casting(getattr(F, name), torch.bfloat16) for name in ("linear", "conv2d")}
    single = {name: casting(getattr(F, name), torch.float32) for name in ("group_norm", "layer_norm")}
    kernels = mock.patch.multiple(F, scaled_dot_product_attention=attention, **half, **single)
    with (kernels, mock.patch.multiple(torch.autocast, __init__=begin, __exit__=exit),
          mock.patch.object(torch.optim, "AdamW", StatelessAdamW)):
        yield


def meta_accelerator(mixed_precision):
    """An accelerator on the meta device, whose reductions are zero."""
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    accelerator.state.device = torch.device("meta")
    accelerator.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16,
                                             enabled=accelerator.mixed_precision == "bf16")
    accelerator.reduce = lambda tensor, **_: torch.zeros(tensor.shape)
    return accelerator


def size_of(parameters):
    return sum(parameter.nbytes for parameter in parameters)


def gib(size):
    return f"{size / 2**30:>9.2f} GiB"


def preference_lora(family, args, script):
    """Bytes of the float32 LoRA of --preference_unet if it is a local file for a shared base, else 0."""
    held = args.preference_unet
    path = script.resolve_weights(family, held) if held and Path(held).exists() else None
    if not args.shared_base or path is None or path.suffix != ".safetensors":
        return 0
    with safe_open(path, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    return 4 * sum(map(math.prod, shapes.values())) if any("lora" in key for key in shapes) else 0


@contextlib.contextmanager
def layers_of_start(family, args, script):
    """While active, a generator that starts from a published LoRA on a UNet gets that LoRA's layers."""
    path, published = Path(args.generator_init), re.search(r"(^|[-_/.])lora", args.generator_init, re.I)
    if path.exists() and path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            published = any("lora" in name and "proj_in" in name for name in file.keys())
    if not published or not args.generator_lora_rank or family.network_name != "unet":
        yield
        return
    lora, layers = script.load_extra("lora", "a LoRA"), script.load_extra("starts", "a LoRA").LORA_LAYERS
    make = lora.make

    def make_with_layers(family, args, base, name, rank):
        given = copy.copy(args)
        given.lora_layers = layers if name == "generator" else args.lora_layers
        return make(family, given, base, name, rank)
    with mock.patch.object(lora, "make", make_with_layers):
        yield


def prepare(family, args, process, script, accelerator):
    """The script's run of these flags, without data; rewards other than pickscore become a mean of pixels.

    Terms and observers of the user's own are left out.
    """
    layers, args = layers_of_start(family, args, script), copy.copy(args)
    args.offload, args.offload_ema, args.sharding, args.use_8bit_adam = False, False, None, False
    args.generator_init, args.assistant_updates = "reference", 1
    args.generator_timesteps = args.generator_timesteps[-1:]  # earlier steps: the same without gradients
    args.extras = {name: flag for name, flag in args.extras.items()
                   if name not in ("terms/own", "terms/alarms")}
    if args.preference_unet:  # a whole network, except a local LoRA on the shared base
        args.preference_unet = args.pretrained_model_name_or_path
        if preference_lora(family, args, script):
            del args.extras["terms/preference"]
    if args.reference_unet and script.resolve_weights(family, args.reference_unet):
        args.reference_unet = None  # a file of weights for the pipeline's own network
    args.validation_reward = []
    args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, 2)  # the second finds gradients
    others = {script.short_name(name): (scale, lambda dtype: lambda images, prompts: images.mean((1, 2, 3)))
              for name, scale in args.reward.items() if name != "pickscore"}
    args.reward = {name: scale for name, scale in args.reward.items() if name == "pickscore"}
    with accelerator.device, layers:
        models = script.load_models(family, args, process, script.find_rewards(args) | others, accelerator)
        terms, observers = script.build_terms(args, models)
    prompts = script.Prompts(["a prompt"], args.seed)
    return script.TrainingRun(args, models, terms, observers, prompts, accelerator)


def estimate(family, args, process, script):
    """Print the networks' sizes, the estimated peak of one GPU and the disk space; returns the peak in bytes.

    Args:
        family, args: the models' family and the flags. process: the reference's forward process. script: the
            training script's module, whose models and step are run.
    """
    alone = {name: value for name, value in os.environ.items() if name not in PROCESS_VARIABLES}
    with (mock.patch.dict(os.environ, alone, clear=True), configurations_only(), meta_kernels(script),
          PeakMemory() as memory):
        run = prepare(family, args, process, script, meta_accelerator(args.mixed_precision))
        memory.add(preference_lora(family, args, script))
        models, counted = run.models, set()
        trained = {name: list(values.values()) for name, values in run.parameters.items()}
        counted |= {id(parameter) for values in trained.values() for parameter in values}
        lines = [f"{'':13}{'parameters':>12}" + "".join(f"{name:>13}" for name in (
            "weights", "gradients", "optimizer", "EMA"))]
        sharded = 0
        networks = {name: getattr(models, name) for name in (
            "text_encoders", "scorers", "reference", "assistant", "generator")}
        for name, network in functools.reduce(dict.__or__, (term.networks for term in run.terms.values()),
                                              networks).items():
            own = trained.get(name, [])
            held = own + [p for p in network.parameters() if id(p) not in counted]
            counted |= {id(parameter) for parameter in held}
            gradients, ema = size_of(own), size_of(own) * (name == "generator" and args.use_ema)
            optimizer = gradients // 2 if args.use_8bit_adam else gradients * (1 + (args.adam_beta1 > 0))
            if args.offload_ema:  # in its update it replaces the gradients
                memory.add(-ema)
                ema = 0
            memory.add(optimizer)
            if name not in ("text_encoders", "scorers"):
                sharded += size_of(held) + optimizer + ema
            lines.append(f"{name:13}{sum(p.numel() for p in held) / 1e6:>10,.1f} M"
                         + "".join(map(gib, (size_of(held), gradients, optimizer, ema))))
        if args.offload:
            resting = torch.nn.ModuleList([models.text_encoders, models.scorers, models.pipeline.vae])
            memory.add(-size_of(resting.parameters()))
            models.using = memory.using
        memory.peak = between = memory.now
        script.train_step(run)
    total = f"one GPU: {memory.peak / 2**30:.1f} GiB, between steps {between / 2**30:.1f}"
    if args.sharding:  # gathered: what is outside the blocks, one block, and the next, prefetched
        blocks = [size_of(block.parameters()) for block in models.generator.modules()
                  if type(block).__name__ in family.sharded_blocks]
        rest = size_of(models.generator.parameters()) - sum(blocks)
        whole, parts = (memory.peak - sharded + rest + 2 * max(blocks)) / 2**30, sharded / 2**30
        total = f"one of N GPUs: {whole:.1f} + {parts:.1f} / N GiB, of 8: {whole + parts / 8:.1f}"
    run.args.use_8bit_adam = args.use_8bit_adam
    checkpoint = run.checkpoint_size() / 1e9
    kept = math.ceil(args.max_train_steps / args.checkpointing_steps)
    kept = min(kept, args.checkpoints_total_limit or kept)
    exported = 4e-9 * sum(
        p.numel() for part in (models.text_encoders, models.pipeline.vae, models.generator)
        for name, p in part.named_parameters() if "lora_" not in name)
    others = [name for name, _ in args.term]
    others += [script.short_name(name) for name in (*args.reward, *args.validation_reward)
              if name != "pickscore" or name not in args.reward]
    lines.append(f"estimated peak of {total} GiB; batch {args.train_batch_size}, {args.resolution} pixels"
                 + (f"; not counted: {', '.join(others)}" if others else ""))
    lines.append(f"disk: {kept} x {checkpoint:.3g} GB for checkpoints, one more while it is written, and"
                 f" {exported:.3g} GB for the pipeline: {(kept + 1) * checkpoint + exported:.3g} GB")
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(lines))
    return memory.peak
