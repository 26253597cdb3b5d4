# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Write the rich model card of a finished run from its folder alone, and check the folder for publishing.

A training script leaves a short card. Its front matter, paragraph and Python block also open the rich card,
so that a rich card can be written again. The rest is made from args.json, metrics.jsonl and validation/. No
path of this machine enters a card.
"""

import contextlib
import json
import math
import re
from pathlib import Path

from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open


LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors")
GALLERY = 8  # images, each of a different prompt
THUMBNAIL = (1536, 1536)  # pixels; largest size of before.png and after.png
# {title: {label: name in metrics.jsonl}}; all axes but that of the rewards begin at 0.
PANELS = {"reward": {"training": "reward", "validation": "validation_reward"},
          "gradient norms at x0": {"divergence": "grad_divergence", "reward": "grad_reward",
                                   "guidance": "grad_cfg"},
          "y_norm, |D_assistant - D_reference|": {"": "y_norm"},
          "assistant loss": {"": "loss_assistant"},
          "validation: diversity over noise": {"": "validation_diversity_over_noise"},
          "validation: diversity over prompts": {"": "validation_diversity_over_prompts"}}
STYLE = {"axes.prop_cycle": "cycler(color=['#2468b0', '#d9692a', '#5d8f3c'])", "axes.edgecolor": "silver",
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "gainsboro",
         "axes.titlelocation": "left", "axes.titlesize": 9, "font.size": 8, "legend.frameon": False,
         "xtick.color": "dimgray", "ytick.color": "dimgray", "lines.markersize": 3}
LIMITS = """## Limits

The generator was trained for {timesteps}, without guidance, at {resolution} pixels, and for nothing else.
A higher reward is not always a better image: a reward that is optimised for too long narrows the variety of
the images and exaggerates the features that it scores highly. Biases and stereotypes of the base model and
the reward models are inherited. There is no safety checker."""
CITATION = """## Citation

```bibtex
@article{luo2024david,
  title   = {David and Goliath: Small One-step Model Beats Large Diffusion with Score Post-training},
  author  = {Luo, Weijian and Zhang, Colin and Zhang, Debing and Geng, Zhengyang},
  journal = {arXiv preprint arXiv:2410.20898},
  year    = {2024}
}
```"""


# ------------------------------------------------------------------------------------------------ reading


def read_card(folder):
    """Read the card of a run's folder, short or rich; raises OSError or ValueError if there is none."""
    card = ModelCard((Path(folder) / "README.md").read_text(encoding="utf-8"))
    if "diff-instruct-star" not in (card.data.tags or []) or "```python\n" not in card.text:
        raise ValueError("its README.md is not the card of a finished run")
    return card


def read_table(folder):
    """Read the main table of a results folder of eval_benchmarks.py, as a subsection of a card."""
    return "##" + (Path(folder) / "results.md").read_text(encoding="utf-8").split("\n## ")[0].strip()


def read_metrics(path):
    """Read the records of a metrics.jsonl, oldest first."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def shown(name):
    """Return a publishable name of a model or dataset: the last part of a path, a hub id as it is."""
    return Path(name).name if name[0] in "/.~" or Path(name).exists() else name


def licence_of(name):
    """Return the licence in a model's card, in its folder or on the hub, or None."""
    card = Path(name) / "README.md" if Path(name).exists() else "/".join(name.split("/")[:2])
    with contextlib.suppress(Exception):  # there is no card, or the hub cannot be reached
        return ModelCard.load(card).data.license


# ------------------------------------------------------------------------------------------------ images


def validation_section(args, first_grid):
    """The short card's section on the first and the last validation of the same prompts; empty without any.

    `first_grid(args)` returns the picture of that first validation first.
    """
    output_dir = Path(args.output_dir)
    if not (output_dir / "before_after.png").exists():
        return ""
    try:
        first = int(first_grid(args)[0].stem.removeprefix("step-"))
    except (OSError, ValueError, StopIteration):  # a file of the first validation is damaged or gone
        return ""
    rows = [row for row in read_metrics(output_dir / "metrics.jsonl")
            if row["step"] >= first and any(name.startswith("validation_") for name in row)]
    values = [f"| {name.replace('_', ' ')} | {rows[0][name]:.4g} | {value:.4g} |"
              for name, value in rows[-1].items() if name in rows[0] and name != "step"]
    header = f"| | step {first} | step {rows[-1]['step']} |\n| --- | --- | --- |"
    return "\n".join(["## Validation\n", "![before and after](before_after.png)\n", header, *values])


def plot_curves(metrics_file, path):
    """Plot the metrics of a metrics.jsonl against generator updates, as small multiples in one PNG.

    Returns whether there was anything to plot; no file is written unless some metric has two values.
    """
    records = read_metrics(metrics_file)
    panels = {}
    for title, names in PANELS.items():
        curves = {label: [(record["step"], record[name]) for record in records
                          if math.isfinite(record.get(name, math.nan))] for label, name in names.items()}
        if curves := {label: points for label, points in curves.items() if len(points) > 1}:
            panels[title] = curves
    if not panels:
        return False
    import matplotlib  # the short card does without it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.3 * rows), layout="constrained")
        for place, (title, curves) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(rows, columns, place, title=title)
            for label, points in curves.items():
                axes.plot(*zip(*points), label=label, marker="o" if len(points) < 30 else None)
            if any(curves):
                axes.legend()
            if title != "reward":
                axes.set_ylim(0, 1.1 * axes.dataLim.ymax or 1)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.supxlabel("generator updates", fontsize=8)
        figure.savefig(path, dpi=120)
    return True


# ------------------------------------------------------------------------------------------------ sections


def before_and_after(folder, last_step):
    """Write the section that compares the first and last validation, with thumbnails in images/.

    It is empty if either validation is missing or their prompts differ.
    """
    files = [folder / "validation" / f"step-{step:06d}.png" for step in (0, last_step)]
    if not all(file.exists() for file in files):
        return ""
    rows = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    before, after = ([row["prompt"] for row in part if row.get("box", True)] for part in rows)  # shown ones
    if before != after:
        return ""
    for name, file in zip(("before", "after"), files):
        with Image.open(file) as image:
            image.thumbnail(THUMBNAIL)
            image.save(folder / "images" / f"{name}.png")
    prompts = [" ".join(prompt.replace("`", " ").split()) for prompt in dict.fromkeys(before)]
    return "\n".join([f"""## Before and after

The noise is the same before and after. Images of each prompt: {len(before) // len(prompts)}, none left out.

| before | after |
| --- | --- |
| ![before](images/before.png) | ![after](images/after.png) |
""", *(f"{number}. `{prompt}`" for number, prompt in enumerate(prompts, 1))])


def read_validation(folder, step):
    """Return [(prompt, PIL image)] of what a validation's grid shows, in order; [] if there is no grid."""
    path = Path(folder) / "validation" / f"step-{step:06d}.png"
    if not path.exists():
        return []
    rows = json.loads(path.with_suffix(".json").read_text())
    with Image.open(path) as grid:
        return [(row["prompt"], grid.crop(row["box"])) for row in rows if row.get("box")]


def gallery(folder, last_step):
    """Save an image of each of the first prompts of the last validation; return the hub's widgets of them."""
    first, widgets = {}, []
    for prompt, image in read_validation(folder, last_step):
        first.setdefault(prompt, image)
    for number, (prompt, image) in enumerate([*first.items()][:GALLERY]):
        image.save(folder / "images" / f"gallery-{number}.png")
        widgets.append({"text": prompt, "output": {"url": f"images/gallery-{number}.png"}})
    return widgets


def hours(metrics):
    """Return the hours that all logged updates took together."""
    records = [record for record in metrics if "seconds_per_step" in record]
    steps = [0, *(record["step"] for record in records)]
    return sum(record["seconds_per_step"] * (step - previous)
               for record, previous, step in zip(records, steps, steps[1:])) / 3600


def training(args, metrics, compared):
    """Write the section of the run's settings and outcome; whether validations can be `compared`."""
    last = {name: value for record in metrics for name, value in record.items()}  # last logged values
    first = {name: value for record in metrics[::-1] for name, value in record.items()}
    rewards = []
    for reward, scale in args["reward"].items():
        name, mark, location = reward.partition(":")
        weights = f" (`{shown(args['reward_model_name_or_path'])}`)" if reward == "pickscore" else ""
        rewards.append(f"{scale:g} x {name}{mark}{location and shown(location)}{weights}")
    both = "generator and assistant"
    rows = {
        "recipe": f"`{args['recipe']}`",
        "prompts": f"`{shown(args['dataset_name'] or Path(args['prompts_file']).name)}`",
        "reward": " + ".join(rewards) or "none",
        "divergence": args["divergence"],
        "distance": args["distance"] if args["divergence"] == "score" else None,
        "score gradient": args["score_gradient"] if args["divergence"] == "score" else None,
        "weighting": args["weighting"],
        "guidance, scale and mode": f"{args['cfg_scale']:g}, {args['cfg_mode']}",
        "generator updates": last["step"],
        "assistant updates before each": args["assistant_updates"],
        "batch size": args["train_batch_size x gradient_accumulation_steps x processes"],
        f"LoRA ranks (0: none), {both}": f"{args['generator_lora_rank']}, {args['assistant_lora_rank']}",
        f"learning rates, {both}": f"{args['learning_rate']:g}, {args['assistant_learning_rate']:g}",
        "average of the weights (EMA)": f"decay {args['ema_decay']:g}" if args["use_ema"] else "none",
        "hours of updates": f"{hours(metrics):.2g}" if hours(metrics) else None,
        "validation reward, before and after": None if not compared else
        f"{first['validation_reward']:.4f}, {last['validation_reward']:.4f}",
        "last logged training reward": f"{last['reward']:.4f}" if "reward" in last else None,
        f"skipped updates, {both}": f"{last['skipped_generator']}, {last['skipped_assistant']}"}
    return "\n".join(["## Training", "", "| setting | value |", "| --- | --- |",
                      *(f"| {name} | {value} |" for name, value in rows.items() if value is not None)])


def sources(args):
    """Return [(name, licence or None)] of the models that the generator derives from."""
    flags = ("pretrained_model_name_or_path", "reference_unet", "generator_init", "preference_unet")
    models = dict.fromkeys(args.get(flag) for flag in flags if args.get(flag) not in (None, "reference"))
    return [(shown(model), licence_of(model)) for model in models]


def check_component(folder, kind):
    """Raise an error unless a pipeline component of the class named `kind` is whole in its folder."""
    if not any(folder.glob("*")):
        raise ValueError("its folder is missing or empty")
    plain = re.search("Scheduler|Tokenizer|Processor|Extractor", kind)  # classes without weights
    for path in {*folder.glob("*.json"), *([] if plain else [folder / "config.json"])}:
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name} is damaged: {error}") from error
    if plain:
        return
    weights = set(folder.glob("*.safetensors"))
    shards = {folder / file for index in folder.glob("*.safetensors.index*.json")
              for file in json.loads(index.read_text())["weight_map"].values()}
    if not weights | shards:
        raise ValueError("its weights are missing")
    if stray := [path.name for path in weights - shards if re.search(r"-\d+-of-\d+", path.name)]:
        raise ValueError(f"no index names {stray[0]}")
    for path in sorted(weights | shards):
        check_weights(path)


def check_weights(path):
    """Raise an error unless a safetensors file can be opened; a truncated file cannot."""
    try:
        with safe_open(path, "np"):
            pass
    except Exception as error:
        raise ValueError(f"{path.name} is not a whole safetensors file: {error}") from error


def published_files(folder):
    """Return the patterns of the files of a run to publish, for `upload_folder`, if its pipeline is whole.

    They are the components that model_index.json names, the LoRA files, the card and its images.

    Raises OSError or ValueError, naming the component, if any of them is missing or damaged.
    """
    folder, names = Path(folder), []
    for name, part in json.loads((folder / "model_index.json").read_text()).items():
        if isinstance(part, list) and len(part) == 2 and isinstance(part[0], str):  # absent ones are null
            try:
                check_component(folder / name, part[1])
            except Exception as error:
                raise ValueError(f"{name} is not whole: {error}") from error
            names.append(name)
    for name in filter(lambda name: (folder / name).exists(), LORA_FILES):
        check_weights(folder / name)
    return ["README.md", "images/*", "model_index.json", *LORA_FILES, *(f"{name}/*" for name in names)]


def write_rich_card(folder, repository, evaluations=(), lora_only=False):
    """Write README.md and images/ of a finished run for the repository that will contain it.

    Args:
        folder: the run's folder, with README.md, args.json, metrics.jsonl and, if it validated, validation/.
        repository: name by which the card's Python block loads the model, owner/name on the hub.
        evaluations: tables from `read_table`; if empty, README.md keeps its tables.
        lora_only: whether the repository will hold the LoRA alone, without the merged pipeline.

    Raises OSError or ValueError if the folder contains no finished run.
    """
    folder = Path(folder)
    card, args = read_card(folder), json.loads((folder / "args.json").read_text())
    metrics, derived_from = read_metrics(folder / "metrics.jsonl"), sources(args)
    name, opening = re.match(r"\s*# (.+?)\n(.*?)\n(?:It was trained for exactly|<Gallery />|## )", card.text,
                             re.DOTALL).groups()
    opening = opening.replace(f"({name!r}", f"({repository!r}").rstrip()
    if lora_only:
        intro, *blocks = opening.split("```python\n")
        opening = intro + "```python\n" + blocks[-1]
    earlier = re.findall(r"^## Evaluation\n.*?(?=\n+## )", card.text, re.DOTALL | re.MULTILINE)
    (folder / "images").mkdir(exist_ok=True)
    plotted = plot_curves(folder / "metrics.jsonl", folder / "images" / "curves.png")

    steps = card.data.generator_timesteps
    listed = ", ".join(f"`{model}` ({licence or 'see there'})" for model, licence in derived_from)
    card.data.widget = gallery(folder, metrics[-1]["step"]) or None
    compared = before_and_after(folder, metrics[-1]["step"])
    sections = [
        f"# {repository}\n{opening}",
        "<Gallery />" * bool(card.data.widget),
        compared,
        training(args, metrics, compared) + "\n\n![curves of the training](images/curves.png)" * plotted,
        *(["## Evaluation", *evaluations] if evaluations else earlier),
        LIMITS.format(timesteps=f"one step at timestep {steps[0]}" if len(steps) == 1 else
                      f"{len(steps)} steps at timesteps {', '.join(map(str, steps))}",
                      resolution=card.data.resolution),
        f"## Licence\n\nThe model inherits the licences of the models that it derives from: {listed}.",
        CITATION]
    card.text = "\n" + "\n\n".join(filter(None, sections)) + "\n"
    first, *others = [licence for _, licence in derived_from]
    known = first and all(licence == first for licence in others)
    card.data.license = first if known else "other"
    card.data.license_name = None if known and first != "other" else "of-its-sources"
    card.save(folder / "README.md")
