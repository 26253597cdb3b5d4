#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Draw pictures in one step with what a training script made, from its folder or from the hub.

    python examples/generate.py --pretrained_model_name_or_path outputs/sdxl-paper-short \\
        --prompts "a lighthouse in a storm" "a raccoon in a spacesuit, oil painting" --output_dir pictures

The timestep, the resolution and, for a LoRA, its base model stand in the model card. The noise of the n-th
picture is a function of --seed + n alone. Files are 00000.png and so on, or with --grid one grid.png.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.programs import Parser, fail, first_line, positive, whole


DTYPES = ("float32", "float16", "bfloat16")


def parse_args(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="a run's folder, or a hub id")
    add("--base_model_name_or_path", help="of a LoRA without a pipeline; unless given its card's base_model")
    add("--prompts", nargs="+", help="what to draw")
    add("--prompts_file", type=Path, help="instead: a .txt file, one a line")
    add("--num_images_per_prompt", type=positive, default=1, help="pictures of each prompt. Default: 1")
    add("--output_dir", type=Path, default=Path("pictures"), help="their folder. Default: pictures")
    add("--grid", action="store_true", help="one grid.png, a row for each prompt, instead of files")
    add("--seed", type=whole, default=0, help="of all noise. Default: 0")
    add("--batch_size", type=positive, default=4, help="pictures drawn at once. Default: 4")
    add("--timestep", type=whole, help="at which the generator reads its noise; unless given the card's")
    add("--resolution", type=positive, help="height and width; unless given the card's")
    add("--dtype", choices=DTYPES, default="float32", help="of the pipeline. Default: float32")
    args = parser.parse_args(argv)
    if bool(args.prompts) == bool(args.prompts_file):
        fail("give what to draw by exactly one of --prompts and --prompts_file")
    if args.prompts_file:
        try:
            lines = map(str.strip, args.prompts_file.read_text(encoding="utf-8-sig").split("\n"))
            args.prompts = [line for line in lines if line]
        except (OSError, ValueError) as error:
            fail(f"--prompts_file {args.prompts_file} cannot be read: {first_line(error)}")
    if not all(map(str.strip, args.prompts or [""])):
        fail("--prompts or --prompts_file is empty")
    if args.resolution and args.resolution % 8:
        fail(f"--resolution {args.resolution} is not divisible by 8")
    names = ["grid.png"] if args.grid else [f"{index:05d}.png" for index in range(
        len(args.prompts) * args.num_images_per_prompt)]
    args.files = [args.output_dir / name for name in names]
    if args.output_dir.is_symlink() or args.output_dir.exists() and not args.output_dir.is_dir():
        fail(f"--output_dir {args.output_dir} is no folder")
    for path in args.files:
        if path.exists():
            fail(f"--output_dir {args.output_dir} has {path.name} already; choose another folder")
    return args


ARGS = parse_args() if __name__ == "__main__" else None

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, LCMScheduler
from diffusers.utils import make_image_grid
from huggingface_hub import ModelCard
from tqdm.auto import tqdm


def read_card(place):
    """The data of a model card in a folder or on the hub; empty where there is none."""
    path = Path(place) / "README.md"
    with contextlib.suppress(Exception):  # of help, not needed
        return ModelCard.load(path if Path(place).is_dir() else place).data.to_dict()
    return {}


def load(place, base, card, dtype=torch.float32):
    """The one-step pipeline of a run's folder or a hub id; ends the run where there is none.

    A LoRA without its pipeline is loaded into `base`, unless given the card's base_model.
    """
    try:
        DiffusionPipeline.load_config(place)
        if base:
            fail("--base_model_name_or_path does nothing with a whole pipeline; it is of a LoRA")
    except OSError as error:
        base = base or card.get("base_model")
        if not base:
            fail(f"--pretrained_model_name_or_path {place} holds neither a pipeline nor a card that names the"
                 f" base of a LoRA: {first_line(error)}; of a LoRA give --base_model_name_or_path")
    try:
        pipeline = DiffusionPipeline.from_pretrained(base or place, torch_dtype=dtype)
        if base:
            pipeline.scheduler = LCMScheduler.from_pretrained(place, subfolder="scheduler")
            pipeline.load_lora_weights(place, weight_name="pytorch_lora_weights.safetensors")
    except Exception as error:  # each library and format has its own
        fail(f"--pretrained_model_name_or_path {place} cannot be loaded: {first_line(error)}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, seeds, timestep, resolution):
    """PIL pictures, one for each prompt, of the noise of its seed."""
    return pipeline(list(prompts), generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    height=resolution, width=resolution, num_inference_steps=1, timesteps=[timestep],
                    guidance_scale=0).images


def main(args):
    card = read_card(args.pretrained_model_name_or_path)
    timestep = card.get("generator_timestep") if args.timestep is None else args.timestep
    resolution = args.resolution or card.get("resolution")
    pipeline = load(args.pretrained_model_name_or_path, args.base_model_name_or_path, card,
                    getattr(torch, args.dtype))
    last = pipeline.scheduler.config.num_train_timesteps - 1
    if not isinstance(timestep, int) or not 0 <= timestep <= last:
        found = "the model card has none" if timestep is None else f"{timestep} is not of 0 to {last}"
        fail(f"--timestep: {found}; give the generator's own, of DI*'s SDXL 399")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output_dir {args.output_dir}: {error.strerror}")
    pipeline.to(PartialState().device)
    prompts = [prompt for prompt in args.prompts for _ in range(args.num_images_per_prompt)]
    images, started = [], time.perf_counter()
    for first in tqdm(range(0, len(prompts), args.batch_size), disable=len(prompts) <= args.batch_size):
        part = prompts[first:first + args.batch_size]
        seeds = range(args.seed + first, args.seed + first + len(part))
        images += draw(pipeline, part, seeds, timestep, resolution)
    seconds = time.perf_counter() - started
    if args.grid:
        images = [make_image_grid(images, len(args.prompts), args.num_images_per_prompt)]
    for image, path in zip(images, args.files):
        image.save(path)
    drawn = "1 picture" if len(prompts) == 1 else f"{len(prompts)} pictures"
    last = f" to {args.files[-1].name}" if len(args.files) > 1 else ""
    print(f"{drawn} in {seconds:.2f} seconds, {seconds / len(prompts):.2f} each: {args.files[0]}{last}")


if __name__ == "__main__":
    main(ARGS)
