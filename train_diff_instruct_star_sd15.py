#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "diffusers>=0.39", "transformers>=4.55", "accelerate", "peft",
#                 "datasets"]
# ///
"""Diff-Instruct* (DI*): post-train a one-step Stable Diffusion 1.5 generator for human preference; no images.

The paper's best recipe (the default), then the distillation of a multi-step model into the start it needs:

    accelerate launch train_diff_instruct_star_sd15.py --prompts_file prompts.txt --output_dir di-star \\
        --generator_init path/to/one_step_unet --reward_model_name_or_path yuvalkirstain/PickScore_v1 \\
        --mixed_precision bf16 --gradient_checkpointing --use_ema

    accelerate launch train_diff_instruct_star_sd15.py --recipe sim --prompts_file prompts.txt

To see what a run would cost in memory, add `--dry_run`. To resume, run the same command again with
`--resume_from_checkpoint latest`.

The method ("David and Goliath", arXiv 2410.20898; equation numbers are the paper's): a generator g maps noise
z to clean latents x0 in one step. A frozen reference diffusion model and an assistant, trained on the
generator's own samples, see the same noised latents x_t = a_t x0 + s_t noise. The generator maximises a
reward of the decoded image (3.1), while a divergence of the two models' scores (3.4) keeps it near the first.

Where the printed formulas are misprinted this file follows their proofs: the classifier-free guidance reward
has a minus (A.13), the reward is one scalar per sample, and by default the gradient of (3.4) passes through
both score networks, as theorem 3.1 has it and listing 1 does not (`--score_gradient`).
"""

import argparse
import contextlib
import copy
import csv
import difflib
import functools
import hashlib
import importlib
import json
import logging
import math
import numbers
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
import weakref
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock


# ------------------------------------------------------------------------------------------------ settings
# First, so that --help and a wrong flag answer before the libraries below are imported.

# What depends on the model; every other default is in `build_parser`.
DEFAULTS = {"pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "generator_init": "reference", "generator_timestep": 999, "resolution": 512,
            "learning_rate": 1e-6, "output_dir": "diff-instruct-star-sd15"}
# The rows of the paper's Table 2: divergence, reward scale, guidance scale, guidance mode (, reference UNet).
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
    "di_star_dpo": ("score", 100.0, 7.5, "in", "mhdang/dpo-sd1.5-text2image-v1"),
}
RECIPE_FLAGS = ("divergence", "reward_scale", "cfg_scale", "cfg_mode", "reference_unet")
# Of utils/rewards.py; `pickscore` is in this file.
REWARDS = ("pickscore", "hpsv2.1", "hpsv2.0", "imagereward", "clip", "aesthetic")
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FAMILY, ADDITION_EMBED_TYPE = "Stable Diffusion 1.5", None  # the latter tells a UNet's configuration
LORA_FILE = "pytorch_lora_weights.safetensors"
WEIGHTS_FILES = (".safetensors", ".bin", ".pt", ".pth")
# Not with --sharding: each keeps its own kind of storage, and a run of LoRAs fits on each GPU.
UNSHARDED_FLAGS = ("shared_base", "generator_lora_rank", "assistant_lora_rank", "use_8bit_adam",
                   "offload_ema")
# What of a Trainer is in a checkpoint's state.json, and what else is.
POSITION = {"step": int, "prompts_seen": int, "skipped": dict, "validated": (int, type(None)),
            "first_diversity": dict}
STATE = POSITION | {"args": dict, "files": dict, "total_batch_size": int, "prompts": (str, type(None))}
# {flag: the one without which it would do nothing}
NEEDS = {"merge_lora": "generator_lora_rank", "shared_base": "assistant_lora_rank", "offload_ema": "use_ema",
         "ema_decay": "use_ema", "dataset_config_name": "dataset_name", "dataset_split": "dataset_name",
         "streaming": "dataset_name", "validation_steps": "validation_prompts",
         "num_validation_images": "validation_prompts", "min_diversity": "validation_prompts",
         "hub_token": "push_to_hub", "hub_model_id": "push_to_hub", "logging_dir": "report_to"}
UNSAVED_FLAGS = ("hub_token", "resume_from_checkpoint")
# A run can be continued with other values of these; a change of any other flag would make it another run.
RESUMABLE_FLAGS = {"max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
                   "report_to", "validation_prompts", "validation_steps", "push_to_hub", "hub_model_id",
                   "logging_dir", "output_dir", "gradient_checkpointing", "allow_tf32", "offload",
                   "offload_ema", "merge_lora", "train_batch_size", "gradient_accumulation_steps",
                   "max_skipped_updates", "num_validation_images", "min_diversity"}


def fail(message):
    """End the run for bad input: one line on standard error without the hub's tokens, exit status 2."""
    print("error: " + re.sub(r"\bhf_\w{6,}", "hf_...", " ".join(message.split())), file=sys.stderr)
    raise SystemExit(2)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}; see --help")

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        found, unknown = self.parse_known_args(words, namespace)
        for name, value in vars(found).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not text.strip():
                    fail(f"--{name} is empty; was a variable of the shell not set?")
        if not unknown:
            return found
        name = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, 1)
        if name.startswith("-"):
            fail(f"there is no {name}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        before = [word for word in words[:words.index(name)] if word.startswith("-")]
        place = f" after {before[-1]}" if before else ""
        fail(f"{name!r}{place} belongs to no flag; a switch takes no value")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        plain_switch = action.default is None or action.default is False
        return action.help if plain_switch else super()._get_help_string(action)


def plain(number):
    """A number's text as it is; Python would also read 1_000, spaces, and the digits of other scripts."""
    if not re.fullmatch("[-+.0-9a-zA-Z]{1,40}", number):
        raise ValueError(number)
    return number


def positive(number):
    value = int(plain(number))
    if not 0 < value < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is not a whole number from 1 to 2^32 - 1")
    return value


def whole(number):
    value = int(plain(number))
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is not a whole number from 0 to 2^32 - 1")
    return value


def non_negative(number):
    value = float(plain(number))
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{number} is not a finite number of at least 0")
    return value


def above_zero(number):
    value = non_negative(number)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not above 0")
    return value


def share(number):
    value = float(plain(number))
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a share, from 0 to below 1")
    return value


def token(text):
    if not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError("a token has neither spaces nor line breaks")
    return text


def reward_term(text):
    """NAME or NAME=SCALE -> (name, scale or None)."""
    name, mark, scale = text.rpartition("=")
    try:
        return (name, non_negative(scale)) if mark else (text, None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: after the last = comes a number, the scale")


def short_name(reward):
    """A reward's name without the place of its weights, for logs and cards."""
    kind = reward.partition(":")[0]
    return kind if kind in REWARDS else reward


def build_parser():
    parser = Parser(description=__doc__, formatter_class=Formatter, allow_abbrev=False,
                    usage=f"accelerate launch {Path(__file__).name} [flags]")

    add = parser.add_argument_group("models").add_argument
    add("--pretrained_model_name_or_path",
        help="reference pipeline, folder or hub id; epsilon, v or sample prediction")
    add("--revision", help="revision of the reference pipeline")
    add("--variant", help="weights variant of the reference pipeline, such as fp16")
    add("--pretrained_vae_model_name_or_path", help="another VAE for the pipeline")
    add("--reference_unet", help="folder or hub id of another UNet for the reference (a DPO model, say)")
    add("--generator_init",
        help="start of the generator: `reference` (its weights, to be distilled with --recipe sim first), a"
             " pipeline or UNet folder, a hub id, or one weights file (.safetensors, .bin; on the hub as"
             " owner/name/file); or a LoRA on the reference, in a folder or file as diffusers saves it")
    add("--generator_timestep", type=whole,
        help="timestep T at which it reads its noise, unscaled N(0, I) (DMD2-SD1.5: 999, DMD2-SDXL: 399)")
    add("--generator_lora_rank", type=whole, default=0, help="train a LoRA of this rank; 0: all weights")
    add("--assistant_lora_rank", type=whole, default=0, help="the same for the assistant")
    add("--shared_base", nargs="?", const="all", choices=["all", "assistant"],
        help="hold the frozen weights once: the reference is the assistant with its LoRA off, and (all, meant"
             " where no value is given) a generator's LoRA is on the same weights too")
    add("--merge_lora", action="store_true",
        help="export the generator's LoRA also merged, as a pipeline; always unless started as `reference`")

    add = parser.add_argument_group("method").add_argument
    add("--recipe", choices=RECIPES, metavar="NAME", default="di_star_in",
        help=f"a row of the paper's Table 2: {', '.join(RECIPES)}. Sets the next four flags, and di_star_dpo"
             " --reference_unet; explicit flags win")
    add("--divergence", choices=["score", "kl"], help="score: theorem 3.1; kl: Diff-Instruct(++)")
    add("--reward_scale", type=non_negative, help="alpha_rew of (3.1), of each --reward without its own")
    add("--cfg_scale", type=non_negative,
        help="alpha_cfg; with --cfg_mode in the sampling guidance scale as in diffusers: at most 1: none")
    add("--cfg_mode", choices=["in", "out"],
        help="in: the reference is guided; out: the implicit reward (3.6) is added")
    add("--score_gradient", choices=["full", "detached"], default="full",
        help="full: the gradient passes through both score networks (theorem 3.1); detached: listing 1, with"
             " clean weighting a re-weighted KL")
    add("--distance", choices=["pseudo_huber", "l2"], default="pseudo_huber",
        help="d of (3.2): (3.7) or the squared norm")
    add("--pseudo_huber_c", type=non_negative, default=0.1, help="c of (3.7), in --weighting's units (ours)")
    add("--weighting", choices=["clean", "score", "dmd"], default="clean",
        help="units and w(t): clean predictions with w = 1 (ours); scores with w = 1; dmd: clean, divided by"
             " the sample's mean |x0 - D_reference|")
    add("--assistant_updates", type=positive, default=1,
        help="assistant updates for each generator update, K_TA (ours; DMD2 has 5)")
    add("--min_timestep", type=whole, default=20, help="t is uniform from here (SiD, DMD2)")
    add("--max_timestep", type=whole, default=979, help="... to here, inclusive")

    add = parser.add_argument_group("reward").add_argument
    add("--reward", action="append", type=reward_term, metavar="NAME[=SCALE]",
        help="repeated, the scaled rewards are summed. pickscore, meant unless given, is in this file, and in"
             f" utils/rewards.py are {', '.join(REWARDS[1:])}, as NAME:PATH with weights from there; or"
             " your own MODULE:FACTORY, which returns a function (or torch module) of images (batch, 3, H,"
             " W) in [0, 1] and a list of prompts to (batch,) scores, differentiable in the images")
    add("--reward_model_name_or_path", default=PICKSCORE,
        help="of pickscore: any CLIP-type preference model; the reward is the plain cosine of image and text")
    add("--reward_processor_name_or_path",
        help=f"its processor; unless given the model's own, and for PickScore {PICKSCORE_PROCESSOR}")
    add("--reward_vae", help="another VAE to decode with for the reward: madebyollin/taesd or taesdxl, say")

    add = parser.add_argument_group("prompts").add_argument
    add("--dataset_name", help="data set of captions, hub id or folder; images are never read")
    add("--dataset_config_name", help="its configuration")
    add("--dataset_split", default="train", help="its split")
    add("--streaming", action="store_true", help="stream it; resuming replays the seeded stream")
    add("--prompts_file", help="instead: a .txt (one a line), .csv, .tsv, .jsonl or .parquet file")
    add("--caption_column", default="text", help="column of the prompts")
    add("--max_train_samples", type=positive, help="use only the first N prompts")

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", help="the run's folder")
    add("--seed", type=whole, default=0,
        help="noise, times and prompts are functions of it, the step and the sample's index")
    add("--resolution", type=positive, help="picture height and width")
    add("--train_batch_size", type=positive, default=4, help="samples per device (ours)")
    add("--gradient_accumulation_steps", type=positive, default=1,
        help="batches for each optimiser step; the samples are those of one larger batch")
    add("--max_train_steps", type=positive, default=1000, help="generator updates (ours)")
    add("--learning_rate", type=non_negative, help="of the generator (ours; SiD-LSG's, DMD2's)")
    add("--assistant_learning_rate", type=non_negative, help="unless given the generator's (ours)")
    add("--lr_scheduler", default="constant_with_warmup", help="of both", choices=["linear", "cosine",
        "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"])
    add("--lr_warmup_steps", type=whole, default=0, help="in generator updates")
    add("--use_8bit_adam", action="store_true", help="Adam of bitsandbytes")
    add("--adam_beta1", type=share, default=0.0, help="of listing 1")
    add("--adam_beta2", type=share, default=0.999, help="of listing 1")
    add("--adam_weight_decay", type=non_negative, default=0.0, help="decoupled, as AdamW's")
    add("--adam_epsilon", type=above_zero, default=1e-8, help="added to the denominator")
    add("--max_skipped_updates", type=positive, default=10,
        help="updates that are not finite are skipped; after so many in a row the run saves and ends (ours)")
    add("--max_grad_norm", type=above_zero, default=10.0, help="clip both networks' gradients (DMD2's)")
    add("--use_ema", action="store_true", help="average the generator; the average is what is exported")
    add("--ema_decay", type=share, default=0.999, help="less in the first steps (ours)")
    add("--offload_ema", action="store_true", help="keep the average on the CPU between its updates")
    add("--mixed_precision", choices=["no", "bf16"],
        help="unless given accelerate's; fp16 is refused, for the terms' inner gradients would underflow")
    add("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")
    add("--enable_vae_tiling", action="store_true", help="decode in blended tiles of half the side")
    add("--offload", action="store_true", help="text encoders, decoder, reward on the CPU between their uses")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and later")
    add("--sharding", choices=["fsdp"],
        help="divide weights, gradients, optimizer states and EMA of the UNets over the processes (FSDP2)"
             " instead of a copy in each (DDP); for training all weights")
    add("--dry_run", action="store_true",
        help="print parameters and estimated peak memory of these flags, from configurations alone, and exit")

    add = parser.add_argument_group("saving and logging").add_argument
    add("--checkpointing_steps", type=positive, default=500, help="save the state this often")
    add("--checkpoints_total_limit", type=positive, help="keep this many, the newest; unless given all")
    add("--resume_from_checkpoint", help="a checkpoint folder, or latest")
    add("--validation_prompts", nargs="+",
        help="draw these from fixed noise as the run goes, and log the pictures' reward, distance to the"
             " reference (3.2) and diversity")
    add("--num_validation_images", type=positive, default=4, help="pictures of each")
    add("--validation_steps", type=positive, default=100, help="how often")
    add("--min_diversity", type=share,
        help="end the run, saved, where the validation pictures' diversity, over noise or over prompts, falls"
             " under this share of its start: so looks a hacked reward")
    add("--logging_steps", type=positive, default=10, help="write metrics.jsonl this often")
    add("--logging_dir", default="logs", help="trackers' folder in --output_dir")
    add("--report_to", default="none", help="tensorboard, wandb, ... or all; metrics.jsonl is always written")
    add("--push_to_hub", action="store_true", help="upload the finished pipeline")
    add("--hub_model_id", help="repository on the hub; unless given the name of --output_dir")
    add("--hub_token", type=token, help="never written to any file; better: log in once with `hf auth login`")
    parser.set_defaults(**DEFAULTS)
    return parser


def parse_args(argv=None):
    """Flags with the recipe resolved; ends the run (status 2) where they contradict each other."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.hub_token:  # trackers note the command line
        sys.argv = [word.replace(args.hub_token, "...") for word in sys.argv]
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    absent = {name for name, value in vars(args).items() if value in (None, False, 0, "none")}
    idle = [name for name in NEEDS if name in changed and NEEDS[name] in absent]
    terms, scale_given = args.reward or [("pickscore", None)], args.reward_scale is not None
    for name, value in zip(RECIPE_FLAGS, RECIPES[args.recipe]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.assistant_learning_rate is None:
        args.assistant_learning_rate = args.learning_rate
    if args.reward_processor_name_or_path is None and "pickscore" in [name for name, _ in terms]:
        own = args.reward_model_name_or_path
        args.reward_processor_name_or_path = PICKSCORE_PROCESSOR if own == PICKSCORE else own

    unscaled = [name for name, scale in terms if scale is None]
    names = [short_name(name) for name, _ in terms]
    foreign = [name for name in unscaled if name != "pickscore" and short_name(name) in REWARDS]
    scales = {name: args.reward_scale if scale is None else scale for name, scale in terms}
    rates = args.learning_rate, args.assistant_learning_rate
    lora, low, high = args.generator_lora_rank, args.min_timestep, args.max_timestep
    args.merge_lora |= lora > 0 and bool(args.generator_init != "reference" or args.reference_unet)
    sharded_with = " ".join(f"--{flag}" for flag in UNSHARDED_FLAGS if getattr(args, flag))
    huber = args.distance == "pseudo_huber"
    unread = [name for name in ("reward_model_name_or_path", "reward_processor_name_or_path")
              if name in changed and args.reward and "pickscore" not in names]
    for wrong, message in [
        (idle, f"--{' --'.join(idle)} does nothing without --{' --'.join(NEEDS[name] for name in idle)}"),
        (bool(args.dataset_name) == bool(args.prompts_file) and not args.dry_run,
         "give the prompts by exactly one of --dataset_name and --prompts_file"),
        (args.prompts_file and not Path(args.prompts_file).is_file() and not args.dry_run,
         f"--prompts_file {args.prompts_file} is not a file"),
        (args.resolution % 8, f"--resolution {args.resolution} is not divisible by 8"),
        (not 0 <= low <= high, f"--min_timestep {low} must be from 0 to --max_timestep {high}"),
        (args.lr_warmup_steps and args.lr_scheduler == "constant",
         "--lr_warmup_steps does nothing with --lr_scheduler constant; choose constant_with_warmup"),
        (args.lr_warmup_steps > args.max_train_steps,
         f"--lr_warmup_steps {args.lr_warmup_steps} is more than --max_train_steps {args.max_train_steps}"),
        (args.lr_scheduler == "polynomial" and min(rates) <= 1e-7,
         f"--lr_scheduler polynomial ends at 1e-7, and --learning_rate is {min(rates):g}; choose linear"),
        (args.min_diversity and args.num_validation_images * len(args.validation_prompts or []) < 2,
         "--min_diversity needs more than one picture: more --validation_prompts or --num_validation_images"),
        (args.divergence == "kl" and args.score_gradient == "detached",
         "--score_gradient does nothing with --divergence kl, whose scores are always detached"),
        (args.pseudo_huber_c != parser.get_default("pseudo_huber_c") and not huber,
         "--pseudo_huber_c does nothing with --distance l2"),
        (unread, f"--{' --'.join(unread)} does nothing where no --reward is pickscore"),
        (args.sharding and sharded_with, f"--sharding {args.sharding} is not supported with {sharded_with}"),
        (len(set(names)) < len(names), f"--reward {max(names, key=names.count)} is given twice"),
        (0 in [scale for _, scale in terms], "--reward with the scale 0 does nothing: leave it out"),
        (args.revision and Path(args.pretrained_model_name_or_path).exists(),
         "--revision does nothing for a folder; it is of a repository on the hub"),
        ("caption_column" in changed and str(args.prompts_file).endswith(".txt"),
         f"--caption_column does nothing with {args.prompts_file}: a .txt file has no columns"),
        (foreign, f"--reward {' '.join(foreign)} needs a scale of its own, NAME=SCALE: --reward_scale is for"
         " the plain cosine of pickscore and for your own"),
        (args.reward and unscaled and not args.reward_scale,
         f"--reward {' '.join(unscaled)} has the scale 0: give NAME=SCALE, or --reward_scale"),
        (scale_given and not unscaled, "--reward_scale does nothing where every --reward has its own scale"),
        (huber and args.pseudo_huber_c == 0 and args.divergence == "score",
         "--pseudo_huber_c must be above 0: at 0 the distance has no derivative at no difference"),
    ]:
        if wrong:
            fail(message)
    args.reward = {name: scale for name, scale in scales.items() if scale}
    if not args.dry_run:
        try:
            check_output_dir(args)
        except OSError as error:
            fail(f"--output_dir {args.output_dir} or --resume_from_checkpoint: {error.strerror}")
    return args


def check_output_dir(args):
    """Refuse a folder that holds another run, and resolve --resume_from_checkpoint to a folder or None."""
    output_dir = Path(args.output_dir)
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents)
                    if folder.exists() or folder.is_symlink())
    if not existing.is_dir():
        fail(f"--output_dir {output_dir}: {existing} is a file or a broken link")
    if not os.access(existing, os.W_OK):
        fail(f"--output_dir {output_dir} cannot be written: {existing} is read-only")
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / "args.json").exists():
        fail(f"--output_dir {output_dir} is not empty and holds no run of this script; choose another folder")
    if args.resume_from_checkpoint is None:
        if (output_dir / "args.json").exists():
            fail(f"--output_dir {output_dir} holds another run; choose another folder, or continue that run"
                 " with --resume_from_checkpoint latest")
        return
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(output_dir)
        args.resume_from_checkpoint = str(checkpoints[-1]) if checkpoints else None
        if not checkpoints:
            return
    if not Path(args.resume_from_checkpoint).exists():  # checkpoint-500: in the output folder
        args.resume_from_checkpoint = str(output_dir / args.resume_from_checkpoint)
    folder = Path(args.resume_from_checkpoint)
    if not (folder / "state.json").is_file():
        fail(f"--resume_from_checkpoint {folder} is no checkpoint of this script (it has no state.json)")
    state = read_part(folder / "state.json", lambda path: json.loads(path.read_text()))
    held = state if isinstance(state, dict) else {}
    if not all(isinstance(held.get(name), kind) for name, kind in STATE.items()):
        fail(f"--resume_from_checkpoint {folder} was made by another version of this script")
    first = state["first_diversity"].get("of")
    if args.min_diversity and first != [args.validation_prompts, args.num_validation_images]:
        fail("--min_diversity compares with the validation at the start, which had other --validation_prompts"
             " or --num_validation_images, or none")
    for name, size in state["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            fail(f"--resume_from_checkpoint {folder}: {name} is missing or cut short; take an earlier one")
    for name, value in saved_args(args).items():
        if name not in RESUMABLE_FLAGS and value != state["args"].get(name):
            fail(f"--{name} is {value}, but {folder} was made with {state['args'].get(name)}; resume with the"
                 " same flags")
    if total_batch_size(args) != state["total_batch_size"]:
        fail("--train_batch_size x --gradient_accumulation_steps x processes is"
             f" {total_batch_size(args)}, but {folder} was made with {state['total_batch_size']}; resume with"
             " the same product")
    if state["step"] > args.max_train_steps:
        fail(f"--max_train_steps {args.max_train_steps}: {folder} is at step {state['step']} already;"
             " raise it to train on")


def read_part(path, reader):
    """What a reader makes of a checkpoint's file; ends the run where it is damaged."""
    try:
        return reader(path)
    except Exception as error:  # each format has its own
        fail(f"--resume_from_checkpoint {path.parent}: {path.name} is damaged, {first_line(error)}; take an"
             " earlier one")


def total_batch_size(args):
    """Samples of one optimiser step, over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))


def list_checkpoints(output_dir):
    """Finished checkpoints of a run, oldest first."""
    folders = [path.parent for path in Path(output_dir).glob("checkpoint-*/state.json")
               if path.parent.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def saved_args(args):
    return {name: value for name, value in vars(args).items() if name not in UNSAVED_FLAGS}


ARGS = parse_args() if __name__ == "__main__" else None

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

import pandas
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, ProjectConfiguration, set_seed
from datasets import load_dataset
from diffusers import DDPMScheduler, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData, create_repo, hf_hub_download, upload_folder
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from torchvision.utils import save_image
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer


warnings.filterwarnings("ignore", "Already found a `peft_config`")  # one base holds two LoRAs
warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # where the first update is skipped


# ------------------------------------------------------------------------------------------------ mathematics


@dataclass(frozen=True)
class Diffusion:
    """The forward process x_t = a_t x0 + s_t noise and what a network's output means in it.

    `alphas_cumprod` (timesteps,); `prediction_type` is the scheduler's: epsilon, v_prediction or sample.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str

    def coefficients(self, timesteps):
        """a_t and s_t, each (batch, 1, 1, 1), of timesteps (batch,)."""
        alphas_cumprod = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def clean_prediction(self, output, x_t, a, s):
        """D(x_t), the clean latents that a network's output stands for; all (batch, C, H, W)."""
        if self.prediction_type == "epsilon":
            return (x_t - s * output) / a
        if self.prediction_type == "v_prediction":
            return a * x_t - s * output
        return output

    def target(self, x0, noise, a, s):
        """What the network's output is trained to be: denoising score matching in its own parametrisation."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return a * noise - s * x0
        return x0


def guided_prediction(conditional, unconditional, scale):
    """Classifier-free guidance as in diffusers (section 3.3, omega = alpha_cfg); at most 1 means none."""
    return conditional if scale <= 1 else unconditional + scale * (conditional - unconditional)


def time_weight(x0, d_reference, a, s, weighting):
    """Units of the divergence: (unit, x_unit, weight), each broadcastable to (batch, 1, 1, 1).

    A difference of scores is `unit` times one of clean predictions; x_t moves by `x_unit` times x0 (in clean
    units both are 1). `weight` is w(t); for `dmd` 1 / mean |x0 - D_reference| per sample, detached.
    """
    one = torch.ones_like(a)
    if weighting == "score":
        return a / s**2, a, one
    if weighting == "dmd":
        return one, one, 1 / (x0 - d_reference).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    return one, one, one


def score_divergence_loss(x0, d_assistant, d_reference, a, s, distance, c, weighting):
    """(3.4) and (3.7): - w d'(y)^T (S_assistant - grad log p(x_t | x0)), y = S_assistant - S_reference.

    Every tensor (batch, C, H, W), a and s (batch, 1, 1, 1); returns (batch,). Its gradient in the generator's
    parameters, taken through x0 and through both predictions, is that of the divergence (3.2) (theorem 3.1).
    """
    unit, _, weight = time_weight(x0, d_reference, a, s, weighting)
    y = unit * (d_assistant - d_reference)
    if distance == "l2":
        derivative = 2 * y
    else:
        derivative = y / (y.square().sum((1, 2, 3), keepdim=True) + c**2).sqrt()
    return -(weight * derivative * unit * (d_assistant - x0)).sum((1, 2, 3))


def score_distance(x0, d_assistant, d_reference, a, s, distance, c, weighting):
    """The integrand of (3.2), w d(y) with y = S_assistant - S_reference; shapes as above, (batch,)."""
    unit, _, weight = time_weight(x0, d_reference, a, s, weighting)
    square = (unit * (d_assistant - d_reference)).square().sum((1, 2, 3), keepdim=True)
    return (weight * (square if distance == "l2" else (square + c**2).sqrt() - c)).flatten()


def kl_divergence_loss(x0, d_assistant, d_reference, a, s, weighting):
    """Diff-Instruct(++): w y^T x_t with y = S_assistant - S_reference detached; shapes as above, (batch,)."""
    unit, x_unit, weight = time_weight(x0, d_reference, a, s, weighting)
    return (weight * unit * (d_assistant - d_reference).detach() * x_unit * x0).sum((1, 2, 3))


def cfg_reward_loss(x0, d_reference, d_null, a, s, scale, weighting):
    """(3.5) with (A.13)'s minus: - alpha_cfg w (S_ref(x_t | c) - S_ref(x_t))^T x_t, scores detached."""
    unit, x_unit, weight = time_weight(x0, d_reference, a, s, weighting)
    return -scale * (weight * unit * (d_reference - d_null).detach() * x_unit * x0).sum((1, 2, 3))


def assistant_loss(output, x0, noise, a, s, diffusion):
    """Denoising score matching (Algorithm 1), lambda(t) as the reference was trained; returns (batch,)."""
    return (output - diffusion.target(x0, noise, a, s)).square().mean((1, 2, 3))


def divergence_gradient(x0, noise, a, s, assistant, reference, args):
    """Gradient at x0 of the divergence to the reference and of the guidance reward, per sample.

    Args:
        x0, noise: (batch, C, H, W), detached; a, s: (batch, 1, 1, 1).
        assistant: x_t -> clean prediction of the assistant.
        reference: x_t -> clean predictions of the reference, (conditional, unconditional or None).
        args: divergence, score_gradient, distance, pseudo_huber_c, weighting, cfg_mode, cfg_scale.

    Returns:
        dict of gradients (batch, C, H, W) by term, and a dict of per-sample logs (batch,).

    With `full` score gradients dL/dx0 = direct + a (J_A^T g_A + J_R^T g_R): g_A, g_R are the loss's
    derivatives at the two predictions, and each network's vector-Jacobian product is taken on its own.
    """
    full = args.divergence == "score" and args.score_gradient == "full"
    x_t = (a * x0 + s * noise).requires_grad_(full)
    with torch.set_grad_enabled(full):
        d_assistant = assistant(x_t)
        d_conditional, d_null = reference(x_t)
        d_reference = d_conditional
        if args.cfg_mode == "in":
            d_reference = guided_prediction(d_conditional, d_null, args.cfg_scale)

    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in (x0, d_assistant, d_reference)]
        if args.divergence == "score":
            loss = score_divergence_loss(*leaves, a, s, args.distance, args.pseudo_huber_c, args.weighting)
        else:
            loss = kl_divergence_loss(*leaves, a, s, args.weighting)
        gradient, g_assistant, g_reference = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        if full:
            (through_reference,) = torch.autograd.grad(d_reference, x_t, g_reference)
            (through_assistant,) = torch.autograd.grad(d_assistant, x_t, g_assistant)
            gradient = gradient + a * (through_assistant + through_reference)
        gradients = {"divergence": gradient}
        if args.cfg_mode == "out" and args.cfg_scale > 0:
            leaf = x0.detach().requires_grad_()
            cfg_loss = cfg_reward_loss(leaf, d_conditional.detach(), d_null.detach(), a, s, args.cfg_scale,
                                       args.weighting)
            (gradients["cfg"],) = torch.autograd.grad(cfg_loss.sum(), leaf)
    y_norm = (d_assistant - d_reference).detach().flatten(1).norm(dim=1)
    return gradients, {"loss_divergence": loss.detach(), "y_norm": y_norm}


class RewardError(ValueError):
    """A reward broke its contract."""


def reward_gradient(x0, prompts, decode, rewards):
    """Gradient at x0 of - sum over rewards of alpha_rew r(decode(x0), c), (3.1).

    Args:
        x0: (batch, C, H, W) scaled latents, detached. decode: latents -> images, [0, 1] before clamping.
        rewards: {name: (alpha_rew, function of images (batch, 3, H, W) in [0, 1] and prompts to (batch,))}.

    Returns:
        the gradient (batch, C, H, W), and per-sample logs: each reward and the norm of its scaled gradient at
        the image, their mean weighted by the scales, and the share of clamped values, which have no gradient.

    Raises:
        RewardError: no scores of shape (batch,), or without a gradient in the images.
    """
    logs, at_images = {}, 0
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_()
        decoded = decode(leaf)
        clamped = decoded.clamp(0, 1)
        images = clamped.detach().requires_grad_()
        for name, (scale, reward) in rewards.items():  # each one's activations are gone before the next
            scores = score(name, reward, images, prompts)
            (gradient,) = torch.autograd.grad(
                -scale * scores.float().sum(), images, allow_unused=True) if scores.requires_grad else (None,)
            if gradient is None:
                raise RewardError(f"reward {name} has no gradient in the images")
            at_images = at_images + gradient
            logs |= {f"reward_{name}": scores.detach().float(),
                     f"grad_image_{name}": gradient.flatten(1).norm(dim=1)}
        (gradient,) = torch.autograd.grad(clamped, leaf, at_images)
    logs["reward"] = weighted_mean({name: logs[f"reward_{name}"] for name in rewards}, rewards)
    logs["clamped"] = ((decoded < 0) | (decoded > 1)).detach().float().mean((1, 2, 3))
    return gradient.float(), logs


def score(name, reward, images, prompts):
    """A reward's scores (batch,); RewardError where it raises or gives anything else."""
    try:
        scores = reward(images, prompts)
    except (Exception, SystemExit) as error:  # it may be anybody's
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(f"reward {name} raised {type(error).__name__} at {Path(place.filename).name}:"
                          f"{place.lineno}: {first_line(error)}; prompts {prompts}") from error
    shape = tuple(getattr(scores, "shape", ()))
    if not isinstance(scores, torch.Tensor) or shape != (len(prompts),):
        raise RewardError(f"reward {name} returned a {type(scores).__name__} of shape {shape}, not a tensor"
                          f" of shape ({len(prompts)},); prompts {prompts}")
    return scores


def weighted_mean(scores, rewards):
    """The mean of scores {name: (batch,)} weighted by their rewards' scales, of one reward its scores."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    return sum(scale * scores[name] for name, (scale, _) in rewards.items()) / sum(
        scale for scale, _ in rewards.values())


def diversity(images):
    """Of pictures (prompts, of each, 3, H, W) in [0, 1] the standard deviations, a mean over pixels of each.

    `over_noise`: over the pictures of a prompt; `over_prompts`: over the prompts' mean pictures, which falls
    where they all get one look. Of one picture, or of one prompt, there is none.
    """
    spreads = {"over_noise": images.std(1)} if images.shape[1] > 1 else {}
    spreads |= {"over_prompts": images.mean(1).std(0)} if len(images) > 1 else {}
    return {name: value.mean().item() for name, value in spreads.items()}


# ------------------------------------------------------------------------------------------------ models


@dataclass
class Models:
    """Everything a step needs."""

    pipeline: DiffusionPipeline  # text encoders, tokenizers, VAE; its UNet holds the reference's weights
    reference: torch.nn.Module
    assistant: torch.nn.Module
    generator: torch.nn.Module
    reward_vae: torch.nn.Module
    rewards: dict  # {name: (scale, function of images and prompts)}
    diffusion: Diffusion
    text_encoders: torch.nn.Module
    scorers: torch.nn.Module  # the rewards and their VAE
    using: object  # module -> a context in which it is on the device, see `on_device`


class Adapted(torch.nn.Module):
    """A network on a frozen base UNet that may hold others: its LoRA on, or (adapter None) all of them off.

    The base is switched before each forward and again before its backward, so that gradient checkpointing
    recomputes what was computed. PEFT's own switches also change requires_grad, which silently zeroes the
    gradients of a network whose backward is still to come.
    """

    def __init__(self, base, adapter=None):
        super().__init__()
        self.base, self.adapter = base, adapter

    @functools.cached_property
    def layers(self):  # looked up at the first forward, when every adapter is in its place
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


def repeated_blocks(network):
    """The parts of a UNet that FSDP2 gathers one by one."""
    return [block for block in network.modules() if isinstance(block, (BasicTransformerBlock, ResnetBlock2D))]


def shard(network, mesh, dtype):
    """FSDP2: weights, gradients and optimizer states divided over the processes.

    Each repeated block is gathered for its forward and once more for its backward, in `dtype` where one is
    given; gradients are averaged in the weights' own precision. The rest, too, is given up after each
    forward: kept, it would miss a change of the weights, such as EMA's for a validation.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32,
                                  cast_forward_inputs=False)  # autocast does it, as without sharding
    for module in (*repeated_blocks(network), network):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def data_parallel(network):
    """DDP over what is trained of the network; another's LoRA on the same base is not its business."""
    others = set(dict(network.named_parameters())) - set(trained(network))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, others)
    return DistributedDataParallel(network, gradient_as_bucket_view=True)


def gathered(network, accelerator):
    """A sharded network as an ordinary one on the main process's CPU; every process takes part."""
    state_dict = {}
    for key, value in network.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if accelerator.is_main_process:
            state_dict[key] = value.cpu()
    if not accelerator.is_main_process:
        return None
    unet = UNet2DConditionModel.from_config(network.config)
    unet.load_state_dict(state_dict)
    return unet


def trained(network):
    """The parameters that training changes, by name: all of a network, or one adapter's of a base."""
    mark = f".{network.adapter}." if isinstance(network, Adapted) else ""
    return {name: value for name, value in network.named_parameters() if value.requires_grad and mark in name}


@contextlib.contextmanager
def on_device(module, device):
    """For --offload: the module on the device for the time of one use."""
    module.to(device)
    yield
    module.to("cpu")


def resize_and_crop(images, side, crop, anchor=math.floor):
    """The shorter side of images (batch, 3, H, W) in [0, 1] to `side`, antialiased bicubic; a centre crop.

    What CLIP's image processors do, without their rounding to whole numbers of 255. `anchor` rounds half a
    pixel: transformers' first processor goes down, torchvision to the even one.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    size = [int(side * length / short) for length in (height, width)]
    if size != [height, width]:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = [anchor((length - crop) / 2) for length in size]
    return images[..., top:top + crop, left:left + crop]


def check_batch(images, prompts):
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(f"{len(images)} images need a list of as many prompts, not {prompts!r:.80}")


class ClipReward(torch.nn.Module):
    """A CLIP-type preference model: the plain cosine of picture and prompt (PickScore about 0.22).

    Preprocessing is the processor's own (shorter side resized, centre crop, mean and standard deviation),
    made of differentiable operations.
    """

    scale = 1.0

    def __init__(self, model, processor):
        super().__init__()
        self.model, self.tokenizer = model, processor.tokenizer
        self.size = processor.image_processor.size["shortest_edge"]
        self.crop = processor.image_processor.crop_size["height"]
        self.register_buffer("mean", torch.tensor(processor.image_processor.image_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(processor.image_processor.image_std).view(3, 1, 1))

    def preprocess(self, images):
        return resize_and_crop(images, self.size, self.crop)

    def tokenize(self, prompts):
        return self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt",
                              max_length=self.model.config.text_config.max_position_embeddings)

    def forward(self, images, prompts):
        """images (batch, 3, H, W) in [0, 1], prompts -> (batch,) cosines, differentiable in the images."""
        check_batch(images, prompts)
        if images.dtype in (torch.float16, torch.bfloat16):
            images = images.float()  # antialiased bicubic has no half-precision kernel on every device
        pixels = (self.preprocess(images) - self.mean) / self.std
        tokens = self.tokenize(prompts)
        output = self.model(input_ids=tokens.input_ids.to(images.device),
                            attention_mask=tokens.attention_mask.to(images.device),
                            pixel_values=pixels.to(self.model.dtype))
        return self.scale * (output.image_embeds.to(pixels) * output.text_embeds.to(pixels)).sum(-1)


def load(kind, name_or_path, args, dtype=None, **more):
    """Something of a library's class; a model frozen, and in a dry run of its configuration alone."""
    is_model = issubclass(kind, torch.nn.Module)
    logging.disable(logging.ERROR)  # what fails is said below, in one line
    try:
        if is_model and not args.dry_run:
            loaded, report = kind.from_pretrained(name_or_path, output_loading_info=True, **more)
            if report["missing_keys"]:  # the libraries warn of them and go on with random numbers
                raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        elif not args.dry_run or issubclass(kind, DDPMScheduler):
            loaded = kind.from_pretrained(name_or_path, **more)
        elif not is_model:
            loaded = Blank(name_or_path, **more)
        elif hasattr(kind, "load_config"):  # diffusers
            loaded = kind.from_config(kind.load_config(name_or_path, **more))
        else:
            loaded = kind(kind.config_class.from_pretrained(name_or_path, **more))
        tokenizer = getattr(loaded, "tokenizer", loaded)
        if getattr(tokenizer, "vocab_size", 10) < 10 or getattr(tokenizer, "model_max_length", 77) > 10**6:
            raise ValueError("the files of its vocabulary or its configuration are missing")
    except Exception as error:  # each library and format has its own
        part = " ".join(filter(None, (str(name_or_path), more.get("subfolder"))))
        fail(f"{part} cannot be loaded as a {kind.__name__}: {first_line(error)}")
    finally:
        logging.disable(logging.NOTSET)
    return cast(loaded, dtype).requires_grad_(False).eval() if is_model else loaded


def load_part(kind, subfolder, args, dtype=None):
    """A part of the reference pipeline, or what a flag puts in its place."""
    own = {"vae": args.pretrained_vae_model_name_or_path, "unet": args.reference_unet}.get(subfolder)
    if own:
        subfolder = find_unet(own)[1] if subfolder == "unet" else None
        return load(kind, own, args, dtype, subfolder=subfolder)
    more = {"variant": args.variant} if issubclass(kind, torch.nn.Module) else {}
    return load(kind, args.pretrained_model_name_or_path, args, dtype, subfolder=subfolder,
                revision=args.revision, **more)


def cast(module, dtype):
    """The module in `dtype`. The loaders' own flag for it has another name in every second release."""
    return torch.nn.Module.to(module, dtype=dtype)


def load_pipeline(args, dtype, unet=None):
    """The reference pipeline, frozen; with `unet` in place of the reference where one is given."""
    return StableDiffusionPipeline(
        vae=load_part(AutoencoderKL, "vae", args, dtype),
        text_encoder=load_part(CLIPTextModel, "text_encoder", args, dtype),
        tokenizer=load_part(CLIPTokenizer, "tokenizer", args),
        unet=unet or load_part(UNet2DConditionModel, "unet", args, dtype),
        scheduler=load_part(DDPMScheduler, "scheduler", args), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def encode_prompts(pipeline, prompts, resolution, null=False):
    """The UNet's conditioning for prompts, a dict of keyword arguments; with `null` for prompts and as many
    null prompts after them."""
    with torch.no_grad():
        prompt_embeds, null_embeds = pipeline.encode_prompt(
            list(prompts), device=pipeline.text_encoder.device, num_images_per_prompt=1,
            do_classifier_free_guidance=null)
    return {"encoder_hidden_states": torch.cat([prompt_embeds, null_embeds]) if null else prompt_embeds}


def one_step_scheduler(scheduler):
    """LCMScheduler at one timestep is the generator's formula; inherited clipping would cut the latents."""
    return LCMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)


def find_unet(name_or_path):
    """(configuration, subfolder) of the UNet in a UNet folder, a pipeline folder or a hub id of either."""
    with contextlib.suppress(OSError):
        return UNet2DConditionModel.load_config(name_or_path, subfolder="unet"), "unet"
    return UNet2DConditionModel.load_config(name_or_path), None


def read_start(args, pipeline):
    """What --generator_init names: (a UNet's state dict, None), or (None, a LoRA as diffusers reads it)."""
    init, path = args.generator_init, Path(args.generator_init)
    if init == "reference" or args.dry_run:
        return None, None
    if (path / LORA_FILE).exists() and not (path / "unet").exists():
        path = path / LORA_FILE
    elif not init.endswith(WEIGHTS_FILES):
        return load(UNet2DConditionModel, init, args, subfolder=find_unet(init)[1]).state_dict(), None
    try:
        if not path.exists():
            owner, name, file = init.split("/", 2)
            path = Path(hf_hub_download(f"{owner}/{name}", file))
        safe = path.suffix == ".safetensors"
        state_dict = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        if any("lora" in key for key in state_dict):
            more = {"unet_config": pipeline.unet.config, "return_lora_metadata": True}
            return None, pipeline.lora_state_dict(str(path.parent), weight_name=path.name, **more)
    except Exception as error:  # each format has its own
        fail(f"--generator_init {init} is no readable weights file: {first_line(error)}")
    return state_dict, None


def load_generator(args, pipeline, dtype):
    """The generator: float32 weights to train, or a LoRA on frozen ones, which may be the reference's."""
    reference, rank = pipeline.unet, args.generator_lora_rank
    weights, lora = read_start(args, pipeline)
    own_base = not (rank and args.shared_base == "all")
    if weights is not None:
        held = reference.state_dict()
        refuse_misfits(weights, held)
        if not own_base and any(not torch.equal(weights[key].to(held[key].dtype), held[key]) for key in held):
            fail(f"--shared_base: --generator_init {args.generator_init} is not the reference's weights; with"
                 " `--shared_base assistant` the generator's LoRA has a base of its own")
    unet = cast(copy.deepcopy(reference), dtype if rank else torch.float32) if own_base else reference
    if weights is not None and own_base:
        unet.load_state_dict(weights)
    if not rank and not lora:
        return unet.requires_grad_(True)
    generator = adapt(unet, "generator", rank, lora)
    return generator if rank else merged(generator).requires_grad_(True)


def adapt(base, name, rank, lora=None):
    """A float32 LoRA on a frozen base, one that changes nothing yet or (the generator's start) as given."""
    if lora is None:
        base.add_adapter(LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"]), adapter_name=name)
    else:
        given, alphas, metadata = lora
        try:
            base.load_lora_adapter(given, network_alphas=alphas, metadata=metadata, adapter_name=name,
                                   prefix="unet")
            held = get_peft_model_state_dict(base, adapter_name=name)
        except (AttributeError, KeyError, RuntimeError, ValueError) as error:
            words = " ".join(str(error).split())
            fail(f"--generator_init: a LoRA that does not fit the UNet, of another model? {words[:250]}")
        refuse_misfits({key.removeprefix("unet."): value for key, value in given.items()}, held)
        if rank not in (0, base.peft_config[name].r):
            fail(f"--generator_lora_rank {rank}: the LoRA of --generator_init has {base.peft_config[name].r}")
    for key, parameter in base.named_parameters():  # PEFT freezes an adapter when another one is added
        parameter.requires_grad_("lora_" in key)
    cast_training_params(base, dtype=torch.float32)
    return Adapted(base.eval(), name)  # a given LoRA's dropout would not be a function of the seed


def merged(network):
    """A plain float32 UNet with the network's LoRA in its weights; its base is used up."""
    unet = cast(network.base, torch.float32)
    unet.fuse_lora(adapter_names=[network.adapter])
    unet.unload_lora()
    return unet


def misfits(state_dict, expected, shown=3):
    """What of a state dict does not load strictly, with a few names in one line; empty where all does."""
    kinds = {"missing": [name for name in expected if name not in state_dict],
             "unexpected": [name for name in state_dict if name not in expected],
             "of another shape": [name for name in expected if name in state_dict and getattr(
                 state_dict[name], "shape", None) != expected[name].shape]}
    return "; ".join(f"{len(names)} {kind} ({', '.join(names[:shown])}{', ...' if names[shown:] else ''})"
                     for kind, names in kinds.items() if names)


def refuse_misfits(state_dict, expected):
    """End the run where a state dict of --generator_init does not load strictly."""
    wrong = misfits(state_dict, expected)
    if wrong:
        fail(f"--generator_init does not fit the reference's UNet: {wrong}")


def find_reward(name, args):
    """What loads a reward of --reward, a function of the dtype; ends the run where it can be told to fail."""
    kind, _, location = name.partition(":")
    if name == "pickscore":
        return lambda dtype: ClipReward(load(CLIPModel, args.reward_model_name_or_path, args, dtype),
                                        load(CLIPProcessor, args.reward_processor_name_or_path, args))
    if kind == "pickscore":
        fail(f"--reward {name}: give pickscore's weights by --reward_model_name_or_path {location}")
    if kind == "official":
        fail(f"--reward {name}: the packages' own scorers have no gradient; give hpsv2.1 or imagereward")
    beside = Path(__file__).with_name("utils") / "rewards.py"
    if kind in REWARDS and not beside.exists():
        fail(f"--reward {name} needs this repository's utils/rewards.py beside the script; in the script"
             " itself are pickscore and your own module:factory")
    try:
        factory = None if kind in REWARDS else import_factory(name)
        if args.dry_run:
            return lambda dtype: lambda images, prompts: images.mean((1, 2, 3))
        if factory:
            return lambda dtype: factory()
        spec = importlib.util.spec_from_file_location("diff_instruct_star_rewards", beside)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.find_reward(name)
    except Exception as error:  # the hub's client, the libraries and your module have their own
        fail(f"--reward {name}: {first_line(error)}")


def load_rewards(args, dtype):
    """{short name: (scale, reward)} of the flags, frozen. Their random numbers change no others."""
    rewards = {}
    for name, scale in args.reward.items():
        loader = find_reward(name, args)
        try:
            with torch.random.fork_rng(devices=[]):
                reward = loader(dtype)
        except Exception as error:
            fail(f"--reward {name}: {first_line(error)}")
        if not callable(reward):
            fail(f"--reward {name} made {reward!r}, not a function of images and prompts")
        if isinstance(reward, torch.nn.Module):
            reward.requires_grad_(False).eval()
        rewards[short_name(name)] = (scale, reward)
    return rewards


def load_reward_vae(args, pipeline, dtype):
    vae = pipeline.vae
    if args.reward_vae:
        tiny = AutoencoderKL.load_config(args.reward_vae)["_class_name"] == "AutoencoderTiny"
        vae = load(AutoencoderTiny if tiny else AutoencoderKL, args.reward_vae, args, dtype)
    if args.enable_vae_tiling:  # by itself only pictures larger than the VAE was trained on
        vae.enable_tiling()
        side = args.resolution // pipeline.vae_scale_factor
        vae.tile_latent_min_size = max(side // 8 * 4, 4)  # a quarter is the overlap, which must be whole
        vae.tile_sample_min_size = vae.tile_latent_min_size * pipeline.vae_scale_factor
    return vae


def import_factory(name):
    """`module:factory`, looked up beside the working directory first; ValueError where it is not there."""
    module, _, factory = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), factory)
    except (Exception, SystemExit) as error:  # a module of one's own has its own
        raise ValueError(f"{type(error).__name__}: {first_line(error)}; give one of {', '.join(REWARDS)}, or"
                         " module:factory (not a path) with the module importable from here") from error
    if not callable(found):
        raise ValueError(f"{factory} of {module} is {found!r:.80}, not a function")
    return found


def decode(vae, latents):
    """Scaled latents (batch, C, h, w) -> images (batch, 3, H, W), in [0, 1] up to overshoot, float32."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    images = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample
    return images.float() / 2 + 0.5


# ------------------------------------------------------------------------------------------------ data


def read_prompts_file(path, caption_column):
    """Prompts of a .txt, .csv, .tsv, .jsonl or .parquet file, as text, empty ones left out.

    Nothing is interpreted: `42` is text, and in .tsv a quotation mark is a plain character.
    """
    kind, plain = Path(path).suffix.lower(), {"dtype": str, "keep_default_na": False}
    readers = {".csv": functools.partial(pandas.read_csv, **plain),
               ".tsv": functools.partial(pandas.read_csv, sep="\t", quoting=csv.QUOTE_NONE, **plain),
               ".jsonl": functools.partial(pandas.read_json, lines=True, dtype=False),
               ".parquet": pandas.read_parquet}
    if kind not in (".txt", *readers):
        fail(f"--prompts_file {path}: '{kind}' is none of .txt, .csv, .tsv, .jsonl, .parquet")
    try:
        if kind == ".txt":
            prompts = map(str.strip, Path(path).read_text(encoding="utf-8-sig").split("\n"))
            return [prompt for prompt in prompts if prompt]
        table = readers[kind](path)
    except (OSError, ValueError) as error:  # ValueError: of UTF-8, of JSON, of Arrow, of pandas
        fail(f"--prompts_file {path} cannot be read as {kind}: {first_line(error)}")
    return take_column(table, list(map(str, table.columns)), caption_column, path)


def take_column(table, names, caption_column, source):
    if caption_column not in names:
        fail(f"--caption_column {caption_column} is not in {source}; it has {', '.join(names) or 'none'}")
    values = [value for value in table[caption_column]  # a missing value is None or, not equal to itself, NaN
              if not (value is None or isinstance(value, numbers.Number) and value != value)]
    odd = next((value for value in values if not isinstance(value, (str, numbers.Number))), None)
    if odd is not None:
        fail(f"--caption_column {caption_column} of {source} holds a {type(odd).__name__}, not text")
    return [value for value in (str(value).strip() for value in values) if value]


class Prompts:
    """The run's prompts by position: epochs of a seeded order, the same for any processes and batch size."""

    def __init__(self, prompts, seed):
        self.prompts, self.seed, self.epoch, self.order = prompts, seed, None, None
        self.digest = hashlib.blake2b("\n".join(prompts).encode(), digest_size=16).hexdigest()

    def at(self, position):
        epoch, row = divmod(position, len(self.prompts))
        if epoch != self.epoch:
            self.order = torch.randperm(len(self.prompts), generator=stream(self.seed, "prompts", epoch, 0))
            self.epoch = epoch
        return self.prompts[self.order[row]]


class StreamedPrompts:
    """Prompts of a streamed data set by position; positions only grow, and resuming replays up to them."""

    digest = None  # what a stream holds is not known beforehand

    def __init__(self, dataset, caption_column, seed, buffer_size=10_000):
        self.dataset = dataset.shuffle(seed=seed, buffer_size=buffer_size)
        self.column, self.position, self.rows, self.latest = caption_column, 0, self.replay(), None

    def replay(self):
        epoch = 0
        while True:
            self.dataset.set_epoch(epoch)
            found = False
            for row in self.dataset:
                text = str(row[self.column]).strip() if row[self.column] is not None else ""
                if text:
                    found = True
                    yield text
            if not found:
                raise ValueError("it holds no prompts any more")
            epoch += 1

    def at(self, position):
        while self.position <= position:
            try:
                self.latest = next(self.rows)
            except Exception as error:  # each format has its own
                fail(f"--dataset_name: no prompts after the first {self.position}: {first_line(error)}")
            self.position += 1
        return self.latest


def load_prompts(args):
    """The prompts of the flags; ends the run where there are none."""
    if args.prompts_file:
        prompts = read_prompts_file(args.prompts_file, args.caption_column)
        source = f"--prompts_file {args.prompts_file}"
    else:
        source = f"--dataset_name {args.dataset_name}"
        try:
            dataset = load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split,
                                   streaming=args.streaming)
        except Exception as error:  # each format has its own
            fail(f"{source} cannot be loaded: {first_line(error)}")
        names = dataset.column_names or list(next(iter(dataset)))
        if args.caption_column not in names:
            take_column([], names, args.caption_column, source)
        dataset = dataset.select_columns(args.caption_column)
        if args.streaming and args.max_train_samples:
            first = dataset.take(args.max_train_samples)
            dataset = pandas.DataFrame(list(first), columns=[args.caption_column])
        elif args.streaming:
            if not any(str(row[args.caption_column] or "").strip() for row in dataset.take(100)):
                fail(f"{source} has no prompts in column {args.caption_column}")
            return StreamedPrompts(dataset, args.caption_column, args.seed)
        prompts = take_column(dataset, names, args.caption_column, source)
    prompts = prompts[:args.max_train_samples]
    if not prompts:
        fail(f"{source} has no prompts")
    return Prompts(prompts, args.seed)


def stream(seed, name, step, index):
    """A generator of random numbers that is a function of its four arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{name}/{step}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_batch(args, name, step, indices, shape, device):
    """z, noise (batch, *shape), timesteps (batch,): functions of (seed, stream, step, sample index)."""
    z, noise, timesteps = [], [], []
    for index in indices:
        generator = stream(args.seed, name, step, index)
        z.append(torch.randn(shape, generator=generator))
        noise.append(torch.randn(shape, generator=generator))
        timesteps.append(torch.randint(args.min_timestep, args.max_timestep + 1, (), generator=generator))
    return [torch.stack(values).to(device) for values in (z, noise, timesteps)]


# ------------------------------------------------------------------------------------------------ steps


def predict(unet, diffusion, x_t, timesteps, conditioning):
    """A network's clean prediction of x_t (batch, C, H, W) at timesteps (batch,), in x_t's precision."""
    a, s = diffusion.coefficients(timesteps)
    output = unet(x_t, timesteps, **conditioning).sample.to(x_t.dtype)
    return diffusion.clean_prediction(output, x_t, a, s)


def generate(generator, diffusion, z, timestep, conditioning):
    """One step, x0 = g(z, c): the generator's clean prediction of z ~ N(0, I) at its fixed timestep."""
    return predict(generator, diffusion, z, z.new_full((len(z),), timestep, dtype=torch.long), conditioning)


def condition(models, timesteps, prompts, args, accelerator):
    """Of prompts and timesteps (batch,): the conditioning, and the two score networks as functions of x_t.

    The assistant's clean prediction, and the reference's (conditional, of the null prompt or None).
    """
    null = args.cfg_scale > (1 if args.cfg_mode == "in" else 0)
    with models.using(models.text_encoders):
        both = encode_prompts(models.pipeline, prompts, args.resolution, null)
    conditioning, null_conditioning = (tree_map(lambda value: value[part], both)
                                       for part in (slice(len(prompts)), slice(-len(prompts), None)))

    def reference(x_t):
        if null and args.cfg_mode == "in":  # both in one forward, and one backward
            return predict(models.reference, models.diffusion, x_t.repeat(2, 1, 1, 1), timesteps.repeat(2),
                           both).chunk(2)
        d_null = None
        if null:
            with torch.no_grad():
                d_null = predict(models.reference, models.diffusion, x_t, timesteps, null_conditioning)
        return predict(models.reference, models.diffusion, x_t, timesteps, conditioning), d_null

    def assistant(x_t):  # DDP would wait for gradients of its weights
        return predict(accelerator.unwrap_model(models.assistant), models.diffusion, x_t, timesteps,
                       conditioning)

    return conditioning, assistant, reference


def assistant_step(models, batch, args, accelerator):
    """One backward of the assistant on the generator's own samples (Algorithm 1, psi)."""
    z, noise, timesteps, prompts = batch
    with models.using(models.text_encoders):
        conditioning = encode_prompts(models.pipeline, prompts, args.resolution)
    a, s = models.diffusion.coefficients(timesteps)
    with torch.no_grad(), accelerator.autocast():
        x0 = generate(models.generator, models.diffusion, z, args.generator_timestep, conditioning)
    with accelerator.autocast():  # anew, for the former's half-precision copies of weights would stay
        output = models.assistant(a * x0 + s * noise, timesteps, **conditioning).sample.to(x0.dtype)
    loss = assistant_loss(output, x0, noise, a, s, models.diffusion)
    accelerator.backward(loss.mean())
    return {"loss_assistant": loss.detach()}


def generator_step(models, batch, args, accelerator):
    """One backward of the generator (Algorithm 1, theta): every term's gradient at x0, then one product."""
    z, noise, timesteps, prompts = batch
    conditioning, assistant, reference = condition(models, timesteps, prompts, args, accelerator)
    a, s = models.diffusion.coefficients(timesteps)
    with accelerator.autocast():
        x0 = generate(models.generator, models.diffusion, z, args.generator_timestep, conditioning)
    with accelerator.autocast():
        gradients, logs = divergence_gradient(x0.detach(), noise, a, s, assistant, reference, args)
    if models.rewards:  # outside autocast: decoder and rewards each in their own precision
        with models.using(models.scorers):
            gradients["reward"], reward_logs = reward_gradient(
                x0, prompts, functools.partial(decode, models.reward_vae), models.rewards)
        logs |= reward_logs
    total = sum(gradients.values())
    accelerator.backward((x0 * total).sum() / len(x0))
    return logs | {f"grad_{name}": value.flatten(1).norm(dim=1) for name, value in gradients.items()}


class Trainer:
    """The two optimisers and what one iteration of Algorithm 1 does with them."""

    def __init__(self, args, models, prompts, accelerator):
        self.args, self.models, self.prompts, self.accelerator = args, models, prompts, accelerator
        self.step, self.prompts_seen, self.validated, self.first_diversity = 0, 0, None, {}
        self.skipped, self.in_a_row = {"assistant": 0, "generator": 0}, {"assistant": 0, "generator": 0}
        channels = models.pipeline.unet.config.in_channels
        side = args.resolution // models.pipeline.vae_scale_factor
        self.latent_shape = (channels, side, side)
        self.optimizers, self.schedules, self.parameters = {}, {}, {}
        plan = {"assistant": (args.assistant_learning_rate, args.assistant_updates),
                "generator": (args.learning_rate, 1)}
        adam = functools.partial(torch.optim.AdamW, fused=True)
        if args.dry_run:
            adam = type("Still", (torch.optim.AdamW,), {"step": lambda self, closure=None: None})
        elif args.use_8bit_adam:
            adam = importlib.import_module("bitsandbytes.optim").AdamW8bit
        for name, (rate, updates) in plan.items():
            self.parameters[name] = trained(accelerator.unwrap_model(getattr(models, name)))
            self.optimizers[name] = adam(
                self.parameters[name].values(), lr=rate, betas=(args.adam_beta1, args.adam_beta2),
                weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)
            steps = {"num_warmup_steps": args.lr_warmup_steps * updates,
                     "num_training_steps": args.max_train_steps * updates}
            self.schedules[name] = get_scheduler(args.lr_scheduler, self.optimizers[name], **steps)
        self.ema = None
        if args.use_ema:
            self.ema = EMAModel(self.parameters["generator"].values(), decay=args.ema_decay)
            self.ema.to("cpu" if args.offload_ema else accelerator.device)
        self.logs = {}

    def update(self, name, stream_name, backward):
        """One optimiser step of a network over the accumulated batches, each process with its own samples.

        Gradients are averaged over the processes during the last batch's backward. Where a loss, a reward or
        a gradient of any process is not finite, nothing but the position changes, in all of them.
        """
        args, accelerator, parameters = self.args, self.accelerator, list(self.parameters[name].values())
        per_round, logs = args.train_batch_size * accelerator.num_processes, {}
        for accumulated in range(args.gradient_accumulation_steps):
            first = accumulated * per_round + accelerator.process_index * args.train_batch_size
            indices = range(first, first + args.train_batch_size)
            batch = draw_batch(args, stream_name, self.step, indices, self.latent_shape, accelerator.device)
            batch.append([self.prompts.at(self.prompts_seen + index) for index in indices])
            self.synchronize(name, accumulated == args.gradient_accumulation_steps - 1)
            for key, value in backward(self.models, batch, args, accelerator).items():
                logs.setdefault(key, []).append(value.mean())
        self.prompts_seen += per_round * args.gradient_accumulation_steps
        norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        logs[f"grad_norm_{name}"] = [norm.full_tensor() if args.sharding else norm]
        bad = torch.stack([~torch.stack(values).isfinite().all() for values in logs.values()]).float()
        bad = [] if args.dry_run else [  # the one wait
            key for key, value in zip(logs, accelerator.reduce(bad).tolist()) if value]
        if bad:
            self.skipped[name] += 1
            if accelerator.is_main_process:
                tqdm.write(f"warning: step {self.step + 1}: the {name}'s update is skipped, not finite:"
                           f" {', '.join(bad)}", file=sys.stderr)
        else:
            self.optimizers[name].step()
            for key, values in logs.items():
                self.logs.setdefault(key, []).extend(values)
        self.in_a_row[name] = self.in_a_row[name] + 1 if bad else 0
        self.optimizers[name].zero_grad(set_to_none=True)
        self.schedules[name].step()

    def synchronize(self, name, enabled):
        """Whether the next backward of a network averages gradients over the processes."""
        network = getattr(self.models, name)
        if self.args.sharding:
            network.set_requires_gradient_sync(enabled)
        else:
            network.require_backward_grad_sync = enabled  # of DDP

    def train_step(self):
        """Algorithm 1: K_TA updates of the assistant, then one of the generator."""
        for k in range(self.args.assistant_updates):
            self.update("assistant", f"assistant-{k}", assistant_step)
        self.update("generator", "generator", generator_step)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.ema.step(self.parameters["generator"].values())
            self.ema.to("cpu" if self.args.offload_ema else self.accelerator.device)
        self.step += 1

    def reason_to_end(self, asked):
        """Why the run ends after this step, or None: a signal to any process; too many skipped updates."""
        signals = torch.tensor(float(bool(asked)), device=self.accelerator.device)
        if self.accelerator.reduce(signals).item():
            return f"ended by {asked[0] if asked else 'a signal to another process'}"
        for name, count in self.in_a_row.items():
            if count >= self.args.max_skipped_updates:
                return (f"{count} updates of the {name} in a row were not finite and skipped: lower"
                        " --learning_rate or the reward's scale, or look at the reward")

    def too_uniform(self, seen):
        """Note what a validation saw; why the run ends where its pictures lost their diversity, or None."""
        args, self.validated = self.args, self.step
        of = [args.validation_prompts, args.num_validation_images]
        if self.step == 0:
            spreads = {name: seen[name] for name in seen if name.startswith("validation_diversity_")}
            self.first_diversity = {"of": of} | spreads
        if not args.min_diversity or self.first_diversity.get("of") != of:
            return None
        kept = {name: seen[name] / first for name, first in self.first_diversity.items()
                if name != "of" and first}
        for name, part in kept.items():
            if not part >= args.min_diversity:  # also where it is no number
                return (f"{name} is {part:.0%} of its start, under --min_diversity {args.min_diversity:g};"
                        " look at the pictures, then begin another run with a smaller scale, or export an"
                        " earlier step (--resume_from_checkpoint checkpoint-N --max_train_steps N)")

    def take_logs(self):
        """Means since the last call over samples and processes, and the updates skipped so far."""
        skipped = {f"skipped_{name}": count for name, count in self.skipped.items()}
        if not self.logs:
            return skipped
        means = torch.stack([torch.stack(values).float().mean() for values in self.logs.values()])
        means = dict(zip(self.logs, self.accelerator.reduce(means, reduction="mean").tolist()))
        self.logs = {}
        return means | skipped

    @contextlib.contextmanager
    def averaged_generator(self):
        """The generator, with EMA weights where there are any."""
        parameters = self.parameters["generator"].values()
        if self.ema is not None:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        yield self.accelerator.unwrap_model(self.models.generator)
        if self.ema is not None:
            self.ema.restore(parameters)

    # -------------------------------------------------------------------------------------------- state

    def tensors(self):
        """All tensors of a sharded run's state by name, for torch.distributed.checkpoint."""
        held = {}
        for name, parameters in self.parameters.items():
            for key, parameter in parameters.items():
                state = self.optimizers[name].state[parameter]
                held |= {f"{name}/{key}": parameter.detach()}
                held |= {f"{name}/{key}/{part}": value for part, value in state.items()}
        if self.ema is not None:
            held |= {f"ema/{key}": value for key, value in zip(self.parameters["generator"],
                                                               self.ema.shadow_params)}
        return held

    def save(self):
        """Write a checkpoint aside, flush it, rename it, then drop the oldest; called by every process."""
        output_dir, main = Path(self.args.output_dir), self.accelerator.is_main_process
        final, aside = output_dir / f"checkpoint-{self.step}", output_dir / f"unfinished-{self.step}"
        if main:
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        if self.args.sharding:  # as safetensors, for DCP's own format has a pickle
            tensors = self.tensors()
            files = {name: 1 + index % 32 for index, name in enumerate(tensors)}  # one at a time in memory
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(aside, files, save_distributed=True))
        if main:
            self.save_rest(aside)
            for path in [*aside.iterdir(), aside]:
                flush(path)
            limit, old = self.args.checkpoints_total_limit, []
            if final.exists():  # of the same steps, taken again from an earlier checkpoint
                old = [set_aside(final)]
            os.replace(aside, final)
            flush(output_dir)
            for folder in list_checkpoints(output_dir)[:-limit] if limit else []:
                old.append(set_aside(folder))
            for folder in old:
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()

    def save_rest(self, folder):
        """What one process writes: the position, and all that is not sharded."""
        parts = {kind: {name: part.state_dict() for name, part in getattr(self, kind).items()}
                 for kind in ("optimizers", "schedules")}
        parts |= {"ema": self.ema.state_dict()} if self.ema else {}
        if self.args.sharding:
            for part in parts["optimizers"].values():
                part["state"] = {}
            parts.get("ema", {}).pop("shadow_params", None)
        else:
            for name, parameters in self.parameters.items():
                save_file({key: value.detach().contiguous() for key, value in parameters.items()},
                          folder / f"{name}.safetensors", {"of": f"{name}, step {self.step}"})
        torch.save(parts, folder / "trainer.pt")
        state = {name: getattr(self, name) for name in POSITION} | {
                 "total_batch_size": total_batch_size(self.args), "args": saved_args(self.args),
                 "prompts": self.prompts.digest,
                 "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())}}
        (folder / "state.json").write_text(json.dumps(state, indent=2))

    def load(self, folder):
        """Continue from a checkpoint; nothing but the weights, `trainer.pt` and the position is state."""
        folder = Path(folder)
        for name, value in json.loads((folder / "state.json").read_text()).items():
            if name in POSITION:
                setattr(self, name, value)

        def restore(path):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name in self.parameters:
                self.optimizers[name].load_state_dict(saved["optimizers"][name])
                self.schedules[name].load_state_dict(saved["schedules"][name])
            if self.ema is not None:
                self.ema.load_state_dict(saved["ema"])

        def read_weights(path):
            name, expected = path.stem, self.parameters[path.stem]
            weights = load_file(path)
            with safe_open(path, "pt") as file:
                own = (file.metadata() or {}).get("of") == f"{name}, step {self.step}"
            if not own or misfits(weights, expected):
                raise ValueError(f"it is not of the {name} at step {self.step}")
            return weights

        read_part(folder / "trainer.pt", restore)
        if self.ema is not None:
            self.ema.to("cpu" if self.args.offload_ema else self.accelerator.device)
        if self.args.sharding:
            for name, parameters in self.parameters.items():
                for parameter in parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
                self.optimizers[name].step()  # makes the moments that are read into
                self.optimizers[name].zero_grad(set_to_none=True)
            read_part(folder, lambda path: dcp.load(
                self.tensors(), storage_reader=HuggingFaceStorageReader(str(path))))
        else:
            for name, parameters in self.parameters.items():
                weights = read_part(folder / f"{name}.safetensors", read_weights)
                for key, parameter in parameters.items():
                    parameter.data.copy_(weights[key])


def set_aside(folder):
    """Rename a checkpoint that is to go, for half deleted it would look whole."""
    return folder.rename(folder.with_name(f"unfinished-{folder.name}"))


def flush(path):
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ------------------------------------------------------------------------------------------------ output


def look_at(trainer, generator, indices, prompts):
    """Validation pictures of their indices' noise: {name: (batch, ...)}, with rewards and distance."""
    args, models, accelerator = trainer.args, trainer.models, trainer.accelerator
    z, noise, timesteps = draw_batch(args, "validation", 0, indices, trainer.latent_shape, accelerator.device)
    conditioning, assistant, reference = condition(models, timesteps, prompts, args, accelerator)
    a, s = models.diffusion.coefficients(timesteps)
    with accelerator.autocast():
        x0 = generate(generator, models.diffusion, z, args.generator_timestep, conditioning)
    x_t = a * x0 + s * noise
    with accelerator.autocast():
        d_assistant, (d_reference, d_null) = assistant(x_t), reference(x_t)
    if args.cfg_mode == "in":
        d_reference = guided_prediction(d_reference, d_null, args.cfg_scale)
    with models.using(models.pipeline.vae):
        values = {"images": decode(models.pipeline.vae, x0).clamp(0, 1)}
    if models.rewards:
        with models.using(models.scorers), torch.enable_grad():  # for a reward that needs it inside
            scores = {name: score(name, reward, values["images"], prompts).detach().float()
                      for name, (_, reward) in models.rewards.items()}
        values["reward"] = weighted_mean(scores, models.rewards)
        values |= {f"reward_{name}": value for name, value in scores.items()}
    values["distance"] = score_distance(x0, d_assistant, d_reference, a, s, args.distance,
                                        args.pseudo_huber_c, args.weighting)
    return values


@torch.no_grad()
def validate(trainer):
    """Draw the validation prompts from fixed noise, each process its share; returns what the pictures tell.

    The main process writes them as one grid, a row for each prompt, and beside it each picture's reward and
    distance to the reference, the integrand of (3.2) at a fixed time and noise, as the assistant sees it.
    """
    args, accelerator = trainer.args, trainer.accelerator
    prompts = [prompt for prompt in args.validation_prompts for _ in range(args.num_validation_images)]
    gathered = {}
    with trainer.averaged_generator() as generator:
        for start in range(0, len(prompts), args.train_batch_size * accelerator.num_processes):
            first = start + accelerator.process_index * args.train_batch_size
            indices = [index % len(prompts) for index in range(first, first + args.train_batch_size)]
            values = look_at(trainer, generator, indices, [prompts[index] for index in indices])
            for name, value in values.items():
                gathered.setdefault(name, []).append(accelerator.gather(value).cpu())
    seen = {name: torch.cat(parts)[:len(prompts)] for name, parts in gathered.items()}
    images = seen.pop("images")
    logs = {f"validation_{name}": values.mean().item() for name, values in seen.items()}
    spreads = diversity(images.unflatten(0, (-1, args.num_validation_images)))
    logs |= {f"validation_diversity_{name}": value for name, value in spreads.items()}
    if accelerator.is_main_process:
        write_validation(trainer, images, {"prompt": prompts, **{k: v.tolist() for k, v in seen.items()}})
    return logs


def write_validation(trainer, images, record):
    """The pictures as a grid, their record {name: a value for each} beside it, and the trackers' picture."""
    args, folder = trainer.args, Path(trainer.args.output_dir) / "validation"
    folder.mkdir(exist_ok=True)
    columns = args.num_validation_images
    columns = columns if columns > 1 else math.ceil(len(images)**0.5)
    save_image(images, folder / f"step-{trainer.step:06d}.png", nrow=columns, padding=0)
    rows = [dict(zip(record, values)) for values in zip(*record.values())]
    (folder / f"step-{trainer.step:06d}.json").write_text(json.dumps(rows, indent=2))
    for tracker in trainer.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": images.permute(0, 2, 3, 1).numpy()}, trainer.step, **layout)


def usage(location, base, args, kind):
    """The exact lines that draw a picture with what was exported; `kind` is the pipeline's class name."""
    prompt = (args.validation_prompts or ["a photo of an astronaut riding a horse"])[0]
    imports, lines = f"from diffusers import {kind}", f"pipeline = {kind}.from_pretrained({location!r})"
    if args.generator_lora_rank and not args.merge_lora:
        imports = f"import torch\nfrom diffusers import LCMScheduler, {kind}"
        lines = f"""pipeline = {kind}.from_pretrained({base!r}, torch_dtype=torch.float32)
pipeline.scheduler = LCMScheduler.from_pretrained({location!r}, subfolder="scheduler")
pipeline.load_lora_weights({location!r}, weight_name="{LORA_FILE}")"""
    return f"""{imports}

{lines}
image = pipeline({prompt!r}, height={args.resolution}, width={args.resolution},
                 num_inference_steps=1, timesteps=[{args.generator_timestep}], guidance_scale=0).images[0]
image.save("picture.png")"""


def shown(name):
    """A model's name as it may be published: of a path on this machine the last part."""
    return Path(name).name if name[0] in "/.~" or Path(name).exists() else name


def save_curves(path, metrics_file, width=380, height=200):
    """What metrics.jsonl has of a run against its steps, two panels a row; returns whether there is any."""
    records = [json.loads(line) for line in Path(metrics_file).read_text().splitlines()]
    panels = {"training reward": "reward", "validation: reward": "validation_reward",
              "assistant loss": "loss_assistant",
              "gradient at x0: divergence": "grad_divergence", "gradient at x0: reward": "grad_reward",
              "validation: distance to the reference": "validation_distance",
              "validation: diversity over noise": "validation_diversity_over_noise",
              "validation: diversity over prompts": "validation_diversity_over_prompts"}
    drawn = {title: [(record["step"], record[name]) for record in records if name in record]
             for title, name in panels.items()}
    drawn = {title: points for title, points in drawn.items() if len(points) > 1}
    sheet = Image.new("RGB", (2 * width, math.ceil(len(drawn) / 2) * height or 1), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (title, points) in enumerate(drawn.items()):
        low, high = min(value for _, value in points), max(value for _, value in points)
        low = low if "reward" in title and "gradient" not in title else 0
        left, top = index % 2 * width + 62, index // 2 * height + 26
        right, bottom = left + width - 82, top + height - 56
        pen.rectangle((left, top, right, bottom), outline="lightgray")
        pen.text((left, top - 16), title, fill="black")
        pen.text((left - 56, top - 4), f"{high:.3g}", fill="gray")
        pen.text((left - 56, bottom - 8), f"{low:.3g}", fill="gray")
        pen.text((left, bottom + 6), "0", fill="gray")
        pen.text((right, bottom + 6), f"step {points[-1][0]}", fill="gray", anchor="ra")
        scaled = [(left + (right - left) * step / points[-1][0],
                   bottom - (bottom - top) * (value - low) / ((high - low) or 1)) for step, value in points]
        pen.line(scaled, fill="royalblue", width=2)
    sheet.save(path)
    return bool(drawn)


def drawn_prompts(picture):
    """The prompts of a validation picture, by the record beside it."""
    return list(dict.fromkeys(row["prompt"] for row in json.loads(picture.with_suffix(".json").read_text())))


def save_pictures(trainer):
    """The card's, in `pictures/`: curves, and validation at the start and at the end; returns their names."""
    output_dir = Path(trainer.args.output_dir)
    folder = output_dir / "pictures"
    folder.mkdir(exist_ok=True)
    saved = ["curves"] if save_curves(folder / "curves.png", output_dir / "metrics.jsonl") else []
    for name, step in {"before": 0, "after": trainer.step}.items():
        source = output_dir / "validation" / f"step-{step:06d}.png"
        if source.exists() and drawn_prompts(source) == trainer.args.validation_prompts:
            picture = Image.open(source)
            picture.thumbnail((1536, 1536))
            picture.save(folder / f"{name}.png")
            saved.append(name)
    return saved


def licence_of(name):
    """The licence in a model's card, in its folder or on the hub (owner/name of owner/name/file), or None."""
    card = Path(name) / "README.md" if Path(name).exists() else "/".join(name.split("/")[:2])
    with contextlib.suppress(Exception):  # no card, or no hub to ask
        return ModelCard.load(card).data.license


def card_text(trainer, name, pictures, licences):
    """The card without its front matter; `licences`: (model that it derives from, its licence or None)."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    last_reward = [line["reward"] for line in lines if "reward" in line][-1:]
    base, reference = (shown(value) for value in (
        args.pretrained_model_name_or_path, args.reference_unet or args.pretrained_model_name_or_path))
    start = reference if args.generator_init == "reference" else shown(args.generator_init)
    rewards = []
    for reward, scale in args.reward.items():
        place = reward.partition(":")[2] if short_name(reward) != reward else ""
        place = args.reward_model_name_or_path if reward == "pickscore" else place
        place = f"`{shown(place)}`" if place else "" if reward in REWARDS else "the author's own code"
        rewards.append(f"{scale:g} x {short_name(reward)}" + (f" ({place})" if place else ""))
    count = len(getattr(trainer.prompts, "prompts", ()))
    prompts = f"{count:,} prompts" if count else "the prompts, streamed,"
    defaults = vars(build_parser().parse_args([]))
    told = {"reward", "output_dir", "logging_dir", "hub_model_id", "validation_prompts", *RECIPE_FLAGS[:4]}
    flags = [f"--{flag}" + ("" if value is True else f" {shown(str(value))}")
             for flag, value in saved_args(args).items()
             if flag not in told and value != defaults[flag] and value not in (None, False)]
    rank, skipped = args.generator_lora_rank, trainer.skipped
    parts = [f"""# {name}

A one-step text-to-image generator{f", a LoRA of rank {rank}," if rank else ""}
{"post-trained on the reward below" if rewards else "distilled"} with
[Diff-Instruct*](https://arxiv.org/abs/2410.20898), recipe `{args.recipe}`.
It started as `{start}`; the reference is `{reference}`. No pictures were used: it was trained on
{prompts} of `{shown(args.dataset_name or args.prompts_file)}`.
Reward: {" + ".join(rewards) or "none"}.

```python
{usage(name, base, args, type(trainer.models.pipeline).__name__)}
```"""]
    if {"before", "after"} <= set(pictures):
        parts.append(f"""## Before and after

The same noise before and after, {args.num_validation_images} of each prompt, none left out.

| before | after |
| --- | --- |
| ![before](pictures/before.png) | ![after](pictures/after.png) |

""" + "\n".join(f"{number}. `{' '.join(prompt.replace('`', ' ').split())}`"
                 for number, prompt in enumerate(args.validation_prompts, 1)))
    parts.append(f"""## Training

| setting | value |
| --- | --- |
| divergence, distance, weighting | {args.divergence}, {args.distance}, {args.weighting} |
| score gradient | {args.score_gradient} |
| guidance scale and mode | {args.cfg_scale:g}, {args.cfg_mode} |
| generator updates, batch size | {trainer.step}, {total_batch_size(args)} |
| LoRA ranks (0: all weights), generator, assistant | {rank}, {args.assistant_lora_rank} |
| learning rates, generator, assistant | {args.learning_rate:g}, {args.assistant_learning_rate:g} |
| last logged training reward | {f"{last_reward[0]:.4f}" if last_reward else "none"} |
| updates skipped, not finite, generator, assistant | {skipped["generator"]}, {skipped["assistant"]} |

Other flags that are not the defaults: `{" ".join(flags)}`""")
    if "curves" in pictures:
        parts.append("![curves of the training](pictures/curves.png)")
    sources = ", ".join(f"`{model}` ({licence or 'see there'})" for model, licence in licences)
    parts.append(f"""## Limits

It draws in one step at timestep {args.generator_timestep}, without guidance, at {args.resolution} pixels;
nothing else was trained. A higher reward is not always a better picture: followed for too long it narrows
what is drawn and overdoes what its judges like. What base and reward models have learned of people and
places, stereotypes included, is in it too. There is no safety checker.

## Licence

That of what it derives from: {sources}.

## Citation

```bibtex
@article{{luo2024david,
  title   = {{David and Goliath: Small One-step Model Beats Large Diffusion with Score Post-training}},
  author  = {{Luo, Weijian and Zhang, Colin and Zhang, Debing and Geng, Zhengyang}},
  journal = {{arXiv preprint arXiv:2410.20898}},
  year    = {{2024}}
}}
```""")
    return "\n\n".join(parts) + "\n"


def write_card(trainer, name):
    """README.md of the result `name`, which is how its lines load it: a folder's name or the hub's."""
    args, base = trainer.args, trainer.args.pretrained_model_name_or_path
    models = dict.fromkeys([base, args.reference_unet, args.generator_init])
    licences = [(shown(model), licence_of(model)) for model in models if model not in (None, "reference")]
    licence, *others = {licence for _, licence in licences}
    data = ModelCardData(
        base_model=base if not Path(base).exists() else None, library_name="diffusers",
        license="other" if others or not licence else licence,
        license_name="of-its-sources" if others or not licence else None, pipeline_tag="text-to-image",
        generator_timestep=args.generator_timestep, resolution=args.resolution)
    text = card_text(trainer, name, save_pictures(trainer), licences)
    tags = ["diffusers", "text-to-image", "one-step", "diff-instruct-star", "diffusers-training",
            *(["lora"] if args.generator_lora_rank else [])]
    # Not load_or_create_model_card: it asks the hub for a card first, and its template has gaps to fill in.
    card = populate_model_card(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"), tags=tags)
    card.save(Path(args.output_dir) / "README.md")


def find_repository(args):
    """The run's repository on the hub, made where it is not there yet; ends the run where it cannot be."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # the hub's client has its own
        fail(f"--hub_model_id: no repository {name}: {first_line(error)}; log in with `hf auth login`, or"
             " give another name")


def publish(folder, repository, token):
    """Upload a finished run: pipeline or LoRA, card, pictures; what the hub has already is not sent again."""
    parts = ("assistant_lora", "pictures", "scheduler", "text_encoder", "text_encoder_2", "tokenizer",
             "tokenizer_2", "unet", "vae")
    patterns = ["README.md", "model_index.json", "pytorch_lora_weights.safetensors"]
    upload_folder(repo_id=repository, folder_path=folder, token=token,
                  commit_message="Diff-Instruct* training",
                  allow_patterns=patterns + [f"{part}/*" for part in parts])


def export(trainer):
    """The finished pipeline or LoRA in --output_dir, safetensors, with a card; and on the hub where asked.

    Called by every process; the main one writes.
    """
    args, pipeline, output_dir = trainer.args, trainer.models.pipeline, Path(trainer.args.output_dir)
    accelerator, scheduler = trainer.accelerator, one_step_scheduler(pipeline.scheduler)
    with trainer.averaged_generator() as generator:
        if args.sharding:
            generator = gathered(generator, accelerator)
        if not accelerator.is_main_process:
            return
        assistant = accelerator.unwrap_model(trainer.models.assistant)
        for network, folder in ((assistant, output_dir / "assistant_lora"),
                                (generator, output_dir)):
            if isinstance(network, Adapted):
                weights = get_peft_model_state_dict(network.base, adapter_name=network.adapter)
                weights = {key: value.contiguous() for key, value in weights.items()}
                metadata = network.base.peft_config[network.adapter].to_dict()
                pipeline.save_lora_weights(folder, unet_lora_layers=weights,
                                           unet_lora_adapter_metadata=metadata)
        if isinstance(generator, Adapted) and not args.merge_lora:
            scheduler.save_pretrained(output_dir / "scheduler")
        else:
            unet = merged(generator) if isinstance(generator, Adapted) else generator
            finished = load_pipeline(args, torch.float32, unet)  # other parts as before any cast
            finished.scheduler = scheduler
            finished.save_pretrained(output_dir)
    name = args.hub_model_id or output_dir.resolve().name
    write_card(trainer, name)
    if args.push_to_hub:
        try:
            publish(output_dir, name, args.hub_token)
        except Exception as error:  # the hub's client has its own
            fail(f"--push_to_hub: {first_line(error)}; the result is whole in {output_dir}, and the same"
                 " command with --resume_from_checkpoint latest goes on with the upload")


# ------------------------------------------------------------------------------------------------ memory


class Blank:
    """Stands for a text encoder's tokenizer and for a CLIP-type reward's processor in a dry run."""

    def __init__(self, name_or_path, subfolder="", revision=None):
        where = {"subfolder": subfolder.replace("tokenizer", "text_encoder"), "revision": revision}
        config = AutoencoderKL.load_config(name_or_path, **where)  # as a dict, whatever its model
        self.model_max_length = config.get("text_config", config).get("max_position_embeddings", 77)
        side = config.get("vision_config", {}).get("image_size", 224)
        self.image_processor = SimpleNamespace(size={"shortest_edge": side}, crop_size={"height": side},
                                               image_mean=[0.5] * 3, image_std=[0.5] * 3)
        self.tokenizer = self

    def tokenize(self, prompt):
        return []

    def __call__(self, prompts, padding=None, **_):
        length = self.model_max_length if padding == "max_length" else 1
        mask = SimpleNamespace(to=lambda device: None)  # one on the meta device cannot be looked at
        return SimpleNamespace(input_ids=torch.zeros(len(prompts), length).long(), attention_mask=mask)


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages alive, `now` and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, WeakIdKeyDictionary()

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
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
        """What `on_device` does with --offload."""
        self.add(size_of(module.parameters()))
        yield
        self.add(-size_of(module.parameters()))


def meta_accelerator(args):
    """An accelerator whose device is the one of tensors without data; autocast is the CPU's, see below."""
    accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision)
    accelerator.state.device = torch.device("meta")
    accelerator.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16,
                                             enabled=accelerator.mixed_precision == "bf16")
    return accelerator


def device_kernels():
    """A context in which tensors without data are treated as on a GPU: autocast, and attention's memory.

    Autocast is that of `torch.autocast("cpu", ...)`, which checkpointing restores. Its cache of weights in
    half precision is left out: without accumulated batches it is gone before the gradients, twice as large.
    """
    def casting(function, dtype):
        def run(*inputs, **more):
            if torch.is_autocast_enabled("cpu"):
                inputs = [value.to(dtype) if isinstance(value, torch.Tensor) else value for value in inputs]
            return function(*inputs, **more)
        return run

    def attention(query, key, value, *_, **__):
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]

    half = {name: casting(getattr(F, name), torch.bfloat16) for name in ("linear", "conv2d")}
    single = {name: casting(getattr(F, name), torch.float32) for name in ("group_norm", "layer_norm")}
    return mock.patch.multiple(F, scaled_dot_product_attention=attention, **half, **single)


def size_of(parameters):
    return sum(parameter.nbytes for parameter in parameters)


def dry_run(args):
    """Print what the networks cost and the estimated peak of one GPU; returns the latter in bytes.

    One whole iteration runs on the meta device, whose tensors have sizes and no data; every storage is
    counted. Not counted: the CUDA context (about 0.5 GB), cuDNN's workspaces, fragmentation, rewards other
    than `pickscore`, DDP's buckets. With --sharding gradients count whole, as they are while batches are
    accumulated.
    """
    diffusion = check_models(args)
    offload, offload_ema, sharding = args.offload, args.offload_ema, args.sharding
    args.offload, args.offload_ema, args.sharding, args.assistant_updates = False, False, None, 1
    args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, 2)  # the second finds gradients
    accelerator = meta_accelerator(args)
    with PeakMemory() as memory, device_kernels():
        with accelerator.device:
            models = load_models(args, diffusion, accelerator)
        trainer = Trainer(args, models, Prompts(["a prompt"], args.seed), accelerator)
        changed = {name: list(values.values()) for name, values in trainer.parameters.items()}
        counted = {id(parameter) for values in changed.values() for parameter in values}
        lines = [f"{'':13}{'parameters':>12}" + "".join(f"{name:>13}" for name in (
            "weights", "gradients", "optimizer", "EMA"))]
        divided = 0
        for name in ("text_encoders", "scorers", "reference", "assistant", "generator"):
            own = changed.get(name, [])
            held = own + [p for p in getattr(models, name).parameters() if id(p) not in counted]
            counted |= {id(parameter) for parameter in held}
            gradients, average = size_of(own), size_of(own) * (name == "generator" and args.use_ema)
            optimizer = gradients // 2 if args.use_8bit_adam else gradients * 2
            if offload_ema:  # while it is updated it is where the gradients were
                memory.add(-average)
                average = 0
            memory.add(optimizer)
            if name not in ("text_encoders", "scorers"):
                divided += size_of(held) + optimizer + average
            lines.append(f"{name:13}{sum(p.numel() for p in held) / 1e6:>10,.1f} M" + "".join(
                f"{size / 2**30:>9.2f} GiB" for size in (size_of(held), gradients, optimizer, average)))
        if offload:
            resting = torch.nn.ModuleList([models.text_encoders, models.scorers, models.pipeline.vae])
            memory.add(-size_of(resting.parameters()))
            models.using = memory.using
        memory.peak = between = memory.now
        trainer.train_step()
    if accelerator.is_main_process:
        left_out = [short_name(name) for name in args.reward if name != "pickscore"]
        total = f"one GPU: {memory.peak / 2**30:.1f} GiB, between steps {between / 2**30:.1f}"
        if sharding:  # gathered are what is outside of blocks, one of them and the next, ahead of its use
            blocks = [size_of(block.parameters()) for block in repeated_blocks(models.generator)]
            rest = size_of(models.generator.parameters()) - sum(blocks)
            whole, parts = (memory.peak - divided + rest + 2 * max(blocks)) / 2**30, divided / 2**30
            total = f"one of N GPUs: {whole:.1f} + {parts:.1f} / N GiB, of 8: {whole + parts / 8:.1f}"
        lines.append(f"estimated peak of {total} GiB; batch {args.train_batch_size}, {args.resolution} pixels"
                     + (f"; not counted: {', '.join(left_out)}" if left_out else ""))
        print("\n".join(lines))
    return memory.peak


# ------------------------------------------------------------------------------------------------ main


def check_models(args):
    """All of the models' flags that can be told without loading them; returns the reference's `Diffusion`."""
    base, unets = args.pretrained_model_name_or_path, {}
    for flag in ("pretrained_model_name_or_path", "reference_unet", "generator_init"):
        value = getattr(args, flag)
        if value in (None, "reference") or flag == "generator_init" and args.dry_run:
            continue
        is_file = flag == "generator_init" and value.endswith(WEIGHTS_FILES)
        if not Path(value).exists() and (value[0] in "./~" or is_file == (value.count("/") < 2)):
            fail(f"--{flag} {value} is neither here nor a hub id, owner/name (/file for weights)")
        if is_file or (Path(value) / LORA_FILE).exists():
            continue
        try:
            unets[flag], _ = find_unet(value)
            kind = unets[flag].get("_class_name"), unets[flag].get("addition_embed_type")
        except Exception as error:  # no such file, or not what it should hold
            fail(f"--{flag} {value} has no UNet that can be read: {first_line(error)}")
        if kind != ("UNet2DConditionModel", ADDITION_EMBED_TYPE):
            fail(f"--{flag} {value} is no {FAMILY} UNet; the other families have scripts of their own")
    of_reference = unets["pretrained_model_name_or_path"]
    for flag, config in unets.items():
        for name in ("in_channels", "out_channels", "cross_attention_dim"):
            if config.get(name) != of_reference.get(name):
                fail(f"--{flag} {getattr(args, flag)} has {name} {config.get(name)}, and the reference"
                     f" {of_reference.get(name)}: it is another model's")
    own_vae = args.pretrained_vae_model_name_or_path
    for flag, value, kinds, where in [
            ("pretrained_model_name_or_path", None if own_vae else base, ["AutoencoderKL"],
             {"subfolder": "vae", "revision": args.revision}),
            ("pretrained_vae_model_name_or_path", own_vae, ["AutoencoderKL"], {}),
            ("reward_vae", args.reward_vae, ["AutoencoderKL", "AutoencoderTiny"], {}),
            ("reward_model_name_or_path", args.reward_model_name_or_path, ["clip"], {})]:
        if not value or kinds == ["clip"] and "pickscore" not in args.reward:
            continue
        try:
            config = AutoencoderKL.load_config(value, **where)  # as a dict, whatever its model
            kind = config.get("_class_name", config.get("model_type"))
        except Exception as error:
            fail(f"--{flag} {value} has no config.json that can be read: {first_line(error)}")
        if kind not in kinds:
            fail(f"--{flag} {value} holds no {' or '.join(kinds)} model")
        if where and args.resolution != of_reference.get("sample_size", 0) * 2**(
                len(config["block_out_channels"]) - 1):
            print(f"warning: --resolution {args.resolution} is not what the reference was made for,"
                  f" {of_reference.get('sample_size')} latents a side", file=sys.stderr)
        if kind != "clip" and not config["latent_channels"] == of_reference["in_channels"]:
            fail(f"--{flag} {value}: its VAE has latents of {config['latent_channels']} channels, and the"
                 f" reference of {of_reference['in_channels']}")
    for name in args.reward:
        find_reward(name, args)
    scheduler = load_part(DDPMScheduler, "scheduler", args)
    last = len(scheduler.alphas_cumprod) - 1
    for flag in ("generator_timestep", "max_timestep"):
        if not 0 <= getattr(args, flag) <= last:
            fail(f"--{flag} {getattr(args, flag)} is outside the reference's schedule, 0 to {last}")
    prediction_type = scheduler.config.prediction_type
    kind = DDPMScheduler.load_config(base, subfolder="scheduler", revision=args.revision)
    kind = kind.get("_class_name", "a scheduler")
    if prediction_type not in ("epsilon", "v_prediction", "sample") or "FlowMatch" in kind:
        fail(f"--pretrained_model_name_or_path {base}: its scheduler, {kind} ({prediction_type}), is not that"
             " of a diffusion model which predicts epsilon, v_prediction or sample")
    if prediction_type == "epsilon" and scheduler.alphas_cumprod[args.generator_timestep] < 1e-8:
        fail(f"--generator_timestep {args.generator_timestep} has zero terminal SNR in this schedule,"
             " where an epsilon model cannot be read; choose an earlier one")
    return Diffusion(scheduler.alphas_cumprod, prediction_type)


def check_inputs(args):
    """All that can be checked before a model loads: models' files, prompts."""
    diffusion = check_models(args)
    trackers = [tracker.value for tracker in LoggerType]
    if args.report_to not in ("none", *trackers):
        fail(f"--report_to {args.report_to} is none of none, {', '.join(trackers)}")
    if args.report_to not in ("none", "all", *map(str, get_available_trackers())):
        fail(f"--report_to {args.report_to} needs its package: pip install {args.report_to}")
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or Path(args.output_dir).resolve().name)
        except ValueError as error:
            fail(f"--hub_model_id: {first_line(error)}")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        fail("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes")
    prompts = load_prompts(args)
    if args.resume_from_checkpoint:
        held = json.loads((Path(args.resume_from_checkpoint) / "state.json").read_text())["prompts"]
        if held != prompts.digest:
            fail("--prompts_file or --dataset_name: the prompts have changed since"
                 f" {args.resume_from_checkpoint}")
    return prompts, diffusion


def load_models(args, diffusion, accelerator):
    """Every network on its device: trained weights in float32, frozen ones in bf16 under mixed precision."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        fail(f"--mixed_precision {accelerator.mixed_precision} is not supported: use bf16 or no")
    if accelerator.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        fail(f"accelerate's {accelerator.distributed_type.value} takes one model, here are three: choose"
             " MULTI_GPU in `accelerate config`, and to shard --sharding fsdp")
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    device = accelerator.device
    diffusion = Diffusion(diffusion.alphas_cumprod.to(device), diffusion.prediction_type)
    rewards = load_rewards(args, dtype)  # first: it is the smallest, and what most often cannot be loaded
    pipeline = load_pipeline(args, dtype)
    pipeline.set_progress_bar_config(disable=True)
    base = pipeline.unet
    generator = load_generator(args, pipeline, dtype)
    if args.assistant_lora_rank:
        own = base if args.shared_base else copy.deepcopy(base)
        assistant = adapt(own, "assistant", args.assistant_lora_rank)
    else:
        assistant = cast(copy.deepcopy(base), torch.float32).requires_grad_(True)
    reward_vae = load_reward_vae(args, pipeline, dtype).to(memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        for module in (base, generator, assistant, reward_vae):
            getattr(module, "base", module).enable_gradient_checkpointing()
    text_encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
    scorers = [part for part in (reward_vae, *(reward for _, reward in rewards.values()))
               if isinstance(part, torch.nn.Module)]
    models = Models(pipeline, Adapted(base) if args.shared_base else base, assistant, generator, reward_vae,
                    rewards, diffusion, torch.nn.ModuleList(text_encoders),
                    torch.nn.ModuleList(scorers), contextlib.nullcontext)
    if args.offload:
        models.using = functools.partial(on_device, device=device)
    resting = [] if args.offload else [models.text_encoders, models.scorers, pipeline.vae]
    for module in resting:
        module.to(device)
    if args.sharding:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
        mesh = torch.distributed.init_device_mesh(device.type, (accelerator.num_processes,))
        for network in (base, generator, assistant):  # to the device block by block
            shard(network, mesh, dtype if dtype == torch.bfloat16 else None)
        return models
    for network in (base, generator, assistant):
        network.to(device, memory_format=torch.channels_last)  # which FSDP does not take
    if accelerator.num_processes > 1 and not args.dry_run:
        models.assistant, models.generator = data_parallel(assistant), data_parallel(generator)
    return models


def step_of(line):
    """The step of a line of metrics.jsonl; infinity of one that is cut short."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return int(json.loads(line)["step"])
    return math.inf


@contextlib.contextmanager
def begin(trainer):
    """Take the run's folder, which no other run may write into; gives metrics.jsonl, cut back to the step."""
    args, step, output_dir = trainer.args, trainer.step, Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / "args.json", "a") as held:
        try:
            fcntl and fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--output_dir {output_dir}: another run is writing into it; wait for its end")
        resolved = ("recipe", "divergence", "reward", "cfg_scale", "cfg_mode", "score_gradient",
                    "distance", "pseudo_huber_c", "weighting", "assistant_updates")
        print("resolved: " + ", ".join(f"{name} {getattr(args, name)}" for name in resolved))
        place = f"going on from {args.resume_from_checkpoint}" if step else "starting anew"
        if not step and list_checkpoints(output_dir):
            fail(f"--output_dir {output_dir}: another run has been there since this one began")
        left = sorted(output_dir.glob("unfinished-*"))
        print("; ".join([place, *(f"{folder.name} was not finished and is passed over" for folder in left)]))
        for folder in left:
            shutil.rmtree(folder)
        (output_dir / "args.json").write_text(json.dumps(saved_args(args), indent=2) + "\n")
        path = output_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() and step else []
        kept = [line for line in lines if step_of(line) <= step]
        path.write_text("".join(line + "\n" for line in kept))
        with open(path, "a", buffering=1) as metrics_file:
            yield metrics_file


class EndedError(RuntimeError):
    """The run ends before its last step, saved."""


@contextlib.contextmanager
def noting_signals():
    """SIGTERM and Ctrl-C do not end the process but add their name to the list that is given."""
    asked, numbers = [], (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: asked.append(signal.Signals(number).name))
              for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def train(trainer, metrics_file):
    """The loop: steps and, as the flags have it, logs, validations, checkpoints.

    Raises:
        EndedError: by a signal, after too many skipped updates, or for lost diversity; the step is saved.
    """
    args, accelerator = trainer.args, trainer.accelerator
    started, logged = time.perf_counter(), trainer.step
    progress = tqdm(total=args.max_train_steps, initial=trainer.step, desc="training", mininterval=1,
                    disable=not accelerator.is_local_main_process)

    def log(values):
        accelerator.log(values, step=trainer.step)
        if metrics_file:
            metrics_file.write(json.dumps({"step": trainer.step, **values}) + "\n")

    def validation():
        """Where one is due, and why the run ends after it, or None."""
        due = trainer.step % args.validation_steps == 0 or trainer.step == args.max_train_steps
        if args.validation_prompts and due and trainer.validated != trainer.step:
            seen = validate(trainer)
            log(seen)
            return trainer.too_uniform(seen)

    with noting_signals() as asked, progress:
        validation()
        while trainer.step < args.max_train_steps:
            trainer.train_step()
            progress.update()
            step = trainer.step
            ending = trainer.reason_to_end(asked)
            saves = step % args.checkpointing_steps == 0 or step == args.max_train_steps or ending
            logs = step % args.logging_steps == 0 or saves
            if logs:
                metrics = trainer.take_logs()
                metrics["seconds_per_step"] = (time.perf_counter() - started) / (step - logged)
                metrics |= {f"lr_{name}": value.get_last_lr()[0] for name, value in trainer.schedules.items()}
                log(metrics)
                names = ("reward", "loss_assistant", "y_norm", "grad_divergence", "grad_reward")
                progress.set_postfix({name: f"{metrics[name]:.3g}" for name in names if name in metrics})
            ending = ending or validation()
            if saves or ending:
                trainer.save()
            if ending:
                raise EndedError(ending)
            if logs:
                started, logged = time.perf_counter(), step


def main(args):
    if args.dry_run:
        return dry_run(args)
    prompts, diffusion = check_inputs(args)
    trackers = None if args.report_to == "none" else args.report_to
    project = ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir))
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, log_with=trackers, project_config=project,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])
    except (ImportError, KeyError, ValueError) as error:
        fail(f"accelerate's configuration or its variables, ACCELERATE_*: {first_line(error)}")
    if os.environ.get("WORLD_SIZE", "1") != str(accelerator.num_processes):
        fail(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, of {accelerator.num_processes} processes: start them"
             " by accelerate launch")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = find_repository(args)
    set_seed(args.seed)  # a LoRA's first weights; all other randomness is drawn by `stream`
    models = load_models(args, diffusion, accelerator)
    trainer = Trainer(args, models, prompts, accelerator)
    if args.resume_from_checkpoint:
        trainer.load(args.resume_from_checkpoint)
    try:
        with begin(trainer) if accelerator.is_main_process else contextlib.nullcontext() as metrics_file:
            settings = {name: str(value) for name, value in saved_args(args).items()}
            accelerator.init_trackers("diff-instruct-star", settings)
            train(trainer, metrics_file)
            if trainer.step == trainer.skipped["generator"]:
                fail("no update of the generator was finite: lower --learning_rate or the reward's scale, or"
                     " look at the reward")
            accelerator.wait_for_everyone()
            export(trainer)
    except RewardError as error:
        fail(f"--reward: step {trainer.step + 1}: {error}")
    except EndedError as error:
        fail(f"{error}; step {trainer.step} is saved: go on with --resume_from_checkpoint latest")
    except (OSError, CheckpointException) as error:
        fail(f"--output_dir {args.output_dir}: step {trainer.step}: {first_line(error)}; earlier checkpoints"
             " are intact")
    if accelerator.is_main_process:
        print(f"the result is in {args.output_dir}; draw with it:\n\n"
              + usage(args.output_dir, args.pretrained_model_name_or_path, args,
                      type(models.pipeline).__name__))
    accelerator.end_training()


if __name__ == "__main__":
    main(ARGS)
