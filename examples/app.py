#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Show in a web page what several models generate from the same prompt and noise, side by side.

    pip install gradio
    python examples/app.py --timesteps 399 --guidance_scale 0 \\
        --model "before --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
                 --scheduler LCMScheduler --unet tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin" \\
        --model "after --pretrained_model_name_or_path outputs/sdxl-paper-short"

Each --model is a name followed by flags of eval_benchmarks.py; flags outside of it apply to every model. The
noise of image n, counted from 0, depends only on the page's seed + n and is the same for every model.
"""

import html
import importlib.util
import os
import random
import sys
from pathlib import Path

from PIL.Image import Resampling


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_benchmarks import Sampler, model_parser, parse_models
from utils.benchmarks import Prompt
from utils.cli import Parser, exit_with_error, positive_int


ABOUT = """# Side by side
Every model generates from the same prompt, and images with the same seed start from the same noise: whatever
differs is due to the models."""
PROMPTS = [  # of objects, count, colour, text, place and style
    "a raccoon in a spacesuit, holding a lantern", "five paper boats on a pond",
    "a green bicycle in front of a pink wall", 'a wooden sign that says "NO SWIMMING" at a lake',
    "a cat asleep under a table and a dog on top of it", "a lighthouse in a storm, oil painting"]
SIDE = 480  # pixels; images of at most half this height are enlarged


def parse_args(argv=None):
    parser = Parser(description=__doc__, parents=[model_parser()])
    add = parser.add_argument
    add("--model", action="append", metavar="'NAME [flags]'",
        help="Name a model and give its flags; repeat --model to compare several.")
    add("--name", help="Name of the only model, without --model (default: its folder's or repository's).")
    add("--prompt", help="Prompt that the page opens with.")
    add("--num_images", type=positive_int, default=4, help="Images of each model that the page opens with.")
    add("--port", type=positive_int, default=7860, help="Port on 127.0.0.1 to serve the page at.")
    args = parser.parse_args(argv)
    args.models = parse_models(args)
    if any(model.images for model in args.models.values()):
        exit_with_error("--images: the page generates images and cannot show existing ones")
    if importlib.util.find_spec("gradio") is None:
        exit_with_error("the page needs one more package: pip install gradio")
    return args


def generate(samplers, prompt, count, seed):
    """Return {name: [(PIL image, caption)]} for samplers {name: Sampler}, with the seeds from `seed` on."""
    shown = {name: [] for name in samplers}
    for name, sampler in samplers.items():
        for one in range(seed, seed + count):
            (image,), cost = sampler([Prompt(one, prompt)])  # a Sampler's noise depends on the prompt's index
            zoom = max(SIDE // image.height, 1)
            image = image.resize((image.width * zoom, image.height * zoom), Resampling.NEAREST)
            shown[name].append((image, f"seed {one}, {cost['seconds']:.2f} seconds"))
    return shown


def build(samplers, opening_prompt, num_images):
    """Build the page for samplers {name: Sampler}."""
    import gradio

    def show(prompt, count, seed):
        shown = generate(samplers, prompt, int(count), seed or 0)  # an emptied field is None
        return {galleries[name]: images for name, images in shown.items()}

    with gradio.Blocks(title="Side by side") as page:
        gradio.Markdown(ABOUT)
        with gradio.Row():
            prompt = gradio.Textbox(opening_prompt or "", label="Prompt", scale=3)
            count = gradio.Slider(1, max(num_images, 8), num_images, step=1, label="Images of each model")
            seed = gradio.Number(0, label="Seed of the first image", precision=0, minimum=0)
        with gradio.Row():
            button = gradio.Button("Generate", variant="primary")
            random_seed = gradio.Button("Random seed")
        galleries = {name: gradio.Gallery(label=name, columns=2, format="png", object_fit="contain",
                                          height="auto", show_label=False, render=False) for name in samplers}
        inputs, outputs = [prompt, count, seed], [*galleries.values()]
        gradio.Examples([[text] for text in PROMPTS], inputs, outputs, show, run_on_click=True)
        with gradio.Row():
            for name, gallery in galleries.items():
                with gradio.Column(min_width=SIDE // 2):
                    gradio.HTML(f"<h2>{html.escape(name)}</h2>")
                    gallery.render()
        gradio.on([button.click, prompt.submit, seed.submit], show, inputs, outputs)
        random_seed.click(lambda: random.randrange(10**6), None, seed).then(show, inputs, outputs)
        if opening_prompt:
            page.load(show, inputs, outputs)
    return page


def main(args):
    from accelerate import PartialState

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    samplers = {name: Sampler(model, 0, PartialState().device) for name, model in args.models.items()}
    page = build(samplers, args.prompt, args.num_images)
    page.launch(server_name="127.0.0.1", server_port=args.port, show_error=True)


if __name__ == "__main__":
    main(parse_args())
