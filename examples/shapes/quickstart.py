"""Post-train a generator of the shapes world, of one or four steps, with Diff-Instruct* and show the effect.

    python examples/shapes/quickstart.py                      # writes outputs/quickstart
    python examples/shapes/quickstart.py --model sd15_4step   # four steps: outputs/quickstart-sd15_4step
    python examples/shapes/quickstart.py --model sdxl         # the SDXL sibling: outputs/quickstart-sdxl
    python examples/shapes/quickstart.py --model sd3          # the SD3 sibling, a flow-matching transformer
    python examples/shapes/quickstart.py --seeds 0 1 2        # three training seeds, and their table

Training is `accelerate launch` of the family's training script on the training captions; flags that this
script does not know go to the training script and win over those here. The teacher in 50 steps, and the
generator before and after training (last EMA weights) in its own steps, generate images of the held-out
captions with stock pipelines from the same noise, which training never used. world.py reads their attributes
by image processing, without a network. Then eval_benchmarks.py compares all three by the reward and by a FID
on features of the small CLIP, and writes its page.

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
from typing import NamedTuple

import torch
from diffusers import LCMScheduler
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPModel

import world
from build_pipelines import (
    ASSETS,
    FOUR_TIMESTEPS,
    GENERATOR_TIMESTEP,
    REPOSITORY,
    empty_tokens_as_one,
    launch,
    launch_training,
    sample,
)
from picture import save_picture


sys.path.append(str(REPOSITORY))
from utils.card import plot_curves  # noqa: E402
from utils.cli import (  # noqa: E402
    Parser,
    exit_with_error,
    load_pipeline,
    network_of,
    quiet_libraries,
    steps_at,
)


# Not in the paper. The reward's gradient at x0 stays near the divergence's in norm.
TRAINING = ["--recipe=di_star_in", "--cfg_scale=2", "--reward_scale=25", "--assistant_updates=2",
            "--max_train_steps=200", "--train_batch_size=24", "--learning_rate=1e-4",
            "--assistant_learning_rate=4e-4", "--use_ema", "--ema_decay=0.98", "--validation_steps=50",
            "--checkpointing_steps=100", "--checkpoints_total_limit=1"]


class Model(NamedTuple):
    """A start of the quickstart: its family, the folders of assets/, and flags that follow TRAINING."""

    family: str
    reference: str
    start: str
    flags: tuple = ()


MODELS = {"sd15": Model("sd15", "teacher", "one_step"),
          # A quarter of the updates reach the last step, so the reward scale is four times as large.
          "sd15_4step": Model("sd15", "teacher", "four_step", (
              "--reward_scale=100", "--reward_steps=last",
              "--generator_timesteps", *map(str, FOUR_TIMESTEPS))),
          "sdxl": Model("sdxl", "teacher_sdxl", "one_step_sdxl"),
          "sd3": Model("sd3", "teacher_sd3", "one_step_sd3")}
TEACHER = {"num_inference_steps": 50, "guidance_scale": 2}
IMAGES_PER_CAPTION = 8
EVALUATION_SEED = 10_000
# Silences the libraries of the launched scripts, and keeps accelerate off a Mac's MPS.
ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | (
                   {"ACCELERATE_USE_CPU": "true"} if sys.platform == "darwin" else {})


def post_train(model, output_dir, seed, more):
    """Run the training script as a user does, unless its pipeline already exists."""
    if (output_dir / "model_index.json").exists():
        print(f"{output_dir} contains a finished run; it is only evaluated again")
        return
    status = launch_training(
        model.family, f"--pretrained_model_name_or_path={ASSETS / model.reference}",
        f"--generator_init={ASSETS / model.start}",
        *([] if any(word.partition("=")[0] == "--reward" for word in more) else
          [f"--reward_model_name_or_path={ASSETS / 'reward'}"]),
        f"--prompts_file={world.CAPTIONS_FILE}",
        f"--output_dir={output_dir}", f"--seed={seed}", "--resume_from_checkpoint=latest",
        "--validation_prompts", *world.TRAIN_CAPTIONS[::29], *TRAINING, *model.flags, *more)
    if status:
        print("error: training failed, see above", file=sys.stderr)
        raise SystemExit(status)


def generate(pipeline, desc, timesteps=(GENERATOR_TIMESTEP,)):
    """Return the held-out captions, each repeated, and images (n, 3, H, W) of them from fixed noise.

    Where `timesteps` is None, the pipeline is a teacher, in 50 steps with guidance.
    """
    captions = [caption for caption in world.HELD_OUT_CAPTIONS for _ in range(IMAGES_PER_CAPTION)]
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    noise = torch.randn(len(captions), 4, world.RESOLUTION // 4, world.RESOLUTION // 4, generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 0, **steps_at(pipeline, list(timesteps))} if timesteps else TEACHER
    return captions, sample(pipeline, captions, noise, desc=desc, generator=generator, **settings)


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


def benchmark(model, folder, run_dir, timesteps):
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
    reference, steps = flag_of(ASSETS / model.reference), f"--timesteps {shlex.join(map(str, timesteps))}"
    replaced = f"--unet {shlex.quote(str(ASSETS / model.start))}"
    replaced += " --scheduler LCMScheduler" * (model.family != "sd3")
    models = {"teacher, 50 steps": f"{reference} --guidance_scale 2",
              "before": f"{reference} {replaced} {steps} --guidance_scale 0",
              "after": f"{flag_of(run_dir)} {steps} --guidance_scale 0"}
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


def write_report(path, captions, seed, table, result):
    path.write_text(
        f"# Quickstart\n\nDiff-Instruct* on the shapes world, {len(captions)} images of"
        f" {len(world.HELD_OUT_CAPTIONS)} held-out captions, from noise unseen in training, read by the"
        " ground truth.\n\n"
        f"{table}\n\nThe true preference is the lighting as measured: from about -1 (lit below) to 1 (lit"
        " above) in rendered images, and beyond in generated images that are shaded more strongly.\n\n"
        f"![before and after](before_after.png)\n\n![curves](curves.png)\n\n"
        f"Seed {seed}, attribute by attribute:\n\n{details(result)}\n")


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="sd15", help="Models to start from.")
    add("--output_dir", type=Path,
        help="Folder for all results (default: outputs/quickstart or outputs/quickstart-MODEL).")
    add("--seeds", type=int, nargs="+", default=[0], help="Seeds of the training runs, one run each.")
    args, more = parser.parse_known_args()
    suffix = "" if args.model == "sd15" else f"-{args.model}"
    args.output_dir = args.output_dir or Path(f"outputs/quickstart{suffix}")
    model = MODELS[args.model]
    missing = [name for name in (model.reference, model.start, "reward") if not (ASSETS / name).is_dir()]
    if missing:
        exit_with_error(f"{ASSETS / missing[0]} is missing; build it with `make shapes`")

    os.environ |= ENVIRONMENT
    quiet_libraries()
    started = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = {seed: args.output_dir / ("pipeline" if len(args.seeds) == 1 else f"pipeline-seed-{seed}")
            for seed in args.seeds}
    for seed, run_dir in runs.items():
        post_train(model, run_dir, seed, more)
    first_run = runs[args.seeds[0]]
    timesteps = json.loads((first_run / "args.json").read_text())["generator_timesteps"]
    reference = load_pipeline(ASSETS / model.reference).to(torch.float32)
    with empty_tokens_as_one():  # an SD3 teacher takes minutes otherwise
        _, teacher = generate(reference, "generating teacher", None)
    captions, before = generate_before(model.start, model.reference, timesteps)
    results = {}
    for index, (seed, run_dir) in enumerate(runs.items()):
        of = f", seed {seed}" * (len(runs) > 1)
        _, after = generate(load_pipeline(run_dir), f"generating after{of}", timesteps)
        results[seed] = compare(captions, before, after)
        if index == 0:
            of = f", {len(timesteps)} step" + "s" * (len(timesteps) > 1)
            save_picture(args.output_dir / "before_after.png", captions, {
                "teacher, 50 steps": teacher, f"before{of}": before, f"after{of}": after})
            plot_curves(run_dir / "metrics.jsonl", args.output_dir / "curves.png")
    benchmark(model, args.output_dir / "benchmark", first_run, timesteps)
    table = "\n".join([HEADER, *(row(seed, result) for seed, result in results.items())])
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write_report(args.output_dir / "report.md", captions, args.seeds[0], table, results[args.seeds[0]])
    print(f"\n{table}\n\n{math.ceil(time.perf_counter() - started)} seconds. Look at"
          f" {args.output_dir / 'before_after.png'} (same noise), curves.png, report.md and"
          f" benchmark/report.html; the pipeline is {first_run}.")


if __name__ == "__main__":
    main()
