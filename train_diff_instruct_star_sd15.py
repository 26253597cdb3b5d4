#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "diffusers>=0.39", "transformers>=4.55", "accelerate", "peft",
#                 "datasets"]
# ///
"""Diff-Instruct* (DI*): post-train a one-step Stable Diffusion 1.5 generator for human preference.

The paper's best recipe (the default), and the distillation that makes the one-step start it needs:

    accelerate launch train_diff_instruct_star_sd15.py --prompts_file prompts.txt --output_dir di-star \\
        --generator_init path/to/one_step_unet --mixed_precision bf16 --gradient_checkpointing --use_ema

    accelerate launch train_diff_instruct_star_sd15.py --recipe sim --prompts_file prompts.txt

The same command with `--resume_from_checkpoint latest` resumes a run.

The method ("David and Goliath", arXiv 2410.20898; equation numbers are the paper's): a generator g maps noise
z to clean latents x0 in one step. A frozen reference diffusion model and an assistant, trained on the
generator's own samples, see the same noised latents x_t = a_t x0 + s_t noise. The generator maximises a
reward of the decoded image (3.1), while a divergence of the two models' scores (3.4) keeps it near the
reference. Each term enters the update as its gradient at x0. No image data is used.

Where a printed formula has an error, this file follows its proof: the guidance reward has a minus
(A.13), the reward is one scalar per sample, and by default the gradient of (3.4) passes through both score
networks, as theorem 3.1 has it and listing 1 does not (`--score_gradient`).
"""

# ---- imports and the contract of a family: the same to the letter in both training scripts (`make sync`)

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import mmap
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:  # answered at once, without the libraries
    Module = object
else:
    import diffusers
    import torch
    import transformers
    from accelerate import Accelerator, init_empty_weights
    from accelerate.logging import get_logger
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import InitProcessGroupKwargs, set_seed
    from datasets import Features, Value, load_dataset
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from huggingface_hub import (
        ModelCard,
        ModelCardData,
        create_repo,
        hf_hub_download,
        snapshot_download,
        upload_folder,
    )
    from PIL import Image, ImageDraw, ImageFont
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from torch.nn import Module
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils._pytree import tree_map
    from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image
    from tqdm.auto import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm
    from transformers import CLIPModel, CLIPProcessor

    logger = get_logger("diff_instruct_star")  # of the main process; before `open_accelerator`, logger.logger

warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # the first update may be skipped


class Family:
    """A model family: everything that the method needs to know about its models. A subclass supplies

    - `name`, for messages; `network_class` and `network_name`, the denoiser's diffusers class and its
      component name in the pipeline; `pipeline_class`; `components`, the class of every other component;
    - `signature`, by which `architecture` recognises a configuration of the family;
    - `defaults`, its default flags; `dpo_unet`, the reference of --recipe di_star_dpo, or None;
    - `lora_targets`, the layers that get a LoRA; `lora_saver`, the pipeline class that writes the LoRA file;
    - `sharded_blocks`, the classes of the blocks that FSDP2 gathers one at a time;
    - `pixels_per_latent`; `packing`, the side of one of the network's latents, in VAE latents;
    - `flags` of its own, as in FLAGS, whose values go to `encode_prompts` and to the pipeline's call;
    - `encode_prompts`, and overrides of the methods below that do not suit its models.
    """

    network_class, network_name = "UNet2DConditionModel", "unet"
    lora_targets = ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"]
    sharded_blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    pixels_per_latent, packing = 8, 1
    dpo_unet, flags = None, {}
    lora_saver = "StableDiffusionPipeline"
    vae_in_float32 = False  # whether the pipeline's own VAE must stay in float32

    @property
    def process_class(self):
        """The forward process of reference and generator."""
        return VariancePreserving

    def check_libraries(self):
        """Raise ValueError with the remedy if the installed packages do not suit the family."""
        if not hasattr(diffusers, self.network_class):
            raise ValueError(f"needs a newer diffusers than {diffusers.__version__}, which has no"
                             f" {self.network_class}")

    def pipeline_arguments(self, config):
        """Arguments of the pipeline's class besides its components; `config` is its model_index.json."""
        return {}

    def check_pipeline(self, pipeline):
        """Raise ValueError if a loaded pipeline lacks something that diffusers silently does without."""

    def encode_prompts(self, pipeline, prompts, resolution, null=False):
        """Keyword arguments of the network for a list of prompts: nested dicts of tensors (batch, ...).

        With `null`, append as many unconditional embeddings, computed as the pipeline does.
        """
        raise NotImplementedError

    def prompt_limit(self, pipeline, max_sequence_length=None):
        """(tokenizer, token limit) of the text encoder with the largest limit; takes the family's `flags`."""
        return pipeline.tokenizer, max_sequence_length or pipeline.tokenizer.model_max_length

    def architecture(self, config):
        """(signature, width) of a network's configuration; the width must be the reference's."""
        return (config["_class_name"], config.get("addition_embed_type")), config.get("cross_attention_dim")

    def forward(self, network, x_t, timesteps, conditioning):
        """The network's output (batch, C, H, W) for x_t (batch, C, H, W) at timesteps (batch,)."""
        return network(x_t, timesteps, **conditioning).sample

    def decode(self, vae, latents):
        """Scaled latents (batch, C, h, w) -> images (batch, 3, H, W) float32, in [0, 1] up to overshoot."""
        return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float() / 2 + 0.5

    def call_arguments(self, process, timesteps):
        """Arguments of the pipeline's call that reproduce the generator's steps."""
        return process.call_arguments(timesteps)


# ---- this script's family

class StableDiffusion15(Family):
    """Stable Diffusion 1.5."""

    name, signature = "Stable Diffusion 1.5", ("UNet2DConditionModel", None)
    pipeline_class = "StableDiffusionPipeline"
    components = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer",
                  "scheduler": "DDPMScheduler"}
    defaults = {"pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
                "generator_init": "reference", "generator_timesteps": [999], "resolution": 512,
                "learning_rate": 1e-6, "output_dir": "diff-instruct-star-sd15"}
    dpo_unet = "mhdang/dpo-sd1.5-text2image-v1"

    def pipeline_arguments(self, config):
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def encode_prompts(self, pipeline, prompts, resolution, null=False):
        prompt_embeds, null_embeds = pipeline.encode_prompt(
            list(prompts), device=pipeline.text_encoder.device, num_images_per_prompt=1,
            do_classifier_free_guidance=null)
        return {"encoder_hidden_states": torch.cat([prompt_embeds, null_embeds]) if null else prompt_embeds}


FAMILY = StableDiffusion15()


# ---- body: the same to the letter in both training scripts (`make sync`)

# ---------------------------------------------------------------------------------------------- the method

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
    generator_timesteps: tuple = (999,)
    reward_steps: str = "last"
    min_timestep: int = 20
    max_timestep: int = 979
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    @property
    def guided(self):
        """Whether guidance acts, so that the reference's prediction for the null prompt is needed."""
        return self.cfg_scale > (1 if self.cfg_mode == "in" else 0)

    @property
    def full(self):
        """Whether the gradient passes through both score networks (theorem 3.1)."""
        return self.divergence == "score" and self.score_gradient == "full"


# ------------------------------------------------------------------------------------------- forward process

@dataclass(frozen=True)
class VariancePreserving:
    """DDPM's forward process x_t = a_t x0 + s_t noise, and what a network's output means under it.

    Latents are (batch, C, H, W), timesteps (batch,), a and s (batch, 1, 1, 1).
    """

    alphas_cumprod: torch.Tensor  # (timesteps,)
    prediction_type: str  # epsilon, v_prediction or sample
    fractional_timesteps = False

    @classmethod
    def from_scheduler(cls, config):
        """The process of a scheduler's configuration; raises ValueError if the method cannot use it."""
        kind, prediction_type = config["_class_name"], config.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "v_prediction", "sample") or "FlowMatch" in kind or not (
                {"beta_schedule", "trained_betas"} & {*config}):  # EDM's; DDPM's defaults would replace them
            raise ValueError(f"{kind} ({prediction_type}) is unsupported: a variance-preserving scheduler"
                             " has betas, and must predict epsilon, v_prediction or sample")
        return cls(diffusers.DDPMScheduler.from_config(config).alphas_cumprod, prediction_type)

    @property
    def last_timestep(self):
        return len(self.alphas_cumprod) - 1

    def has_clean_prediction(self, timestep):
        """False at zero terminal SNR, where an epsilon model's clean prediction divides by a = 0."""
        return self.prediction_type != "epsilon" or self.alphas_cumprod[timestep] >= 1e-8

    def coefficients(self, timesteps):
        """a_t and s_t."""
        alphas_cumprod = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def clean_prediction(self, output, x_t, a, s):
        """D(x_t), the clean latents implied by a network's output."""
        if self.prediction_type == "epsilon":
            return (x_t - s * output) / a
        if self.prediction_type == "v_prediction":
            return a * x_t - s * output
        return output

    def target(self, x0, noise, a, s):
        """The regression target of a network's output in denoising score matching."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return a * noise - s * x0
        return x0

    def next_input(self, x_t, x0, noise, timesteps, next_timesteps):
        """Re-noise the clean prediction of x_t to the next timesteps of a rollout, as LCMScheduler does."""
        a, s = self.coefficients(next_timesteps)
        return a * x0 + s * noise

    def exported_scheduler(self, scheduler):
        """An LCMScheduler that reproduces the generator's steps: no clipping, c_skip = 0 and c_out = 1.

        An empty `_use_default_values` keeps the class's defaults from replacing the reference's values.
        """
        own = {"clip_sample": False, "thresholding": False, "timestep_scaling": 1e4,
               "prediction_type": self.prediction_type, "_use_default_values": []}
        known = inspect.signature(diffusers.LCMScheduler).parameters  # not `variance_type`
        config = {name: value for name, value in scheduler.config.items() if name in known}
        return diffusers.LCMScheduler.from_config(config | own)

    def call_arguments(self, timesteps):
        """Arguments of the pipeline's call that reproduce these steps."""
        return {"timesteps": timesteps}

    def to(self, device):
        return VariancePreserving(self.alphas_cumprod.to(device), self.prediction_type)


# --------------------------------------------------------------------------------------- losses and gradients

def guided_prediction(conditional, unconditional, scale):
    """Classifier-free guidance as in diffusers (section 3.3, omega = alpha_cfg); at most 1 means none."""
    return conditional if scale <= 1 else unconditional + scale * (conditional - unconditional)


def divergence_units(x0, d_reference, a, s, weighting):
    """Units of the divergence: (unit, x_unit, weight), each broadcastable to (batch, 1, 1, 1).

    A difference of scores is `unit` times that of the clean predictions, dx_t is `x_unit` times dx0 (in clean
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

    Latents are (batch, C, H, W), a and s are (batch, 1, 1, 1); returns (batch,). By theorem 3.1 its gradient
    in the generator's parameters, through x0 and both predictions, is that of the divergence (3.2).
    """
    unit, _, weight = divergence_units(x0, d_reference, a, s, method.weighting)
    y = unit * (d_assistant - d_reference)
    if method.distance == "l2":
        derivative = 2 * y
    else:
        derivative = y / (y.square().sum((1, 2, 3), keepdim=True) + method.pseudo_huber_c**2).sqrt()
    return -(weight * derivative * unit * (d_assistant - x0)).sum((1, 2, 3))


def kl_divergence_loss(x0, d_assistant, d_reference, a, s, method):
    """Diff-Instruct(++): w y^T x_t with detached y = S_assistant - S_reference; shapes as above."""
    unit, x_unit, weight = divergence_units(x0, d_reference, a, s, method.weighting)
    return (weight * unit * (d_assistant - d_reference).detach() * x_unit * x0).sum((1, 2, 3))


def implicit_reward_loss(x0, direction, d_reference, a, s, scale, method):
    """- scale w (S_1 - S_0)^T x_t for the reward log p_1(x_t) - log p_0(x_t), scores detached; (batch,).

    `direction` is D_1 - D_0: D_ref(x_t | c) - D_ref(x_t) for the guidance reward, (3.5) with (A.13)'s minus.
    """
    unit, x_unit, weight = divergence_units(x0, d_reference, a, s, method.weighting)
    return -scale * (weight * unit * direction.detach() * x_unit * x0).sum((1, 2, 3))


def implicit_reward_gradient(predictions, direction, scale, method):
    """Gradient of `implicit_reward_loss` at x0, (batch, C, H, W)."""
    leaf = predictions.x0.detach().requires_grad_()
    loss = implicit_reward_loss(leaf, direction, predictions.reference.detach(), predictions.a, predictions.s,
                                scale, method)
    return torch.autograd.grad(loss.sum(), leaf)[0]


def assistant_loss(output, x0, noise, a, s, process):
    """Denoising score matching (Algorithm 1), lambda(t) as in the reference's training; returns (batch,)."""
    return (output - process.target(x0, noise, a, s)).square().mean((1, 2, 3))


def reward_gradient(x0, prompts, decode, rewards):
    """Gradient at x0 (batch, C, H, W) of - sum over rewards of alpha_rew r(decode(x0), c), (3.1), and logs.

    `decode` maps scaled latents to images in [0, 1] up to overshoot. `rewards` is {name: (alpha_rew, function
    from images (batch, 3, H, W) in [0, 1] and prompts to (batch,))}. The logs (batch,) are each reward, the
    norm of its scaled gradient at the image, the weighted mean reward, and the fraction of clamped values,
    which have no gradient. Exits if scores have the wrong shape or no gradient.
    """
    leaf, logs, at_images = x0.detach().requires_grad_(), {}, 0
    decoded = decode(leaf)
    clamped = decoded.clamp(0, 1)
    images = clamped.detach().requires_grad_()
    for name, (scale, reward) in rewards.items():  # one reward's activations at a time
        logs[f"reward_{name}"] = scores = score(name, reward, images, prompts)
        gradient = None
        if scores.requires_grad:
            (gradient,) = torch.autograd.grad(-scale * scores.float().sum(), images, allow_unused=True)
        if gradient is None:
            exit_with_error(f"--reward {name} has no gradient in the images")
        at_images = at_images + gradient
        logs[f"grad_image_{name}"] = gradient.flatten(1).norm(dim=1)
    (gradient,) = torch.autograd.grad(clamped, leaf, at_images)
    logs["reward"] = mean_reward(logs, rewards)
    logs["clamped"] = ((decoded < 0) | (decoded > 1)).float().mean((1, 2, 3))
    return gradient.float(), {name: values.detach().float() for name, values in logs.items()}


# ------------------------------------------------------------------------------------------------------ terms

@dataclass
class Batch:
    """One batch of an update. `steps` is 1 for a one-step generator, else the length of the rollout."""

    z: torch.Tensor  # (batch, steps, C, H, W) ~ N(0, I), the generator's noise
    noise: torch.Tensor  # (batch, C, H, W) ~ N(0, I), which noises x0 to x_t
    timesteps: torch.Tensor  # (batch,), t of x_t
    prompts: list


@dataclass
class Predictions:
    """What the terms can read in an update; latents and clean predictions are (batch, C, H, W)."""

    x0: torch.Tensor  # the generator's sample, detached
    x_t: torch.Tensor  # a x0 + s noise, a leaf
    a: torch.Tensor  # (batch, 1, 1, 1)
    s: torch.Tensor
    assistant: torch.Tensor  # D_assistant(x_t | c)
    reference: torch.Tensor  # D_reference(x_t | c)
    null: torch.Tensor | None  # D_reference(x_t), where a term needs it
    graph_terms: int = 0  # terms that have yet to differentiate the predictions

    def pull_back(self, output, cotangent):
        """The vector-Jacobian product, at x_t, of an output computed from the predictions."""
        return torch.autograd.grad(output, self.x_t, cotangent, retain_graph=self.graph_terms > 1)[0]

    def release_graph(self, term):
        """Drop the networks' graphs after the last term that differentiates them."""
        self.graph_terms -= term.needs_graph
        if not self.graph_terms:
            self.assistant, self.reference = self.assistant.detach(), self.reference.detach()
            self.null = None if self.null is None else self.null.detach()


class Stateful:
    """An object whose state a checkpoint keeps; the default state is empty."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned: tensors and plain values."""


class Term(Stateful):
    """A term of the generator's loss, as its gradient at the clean latents x0.

    `name` gives its metric, grad_NAME. `needs_null` asks for the reference's prediction for the null
    prompt, `needs_graph` for predictions with a graph to x_t; a `last_step_only` term is skipped when a
    rollout ends before the generator's last step. `scale` multiplies the gradient; observers may set it.
    """

    name, scale = "", 1.0
    needs_null = needs_graph = last_step_only = False
    networks = {}  # {name: frozen network of the term}, counted by --dry_run

    def gradient(self, batch, predictions, predict):
        """The gradient (batch, C, H, W) of the loss summed over samples, and logs {name: (batch,)}.

        `predict(network, x_t, timesteps)` is a network's clean prediction for the batch's prompts.
        """
        raise NotImplementedError

    def after_update(self, run):
        """Called after each update of the generator, even a skipped one; for a term that trains something."""


class Divergence(Term):
    """The divergence between assistant and reference, score-based (3.4) or KL; the reference may be guided.

    dL/dx0 = direct + a (J_A^T g_A + J_R^T g_R), where g_A and g_R are the loss's derivatives at the two
    predictions; the two vector-Jacobian products are taken one at a time.
    """

    name = "divergence"

    def __init__(self, method):
        self.method, self.needs_graph = method, method.full
        self.needs_null = method.guided and method.cfg_mode == "in"

    def gradient(self, batch, predictions, predict):
        method, x0, a, s = self.method, predictions.x0, predictions.a, predictions.s
        d_assistant, d_reference = predictions.assistant, predictions.reference
        if method.cfg_mode == "in":
            d_reference = guided_prediction(d_reference, predictions.null, method.cfg_scale)
        divergence_loss = score_divergence_loss if method.divergence == "score" else kl_divergence_loss
        leaves = [value.detach().requires_grad_() for value in (x0, d_assistant, d_reference)]
        loss = divergence_loss(*leaves, a, s, method)
        gradient, g_assistant, g_reference = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        if method.full:
            through_reference = predictions.pull_back(d_reference, g_reference)
            through_assistant = predictions.pull_back(d_assistant, g_assistant)
            gradient = gradient + a * (through_assistant + through_reference)
        y_norm = (d_assistant - d_reference).detach().flatten(1).norm(dim=1)
        return gradient, {"loss_divergence": loss.detach(), "y_norm": y_norm}


class GuidanceReward(Term):
    """Guidance as the implicit reward log p_reference(x_t | c) - log p_reference(x_t), (3.5) and (3.6)."""

    name, needs_null = "cfg", True

    def __init__(self, method):
        self.method = method

    def gradient(self, batch, predictions, predict):
        direction = predictions.reference - predictions.null
        return implicit_reward_gradient(predictions, direction, self.method.cfg_scale, self.method), {}


class ExplicitReward(Term):
    """The rewards of the decoded images (3.1), outside autocast because each has its own precision."""

    name = "reward"

    def __init__(self, models, method):
        self.models, self.last_step_only = models, method.reward_steps == "last"

    def gradient(self, batch, predictions, predict):
        models = self.models
        decode = functools.partial(models.family.decode, models.reward_vae)
        with models.using(models.scorers):
            return in_chunks(reward_gradient, models.decode_batch_size, predictions.x0, batch.prompts, decode,
                             models.trained_rewards)


# ------------------------------------------------------------------------------------------------------ steps

def seeded_rng(seed, stream, step, index):
    """A generator of random numbers that is a function of its four arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_timestep(rng, method, fractional):
    """t, a scalar between --min_timestep and --max_timestep, both included."""
    low, high = method.min_timestep, method.max_timestep
    if method.timestep_sampling == "uniform" and not fractional:
        return torch.randint(low, high + 1, (), generator=rng)
    place = torch.rand((), generator=rng) if method.timestep_sampling == "uniform" else torch.sigmoid(
        method.logit_mean + method.logit_std * torch.randn((), generator=rng))
    if fractional:
        return low + (high - low) * place
    return (low + (high + 1 - low) * place).long().clamp(max=high)


def sample_noise(seed, stream, step, indices, shape, method, process, device, steps=1):
    """z (batch, steps, *shape), noise (batch, *shape) and timesteps (batch,) of a rollout over `steps` steps.

    Those of a sample depend only on (seed, stream, step, its index).
    """
    samples = []
    for index in indices:
        rng = seeded_rng(seed, stream, step, index)
        z, noise = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
        timestep = draw_timestep(rng, method, process.fractional_timesteps)
        more = [torch.randn(shape, generator=rng) for _ in range(steps - 1)]
        samples.append((torch.stack([z, *more]), noise, timestep))
    return [torch.stack(values).to(device) for values in zip(*samples)]


def encode(models, prompts, null):
    """The network's conditioning for prompts and, with `null`, for as many null prompts (else None)."""
    with models.using(models.text_encoders), torch.no_grad():
        both = models.family.encode_prompts(models.pipeline, prompts, null=null, **models.encoding)
    if not null:
        return both, None
    return [tree_map(lambda value: value.chunk(2)[half], both) for half in range(2)]


def in_chunks(function, size, latents, prompts, *more):
    """Apply `function` to at most `size` latents (batch, ...) and prompts at a time; join its tensors."""
    parts = [function(latents[first:first + size], prompts[first:first + size], *more)
             for first in range(0, len(prompts), size)]
    return tree_map(lambda *values: torch.cat(values), *parts)


def predict(network, family, process, x_t, timesteps, conditioning):
    """A network's clean prediction of x_t (batch, C, H, W) at timesteps (batch,), in x_t's precision."""
    a, s = process.coefficients(timesteps)
    output = family.forward(network, x_t, timesteps, conditioning).to(x_t.dtype)
    return process.clean_prediction(output, x_t, a, s)


def predict_reference(models, x_t, timesteps, conditioning, null_conditioning, null_needs_graph):
    """The reference's clean predictions of x_t for the prompts and for the null prompt (or None).

    They share one forward and one backward, unless only the prediction for the prompts needs a graph.
    """
    reference, family, process = models.reference, models.family, models.process
    if null_conditioning is None:
        return predict(reference, family, process, x_t, timesteps, conditioning), None
    if null_needs_graph or not x_t.requires_grad:
        both = tree_map(lambda *parts: torch.cat(parts), conditioning, null_conditioning)
        return predict(reference, family, process, x_t.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
    with torch.no_grad():
        d_null = predict(reference, family, process, x_t, timesteps, null_conditioning)
    return predict(reference, family, process, x_t, timesteps, conditioning), d_null


def generate(generator, family, process, z, timesteps, conditioning):
    """x0 = g(z, c) (batch, C, H, W): the generator's clean prediction of noise at its timestep.

    z (batch, steps, C, H, W) ~ N(0, I) holds the input at the first timestep and, for a rollout of several
    steps, the noise that takes each clean prediction to the next timestep. Only the last call has a graph.
    """
    x_t, *others = z.unbind(1)
    times = [torch.full((len(z),), timestep, device=z.device) for timestep in timesteps]
    with torch.no_grad():
        for now, following, noise in zip(times, times[1:], others):
            x0 = predict(generator, family, process, x_t, now, conditioning)
            x_t = process.next_input(x_t, x0, noise, now, following)
            torch.clear_autocast_cache()  # its half-precision weights were cast without a graph
    return predict(generator, family, process, x_t, times[len(others)], conditioning)


def assistant_step(models, batch, method, accelerator):
    """One backward of the assistant on the generator's own samples (Algorithm 1, psi)."""
    conditioning, _ = encode(models, batch.prompts, null=False)
    a, s = models.process.coefficients(batch.timesteps)
    with torch.no_grad(), accelerator.autocast():
        x0 = generate(models.generator, models.family, models.generator_process, batch.z,
                      method.generator_timesteps, conditioning)
    x_t = a * x0 + s * batch.noise
    with accelerator.autocast():  # a second context, so that the first frees its half-precision weights
        output = models.family.forward(models.assistant, x_t, batch.timesteps, conditioning).to(x0.dtype)
    loss = assistant_loss(output, x0, batch.noise, a, s, models.process)
    accelerator.backward(loss.mean())
    return {"loss_assistant": loss.detach(), "x0_std": x0.flatten(1).std(1)}


def generator_step(models, batch, terms, method, accelerator):
    """One backward of the generator (Algorithm 1, theta), from the sum of the terms' gradients at x0."""
    last_step = batch.z.shape[1] == len(method.generator_timesteps)  # whose images a user will see
    terms = [term for term in terms if last_step or not term.last_step_only]
    graph_terms = [term for term in terms if term.needs_graph]
    conditioning, null_conditioning = encode(models, batch.prompts, any(term.needs_null for term in terms))
    with accelerator.autocast():
        x0 = generate(models.generator, models.family, models.generator_process, batch.z,
                      method.generator_timesteps, conditioning)
    a, s = models.process.coefficients(batch.timesteps)
    x_t = (a * x0.detach() + s * batch.noise).requires_grad_(bool(graph_terms))

    def predict_for_prompts(network, x_t, timesteps):
        with accelerator.autocast():
            return predict(network, models.family, models.process, x_t, timesteps, conditioning)

    with torch.set_grad_enabled(bool(graph_terms)):
        # DDP's wrapper would wait for gradients of the assistant's weights, which this update does not have.
        d_assistant = predict_for_prompts(accelerator.unwrap_model(models.assistant), x_t, batch.timesteps)
        with accelerator.autocast():
            d_reference, d_null = predict_reference(
                models, x_t, batch.timesteps, conditioning, null_conditioning,
                any(term.needs_null for term in graph_terms))
    predictions = Predictions(x0.detach(), x_t, a, s, d_assistant, d_reference, d_null, len(graph_terms))
    del d_assistant, d_reference, d_null  # only `predictions` holds the graphs, and drops them
    gradients, logs = {}, {}
    for term in terms:  # L = L_div + L_cfg + L_rew (+ the terms that flags add), each as its gradient at x0
        gradient, term_logs = term.gradient(batch, predictions, predict_for_prompts)
        gradients[term.name], logs = term.scale * gradient.detach(), logs | term_logs
        predictions.release_graph(term)
    accelerator.backward((x0 * sum(gradients.values())).sum() / len(x0))
    return logs | {f"grad_{name}": value.flatten(1).norm(dim=1) for name, value in gradients.items()}


def train_step(run):
    """Algorithm 1: K_TA updates of the assistant, then one of the generator; returns early on a signal."""
    started = time.perf_counter()
    for k in range(run.assistant_updates_done, run.args.assistant_updates):
        for batch in run.batches("assistant", f"assistant-{k}"):
            run.record(assistant_step(run.models, batch, run.method, run.accelerator))
        run.update("assistant")
        run.assistant_updates_done += 1
        if run.signalled:
            return
    for batch in run.batches("generator", "generator"):
        run.record(generator_step(run.models, batch, run.terms.values(), run.method, run.accelerator))
    run.update("generator")
    run.step, run.assistant_updates_done = run.step + 1, 0
    run.seconds.append(time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------- the run

TRAINED = ("assistant", "generator")
POSITION = ("step", "assistant_updates_done", "prompts_seen", "skipped")  # where a run stands, in state.json
MAX_SKIPPED = 10  # non-finite updates in a row that end a run
RESUME = "--resume_from_checkpoint latest"
LOWER = "lower --learning_rate or the reward's scale, or check the reward"


class Observer(Stateful):
    """Watches a run; --observer adds your own."""

    def observe(self, run, metrics):
        """Called with the metrics of each logging step and each validation, the same on every process.

        May set `run.terms[name].scale`; returns a reason to save and end the run here, or None.
        """


class Replicated:
    """Whole networks on every process, in DDP if there are several; utils/sharding.py shards them instead."""

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def place(self, network):
        return network.to(device=self.accelerator.device, memory_format=torch.channels_last)

    def wrap(self, network):
        """The network that updates call: in DDP if there are several processes."""
        if self.accelerator.num_processes == 1:
            return network
        others = {name for name, _ in Module.named_parameters(network)} - {*trainable_parameters(network)}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, others)
        return DistributedDataParallel(network, gradient_as_bucket_view=True)

    def average_gradients(self, network, on):
        """Set whether the next backward averages gradients over the processes."""
        network.require_backward_grad_sync = on

    def gather(self, network):
        """The network to export, on the main process."""
        return network

    def save(self, folder, run, parts):
        """Write the trained weights; the other tensors are in `parts`, which the main process saves."""
        for name, parameters in run.parameters.items() if self.accelerator.is_main_process else ():
            save_file({key: value.detach().contiguous() for key, value in parameters.items()},
                      folder / f"{name}.safetensors", {"step": str(run.step)})

    def load(self, folder, run):
        """Read what `save` wrote."""
        for name, parameters in run.parameters.items():
            flag = f"--resume_from_checkpoint {folder}"
            with exit_on_error(f"{flag}: {name}.safetensors is damaged", "use an earlier one"), safe_open(
                    folder / f"{name}.safetensors", "pt") as file:
                if file.metadata() != {"step": str(run.step)} or {*file.keys()} != {*parameters}:
                    raise ValueError(f"it is not of step {run.step}")
                for key, parameter in parameters.items():
                    parameter.data.copy_(file.get_tensor(key))


def lend_first_moment(optimizer, *_):
    """Hook before each step: with beta1 = 0 Adam's first moment is the gradient, so it is not stored."""
    for parameter in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
        if parameter.grad is not None:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["exp_avg"] = parameter.grad


def drop_first_moment(optimizer, *_):
    """Hook after each step: forget the first moment."""
    for state in optimizer.state.values():
        state.pop("exp_avg", None)


def make_optimizer(args, parameters, learning_rate):
    """Fused AdamW, or the 8-bit AdamW of bitsandbytes; the default betas are those of listing 1."""
    settings = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2),
                "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        return importlib.import_module("bitsandbytes.optim").AdamW8bit(parameters, **settings)
    optimizer = torch.optim.AdamW(parameters, fused=True, **settings)
    if not args.adam_beta1:
        optimizer.register_step_pre_hook(lend_first_moment)
        optimizer.register_step_post_hook(drop_first_moment)
    return optimizer


class TrainingRun:
    """The state of a run, and how an update changes it."""

    def __init__(self, args, models, terms, observers, prompts, accelerator):
        self.args, self.models, self.prompts, self.accelerator = args, models, prompts, accelerator
        self.terms, self.observers = {term.name: term for term in terms}, observers
        self.method = method_of(args)
        device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device
        self.facts = {"prompts": f"{len(prompts.prompts):,}", "mixed_precision": accelerator.mixed_precision,
                      "hardware": f"{accelerator.num_processes} x {device}"}  # for log and card
        self.step, self.assistant_updates_done, self.prompts_seen = 0, 0, 0
        self.skipped, self.skipped_in_a_row = dict.fromkeys(TRAINED, 0), dict.fromkeys(TRAINED, 0)
        self.pending, self.logs, self.seconds, self.signals, self.signalled = {}, {}, [], [], False
        self.parameters = {name: trainable_parameters(accelerator.unwrap_model(getattr(models, name)))
                           for name in TRAINED}
        self.optimizers, self.schedules = {}, {}
        for name, rate, updates in (("assistant", args.assistant_learning_rate, args.assistant_updates),
                                    ("generator", args.learning_rate, 1)):
            self.optimizers[name] = make_optimizer(args, self.parameters[name].values(), rate)
            self.schedules[name] = get_scheduler(
                args.lr_scheduler, self.optimizers[name], num_warmup_steps=args.lr_warmup_steps * updates,
                num_training_steps=args.max_train_steps * updates, num_cycles=args.lr_num_cycles,
                power=args.lr_power)
        self.ema, self.ema_device = None, "cpu" if args.offload_ema else accelerator.device
        if args.use_ema:
            self.ema = EMAModel(self.parameters["generator"].values(), decay=args.ema_decay)
            self.ema.to(self.ema_device)

    def batches(self, name, stream):
        """This process's batches of one update; on all processes their rollouts end at the same step."""
        args, models, device = self.args, self.models, self.accelerator.device
        samples = args.train_batch_size * self.accelerator.num_processes
        rng = seeded_rng(args.seed, f"{stream}, steps", self.step, 0)
        steps = 1 + torch.randint(len(args.generator_timesteps), (), generator=rng).item()
        for accumulated in range(args.gradient_accumulation_steps):
            first = accumulated * samples + self.accelerator.process_index * args.train_batch_size
            indices = range(first, first + args.train_batch_size)
            models.layout.average_gradients(
                getattr(models, name), accumulated == args.gradient_accumulation_steps - 1)
            noise = sample_noise(args.seed, stream, self.step, indices, models.latent_shape, self.method,
                                 models.process, device, steps)
            yield Batch(*noise, [self.prompts.at(self.prompts_seen + index) for index in indices])
        self.prompts_seen += samples * args.gradient_accumulation_steps

    def record(self, logs):
        """Collect the batch means of a step's logs {name: (batch,)} until its update."""
        for name, values in logs.items():
            self.pending.setdefault(name, []).append(values.mean())

    def update(self, name):
        """One optimizer step of a network; if its loss or gradient is not finite, all processes skip it."""
        logs, self.pending = self.pending, {}
        norm = self.accelerator.clip_grad_norm_(list(self.parameters[name].values()), self.args.max_grad_norm)
        logs[f"grad_norm_{name}"] = [getattr(norm, "full_tensor", lambda: norm)()]  # FSDP2's norm is sharded
        watched = [value for key, values in logs.items() if key.startswith(("loss_", "grad_norm_"))
                   for value in values]
        bad = ~torch.stack(watched).isfinite().all()
        flags = torch.stack([bad.float(), torch.full_like(bad, len(self.signals), dtype=torch.float)])
        bad, signalled = self.accelerator.reduce(flags).tolist()  # waits for the device
        self.signalled = signalled > 0
        if bad:
            self.skip(name, logs)
        else:
            self.optimizers[name].step()
            self.skipped_in_a_row[name] = 0
            for key, values in logs.items():
                self.logs.setdefault(key, []).extend(values)
            for parameter in self.parameters[name].values() if self.args.use_8bit_adam else ():
                if parameter.ndim == 4:  # bitsandbytes made it contiguous
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.optimizers[name].zero_grad(set_to_none=True)
        self.schedules[name].step()
        if name == "generator":
            for term in self.terms.values():
                term.after_update(self)
            if self.ema is not None:
                self.ema.to(self.accelerator.device)
                self.ema.step(self.parameters[name].values())
                self.ema.to(self.ema_device)

    def skip(self, name, logs):
        """Count a skipped update, and warn which values are not finite."""
        self.skipped[name] += 1
        self.skipped_in_a_row[name] += 1
        found = [key for key, values in logs.items() if not torch.stack(values).isfinite().all()]
        logger.warning("step %d: the %s's update is skipped, not finite: %s", self.step + 1, name,
                       ", ".join(found) or "values of another process")

    def stop_reason(self):
        """Why the run ends after this step, or None: a signal, or too many skipped updates."""
        if self.signalled:
            return f"ended by {self.signals[0] if self.signals else 'a signal to another process'}"
        for name, count in self.skipped_in_a_row.items():
            if count >= MAX_SKIPPED:
                return f"{count} updates of the {name} in a row were not finite and skipped; {LOWER}"
        return None

    def observe(self, metrics):
        """Log metrics and show them to the observers; returns the first reason to end the run, or None."""
        shown = {name: f"{value:.3g}" for name, value in metrics.items()
                 if name in SHOWN or name.startswith("validation_")}
        left = metrics.get("seconds_per_step", 0) * (self.args.max_train_steps - self.step)
        logger.info("step %d of %d: %s%s", self.step, self.args.max_train_steps,
                    ", ".join(f"{name} {value}" for name, value in shown.items()),
                    f"; {timedelta(seconds=round(left))} left" * bool(left))
        self.accelerator.log(metrics, step=self.step)
        if self.accelerator.is_main_process:
            with open(Path(self.args.output_dir) / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step, **metrics}) + "\n")
        reasons = [observer.observe(self, metrics) for observer in self.observers.values()]
        return next(filter(None, reasons), None)

    def pop_metrics(self):
        """Means of the logs since the last call, skipped updates, seconds per step, learning rates."""
        metrics = {}
        if self.logs:
            means = torch.stack([torch.stack(values).float().mean() for values in self.logs.values()])
            metrics = dict(zip(self.logs, self.accelerator.reduce(means, reduction="mean").tolist()))
        metrics |= {f"skipped_{name}": count for name, count in self.skipped.items()}
        metrics["seconds_per_step"] = sum(self.seconds) / len(self.seconds)
        self.logs, self.seconds = {}, []
        return metrics | {f"lr_{name}": value.get_last_lr()[0] for name, value in self.schedules.items()}

    @contextlib.contextmanager
    def averaged_generator(self):
        """Yield the generator, with EMA weights if there are any."""
        parameters = self.parameters["generator"].values()
        if self.ema is not None:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        yield self.accelerator.unwrap_model(self.models.generator)
        if self.ema is not None:
            self.ema.restore(parameters)

    def checkpoint_size(self):
        """Bytes of a checkpoint: float32 weights, Adam's moments (8-bit Adam: one byte each), the EMA."""
        sizes = {name: sum(value.nbytes for value in self.parameters[name].values()) for name in TRAINED}
        moments = 0.5 if self.args.use_8bit_adam else 1 + (self.args.adam_beta1 > 0)
        return int(sum(sizes.values()) * (1 + moments) + sizes["generator"] * self.args.use_ema)

    def parts(self):
        """The parts of the state that have a state_dict of their own, by kind and name as in trainer.pt."""
        return {"optimizers": self.optimizers, "schedules": self.schedules, "terms": self.terms,
                "observers": self.observers}

    def save(self):
        """Write a checkpoint aside, flush and rename it, then delete the oldest; every process calls it."""
        output_dir, limit = Path(self.args.output_dir), self.args.checkpoints_total_limit
        final, aside = output_dir / f"checkpoint-{self.step}", output_dir / f"unfinished-{self.step}"
        with exit_on_error(f"--output_dir {output_dir}: step {self.step} cannot be saved",
                           "earlier checkpoints are intact", unfinished=aside):
            aside.mkdir(exist_ok=True)
            parts = {kind: {name: part.state_dict() for name, part in held.items()}
                     for kind, held in self.parts().items()}
            parts |= {"ema": self.ema.state_dict() if self.ema else {},
                      "scales": {name: term.scale for name, term in self.terms.items()},
                      "logs": {name: [*self.accelerator.reduce(torch.stack(values), reduction="mean")]
                               for name, values in self.logs.items()}}  # of a step that a signal cut short
            self.models.layout.save(aside, self, parts)
            if self.accelerator.is_main_process:
                torch.save(parts, aside / "trainer.pt")
                files = sorted(aside.iterdir())
                for path in files:  # safetensors leaves its files to their owner alone
                    shutil.copymode(aside / "trainer.pt", path)
                state = {name: getattr(self, name) for name in POSITION} | {
                    "args": saved_args(self.args), "prompts": self.prompts.digest,
                    "configurations": self.args.configurations, "facts": self.facts,
                    "files": {path.name: path.stat().st_size for path in files},
                    "digests": digests_of(files)}
                (aside / "state.json").write_text(json.dumps(state, indent=2))
                os.sync()
                if final.exists():  # from before the run was resumed at an earlier step
                    final.rename(output_dir / f"unfinished-{final.name}")
                os.replace(aside, final)
                os.sync()
                for folder in list_checkpoints(output_dir)[:-limit] if limit else []:
                    folder.rename(output_dir / f"unfinished-{folder.name}")  # half deleted, it must not count
                for folder in output_dir.glob("unfinished-*"):
                    shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
        logger.info("saved %s", final)

    def load(self, folder):
        """Restore the whole state of the run from a checkpoint."""
        for name in POSITION:
            setattr(self, name, self.args.state.get(name, getattr(self, name)))
        flag, remedy = f"--resume_from_checkpoint {folder}", "use an earlier one"
        if "digests" not in self.args.state:
            logger.warning("%s has no digests, so bit rot in its files would go unnoticed", folder.name)
        with exit_on_error(f"{flag}: trainer.pt is damaged", remedy):
            saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
            self.logs = tree_map(lambda value: value.to(self.accelerator.device), saved.get("logs", {}))
            for kind, held in self.parts().items():
                for name, part in held.items():
                    if name in saved.get(kind, {}) or name in TRAINED:  # a new observer has no state yet
                        part.load_state_dict(saved[kind][name])
            for name, scale in saved.get("scales", {}).items():
                self.terms[name].scale = scale
            if self.ema is not None:
                self.ema.load_state_dict(saved["ema"])
                self.ema.to(self.ema_device)
        with exit_on_error(f"{flag} is damaged", remedy):
            self.models.layout.load(folder, self)
        logger.info("resumed from %s", folder)


# ----------------------------------------------------------------------------------------------------- models

WEIGHTS_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass
class Models:
    """Everything that a step needs."""

    family: Family
    process: VariancePreserving  # forward process of reference and assistant
    generator_process: VariancePreserving  # the process under which the generator's output is read
    layout: Replicated  # or FullySharded: how networks are divided over the processes
    pipeline: diffusers.DiffusionPipeline  # text encoders, tokenizers, VAE; its denoiser is the reference's
    reference: Module
    assistant: Module
    generator: Module
    reward_vae: Module
    rewards: dict  # {name: (scale, function of images and prompts)}; a --validation_reward has scale 0
    decode_batch_size: int
    latent_shape: tuple  # (C, h, w) of the network's latents
    encoding: dict  # further arguments of the family's `encode_prompts`
    text_encoders: Module
    scorers: Module  # the rewards and their VAE
    using: object  # module -> context in which it is on the device

    @property
    def trained_rewards(self):
        return {name: reward for name, reward in self.rewards.items() if reward[0]}


def trainable_parameters(network):
    """The trainable parameters by name; of a LoRANetwork, those of its own LoRA."""
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


class ClipReward(Module):
    """A CLIP-type preference model: the plain cosine similarity of image and prompt (PickScore: about 0.22).

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
    """Cast any module to `dtype`; the `to` of some classes refuses."""
    return torch.nn.Module.to(module, dtype=dtype)


def from_pretrained(kind, name_or_path, **more):
    """(model, report on its weights), in half precision if a folder or repository has no other files."""
    try:
        return kind.from_pretrained(name_or_path, output_loading_info=True, **more)
    except OSError as error:
        if more.get("variant") or "file named" not in str(error):
            raise
        with contextlib.suppress(OSError):
            return kind.from_pretrained(name_or_path, output_loading_info=True, **more | {"variant": "fp16"})
        raise


def load(kind, name_or_path, dtype=None, **more):
    """Load a pretrained component (models frozen, in `dtype`); missing weights or files are an error."""
    part = " ".join(filter(None, (str(name_or_path), more.get("subfolder"))))
    with exit_on_error(f"{part} cannot be loaded as a {kind.__name__}"):
        if not issubclass(kind, torch.nn.Module):
            loaded = kind.from_pretrained(name_or_path, **more)
            if hasattr(loaded, "get_vocab") and len(
                    {*loaded.get_vocab()} - {*loaded.all_special_tokens}) < 2:  # the library made it up
                raise ValueError("its files are missing")
            if getattr(loaded, "model_max_length", 0) > 10**6:
                raise ValueError("its tokenizer_config.json lacks model_max_length (77 for CLIP)")
            return loaded
        if issubclass(kind, transformers.PreTrainedModel):  # otherwise its configuration decides
            more["torch_dtype"] = dtype or torch.float32
        model, report = from_pretrained(kind, name_or_path, **more)
        if report["missing_keys"]:  # the libraries would use random ones
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        check_finite(dict(model.named_parameters()))
    return cast(model, dtype).requires_grad_(False).eval()


def check_finite(weights):
    """Raise ValueError if one of the weights {name: tensor} is no tensor, infinite or not a number."""
    if bad := [str(name) for name, value in weights.items()
               if not isinstance(value, torch.Tensor) or not value.isfinite().all()]:
        raise ValueError(f"not everything in it is a finite weight: {', '.join(bad[:3])}")


def load_pipeline(family, args, dtype, network=None):
    """The reference pipeline, frozen; a given `network` replaces its denoiser."""
    place, kind = args.pretrained_model_name_or_path, getattr(diffusers, family.pipeline_class)
    config = {}
    with contextlib.suppress(OSError):
        config = kind.load_config(place, revision=args.revision)
    parts = {family.network_name: network or load_reference(family, args, dtype)}
    for name, class_name in family.components.items():
        if config.get(name, [class_name])[0] is None:  # SD3 without T5
            parts[name] = None
            continue
        more, where, own_dtype = {"subfolder": name, "revision": args.revision}, place, dtype
        component = getattr(diffusers, class_name, None) or getattr(transformers, class_name)
        if name == "vae" and args.pretrained_vae_model_name_or_path:
            more, where = {}, args.pretrained_vae_model_name_or_path
        elif issubclass(component, torch.nn.Module):
            more["variant"] = args.variant
            own_dtype = torch.float32 if name == "vae" and family.vae_in_float32 else dtype
        parts[name] = load(component, where, own_dtype, **more)
    pipeline = kind(**parts, **family.pipeline_arguments(config))
    with exit_on_error(f"--pretrained_model_name_or_path {place}"):
        family.check_pipeline(pipeline)
    return pipeline


def find_network(family, name_or_path):
    """(configuration, subfolder) of the denoiser in a network or pipeline, a folder or hub id."""
    kind, place = getattr(diffusers, family.network_class), Path(name_or_path)
    if not place.is_dir() or (place / family.network_name).is_dir():  # else diffusers reads the folder's own
        with contextlib.suppress(OSError):
            return kind.load_config(name_or_path, subfolder=family.network_name), family.network_name
    return kind.load_config(name_or_path), None


def resolve_weights(family, name_or_path):
    """The weights or LoRA file that a flag names, downloaded if on the hub; None for a whole model."""
    if extra_path("starts").is_file():
        return load_extra("starts", name_or_path).find_weights(name_or_path, family.network_name)
    if Path(name_or_path).exists() or not name_or_path.endswith(WEIGHTS_FILES):
        return Path(name_or_path) if Path(name_or_path).is_file() else None
    owner, name, file = ["", "", *name_or_path.split("/", 2)][-3:]
    return Path(hf_hub_download(f"{owner}/{name}", file))


def load_network(family, name_or_path, base, shared=False):
    """(network, LoRA or None) that a flag names, for reference, generator and preference model alike.

    A flag names `reference`, a pipeline or network, a weights file, or a LoRA on `base`, the
    reference's network. For `reference` or a LoRA, the network is `base` itself if `shared`, else a copy.
    """
    path = None if name_or_path == "reference" else resolve_weights(family, name_or_path)
    with init_empty_weights(include_buffers=False):  # so that memory holds no second copy
        network = type(base).from_config(base.config).eval()
    weights, lora = {}, None
    if path:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if weights.keys() != network.state_dict().keys():
            weights, lora = load_extra("starts", f"the form of the weights in {path}").understand(
                weights, path, network, family.network_name, family.lora_saver)
        check_finite(lora[0] if lora else weights)
    elif name_or_path != "reference":
        weights = load(type(base), name_or_path, subfolder=find_network(family, name_or_path)[1]).state_dict()
    if name_or_path == "reference" or lora:
        return base if shared else copy.deepcopy(base), lora
    lacking, foreign = network.load_state_dict(weights, strict=False, assign=True)
    if lacking or foreign:
        raise ValueError(f"it lacks {', '.join(lacking[:2]) or 'nothing'}, and has"
                         f" {', '.join(foreign[:2]) or 'nothing'} in excess")
    return network, None


def load_reference(family, args, dtype):
    """The frozen reference: the pipeline's own network, or the one that --reference_unet names."""
    kind, name = getattr(diffusers, family.network_class), args.reference_unet
    flag = f"--reference_{family.network_name} {name}"
    if name and resolve_weights(family, name) is None:
        return load(kind, name, dtype, subfolder=find_network(family, name)[1])
    own = load(kind, args.pretrained_model_name_or_path, dtype, subfolder=family.network_name,
               revision=args.revision, variant=args.variant)
    if not name:
        return own
    with exit_on_error(f"{flag} does not fit the pipeline's network"):
        return freeze(family, *load_network(family, name, own, shared=True), dtype)


def freeze(family, network, lora, dtype):
    """A frozen network in `dtype`, with its LoRA, if any, fused into its weights."""
    if lora:
        network = load_extra("lora", "a LoRA").fuse(network, lora)
    return cast(network, dtype).requires_grad_(False).eval()


def load_generator(family, args, reference, dtype):
    """The generator: float32 weights to train, or a LoRA on frozen weights, possibly the reference's."""
    shared = args.shared_base == "all" and args.generator_lora_rank
    with exit_on_error(f"--generator_init {args.generator_init} does not fit the reference's network"):
        network, lora = load_network(family, args.generator_init, reference, shared)
        if shared and network is not reference:
            raise ValueError("a whole network cannot share the base: choose --shared_base assistant, or start"
                             " from `reference` or a LoRA on it")
        if not args.generator_lora_rank:
            return freeze(family, network, lora, torch.float32).requires_grad_(True)
        network, extra = network if shared else cast(network, dtype), load_extra("lora", "a LoRA")
        if lora:
            return extra.load(network, "generator", lora, args.generator_lora_rank)
    with exit_on_error(f"--lora_layers {args.lora_layers}"):
        return extra.make(family, args, network, "generator", args.generator_lora_rank)


def import_factory(name):
    """The object that MODULE:FACTORY names, from an installed module or a file in the working directory."""
    module, _, factory = name.partition(":")
    sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), factory)


def find_rewards(args):
    """{name: (scale, loader of the reward in a dtype)}; the scale of a --validation_reward is 0."""
    found, model = {}, args.reward_model_name_or_path
    for name, scale in (args.reward | dict.fromkeys(args.validation_reward, 0)).items():
        module, flag = name.partition(":")[0], f"--{'' if scale else 'validation_'}reward {name}"
        with exit_on_error(flag, f"give one of {', '.join(REWARDS)} or an importable MODULE:FACTORY"):
            if name == "pickscore":
                source = PICKSCORE_PROCESSOR if model == PICKSCORE else model
                with exit_on_error(f"--reward_model_name_or_path {model}"):
                    processor = CLIPProcessor.from_pretrained(source)
                found[name] = scale, lambda dtype: ClipReward(load(CLIPModel, model, dtype), processor)
            elif module in REWARDS:
                found[module] = scale, load_extra("rewards", flag).find_reward(name)
            else:
                found[name] = scale, lambda dtype, factory=import_factory(name): factory()
    return found


def build_terms(args, models):
    """(the terms of the generator's loss in the order of summation, {name: observer})."""
    method, observers = method_of(args), {}
    terms = [Divergence(method)]
    if method.guided and method.cfg_mode == "out":
        terms.append(GuidanceReward(method))
    for extra in term_extras(args).values():
        more_terms, more_observers = extra.build(args, models, sys.modules[__name__])
        terms, observers = terms + more_terms, observers | more_observers
    if models.trained_rewards:
        terms.append(ExplicitReward(models, method))
    return terms, observers


def generator_process(args, process):
    """Forward process of the generator: the reference's, with --generator_prediction_type if it is given."""
    kind, flag = args.generator_prediction_type, "--generator_prediction_type"
    with exit_on_error(f"{flag} {kind}"):
        return load_extra("starts", flag).reading(process, kind) if kind else process


def load_models(family, args, process, rewards, accelerator):
    """Every network on its device: trained weights in float32, frozen ones in bf16 under mixed precision."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    device, loaded, layout = accelerator.device, {}, Replicated(accelerator)
    for name, (scale, loader) in rewards.items():  # loading leaves the random state alone
        flag = f"--{'' if scale else 'validation_'}reward {name}"
        with exit_on_error(flag), torch.random.fork_rng(devices=[]):
            loaded[name] = scale, loader(dtype)
    pipeline = load_pipeline(family, args, dtype)
    base = reference = getattr(pipeline, family.network_name)
    rank = args.assistant_lora_rank
    if args.sharding:
        layout = load_extra("sharding", "--sharding").FullySharded(family.sharded_blocks, device, dtype)
    generator = load_generator(family, args, base, dtype)  # placed or sharded before the next
    if not args.shared_base:
        layout.place(generator)
    assistant = base if args.shared_base else cast(copy.deepcopy(base), dtype if rank else torch.float32)
    if rank:
        with exit_on_error(f"--lora_layers {args.lora_layers}"):
            assistant = load_extra("lora", "a LoRA").make(family, args, assistant, "assistant", rank)
    else:
        assistant.requires_grad_(True)
    layout.place(assistant)
    layout.place(generator if args.shared_base else base)
    vae = pipeline.vae
    if args.reward_vae or args.enable_vae_tiling:
        vae = load_extra("decoding", "--reward_vae").reward_vae(args, pipeline, dtype, load)
    vae.to(memory_format=torch.channels_last)
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
    side, process = args.resolution // pipeline.vae_scale_factor // family.packing, process.to(device)
    encoding = {"resolution": args.resolution} | {name: getattr(args, name) for name in family.flags}
    if args.shared_base:
        reference = load_extra("lora", "--shared_base").LoRANetwork(base)
    return Models(
        family, process, generator_process(args, process), layout, pipeline, reference,
        layout.wrap(assistant), layout.wrap(generator), vae, loaded, args.decode_batch_size,
        (base.config.in_channels, side, side), encoding, text_encoders, scorers, using)


# ------------------------------------------------------------------------------------------------------- data

def read_prompts(args, flag="prompts_file"):
    """The non-empty prompts of the file that a flag names, else of --dataset_name, as text (`42` too)."""
    path, column = getattr(args, flag), args.caption_column
    source = f"--{flag} {path}" if path else f"--dataset_name {args.dataset_name}"
    limit = args.max_train_samples if flag == "prompts_file" else None
    with exit_on_error(f"--caption_column {column} of {source} cannot be read"):
        if path and path.lower().endswith(".txt"):
            with exit_on_error(source, "convert it to UTF-8", UnicodeDecodeError):
                values = Path(path).read_text(encoding="utf-8-sig").split("\n")
        elif path:
            values = load_extra("prompts", source).read_prompts(path, column)
        else:
            rows = load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split,
                                streaming=args.streaming)
            if rows.info.builder_name == "csv" and "__index_level_0__" in next(iter(rows), ()):
                raise ValueError("a .csv file has rows with more fields than its header")
            rows = rows.select_columns(column).cast(Features({column: Value("string")}))
            values = [row[column] or "" for row in itertools.islice(rows, limit)]
    prompts = [prompt for prompt in map(str.strip, values) if prompt]
    return prompts[:limit] or exit_with_error(f"{source} has no prompts")


class Prompts:
    """The run's prompts by position, shuffled anew each epoch; independent of processes and batch size."""

    def __init__(self, prompts, seed):
        self.prompts, self.seed, self.epoch, self.order = prompts, seed, None, None
        self.digest = hashlib.blake2b("\n".join(prompts).encode(), digest_size=16).hexdigest()

    def at(self, position):
        epoch, row = divmod(position, len(self.prompts))
        if epoch != self.epoch:
            rng = seeded_rng(self.seed, "prompts", epoch, 0)
            self.epoch, self.order = epoch, torch.randperm(len(self.prompts), generator=rng)
        return self.prompts[self.order[row]]


def warn_of_long_prompts(run):
    """Warn how many prompts are longer than the text encoder with the largest limit reads."""
    args, models, prompts = run.args, run.models, run.prompts.prompts[:1000]
    family_flags = {name: getattr(args, name) for name in models.family.flags}
    tokenizer, limit = models.family.prompt_limit(models.pipeline, **family_flags)
    tokens = tokenizer([*(args.validation_prompts or []), *prompts]).input_ids
    if too_long := sum(len(one) > limit for one in tokens):
        logger.warning("%d of the first %d prompts are longer than the text encoder reads, %d tokens, and are"
                       " cut", too_long, len(tokens), limit)


def warn_of_start(run):
    """After the first step, warn if the start's first samples were not of the scale of latents."""
    start, deviation = run.args.generator_init, run.logs.get("x0_std", [1])[0]
    if start != "reference" and not 1 / 3 < deviation < 3:
        logger.warning("--generator_init %s: its first samples have a standard deviation of %.3g, where"
                       " latents have about 1; check --generator_timesteps and --generator_prediction_type",
                       start, deviation)


# ------------------------------------------------------------------------------------------------- validation

BEFORE_AND_AFTER = "before_after.png"
GRID_SIDE = 8192  # pixels; largest side of a picture, as many readers refuse twice as much
SMALLEST, ROWS = 128, 40  # pixels to which small images are enlarged under captions; most rows of a grid


def score(name, reward, images, prompts):
    """A reward's scores (batch,) of images (batch, 3, H, W); exits if it returns anything else."""
    try:
        scores = reward(images, prompts)
    except (Exception, SystemExit) as error:  # raised again: its traceback leads into the user's code
        raise RuntimeError(f"--reward {name} failed with the prompts {prompts}") from error
    shape = tuple(getattr(scores, "shape", ()))
    if getattr(scores, "device", images.device) != images.device:
        exit_with_error(f"--reward {name} returned scores on {scores.device}, not on the images'"
                        f" {images.device}")
    if not isinstance(scores, torch.Tensor) or shape != (len(prompts),):
        exit_with_error(f"--reward {name} returned a {type(scores).__name__} of shape {shape}, not"
                        f" ({len(prompts)},)")
    return scores


def mean_reward(logs, rewards):
    """The mean of the logged rewards (batch,) weighted by their scales."""
    total = sum(scale for scale, _ in rewards.values())
    return sum(scale / total * logs[f"reward_{name}"] for name, (scale, _) in rewards.items())


def diversity(groups):
    """Mean std over noise of each prompt's images (N, 3, H, W), and of their means over prompts."""
    over_noise, mean, squares = 0.0, 0.0, 0.0
    for count, images in enumerate(groups, 1):
        over_noise += images.std(0).mean().item() if len(images) > 1 else 0.0
        change = images.mean(0).double() - mean
        mean, squares = mean + change / count, squares + change.square() * (count - 1) / count
    spreads = {"over_noise": over_noise / count} if len(images) > 1 else {}
    return spreads | ({"over_prompts": (squares / (count - 1)).sqrt().mean().item()} if count > 1 else {})


def sample_and_score(run, generator, indices, prompts):
    """Validation images from the noise of their indices, and their rewards: {name: (batch, ...)}."""
    args, models, timesteps = run.args, run.models, run.args.generator_timesteps
    z, *_ = sample_noise(args.seed, "validation", 0, indices, models.latent_shape, run.method, models.process,
                         run.accelerator.device, len(timesteps))
    conditioning, _ = encode(models, prompts, null=False)
    with run.accelerator.autocast():
        x0 = generate(generator, models.family, models.generator_process, z, timesteps, conditioning)
    with models.using(models.pipeline.vae):
        images = models.family.decode(models.pipeline.vae, x0).clamp(0, 1)
    with models.using(models.scorers), torch.enable_grad():  # for a reward that differentiates inside
        values = {f"reward_{name}": score(name, reward, images, prompts).detach().float()
                  for name, (_, reward) in models.rewards.items()}
    if models.trained_rewards:
        values["reward"] = mean_reward(values, models.trained_rewards)
    return values | {"images": images}


def validate(run):
    """Generate from validation prompts and fixed noise, score, write; returns means and diversities."""
    args, accelerator, columns = run.args, run.accelerator, run.args.num_validation_images
    prompts, parts = [prompt for prompt in args.validation_prompts for _ in range(columns)], []
    size = min(args.train_batch_size, args.decode_batch_size)
    across = columns if columns > 1 else min(ROWS, math.ceil(len(prompts)**0.5))
    down = min(ROWS, math.ceil(len(prompts) / across))
    side = min(args.resolution, int(0.75 * GRID_SIDE) // max(across, down))  # captions take a quarter
    starts = range(0, len(prompts), size * accelerator.num_processes)

    def groups():
        """The images of each prompt in turn; `parts` keeps them as small as the grid's."""
        waiting = []
        for start in tqdm(starts, "validation", leave=False,
                          disable=not (accelerator.is_main_process and sys.stderr.isatty())):
            first = start + accelerator.process_index * size
            indices = [index % len(prompts) for index in range(first, first + size)]
            values = sample_and_score(run, generator, indices, [prompts[index] for index in indices])
            values = tree_map(lambda value: value.cpu()[:len(prompts) - start], accelerator.gather(values))
            waiting += values["images"]
            shown_images = values["images"][:max(1, across * down - start)]  # never none to resize
            parts.append(values | {"images": resize(shown_images, side, antialias=True)})
            while len(waiting) >= columns:
                yield torch.stack(waiting[:columns])
                del waiting[:columns]

    with torch.no_grad(), run.averaged_generator() as generator:
        spreads = diversity(groups())
    scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    images = scores.pop("images")
    if accelerator.is_main_process:
        listed = {name: values.tolist() for name, values in scores.items()}
        write_validation(run, images[:across * down], across, {"prompt": prompts} | listed)
    return {f"validation_{name}": values.mean().item() for name, values in scores.items()} | {
        f"validation_diversity_{name}": value for name, value in spreads.items()}


def draw(path, images, captions, across):
    """Save images (N, 3, H, W) in [0, 1] in rows of `across`, each below its caption.

    Returns the place of each in the file: (left, top, right, bottom) in pixels.
    """
    side = images.shape[-1] * max(1, min(SMALLEST, GRID_SIDE // across) // images.shape[-1])
    font, gap, boxes = ImageFont.load_default(max(11, side // 24)), max(6, side // 40), []
    line, letters = math.ceil(1.3 * font.size), max(8, int(side / font.getlength("n")))
    width, height = side + gap, side + 3 * line + gap
    sheet = Image.new("RGB", (gap + across * width, math.ceil(len(images) / across) * height), "white")
    for index, (image, caption) in enumerate(zip((images * 255).round().byte(), captions)):
        left, top = gap + index % across * width, index // across * height + 3 * line
        sheet.paste(to_pil_image(image).resize((side, side), Image.Resampling.NEAREST), (left, top))
        words = textwrap.fill(caption, letters, max_lines=3, placeholder=" ...")
        ImageDraw.Draw(sheet).text((left, top - 2), words, "black", font, "ld", spacing=2)
        boxes.append((left, top, left + side, top + side))
    sheet.save(path)
    return boxes


def write_validation(run, images, across, table):
    """Write a grid of images (N, 3, H, W) and a JSON row for each, and log them to the trackers."""
    path = Path(run.args.output_dir) / "validation" / f"step-{run.step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    boxes = draw(path, images, table["prompt"], across)
    rows = [dict(zip(table, row)) for row in zip(*table.values())]
    rows = [row | {"box": box} for row, box in itertools.zip_longest(rows, boxes)]  # None: it is not shown
    path.with_suffix(".json").write_text(json.dumps(rows, indent=2))
    for tracker in run.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": images.permute(0, 2, 3, 1).numpy()}, run.step, **layout)


def read_boxes(path):
    """{prompt: the box of its first image} of a validation's grid."""
    rows = json.loads(path.with_suffix(".json").read_text())
    return {row["prompt"]: row["box"] for row in rows[::-1] if row.get("box")}


def first_grid(args):
    """(its path, prompts to compare) of the run's first validation that had the present prompts."""
    prompts = [*dict.fromkeys(args.validation_prompts)][:8]
    grids = sorted(Path(args.output_dir, "validation").glob("step-*.png"))
    return next(path for path in grids if {*prompts} <= {*read_boxes(path)}), prompts


def draw_before_and_after(run):
    """Save the first image of up to eight prompts, of their first validation in the run and of the last."""
    first, prompts = first_grid(run.args)
    images, captions = [], []
    for path in (first, first.with_name(f"step-{run.step:06d}.png")):
        boxes = read_boxes(path)
        with Image.open(path) as grid:
            images += [pil_to_tensor(grid.crop(boxes[prompt])) for prompt in prompts]
        captions += [f"step {int(path.stem[5:])}: {prompt}" for prompt in prompts]
    draw(Path(run.args.output_dir, BEFORE_AND_AFTER), torch.stack(images) / 255, captions, len(prompts))


def watch(run):
    """Validate, show the metrics to the observers, draw; returns a reason to end the run, or None."""
    stop, output_dir = run.observe(validate(run)), Path(run.args.output_dir)
    if run.accelerator.is_main_process:
        try:
            draw_before_and_after(run)
            if extra_path("card").is_file() and importlib.util.find_spec("matplotlib"):
                load_extra("card", "curves.png").plot_curves(
                    output_dir / "metrics.jsonl", output_dir / "curves.png")
        except Exception as error:  # a run can do without its pictures
            logger.warning("%s or curves.png could not be redrawn: %s", BEFORE_AND_AFTER, error)
    return stop


# ----------------------------------------------------------------------------------------------------- export

def shown(name):
    """A model's name for the card, without local folders."""
    return Path(name).name if Path(name).exists() else name


def rewards_in_words(args):
    """What the generator maximises, with scales: `100 x pickscore`, or `none`."""
    terms = [f"{scale:g} x {short_name(reward)}" for reward, scale in args.reward.items()]
    terms += [line for extra in term_extras(args).values() for line in extra.card_lines(args, shown)]
    return " + ".join(terms) or "none"


LORA_HEADING = """
The LoRA alone, on the models that it was trained on:

"""


def write_card(run, name, more="", lora_only=False):
    """Write README.md, whose code loads `name`, a folder or hub repository, or with `lora_only` its LoRA.

    `more` is appended to the arguments of `from_pretrained`.
    """
    args, pipeline, kind = run.args, run.models.pipeline, type(run.models.pipeline).__name__
    base = args.pretrained_model_name_or_path
    prompt = (args.validation_prompts or ["a lighthouse in a storm"])[0]
    absent = "".join(f", {part}=None" for part, held in pipeline.components.items()
                     if held is None and part not in pipeline._optional_components)  # SD3's T5
    own = {name: getattr(args, name) for name, settings in run.models.family.flags.items()
           if getattr(args, name) != settings.get("default")}
    call = run.models.family.call_arguments(run.models.generator_process, args.generator_timesteps)
    call = ", ".join(f"{key}={value!r}" for key, value in (call | own).items())
    start, reference = shown(args.generator_init), shown(args.reference_unet or base)
    steps = "one-step" if len(args.generator_timesteps) == 1 else f"{len(args.generator_timesteps)}-step"
    tags = ["diffusers", "text-to-image", steps, "diff-instruct-star", "diffusers-training"]
    tags += ["lora"] * bool(args.generator_lora_rank)
    data = ModelCardData(
        base_model=None if Path(base).exists() else base, license="other", license_name="of-its-sources",
        library_name="diffusers", pipeline_tag="text-to-image", generator_timesteps=args.generator_timesteps,
        resolution=args.resolution, reward=[*map(short_name, args.reward)], tags=tags, **own)
    imports = "import torch\n" * ("torch." in more) + f"from diffusers import {kind}"
    codes = [f"{imports}\n\npipeline = {kind}.from_pretrained({name!r}{more}{absent})"]
    if args.generator_lora_rank and hasattr(getattr(diffusers, kind), "load_lora_weights"):
        codes.append(load_extra("lora", "--generator_lora_rank").loading_code(run, name, absent, shown))
    blocks = [f"""```python
{code}
image = pipeline(prompt={prompt!r}, {call}, guidance_scale=0,
                 height={args.resolution}, width={args.resolution}).images[0]
image.save("image.png")
```
""" for code in codes[lora_only:]]
    section = load_extra("card", "the card").validation_section(args, first_grid) if (
        args.validation_prompts and extra_path("card").is_file()) else ""
    # Not load_or_create_model_card: it asks the hub for a card first, and leaves gaps to fill in.
    ModelCard(f"""---
{data.to_yaml()}
---

# {name}

A {steps} text-to-image generator, trained with [Diff-Instruct*](https://arxiv.org/abs/2410.20898), recipe
`{args.recipe}`, for {run.step} updates on {run.facts["prompts"]} prompts and no images,
on {run.facts["hardware"]}.
It started from `{start}`; the reference is `{reference}`; the reward is {rewards_in_words(args)}.

{LORA_HEADING.join(blocks)}
It was trained for exactly this schedule, without guidance. It has no safety checker, and its licence is that
of the models it derives from.

{section}""").save(Path(args.output_dir) / "README.md")


def create_repository(args):
    """Make the repository of --push_to_hub, so that a wrong name or token is found before the training."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    with exit_on_error(f"--hub_model_id: no repository {name}", "run `hf auth login`, or give another name"):
        args.hub_model_id = create_repo(name, exist_ok=True, token=args.hub_token).repo_id


def copy_tokenizers(args, pipeline, folder):
    """Give an exported pipeline the reference's own tokenizers, their files and the names of their classes.

    Release 5 of transformers saves fewer files than release 4 needs, under other names of classes.
    """
    place, index = args.pretrained_model_name_or_path, json.loads((folder / "model_index.json").read_text())
    names = [name for name, part in pipeline.components.items() if name.startswith("tokenizer") and part]
    if not Path(place).is_dir():
        place = snapshot_download(place, revision=args.revision, allow_patterns=["*.json", "tokenizer*/*"])
    with contextlib.suppress(OSError):
        index |= {name: type(pipeline).load_config(place)[name] for name in names}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in names:
        for path in filter(Path.is_file, (Path(place) / name).iterdir()):
            shutil.copyfile(path, folder / name / path.name)
        model = getattr(getattr(getattr(pipeline, name), "backend_tokenizer", None), "model", None)
        if type(model).__name__ == "BPE" and not (folder / name / "merges.txt").exists():
            model.save(str(folder / name))  # vocab.json and merges.txt


def export(run):
    """Save the finished pipeline, LoRA file and card, and upload them if asked; every process calls it."""
    args, family, output_dir = run.args, run.models.family, Path(run.args.output_dir)
    aside = output_dir / "unfinished-export"
    with run.averaged_generator() as generator, exit_on_error(
            f"--output_dir {output_dir}: the result cannot be written", f"retry with {RESUME}",
            unfinished=aside):
        generator = run.models.layout.gather(generator)
        if not run.accelerator.is_main_process:
            return
        if args.generator_lora_rank:
            generator = load_extra("lora", "--generator_lora_rank").export(family, generator, aside)
        finished = load_pipeline(family, args, torch.float32, generator)  # the other parts uncast
        finished.scheduler = run.models.generator_process.exported_scheduler(run.models.pipeline.scheduler)
        finished.save_pretrained(aside)
        copy_tokenizers(args, finished, aside)
        for path in aside.rglob("*.safetensors"):  # safetensors leaves its files to their owner alone
            shutil.copymode(aside / "model_index.json", path)
        for path in aside.iterdir():
            shutil.rmtree(output_dir / path.name, ignore_errors=True)
            path.replace(output_dir / path.name)
        aside.rmdir()
    name = args.hub_model_id or output_dir.resolve().name
    write_card(run, name)
    if args.push_to_hub:
        published = ["README.md", BEFORE_AND_AFTER, "model_index.json", "*lora_weights*"]
        published += [f"{part}/*" for part, held in finished.components.items() if held is not None]
        with exit_on_error("--push_to_hub", f"the result is complete in {output_dir}: retry with {RESUME}"):
            upload_folder(repo_id=name, folder_path=output_dir, token=args.hub_token,
                          commit_message="Diff-Instruct* training", allow_patterns=published)


# ------------------------------------------------------------------------------------------- flags and checks

# Rows of the paper's Table 2: divergence, alpha_rew, alpha_cfg, guidance mode. `known_recipes` adds
# di_star_dpo, whose reference is the family's `dpo_unet`.
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
DECODED_PIXELS = (2**31 - 1) // 256  # at once: the decoder's kernels cannot index 2^31 values
LOOKED_UP = ("generator_timesteps", "resolution")  # by utils/starts.py; a script alone has the defaults
RECIPE_FLAGS = ("divergence", "reward_scale", "cfg_scale", "cfg_mode", "reference_unet")
REWARDS = ("pickscore", "hpsv2.1", "hpsv2.0", "imagereward", "clip", "aesthetic", "mps")
# {file of utils/: {flag: default}}, listed here for a script that is copied alone.
EXTRAS = {
    "config": {"config": None}, "memory": {"dry_run": False}, "sharding": {"sharding": None},
    "offload": {"offload": False}, "starts": {"generator_prediction_type": None},
    "decoding": {"reward_vae": None, "enable_vae_tiling": False},
    "lora": {"generator_lora_rank": 0, "assistant_lora_rank": 0, "lora_alpha": None, "lora_layers": None,
             "shared_base": None},
    "terms/preference": {"preference_unet": None, "preference_scale": 1.0},
    "terms/alarms": {"min_diversity": None}, "terms/own": {"term": [], "observer": []}}
SAMPLES = "train_batch_size x gradient_accumulation_steps x processes"  # in args.json beside the flags
# `state` is the checkpoint's state.json; `configurations` are what utils/places.py found in local models.
UNSAVED = ("hub_token", "config", "resume_from_checkpoint", "extras", "state", "configurations",
           "warnings")
# {group: {flag: settings}}. Besides argparse's settings: `needs`, flags of which one must be given too;
# `excludes`, flags that must not be; `resumable`, whether a resumed run may have another value.
OWN_SETTINGS = ("needs", "excludes", "resumable")
FLAGS = {
    "models": {
        "pretrained_model_name_or_path": {"help": "Reference pipeline: a folder or hub id."},
        "revision": {"help": "Revision of the reference pipeline on the hub."},
        "variant": {"help": "Weights variant of the reference pipeline, such as fp16."},
        "pretrained_vae_model_name_or_path": {"help": "VAE that replaces the pipeline's."},
        "reference_unet": {
            "help": "Network that replaces the reference pipeline's, such as a DPO model; any form that"
                    " --generator_init takes except `reference`."},
        "generator_init": {
            "help": "Start of the generator: `reference` (to distil it with --recipe sim), a pipeline or"
                    " network, a weights file (on the hub: owner/name/file), or a LoRA on the reference, in"
                    " the names of diffusers, PEFT or kohya."},
        "generator_timesteps": {"nargs": "+", "metavar": "T", "type": "timestep",
            "help": "Timestep of the one-step generator; for several steps, all timesteps in decreasing"
                    " order, such as 999 749 499 249 for DMD2's four-step models."},
    },
    "method": {
        "recipe": {"default": "di_star_in",
            "help": "Row of the paper's tables: values of the next four flags; explicit flags win."},
        "divergence": {"choices": ["score", "kl"],
            "help": "Divergence from the reference: score-based (theorem 3.1), or the KL of"
                    " Diff-Instruct(++)."},
        "reward_scale": {"type": "non_negative_float",
            "help": "alpha_rew of (3.1), the scale of rewards that are given without one."},
        "cfg_scale": {"type": "non_negative_float",
            "help": "Guidance scale, the paper's alpha_cfg; with --cfg_mode in, 1 or less means no"
                    " guidance."},
        "cfg_mode": {"choices": ["in", "out"],
            "help": "in: guide the reference; out: add guidance as the implicit reward (3.6)."},
        "score_gradient": {"choices": ["full", "detached"], "default": "full",
            "help": "Differentiate through both score networks (theorem 3.1), or through neither (listing"
                    " 1)."},
        "distance": {"choices": ["pseudo_huber", "l2"], "default": "pseudo_huber",
            "help": "Distance d of (3.2) between the scores."},
        "pseudo_huber_c": {"type": "positive_float", "default": 0.1,
            "help": "Constant c of (3.7), in the units set by --weighting (not in the paper)."},
        "weighting": {"choices": ["clean", "score", "dmd"], "default": "clean",
            "help": "Units in which w(t) = 1: clean predictions (listing 1) or scores. `dmd`: clean"
                    " predictions, weighted by 1 / mean |x0 - D_reference| per sample."},
        "assistant_updates": {"type": "positive_int", "default": 1,
            "help": "Assistant updates before each generator update, K_TA of Algorithm 1 (not in the paper;"
                    " DMD2 uses 5)."},
        "min_timestep": {"type": "non_negative_int", "default": 20, "help": "Smallest t of x_t (DMD2: 20)."},
        "max_timestep": {"type": "non_negative_int", "default": 979, "help": "Largest t of x_t (DMD2: 980)."},
        "timestep_sampling": {"choices": ["uniform", "logit_normal"], "default": "uniform",
            "help": "Distribution of t in that range; logit_normal: sigmoid of a normal (not in the paper)."},
        "logit_mean": {"type": "float", "default": 0.0, "help": "Mean of the logit (SD3's)."},
        "logit_std": {"type": "positive_float", "default": 1.0,
            "help": "Standard deviation of the logit (SD3's)."},
    },
    "reward and further terms": {
        "reward": {"action": "append", "type": "name_and_scale", "metavar": "NAME[=SCALE]",
            "help": f"Reward to maximise; repeat the flag to sum rewards. {', '.join(REWARDS)}, NAME:LOCATION"
                    " for other weights, or MODULE:FACTORY, where FACTORY() returns a function from images"
                    " (batch, 3, H, W) in [0, 1] and a list of prompts to scores (batch,). All but"
                    " pickscore and your own need utils/rewards.py."},
        "reward_steps": {"choices": ["last", "all"], "default": "last",
            "help": "Which steps of a few-step generator are rewarded."},
        "reward_model_name_or_path": {"default": PICKSCORE,
            "help": "CLIP-type model for `pickscore`, with its processor: a folder or hub id."},
    },
    "prompts": {
        "dataset_name": {"resumable": True,
            "help": "Dataset of captions, a hub id or folder; its images are not read."},
        "dataset_config_name": {"resumable": True, "help": "Configuration of the dataset."},
        "dataset_split": {"resumable": True, "default": "train", "help": "Split of the dataset."},
        "streaming": {"resumable": True, "action": "store_true",
            "help": "Read the captions without downloading the dataset."},
        "prompts_file": {"resumable": True,
            "help": "File of prompts in place of a dataset: .txt, one prompt per line; with utils/prompts.py"
                    " beside the script also .csv, .tsv, .jsonl or .parquet."},
        "caption_column": {"resumable": True, "default": "text", "help": "Column that holds the prompts."},
        "max_train_samples": {"resumable": True, "type": "positive_int",
            "help": "Use only the first N prompts."},
    },
    "training": {
        "seed": {"type": "non_negative_int", "default": 0,
            "help": "Seed of the noise, the timesteps and the order of prompts."},
        "resolution": {"type": "positive_int", "help": "Height and width of the images in pixels."},
        "train_batch_size": {"resumable": True, "type": "positive_int", "default": 4,
            "help": "Samples per device and batch (not in the paper)."},
        "gradient_accumulation_steps": {"resumable": True, "type": "positive_int", "default": 1,
            "help": "Batches to accumulate per optimizer step."},
        "max_train_steps": {"resumable": True, "type": "positive_int", "default": 1000,
            "help": "Generator updates (not in the paper)."},
        "learning_rate": {"type": "non_negative_float",
            "help": "Learning rate of the generator (not in the paper)."},
        "assistant_learning_rate": {"type": "non_negative_float",
            "help": "Learning rate of the assistant (default: --learning_rate)."},
        "lr_scheduler": {
            "default": "constant_with_warmup", "choices": [
                "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
            "help": "Schedule of both learning rates."},
        "lr_warmup_steps": {"type": "non_negative_int", "default": 0,
            "help": "Warm-up in generator updates."},
        "lr_num_cycles": {"type": "positive_int", "default": 1, "help": "Cycles of cosine_with_restarts."},
        "lr_power": {"type": "positive_float", "default": 1.0, "help": "Power of the polynomial schedule."},
        "use_8bit_adam": {"action": "store_true", "help": "Use the 8-bit Adam of bitsandbytes."},
        "adam_beta1": {"type": "fraction", "default": 0.0, "help": "beta1 of Adam (listing 1)."},
        "adam_beta2": {"type": "fraction", "default": 0.999, "help": "beta2 of Adam (listing 1)."},
        "adam_weight_decay": {"type": "non_negative_float", "default": 0.0, "help": "Weight decay of AdamW."},
        "adam_epsilon": {"type": "positive_float", "default": 1e-8, "help": "Epsilon of Adam."},
        "max_grad_norm": {"type": "positive_float", "default": 10.0,
            "help": "Norm to which the gradients of each network are clipped (DMD2)."},
        "use_ema": {"action": "store_true",
            "help": "Average the generator's weights and export the average."},
        "ema_decay": {"type": "fraction", "default": 0.999,
            "help": "Decay of the average; smaller in the first updates (not in the paper)."},
        "offload_ema": {"resumable": True, "action": "store_true",
            "help": "Keep the average on the CPU between its updates."},
        "mixed_precision": {"metavar": "{no,bf16}", "help": "Precision of autocast (default: accelerate's)."},
        "gradient_checkpointing": {"resumable": True, "action": "store_true",
            "help": "Recompute activations to save memory."},
        "decode_batch_size": {"resumable": True, "type": "positive_int",
            "help": "Images to decode and score at once (default: as many as the decoder's kernels allow)."},
        "allow_tf32": {"resumable": True, "action": "store_true",
            "help": "Use TF32 matrix products on Ampere and later GPUs."},
    },
    "saving and logging": {
        "output_dir": {"resumable": True, "help": "Folder of the run."},
        "checkpointing_steps": {"resumable": True, "type": "positive_int", "default": 500,
            "help": "Save a checkpoint every N steps."},
        "checkpoints_total_limit": {"resumable": True, "type": "positive_int",
            "help": "Keep the newest N checkpoints only."},
        "resume_from_checkpoint": {"help": "Checkpoint folder to resume from, or `latest`."},
        "validation_prompts": {"resumable": True, "nargs": "+",
            "help": "Prompts to sample from fixed noise during the run; the images' reward and diversity"
                    " are logged."},
        "validation_prompts_file": {"resumable": True,
            "help": "File of validation prompts, in the formats of --prompts_file, in place of"
                    " --validation_prompts."},
        "validation_reward": {
            "resumable": True, "needs": "validation_prompts/validation_prompts_file", "action": "append",
            "default": [], "metavar": "NAME",
            "help": "Also score the validation images with a reward that is not trained on; repeatable. If it"
                    " falls while the trained reward rises, the trained one is being hacked."},
        "num_validation_images": {"resumable": True, "type": "positive_int", "default": 4,
            "help": "Images per validation prompt."},
        "validation_steps": {"resumable": True, "type": "positive_int", "default": 100,
            "help": "Validate every N steps."},
        "logging_steps": {"resumable": True, "type": "positive_int", "default": 10,
            "help": "Write to metrics.jsonl every N steps."},
        "logging_dir": {"resumable": True, "default": "logs",
            "help": "Folder of the tracker files, in --output_dir."},
        "log_level": {"resumable": True, "choices": ["info", "warning"], "default": "info",
            "help": "Lowest level of the messages that the run logs to standard error."},
        "report_to": {"resumable": True, "default": "none",
            "help": "Tracker to use beside metrics.jsonl: tensorboard, wandb, ... or all."},
        "tracker_project_name": {"resumable": True, "default": "diff-instruct-star",
            "help": "Project name in the tracker."},
        "push_to_hub": {"resumable": True, "action": "store_true",
            "help": "Upload the finished pipeline to the hub."},
        "hub_model_id": {"resumable": True,
            "help": "Repository on the hub (default: the name of --output_dir)."},
        "hub_token": {"help": "Hub token. It is never written to a file, but `hf auth login` is safer."},
    },
}


def exit_with_error(message):
    """Print a one-line error (hub tokens redacted) and exit with status 2."""
    bars = list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ()))
    for bar in bars:
        bar.close()
    line = "error: " + re.sub(r"\bhf_\w{6,}", "hf_...", " ".join(message.split()))
    print("\n" * bool(bars) + line, file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def exit_on_error(what, remedy="", errors=Exception, unfinished=None):
    """Turn an exception inside into a one-line error that names `what`, a flag or file; drop `unfinished`."""
    try:
        yield
    except errors as error:
        words = " ".join(str(error).split()) or type(error).__name__
        if "weights_only" in words:  # torch's own words advise to switch it off
            words = "it holds more than tensors, and is not read because such a file can run code"
        if "No space left" in words or "PytorchStreamWriter" in words:
            words = "disk full"
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)
        exit_with_error(f"{what}: {words[:300]}" + (f"; {remedy}" if remedy else ""))


def number(kind, accepts, description):
    """An argparse type: an int or float for which `accepts` holds."""
    def parse(text):
        if not accepts(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return value
    parse.__name__ = kind.__name__  # argparse shows it if the text is no number
    return parse


positive_float = number(float, lambda value: 0 < value < math.inf, "a finite number above 0")


def name_and_scale(text):
    """NAME or NAME=SCALE -> (name, scale or None)."""
    name, mark, scale = text.rpartition("=")
    return (name, positive_float(scale)) if mark else (text, None)


TYPES = {
    "float": float,
    "positive_int": number(int, lambda value: value > 0, "a whole number above 0"),
    "non_negative_int": number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1"),
    "non_negative_float": number(float, lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
    "fraction": number(float, lambda value: 0 <= value < 1, "a fraction, from 0 to below 1"),
    "positive_float": positive_float, "name_and_scale": name_and_scale}


def short_name(reward):
    """A reward's name without the location of its weights, for logs and cards."""
    return reward.partition(":")[0] if reward.partition(":")[0] in REWARDS else reward


def extra_path(name):
    return Path(__file__).resolve().parent / "utils" / f"{name}.py"


@functools.cache
def read_flags(name):
    """FLAGS of an extra, read from its file without running it; {} if the file is absent."""
    text = extra_path(name).read_text(encoding="utf-8") if extra_path(name).is_file() else ""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "FLAGS":
            return ast.literal_eval(node.value)
    return {}


def load_extra(name, flag):
    """The module utils/NAME.py that `flag` asks for, from beside this script."""
    if not extra_path(name).is_file():
        exit_with_error(f"{flag} needs utils/{name}.py of the Diff-Instruct* repository beside"
                        f" {Path(__file__).name}")
    return run_extra(extra_path(name))


@functools.cache
def run_extra(path):
    """The module of an extra, one for all flags that ask for it."""
    spec = importlib.util.spec_from_file_location(f"diff_instruct_star_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def term_extras(args):
    """{flag: module} of the requested extras that build terms or observers."""
    return {flag: load_extra(name, flag) for name, flag in args.extras.items() if name.startswith("terms/")}


def declared_flags(family):
    """{group: {flag: settings}} of script, family and extras; the flags of an absent extra are hidden."""
    hidden = {"nargs": "*", "help": argparse.SUPPRESS}
    return FLAGS | {family.name: family.flags} | {
        f"utils/{name}.py": read_flags(name) or {
            flag: hidden | {"default": default} for flag, default in flags.items()}
        for name, flags in EXTRAS.items()}


def explain(parser, message):
    """Exit with argparse's message, and with the flag whose name is nearest to an unknown one."""
    unknown = re.findall(r"--\w+", message)[:1] if message.startswith("unrecognized") else []
    near = [f"did you mean {match}? " for name in unknown
            for match in difflib.get_close_matches(name, parser._option_string_actions, 1)]
    exit_with_error(f"{message}; {''.join(near)}see --help")


def make_parser(family):
    """The parser of all flags, whose help states every default."""
    parser = argparse.ArgumentParser(
        usage=f"accelerate launch {Path(sys.argv[0]).name} [flags]", allow_abbrev=False,
        description=sys.modules[type(family).__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = functools.partial(explain, parser)
    fractional = family.process_class.fractional_timesteps
    types = TYPES | {"timestep": TYPES["positive_float" if fractional else "positive_int"]}
    for title, flags in declared_flags(family).items():
        group = parser.add_argument_group(title)
        for name, settings in flags.items():
            settings = {key: value for key, value in settings.items() if key not in OWN_SETTINGS}
            if "type" in settings:
                settings["type"] = types[settings["type"]]
            elif "action" not in settings:  # a shell leaves the ~ of --flag=~/folder as it is
                settings["type"] = os.path.expanduser
            if name == "recipe":
                settings["choices"] = known_recipes(family)
            names = dict.fromkeys((f"--{name}", f"--{name.replace('unet', family.network_name)}"))
            default = family.defaults.get(name, settings.get("default"))
            if default not in (None, []):
                shown_default = default if not isinstance(default, list) else " ".join(map(str, default))
                source = "the start's own, else " * (name in LOOKED_UP)
                settings["help"] += f" (default: {source}{shown_default})"
            group.add_argument(*names, **settings)
    parser.set_defaults(**family.defaults | dict.fromkeys(LOOKED_UP), state={}, configurations={},
                        warnings=[])
    return parser


def parse_args(family, argv=None):
    """Parse flags, apply the recipe, reject contradictions."""
    parser, argv = make_parser(family), sys.argv[1:] if argv is None else argv
    if any(str(word).partition("=")[0] == "--config" for word in argv):
        argv = load_extra("config", "--config").expand(argv, parser, sys.modules[__name__])
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S",
                        force=True)
    logger.setLevel(args.log_level.upper())
    if args.hub_token:  # trackers record the command line
        sys.argv = [word.replace(args.hub_token, "...") for word in sys.argv]
    recipes = known_recipes(family)
    for name, value in zip(RECIPE_FLAGS, recipes[args.recipe]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if extra_path("starts").is_file():
        args.warnings = load_extra("starts", "a start").look_up(family, args, sys.modules[__name__])
    for name in LOOKED_UP:
        if getattr(args, name) is None:
            setattr(args, name, family.defaults[name])
    args.decode_batch_size = args.decode_batch_size or max(1, DECODED_PIXELS // args.resolution**2)
    if args.assistant_learning_rate is None:
        args.assistant_learning_rate = args.learning_rate
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    args.extras = {extra: f"--{next(filter(changed.__contains__, flags))}" for extra, flags in EXTRAS.items()
                   if changed.intersection(flags)}
    for extra, flag in args.extras.items():
        load_extra(extra, flag)
    declared = dict(itertools.chain(*(flags.items() for flags in declared_flags(family).values())))
    check_flags(args, declared)
    if args.validation_prompts_file:  # known from here on by its prompts
        args.validation_prompts = read_prompts(args, "validation_prompts_file")
    args.reward = {name: scale or args.reward_scale for name, scale in args.reward or [("pickscore", None)]
                   if scale or args.reward_scale}
    if not args.dry_run:
        check_output_dir(args, parser, declared)
    for flag, extra in term_extras(args).items():
        with exit_on_error(flag):
            extra.check(args, sys.modules[__name__])
    return args


def known_recipes(family):
    """RECIPES, and di_star_dpo where the family has a DPO model."""
    dpo = {"di_star_dpo": (*RECIPES["di_star_in"], family.dpo_unet)} if family.dpo_unet else {}
    return RECIPES | dpo


def check_flags(args, declared):
    """Exit if flags contradict each other; `declared` holds the settings of all flags."""
    needs = {name: settings["needs"].split("/") for name, settings in declared.items() if "needs" in settings}
    needy = [name for name, others in needs.items() if not any(getattr(args, other) for other in others)
             and getattr(args, name) not in (None, declared[name].get("default"))]
    excluded = [other for name, settings in declared.items() if getattr(args, name)
                for other in settings.get("excludes", ()) if getattr(args, other)]
    rewards = args.reward or [("pickscore", None)]
    named = [*(name for name, scale in rewards if scale or args.reward_scale), *args.validation_reward]
    names = [short_name(name) for name in named]
    repeated = [name for name in names if names.count(name) > 1]
    unscaled = [name for name, scale in rewards if not scale]
    foreign = [name for name in unscaled if short_name(name) in REWARDS[1:]]
    empty = [name for name, value in vars(args).items() if value == ""]
    odd = [name for name, value in vars(args).items() for text in (
        value if isinstance(value, list) else [value]) if re.search("[\ud800-\udfff]", str(text))][:1]
    for wrong, *message in [
        (empty, f"--{' --'.join(empty)} is empty; was a variable of the shell not set?"),
        (args.mixed_precision not in (None, "no", "bf16"), f"--mixed_precision {args.mixed_precision} is not"
         " supported: the terms' inner gradients would underflow in fp16; use bf16 or no"),
        (odd, f"--{' --'.join(odd)} is not UTF-8"),
        (not args.dry_run and bool(args.dataset_name) == bool(args.prompts_file),
         "give the prompts by exactly one of --dataset_name and --prompts_file"),
        (args.validation_prompts and args.validation_prompts_file,
         "give the validation prompts by one of --validation_prompts and --validation_prompts_file"),
        (args.min_timestep > args.max_timestep, f"--min_timestep {args.min_timestep} exceeds --max_timestep"),
        (any(this <= following for this, following in itertools.pairwise(args.generator_timesteps)),
         f"--generator_timesteps {' '.join(map(str, args.generator_timesteps))} must fall from step to step"),
        (needy, *(f"--{name} needs --{' or --'.join(needs[name])}" for name in needy[:1])),
        (excluded, f"--sharding is not supported with --{' --'.join(excluded)}"),
        (args.lr_warmup_steps + (args.lr_scheduler == "polynomial") > args.max_train_steps,
         f"--lr_warmup_steps {args.lr_warmup_steps} leaves no step of --max_train_steps to --lr_scheduler"
         f" {args.lr_scheduler}"),
        (args.lr_scheduler == "polynomial" and min(args.learning_rate, args.assistant_learning_rate) <= 1e-7,
         "--lr_scheduler polynomial ends at 1e-7, and both learning rates must be above"),
        (repeated, f"--reward {' '.join(repeated[:1])} is given twice, or is a --validation_reward too"),
        (foreign, f"--reward {' '.join(foreign)} needs a scale of its own, NAME=SCALE above 0: --reward_scale"
         " applies only to pickscore and to rewards of your own"),
        (args.reward and unscaled and not args.reward_scale,
         f"--reward {' '.join(unscaled)} needs a scale of its own, NAME=SCALE: --reward_scale is 0 (--recipe"
         f" {args.recipe} sets it to {RECIPES.get(args.recipe, RECIPES['di_star_in'])[1]:g})"),
    ]:
        if wrong:
            exit_with_error(*message)


def check_output_dir(args, parser, declared):
    """Refuse a folder with something else in it; resolve --resume_from_checkpoint to a folder or None."""
    output_dir = Path(args.output_dir)
    with exit_on_error(f"--output_dir {output_dir}"):
        existing = next(filter(os.path.lexists, (output_dir, *output_dir.absolute().parents)))
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise OSError(f"{existing} is a file, a broken link or read-only")
        held = [path.name for path in output_dir.iterdir()] if existing == output_dir else []
        foreign = [name for name in held if not re.search(r"^\.|\.(log|out|err)$", name)]
        if foreign and "args.json" not in held:
            raise OSError("it is not empty and holds no run of this script; choose another folder")
        saved = "model_index.json" in held or list_checkpoints(output_dir)
        if saved and "args.json" in held and not args.resume_from_checkpoint:
            raise OSError(f"it holds another run; choose another folder, or add {RESUME}")
    if args.resume_from_checkpoint == "latest":
        args.resume_from_checkpoint, args.state = latest_checkpoint(output_dir)
    elif args.resume_from_checkpoint:
        if not Path(args.resume_from_checkpoint).exists():  # then it is a name in --output_dir
            args.resume_from_checkpoint = str(output_dir / args.resume_from_checkpoint)
        with exit_on_error(f"--resume_from_checkpoint {args.resume_from_checkpoint}: state.json is not of a"
                           " complete checkpoint", "take another"):
            args.state = read_state(Path(args.resume_from_checkpoint))
    if args.resume_from_checkpoint:
        check_resumed(args, parser, declared)


def check_resumed(args, parser, declared):
    """Exit if flags that make another run differ from the checkpoint's; warn of a schedule that changes."""
    folder, step, saved = args.resume_from_checkpoint, args.state["step"], args.state["args"]
    resumable = {name for name, settings in declared.items() if settings.get("resumable")}
    for name, value in saved_args(args).items():
        held = saved.get(name, parser.get_default(name))  # older checkpoints lack newer flags
        same = value == held or isinstance(value, str) and os.path.exists(value) and os.path.realpath(
            value) == os.path.realpath(str(held))
        if name not in resumable and not same:
            exit_with_error(f"--{name} is {value}, but {folder} was made with {held}; resume with the same"
                            " flags")
    if step > args.max_train_steps:
        exit_with_error(f"--max_train_steps {args.max_train_steps}: {folder} is at step {step} already; raise"
                        " it")
    if saved.get("max_train_steps") != args.max_train_steps and not args.lr_scheduler.startswith("constant"):
        logger.logger.warning("--lr_scheduler %s ends at --max_train_steps, so the learning rates differ from"
                              " those of a run of %s steps", args.lr_scheduler, saved.get("max_train_steps"))


def digests_of(paths):
    """{file name: digest of its bytes}, computed in threads."""
    def digest(path):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.blake2b(content, digest_size=16).hexdigest()
    return dict(zip((path.name for path in paths), ThreadPoolExecutor().map(digest, paths)))


def read_state(folder):
    """state.json of a checkpoint; raises an error if it or one of its files is not as it was saved."""
    state = json.loads((folder / "state.json").read_text())
    state["step"], state["args"] = int(state["step"]), {**state["args"]}
    for name, size in state["files"].items():
        if (folder / name).stat().st_size != size:
            raise ValueError(f"{name} is cut short")
    for name, digest in digests_of([folder / name for name in state.get("digests", ())]).items():
        if digest != state["digests"][name]:
            raise ValueError(f"the bytes of {name} have changed since it was saved")
    return state


def latest_checkpoint(output_dir):
    """(folder, state) of the newest whole checkpoint of a run; (None, {}) if it has none at all."""
    faults = []
    for folder in list_checkpoints(output_dir)[::-1]:
        try:
            state = read_state(folder)
        except Exception as error:  # whatever the damage
            faults.append(f"{folder.name} is damaged: {error}")
        else:
            if faults:
                logger.logger.warning("%s; the run resumes from %s", "; ".join(faults), folder.name)
            return str(folder), state
    return exit_with_error(f"{RESUME}: {'; '.join(faults)}") if faults else (None, {})


def list_checkpoints(output_dir):
    """Finished checkpoints of a run, oldest first."""
    folders = [path.parent for path in output_dir.glob("checkpoint-*/state.json")
               if path.parent.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def saved_args(args):
    """The flags that args.json and checkpoints keep, and the number of samples per optimizer step."""
    samples = args.train_batch_size * args.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    kept = {name: value for name, value in vars(args).items() if name not in UNSAVED}
    return json.loads(json.dumps(kept)) | {SAMPLES: samples}  # tuples become lists, as when read back


def method_of(args):
    """The method's settings among the flags."""
    return Method(**{field.name: getattr(args, field.name) for field in fields(Method)})


def check_vaes(family, args):
    """The channels of the networks' latents; exits if a VAE has others, or what `decode` would ignore."""
    channels, of_pipeline = None, {"subfolder": "vae", "revision": args.revision}
    for flag, place in (
            ("pretrained_vae_model_name_or_path", {}) if args.pretrained_vae_model_name_or_path else
            ("pretrained_model_name_or_path", of_pipeline), ("reward_vae", {})):
        if value := getattr(args, flag):
            with exit_on_error(f"--{flag} {value} has no VAE for the reference"):
                config = diffusers.AutoencoderKL.load_config(value, **place)
                channels = channels or config["latent_channels"] * family.packing**2
                if config["latent_channels"] * family.packing**2 != channels:
                    raise ValueError("its latents have other channels than the reference's")
                if config.get("latents_mean") or config.get("latents_std"):
                    raise ValueError("its latents_mean and latents_std are not supported")
    return channels


def check_models(family, args):
    """The reference's forward process; exits if a model's configuration does not suit its flag."""
    with exit_on_error(family.name):
        family.check_libraries()
    reference, channels = None, check_vaes(family, args)
    for name in ("reference_unet", "pretrained_model_name_or_path", "generator_init", "preference_unet"):
        value, flag = getattr(args, name), name.replace("unet", family.network_name)
        if value is None or (name, value) == ("generator_init", "reference") or args.dry_run and name in (
                "generator_init", "preference_unet"):
            continue
        with exit_on_error(f"--{flag} {value} has no network that can be read"):
            if name != "pretrained_model_name_or_path" and resolve_weights(family, value):
                continue
            config = find_network(family, value)[0]
            signature, width = family.architecture(config)
        reference = reference or config
        if (signature, width) != (family.signature, family.architecture(reference)[1]):
            exit_with_error(f"--{flag} {value} is no {family.name} network, or not of the reference's width;"
                            " other families have scripts of their own")
        if config["in_channels"] != channels:
            exit_with_error(f"--{flag} {value} reads {config['in_channels']} channels, the VAE's latents have"
                            f" {channels}; networks for inpainting or editing are not supported")
    divisor = family.pixels_per_latent * reference.get("patch_size", 1)
    if args.resolution % divisor:
        exit_with_error(f"--resolution {args.resolution} is not divisible by {divisor}")
    largest = divisor * (reference.get("pos_embed_max_size") or math.inf)  # SD3's
    if args.resolution > largest:
        exit_with_error(f"--resolution {args.resolution} is above {largest}, the largest that the"
                        f" {family.network_name} has positions for")
    return check_process(family, args)


def check_process(family, args):
    """The forward process of the reference's scheduler; exits if the flags' timesteps do not suit it."""
    place = args.pretrained_model_name_or_path
    with exit_on_error(f"--pretrained_model_name_or_path {place}, its scheduler"):
        process = family.process_class.from_scheduler(
            diffusers.DDPMScheduler.load_config(place, subfolder="scheduler", revision=args.revision))
    first = args.generator_timesteps[0]  # the largest
    for flag, value in (("generator_timesteps", first), ("max_timestep", args.max_timestep)):
        if value > process.last_timestep:
            exit_with_error(f"--{flag} {value} is outside the reference's schedule, 0 to"
                            f" {process.last_timestep}")
    if not generator_process(args, process).has_clean_prediction(first):
        exit_with_error(f"--generator_timesteps {first} has no signal (zero terminal SNR), so an epsilon"
                        " model has no clean prediction there; choose a smaller one")
    return process


def open_accelerator(args):
    """Accelerate's processes, device and trackers; exits if its configuration is unsupported."""
    trackers = ["none", "all", *map(str, get_available_trackers())]
    if args.report_to not in trackers:
        known = args.report_to in map(str, LOGGER_TYPE_TO_CLASS)
        exit_with_error(f"--report_to {args.report_to} " + (
            f"is not installed: pip install {args.report_to}" if known else
            f"is no tracker; choose from {', '.join(trackers)}"))
    with exit_on_error("accelerate's configuration or its ACCELERATE_* variables"):
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, log_with=args.report_to.replace("none", "") or None,
            project_dir=os.path.join(args.output_dir, args.logging_dir),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        exit_with_error(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate sees"
                        f" {accelerator.num_processes} process; without GPUs set ACCELERATE_USE_CPU=true")
    if accelerator.mixed_precision not in ("no", "bf16"):
        exit_with_error(f"--mixed_precision {accelerator.mixed_precision} is not supported: the terms' inner"
                        " gradients would underflow; use bf16 or no")
    if (kind := accelerator.distributed_type.value) in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        exit_with_error(f"accelerate's {kind} takes one model, here are three; use MULTI_GPU, and"
                        " --sharding fsdp to shard")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if accelerator.device.type == "mps":
        logger.warning("accelerate picked MPS, on which a reward's antialiased resizing may have no gradient;"
                       " if the run fails there, set ACCELERATE_USE_CPU=true")
    return accelerator


# ------------------------------------------------------------------------------------------------------- main

SHOWN = ("reward", "grad_divergence", "grad_reward", "seconds_per_step")  # in the lines of the log
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SAME_SIGNAL = 5  # seconds; launchers repeat a signal that they pass on, so within them it counts once


def log_start(run):
    """Log what a run does, with what and where."""
    args, facts, size = run.args, run.facts, run.checkpoint_size() / 1e9
    weights = [f"{sum(value.numel() for value in held.values()) / 1e6:,.3g} million weights of the {name}"
               for name, held in run.parameters.items()]
    for line in (
            f"{run.models.family.name} on {facts['hardware']}, precision {facts['mixed_precision']}; trains"
            f" {' and '.join(weights)}",
            f"recipe {args.recipe}: {args.divergence} divergence, guidance {args.cfg_scale:g}"
            f" ({args.cfg_mode}), reward {rewards_in_words(args)}",
            f"the generator starts from {args.generator_init}, timesteps"
            f" {' '.join(map(str, args.generator_timesteps))}, at {args.resolution} pixels",
            f"{facts['prompts']} prompts; {args.max_train_steps:,} updates of the generator, each after"
            f" {args.assistant_updates} of the assistant, of {saved_args(args)[SAMPLES]} samples",
            f"checkpoints of {size:.2g} GB every {args.checkpointing_steps} steps in {args.output_dir}; after"
            " SIGTERM a run needs time for one optimizer step and for writing a checkpoint and its digests"
            f" ({math.ceil(2 * size)} s at 1 GB/s)"):
        logger.info(line)


def open_run(run):
    """Lock the output folder for as long as the returned file is open, and prepare it for the run."""
    output_dir = Path(run.args.output_dir)
    if not run.accelerator.is_main_process:
        return contextlib.nullcontext()
    for folder in (output_dir, *[Path(run.accelerator.logging_dir)] * (run.args.report_to != "none")):
        folder.mkdir(parents=True, exist_ok=True)  # wandb does not make its own
    lock = open(output_dir / "args.json", "a")
    with exit_on_error(f"--output_dir {output_dir}: another run is writing into it", "wait until it ends"):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not run.args.resume_from_checkpoint and list_checkpoints(output_dir):
        exit_with_error(f"--output_dir {output_dir}: another run has been there since this one started")
    for folder in output_dir.glob("unfinished-*"):
        logger.warning("%s is removed: a run ended while writing it", folder.name)
        shutil.rmtree(folder)
    (output_dir / "args.json").write_text(json.dumps(saved_args(run.args), indent=2) + "\n")
    path, last = output_dir / "metrics.jsonl", run.step if run.args.resume_from_checkpoint else -1
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    steps = [re.fullmatch(r'\{"step": (\d+)\W.*\}', line) for line in lines]  # None if cut short or foreign
    kept = [bool(step) and int(step[1]) <= last for step in steps]  # the log goes on after the checkpoint
    path.write_text("".join(f"{line}\n" for line in itertools.compress(lines, kept)))
    if not all(kept):
        with open(output_dir / f"metrics.after-{run.step}.jsonl", "a") as file:
            file.writelines(f"{line}\n" for line, keep in zip(lines, kept) if not keep)
    return lock


def catch_signals(run):
    """Let the first signal end the run after the current optimizer step; a later one ends it at once."""
    caught = []

    def catch(number, _):
        caught.append(time.monotonic())
        if caught[-1] - caught[0] > SAME_SIGNAL:
            os._exit(128 + number)
        run.signals.append(signal.Signals(number).name)
    for number in SIGNALS:
        signal.signal(number, catch)


@contextlib.contextmanager
def say_how_to_resume(run):
    """Add a line to the traceback of an exception that ends the run."""
    try:
        yield
    except Exception as error:
        getattr(error, "add_note", print)(
            f"the run ended at step {run.step}; its checkpoints are intact: continue with {RESUME}")
        raise


def train(run, progress):
    """Train from the run's step to the last, with validations and checkpoints; returns why it ended early."""
    args, stop = run.args, None
    if args.validation_prompts and not args.resume_from_checkpoint:
        stop = watch(run)
        if stop:
            run.save()
    while run.step < args.max_train_steps and not stop:
        train_step(run)
        if run.step == 1:
            warn_of_start(run)
        if run.assistant_updates_done:  # interrupted before the generator's update
            run.save()
            return run.stop_reason()
        progress.update()
        step, last, stop = run.step, run.step == args.max_train_steps, run.stop_reason()
        saves = step % args.checkpointing_steps == 0 or last
        if step % args.logging_steps == 0 or saves:  # at a stop the checkpoint keeps the rest
            stop = run.observe(run.pop_metrics()) or stop
        if args.validation_prompts and (step % args.validation_steps == 0 or last):
            stop = watch(run) or stop
        if saves or stop:
            run.save()
    return stop


def main(family, args):
    for library in (diffusers.utils.logging, transformers.utils.logging):  # this script says what matters
        library.set_verbosity_error()
        library.disable_progress_bar()
    if extra_path("places").is_file():  # a script alone finds a wrong name later, at loading
        load_extra("places", "a name").check(family, args, exit_with_error)
    process = check_models(family, args)
    if args.dry_run:
        return load_extra("memory", "--dry_run").estimate(family, args, process, sys.modules[__name__])
    rewards, prompts = find_rewards(args), Prompts(read_prompts(args), args.seed)
    if args.resume_from_checkpoint and args.state["prompts"] != prompts.digest:
        exit_with_error("the prompts have changed since --resume_from_checkpoint"
                        f" {args.resume_from_checkpoint}")
    accelerator = open_accelerator(args)
    if args.push_to_hub and accelerator.is_main_process:
        create_repository(args)
    set_seed(args.seed)  # for a LoRA's initial weights; all other randomness comes from `seeded_rng`
    models = load_models(family, args, process, rewards, accelerator)
    run = TrainingRun(args, models, *build_terms(args, models), prompts, accelerator)
    warn_of_long_prompts(run)
    for line in args.warnings:
        logger.warning(line)
    if args.resume_from_checkpoint:
        run.load(Path(args.resume_from_checkpoint))
    log_start(run)
    progress = tqdm(total=args.max_train_steps, initial=run.step, desc="training", mininterval=1,
                    disable=not (accelerator.is_local_main_process and sys.stderr.isatty()))
    intact = exit_on_error(f"--output_dir {args.output_dir}", "checkpoints are intact", OSError)
    with intact, open_run(run), progress, logging_redirect_tqdm(), say_how_to_resume(run):
        catch_signals(run)
        with exit_on_error(f"--report_to {args.report_to}", "log in to it, or choose another"):
            accelerator.init_trackers(
                args.tracker_project_name, {k: str(v) for k, v in saved_args(args).items()},
                {"wandb": {"dir": str(accelerator.logging_dir)}})
        if stop := train(run, progress):
            exit_with_error(f"{stop}; step {run.step} is saved: continue with {RESUME}")
        if run.step == run.skipped["generator"]:
            exit_with_error(f"no update of the generator was finite; {LOWER}")
        accelerator.wait_for_everyone()
        export(run)
    logger.info("the result is in %s; its README.md has the code that generates with it", args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main(FAMILY, parse_args(FAMILY))
