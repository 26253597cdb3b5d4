#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "diffusers>=0.42", "transformers>=5", "accelerate", "peft",
#                 "datasets"]
# ///
"""Diff-Instruct* (DI*): post-train a one-step Stable Diffusion 1.5 generator for human preference; no images.

The paper's best recipe (the default), then the distillation of a multi-step model into the start it needs:

    accelerate launch train_diff_instruct_star_sd15.py --prompts_file prompts.txt --output_dir di-star \\
        --generator_init path/to/one_step_unet --reward_model_name_or_path yuvalkirstain/PickScore_v1 \\
        --mixed_precision bf16 --gradient_checkpointing --use_ema

    accelerate launch train_diff_instruct_star_sd15.py --recipe sim --prompts_file prompts.txt

To resume, run the same command again with `--resume_from_checkpoint latest`.

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
import csv
import functools
import hashlib
import importlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path


# ------------------------------------------------------------------------------------------------ settings
# First, so that --help and a wrong flag answer before the libraries below are imported.

# The rows of the paper's Table 2: (divergence, reward scale, guidance scale, guidance mode).
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
}
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
WEIGHTS_FILES = (".safetensors", ".bin", ".pt", ".pth")
UNSAVED_FLAGS = ("hub_token", "resume_from_checkpoint")
# A run can be continued with other values of these; a change of any other flag would make it another run.
RESUMABLE_FLAGS = {"max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
                   "report_to", "validation_prompts", "validation_steps", "push_to_hub", "hub_model_id",
                   "logging_dir", "output_dir", "gradient_checkpointing", "allow_tf32"}


def fail(message):
    """End the run for bad input: one line on standard error, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}; see --help")


def positive(number):
    value = int(number)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive whole number")
    return value


def non_negative(number):
    value = float(number)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{number} is not a finite number of at least 0")
    return value


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="accelerate launch train_diff_instruct_star_sd15.py [flags]")

    add = parser.add_argument_group("models").add_argument
    add("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        help="reference pipeline, folder or hub id; epsilon, v or sample prediction. Default: %(default)s")
    add("--revision", help="revision of the reference pipeline")
    add("--variant", help="weights variant of the reference pipeline, such as fp16")
    add("--reference_unet", help="folder or hub id of another UNet for the reference (a DPO model, say)")
    add("--generator_init",
        help="start of the generator: a pipeline or UNet folder, a hub id, or one weights file"
             " (.safetensors, .bin; on the hub as owner/name/file). Default: the reference's weights,"
             " to be distilled with --recipe sim first")
    add("--generator_timestep", type=int, default=999,
        help="timestep T at which the generator reads its noise, z ~ N(0, I) unscaled (DMD2-SD1.5:"
             " 999). Default: %(default)s")
    add("--assistant_lora_rank", type=int, default=0,
        help="rank of a LoRA assistant on frozen reference weights; 0, the default, trains a full copy")

    add = parser.add_argument_group("method").add_argument
    add("--recipe", choices=RECIPES, metavar="NAME", default="di_star_in",
        help=f"a row of the paper's Table 2: {', '.join(RECIPES)}. Sets the next four flags; explicit"
             " flags win. Default: %(default)s")
    add("--divergence", choices=["score", "kl"], help="score: theorem 3.1; kl: Diff-Instruct(++)")
    add("--reward_scale", type=non_negative, help="alpha_rew of (3.1)")
    add("--cfg_scale", type=non_negative,
        help="alpha_cfg. With --cfg_mode in it is the sampling guidance scale as in diffusers: at"
             " most 1 means none")
    add("--cfg_mode", choices=["in", "out"],
        help="in: the reference is guided; out: the implicit reward (3.6) is added")
    add("--score_gradient", choices=["full", "detached"], default="full",
        help="full: the gradient passes through both score networks (theorem 3.1); detached: listing"
             " 1, with clean weighting a re-weighted KL. Default: full")
    add("--distance", choices=["pseudo_huber", "l2"], default="pseudo_huber",
        help="d of (3.2): (3.7) or the squared norm. Default: pseudo_huber")
    add("--pseudo_huber_c", type=non_negative, default=0.1,
        help="c of (3.7), in the units of --weighting. Default: 0.1 (ours, unpublished)")
    add("--weighting", choices=["clean", "score", "dmd"], default="clean",
        help="units and w(t): clean predictions with w = 1 (ours); scores with w = 1; dmd: clean,"
             " divided by the sample's mean |x0 - D_reference|. Default: clean")
    add("--assistant_updates", type=positive, default=1,
        help="assistant updates for each generator update, K_TA. Default: 1 (ours; DMD2 has 5)")
    add("--min_timestep", type=int, default=20, help="t is uniform from here. Default: 20 (SiD, DMD2)")
    add("--max_timestep", type=int, default=979, help="... to here, inclusive. Default: 979")

    add = parser.add_argument_group("reward").add_argument
    add("--reward_model_name_or_path", default=PICKSCORE,
        help="a CLIP-type preference model; the reward is the plain cosine of image and text."
             " Default: %(default)s")
    add("--reward_processor_name_or_path",
        help="its processor. Default: the reward model's own, and for PickScore"
             f" {PICKSCORE_PROCESSOR}")
    add("--reward", metavar="MODULE:FACTORY",
        help="your own reward instead: FACTORY() returns a function (or torch module) of images"
             " (batch, 3, H, W) in [0, 1] and a list of prompts to (batch,) scores, differentiable in"
             " the images")
    add("--reward_vae",
        help="another AutoencoderKL or AutoencoderTiny to decode with for the reward (TAESD:"
             " madebyollin/taesd)")

    add = parser.add_argument_group("prompts").add_argument
    add("--dataset_name", help="data set of captions, hub id or folder; images are never read")
    add("--dataset_config_name", help="its configuration")
    add("--dataset_split", default="train", help="its split. Default: train")
    add("--streaming", action="store_true", help="stream it; resuming replays the seeded stream")
    add("--prompts_file", help="instead: a .txt (one a line), .csv, .tsv, .jsonl or .parquet file")
    add("--caption_column", default="text", help="column of the prompts. Default: text")
    add("--max_train_samples", type=positive, help="use only the first N prompts")

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="diff-instruct-star-sd15", help="the run's folder. Default: %(default)s")
    add("--seed", type=int, default=0,
        help="noise, times and prompts are functions of it, the step and the sample's index. Default: 0")
    add("--resolution", type=positive, default=512, help="picture height and width. Default: 512")
    add("--train_batch_size", type=positive, default=4, help="samples per device. Default: 4 (ours)")
    add("--gradient_accumulation_steps", type=positive, default=1,
        help="batches for each optimiser step; the samples are those of one larger batch. Default: 1")
    add("--max_train_steps", type=positive, default=1000, help="generator updates. Default: 1000 (ours)")
    add("--learning_rate", type=non_negative, default=1e-6,
        help="of the generator. Default: 1e-6 (ours; SiD-LSG's)")
    add("--assistant_learning_rate", type=non_negative,
        help="of the assistant. Default: the generator's (ours)")
    add("--lr_scheduler", default="constant_with_warmup", choices=["linear", "cosine", "cosine_with_restarts",
        "polynomial", "constant", "constant_with_warmup"],
        help="of both. Default: %(default)s")
    add("--lr_warmup_steps", type=int, default=0, help="in generator updates. Default: 0")
    add("--use_8bit_adam", action="store_true", help="Adam of bitsandbytes")
    add("--adam_beta1", type=float, default=0.0, help="Default: 0 (listing 1)")
    add("--adam_beta2", type=float, default=0.999, help="Default: 0.999 (listing 1)")
    add("--adam_weight_decay", type=non_negative, default=0.0, help="Default: 0")
    add("--adam_epsilon", type=non_negative, default=1e-8, help="Default: 1e-8")
    add("--max_grad_norm", type=non_negative, default=10.0,
        help="clip both networks' gradients at this norm. Default: 10 (DMD2's)")
    add("--use_ema", action="store_true", help="average the generator; the average is what is exported")
    add("--ema_decay", type=float, default=0.999, help="Default: 0.999 (ours), less in the first steps")
    add("--mixed_precision", choices=["no", "bf16"],
        help="Default: accelerate's configuration; fp16 is refused, for the terms' inner gradients"
             " would underflow")
    add("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and later")

    add = parser.add_argument_group("saving and logging").add_argument
    add("--checkpointing_steps", type=positive, default=500, help="save the state this often. Default: 500")
    add("--checkpoints_total_limit", type=positive, help="keep this many, the newest. Default: all")
    add("--resume_from_checkpoint", help="a checkpoint folder, or latest")
    add("--validation_prompts", nargs="+", help="draw these from fixed noise as the run goes")
    add("--validation_steps", type=positive, default=100, help="how often. Default: 100")
    add("--logging_steps", type=positive, default=10, help="write metrics.jsonl this often. Default: 10")
    add("--logging_dir", default="logs", help="trackers' folder in --output_dir. Default: logs")
    add("--report_to", default="none",
        help="tensorboard, wandb, ... or all; metrics.jsonl is always written. Default: none")
    add("--push_to_hub", action="store_true", help="upload the finished pipeline")
    add("--hub_model_id", help="repository on the hub. Default: the name of --output_dir")
    add("--hub_token", help="never written to any file; better: log in once with `hf auth login`")
    return parser


def parse_args(argv=None):
    """Flags with the recipe resolved; ends the run (status 2) where they contradict each other."""
    args = build_parser().parse_args(argv)
    for name, value in zip(("divergence", "reward_scale", "cfg_scale", "cfg_mode"), RECIPES[args.recipe]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.assistant_learning_rate is None:
        args.assistant_learning_rate = args.learning_rate
    if args.reward_processor_name_or_path is None:
        own = args.reward_model_name_or_path
        args.reward_processor_name_or_path = PICKSCORE_PROCESSOR if own == PICKSCORE else own

    if bool(args.dataset_name) == bool(args.prompts_file):
        fail("give the prompts by exactly one of --dataset_name and --prompts_file")
    if args.prompts_file and not Path(args.prompts_file).is_file():
        fail(f"--prompts_file {args.prompts_file} is not a file")
    if args.streaming and args.prompts_file:
        fail("--streaming goes with --dataset_name; a --prompts_file is read whole")
    if args.resolution % 8:
        fail(f"--resolution {args.resolution} is not divisible by 8")
    if not 0 <= args.min_timestep <= args.max_timestep:
        fail(f"--min_timestep {args.min_timestep} must be from 0 to --max_timestep {args.max_timestep}")
    if args.assistant_lora_rank < 0:
        fail("--assistant_lora_rank must be 0 (a full copy) or a positive rank")
    if args.divergence == "score" and args.distance == "pseudo_huber" and args.pseudo_huber_c == 0:
        fail("--pseudo_huber_c must be above 0: at 0 the distance has no derivative where the models agree")
    if args.hub_token and not args.push_to_hub:
        fail("--hub_token does nothing without --push_to_hub")
    if args.max_grad_norm == 0:
        fail("--max_grad_norm must be above 0: at 0 nothing would be learned")
    check_output_dir(args)
    return args


def check_output_dir(args):
    """Refuse a folder that holds another run, and resolve --resume_from_checkpoint to a folder or None."""
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        fail(f"--output_dir {output_dir} is a file")
    if args.resume_from_checkpoint is None:
        signs = ("args.json", "metrics.jsonl", "model_index.json")
        if any((output_dir / name).exists() for name in signs) or list_checkpoints(output_dir):
            fail(f"--output_dir {output_dir} holds another run; choose another folder, or continue that run"
                 " with --resume_from_checkpoint latest")
        return
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(output_dir)
        args.resume_from_checkpoint = str(checkpoints[-1]) if checkpoints else None
        if not checkpoints:
            return  # a run that ended before its first checkpoint starts anew
    folder = Path(args.resume_from_checkpoint)
    if not (folder / "state.json").is_file():
        fail(f"--resume_from_checkpoint {folder} is no checkpoint of this script (it has no state.json)")
    state = json.loads((folder / "state.json").read_text())
    changed = {name for name, value in saved_args(args).items()
               if name not in RESUMABLE_FLAGS and value != state["args"].get(name)}
    if changed:
        name = sorted(changed)[0]
        fail(f"--{name} is {getattr(args, name)}, but {folder} was made with {state['args'].get(name)};"
             " resume with the same flags")
    if state["step"] >= args.max_train_steps:
        fail(f"--max_train_steps {args.max_train_steps}: {folder} is at step {state['step']} already;"
             " raise it to train on")


def list_checkpoints(output_dir):
    """Finished checkpoints of a run, oldest first."""
    folders = [path.parent for path in Path(output_dir).glob("checkpoint-*/state.json")]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def saved_args(args):
    return {name: value for name, value in vars(args).items() if name not in UNSAVED_FLAGS}


ARGS = parse_args() if __name__ == "__main__" else None

import pyarrow.parquet
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData, create_repo, hf_hub_download, upload_folder
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torchvision.utils import save_image
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor


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


def reward_gradient(x0, prompts, decode, reward, scale):
    """Gradient at x0 of - alpha_rew r(decode(x0), c), (3.1).

    Args:
        x0: (batch, C, H, W) scaled latents, detached. decode: latents -> images, [0, 1] before clamping.
        reward: images (batch, 3, H, W) in [0, 1], prompts -> (batch,).

    Returns:
        the gradient (batch, C, H, W), and per-sample logs: the reward and the share of clamped values, which
        have no gradient.
    """
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_()
        images = decode(leaf)
        scores = reward(images.clamp(0, 1), prompts)
        if scores.shape != (len(prompts),):
            raise ValueError(f"the reward returned shape {tuple(scores.shape)}, not ({len(prompts)},) for the"
                             f" batch of {len(prompts)} prompts")
        (gradient,) = torch.autograd.grad(-scale * scores.float().sum(), leaf)
    clamped = ((images < 0) | (images > 1)).detach().float().mean((1, 2, 3))
    return gradient.float(), {"reward": scores.detach().float(), "clamped": clamped}


# ------------------------------------------------------------------------------------------------ models


@dataclass
class Models:
    """Everything a step needs. `generator` and `assistant` may be wrapped by accelerate."""

    pipeline: StableDiffusionPipeline  # text encoder, tokenizer, VAE; its UNet is the reference
    reference: UNet2DConditionModel
    assistant: torch.nn.Module
    generator: torch.nn.Module
    reward_vae: torch.nn.Module
    reward: object
    diffusion: Diffusion


class ClipReward(torch.nn.Module):
    """A CLIP-type preference model: the plain cosine of picture and prompt (PickScore about 0.22).

    Preprocessing is the processor's own (shorter side resized with antialiased bicubic, centre crop, mean and
    standard deviation), made of differentiable operations.
    """

    def __init__(self, model_name_or_path, processor_name_or_path, dtype=torch.float32):
        super().__init__()
        self.model = cast(CLIPModel.from_pretrained(model_name_or_path), dtype)
        processor = CLIPProcessor.from_pretrained(processor_name_or_path)
        self.tokenizer = processor.tokenizer
        self.size = processor.image_processor.size["shortest_edge"]
        self.crop = processor.image_processor.crop_size["height"]
        self.register_buffer("mean", torch.tensor(processor.image_processor.image_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(processor.image_processor.image_std).view(3, 1, 1))

    def forward(self, images, prompts):
        """images (batch, 3, H, W) in [0, 1], prompts -> (batch,) cosines, differentiable in the images."""
        images = images.float()  # antialiased bicubic has no half-precision kernel on every device
        height, width = images.shape[-2:]
        scale = self.size / min(height, width)
        size = [round(height * scale), round(width * scale)]
        if size != [height, width]:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = [(length - self.crop) // 2 for length in size]
        images = images[..., top:top + self.crop, left:left + self.crop]
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt",
                                max_length=self.model.config.text_config.max_position_embeddings)
        output = self.model(input_ids=tokens.input_ids.to(images.device),
                            attention_mask=tokens.attention_mask.to(images.device),
                            pixel_values=((images - self.mean) / self.std).to(self.model.dtype))
        return (output.image_embeds.float() * output.text_embeds.float()).sum(-1)


def load_pipeline(args, dtype):
    """The reference pipeline, frozen; --reference_unet replaces its UNet."""
    kept = {"unet": load_unet(args.reference_unet, dtype)} if args.reference_unet else {}
    pipeline = StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant,
        safety_checker=None, requires_safety_checker=False, **kept)
    for module in (pipeline.text_encoder, pipeline.vae, pipeline.unet):
        cast(module, dtype).requires_grad_(False).eval()
    return pipeline


def encode_prompts(pipeline, prompts, resolution):
    """The UNet's conditioning for prompts, and for as many null prompts: two dicts of keyword arguments."""
    with torch.no_grad():
        prompt_embeds, null_embeds = pipeline.encode_prompt(
            list(prompts), pipeline.text_encoder.device, num_images_per_prompt=1,
            do_classifier_free_guidance=True)
    return {"encoder_hidden_states": prompt_embeds}, {"encoder_hidden_states": null_embeds}


def assemble_pipeline(models, generator):
    """The pipeline that stock diffusers runs in one step, float32; its UNet is `generator` (unwrapped)."""
    for module in (models.pipeline.vae, models.pipeline.text_encoder):
        cast(module, generator.dtype)
    return StableDiffusionPipeline(
        vae=models.pipeline.vae, text_encoder=models.pipeline.text_encoder,
        tokenizer=models.pipeline.tokenizer, unet=generator,
        scheduler=one_step_scheduler(models.pipeline.scheduler), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def one_step_scheduler(scheduler):
    """LCMScheduler at one timestep is the generator's formula; inherited clipping would cut the latents."""
    return LCMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False,
                                    rescale_betas_zero_snr=False)


def load_unet(name_or_path, dtype):
    """A UNet from a UNet folder, a pipeline folder or a hub id of either."""
    path = Path(name_or_path)
    folder = "unet" if (path / "model_index.json").exists() or (path / "unet").is_dir() else None
    if folder is None and not path.exists():  # on the hub: a pipeline if it has one
        with contextlib.suppress(OSError):
            return cast(UNet2DConditionModel.from_pretrained(name_or_path, subfolder="unet"), dtype)
    return cast(UNet2DConditionModel.from_pretrained(name_or_path, subfolder=folder), dtype)


def cast(module, dtype):
    """The module in `dtype`. The loaders' own flag for it has another name in every second release."""
    return torch.nn.Module.to(module, dtype=dtype)


def load_generator(name_or_path, reference, dtype=torch.float32):
    """The generator's start: a copy of `reference`, or what --generator_init names, which must fit it."""
    if name_or_path is None:
        generator = UNet2DConditionModel.from_config(reference.config)
        generator.load_state_dict(reference.state_dict())
        return cast(generator, dtype)
    if not name_or_path.endswith(WEIGHTS_FILES):
        generator = load_unet(name_or_path, dtype)
        state_dict = generator.state_dict()
    else:
        path = Path(name_or_path)
        if not path.exists():
            owner, name, file = name_or_path.split("/", 2)
            path = Path(hf_hub_download(f"{owner}/{name}", file))
        safe = path.suffix == ".safetensors"
        try:
            state_dict = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # each format has its own
            fail(f"--generator_init {name_or_path} is no readable weights file: {str(error).splitlines()[0]}")
        generator = cast(UNet2DConditionModel.from_config(reference.config), dtype)
    misfits = list_misfits(state_dict, reference.state_dict())
    if misfits:
        fail(f"--generator_init {name_or_path} does not fit the reference's UNet: {'; '.join(misfits)}")
    generator.load_state_dict(state_dict)
    return generator


def list_misfits(state_dict, expected, shown=3):
    """What keeps a state dict from loading strictly, in words: a few names of each kind."""
    kinds = {"missing": [name for name in expected if name not in state_dict],
             "unexpected": [name for name in state_dict if name not in expected],
             "of another shape": [name for name in expected if name in state_dict
                                  and state_dict[name].shape != expected[name].shape]}
    return [f"{len(names)} {kind} ({', '.join(names[:shown])}{', ...' if len(names) > shown else ''})"
            for kind, names in kinds.items() if names]


def load_reward(args, dtype):
    """The reward of the flags, frozen, and None where its scale is 0."""
    if args.reward_scale == 0:
        return None
    if args.reward:
        reward = import_factory(args.reward)()
    else:
        reward = ClipReward(args.reward_model_name_or_path, args.reward_processor_name_or_path, dtype)
    if isinstance(reward, torch.nn.Module):
        reward.requires_grad_(False).eval()
    return reward


def load_reward_vae(args, pipeline, dtype):
    if not args.reward_vae:
        return pipeline.vae
    config = AutoencoderKL.load_config(args.reward_vae)
    kind = AutoencoderTiny if config["_class_name"] == "AutoencoderTiny" else AutoencoderKL
    return cast(kind.from_pretrained(args.reward_vae), dtype).requires_grad_(False).eval()


def import_factory(name):
    """`module:factory`, looked up beside the working directory first; ends the run where it is not there."""
    module, _, factory = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as error:
        fail(f"--reward {name}: {error}; give module:factory with the module importable from here")


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
    path = Path(path)
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            table = pyarrow.parquet.read_table(path)
            rows = table.select([caption_column]).to_pylist() if caption_column in table.column_names else []
            return take_column(rows, table.column_names, caption_column, path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == ".txt":
                prompts = [line.strip() for line in file]
                return [prompt for prompt in prompts if prompt]
            if kind == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
                rows = [row if isinstance(row, dict) else {caption_column: row} for row in rows]
                names = list(dict.fromkeys(name for row in rows for name in row))
            elif kind in (".csv", ".tsv"):
                style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
                reader = csv.DictReader(file, **style)
                rows, names = list(reader), reader.fieldnames or []
            else:
                fail(f"--prompts_file {path}: '{kind}' is none of .txt, .csv, .tsv, .jsonl, .parquet")
    except (OSError, ValueError, csv.Error) as error:  # ValueError: of UTF-8, of JSON, of Arrow
        fail(f"--prompts_file {path} cannot be read as {kind}: {str(error).splitlines()[0]}")
    return take_column(rows, names, caption_column, path)


def take_column(rows, names, caption_column, source):
    if caption_column not in names:
        fail(f"--caption_column {caption_column} is not in {source}; it has {', '.join(names) or 'none'}")
    values = [str(row[caption_column]).strip() for row in rows if row.get(caption_column) is not None]
    return [value for value in values if value]


class Prompts:
    """The run's prompts by position: epochs of a seeded order, the same for any processes and batch size."""

    def __init__(self, prompts, seed):
        self.prompts, self.seed, self.epoch, self.order = prompts, seed, None, None

    def at(self, position):
        epoch, row = divmod(position, len(self.prompts))
        if epoch != self.epoch:
            self.order = torch.randperm(len(self.prompts), generator=stream(self.seed, "prompts", epoch, 0))
            self.epoch = epoch
        return self.prompts[self.order[row]]


class StreamedPrompts:
    """Prompts of a streamed data set by position; positions only grow, and resuming replays up to them."""

    def __init__(self, dataset, caption_column, seed, buffer_size=10_000):
        self.dataset = dataset.select_columns(caption_column).shuffle(seed=seed, buffer_size=buffer_size)
        self.column, self.position, self.rows, self.latest = caption_column, 0, self.replay(), None

    def replay(self):
        epoch = 0
        while True:
            self.dataset.set_epoch(epoch)
            for row in self.dataset:
                text = str(row[self.column]).strip() if row[self.column] is not None else ""
                if text:
                    yield text
            epoch += 1

    def at(self, position):
        while self.position <= position:
            self.latest = next(self.rows)
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
        except (OSError, ValueError, DatasetGenerationError) as error:
            fail(f"{source} cannot be loaded: {str(error).splitlines()[0]}")
        names = dataset.column_names or list(next(iter(dataset)))
        if args.caption_column not in names:
            take_column([], names, args.caption_column, source)
        if args.streaming:
            dataset = dataset.take(args.max_train_samples) if args.max_train_samples else dataset
            if not any(str(row[args.caption_column] or "").strip() for row in dataset.take(100)):
                fail(f"{source} has no prompts in column {args.caption_column}")
            return StreamedPrompts(dataset, args.caption_column, args.seed)
        prompts = take_column(dataset.select_columns(args.caption_column), names, args.caption_column, source)
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
    """A network's clean prediction of x_t (batch, C, H, W) at timesteps (batch,), float32."""
    a, s = diffusion.coefficients(timesteps)
    return diffusion.clean_prediction(unet(x_t, timesteps, **conditioning).sample.float(), x_t, a, s)


def generate(generator, diffusion, z, timestep, conditioning):
    """One step, x0 = g(z, c): the generator's clean prediction of z ~ N(0, I) at its fixed timestep."""
    return predict(generator, diffusion, z, z.new_full((len(z),), timestep, dtype=torch.long), conditioning)


def assistant_step(models, batch, args, accelerator):
    """One backward of the assistant on the generator's own samples (Algorithm 1, psi)."""
    z, noise, timesteps, prompts = batch
    conditioning, _ = encode_prompts(models.pipeline, prompts, args.resolution)
    a, s = models.diffusion.coefficients(timesteps)
    with accelerator.autocast():
        with torch.no_grad():
            generator = accelerator.unwrap_model(models.generator)
            x0 = generate(generator, models.diffusion, z, args.generator_timestep, conditioning)
        output = models.assistant(a * x0 + s * noise, timesteps, **conditioning).sample.float()
    loss = assistant_loss(output, x0, noise, a, s, models.diffusion)
    accelerator.backward(loss.mean())
    return {"loss_assistant": loss.detach()}


def generator_step(models, batch, args, accelerator):
    """One backward of the generator (Algorithm 1, theta): every term's gradient at x0, then one product."""
    z, noise, timesteps, prompts = batch
    conditioning, null_conditioning = encode_prompts(models.pipeline, prompts, args.resolution)
    a, s = models.diffusion.coefficients(timesteps)
    needs_null = args.cfg_scale > (1 if args.cfg_mode == "in" else 0)

    def reference(x_t):
        conditional = predict(models.reference, models.diffusion, x_t, timesteps, conditioning)
        if not needs_null:
            return conditional, None
        return conditional, predict(models.reference, models.diffusion, x_t, timesteps, null_conditioning)

    def assistant(x_t):
        network = accelerator.unwrap_model(models.assistant)
        return predict(network, models.diffusion, x_t, timesteps, conditioning)

    with accelerator.autocast():
        x0 = generate(models.generator, models.diffusion, z, args.generator_timestep, conditioning)
        gradients, logs = divergence_gradient(x0.detach(), noise, a, s, assistant, reference, args)
        if models.reward is not None:
            gradients["reward"], reward_logs = reward_gradient(
                x0, prompts, functools.partial(decode, models.reward_vae), models.reward, args.reward_scale)
            logs |= reward_logs
    total = sum(gradients.values())
    accelerator.backward((x0 * total).sum() / len(x0))
    return logs | {f"grad_{name}": value.flatten(1).norm(dim=1) for name, value in gradients.items()}


class Trainer:
    """The two optimisers and what one iteration of Algorithm 1 does with them."""

    def __init__(self, args, models, prompts, accelerator):
        self.args, self.models, self.prompts, self.accelerator = args, models, prompts, accelerator
        self.step, self.prompts_seen = 0, 0
        channels = models.pipeline.unet.config.in_channels
        side = args.resolution // models.pipeline.vae_scale_factor
        self.latent_shape = (channels, side, side)
        self.trained = {"assistant": models.assistant, "generator": models.generator}
        self.optimizers, self.schedules = {}, {}
        plan = {"assistant": (args.assistant_learning_rate, args.assistant_updates),
                "generator": (args.learning_rate, 1)}
        for name, (rate, updates) in plan.items():
            model = self.trained[name]
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = adam_class(args)(parameters, lr=rate, betas=(args.adam_beta1, args.adam_beta2),
                                         weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)
            # Not prepared by accelerate, whose wrapper steps a schedule once for every process.
            steps = {"num_warmup_steps": args.lr_warmup_steps * updates,
                     "num_training_steps": args.max_train_steps * updates}
            self.schedules[name] = get_scheduler(args.lr_scheduler, optimizer, **steps)
            self.trained[name], self.optimizers[name] = accelerator.prepare(model, optimizer)
        models.assistant, models.generator = self.trained["assistant"], self.trained["generator"]
        self.ema = None
        if args.use_ema:
            generator = accelerator.unwrap_model(models.generator)
            self.ema = EMAModel(generator.parameters(), decay=args.ema_decay)
            self.ema.to(accelerator.device)
        self.logs = {}

    def update(self, name, stream_name, backward):
        """One optimiser step of a network over the accumulated batches, each process with its own samples."""
        args, accelerator = self.args, self.accelerator
        model, optimizer = self.trained[name], self.optimizers[name]
        per_round = args.train_batch_size * accelerator.num_processes
        for accumulated in range(args.gradient_accumulation_steps):
            first = accumulated * per_round + accelerator.process_index * args.train_batch_size
            indices = range(first, first + args.train_batch_size)
            batch = draw_batch(args, stream_name, self.step, indices, self.latent_shape, accelerator.device)
            batch.append([self.prompts.at(self.prompts_seen + index) for index in indices])
            last = accumulated == args.gradient_accumulation_steps - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                logs = backward(self.models, batch, args, accelerator)
            for key, value in logs.items():
                self.logs.setdefault(key, []).append(value.mean())
        self.prompts_seen += per_round * args.gradient_accumulation_steps
        norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        self.logs.setdefault(f"grad_norm_{name}", []).append(norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.schedules[name].step()

    def train_step(self):
        """Algorithm 1: K_TA updates of the assistant, then one of the generator."""
        for k in range(self.args.assistant_updates):
            self.update("assistant", f"assistant-{k}", assistant_step)
        self.update("generator", "generator", generator_step)
        if self.ema is not None:
            self.ema.step(self.accelerator.unwrap_model(self.models.generator).parameters())
        self.step += 1

    def take_logs(self):
        """Means since the last call over samples and processes; one not finite ends the run unsaved."""
        names = list(self.logs)
        means = torch.stack([torch.stack(values).float().mean() for values in self.logs.values()])
        means = self.accelerator.reduce(means, reduction="mean").tolist()  # the one wait for the device
        self.logs = {}
        broken = [name for name, mean in zip(names, means) if not math.isfinite(mean)]
        if broken:
            raise FloatingPointError(
                f"step {self.step}: {', '.join(broken)} not finite; the last checkpoint is intact. Lower"
                " --learning_rate or --reward_scale, or look at the reward model")
        return dict(zip(names, means))

    @contextlib.contextmanager
    def averaged_generator(self):
        """The generator without wrappers, with EMA weights where there are any."""
        generator = self.accelerator.unwrap_model(self.models.generator)
        if self.ema is not None:
            self.ema.store(generator.parameters())
            self.ema.copy_to(generator.parameters())
        yield generator
        if self.ema is not None:
            self.ema.restore(generator.parameters())

    # -------------------------------------------------------------------------------------------- state

    def state_dict(self):
        """What accelerate does not keep: schedules and EMA (its own part of a checkpoint)."""
        state = {"schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()}}
        return state | ({"ema": self.ema.state_dict()} if self.ema is not None else {})

    def load_state_dict(self, state):
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state["schedules"][name])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.accelerator.device)

    def save(self):
        """Write a checkpoint aside, flush it, rename it, then drop the oldest; called by every process."""
        accelerator, output_dir = self.accelerator, Path(self.args.output_dir)
        final = output_dir / f"checkpoint-{self.step}"
        aside = output_dir / f"unfinished-{self.step}"
        if accelerator.is_main_process and aside.exists():
            shutil.rmtree(aside)
        accelerator.wait_for_everyone()
        accelerator.save_state(aside)
        if accelerator.is_main_process:
            torch.save(self.state_dict(), aside / "trainer.pt")
            state = {"step": self.step, "prompts_seen": self.prompts_seen, "args": saved_args(self.args)}
            (aside / "state.json").write_text(json.dumps(state, indent=2))
            for path in [*aside.rglob("*"), aside]:
                flush(path)
            if final.exists():  # of an earlier run of the same steps
                shutil.rmtree(final)
            os.replace(aside, final)
            flush(output_dir)
            limit = self.args.checkpoints_total_limit
            for old in list_checkpoints(output_dir)[:-limit] if limit else []:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def load(self, folder):
        state = json.loads((Path(folder) / "state.json").read_text())
        self.accelerator.load_state(folder)
        self.load_state_dict(torch.load(Path(folder) / "trainer.pt", map_location="cpu", weights_only=True))
        self.step, self.prompts_seen = state["step"], state["prompts_seen"]


def flush(path):
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def adam_class(args):
    eight_bit = args.use_8bit_adam
    return importlib.import_module("bitsandbytes.optim").AdamW8bit if eight_bit else torch.optim.AdamW


# ------------------------------------------------------------------------------------------------ output


@torch.no_grad()
def validate(trainer):
    """Draw the validation prompts from fixed noise; save them as one grid, and their rewards beside it."""
    args, models, accelerator = trainer.args, trainer.models, trainer.accelerator
    prompts = args.validation_prompts
    z = torch.stack([torch.randn(trainer.latent_shape, generator=stream(args.seed, "validation", 0, index))
                     for index in range(len(prompts))]).to(accelerator.device)
    images = []
    with trainer.averaged_generator() as generator, accelerator.autocast():
        for start in range(0, len(prompts), args.train_batch_size):
            part = slice(start, start + args.train_batch_size)
            conditioning, _ = encode_prompts(models.pipeline, prompts[part], args.resolution)
            x0 = generate(generator, models.diffusion, z[part], args.generator_timestep, conditioning)
            images.append(decode(models.pipeline.vae, x0).clamp(0, 1))
    images = torch.cat(images)
    rewards = models.reward(images, prompts).tolist() if models.reward is not None else [None] * len(prompts)
    folder = Path(args.output_dir) / "validation"
    folder.mkdir(exist_ok=True)
    save_image(images, folder / f"step-{trainer.step:06d}.png", nrow=math.ceil(len(prompts)**0.5), padding=0)
    record = [{"prompt": prompt, "reward": reward} for prompt, reward in zip(prompts, rewards)]
    (folder / f"step-{trainer.step:06d}.json").write_text(json.dumps(record, indent=2))
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            array = images.permute(0, 2, 3, 1).cpu().numpy()
            tracker.log_images({"validation": array}, trainer.step, **layout)


def usage(location, args):
    """The exact lines that draw a picture with the exported pipeline."""
    prompt = (args.validation_prompts or ["a photo of an astronaut riding a horse"])[0]
    return f"""from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained({location!r})
image = pipeline({prompt!r}, height={args.resolution}, width={args.resolution},
                 num_inference_steps=1, timesteps=[{args.generator_timestep}], guidance_scale=0).images[0]
image.save("picture.png")"""


def write_card(trainer, name, metrics):
    """README.md of the exported pipeline."""
    args = trainer.args
    names = (args.pretrained_model_name_or_path, args.generator_init or args.pretrained_model_name_or_path,
             args.reward or args.reward_model_name_or_path)
    # A card is published: of a path on this machine it shows the last part only.
    base, start, reward = [Path(value).name if Path(value).exists() else value for value in names]
    text = f"""
# {name}

A one-step text-to-image generator, post-trained with Diff-Instruct* (recipe `{args.recipe}`) from `{start}`,
with `{base}` as the reference. Reward: `{reward if args.reward_scale else "none"}`.

```python
{usage(name, args)}
```

| setting | value |
| --- | --- |
| divergence, distance, weighting | {args.divergence}, {args.distance}, {args.weighting} |
| score gradient | {args.score_gradient} |
| reward scale, guidance scale and mode | {args.reward_scale:g}, {args.cfg_scale:g}, {args.cfg_mode} |
| generator updates, batch size | {trainer.step}, {args.train_batch_size * args.gradient_accumulation_steps
                                                   * trainer.accelerator.num_processes} |
| learning rates (generator, assistant) | {args.learning_rate:g}, {args.assistant_learning_rate:g} |
"""
    if "reward" in metrics:
        text += f"| last logged training reward | {metrics['reward']:.4f} |\n"
    tags = ["diffusers", "text-to-image", "one-step", "diff-instruct-star", "diffusers-training"]
    data = ModelCardData(base_model=base if "/" in base else None, library_name="diffusers",
                         license="other", pipeline_tag="text-to-image")
    # Not load_or_create_model_card: it asks the hub for a card first, and its template has gaps to fill in.
    card = populate_model_card(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"), tags=tags)
    card.save(Path(args.output_dir) / "README.md")


def export(trainer, metrics):
    """The finished pipeline in --output_dir, safetensors, with a card; and on the hub where asked."""
    args, models = trainer.args, trainer.models
    with trainer.averaged_generator() as generator:
        assemble_pipeline(models, generator).save_pretrained(args.output_dir)
    if args.assistant_lora_rank:
        assistant = trainer.accelerator.unwrap_model(models.assistant)
        StableDiffusionPipeline.save_lora_weights(
            Path(args.output_dir) / "assistant_lora",
            unet_lora_layers=get_peft_model_state_dict(assistant),
            unet_lora_adapter_metadata=assistant.peft_config["default"].to_dict())
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    write_card(trainer, name, metrics)
    if args.push_to_hub:
        repository = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
        write_card(trainer, repository, metrics)
        upload_folder(
            repo_id=repository, folder_path=args.output_dir, token=args.hub_token,
            commit_message="Diff-Instruct* training",
            ignore_patterns=["checkpoint-*", "unfinished-*", f"{args.logging_dir}/*"])


# ------------------------------------------------------------------------------------------------ main


def check_inputs(args):
    """All that can be checked before a model loads: the schedule, the prompts, the reward's factory."""
    try:
        scheduler = DDPMScheduler.from_pretrained(args.pretrained_model_name_or_path, subfolder="scheduler",
                                                  revision=args.revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        fail(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: {reason}")
    last = len(scheduler.alphas_cumprod) - 1
    for name in ("generator_timestep", "max_timestep"):
        if not 0 <= getattr(args, name) <= last:
            fail(f"--{name} {getattr(args, name)} is outside the reference's schedule, 0 to {last}")
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon" and scheduler.alphas_cumprod[args.generator_timestep] < 1e-8:
        fail(f"--generator_timestep {args.generator_timestep} has zero terminal SNR in this schedule,"
             " where an epsilon model cannot be read; choose an earlier one")
    if args.reward and args.reward_scale:
        import_factory(args.reward)
    start = args.generator_init or ""
    is_file = start.endswith(WEIGHTS_FILES)
    if start and not Path(start).exists() and (start[0] in "./~" or is_file == (start.count("/") < 2)):
        fail(f"--generator_init {start} is neither here nor a hub id (owner/name, or owner/name/file)")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        fail("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes")
    return load_prompts(args), Diffusion(scheduler.alphas_cumprod, prediction_type)


def load_models(args, diffusion, accelerator):
    """Every network on its device: trained ones in float32, frozen ones in bf16 under mixed precision."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    pipeline = load_pipeline(args, dtype)
    pipeline.set_progress_bar_config(disable=True)
    generator = load_generator(args.generator_init, pipeline.unet)
    assistant = load_generator(None, pipeline.unet)
    generator.requires_grad_(True).train()
    assistant.requires_grad_(not args.assistant_lora_rank).train()
    if args.assistant_lora_rank:
        assistant.add_adapter(LoraConfig(
            r=args.assistant_lora_rank, lora_alpha=args.assistant_lora_rank, init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"]))
        cast_training_params(assistant, dtype=torch.float32)
    reward, reward_vae = load_reward(args, dtype), load_reward_vae(args, pipeline, dtype)
    if args.gradient_checkpointing:
        for module in (pipeline.unet, generator, assistant):
            module.enable_gradient_checkpointing()
    device = accelerator.device
    pipeline.to(device)
    for module in (assistant, generator, reward_vae, reward):
        if isinstance(module, torch.nn.Module):
            module.to(device)
    diffusion = Diffusion(diffusion.alphas_cumprod.to(device), diffusion.prediction_type)
    return Models(pipeline, pipeline.unet, assistant, generator, reward_vae, reward, diffusion)


def start_metrics(args, step):
    """metrics.jsonl, cut back to the step that a run resumes from."""
    path = Path(args.output_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in kept))
    return open(path, "a", buffering=1)


def main(args):
    prompts, diffusion = check_inputs(args)
    trackers = None if args.report_to == "none" else args.report_to
    project = ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with=trackers, project_config=project,
                              gradient_accumulation_steps=args.gradient_accumulation_steps)
    if accelerator.mixed_precision not in ("no", "bf16"):
        fail(f"--mixed_precision {accelerator.mixed_precision} is not supported: use bf16 or no")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    set_seed(args.seed)  # a LoRA's first weights; all other randomness is drawn by `stream`
    models = load_models(args, diffusion, accelerator)
    trainer = Trainer(args, models, prompts, accelerator)
    if args.resume_from_checkpoint:
        trainer.load(args.resume_from_checkpoint)
    if accelerator.is_main_process:
        resolved = ("recipe", "divergence", "reward_scale", "cfg_scale", "cfg_mode", "score_gradient",
                    "distance", "pseudo_huber_c", "weighting", "assistant_updates")
        print("resolved: " + ", ".join(f"{name} {getattr(args, name)}" for name in resolved))
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.output_dir) / "args.json").write_text(json.dumps(saved_args(args), indent=2) + "\n")
        metrics_file = start_metrics(args, trainer.step)
    accelerator.init_trackers("diff-instruct-star", {k: str(v) for k, v in saved_args(args).items()})

    progress = tqdm(total=args.max_train_steps, initial=trainer.step, desc="training", mininterval=1,
                    disable=not accelerator.is_local_main_process)
    validates = args.validation_prompts and accelerator.is_main_process
    if validates and trainer.step == 0:
        validate(trainer)
    metrics, started, logged = {}, time.perf_counter(), trainer.step
    while trainer.step < args.max_train_steps:
        trainer.train_step()
        progress.update()
        step, last = trainer.step, trainer.step == args.max_train_steps
        saves = step % args.checkpointing_steps == 0
        logs = step % args.logging_steps == 0 or saves or last
        if logs:
            metrics = trainer.take_logs()
            metrics["seconds_per_step"] = (time.perf_counter() - started) / (step - logged)
            metrics |= {f"lr_{name}": value.get_last_lr()[0] for name, value in trainer.schedules.items()}
            accelerator.log(metrics, step=step)
            if accelerator.is_main_process:
                metrics_file.write(json.dumps({"step": step, **metrics}) + "\n")
                shown = ("reward", "loss_assistant", "y_norm", "grad_divergence", "grad_reward")
                progress.set_postfix({name: f"{metrics[name]:.3g}" for name in shown if name in metrics})
        if saves:
            trainer.save()
        if validates and (step % args.validation_steps == 0 or last):
            validate(trainer)
        if logs:
            started, logged = time.perf_counter(), step
    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        export(trainer, metrics)
        print(f"the pipeline is in {args.output_dir}; draw with it:\n\n{usage(args.output_dir, args)}")
    accelerator.end_training()


if __name__ == "__main__":
    main(ARGS)
