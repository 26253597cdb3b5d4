#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "diffusers>=0.39", "transformers>=4.55", "accelerate", "peft",
#                 "datasets"]
# ///
"""Diff-Instruct* (DI*) for FLUX.2 [klein]: post-train its four-step generator.

The four-step model by LoRAs, and the same without a reward, which only keeps it near the base model:

    accelerate launch examples/families/train_diff_instruct_star_flux2_klein.py --prompts_file prompts.txt \\
        --mixed_precision bf16 --generator_lora_rank 64 --assistant_lora_rank 64 --shared_base assistant \\
        --gradient_checkpointing

    accelerate launch examples/families/train_diff_instruct_star_flux2_klein.py --prompts_file prompts.txt \\
        --mixed_precision bf16 --recipe sim --cfg_scale 4

The same command with `--resume_from_checkpoint latest` resumes a run.

The method is that of the paper ("David and Goliath", arXiv 2410.20898; docs/method.md), for the forward
process x_t = (1 - sigma) x0 + sigma noise, with t = 1000 sigma and a network that predicts v = noise - x0.
Latents are packed, 2 x 2 patches as channels, and normalised by the VAE's batch norm, as the stock pipeline's
are. The generator's steps are Euler's, without new noise, as that pipeline takes them.
"""

from dataclasses import dataclass


# ------------------------------------------------------------------------------ head: FLUX.2 [klein]

NETWORK, PART = "Flux2Transformer2DModel", "transformer"  # the networks' class, and their name in a pipeline
FAMILY, KIND = "FLUX.2 klein", (NETWORK, False)  # what `kind_of` tells of it
CONTINUOUS, DIVISOR, PATCH = True, 16, 2  # are times fractional; pixels of a latent; of packed latents
# The times are those of the stock pipeline's four steps at 1024 pixels.
DEFAULTS = {"pretrained_model_name_or_path": "black-forest-labs/FLUX.2-klein-base-4B",
            "generator_init": "black-forest-labs/FLUX.2-klein-4B",
            "generator_timesteps": [1000.0, 967.38, 908.14, 767.19], "resolution": 1024,
            "timestep_sampling": "logit_normal", "learning_rate": 1e-6,
            "output_dir": "diff-instruct-star-flux2-klein"}
DPO_UNET = None
LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out",
                "to_qkv_mlp_proj"]
SHARDED_BLOCKS = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")  # gathered one at a time


def load_pipeline(args, dtype, transformer=None):
    """The reference pipeline, frozen; a given `transformer` takes the place of the reference's."""
    tokenizer = load_part(transformers.AutoTokenizer, "tokenizer", args)
    tokenizer.model_max_length = min(tokenizer.model_max_length, 512)  # what the pipeline reads of a prompt
    if not getattr(tokenizer, "chat_template", True):
        fail(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: its tokenizer lacks"
             " its chat template; fetch the whole folder")
    return diffusers.Flux2KleinPipeline(
        vae=load_part(diffusers.AutoencoderKLFlux2, "vae", args, dtype),
        text_encoder=load_part(transformers.Qwen3ForCausalLM, "text_encoder", args, dtype),
        tokenizer=tokenizer,
        transformer=transformer or load_part(diffusers.Flux2Transformer2DModel, "transformer", args, dtype),
        scheduler=load_part(diffusers.FlowMatchEulerDiscreteScheduler, "scheduler", args))


def encode_prompts(pipeline, prompts, resolution, null=False):
    """The conditioning, the batch first; with `null`, as many null prompts follow the prompts."""
    prompts = [*prompts, *[""] * (len(prompts) if null else 0)]
    with torch.no_grad():
        embeds, ids = pipeline.encode_prompt(prompts, device=pipeline.text_encoder.device)
    return {"encoder_hidden_states": embeds, "txt_ids": ids}


def kind_of(config):
    """By what a network's configuration tells of its family, and what must be the reference's."""
    return ((config["_class_name"], config.get("guidance_embeds")),
            (config.get("num_layers"), config.get("joint_attention_dim")))


def run(network, x_t, timesteps, conditioning):
    """The network's output (batch, C, H, W), of tokens and their places."""
    height, width = x_t.shape[-2:]
    places = torch.cartesian_prod(*(torch.arange(side, device=x_t.device) for side in (1, height, width, 1)))
    output = network(hidden_states=x_t.flatten(2).transpose(1, 2), timestep=timesteps / 1000,
                     img_ids=places.expand(len(x_t), -1, -1), **conditioning).sample
    return output.transpose(1, 2).unflatten(2, (height, width))


def unpack(vae, latents):
    """The VAE's own latents (batch, C / 4, 2 h, 2 w) of packed and normalised ones (batch, C, h, w)."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    latents = latents * std.to(latents) + vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
    return torch.nn.functional.pixel_shuffle(latents, 2)


def decode(vae, latents):
    """Latents (batch, C, h, w) -> images (batch, 3, H, W), in [0, 1] up to overshoot, float32."""
    return vae.decode(unpack(vae, latents).to(vae.dtype)).sample.float() / 2 + 0.5


def schedule_words(timesteps):
    """The argument of the pipeline's call for the generator's steps."""
    return f"sigmas={[timestep / 1000 for timestep in timesteps]}"


@dataclass(frozen=True)
class Diffusion:
    """The forward process x_t = (1 - sigma) x0 + sigma noise, t = 1000 sigma, and what outputs mean in it.

    All tensors are (batch, C, H, W), but for a = 1 - sigma and s = sigma, (batch, 1, 1, 1).
    """

    prediction_type: str = "flow"

    def coefficients(self, timesteps):
        """a and s of timesteps (batch,)."""
        sigma = (timesteps / 1000).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def clean_prediction(self, output, x_t, a, s):
        """D(x_t), the clean latents that a network's output stands for."""
        return x_t - s * output

    def target(self, x0, noise, a, s):
        """What the network's output is trained to be, v; its squared error is that of x0 over sigma^2."""
        return noise - x0

    def advance(self, x_t, x0, noise, now, following):
        """What a rollout's next step reads: Euler's step of the stock scheduler, without new noise."""
        return x0 + (x_t - x0) * (following / now).view(-1, 1, 1, 1)

    def to(self, device):
        return self


def load_diffusion(args):
    """The reference's `Diffusion`; ends the run where its schedule does not suit the method or the flags."""
    reference = args.pretrained_model_name_or_path
    with blame(f"--pretrained_model_name_or_path {reference}, its scheduler"):
        kind = diffusers.FlowMatchEulerDiscreteScheduler.load_config(
            reference, subfolder="scheduler", revision=args.revision)["_class_name"]
        if "FlowMatch" not in kind:
            raise ValueError(f"{kind} is not of flow matching")
    first = args.generator_timesteps[0]  # the largest
    for flag, value in (("generator_timesteps", first), ("max_timestep", args.max_timestep)):
        if value > 1000:
            fail(f"--{flag} {value} is above 1000, which is pure noise")
    return Diffusion()


def generator_scheduler(scheduler):
    """The exported scheduler, which takes the call's sigmas as they are."""
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        scheduler.config, shift=1.0, use_dynamic_shifting=False, shift_terminal=None, use_karras_sigmas=False,
        use_exponential_sigmas=False, use_beta_sigmas=False, stochastic_sampling=False)


# ---- body: the same to the letter in every training script; `make sync` writes it under each head ----

import argparse
import contextlib
import copy
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from dataclasses import fields
from datetime import timedelta
from pathlib import Path


# ------------------------------------------------------------------------------------------------ settings
# First, so that --help and a wrong flag are answered before the libraries below are imported.

# The rows of the paper's Table 2: divergence, alpha_rew, alpha_cfg, guidance mode (, the reference's UNet).
RECIPES = {
    "di_star_in": ("score", 100.0, 7.5, "in"),  # the paper's best
    "di_star_out": ("score", 100.0, 7.5, "out"),
    "sim": ("score", 0.0, 7.5, "in"),
    "diff_instruct_pp": ("kl", 100.0, 7.5, "in"),
    "diff_instruct": ("kl", 0.0, 7.5, "in"),
    "di_star_in_reward_1": ("score", 1.0, 7.5, "in"),
    "di_star_in_reward_10": ("score", 10.0, 7.5, "in"),
    "di_star_in_cfg_4.5": ("score", 100.0, 4.5, "in"),
    "score_only": ("score", 0.0, 0.0, "in"),
    "kl_only": ("kl", 0.0, 0.0, "in"),
} | ({"di_star_dpo": ("score", 100.0, 7.5, "in", DPO_UNET)} if DPO_UNET else {})
RECIPE_FLAGS = ("divergence", "reward_scale", "cfg_scale", "cfg_mode", "reference_unet")
REWARDS = ("pickscore", "hpsv2.1", "hpsv2.0", "imagereward", "clip", "aesthetic", "mps")  # the others: utils/
PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
LORA_FILE = "pytorch_lora_weights.safetensors"
UNSHARDABLE = ("shared_base", "generator_lora_rank", "assistant_lora_rank", "use_8bit_adam", "offload_ema")
UNSAVED = ("hub_token", "resume_from_checkpoint", "state")  # the latter is the checkpoint's
# A run can be resumed with other values of these; a change of any other flag would make it another run.
RESUMABLE = {"allow_tf32", "checkpointing_steps", "checkpoints_total_limit", "decode_batch_size",
             "gradient_accumulation_steps", "gradient_checkpointing", "hub_model_id", "logging_dir",
             "logging_steps", "max_skipped_updates", "max_train_steps", "min_diversity",
             "num_validation_images", "offload", "offload_ema", "output_dir", "push_to_hub", "report_to",
             "train_batch_size", "validation_prompts", "validation_reward", "validation_steps"}
POSITION = ("step", "assistant_updates_done", "prompts_seen", "skipped", "first_diversity")  # in state.json
PUBLISHED = ["README.md", "model_index.json", LORA_FILE, "scheduler/*", "text_encoder*/*", "tokenizer*/*",
             f"{PART}/*", "vae/*"]
TRAINED = ("assistant", "generator")
RESUME = "--resume_from_checkpoint latest"
LOWER = "lower --learning_rate or the reward's scale, or look at the reward"
GRID_SIDE = 8192  # pixels of the validation images' grid; of twice as many readers refuse to open it
SHOWN = ("reward", "grad_divergence", "grad_reward")  # beside the progress bar


def fail(message):
    """End the run for bad input: one line on standard error without the hub's tokens, exit status 2."""
    bars = list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ()))
    for bar in bars:
        bar.close()
    line = "error: " + re.sub(r"\bhf_\w{6,}", "hf_...", " ".join(message.split()))
    print("\n" * bool(bars) + line, file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def blame(what, remedy="", errors=Exception):
    """End the run with one line where a library raises: `what`, a flag or file, and then its own words."""
    try:
        yield
    except errors as error:
        words = " ".join(str(error).split()) or type(error).__name__
        fail(f"{what}: {words[:300]}" + (f"; {remedy}" if remedy else ""))


def number(kind, accepts, description):
    """An argparse type: a number of a kind, int or float, that is accepted."""
    def parse(text):
        if not accepts(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return value
    parse.__name__ = kind.__name__  # by which argparse calls what is no number
    return parse


positive_int = number(int, lambda value: value > 0, "a whole number above 0")
non_negative_int = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1")
positive_float = number(float, lambda value: 0 < value < math.inf, "a finite number above 0")
non_negative_float = number(float, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
fraction = number(float, lambda value: 0 <= value < 1, "a fraction, from 0 to below 1")


def name_and_scale(text):
    """NAME or NAME=SCALE -> (name, scale or None)."""
    name, mark, scale = text.rpartition("=")
    return (name, positive_float(scale)) if mark else (text, None)


def short_name(reward):
    """A reward's name without the location of its weights, for logs and cards."""
    return reward.partition(":")[0] if reward.partition(":")[0] in REWARDS else reward


def parse_args(argv=None):
    """Flags with the recipe resolved; ends the run (status 2) where they contradict each other."""
    parser = argparse.ArgumentParser(
        usage=f"accelerate launch {Path(__file__).name} [flags]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")
    add = parser.add_argument_group("models").add_argument
    add("--pretrained_model_name_or_path", help="Reference pipeline: a folder or hub id.")
    add("--revision", help="Revision of the reference pipeline on the hub.")
    add("--variant", help="Weights variant of the reference pipeline, such as fp16.")
    add("--pretrained_vae_model_name_or_path", help="VAE that replaces the pipeline's.")
    add("--reference_unet", f"--reference_{PART}",
        help="Network that replaces the reference pipeline's: a DPO model, say.")
    add("--generator_init",
        help="Start of the generator: `reference` (to be distilled with --recipe sim), a pipeline or UNet, a"
             " weights file (on the hub owner/name/file), or a LoRA on the reference as diffusers saves it.")
    add("--generator_timesteps", "--generator_timestep", nargs="+", metavar="T",
        type=positive_float if CONTINUOUS else positive_int,
        help="T at which it reads its noise, N(0, I); or, of a few-step generator, all of its falling"
             " timesteps: 999 749 499 249 for DMD2's of four steps.")
    add("--generator_lora_rank", type=non_negative_int, default=0, help="Train the generator as a LoRA.")
    add("--assistant_lora_rank", type=non_negative_int, default=0, help="Train the assistant as a LoRA.")
    add("--shared_base", nargs="?", const="all", choices=["all", "assistant"],
        help="Hold the frozen weights once: the reference is the assistant with its LoRA off, and by `all`,"
             " meant by the flag alone, the generator's LoRA is on the same weights too.")
    add = parser.add_argument_group("method").add_argument
    add("--recipe", choices=RECIPES, default="di_star_in",
        help="Row of the paper's Table 2; it sets the next four flags unless they are given.")
    add("--divergence", choices=["score", "kl"], help="Theorem 3.1, or Diff-Instruct(++)'s KL.")
    add("--reward_scale", type=non_negative_float, help="alpha_rew of (3.1), for rewards without a scale.")
    add("--cfg_scale", type=non_negative_float, help="alpha_cfg; for --cfg_mode in, 1 means no guidance.")
    add("--cfg_mode", choices=["in", "out"], help="Guide the reference, or add the implicit reward (3.6).")
    add("--score_gradient", choices=["full", "detached"], default="full",
        help="Differentiate through both score networks (theorem 3.1), or not (listing 1).")
    add("--distance", choices=["pseudo_huber", "l2"], default="pseudo_huber", help="d of (3.2).")
    add("--pseudo_huber_c", type=positive_float, default=0.1, help="c of (3.7), in units of --weighting.")
    add("--weighting", choices=["clean", "score", "dmd"], default="clean",
        help="w = 1 for clean predictions (ours) or scores; dmd: clean, by each sample's |x0 - D_reference|.")
    add("--assistant_updates", type=positive_int, default=1, help="K_TA of Algorithm 1 (ours; DMD2 has 5).")
    add("--min_timestep", type=non_negative_int, default=20, help="Smallest t (DMD2).")
    add("--max_timestep", type=non_negative_int, default=979, help="Largest t, inclusive.")
    add("--timestep_sampling", choices=["uniform", "logit_normal"], default="uniform",
        help="Distribution of t between them: uniform, or sigmoid of a normal.")
    add("--logit_mean", type=float, default=0.0, help="Mean of that normal (SD3).")
    add("--logit_std", type=positive_float, default=1.0, help="Its standard deviation (SD3).")
    add = parser.add_argument_group("reward").add_argument
    add("--reward", action="append", type=name_and_scale, metavar="NAME[=SCALE]",
        help=f"Reward to maximise, repeated for a sum: {', '.join(REWARDS)}, NAME:LOCATION of other weights,"
             " or MODULE:FACTORY, which makes a function of images (batch, 3, H, W) in [0, 1] and a list of"
             " prompts to scores (batch,). All but pickscore and your own need utils/rewards.py.")
    add("--reward_steps", choices=["last", "all"], default="last",
        help="Steps of a few-step generator whose clean prediction is rewarded.")
    add("--reward_model_name_or_path", default=PICKSCORE, help="CLIP-type model of `pickscore`.")
    add("--reward_processor_name_or_path", help=f"Its processor; of PickScore it is {PICKSCORE_PROCESSOR}.")
    add("--preference_unet", f"--preference_{PART}",
        help="Diffusion model tuned on preference pairs (Diffusion-DPO), given as --generator_init is: adds"
             " its implicit reward log p(x_t | c) - log p_reference(x_t | c); alone with --reward_scale 0.")
    add("--preference_scale", type=positive_float, default=1.0, help="alpha of that implicit reward (ours).")
    add("--reward_vae", help="VAE that decodes for the reward only, such as madebyollin/taesdxl.")
    add = parser.add_argument_group("prompts").add_argument
    add("--dataset_name", help="Dataset of captions, a hub id or folder; its images are not read.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--dataset_split", default="train", help="Split of the dataset.")
    add("--streaming", action="store_true", help="Read the captions without downloading the dataset.")
    add("--prompts_file", help="Instead of a dataset: .txt (one a line), .csv, .tsv, .jsonl or .parquet.")
    add("--caption_column", default="text", help="Column of the prompts.")
    add("--max_train_samples", type=positive_int, help="Use only the first N prompts.")
    add = parser.add_argument_group("training").add_argument
    add("--output_dir", help="Folder of the run.")
    add("--seed", type=non_negative_int, default=0, help="Seed of noise, timesteps and the prompts' order.")
    add("--resolution", type=positive_int, help="Height and width of the images in pixels.")
    add("--train_batch_size", type=positive_int, default=4, help="Samples per device and batch (ours).")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches of an optimizer step.")
    add("--max_train_steps", type=positive_int, default=1000, help="Generator updates (ours).")
    add("--learning_rate", type=non_negative_float, help="Learning rate of the generator (ours).")
    add("--assistant_learning_rate", type=non_negative_float, help="Of the assistant, if not the same.")
    add("--lr_scheduler", default="constant_with_warmup", help="Schedule of both learning rates.", choices=[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"])
    add("--lr_warmup_steps", type=non_negative_int, default=0, help="Warm-up in generator updates.")
    add("--use_8bit_adam", action="store_true", help="Use the 8-bit Adam of bitsandbytes.")
    add("--adam_beta1", type=fraction, default=0.0, help="beta1 of Adam (listing 1).")
    add("--adam_beta2", type=fraction, default=0.999, help="beta2 of Adam (listing 1).")
    add("--adam_weight_decay", type=non_negative_float, default=0.0, help="Weight decay of AdamW.")
    add("--adam_epsilon", type=positive_float, default=1e-8, help="Epsilon of Adam.")
    add("--max_grad_norm", type=positive_float, default=10.0, help="Clip both networks' gradients (DMD2).")
    add("--max_skipped_updates", type=positive_int, default=10,
        help="End the run, saved, after so many updates in a row that were not finite and skipped (ours).")
    add("--use_ema", action="store_true", help="Average the generator's weights and export the average.")
    add("--ema_decay", type=fraction, default=0.999, help="Decay of the average, less at first (ours).")
    add("--offload_ema", action="store_true", help="Keep the average on the CPU between its updates.")
    add("--mixed_precision", choices=["no", "bf16"], help="Precision of autocast (default: accelerate's).")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations to save memory.")
    add("--decode_batch_size", type=positive_int,
        help="Images that are decoded and scored at once (default: as many as the decoder's kernels take).")
    add("--enable_vae_tiling", action="store_true", help="Decode in blended tiles of half the image's side.")
    add("--offload", action="store_true", help="Keep text encoders, VAE and rewards on the CPU between uses.")
    add("--allow_tf32", action="store_true", help="Use TF32 matrix products on Ampere and later GPUs.")
    add("--sharding", choices=["fsdp"],
        help="Shard the UNets and their optimizer states over the processes (FSDP2, utils/sharding.py).")
    add("--dry_run", action="store_true", help="Print an estimate of the memory and exit; utils/memory.py.")
    add = parser.add_argument_group("saving and logging").add_argument
    add("--checkpointing_steps", type=positive_int, default=500, help="Save a checkpoint every N steps.")
    add("--checkpoints_total_limit", type=positive_int, help="Keep the newest N checkpoints only.")
    add("--resume_from_checkpoint", help="Checkpoint folder to resume from, or `latest`.")
    add("--validation_prompts", nargs="+",
        help="Sample these from fixed noise during the run; log the images' reward and diversity.")
    add("--validation_reward", action="append", default=[], metavar="NAME",
        help="Score the validation images by a reward that is not trained, too: where it falls while the"
             " trained one rises, that one is being hacked. Repeated for more.")
    add("--num_validation_images", type=positive_int, default=4, help="Images per validation prompt.")
    add("--validation_steps", type=positive_int, default=100, help="Validate every N steps.")
    add("--min_diversity", type=fraction,
        help="End the run, saved, where the validation images' diversity falls below this fraction of its"
             " start: the sign of a hacked reward.")
    add("--logging_steps", type=positive_int, default=10, help="Write to metrics.jsonl every N steps.")
    add("--logging_dir", default="logs", help="Folder of the trackers in --output_dir.")
    add("--report_to", default="none", help="Tracker beside metrics.jsonl: tensorboard, wandb, ... or all.")
    add("--push_to_hub", action="store_true", help="Upload the finished pipeline to the hub.")
    add("--hub_model_id", help="Repository on the hub (default: the name of --output_dir).")
    add("--hub_token", help="Written to no file, but `hf auth login` is safer.")
    parser.set_defaults(**DEFAULTS)
    for action in parser._actions:
        if action.default not in (None, False, argparse.SUPPRESS):
            action.help += " (default: %(default)s)"
    args = parser.parse_args(argv)
    if args.hub_token:  # trackers record the command line
        sys.argv = [word.replace(args.hub_token, "...") for word in sys.argv]
    for name, value in zip(RECIPE_FLAGS, RECIPES[args.recipe]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.decode_batch_size is None:  # of its 256 channels at full size, 2^31 values are too many
        args.decode_batch_size = max(1, (2**31 - 1) // (256 * args.resolution**2))
    if args.assistant_learning_rate is None:
        args.assistant_learning_rate = args.learning_rate
    if args.reward_processor_name_or_path is None:
        model = args.reward_model_name_or_path
        args.reward_processor_name_or_path = PICKSCORE_PROCESSOR if model == PICKSCORE else model
    rewards = args.reward or [("pickscore", None)]
    named = [*(name for name, scale in rewards if scale or args.reward_scale), *args.validation_reward]
    names = [short_name(name) for name in named]
    repeated = [name for name in names if names.count(name) > 1]
    unscaled = [name for name, scale in rewards if not scale]
    foreign = [name for name in unscaled if short_name(name) in REWARDS[1:]]
    empty = [name for name, value in vars(args).items() if value == ""]
    unshardable = [f"--{flag}" for flag in UNSHARDABLE if getattr(args, flag)]
    for wrong, message in [
        (empty, f"--{' --'.join(empty)} is empty; was a variable of the shell not set?"),
        (not args.dry_run and bool(args.dataset_name) == bool(args.prompts_file),
         "give the prompts by exactly one of --dataset_name and --prompts_file"),
        (args.min_timestep > args.max_timestep, f"--min_timestep {args.min_timestep} exceeds --max_timestep"),
        (any(this <= following for this, following in itertools.pairwise(args.generator_timesteps)),
         f"--generator_timesteps {' '.join(map(str, args.generator_timesteps))} must fall from step to step"),
        (args.lr_warmup_steps > args.max_train_steps, "--lr_warmup_steps is more than --max_train_steps"),
        (args.shared_base and not args.assistant_lora_rank, "--shared_base needs --assistant_lora_rank"),
        (args.min_diversity and args.num_validation_images * len(args.validation_prompts or []) < 2,
         "--min_diversity needs more than one image of --validation_prompts"),
        (args.sharding and unshardable, f"--sharding is not supported with {' '.join(unshardable)}"),
        (args.validation_reward and not args.validation_prompts,
         "--validation_reward needs --validation_prompts"),
        (args.preference_unet == "reference", f"--preference_{PART} reference prefers nothing"),
        (repeated, f"--reward {' '.join(repeated[:1])} is given twice, or is a --validation_reward too"),
        (foreign or args.reward and unscaled and not args.reward_scale,
         f"--reward {' '.join(foreign or unscaled)} needs a scale of its own, NAME=SCALE above 0:"
         " --reward_scale is for pickscore's plain cosine and for your own"),
    ]:
        if wrong:
            fail(message)
    args.reward = {name: scale or args.reward_scale for name, scale in rewards if scale or args.reward_scale}
    if not args.dry_run:
        check_output_dir(args)
    return args


def check_output_dir(args):
    """Refuse a folder with something else in it; resolve --resume_from_checkpoint to a folder or None."""
    output_dir = Path(args.output_dir)
    with blame(f"--output_dir {output_dir}"):
        started = (output_dir / "args.json").exists()
        existing = next(filter(os.path.lexists, (output_dir, *output_dir.absolute().parents)))
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise OSError(f"{existing} is a file, a broken link or read-only")
        if existing == output_dir and any(output_dir.iterdir()) and not started:
            raise OSError("it is not empty and holds no run of this script; choose another")
        if started and not args.resume_from_checkpoint:
            raise OSError(f"it holds another run; choose another, or add {RESUME}")
    if args.resume_from_checkpoint == "latest":
        args.resume_from_checkpoint = next(map(str, list_checkpoints(output_dir)[::-1]), None)
    if args.resume_from_checkpoint is None:
        return
    if not Path(args.resume_from_checkpoint).exists():  # checkpoint-500 is meant in the output folder
        args.resume_from_checkpoint = str(output_dir / args.resume_from_checkpoint)
    folder = Path(args.resume_from_checkpoint)
    with blame(f"--resume_from_checkpoint {folder}: state.json tells of no whole checkpoint", "take another"):
        args.state = json.loads((folder / "state.json").read_text())
        for name, size in args.state["files"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} is cut short")
        step, saved = args.state["step"], args.state["args"]
    watched = {"validation_prompts", "num_validation_images"} if args.min_diversity else set()
    for name, value in saved_args(args).items():
        if name not in RESUMABLE - watched and value != (held := saved.get(name)):
            fail(f"--{name} is {value}, but {folder} was made with {held}; resume with the same flags")
    if step > args.max_train_steps:
        fail(f"--max_train_steps {args.max_train_steps}: {folder} is at step {step} already; raise it")


def list_checkpoints(output_dir):
    """Finished checkpoints of a run, oldest first."""
    folders = [path.parent for path in output_dir.glob("checkpoint-*/state.json")
               if path.parent.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def saved_args(args):
    """What args.json and a checkpoint keep of the flags, and the samples of an optimizer step."""
    samples = args.train_batch_size * args.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    return {name: value for name, value in vars(args).items() if name not in UNSAVED} | {
        "train_batch_size x gradient_accumulation_steps x processes": samples}


@functools.cache
def load_extra(name, flag):
    """The module utils/NAME.py that `flag` asks for, from beside this script or the root above examples/."""
    here = Path(__file__).resolve()
    for path in (folder / "utils" / f"{name}.py" for folder in (here.parent, *here.parents[2:3])):
        if path.is_file():
            spec = importlib.util.spec_from_file_location(f"diff_instruct_star_{name}", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    fail(f"{flag} needs utils/{name}.py of the Diff-Instruct* repository beside {here.name}")


ARGS = parse_args() if __name__ == "__main__" else None

import diffusers
import pandas
import torch
import transformers
from accelerate import Accelerator, init_empty_weights
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, set_seed
from datasets import load_dataset
from diffusers.models import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from huggingface_hub import ModelCard, ModelCardData, create_repo, hf_hub_download, upload_folder
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torchvision.transforms.functional import InterpolationMode, resize
from torchvision.utils import save_image
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor


warnings.filterwarnings("ignore", "Already found a `peft_config`")  # one base holds two LoRAs
warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # where the first update is skipped


# ------------------------------------------------------------------------------------------------ mathematics

@dataclass(frozen=True)
class Method:
    """The settings of the method, by the names of their flags."""

    divergence: str = "score"
    score_gradient: str = "full"
    distance: str = "pseudo_huber"
    pseudo_huber_c: float = 0.1
    weighting: str = "clean"
    cfg_mode: str = "in"
    cfg_scale: float = 7.5
    preference_scale: float = 1.0
    generator_timesteps: tuple = (999,)
    reward_steps: str = "last"
    min_timestep: int = 20
    max_timestep: int = 979
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    @property
    def guided(self):  # whether the reference's prediction for the null prompt is used
        return self.cfg_scale > (1 if self.cfg_mode == "in" else 0)

    @property
    def full(self):  # whether the gradient passes through both score networks (theorem 3.1)
        return self.divergence == "score" and self.score_gradient == "full"


def guided_prediction(conditional, unconditional, scale):
    """Classifier-free guidance as in diffusers (section 3.3, omega = alpha_cfg); at most 1 means none."""
    return conditional if scale <= 1 else unconditional + scale * (conditional - unconditional)


def time_weight(x0, d_reference, a, s, weighting):
    """Units of the divergence: (unit, x_unit, weight), each broadcastable to (batch, 1, 1, 1).

    A difference of scores is `unit` times one of clean predictions; x_t moves by `x_unit` times x0 (in clean
    units both are 1). `weight` is w(t); for `dmd` it is 1 / mean |x0 - D_reference| per sample, detached.
    """
    one = torch.ones_like(a)
    if weighting == "score":
        return a / s**2, a, one
    if weighting == "dmd":
        return one, one, 1 / (x0 - d_reference).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    return one, one, one


def score_divergence_loss(x0, d_assistant, d_reference, a, s, method):
    """(3.4) and (3.7): - w d'(y)^T (S_assistant - grad log p(x_t | x0)), y = S_assistant - S_reference.

    Every tensor is (batch, C, H, W), a and s are (batch, 1, 1, 1); returns (batch,). Its gradient in the
    generator's parameters, through x0 and both predictions, is that of the divergence (3.2) (theorem 3.1).
    """
    unit, _, weight = time_weight(x0, d_reference, a, s, method.weighting)
    y = unit * (d_assistant - d_reference)
    if method.distance == "l2":
        derivative = 2 * y
    else:
        derivative = y / (y.square().sum((1, 2, 3), keepdim=True) + method.pseudo_huber_c**2).sqrt()
    return -(weight * derivative * unit * (d_assistant - x0)).sum((1, 2, 3))


def kl_divergence_loss(x0, d_assistant, d_reference, a, s, method):
    """Diff-Instruct(++): w y^T x_t with y = S_assistant - S_reference detached; shapes as above, (batch,)."""
    unit, x_unit, weight = time_weight(x0, d_reference, a, s, method.weighting)
    return (weight * unit * (d_assistant - d_reference).detach() * x_unit * x0).sum((1, 2, 3))


def implicit_reward_loss(x0, direction, d_reference, a, s, scale, method):
    """- scale w (S_1 - S_0)^T x_t of the reward log p_1(x_t) - log p_0(x_t), scores detached; (batch,).

    `direction` is D_1 - D_0: D_ref(x_t | c) - D_ref(x_t) for the guidance reward, (3.5) with (A.13)'s minus;
    D_preference(x_t | c) - D_ref(x_t | c) for Diffusion-DPO's implicit reward (arXiv 2311.12908).
    """
    unit, x_unit, weight = time_weight(x0, d_reference, a, s, method.weighting)
    return -scale * (weight * unit * direction.detach() * x_unit * x0).sum((1, 2, 3))


def assistant_loss(output, x0, noise, a, s, diffusion):
    """Denoising score matching (Algorithm 1), lambda(t) as the reference was trained; returns (batch,)."""
    return (output - diffusion.target(x0, noise, a, s)).square().mean((1, 2, 3))


def divergence_gradient(x0, x_t, d_assistant, d_conditional, d_null, a, s, method, d_preference=None):
    """Gradients at x0 of the divergence and the implicit rewards, {term: (batch, C, H, W)}; logs of (batch,).

    x0 (batch, C, H, W) is detached. The predictions of x_t, the assistant's, the reference's for the prompt
    and the null prompt (or None), and the preference model's (or None), have graphs to the leaf x_t if
    `method.full`. Then dL/dx0 = direct + a (J_A^T g_A + J_R^T g_R), where g_A and g_R are the loss's
    derivatives at the two predictions; each network's vector-Jacobian product is taken on its own.
    """
    d_reference = d_conditional
    if method.cfg_mode == "in":
        d_reference = guided_prediction(d_conditional, d_null, method.cfg_scale)
    divergence_loss = score_divergence_loss if method.divergence == "score" else kl_divergence_loss
    leaves = [value.detach().requires_grad_() for value in (x0, d_assistant, d_reference)]
    loss = divergence_loss(*leaves, a, s, method)
    gradient, g_assistant, g_reference = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
    if method.full:
        (through_reference,) = torch.autograd.grad(d_reference, x_t, g_reference)
        (through_assistant,) = torch.autograd.grad(d_assistant, x_t, g_assistant)
        gradient = gradient + a * (through_assistant + through_reference)
    gradients = {"divergence": gradient}
    implicit = {}
    if method.cfg_mode == "out" and method.guided:
        implicit["cfg"] = method.cfg_scale, d_conditional - d_null
    if d_preference is not None:
        implicit["preference"] = method.preference_scale, d_preference - d_conditional
    for name, (scale, direction) in implicit.items():
        leaf = x0.detach().requires_grad_()
        loss_at_leaf = implicit_reward_loss(leaf, direction, d_conditional.detach(), a, s, scale, method)
        (gradients[name],) = torch.autograd.grad(loss_at_leaf.sum(), leaf)
    y_norm = (d_assistant - d_reference).detach().flatten(1).norm(dim=1)
    return gradients, {"loss_divergence": loss.detach(), "y_norm": y_norm}


def reward_gradient(x0, prompts, decode, rewards):
    """Gradient at x0 (batch, C, H, W) of - sum over rewards of alpha_rew r(decode(x0), c), (3.1), and logs.

    `decode` maps scaled latents to images, in [0, 1] but for overshoot, and `rewards` are {name: (alpha_rew,
    function of images (batch, 3, H, W) in [0, 1] and prompts to (batch,))}. The logs (batch,) are each reward
    and the norm of its scaled gradient at the image, the mean reward, and the fraction of clamped values,
    which have no gradient. Ends the run where scores have another shape or no gradient.
    """
    leaf, logs, at_images = x0.detach().requires_grad_(), {}, 0
    decoded = decode(leaf)
    clamped = decoded.clamp(0, 1)
    images = clamped.detach().requires_grad_()
    for name, (scale, reward) in rewards.items():  # the activations of each are freed before the next
        logs[f"reward_{name}"] = scores = score(name, reward, images, prompts)
        gradient = None
        if scores.requires_grad:
            (gradient,) = torch.autograd.grad(-scale * scores.float().sum(), images, allow_unused=True)
        if gradient is None:
            fail(f"--reward {name} has no gradient in the images")
        at_images = at_images + gradient
        logs[f"grad_image_{name}"] = gradient.flatten(1).norm(dim=1)
    (gradient,) = torch.autograd.grad(clamped, leaf, at_images)
    logs["reward"] = mean_reward(logs, rewards)
    logs["clamped"] = ((decoded < 0) | (decoded > 1)).float().mean((1, 2, 3))
    return gradient.float(), {name: values.detach().float() for name, values in logs.items()}


def score(name, reward, images, prompts):
    """A reward's scores (batch,); ends the run where it returns anything else."""
    try:
        scores = reward(images, prompts)
    except Exception as error:  # whose traceback leads into your own code
        raise RuntimeError(f"--reward {name} failed with the prompts {prompts}") from error
    shape = tuple(getattr(scores, "shape", ()))
    if not isinstance(scores, torch.Tensor) or shape != (len(prompts),):
        fail(f"--reward {name} returned a {type(scores).__name__} of shape {shape}, not ({len(prompts)},)")
    return scores


def mean_reward(logs, rewards):
    """The mean of the logged rewards (batch,) weighted by their scales."""
    total = sum(scale for scale, _ in rewards.values())
    return sum(scale / total * logs[f"reward_{name}"] for name, (scale, _) in rewards.items())


def diversity(images):
    """Mean spread of images (prompts, images of each, 3, H, W) over noise, of their means over prompts."""
    spreads = {"over_noise": images.std(1)} if images.shape[1] > 1 else {}
    spreads |= {"over_prompts": images.mean(1).std(0)} if len(images) > 1 else {}
    return {name: value.mean().item() for name, value in spreads.items()}


# ------------------------------------------------------------------------------------------------ models

@dataclass
class Models:
    """Everything a step needs."""

    pipeline: diffusers.DiffusionPipeline  # text encoders, tokenizers, VAE; its UNet is the reference's
    reference: torch.nn.Module
    assistant: torch.nn.Module
    generator: torch.nn.Module
    reward_vae: torch.nn.Module
    rewards: dict  # {name: (scale, function of images and prompts)}; the scale of those only watched is 0
    decode_batch_size: int
    diffusion: Diffusion
    text_encoders: torch.nn.Module
    scorers: torch.nn.Module  # the rewards and their VAE
    using: object  # module -> a context in which it is on the device
    preference: torch.nn.Module = None

    @property
    def trained_rewards(self):
        return {name: reward for name, reward in self.rewards.items() if reward[0]}


class LoRANetwork(torch.nn.Module):
    """A network on a frozen base UNet that may hold others: its LoRA on, or (adapter None) all of them off.

    The base is switched before each forward and its backward, for gradient checkpointing. PEFT's own switches
    change requires_grad too, which silently zeroes the gradients of a backward that is still to come.
    """

    def __init__(self, base, adapter=None):
        super().__init__()
        self.base, self.adapter = base, adapter

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


def trained(network):
    """The parameters that training changes, by name: all of a network, or one adapter's of a base."""
    mark = f".{network.adapter}." if isinstance(network, LoRANetwork) else ""
    return {name: value for name, value in network.named_parameters() if value.requires_grad and mark in name}


class ClipReward(torch.nn.Module):
    """A CLIP-type preference model: the plain cosine of image and prompt (PickScore: about 0.22).

    The preprocessing is the processor's (shorter side resized, centre crop, mean and standard deviation) in
    differentiable operations, without its rounding to 8 bits.
    """

    def __init__(self, model, processor):
        super().__init__()
        self.model, self.tokenizer = model, processor.tokenizer
        self.size = processor.image_processor.size["shortest_edge"]
        self.crop = processor.image_processor.crop_size["height"]
        self.register_buffer("mean", torch.tensor(processor.image_processor.image_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(processor.image_processor.image_std).view(3, 1, 1))

    def preprocess(self, images):
        if min(images.shape[-2:]) != self.size:
            images = resize(images, self.size, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        top, left = [(side - self.crop) // 2 for side in images.shape[-2:]]
        return (images[..., top:top + self.crop, left:left + self.crop] - self.mean) / self.std

    def forward(self, images, prompts):
        """images (batch, 3, H, W) in [0, 1], prompts -> (batch,) cosines, differentiable in the images."""
        if images.dtype in (torch.float16, torch.bfloat16):
            images = images.float()  # antialiased bicubic has no half-precision kernel on every device
        pixels = self.preprocess(images)
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt",
                                max_length=self.model.config.text_config.max_position_embeddings)
        output = self.model(input_ids=tokens.input_ids.to(pixels.device),
                            attention_mask=tokens.attention_mask.to(pixels.device),
                            pixel_values=pixels.to(self.model.dtype))
        return (output.image_embeds.to(pixels) * output.text_embeds.to(pixels)).sum(-1)


def cast(module, dtype):
    """The module in `dtype`, of whatever class; some classes' own method refuses it."""
    return torch.nn.Module.to(module, dtype=dtype)


def load(kind, name_or_path, dtype=None, **more):
    """Something of a library's class; a model must be whole, and is frozen and cast to `dtype`."""
    part = " ".join(filter(None, (str(name_or_path), more.get("subfolder"))))
    with blame(f"{part} cannot be loaded as a {kind.__name__}"):
        if not issubclass(kind, torch.nn.Module):
            loaded = kind.from_pretrained(name_or_path, **more)
            if getattr(loaded, "model_max_length", 0) > 10**6 or hasattr(loaded, "get_vocab") and len(
                    {*loaded.get_vocab()} - {*loaded.all_special_tokens}) < 2:  # made up by the library
                raise ValueError("its files are missing")
            return loaded
        if issubclass(kind, transformers.PreTrainedModel):  # or it may be its configuration's float16
            more["torch_dtype"] = dtype or torch.float32
        model, report = kind.from_pretrained(name_or_path, output_loading_info=True, **more)
        if report["missing_keys"]:  # the libraries go on with random numbers
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return cast(model, dtype).requires_grad_(False).eval()


def load_part(kind, subfolder, args, dtype=None):
    """A part of the reference pipeline, or the model that a flag puts in its place."""
    own = {"vae": args.pretrained_vae_model_name_or_path, PART: args.reference_unet}.get(subfolder)
    if own:
        return load(kind, own, dtype, subfolder=find_network(own)[1] if subfolder == PART else None)
    more = {"variant": args.variant} if issubclass(kind, torch.nn.Module) else {}
    return load(kind, args.pretrained_model_name_or_path, dtype, subfolder=subfolder, revision=args.revision,
                **more)


def find_network(name_or_path):
    """(configuration, subfolder) of a network in its folder, a pipeline's folder or a hub id of either."""
    kind = getattr(diffusers, NETWORK)
    with contextlib.suppress(OSError):
        return kind.load_config(name_or_path, subfolder=PART), PART
    return kind.load_config(name_or_path), None


def find_start(init):
    """The weights or LoRA file that --generator_init names, fetched where it is on the hub, or None."""
    path = Path(init)
    if (path / LORA_FILE).exists() and not (path / PART).exists():
        return path / LORA_FILE
    if path.exists() or not init.endswith((".safetensors", ".bin", ".pt", ".pth")):
        return path if path.is_file() else None
    owner, name, file = init.split("/", 2)
    return Path(hf_hub_download(f"{owner}/{name}", file))


def load_start(init, base, shared):
    """What --generator_init names as (a UNet, which may be the base, the path of a LoRA for it or None)."""
    path, weights, lora = None if init == "reference" else find_start(init), None, None
    if path:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if any("lora" in key for key in weights):
            weights, lora = None, path
    elif init != "reference":
        weights = load(type(base), init, subfolder=find_network(init)[1]).state_dict()
    if weights is None:
        return base if shared else copy.deepcopy(base), lora
    with init_empty_weights(include_buffers=False):  # so that no second copy is in memory
        unet = type(base).from_config(base.config).eval()
    unet.load_state_dict(weights, assign=True)
    return unet, None


def load_generator(args, reference, dtype):
    """The generator: float32 weights to train, or a LoRA on frozen ones, which may be the reference's."""
    rank, shared = args.generator_lora_rank, args.shared_base == "all" and args.generator_lora_rank
    with blame(f"--generator_init {args.generator_init} does not fit the reference's network"):
        unet, lora = load_start(args.generator_init, reference, shared)
        if shared and unet is not reference:
            fail("--shared_base: weights of --generator_init need a base of their own: choose --shared_base"
                 " assistant, or a --generator_init that is `reference` or a LoRA on it")
        unet = unet if shared else cast(unet, dtype if rank else torch.float32)
        if rank:
            return add_lora(unet, "generator", rank, lora)
        return (merged(add_lora(unet, "generator", 0, lora)) if lora else unet).requires_grad_(True)


def load_preference(args, reference, dtype):
    """The frozen model of --preference_unet, whose LoRA goes on a shared base, or None."""
    if not args.preference_unet:
        return None
    with blame(f"--preference_{PART} {args.preference_unet} does not fit the reference's network"):
        unet, lora = load_start(args.preference_unet, reference, args.shared_base)
        network = add_lora(unet, "preference", 0, lora) if lora else unet
        if not (lora and args.shared_base):
            return cast(merged(network) if lora else network, dtype).requires_grad_(False).eval()
        for parameter in trained(network).values():
            parameter.requires_grad_(False)
        return network


def add_lora(base, name, rank, path=None):
    """A float32 LoRA on a frozen base: one that changes nothing yet, or (the generator's start) a file's."""
    if path is None:
        base.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                    target_modules=LORA_TARGETS), adapter_name=name)
    else:
        base.load_lora_adapter(str(path.parent), weight_name=path.name, prefix=PART, adapter_name=name)
        held = get_peft_model_state_dict(base, adapter_name=name)
        if {f"{PART}.{key}" for key in held} != load_file(path).keys():  # the library only warns
            raise ValueError("its names are not those of a LoRA on this network")
        if rank not in (0, base.peft_config[name].r):
            fail(f"--generator_lora_rank {rank}: the LoRA of --generator_init has {base.peft_config[name].r}")
    for key, parameter in base.named_parameters():  # PEFT freezes an adapter when another one is added
        parameter.requires_grad_("lora_" in key)
    for module in base.modules():  # else PEFT casts to float32 what autocast then casts back, at each layer
        module.cast_input_dtype_enabled = False
    cast_training_params(base, dtype=torch.float32)
    return LoRANetwork(base.eval(), name)  # a given LoRA's dropout would not be a function of the seed


def merged(network):
    """A plain float32 UNet with the network's LoRA in its weights; its base is used up."""
    unet = cast(network.base.to("cpu"), torch.float32)  # a GPU may have no room for it
    unet.fuse_lora(adapter_names=[network.adapter])
    unet.unload_lora()
    return unet


def load_reward_vae(args, pipeline, dtype):
    vae = pipeline.vae
    if args.reward_vae:  # AutoencoderTiny, say
        kind = getattr(diffusers, AutoencoderKL.load_config(args.reward_vae)["_class_name"])
        vae = load(kind, args.reward_vae, dtype)
    if args.enable_vae_tiling:  # by itself only images larger than the VAE was trained on
        vae.enable_tiling()
        side = args.resolution // pipeline.vae_scale_factor
        vae.tile_latent_min_size = max(side // 8 * 4, 4)  # a quarter, the overlap, must be whole
        vae.tile_sample_min_size = vae.tile_latent_min_size * pipeline.vae_scale_factor
    return vae.to(memory_format=torch.channels_last)


def find_rewards(args):
    """{name: (scale, a function of the dtype that loads it)} of --reward; --validation_reward's are 0."""
    found, model = {}, args.reward_model_name_or_path
    for name, scale in (args.reward | dict.fromkeys(args.validation_reward, 0)).items():
        module, _, factory = name.partition(":")
        flag = f"--{'' if scale else 'validation_'}reward {name}"
        with blame(flag, f"give one of {', '.join(REWARDS)} or an importable MODULE:FACTORY"):
            if name == "pickscore":
                with blame(f"--reward_model_name_or_path {model}"):
                    processor = CLIPProcessor.from_pretrained(args.reward_processor_name_or_path)
                found[name] = scale, lambda dtype: ClipReward(load(CLIPModel, model, dtype), processor)
            elif module in REWARDS:
                found[module] = scale, load_extra("rewards", flag).find_reward(name)
            else:
                sys.path.insert(0, os.getcwd())
                factory = getattr(importlib.import_module(module), factory)
                found[name] = scale, lambda dtype, factory=factory: factory()
    return found


def load_models(args, diffusion, rewards, accelerator):
    """Every network on its device: trained weights in float32, frozen ones in bf16 under mixed precision."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    device, loaded = accelerator.device, {}
    for name, (scale, loader) in rewards.items():  # whose random numbers are their own
        with blame(f"--{'' if scale else 'validation_'}reward {name}"), torch.random.fork_rng(devices=[]):
            loaded[name] = scale, loader(dtype)
    pipeline = load_pipeline(args, dtype)
    base, rank = getattr(pipeline, PART), args.assistant_lora_rank
    # FSDP2 does not take channels-last weights. Each network is placed, or sharded, before the next is made.
    place = functools.partial(torch.nn.Module.to, device=device, memory_format=torch.channels_last)
    if args.sharding:
        place = functools.partial(load_extra("sharding", "--sharding").shard, blocks=SHARDED_BLOCKS,
                                  device=device, dtype=dtype)
    generator = load_generator(args, base, dtype)
    if not args.shared_base:
        place(generator)
    assistant = base if args.shared_base else cast(copy.deepcopy(base), dtype if rank else torch.float32)
    assistant = add_lora(assistant, "assistant", rank) if rank else assistant.requires_grad_(True)
    place(assistant)
    preference = load_preference(args, base, dtype)
    place(generator if args.shared_base else base)
    if preference and not isinstance(preference, LoRANetwork):
        place(preference)
    vae = load_reward_vae(args, pipeline, dtype)
    if args.gradient_checkpointing:
        for module in (base, generator, assistant, vae):
            getattr(module, "base", module).enable_gradient_checkpointing()
    text_encoders = torch.nn.ModuleList(
        part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part)
    scorers = torch.nn.ModuleList(part for part in (vae, *(reward for _, reward in loaded.values()))
                                  if isinstance(part, torch.nn.Module)).requires_grad_(False).eval()
    using, resting = contextlib.nullcontext, (text_encoders, scorers, pipeline.vae)
    if args.offload:
        using = load_extra("offload", "--offload").offload(resting, device)
    for module in () if args.offload else resting:
        module.to(device)
    reference = LoRANetwork(base) if args.shared_base else base
    if accelerator.num_processes > 1 and not args.sharding:
        for network in (generator, assistant):
            others = set(dict(network.named_parameters())) - set(trained(network))  # a LoRA on the same base
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, others)
        generator, assistant = (DistributedDataParallel(network, gradient_as_bucket_view=True)
                                for network in (generator, assistant))
    return Models(pipeline, reference, assistant, generator, vae, loaded, args.decode_batch_size,
                  diffusion.to(device), text_encoders, scorers, using, preference)


# ------------------------------------------------------------------------------------------------ data

def read_prompts(args):
    """The prompts of --prompts_file or --dataset_name as text (`42` stays text), without empty ones."""
    path, column, text = args.prompts_file, args.caption_column, {"dtype": str, "keep_default_na": False}
    readers = {".txt": lambda path: {column: Path(path).read_text(encoding="utf-8-sig").split("\n")},
               ".csv": functools.partial(pandas.read_csv, **text),
               ".tsv": functools.partial(pandas.read_csv, sep="\t", quoting=3, **text),  # quotes are text
               ".jsonl": functools.partial(pandas.read_json, lines=True, dtype=False),
               ".parquet": pandas.read_parquet}
    source = f"--prompts_file {path}" if path else f"--dataset_name {args.dataset_name}"
    with blame(f"--caption_column {column} of {source} cannot be read"):
        if path:
            if (kind := Path(path).suffix.lower()) not in readers:
                raise ValueError(f"{kind} is none of {', '.join(readers)}")
            if column not in (table := readers[kind](path)):
                raise ValueError(f"its columns are {', '.join(map(str, table))}")
        else:
            rows = load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split,
                                streaming=args.streaming).select_columns(column)
            table = {column: [row[column] for row in itertools.islice(rows, args.max_train_samples)]}
        if any(map(pandas.api.types.is_list_like, table[column])):
            raise ValueError("it holds lists or records, not text")
        values = [value for value in table[column] if value is not None and value == value]  # not NaN either
    prompts = [prompt for prompt in (str(value).strip() for value in values) if prompt]
    return prompts[:args.max_train_samples] or fail(f"{source} has no prompts")


class Prompts:
    """The run's prompts by position: epochs of a seeded order, the same for any processes and batch size."""

    def __init__(self, prompts, seed):
        self.prompts, self.seed, self.epoch, self.order = prompts, seed, None, None
        self.digest = hashlib.blake2b("\n".join(prompts).encode(), digest_size=16).hexdigest()

    def at(self, position):
        epoch, row = divmod(position, len(self.prompts))
        if epoch != self.epoch:
            rng = seeded_rng(self.seed, "prompts", epoch, 0)
            self.epoch, self.order = epoch, torch.randperm(len(self.prompts), generator=rng)
        return self.prompts[self.order[row]]


def seeded_rng(seed, stream, step, index):
    """A generator of random numbers that is a function of its four arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_timestep(rng, method):
    """t, a scalar between --min_timestep and --max_timestep, both included."""
    low, high, whole = method.min_timestep, method.max_timestep, not CONTINUOUS
    if method.timestep_sampling == "uniform" and whole:
        return torch.randint(low, high + 1, (), generator=rng)
    if method.timestep_sampling == "uniform":
        place = torch.rand((), generator=rng)
    else:
        place = torch.sigmoid(method.logit_mean + method.logit_std * torch.randn((), generator=rng))
    return (low + (high + 1 - low) * place).long().clamp(max=high) if whole else low + (high - low) * place


def sample_noise(seed, stream, step, indices, shape, method, device, steps=1):
    """z (batch, steps, *shape), noise (batch, *shape), timesteps (batch,) of a generator of so many steps.

    Each sample's are functions of (seed, stream, step, its index).
    """
    samples = []
    for index in indices:
        rng = seeded_rng(seed, stream, step, index)
        z, noise = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
        timestep = draw_timestep(rng, method)
        more = [torch.randn(shape, generator=rng) for _ in range(steps - 1)]
        samples.append((torch.stack([z, *more]), noise, timestep))
    return [torch.stack(values).to(device) for values in zip(*samples)]


# ------------------------------------------------------------------------------------------------ steps

def encode(models, prompts, resolution, null):
    """The UNet's conditioning for prompts and, with `null`, for as many null prompts (else None)."""
    with models.using(models.text_encoders):
        both = encode_prompts(models.pipeline, prompts, resolution, null)
    if not null:
        return both, None
    return [tree_map(lambda value: value.chunk(2)[half], both) for half in range(2)]


def in_chunks(function, size, latents, prompts, *more):
    """`function` of latents (batch, ...) and prompts, of at most `size` at a time, and its tensors joined."""
    parts = [function(latents[first:first + size], prompts[first:first + size], *more)
             for first in range(0, len(prompts), size)]
    return tree_map(lambda *values: torch.cat(values), *parts)


def predict(network, diffusion, x_t, timesteps, conditioning):
    """A network's clean prediction of x_t (batch, C, H, W) at timesteps (batch,), in x_t's precision."""
    a, s = diffusion.coefficients(timesteps)
    output = run(network, x_t, timesteps, conditioning).to(x_t.dtype)
    return diffusion.clean_prediction(output, x_t, a, s)


def predict_reference(reference, diffusion, x_t, timesteps, conditioning, null_conditioning, method):
    """The reference's clean predictions of x_t for the prompts and for the null prompt (or None)."""
    if not method.guided:
        return predict(reference, diffusion, x_t, timesteps, conditioning), None
    if method.cfg_mode == "in":  # both in one forward, and one backward
        both = tree_map(lambda *parts: torch.cat(parts), conditioning, null_conditioning)
        return predict(reference, diffusion, x_t.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
    with torch.no_grad():
        d_null = predict(reference, diffusion, x_t, timesteps, null_conditioning)
    return predict(reference, diffusion, x_t, timesteps, conditioning), d_null


def generate(generator, diffusion, z, timesteps, conditioning):
    """x0 = g(z, c) (batch, C, H, W): the generator's clean prediction of noise at its timestep.

    z (batch, steps, C, H, W) ~ N(0, I) has the noise of the first of its falling timesteps and, for a rollout
    over more, that which takes each clean prediction to the next. The gradient is that of the last call.
    """
    x_t, *others = z.unbind(1)
    times = [torch.full((len(z),), timestep, device=z.device) for timestep in timesteps]
    with torch.no_grad():
        for now, following, noise in zip(times, times[1:], others):
            x0 = predict(generator, diffusion, x_t, now, conditioning)
            x_t = diffusion.advance(x_t, x0, noise, now, following)
            torch.clear_autocast_cache()  # of weights without gradients
    return predict(generator, diffusion, x_t, times[len(others)], conditioning)


def assistant_step(models, batch, method, accelerator):
    """One backward of the assistant on the generator's own samples (Algorithm 1, psi)."""
    z, noise, timesteps, prompts, resolution = batch
    conditioning, _ = encode(models, prompts, resolution, null=False)
    a, s = models.diffusion.coefficients(timesteps)
    with torch.no_grad(), accelerator.autocast():
        x0 = generate(models.generator, models.diffusion, z, method.generator_timesteps, conditioning)
    x_t = a * x0 + s * noise
    with accelerator.autocast():  # anew, for the former's half-precision copies of weights would stay
        output = run(models.assistant, x_t, timesteps, conditioning).to(x0.dtype)
    loss = assistant_loss(output, x0, noise, a, s, models.diffusion)
    accelerator.backward(loss.mean())
    return {"loss_assistant": loss.detach()}


def generator_step(models, batch, method, accelerator):
    """One backward of the generator (Algorithm 1, theta): every term's gradient at x0, then one product."""
    z, noise, timesteps, prompts, resolution = batch
    conditioning, null_conditioning = encode(models, prompts, resolution, method.guided)
    a, s = models.diffusion.coefficients(timesteps)
    with accelerator.autocast():
        x0 = generate(models.generator, models.diffusion, z, method.generator_timesteps, conditioning)
    x_t = (a * x0.detach() + s * noise).requires_grad_(method.full)
    assistant = accelerator.unwrap_model(models.assistant)  # DDP would wait for gradients of its weights
    with accelerator.autocast(), torch.set_grad_enabled(method.full):
        d_assistant = predict(assistant, models.diffusion, x_t, timesteps, conditioning)
        d_conditional, d_null = predict_reference(
            models.reference, models.diffusion, x_t, timesteps, conditioning, null_conditioning, method)
    d_preference = None
    if models.preference:
        with accelerator.autocast(), torch.no_grad():
            d_preference = predict(models.preference, models.diffusion, x_t, timesteps, conditioning)
    gradients, logs = divergence_gradient(
        x0.detach(), x_t, d_assistant, d_conditional, d_null, a, s, method, d_preference)
    del d_assistant, d_conditional, d_null  # what their graphs still hold would stay until the end
    last = z.shape[1] == len(method.generator_timesteps)  # of the rollout: what a user will see
    if models.trained_rewards and (last or method.reward_steps == "all"):
        # Outside autocast: decoder and rewards each in their own precision.
        with models.using(models.scorers):
            gradients["reward"], reward_logs = in_chunks(
                reward_gradient, models.decode_batch_size, x0, prompts,
                functools.partial(decode, models.reward_vae), models.trained_rewards)
        logs |= reward_logs
    accelerator.backward((x0 * sum(gradients.values())).sum() / len(x0))
    return logs | {f"grad_{name}": value.flatten(1).norm(dim=1) for name, value in gradients.items()}


def train_step(trainer):
    """Algorithm 1: K_TA updates of the assistant, then one of the generator."""
    models, method, accelerator = trainer.models, trainer.method, trainer.accelerator
    started = time.perf_counter()
    for k in range(trainer.assistant_updates_done, trainer.args.assistant_updates):
        for batch in trainer.batches("assistant", f"assistant-{k}"):
            trainer.record(assistant_step(models, batch, method, accelerator))
        trainer.update("assistant")
        trainer.assistant_updates_done += 1
    for batch in trainer.batches("generator", "generator"):
        trainer.record(generator_step(models, batch, method, accelerator))
    trainer.update("generator")
    trainer.step, trainer.assistant_updates_done = trainer.step + 1, 0
    trainer.seconds.append(time.perf_counter() - started)


class Interrupted(Exception):
    """A signal to any process; the update in which it came is begun anew when the run is resumed."""


class AdamWithoutMomentum(torch.optim.AdamW):
    """AdamW of beta1 = 0, whose first moment is the gradient: it is lent to each step and not stored."""

    def step(self, closure=None):
        parameters = [parameter for group in self.param_groups for parameter in group["params"]
                      if parameter.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["exp_avg"] = parameter.grad
        super().step(closure)
        for parameter in parameters:
            del self.state[parameter]["exp_avg"]


class Trainer:
    """The state of a run, and what an update does to it."""

    def __init__(self, args, models, prompts, accelerator):
        self.args, self.models, self.prompts, self.accelerator = args, models, prompts, accelerator
        self.method = Method(**{field.name: getattr(args, field.name) for field in fields(Method)})
        self.step, self.assistant_updates_done, self.prompts_seen, self.first_diversity = 0, 0, 0, {}
        self.skipped, self.skipped_in_a_row = dict.fromkeys(TRAINED, 0), dict.fromkeys(TRAINED, 0)
        self.pending, self.logs, self.seconds, self.signals, self.signalled = {}, {}, [], [], None
        side = args.resolution // models.pipeline.vae_scale_factor // PATCH
        self.latent_shape = (getattr(models.pipeline, PART).config.in_channels, side, side)
        self.parameters = {name: trained(accelerator.unwrap_model(getattr(models, name))) for name in TRAINED}
        self.optimizers, self.schedules = {}, {}
        adam = functools.partial(torch.optim.AdamW if args.adam_beta1 else AdamWithoutMomentum, fused=True)
        if args.use_8bit_adam:
            adam = importlib.import_module("bitsandbytes.optim").AdamW8bit
        for name, rate, updates in (("assistant", args.assistant_learning_rate, args.assistant_updates),
                                    ("generator", args.learning_rate, 1)):
            self.optimizers[name] = adam(
                self.parameters[name].values(), lr=rate, betas=(args.adam_beta1, args.adam_beta2),
                weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)
            self.schedules[name] = get_scheduler(
                args.lr_scheduler, self.optimizers[name], num_warmup_steps=args.lr_warmup_steps * updates,
                num_training_steps=args.max_train_steps * updates)
        self.ema, self.ema_device = None, "cpu" if args.offload_ema else accelerator.device
        if args.use_ema:
            self.ema = EMAModel(self.parameters["generator"].values(), decay=args.ema_decay)
            self.ema.to(self.ema_device)

    def checkpoint_size(self):
        """Bytes of a checkpoint: float32 weights, Adam's moments (of 8 bits: two of a byte), the average."""
        sizes = {name: sum(value.nbytes for value in self.parameters[name].values()) for name in TRAINED}
        moments = 0.5 if self.args.use_8bit_adam else 1 + (self.args.adam_beta1 > 0)
        return int(sum(sizes.values()) * (1 + moments) + sizes["generator"] * self.args.use_ema)

    def look_for_signals(self):
        """Raise Interrupted where a process had a signal a batch ago: that flag is waited for no longer."""
        flag = torch.full((), len(self.signals), device=self.accelerator.device)
        before, self.signalled = self.signalled, self.accelerator.reduce(flag)
        if before is not None and before.item():
            raise Interrupted(f"ended by {self.signals[0] if self.signals else 'a signal elsewhere'}")

    def batches(self, name, stream):
        """This process's batches of one update: z, noise, timesteps, prompts and the resolution.

        All of them end the generator's rollout at the same step, which is drawn for the update.
        """
        args, device, network = self.args, self.accelerator.device, getattr(self.models, name)
        samples = args.train_batch_size * self.accelerator.num_processes
        rng = seeded_rng(args.seed, f"{stream}, steps", self.step, 0)
        steps = 1 + torch.randint(len(args.generator_timesteps), (), generator=rng).item()
        for accumulated in range(args.gradient_accumulation_steps):
            first = accumulated * samples + self.accelerator.process_index * args.train_batch_size
            indices = range(first, first + args.train_batch_size)
            last = accumulated == args.gradient_accumulation_steps - 1  # whose backward averages gradients
            if args.sharding:
                network.set_requires_gradient_sync(last)
            else:
                network.require_backward_grad_sync = last  # of DDP
            self.look_for_signals()
            noise = sample_noise(
                args.seed, stream, self.step, indices, self.latent_shape, self.method, device, steps)
            yield *noise, [self.prompts.at(self.prompts_seen + index) for index in indices], args.resolution
        self.prompts_seen += samples * args.gradient_accumulation_steps

    def record(self, logs):
        """Keep the batch means of a step's logs {name: (batch,)} for its update."""
        for name, values in logs.items():
            self.pending.setdefault(name, []).append(values.mean())

    def update(self, name):
        """One optimizer step of a network; where a value of any process is not finite, all skip it."""
        logs, self.pending = self.pending, {}
        norm = self.accelerator.clip_grad_norm_(list(self.parameters[name].values()), self.args.max_grad_norm)
        logs[f"grad_norm_{name}"] = [norm.full_tensor() if self.args.sharding else norm]
        bad = torch.stack([~torch.stack(values).isfinite().all() for values in logs.values()]).float()
        bad = self.accelerator.reduce(bad).tolist()  # waits for the device
        if bad := [key for key, value in zip(logs, bad) if value]:
            self.skipped[name] += 1
            if self.accelerator.is_main_process:
                tqdm.write(f"warning: step {self.step + 1}: the {name}'s update is skipped, not finite:"
                           f" {', '.join(bad)}", file=sys.stderr)
        else:
            self.optimizers[name].step()
            for parameter in self.parameters[name].values() if self.args.use_8bit_adam else ():
                if parameter.ndim == 4:  # which bitsandbytes has made contiguous
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            for key, values in logs.items():
                self.logs.setdefault(key, []).extend(values)
        self.skipped_in_a_row[name] = self.skipped_in_a_row[name] + 1 if bad else 0
        self.optimizers[name].zero_grad(set_to_none=True)
        self.schedules[name].step()
        if name == "generator" and self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.ema.step(self.parameters[name].values())
            self.ema.to(self.ema_device)

    def stop_reason(self, validation):
        """Why the run ends after this step, or None: skipped updates, or the validation images' diversity."""
        for name, count in self.skipped_in_a_row.items():
            if count >= self.args.max_skipped_updates:
                return f"{count} updates of the {name} in a row were not finite and skipped; {LOWER}"
        for name, first in self.first_diversity.items():
            kept = validation.get(name, first) / first if first else 1
            if self.args.min_diversity and not kept >= self.args.min_diversity:  # NaN, too
                return (f"{name} is {kept:.0%} of its start, below --min_diversity"
                        f" {self.args.min_diversity:g}: start anew with a smaller scale, or export an earlier"
                        " step by --resume_from_checkpoint checkpoint-N --max_train_steps N")

    def pop_metrics(self):
        """Means since the last call over samples and processes, skipped updates, seconds, learning rates."""
        metrics = {}
        if self.logs:
            means = torch.stack([torch.stack(values).float().mean() for values in self.logs.values()])
            metrics = dict(zip(self.logs, self.accelerator.reduce(means, reduction="mean").tolist()))
        metrics |= {f"skipped_{name}": count for name, count in self.skipped.items()}
        metrics["seconds_per_step"] = sum(self.seconds) / len(self.seconds)
        self.logs, self.seconds = {}, []
        return metrics | {f"lr_{name}": value.get_last_lr()[0] for name, value in self.schedules.items()}

    def log(self, metrics):
        """Write metrics to the trackers and, in the main process, as a line of metrics.jsonl."""
        self.accelerator.log(metrics, step=self.step)
        if self.accelerator.is_main_process:
            with open(Path(self.args.output_dir) / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step, **metrics}) + "\n")

    @contextlib.contextmanager
    def averaged_generator(self):
        """The generator, with its EMA weights where there are any."""
        parameters = self.parameters["generator"].values()
        if self.ema is not None:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        yield self.accelerator.unwrap_model(self.models.generator)
        if self.ema is not None:
            self.ema.restore(parameters)

    def save(self):
        """Write a checkpoint aside, flush it, rename it, then drop the oldest; called by every process."""
        output_dir, limit = Path(self.args.output_dir), self.args.checkpoints_total_limit
        final, aside = output_dir / f"checkpoint-{self.step}", output_dir / f"unfinished-{self.step}"
        with blame(f"--output_dir {output_dir}: step {self.step}", "earlier checkpoints are intact"):
            aside.mkdir(exist_ok=True)
            if self.args.sharding:
                load_extra("sharding", "--sharding").save(aside, self.parameters, self.optimizers, self.ema)
            if self.accelerator.is_main_process:
                self.save_unsharded(aside)
                os.sync()
                if final.exists():  # of the same step, made before the run was resumed from an earlier one
                    final.rename(output_dir / f"unfinished-{final.name}")
                os.replace(aside, final)
                os.sync()
                for folder in list_checkpoints(output_dir)[:-limit] if limit else []:
                    folder.rename(output_dir / f"unfinished-{folder.name}")  # not to look whole half deleted
                for folder in output_dir.glob("unfinished-*"):
                    shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()

    def save_unsharded(self, folder):
        """What the main process writes: trained weights, all other state, and the position."""
        parts = {"optimizers": {name: part.state_dict() for name, part in self.optimizers.items()},
                 "schedules": {name: part.state_dict() for name, part in self.schedules.items()},
                 "ema": self.ema.state_dict() if self.ema else {}, "logs": self.logs}
        if self.args.sharding:  # its tensors are saved by all processes
            for part in parts["optimizers"].values():
                part["state"] = {}
            parts["ema"].pop("shadow_params", None)
        else:
            for name, parameters in self.parameters.items():
                save_file({key: value.detach().contiguous() for key, value in parameters.items()},
                          folder / f"{name}.safetensors", {"step": str(self.step)})
        torch.save(parts, folder / "trainer.pt")
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        state = {name: getattr(self, name) for name in POSITION} | {
            "args": saved_args(self.args), "prompts": self.prompts.digest, "files": files}
        (folder / "state.json").write_text(json.dumps(state, indent=2))

    def load(self, folder):
        """Continue from a checkpoint; weights, optimizers, schedules, EMA and position are all the state."""
        for name in POSITION:
            setattr(self, name, self.args.state.get(name, getattr(self, name)))
        with blame(f"--resume_from_checkpoint {folder}: trainer.pt is damaged", "take an earlier one"):
            saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
            self.logs = tree_map(lambda value: value.to(self.accelerator.device), saved.get("logs", {}))
            for name in TRAINED:
                self.optimizers[name].load_state_dict(saved["optimizers"][name])
                self.schedules[name].load_state_dict(saved["schedules"][name])
            if self.ema is not None:
                self.ema.load_state_dict(saved["ema"])
                self.ema.to(self.ema_device)
        if self.args.sharding:
            with blame(f"--resume_from_checkpoint {folder} is damaged", "take an earlier one"):
                load_extra("sharding", "--sharding").load(folder, self.parameters, self.optimizers, self.ema)
            return
        for name, parameters in self.parameters.items():
            with blame(f"--resume_from_checkpoint {folder}: {name}.safetensors is damaged",
                       "take an earlier one"), safe_open(folder / f"{name}.safetensors", "pt") as file:
                if file.metadata() != {"step": str(self.step)} or {*file.keys()} != {*parameters}:
                    raise ValueError(f"it is not of step {self.step}")
                for key, parameter in parameters.items():
                    parameter.data.copy_(file.get_tensor(key))


# ------------------------------------------------------------------------------------------------ output

def sample_and_score(trainer, generator, indices, prompts):
    """Validation images of their indices' noise, and their rewards: {name: (batch, ...)}."""
    args, models, device = trainer.args, trainer.models, trainer.accelerator.device
    z, *_ = sample_noise(args.seed, "validation", 0, indices, trainer.latent_shape, trainer.method, device,
                         len(args.generator_timesteps))
    conditioning, _ = encode(models, prompts, args.resolution, null=False)
    with trainer.accelerator.autocast():
        x0 = generate(generator, models.diffusion, z, args.generator_timesteps, conditioning)
    with models.using(models.pipeline.vae):
        images = decode(models.pipeline.vae, x0).clamp(0, 1)
    with models.using(models.scorers), torch.enable_grad():  # for a reward that needs it inside
        values = {f"reward_{name}": score(name, reward, images, prompts).detach().float()
                  for name, (_, reward) in models.rewards.items()}
    if models.trained_rewards:
        values["reward"] = mean_reward(values, models.trained_rewards)
    return values | {"images": images}


@torch.no_grad()
def validate(trainer):
    """Sample the validation prompts from fixed noise, write and score them; returns means and diversity."""
    args, accelerator, columns = trainer.args, trainer.accelerator, trainer.args.num_validation_images
    prompts, parts = [prompt for prompt in args.validation_prompts for _ in range(columns)], []
    size = min(args.train_batch_size, args.decode_batch_size)
    with trainer.averaged_generator() as generator:
        for start in range(0, len(prompts), size * accelerator.num_processes):
            first = start + accelerator.process_index * size
            indices = [index % len(prompts) for index in range(first, first + size)]
            values = sample_and_score(trainer, generator, indices, [prompts[index] for index in indices])
            parts.append(tree_map(torch.Tensor.cpu, accelerator.gather(values)))
    scores = {name: torch.cat([part[name] for part in parts])[:len(prompts)] for name in parts[0]}
    images = scores.pop("images")
    logs = {f"validation_{name}": values.mean().item() for name, values in scores.items()}
    spreads = {f"validation_diversity_{name}": value
               for name, value in diversity(images.unflatten(0, (-1, columns))).items()}
    trainer.first_diversity = trainer.first_diversity or spreads
    if accelerator.is_main_process:
        path = Path(args.output_dir) / "validation" / f"step-{trainer.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        across = columns if columns > 1 else math.ceil(len(images)**0.5)
        size = min(args.resolution, GRID_SIDE // max(across, math.ceil(len(images) / across)))
        images = resize(images, size, antialias=True)
        save_image(images, path, nrow=across, padding=0)
        table = {"prompt": prompts} | {name: values.tolist() for name, values in scores.items()}
        rows = [dict(zip(table, row)) for row in zip(*table.values())]
        path.with_suffix(".json").write_text(json.dumps(rows, indent=2))
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": images.permute(0, 2, 3, 1).numpy()}, trainer.step, **layout)
    return logs | spreads


def write_card(trainer, name):
    """README.md of the result `name`, which is how its lines load it: a folder's name or the hub's."""
    args, kind = trainer.args, type(trainer.models.pipeline).__name__
    base = args.pretrained_model_name_or_path
    start, reference, preference = (
        Path(model).name if Path(model).exists() else model  # no path of this machine
        for model in (args.generator_init, args.reference_unet or base, args.preference_unet or ""))
    terms = [f"{scale:g} x {short_name(reward)}" for reward, scale in args.reward.items()]
    if args.preference_unet:
        terms.append(f"{args.preference_scale:g} x the implicit reward of `{preference}`")
    prompt, pipeline = (args.validation_prompts or ["a lighthouse in a storm"])[0], trainer.models.pipeline
    absent = "".join(f", {name}=None" for name, part in pipeline.components.items()
                     if part is None and name not in pipeline._optional_components)  # SD3's T5
    steps = "one-step" if len(args.generator_timesteps) == 1 else f"{len(args.generator_timesteps)}-step"
    tags = ["diffusers", "text-to-image", steps, "diff-instruct-star", "diffusers-training"]
    tags += ["lora"] * bool(args.generator_lora_rank)
    data = ModelCardData(
        base_model=None if Path(base).exists() else base, license="other", license_name="of-its-sources",
        library_name="diffusers", pipeline_tag="text-to-image", generator_timesteps=args.generator_timesteps,
        resolution=args.resolution, reward=[*map(short_name, args.reward)], tags=tags)
    # Not load_or_create_model_card: it asks the hub for a card first, and leaves gaps to fill in.
    ModelCard(f"""---
{data.to_yaml()}
---

# {name}

A {steps} text-to-image generator, trained with [Diff-Instruct*](https://arxiv.org/abs/2410.20898), recipe
`{args.recipe}`, for {trainer.step} updates on {len(trainer.prompts.prompts):,} prompts and no images.
It started as `{start}`; the reference is `{reference}`; the reward is {" + ".join(terms) or "none"}.

```python
from diffusers import {kind}

pipeline = {kind}.from_pretrained({name!r}{absent})
image = pipeline(prompt={prompt!r}, {schedule_words(args.generator_timesteps)}, guidance_scale=0,
                 height={args.resolution}, width={args.resolution}).images[0]
image.save("image.png")
```

It was trained for these timesteps without guidance. It has no safety checker, and its licence is that of the
models it derives from.
""").save(Path(args.output_dir) / "README.md")


def export(trainer):
    """The finished pipeline or LoRA, with a card, in --output_dir and on the hub; every process calls it."""
    args, pipeline, output_dir = trainer.args, trainer.models.pipeline, Path(trainer.args.output_dir)
    with trainer.averaged_generator() as generator:
        if args.sharding:
            generator = load_extra("sharding", "--sharding").gathered(generator)
        if not trainer.accelerator.is_main_process:
            return
        if isinstance(generator, LoRANetwork):
            weights = get_peft_model_state_dict(generator.base, adapter_name=generator.adapter)
            saver = pipeline if hasattr(pipeline, "save_lora_weights") else diffusers.StableDiffusion3Pipeline
            saver.save_lora_weights(output_dir, **{  # PixArt's has none of its own
                f"{PART}_lora_layers": {key: value.contiguous() for key, value in weights.items()},
                f"{PART}_lora_adapter_metadata": generator.base.peft_config[generator.adapter].to_dict()})
            generator = merged(generator)
        finished = load_pipeline(args, torch.float32, generator)  # the other parts as before any cast
        finished.scheduler = generator_scheduler(pipeline.scheduler)
        finished.save_pretrained(output_dir)
    name = args.hub_model_id or output_dir.resolve().name
    write_card(trainer, name)
    if args.push_to_hub:
        with blame("--push_to_hub", f"the result is whole in {output_dir}: go on with {RESUME}"):
            upload_folder(repo_id=name, folder_path=output_dir, token=args.hub_token,
                          commit_message="Diff-Instruct* training", allow_patterns=PUBLISHED)


# ------------------------------------------------------------------------------------------------ main

def check_models(args):
    """The reference's `Diffusion`; ends the run where a model's configuration does not suit its flag."""
    if not hasattr(diffusers, NETWORK):
        fail(f"{FAMILY} needs a newer diffusers than {diffusers.__version__}, which has no {NETWORK}")
    reference = None
    starts = ("generator_init", "preference_unet")
    for name in ("pretrained_model_name_or_path", "reference_unet", *starts):
        value, flag = getattr(args, name), name.replace("unet", PART)
        if value in (None, "reference") or name in starts and args.dry_run:
            continue
        with blame(f"--{flag} {value} has no network that can be read"):
            if name in starts and find_start(value):
                continue
            kind, shape = kind_of(config := find_network(value)[0])
        reference = reference or config
        if (kind, shape) != (KIND, kind_of(reference)[1]):
            fail(f"--{flag} {value} is no {FAMILY} network, or not of the reference's width; other families"
                 " have scripts of their own")
    divisor = DIVISOR * reference.get("patch_size", 1)
    if args.resolution % divisor:
        fail(f"--resolution {args.resolution} is not divisible by {divisor}")
    largest = divisor * (reference.get("pos_embed_max_size") or math.inf)  # SD3's
    if args.resolution > largest:
        fail(f"--resolution {args.resolution} is above {largest}, the last that the {PART} has positions for")
    for flag in ("pretrained_vae_model_name_or_path", "reward_vae"):
        value = getattr(args, flag)
        with blame(f"--{flag} {value} is no VAE for the reference"):
            held = AutoencoderKL.load_config(value)["latent_channels"] if value else None
            if value and held * PATCH**2 != reference["in_channels"]:
                raise ValueError("its latents have other channels than the reference's")
    return load_diffusion(args)


def open_accelerator(args):
    """Accelerate's processes, device and trackers; ends the run where its configuration does not fit."""
    trackers = ["none", "all", *map(str, get_available_trackers())]
    if args.report_to not in trackers:
        fail(f"--report_to {args.report_to} is not installed, or no tracker; here are {', '.join(trackers)}")
    with blame("accelerate's configuration or its variables, ACCELERATE_*"):
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, log_with=args.report_to.replace("none", "") or None,
            project_dir=os.path.join(args.output_dir, args.logging_dir),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])
    if accelerator.mixed_precision not in ("no", "bf16"):
        fail(f"--mixed_precision {accelerator.mixed_precision} is not supported: the terms' inner gradients"
             " would underflow; use bf16 or no")
    if (kind := accelerator.distributed_type.value) in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        fail(f"accelerate's {kind} takes one model, here are three; use MULTI_GPU, to shard --sharding fsdp")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def open_run(trainer):
    """Take the run's folder; while the file that is returned is open, no other run may write into it."""
    output_dir = Path(trainer.args.output_dir)
    if not trainer.accelerator.is_main_process:
        return contextlib.nullcontext()
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = open(output_dir / "args.json", "a")
    with blame(f"--output_dir {output_dir}: another run is writing into it", "wait for its end"):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not trainer.args.resume_from_checkpoint and list_checkpoints(output_dir):
        fail(f"--output_dir {output_dir}: another run has been there since this one began")
    for folder in output_dir.glob("unfinished-*"):
        print(f"{folder.name} is removed: a run ended while it was written")
        shutil.rmtree(folder)
    (output_dir / "args.json").write_text(json.dumps(saved_args(trainer.args), indent=2) + "\n")
    path = output_dir / "metrics.jsonl"  # goes on after the checkpoint's step
    lines = path.read_text().splitlines() if path.exists() and trainer.step else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= trainer.step]
    path.write_text("".join(line + "\n" for line in kept))
    return lock


def main(args):
    for logging in (diffusers.utils.logging, transformers.utils.logging):  # what matters is said here, once
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    for extra, flag in (("memory", "dry_run"), ("sharding", "sharding"), ("offload", "offload")):
        if getattr(args, flag):  # looked for before a model's file is
            load_extra(extra, f"--{flag}")
    diffusion = check_models(args)
    if args.dry_run:
        return load_extra("memory", "--dry_run").estimate(args, diffusion, sys.modules[__name__])
    rewards, prompts = find_rewards(args), Prompts(read_prompts(args), args.seed)
    if args.resume_from_checkpoint and args.state["prompts"] != prompts.digest:
        fail(f"the prompts have changed since --resume_from_checkpoint {args.resume_from_checkpoint}")
    accelerator = open_accelerator(args)
    if args.push_to_hub and accelerator.is_main_process:
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        with blame(f"--hub_model_id: no repository {name}", "run `hf auth login`, or give another name"):
            args.hub_model_id = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    set_seed(args.seed)  # a LoRA's first weights; all other randomness is that of `seeded_rng`
    models = load_models(args, diffusion, rewards, accelerator)
    trainer, tokenizer = Trainer(args, models, prompts, accelerator), models.pipeline.tokenizer
    tokens = tokenizer([*(args.validation_prompts or []), *prompts.prompts[:1000]]).input_ids
    too_long = sum(len(one) > tokenizer.model_max_length for one in tokens)
    if too_long and accelerator.is_main_process:
        print(f"warning: {too_long} of the first {len(tokens)} prompts are longer than the text encoder"
              f" reads, {tokenizer.model_max_length} tokens, and are cut", file=sys.stderr)
    if args.resume_from_checkpoint:
        trainer.load(Path(args.resume_from_checkpoint))
    if accelerator.is_main_process:
        size = trainer.checkpoint_size() / 1e9
        print(f"a checkpoint has {size:.2g} GB; after SIGTERM a run needs the time of two batches, and of"
              f" writing it: {math.ceil(size)} s at 1 GB/s")
    progress = tqdm(total=args.max_train_steps, initial=trainer.step, desc="training", mininterval=1,
                    disable=not accelerator.is_local_main_process)
    intact = blame(f"--output_dir {args.output_dir}", "checkpoints are intact", OSError)
    with intact, open_run(trainer), progress:
        for number in (signal.SIGTERM, signal.SIGINT):  # do not end the process, but are looked for
            signal.signal(number, lambda number, _: trainer.signals.append(signal.Signals(number).name))
        accelerator.init_trackers("diff-instruct-star", {k: str(v) for k, v in saved_args(args).items()})
        if trainer.step == 0 and args.validation_prompts:
            trainer.log(validate(trainer))
        stop = None
        while trainer.step < args.max_train_steps and not stop:
            try:
                train_step(trainer)
            except Interrupted as interruption:
                stop = interruption
                trainer.save()
                break
            progress.update()
            step, last, validation = trainer.step, trainer.step == args.max_train_steps, {}
            if args.validation_prompts and (step % args.validation_steps == 0 or last):
                validation = validate(trainer)
            stop = trainer.stop_reason(validation)
            saves = step % args.checkpointing_steps == 0 or last or stop
            if step % args.logging_steps == 0 or saves:
                trainer.log(metrics := trainer.pop_metrics())
                progress.set_postfix({name: f"{metrics[name]:.3g}" for name in SHOWN if name in metrics})
            if validation:
                trainer.log(validation)
            if saves:
                trainer.save()
        if stop:
            fail(f"{stop}; step {trainer.step} is saved: go on with {RESUME}")
        if trainer.step == trainer.skipped["generator"]:
            fail(f"no update of the generator was finite; {LOWER}")
        accelerator.wait_for_everyone()
        export(trainer)
    if accelerator.is_main_process:
        print(f"the result is in {args.output_dir}; the lines that generate with it are in its README.md")
    accelerator.end_training()


if __name__ == "__main__":
    main(ARGS)
