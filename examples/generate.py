#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Generate images with a trained generator, from the run's folder or from the hub.

    python examples/generate.py --pretrained_model_name_or_path outputs/sdxl-paper-short \\
        --prompts "a lighthouse in a storm" "a raccoon in a spacesuit, oil painting" --output_dir images

A LoRA generates on the model that it was trained on:

    python examples/generate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --unet tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin --lora outputs/sdxl-lora --prompts "a lighthouse"

Timesteps, resolution and prompt length come from the model card. With --lora they come from the LoRA's card,
and the scheduler from its scheduler/ folder. The noise of the n-th image depends only on --seed + n. The
files are 00000.png and so on, or a single grid.png with --grid.
"""

import contextlib
import inspect
import os
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import (
    Parser,
    exit_on_error,
    exit_with_error,
    load_pipeline,
    non_negative_int,
    positive_int,
    quiet_libraries,
    steps_at,
    timestep,
)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True,
        help="Pipeline: that of a finished run, or with --lora the base model (folder or hub id).")
    add("--unet", "--transformer", help="Replace the pipeline's UNet or transformer by this network (folder,"
        " hub id or weights file, owner/name/file on the hub).")
    add("--lora", help="Load this LoRA (folder, hub id or file, owner/name/file on the hub).")
    add("--variant", help="Variant of the pipeline's weights, such as fp16.")
    add("--prompts", nargs="+", help="Prompts to generate images for.")
    add("--prompts_file", type=Path, help="Read the prompts from this .txt file, one per line.")
    add("--num_images_per_prompt", type=positive_int, default=1, help="Images to generate per prompt.")
    add("--output_dir", type=Path, default=Path("images"), help="Folder for the images.")
    add("--grid", action="store_true", help="Write a single grid.png with one row per prompt.")
    add("--seed", type=non_negative_int, default=0, help="Seed of all noise.")
    add("--batch_size", type=positive_int, default=4, help="Images to generate at once.")
    add("--timesteps", type=timestep, nargs="+",
        help="Timesteps of the generator's steps (default: the model card's).")
    add("--resolution", type=positive_int, help="Height and width in pixels (default: the model card's).")
    add("--max_sequence_length", type=positive_int, help="Number of prompt tokens that SD3's T5 and the like"
        " read (default: the model card's, else the pipeline's).")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="Pipeline dtype.")
    parser.set_defaults(revision=None, scheduler=None)
    args = parser.parse_args(argv)
    if bool(args.prompts) == bool(args.prompts_file):
        exit_with_error("give the prompts with exactly one of --prompts and --prompts_file")
    if args.prompts_file:
        with exit_on_error(f"--prompts_file {args.prompts_file} cannot be read"):
            lines = map(str.strip, args.prompts_file.read_text(encoding="utf-8-sig").split("\n"))
            args.prompts = [line for line in lines if line]
        if not args.prompts:
            exit_with_error(f"--prompts_file {args.prompts_file} has no prompts")
    if args.resolution and args.resolution % 8:
        exit_with_error(f"--resolution {args.resolution} is not divisible by 8")
    count = len(args.prompts) * args.num_images_per_prompt
    args.files = [args.output_dir / name for name in (
        ["grid.png"] if args.grid else [f"{index:05d}.png" for index in range(count)])]
    if os.path.lexists(args.output_dir) and not args.output_dir.is_dir():
        exit_with_error(f"--output_dir {args.output_dir} is not a folder")
    for path in filter(Path.exists, args.files):
        exit_with_error(f"--output_dir {args.output_dir} already contains {path.name}; choose another folder")
    return args


ARGS = parse_args() if __name__ == "__main__" else None

import diffusers
import torch
from accelerate import PartialState
from diffusers.utils import make_image_grid
from huggingface_hub import ModelCard
from tqdm.auto import tqdm

from utils import starts
from utils.places import fault_of


def read_card(name_or_path):
    """Read the metadata of a model card in a folder or on the hub; empty if there is none."""
    path = Path(name_or_path) / "README.md"
    with contextlib.suppress(Exception):  # the card is optional
        return ModelCard.load(path if Path(name_or_path).is_dir() else name_or_path).data.to_dict()
    return {}


def generate(pipeline, prompts, seeds, resolution, settings):
    """Generate a PIL image for each prompt from the noise of its seed; `settings` are of the pipeline."""
    return pipeline(prompt=list(prompts), generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    height=resolution, width=resolution, guidance_scale=0, **settings).images


def load(args):
    """Load the pipeline; a LoRA or another network as the evaluation does, whose import takes seconds."""
    if args.unet or args.lora:
        import eval_benchmarks

        return eval_benchmarks.load_pipeline(args, PartialState().device)
    source = args.pretrained_model_name_or_path
    with exit_on_error(f"--pretrained_model_name_or_path {source} cannot be loaded"):
        pipeline = load_pipeline(source, torch_dtype=getattr(torch, args.dtype), variant=args.variant)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(PartialState().device)


def main(args):
    quiet_libraries()
    source = args.pretrained_model_name_or_path
    for flag in ("pretrained_model_name_or_path", "unet", "lora"):
        value = getattr(args, flag)
        fault = value and fault_of(value)
        if value and (Path(value) / "state.json").exists():
            fault = "it is a checkpoint, which holds no pipeline; make one of it with examples/export.py"
        if fault:
            exit_with_error(f"--{flag} {value}: {fault}")
    card = read_card(args.lora or source)
    made_for = card.get("generator_timesteps")
    timesteps = args.timesteps or (made_for if starts.are_timesteps(made_for) else None)
    resolution = args.resolution or card.get("resolution")
    pipeline = load(args)
    if args.lora:
        with exit_on_error(f"--lora {args.lora} has no scheduler beside it"):
            kind = diffusers.DDPMScheduler.load_config(args.lora, subfolder="scheduler")["_class_name"]
            pipeline.scheduler = getattr(diffusers, kind).from_pretrained(args.lora, subfolder="scheduler")
    with exit_on_error(f"--pretrained_model_name_or_path {source} cannot be used"):
        whole = "timesteps" in steps_at(pipeline, [])
        last = pipeline.scheduler.config.num_train_timesteps - whole
    if not timesteps or sorted(set(timesteps), reverse=True) != timesteps or not (
            last >= timesteps[0] and timesteps[-1] > 0) or whole and any(one % 1 for one in timesteps):
        found = (f"{timesteps} must decrease from at most {last} to above 0" + ", in whole numbers" * whole
                 if timesteps else "the model card has none")
        exit_with_error(f"--timesteps: {found}; give the generator's own, which is 399 for DI*'s SDXL")
    settings = steps_at(pipeline, timesteps)
    if length := args.max_sequence_length or card.get("max_sequence_length"):
        if "max_sequence_length" not in inspect.signature(pipeline.__call__).parameters:
            exit_with_error(f"--max_sequence_length: {type(pipeline).__name__} has no such argument")
        settings["max_sequence_length"] = length
    with exit_on_error(f"--output_dir {args.output_dir}"):
        args.output_dir.mkdir(parents=True, exist_ok=True)
    prompts = [prompt for prompt in args.prompts for _ in range(args.num_images_per_prompt)]
    images, started = [], time.perf_counter()
    for first in tqdm(range(0, len(prompts), args.batch_size), disable=len(prompts) <= args.batch_size):
        part = prompts[first:first + args.batch_size]
        seeds = range(args.seed + first, args.seed + first + len(part))
        images += generate(pipeline, part, seeds, resolution, settings)
    seconds = time.perf_counter() - started
    if args.grid:
        images = [make_image_grid(images, len(args.prompts), args.num_images_per_prompt)]
    for image, path in zip(images, args.files):
        image.save(path)
    count = "1 image" if len(prompts) == 1 else f"{len(prompts)} images"
    last = f" to {args.files[-1].name}" if len(args.files) > 1 else ""
    print(f"{count} in {seconds:.2f} seconds, {seconds / len(prompts):.2f} each: {args.files[0]}{last}")


if __name__ == "__main__":
    main(ARGS)
