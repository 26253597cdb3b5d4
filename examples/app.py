#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""A page in the browser: a prompt and a seed, and what several models draw of them, side by side.

    pip install gradio
    python examples/app.py --timesteps 399 --guidance_scale 0 \\
        --model "before --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
                 --scheduler LCMScheduler --unet tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin" \\
        --model "after --pretrained_model_name_or_path outputs/sdxl-paper-short"

Each --model is a name and flags of eval_benchmarks.py; flags outside of it hold for every model. A seed is
the same noise for all of them.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from PIL.Image import Resampling


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_benchmarks import Painter, model_parser, parse_models
from utils.benchmarks import Prompt
from utils.programs import Parser, fail


SIDE = 480  # pixels of a picture on the page


def parse_args(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False, parents=[model_parser()],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="'NAME [flags]'", help="a model, with its name")
    add("--name", help="of the one model without --model; unless given its folder's or repository's")
    add("--prompt", help="the first prompt of the page")
    add("--port", type=int, default=7860, help="of http://127.0.0.1")
    args = parser.parse_args(argv)
    args.models = parse_models(args)
    if any(model.images for model in args.models.values()):
        fail("--images: the page draws, and has no use for pictures that are made already")
    if importlib.util.find_spec("gradio") is None:
        fail("the page needs one more package: pip install gradio")
    return args


def build(painters, prompt):
    """The page, of {name: Painter}."""
    import gradio

    def draw(prompt, seed):
        pictures, seconds = [], []
        for name, painter in painters.items():
            painter.seed = int(seed)
            (picture,), cost = painter([Prompt(0, prompt)])
            larger = max(SIDE // picture.height, 1)  # than a very small picture is
            size = picture.width * larger, picture.height * larger
            pictures.append(picture.resize(size, Resampling.NEAREST))
            seconds.append(f"{name}: {cost['seconds']:.2f} seconds")
        return [*pictures, ", ".join(seconds)]

    with gradio.Blocks(title="Side by side") as page:
        with gradio.Row():
            prompt = gradio.Textbox(prompt or "", label="Prompt", scale=6)
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
            button = gradio.Button("Draw", variant="primary")
        with gradio.Row():
            pictures = [gradio.Image(label=name, type="pil", height=SIDE) for name in painters]
        seconds = gradio.Markdown()
        gradio.on([button.click, prompt.submit, seed.submit], draw, [prompt, seed], [*pictures, seconds])
        if prompt.value:
            page.load(draw, [prompt, seed], [*pictures, seconds])
    return page


def main(args):
    from accelerate import PartialState

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    device = PartialState().device
    painters = {name: Painter(model, 0, device) for name, model in args.models.items()}
    build(painters, args.prompt).launch(server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    main(parse_args())
