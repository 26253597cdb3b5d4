"""Test the paper's Table 2 and its claims in the shapes world, with error bars.

    python examples/shapes/ablation.py --plan      # list every missing run with its cost
    python examples/shapes/ablation.py             # run all that docs/ablation/results.jsonl lacks
    python examples/shapes/ablation.py --only di_star_in sim --seeds 7
    python examples/shapes/ablation.py --report    # write docs/ablation.md and its figures

A run is the training script from the shipped one-step start; `--processes` runs go at once, with one thread
each. A run is measured at its last averaged weights, on 512 images of the 64 held-out captions, with noise
unseen in training, by the ground truth of world.py. No best checkpoint is selected and no seed is left out:
seeds are fixed beforehand, five for the settings of claims (a) to (c), three for the others. A killed run
continues from its checkpoint.
"""

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import diffusers
import matplotlib
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torchvision.transforms.functional import to_tensor
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor

import world
from build_pipelines import ASSETS, FOUR_TIMESTEPS, GENERATOR_TIMESTEP, REPOSITORY, sample
from quickstart import ENVIRONMENT, EVALUATION_SEED, IMAGES_PER_CAPTION, generate, generate_before


sys.path.append(str(REPOSITORY))
from utils import fid  # noqa: E402
from utils.card import read_validation  # noqa: E402
from utils.cli import Parser, exit_on_error, exit_with_error, positive_int, quiet_libraries  # noqa: E402


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


RESULTS, PAGE = REPOSITORY / "docs" / "ablation" / "results.jsonl", REPOSITORY / "docs" / "ablation.md"
# Flags of every run; a setting's flags follow and win. Guidance 2 stands for the paper's 7.5, 1.5 for 4.5.
# Reward scale 25 stands for its 100: `grad_reward` is then about 0.4 of `grad_divergence`.
COMMON = ["--assistant_updates=2", "--max_train_steps=150", "--train_batch_size=12", "--learning_rate=1e-4",
          "--assistant_learning_rate=4e-4", "--use_ema", "--ema_decay=0.98", "--validation_steps=25",
          "--num_validation_images=4", "--checkpointing_steps=50", "--checkpoints_total_limit=1",
          f"--resolution={world.RESOLUTION}", f"--generator_timesteps={GENERATOR_TIMESTEP}"]
GUIDED = ["--cfg_scale=2", "--reward_scale=25"]
TEACHER_STEPS = 50
DPO_TEACHER, FOUR_STEP = ASSETS / "teacher_dpo", ASSETS / "four_step"
TABLE_2 = {  # rows of the paper's Table 2 and their recipes
    "kl_only": ["--recipe=kl_only"],
    "diff_instruct": ["--recipe=diff_instruct", "--cfg_scale=2"],
    "diff_instruct_pp": ["--recipe=diff_instruct_pp", *GUIDED],
    "di_star_out": ["--recipe=di_star_out", "--cfg_scale=0.125", "--reward_scale=25"],
    "score_only": ["--recipe=score_only"],
    "sim": ["--recipe=sim", "--cfg_scale=2"],
    "di_star_in_reward_1": ["--recipe=di_star_in", "--cfg_scale=2", "--reward_scale=0.25"],
    "di_star_in_reward_10": ["--recipe=di_star_in", "--cfg_scale=2", "--reward_scale=2.5"],
    "di_star_in_cfg_4.5": ["--recipe=di_star_in", "--cfg_scale=1.5", "--reward_scale=25"],
    "di_star_in": ["--recipe=di_star_in", *GUIDED],
}
# Reward scales of the fronts. The ratio of the gradients matters: for KL and the squared distance the norm at
# x0 is |y|, about 10 here; for pseudo-Huber it is below 1. So the former's scales are 16 times as large.
SCALES, UNBOUNDED = (0, 12.5, 25, 50, 100, 200, 400), 16
KINDS = {"score, in": ["--recipe=di_star_in", "--cfg_scale=2"],
         "KL, in": ["--recipe=diff_instruct_pp", "--cfg_scale=2"],
         "score, out": ["--recipe=di_star_out", "--cfg_scale=0.125"],
         "score, in, detached": ["--recipe=di_star_in", "--cfg_scale=2", "--score_gradient=detached"],
         "score, in, squared": ["--recipe=di_star_in", "--cfg_scale=2", "--distance=l2"]}
SAME = {("score, in", 0): "sim", ("score, in", 25): "di_star_in", ("KL, in", 0): "diff_instruct",
        ("KL, in", 25): "diff_instruct_pp", ("score, out", 25): "di_star_out"}
SENSITIVITY = {
    "c = 0.01": ["--pseudo_huber_c=0.01"], "c = 1": ["--pseudo_huber_c=1"],
    "K_TA = 1": ["--assistant_updates=1"], "K_TA = 5": ["--assistant_updates=5"],
    "assistant's rate x 1/4": ["--assistant_learning_rate=1e-4"],
    "assistant's rate x 4": ["--assistant_learning_rate=1.6e-3"],
    "weighting score": ["--weighting=score"], "weighting dmd": ["--weighting=dmd"]}
# The guidance reward of *out* is unbounded: at the guidance scale of *in* it is ten times the divergence.
OUT = {f"out, guidance {scale:g}": ["--recipe=di_star_out", f"--cfg_scale={scale:g}", "--reward_scale=25"]
       for scale in (0.03, 0.5, 2)}
FRONTS, SETTINGS = {}, dict(TABLE_2)
for _kind, _flags in KINDS.items():
    _factor = UNBOUNDED if _kind in ("KL, in", "score, in, squared") else 1
    _scales = {_scale * _factor for _scale in SCALES if _kind == "score, in" or _scale != 12.5}
    for _scale in sorted(_scales | ({25} if _kind == "KL, in" else set())):  # Table 2 has 25
        _name = SAME.get((_kind, _scale), f"{_kind}, {_scale:g}")
        FRONTS.setdefault(_kind, {})[_scale] = _name
        SETTINGS.setdefault(_name, [*_flags, f"--reward_scale={_scale:g}"])
SETTINGS |= {name: ["--recipe=di_star_in", *GUIDED, *flags] for name, flags in SENSITIVITY.items()}
SETTINGS |= {**OUT, "DPO reference": ["--recipe=di_star_in", *GUIDED, f"--reference_unet={DPO_TEACHER}"],
             "four times as long": ["--recipe=di_star_in", *GUIDED, "--max_train_steps=600",
                                    f"--validation_reward=clip:{ASSETS / 'reward_2'}"]}
# Beyond the paper. With four steps, an update rewards only the last (with probability 1/4) or all of them.
FOUR = [f"--generator_init={FOUR_STEP}", "--generator_timesteps", *map(str, FOUR_TIMESTEPS)]
BEYOND = {f"4 steps, reward {scale:g} at {steps}": [
    "--recipe=di_star_in", "--cfg_scale=2", f"--reward_scale={scale:g}", f"--reward_steps={steps}", *FOUR]
    for steps, scales in {"last": (25, 100), "all": (6.25, 25)}.items() for scale in scales}
BEYOND |= {f"preference model alone, {scale:g}": [
    "--recipe=sim", "--cfg_scale=2", f"--preference_unet={DPO_TEACHER}", f"--preference_scale={scale:g}"]
    for scale in (0.05, 0.1, 0.2)}
SETTINGS |= BEYOND
CLAIMED = {*TABLE_2, *FRONTS["score, in"].values(), *FRONTS["KL, in"].values()}
SEEDS = range(5)  # of the settings of claims (a) to (c); the others have the first three
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # {dof: 97.5%}


def seeds_of(name):
    return SEEDS if name in CLAIMED else SEEDS[:3]


def updates(name):
    """Return the number of updates of a setting; the last flag wins."""
    given = [flag for flag in (*COMMON, *SETTINGS[name]) if flag.startswith("--max_train_steps=")]
    return int(given[-1].partition("=")[2])


# ---------------------------------------------------------------------------------------------- running


def command(name, seed, output_dir):
    """Return the command line of a run, with paths relative to the repository."""
    held = ASSETS.relative_to(REPOSITORY)
    return ["train_diff_instruct_star_sd15.py", f"--pretrained_model_name_or_path={held / 'teacher'}",
            f"--generator_init={held / 'one_step'}", f"--reward_model_name_or_path={held / 'reward'}",
            f"--prompts_file={output_dir.parent / 'captions.txt'}", f"--output_dir={output_dir}",
            f"--seed={seed}", *COMMON, *(flag.replace(f"{REPOSITORY}/", "") for flag in SETTINGS[name])]


class Ruler:
    """Measure models with the small CLIP, and with its features of the teacher's and of rendered images."""

    def __init__(self):
        self.clip = CLIPModel.from_pretrained(ASSETS / "reward").float().eval()  # stored in float16
        self.processor = CLIPProcessor.from_pretrained(ASSETS / "reward")
        self.captions = [caption for caption in world.HELD_OUT_CAPTIONS for _ in range(IMAGES_PER_CAPTION)]
        captions, rng = self.captions, torch.Generator().manual_seed(EVALUATION_SEED + 1)
        rendered, _ = world.render(captions, rng)
        noise = torch.randn(len(captions), 4, world.RESOLUTION // 4, world.RESOLUTION // 4, generator=rng)
        teacher = DiffusionPipeline.from_pretrained(ASSETS / "teacher").to(torch.float32)
        teacher.set_progress_bar_config(disable=True)
        self.teacher = sample(teacher, captions, noise, desc="the teacher's images",
                              num_inference_steps=TEACHER_STEPS, guidance_scale=2)
        self.others = {"teacher": self.features(self.teacher), "rendered": self.features(rendered)}

    @torch.no_grad()
    def features(self, images):
        """Return mean and covariance of the small CLIP's image features."""
        vision, projection = self.clip.vision_model, self.clip.visual_projection
        return fid.statistics(torch.cat([projection(vision(part * 2 - 1).pooler_output)
                                         for part in images.clamp(0, 1).split(64)]))

    @torch.no_grad()
    def reward(self, images, captions):
        """Return the mean score of the reward model, the cosine of image and caption."""
        inputs = self.processor(text=captions, images=[image.permute(1, 2, 0).numpy() for image in images],
                                do_rescale=False, return_tensors="pt", padding=True)
        output = self.clip(**inputs)
        return (output.image_embeds * output.text_embeds).sum(-1).mean().item()

    def measure(self, captions, images, resamples=2000):
        """Measure 512 images by the ground truth; the interval is a bootstrap over captions."""
        reading = world.read(images)
        lighting = world.true_preference(reading).view(-1, IMAGES_PER_CAPTION)
        sums, counts = lighting.nansum(1), (~lighting.isnan()).sum(1)
        picks = torch.randint(len(sums), (resamples, len(sums)), generator=torch.Generator().manual_seed(0))
        means = sums[picks].sum(1) / counts[picks].sum(1).clamp(min=1)
        low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
        right = {f"{name}_right": value.float().mean().item()
                 for name, value in world.alignment(reading, captions).items()}
        spread = {name: 0.0 if math.isnan(value) else value  # nan if no shape is found
                  for name, value in world.diversity(reading, captions).items()}
        groups = images.clamp(0, 1).unflatten(0, (-1, IMAGES_PER_CAPTION))
        own = self.features(images)
        return {"preference": (sums.sum() / counts.sum().clamp(min=1)).item(), "preference_low": low,
                "preference_high": high, "reward": self.reward(images.clamp(0, 1), captions),
                "found": reading["found"].float().mean().item(),
                "alignment": sum(right.values()) / len(right), **right,
                "diversity": sum(spread.values()) / len(spread),
                **{f"spread_{name}": value for name, value in spread.items()},
                "pixels_over_noise": groups.std(1).mean().item(),
                "pixels_over_prompts": groups.mean(1).std(0).mean().item(),
                **{f"frechet_{name}": fid.frechet_distance(own, other)
                   for name, other in self.others.items()}}


def curve(folder):
    """Return [[updates, true preference, reward, diversity, held-out reward]] of a run's validations."""
    found = []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        shown = read_validation(folder, line["step"]) if "validation_diversity_over_noise" in line else []
        if shown:
            size = (world.RESOLUTION, world.RESOLUTION)  # the grid enlarges small images
            images = torch.stack([to_tensor(image.resize(size, Image.Resampling.NEAREST))
                                  for _, image in shown])
            lighting = world.true_preference(world.read(images)).nanmean().item()
            found.append([line["step"], lighting, line.get("validation_reward"),
                          line["validation_diversity_over_noise"], line.get("validation_reward_clip")])
    return found


def run(name, seed, work, ruler, lock):
    """Train and measure a run, append its record to the results, and delete all but the curves' sources."""
    folder, started = work / f"{name.replace(' ', '_').replace('/', '_')}-{seed}", time.perf_counter()
    words = command(name, seed, folder)
    ended = subprocess.run([sys.executable, *words, "--resume_from_checkpoint=latest", "--validation_prompts",
                            *world.TRAIN_CAPTIONS[::29]], cwd=REPOSITORY, capture_output=True, text=True,
                           env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
    if ended.returncode:
        raise RuntimeError(f"{name}, seed {seed}: {ended.stderr[-1000:]}")
    timesteps = json.loads((folder / "args.json").read_text())["generator_timesteps"]
    logged = [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
              if "y_norm" in line]
    last = {key: statistics.mean(line[key] for line in logged[-5:]) for key in (
        "y_norm", "grad_divergence", "grad_reward", "grad_cfg") if key in logged[-1]}
    printed = shlex.join(words).replace(str(work), "outputs/ablation")
    with lock:  # loading two pipelines at once is not thread-safe
        captions, images = generate(DiffusionPipeline.from_pretrained(folder), None, timesteps)
        record = {"setting": name, "seed": seed, "command": printed, "updates": updates(name),
                  "seconds": round(time.perf_counter() - started), "torch": torch.__version__,
                  "diffusers": diffusers.__version__, **ruler.measure(captions, images), **last,
                  "curve": curve(folder)}
        with open(RESULTS, "a") as file:
            file.write(json.dumps(record) + "\n")
    for path in folder.iterdir():
        if path.name not in ("validation", "metrics.jsonl", "args.json", "README.md"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_results(path=None):
    path = path or RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plan(only, seeds):
    """Return [(setting, seed)] without a record, all settings of a seed before the next seed."""
    done = {(record["setting"], record["seed"]) for record in read_results()}
    wanted = [(name, seed) for name in only or SETTINGS
              for seed in (seeds if seeds is not None else seeds_of(name))]
    return sorted((one for one in wanted if one not in done), key=lambda one: one[1])


# --------------------------------------------------------------------------------------------- reporting

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "undecided"
# A run has collapsed below any of these: alignment, fraction with a shape, diversity relative to the start.
ALIGNED, FOUND, DIVERSE = 0.75, 0.5, 0.5


def by_setting(records):
    """Return {setting: {seed: record}}, with the newest record of a repeated run."""
    found = {}
    for record in records:
        found.setdefault(record["setting"], {})[record["seed"]] = record
    return found


def interval(values):
    """Return (mean, half-width of the 95% t-interval) over seeds; infinite for fewer than two."""
    values = list(values)
    if len(values) < 2:
        return (values or [math.nan])[0], math.inf
    quantile = T_QUANTILE[min(len(values) - 1, max(T_QUANTILE))]
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired(runs, one, other, figure):
    """Return the differences one - other of a figure over the seeds that both have."""
    seeds = sorted(set(runs.get(one, {})) & set(runs.get(other, {})))
    return [runs[one][seed][figure] - runs[other][seed][figure] for seed in seeds]


def verdict(values):
    """Return the verdict on the claim that these differences are above zero."""
    mean, half = interval(values)
    return HOLDS if mean - half > 0 else FAILS if mean + half < 0 else OPEN


def shown(values, form="+.3f"):
    mean, half = interval(values)
    if math.isnan(mean):
        return "not run"
    return f"{mean:{form}} ± {half:{form.lstrip('+')}}" if half < math.inf else f"{mean:{form}} (one seed)"


def front(runs, kind, seed):
    """Return a kind's records of a seed by increasing scale; empty unless all exist."""
    held = [runs[name][seed] for name in FRONTS[kind].values() if seed in runs.get(name, {})]
    return held if len(held) == len(FRONTS[kind]) else []


def figure_at(front, preference, figure):
    """Interpolate a figure linearly where a front first reaches a true preference; None if it does not."""
    for one, other in zip(front, front[1:]):
        if one["preference"] <= preference <= other["preference"]:
            along = (preference - one["preference"]) / max(other["preference"] - one["preference"], 1e-9)
            return one[figure] + (other[figure] - one[figure]) * along
    return None


def at_equal_preference(runs, one, other, figure):
    """Return pairs of a figure per seed, averaged over the true preferences that both fronts reach."""
    found = []
    for seed in SEEDS:
        fronts = front(runs, one, seed), front(runs, other, seed)
        levels = [[figure_at(held, 0.05 * step, figure) for held in fronts] for step in range(1, 30)]
        both = [level for level in levels if None not in level]
        found += [list(map(statistics.mean, zip(*both)))] if both else []
    return found


def ratio_of(record):
    """Return `grad_reward` / `grad_divergence` over a run's last updates."""
    return record.get("grad_reward", 0) / record["grad_divergence"]


def kept(record, start):
    """Return each figure relative to its threshold of collapse; a run below 1 has collapsed."""
    return {"alignment": record["alignment"] / ALIGNED, "shape found": record["found"] / FOUND,
            "diversity": record["diversity"] / start["diversity"] / DIVERSE}


def collapse(front, places, start):
    """Interpolate log2 of the place, such as the reward scale, at which a front collapses, or None."""
    figures = [kept(record, start).values() for record in front]
    places = [math.log2(max(place, 1e-3)) for place in places]
    for low, high, before, after in zip(places, places[1:], figures, figures[1:]):
        along = [max(one - 1, 0) / (one - other) for one, other in zip(before, after) if other < min(one, 1)]
        if along:
            return low + (high - low) * min(along)
    return None


def weakest(runs, start):
    """Say which figure falls below its threshold first where fronts collapse."""
    firsts = []
    for kind in FRONTS:
        for held in (front(runs, kind, seed) for seed in SEEDS):
            figures = (kept(record, start) for record in held)
            below = next((one for one in figures if min(one.values()) < 1), None)
            firsts += [min(below, key=below.get)] if below else []
    named = ", ".join(f"{name} in {firsts.count(name)}" for name in dict.fromkeys(firsts))
    return f"What gives way first, of {len(firsts)} fronts that collapse: {named}." if firsts else ""


def collapses(runs, kind, start):
    """Return the places of collapse (by reward scale, by gradient ratio) of a kind's fronts, per seed."""
    fronts = [front(runs, kind, seed) for seed in SEEDS]
    return [[collapse(held, places, start) for places in (FRONTS[kind], map(ratio_of, held))]
            for held in fronts]


def claims(runs):
    """Return [(claim, finding, verdict)] over the fixed seeds; the seed of a start is None."""
    runs = {name: {seed: record for seed, record in held.items() if seed in (None, *seeds_of(name))}
            for name, held in runs.items()}
    start, found = runs["start"][None], []

    def add(claim, words, values, form="+.3f"):
        found.append((claim, f"{words}: {shown(values, form)} ({len(values)} seeds)",
                      verdict(values) if values else OPEN))

    def at_equal(claim, one, other):
        for figure in ("diversity", "alignment"):
            pairs = at_equal_preference(runs, one, other, figure)
            times = f" ({statistics.mean(x / y for x, y in pairs):.2f} times)" if pairs else ""
            add(f"{claim}: {figure}", f"difference at equal true preference{times}",
                [x - y for x, y in pairs])

    others = {name: paired(runs, "di_star_in", name, "reward") for name in TABLE_2 if name != "di_star_in"}
    next_best = min(others, key=lambda name: statistics.mean(others[name] or [math.inf]))
    verdicts = [verdict(values) if values else OPEN for values in others.values()]
    found.append(("(a) DI\\* in with the full reward scale has the highest reward of Table 2's rows",
                  f"di_star_in minus {next_best}, the closest: {shown(others[next_best], '+.4f')}",
                  FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS))
    at_equal("(b) score keeps more than KL", "score, in", "KL, in")
    both = list(zip(collapses(runs, "score, in", start), collapses(runs, "KL, in", start)))
    for index, place in enumerate(("reward scale", "ratio of the gradients")):
        ends = [score[index] - kl[index] for score, kl in both if None not in (score[index], kl[index])]
        add(f"(c) KL collapses at a smaller {place} than score", "log2 of that, score minus KL", ends, "+.2f")
    add("(d) without guidance alignment falls", "with guidance minus without",
        paired(runs, "sim", "score_only", "alignment"))
    for words, scale in (("the full reward scale", 25), ("four times the full reward scale", 100)):
        add(f"(e) {words} costs alignment", f"reward scale 0 minus {scale}",
            paired(runs, "sim", FRONTS["score, in"][scale], "alignment"))
    at_equal("(f) *in* keeps more than *out* at guidance 0.125", "score, in", "score, out")
    for figure in ("preference", "diversity"):
        add(f"(f) *in* has more than *out* at guidance 0.03: {figure}", "difference at the full reward scale",
            paired(runs, "di_star_in", "out, guidance 0.03", figure))
    for figure in ("preference", "alignment"):
        add(f"(g) a pre-aligned reference adds: {figure}", "with minus without",
            paired(runs, "DPO reference", "di_star_in", figure))
    for figure in ("preference", "alignment"):
        add(f"(h) longer training adds: {figure}", "600 updates minus 150",
            paired(runs, "four times as long", "di_star_in", figure))
    at_equal("(i) pseudo-Huber keeps more than squared", "score, in", "score, in, squared")
    at_equal("(j) the theorem's gradient keeps more than listing 1's", "score, in", "score, in, detached")
    for last, every in ((25, 6.25), (100, 25)):
        add(f"(k) of four steps, reward {last} at the last adds more true preference than {every:g} at all",
            "difference at equal expected gradient", paired(
                runs, f"4 steps, reward {last} at last", f"4 steps, reward {every:g} at all", "preference"))
    ahead = runs.get("start, 4 steps", {None: start})[None]["kind_right"] - start["kind_right"]
    add("(l) four steps show the kind, the weakest attribute, better than one",
        f"difference after training (of the starts {ahead:+.3f})",
        paired(runs, "4 steps, reward 25 at last", "di_star_in", "kind_right"))
    alone = runs.get("preference model alone, 0.05", {})
    for figure in ("preference", "alignment", "diversity"):
        add(f"(m) a preference model alone adds: {figure}", "with minus the start",
            [record[figure] - start[figure] for record in alone.values()])
    for figure in ("alignment", "diversity"):
        explicit = {seed: figure_at(front(runs, "score, in", seed), record["preference"], figure)
                    for seed, record in alone.items()}
        add(f"(m) and keeps more than the explicit reward: {figure}", "difference at equal true preference",
            [alone[seed][figure] - held for seed, held in explicit.items() if held is not None])
    return found


COLUMNS = {"true preference": ("preference", "+.3f"), "reward": ("reward", ".4f"),
           "alignment": ("alignment", ".3f"), "kind right": ("kind_right", ".3f"),
           "shape found": ("found", ".3f"), "diversity": ("diversity", ".3f"),
           "Fréchet to teacher": ("frechet_teacher", ".3f"), "to rendered": ("frechet_rendered", ".3f"),
           "distance (y_norm)": ("y_norm", ".2f"), "grad_reward / grad_divergence, median": (None, ".2f")}


def table(runs, names):
    lines = ["| setting | seeds | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name in names:
        records = list(runs.get(name, {}).values())
        cells = []
        for figure, form in COLUMNS.values():
            if figure:
                drawn = [record for record in records if record["found"] or figure in ("found", "alignment")]
                values = [record[figure] for record in drawn if figure in record]
            else:
                values = [ratio_of(record) for record in records if "grad_reward" in record]
                values = [statistics.median(values)] if values else []  # single updates are outliers
            cells.append(shown(values, form).replace(" (one seed)", "") if values else
                         "no shape" if figure == "preference" and records else "")
        lines.append(f"| {name} | {len(records)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_figure(figure, path):
    figure.axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_fronts(runs, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, what in zip(axes, ("diversity", "alignment")):
        for color, kind in enumerate(FRONTS):
            points = []
            for name in FRONTS[kind].values():
                held = list(runs.get(name, {}).values())
                if held:
                    values = [[record[key] for record in held] for key in ("preference", what)]
                    points.append(list(map(statistics.mean, values)))
                    axis.scatter(*values, s=6, color=f"C{color}", alpha=0.4)
            if points:
                axis.plot(*zip(*points), color=f"C{color}", label=kind, linewidth=1)
        start = runs["start"][None]
        axis.scatter([start["preference"]], [start[what]], marker="*", color="black", label="start", zorder=3)
        axis.set(xlabel="true preference", ylabel=what)
    save_figure(figure, path)


def plot_curves(runs, path):
    words = ("true preference", "reward that is trained", "diversity of pixels over noise", "held-out reward")
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4))
    for color, name in enumerate(("di_star_in", "four times as long")):
        for seed, record in runs.get(name, {}).items():
            steps, *curves = zip(*record["curve"])
            for axis, values in zip(axes, curves):
                if None not in values:
                    axis.plot(steps, values, color=f"C{color}", alpha=0.6, linewidth=1,
                              label=name if seed == 0 else None)
    for axis, word in zip(axes, words):
        axis.set(xlabel="updates", title=word)
    save_figure(figure, path)


def levelled(runs):
    """Say how much of the preference of a longer run the default reaches."""
    default, longer = (runs.get(name, {}) for name in ("di_star_in", "four times as long"))
    pairs = [(default[seed]["preference"], longer[seed]["preference"]) for seed in {*default} & {*longer}]
    if not pairs:
        return ""
    one, four = map(statistics.mean, zip(*pairs))
    return (f"A run has {updates('di_star_in')} updates; the default then has {one / four:.0%} of the true"
            f" preference of {updates('four times as long')} updates\n(the curves below).")


def write(records, page):
    """Write the page and its figures from the records.

    Args:
        records: lines of results.jsonl. page: path of the page; figures go into the folder of the same name.
    """
    runs, folder = by_setting(records), page.with_suffix("")
    folder.mkdir(exist_ok=True)
    plot_fronts(runs, folder / "fronts.png")
    plot_curves(runs, folder / "curves.png")
    wanted = {(name, seed) for name in SETTINGS for seed in seeds_of(name)}
    done = {(record["setting"], record["seed"]) for record in records}
    versions = sorted({f"torch {record['torch']}, diffusers {record['diffusers']}"
                       for record in records if "torch" in record})
    example = next((record["command"] for record in records if record["setting"] == "di_star_in"), "")
    listed = "\n".join(f"| {claim} | {what} | **{word}** |" for claim, what, word in claims(runs))
    flags = "\n".join(f"| {name} | `{' '.join(words).replace(f'{REPOSITORY}/', '')}` |"
                      for name, words in SETTINGS.items())
    page.write_text(f"""# Ablation: the paper's Table 2 and its claims in the shapes world

This page is written by `python examples/shapes/ablation.py --report` from
[results.jsonl](ablation/results.jsonl), which has every run. {len(wanted & done)} of {len(wanted)} planned
runs are done{'' if wanted <= done else ', so that verdicts are preliminary'}.
Versions: {'; '.join(versions)}.

A run is the training script from the shipped one-step start. It is measured at its last averaged weights, on
512 images of the 64 held-out captions, by the ground truth. Intervals are 95% t-intervals over seeds, of
differences paired by seed, or to the one start. "Diversity" is the spread of place, rotation and tint over
noise, relative to the world's own. A run has collapsed where its alignment is below {ALIGNED:.0%}, a shape is
found in less than {FOUND:.0%} of its images, or its diversity is below {DIVERSE:.0%} of the start's; these
bounds were set when the ends of the fronts had been seen for seed 0. At equal true preference means:
interpolated on the fronts, and averaged over the preferences that both of them reach.

{levelled(runs)} {weakest(runs, runs["start"][None])}

The raw reward scales of (c) are in different units, because KL's gradient is the difference |y| itself, about
ten times pseudo-Huber's; the ratio of the gradients is the fair comparison.

## The claims

| claim | found | verdict |
| --- | --- | --- |
{listed}

![fronts](ablation/fronts.png)

Each point is a reward scale; lines join the means over seeds, from the smallest scale to the largest.

## Table 2

{table(runs, ['start', 'teacher', *TABLE_2])}

KL's gradient is not bounded, so that at the same reward scale `diff_instruct_pp` has almost no reward: the
last column says how much each row has.

## Fronts

{table(runs, [name for kind in FRONTS for name in FRONTS[kind].values()])}

## Sensitivity

{table(runs, ['di_star_in', *SENSITIVITY, *OUT, 'DPO reference', 'four times as long'])}

## Beyond the paper

{table(runs, ['start', 'di_star_in', 'start, 4 steps', *list(BEYOND)[:4], 'teacher', *list(BEYOND)[4:]])}

The ratio of *last* is of the updates that reward, one in four.

{(PAGE.with_suffix("") / "beyond.md").read_text()}
![curves](ablation/curves.png)

The curves are of the validation images (training captions, fixed noise), read by the ground truth.

## Where the shapes world differs

Its guidance scales are 0, 1.5 and 2 (*out*: 0.125) where the paper has 0, 4.5 and 7.5, and its full reward
scale is 25 where the paper has 100, because what counts is the ratio of the gradients. Its images have 400
latent numbers and its captions five attributes, so that a cosine changes less with style than SDXL's rewards.

## The runs

| setting | flags |
| --- | --- |
{flags}

Every run has the flags of this one beside its own:

```text
{example}
```
""")
    print(f"{page}, {folder / 'fronts.png'}, {folder / 'curves.png'}")


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", metavar="SETTING", help="Run only these settings; --plan lists them.")
    add("--seeds", type=int, nargs="+", help="Run these seeds (default: those fixed beforehand).")
    add("--processes", type=positive_int, default=2, help="Runs at once, with one thread each.")
    add("--work_dir", type=Path, default=Path("outputs/ablation"), help="Folder for the runs.")
    add("--plan", action="store_true", help="List the missing runs with their cost, and exit.")
    add("--report", action="store_true", help="Write the page and its figures from the results, and exit.")
    args = parser.parse_args()
    for name in args.only or []:
        if name not in SETTINGS:
            exit_with_error(f"--only {name} is none of {'; '.join(SETTINGS)}")
    if args.report:
        with exit_on_error(f"{RESULTS} has too few results"):
            return write(read_results(), PAGE)
    missing = plan(args.only, args.seeds)
    per_update = statistics.median([record["seconds"] / record["updates"] for record in read_results()
                                    if record["updates"]] or [0.9])
    hours = sum(updates(name) for name, _ in missing) * per_update / args.processes / 3600
    if args.plan:
        for name, seed in missing:
            print(f"{name}, seed {seed}: {updates(name) * per_update / 60:.1f} min")
    print(f"{len(missing)} runs, about {hours:.1f} hours, {args.processes} at once")
    if args.plan or not missing:
        return
    quiet_libraries()
    args.work_dir = args.work_dir.resolve()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    (args.work_dir / "captions.txt").write_text("\n".join(world.TRAIN_CAPTIONS) + "\n")
    torch.set_num_threads(1)
    ruler, lock = Ruler(), threading.Lock()
    before = {"start": lambda: generate_before("one_step"),
              "teacher": lambda: (ruler.captions, ruler.teacher),
              "start, 4 steps": lambda: generate_before("four_step", timesteps=FOUR_TIMESTEPS)}
    measured = by_setting(read_results())
    for name, make in before.items():
        if name not in measured:
            record = {"setting": name, "seed": None, "updates": 0, "seconds": 0, **ruler.measure(*make())}
            with open(RESULTS, "a") as file:
                file.write(json.dumps(record) + "\n")
    with (tqdm(total=len(missing), desc="runs", smoothing=0) as bar,
          ThreadPoolExecutor(args.processes) as pool):
        runs = [pool.submit(run, name, seed, args.work_dir, ruler, lock) for name, seed in missing]
        for one in runs:
            one.add_done_callback(lambda _: bar.update())
        try:
            wait(runs)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    failures = [str(one.exception()) for one in runs if one.exception()]
    if failures:
        exit_with_error(f"{len(failures)} runs failed; the same command retries them. First: {failures[0]}")


if __name__ == "__main__":
    main()
