"""Post-train the shapes world's one-step generator with Diff-Instruct* and show the effect.

    python examples/shapes/quickstart.py                 # writes outputs/quickstart
    python examples/shapes/quickstart.py --model sdxl    # its SDXL sibling: outputs/quickstart-sdxl
    python examples/shapes/quickstart.py --model sd3     # its SD3 sibling, a flow-matching transformer
    python examples/shapes/quickstart.py --seeds 0 1 2   # three training seeds, and their table

Training is `accelerate launch train_diff_instruct_star_{model}.py` on the training captions; flags that this
script does not know go to the training script. Images of the held-out captions are generated before and after
training (last EMA weights), in one step of a stock pipeline, from the same noise, unseen in training, and
world.py reads their attributes by image processing, without a network. Then eval_benchmarks.py compares the
teacher in 50 steps with both, by the reward and by a FID on features of the small CLIP, and writes its page.
A finished training run is not repeated, only evaluated again.
"""

import json
import math
import os
import shlex
import shutil
import sys
import time
import warnings
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import LCMScheduler
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPModel

import world
from build_pipelines import (
    ASSETS,
    FIRST_TIMESTEP,
    GENERATOR_TIMESTEP,
    REPOSITORY,
    launch,
    launch_training,
    sample,
)


sys.path.append(str(REPOSITORY))
from utils.card import plot_curves  # noqa: E402
from utils.cli import Parser, exit_with_error, load_pipeline, network_of, steps_at  # noqa: E402


# Not in the paper. The reward's gradient at x0 stays near the divergence's in norm.
TRAINING = ["--recipe=di_star_in", "--cfg_scale=2", "--reward_scale=25", "--assistant_updates=2",
            "--max_train_steps=200", "--train_batch_size=24", "--learning_rate=1e-4",
            "--assistant_learning_rate=4e-4", "--use_ema", "--ema_decay=0.98", "--validation_steps=50",
            "--checkpointing_steps=100", "--checkpoints_total_limit=1"]
# {--model: (reference, start)}, folders of assets/
MODELS = {"sd15": ("teacher", "one_step"), "sdxl": ("teacher_sdxl", "one_step_sdxl"),
          "sd3": ("teacher_sd3", "one_step_sd3")}
IMAGES_PER_CAPTION = 8
EVALUATION_SEED = 10_000
# Silences the libraries of the launched scripts.
ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def post_train(model, output_dir, seed, more):
    """Run the training script as a user does, unless its pipeline already exists."""
    if (output_dir / "model_index.json").exists():
        print(f"{output_dir} contains a finished run; it is only evaluated again")
        return
    reference, start = (ASSETS / name for name in MODELS[model])
    captions = output_dir.with_suffix(".captions.txt")
    captions.parent.mkdir(parents=True, exist_ok=True)
    captions.write_text("\n".join(world.TRAIN_CAPTIONS) + "\n")
    status = launch_training(
        model, f"--pretrained_model_name_or_path={reference}", f"--generator_init={start}",
        *([] if any(word.partition("=")[0] == "--reward" for word in more) else
          [f"--reward_model_name_or_path={ASSETS / 'reward'}"]),
        f"--prompts_file={captions}",
        f"--output_dir={output_dir}", f"--seed={seed}", "--resume_from_checkpoint=latest",
        "--validation_prompts", *world.TRAIN_CAPTIONS[::29], *TRAINING, *more)
    if status:
        print("error: training failed, see above", file=sys.stderr)
        raise SystemExit(status)


def generate(pipeline, desc, timesteps=(GENERATOR_TIMESTEP,)):
    """Return the held-out captions, each repeated, and images (n, 3, H, W) of them from fixed noise."""
    captions = [caption for caption in world.HELD_OUT_CAPTIONS for _ in range(IMAGES_PER_CAPTION)]
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    noise = torch.randn(len(captions), 4, world.RESOLUTION // 4, world.RESOLUTION // 4, generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    images = sample(pipeline, captions, noise, desc=desc, generator=generator, guidance_scale=0,
                    **steps_at(pipeline, list(timesteps)))
    return captions, images


def compare(captions, before, after, resamples=2000):
    """Measure both sets of images by the ground truth; returns a dict of numbers.

    Intervals are 95%, by a bootstrap over captions. The preference is compared where a shape is found both
    before and after; alignment counts an image without a shape as wrong; diversity averages the spreads.
    """
    readings = [world.read(images) for images in (before, after)]
    preference = [world.true_preference(reading) for reading in readings]
    both = ~(preference[0].isnan() | preference[1].isnan())
    gain = torch.where(both, preference[1] - preference[0], 0).view(-1, IMAGES_PER_CAPTION).sum(1)
    count = both.view(-1, IMAGES_PER_CAPTION).sum(1)
    picks = torch.randint(len(gain), (resamples, len(gain)), generator=torch.Generator().manual_seed(0))
    means = gain[picks].sum(1) / count[picks].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    right = [torch.stack(list(world.alignment(reading, captions).values())).float().mean(1)
             for reading in readings]
    spread = [world.diversity(reading, captions) for reading in readings]
    mean_spread = [sum(values.values()) / len(values) for values in spread]
    result = {"preference_before": preference[0][both].mean().item(),
              "preference_after": preference[1][both].mean().item(),
              "gain": (gain.sum() / count.sum()).item(), "gain_low": low, "gain_high": high,
              "alignment_before": right[0].mean().item(), "alignment_after": right[1].mean().item(),
              "diversity_before": mean_spread[0], "diversity_after": mean_spread[1],
              "found_before": readings[0]["found"].float().mean().item(),
              "found_after": readings[1]["found"].float().mean().item()}
    result["effect"] = result["gain"] / preference[0][both].std().item()
    result["diversity_kept"] = result["diversity_after"] / result["diversity_before"]
    for index, name in enumerate(world.ATTRIBUTES):
        result |= {f"{name}_before": right[0][index].item(), f"{name}_after": right[1][index].item()}
    for name in spread[0]:
        result |= {f"spread_{name}_before": spread[0][name], f"spread_{name}_after": spread[1][name]}
    return result


def generate_before(start, reference="teacher", timesteps=(GENERATOR_TIMESTEP,)):
    pipeline = load_pipeline(ASSETS / reference).to(torch.float32)
    part, network = network_of(pipeline)
    setattr(pipeline, part, type(network).from_pretrained(ASSETS / start).float())
    if part == "unet":
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    return generate(pipeline, "generating before", timesteps)


class Extractor(torch.nn.Module):
    """Features (batch, width) of the small CLIP for images (batch, 3, 299, 299) in 0 to 255, for FID."""

    def __init__(self, clip):
        super().__init__()
        self.vision, self.projection = clip.vision_model, clip.visual_projection

    def forward(self, images):
        size = (world.RESOLUTION, world.RESOLUTION)
        images = torch.nn.functional.interpolate(images / 127.5 - 1, size, mode="bicubic", antialias=True)
        return self.projection(self.vision(images).pooler_output)


def benchmark(model, folder, run_dir):
    """Compare the teacher, the start and the result with eval_benchmarks.py, as a user does."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "real").mkdir(parents=True)
    images, _ = world.render(world.HELD_OUT_CAPTIONS * 4, torch.Generator().manual_seed(EVALUATION_SEED))
    for index, image in enumerate(images):
        to_pil_image(image).save(folder / "real" / f"{index:05d}.png")
    (folder / "prompts.txt").write_text("\n".join(world.HELD_OUT_CAPTIONS * 2) + "\n")
    clip = CLIPModel.from_pretrained(ASSETS / "reward", attn_implementation="eager").eval()
    with warnings.catch_warnings():  # torch.jit is deprecated
        warnings.simplefilter("ignore")
        extractor = torch.jit.trace(Extractor(clip), torch.zeros(2, 3, 299, 299), check_trace=False)
        extractor.save(folder / "extractor.pt")
    reference, start = (ASSETS / name for name in MODELS[model])
    one_step = f"--num_inference_steps 1 --timesteps {FIRST_TIMESTEP[model]} --guidance_scale 0"
    replaced = f"--unet {shlex.quote(str(start))}" + " --scheduler LCMScheduler" * (model != "sd3")
    models = {"teacher, 50 steps": f"{flag_of(reference)} --guidance_scale 2",
              "before": f"{flag_of(reference)} {replaced} {one_step}",
              "after": f"{flag_of(run_dir)} {one_step}"}
    status = launch(
        "eval_benchmarks.py", "--benchmark=prompts", f"--prompts_file={folder / 'prompts.txt'}",
        f"--output_dir={folder}", f"--fid_real={folder / 'real'}", f"--inception={folder / 'extractor.pt'}",
        "--fid_size=40", "--batch_size=32",
        *(f"--model={shlex.quote(name)} {flags}" for name, flags in models.items()),
        "--scores", f"pickscore:{ASSETS / 'reward'}")
    if status:
        print("error: the benchmark failed, see above", file=sys.stderr)
        raise SystemExit(status)


def flag_of(pipeline):
    return f"--pretrained_model_name_or_path {shlex.quote(str(pipeline))}"


def save_grid(path, captions, before, after, columns=12, zoom=3):
    """Save pairs of rows, before above after, for evenly spaced captions with the same noise."""
    rows = torch.arange(0, len(captions), len(captions) // (2 * columns))[:2 * columns]
    order = [images[row] for part in rows.split(columns) for images in (before, after) for row in part]
    side = world.RESOLUTION * zoom
    enlarged = [to_pil_image(image.clamp(0, 1)).resize((side, side), Image.Resampling.NEAREST)
                for image in order]
    grid = make_image_grid(enlarged, len(order) // columns, columns)
    margin = 52
    labelled = Image.new("RGB", (grid.width + margin, grid.height), "white")
    labelled.paste(grid, (margin, 0))
    pen = ImageDraw.Draw(labelled)
    for row in range(len(order) // columns):
        pen.text((6, row * side + side // 2 - 5), ("before", "after")[row % 2], fill="black")
    labelled.save(path)


HEADER = ("| seed | true preference, before → after | gain (95% interval) | effect, sd"
          " | alignment, before → after | diversity kept | shape found |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")


def row(seed, result):
    return (f"| {seed} | {result['preference_before']:+.3f} → {result['preference_after']:+.3f}"
            f" | {result['gain']:+.3f} ({result['gain_low']:+.3f} to {result['gain_high']:+.3f})"
            f" | {result['effect']:.2f}"
            f" | {result['alignment_before']:.1%} → {result['alignment_after']:.1%}"
            f" | {result['diversity_kept']:.0%}"
            f" | {result['found_before']:.1%} → {result['found_after']:.1%} |")


def details(result):
    lines = ["| | before | after |", "| --- | --- | --- |"]
    lines += [f"| {name} right | {result[f'{name}_before']:.1%} | {result[f'{name}_after']:.1%} |"
              for name in world.ATTRIBUTES]
    lines += [f"| spread of {name}, relative to the world's | {result[f'spread_{name}_before']:.2f}"
              f" | {result[f'spread_{name}_after']:.2f} |" for name in ("x", "y", "rotation", "tint")]
    return "\n".join(lines)


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="sd15", help="Format of the models.")
    add("--output_dir", type=Path,
        help="Folder for all results (default: outputs/quickstart or outputs/quickstart-MODEL).")
    add("--seeds", type=int, nargs="+", default=[0], help="Seeds of the training runs, one run each.")
    args, more = parser.parse_known_args()
    suffix = "" if args.model == "sd15" else f"-{args.model}"
    args.output_dir = args.output_dir or Path(f"outputs/quickstart{suffix}")
    missing = [name for name in (*MODELS[args.model], "reward") if not (ASSETS / name).is_dir()]
    if missing:
        exit_with_error(f"{ASSETS / missing[0]} is missing; build it with `make shapes`")

    os.environ |= ENVIRONMENT
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    started = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = {seed: args.output_dir / ("pipeline" if len(args.seeds) == 1 else f"pipeline-seed-{seed}")
            for seed in args.seeds}
    for seed, run_dir in runs.items():
        post_train(args.model, run_dir, seed, more)
    timesteps = [FIRST_TIMESTEP[args.model]]
    captions, before = generate_before(*reversed(MODELS[args.model]), timesteps)
    results = {}
    for index, (seed, run_dir) in enumerate(runs.items()):
        of = f", seed {seed}" * (len(runs) > 1)
        _, after = generate(load_pipeline(run_dir), f"generating after{of}", timesteps)
        results[seed] = compare(captions, before, after)
        if index == 0:
            save_grid(args.output_dir / "before_after.png", captions, before, after)
            plot_curves(run_dir / "metrics.jsonl", args.output_dir / "curves.png")
    benchmark(args.model, args.output_dir / "benchmark", runs[args.seeds[0]])
    table = "\n".join([HEADER, *(row(seed, result) for seed, result in results.items())])
    first = results[args.seeds[0]]
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.output_dir / "report.md").write_text(
        f"# Quickstart\n\nDiff-Instruct* on the shapes world, {len(captions)} images of"
        f" {len(world.HELD_OUT_CAPTIONS)} held-out captions, from noise unseen in training, read by the"
        " ground truth.\n\n"
        f"{table}\n\nThe true preference is the lighting, from -1 (lit below) to 1 (lit above).\n\n"
        f"![before and after](before_after.png)\n\n![curves](curves.png)\n\n"
        f"Seed {args.seeds[0]}, attribute by attribute:\n\n{details(first)}\n")
    print(f"\n{table}\n\n{math.ceil(time.perf_counter() - started)} seconds. Look at"
          f" {args.output_dir / 'before_after.png'} (same noise), curves.png, report.md and"
          f" benchmark/report.html; the pipeline is {runs[args.seeds[0]]}.")


if __name__ == "__main__":
    main()
