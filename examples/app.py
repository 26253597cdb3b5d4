#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Show in a web page what several models generate from the same prompt and seed, side by side.

    pip install gradio
    python examples/app.py --timesteps 399 --guidance_scale 0 \\
        --model "before --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
                 --scheduler LCMScheduler --unet tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin" \\
        --model "after --pretrained_model_name_or_path outputs/sdxl-paper-short"

Each --model is a name followed by flags of eval_benchmarks.py; flags outside of it apply to every model. A
seed gives the same noise to all of them.
"""

import importlib.util
import os
import sys
from pathlib import Path

from PIL.Image import Resampling


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_benchmarks import Sampler, model_parser, parse_models
from utils.benchmarks import Prompt
from utils.cli import Parser, exit_with_error, positive_int


SIDE = 480  # pixels; height of an image on the page


def parse_args(argv=None):
    parser = Parser(description=__doc__, parents=[model_parser()])
    add = parser.add_argument
    add("--model", action="append", metavar="'NAME [flags]'",
        help="Name a model and give its flags; repeat --model to compare several.")
    add("--name", help="Name of the only model, without --model (default: its folder's or repository's).")
    add("--prompt", help="Prompt that the page opens with.")
    add("--port", type=positive_int, default=7860, help="Port on 127.0.0.1 to serve the page at.")
    args = parser.parse_args(argv)
    args.models = parse_models(args)
    if any(model.images for model in args.models.values()):
        exit_with_error("--images: the page generates images and cannot show existing ones")
    if importlib.util.find_spec("gradio") is None:
        exit_with_error("the page needs one more package: pip install gradio")
    return args


def build(samplers, prompt):
    """Build the page for samplers {name: Sampler}."""
    import gradio

    def generate(prompt, seed):
        images, seconds = [], []
        for name, sampler in samplers.items():
            sampler.seed = int(seed)
            (image,), cost = sampler([Prompt(0, prompt)])
            zoom = max(SIDE // image.height, 1)  # enlarges very small images
            images.append(image.resize((image.width * zoom, image.height * zoom), Resampling.NEAREST))
            seconds.append(f"{name}: {cost['seconds']:.2f} seconds")
        return [*images, ", ".join(seconds)]

    with gradio.Blocks(title="Side by side") as page:
        with gradio.Row():
            prompt = gradio.Textbox(prompt or "", label="Prompt", scale=6)
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
            button = gradio.Button("Generate", variant="primary")
        with gradio.Row():
            images = [gradio.Image(label=name, type="pil", height=SIDE) for name in samplers]
        seconds = gradio.Markdown()
        gradio.on([button.click, prompt.submit, seed.submit], generate, [prompt, seed], [*images, seconds])
        if prompt.value:
            page.load(generate, [prompt, seed], [*images, seconds])
    return page


def main(args):
    from accelerate import PartialState

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    device = PartialState().device
    samplers = {name: Sampler(model, 0, device) for name, model in args.models.items()}
    build(samplers, args.prompt).launch(server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    main(parse_args())
