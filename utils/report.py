"""What the scores say: means, intervals, the paper's tables, as results.json, results.md, per_prompt.parquet
and report.html, one page with everything in it.
"""

import base64
import html
import json
from pathlib import Path

import numpy
import pandas

from utils.benchmarks import CHUNK, HPS_STYLES, SIZES, spread
from utils.fid import frechet_distance, statistics
from utils.rewards import CLIP_SCORE


TITLES = {"imagereward": "ImageReward", "aesthetic": "Aesthetic", "pickscore": "PickScore",
          "clip": "CLIP score", "hpsv2.1": "HPSv2.1", "hpsv2.0": "HPSv2.0"}
# The paper's Table 1 (name, steps, type, parameters, ImageReward, aesthetic, PickScore, CLIP, and seconds for
# 10 images or FID) and Table 3 (name, the four styles, average), as printed.
PUBLISHED = {
    "parti": [
        ("SDXL-base", 50, "UNet", "2.6B", 0.887, 5.72, 0.2274, 32.72, 111),
        ("SDXL-DPO", 50, "UNet", "2.6B", 1.102, 5.77, 0.2290, 33.03, 111),
        ("SD3.5-large", 28, "DiT", "8B", 1.133, 5.70, 0.2306, 32.70, 66.23),
        ("FLUX-dev", 50, "DiT", "12B", 1.132, 5.90, 0.2317, 31.70, 118.64),
        ("DMD2-SDXL", 1, "UNet", "2.6B", 0.930, 5.51, 0.2249, 32.97, 2.22),
        ("Diff-Instruct", 1, "UNet", "2.6B", 1.058, 5.60, 0.2253, 33.02, 2.22),
        ("SIM", 1, "UNet", "2.6B", 1.049, 5.66, 0.2273, 32.93, 2.22),
        ("Diff-Instruct++", 1, "UNet", "2.6B", 1.061, 5.58, 0.2260, 32.94, 2.22),
        ("DI*", 1, "UNet", "2.6B", 1.067, 5.74, 0.2304, 32.82, 2.22),
        ("DI* (long)", 1, "UNet", "2.6B", 1.140, 5.83, 0.2331, 32.75, 2.22),
        ("DI*-DPO (long)", 1, "UNet", "2.6B", 1.210, 5.90, 0.2342, 32.91, 2.22)],
    "coco30k": [
        ("SDXL-base", 50, "UNet", "2.6B", 0.825, 5.55, 0.2281, 31.86, 15.89),
        ("SDXL-DPO", 50, "UNet", "2.6B", 0.950, 5.69, 0.2295, 32.17, 21.48),
        ("SD3.5-large", 28, "DiT", "8B", 1.048, 5.46, 0.2305, 31.85, 17.69),
        ("FLUX-dev", 50, "DiT", "12B", 1.065, 5.64, 0.2333, 30.88, 24.77),
        ("DMD2-SDXL", 1, "UNet", "2.6B", 0.822, 5.42, 0.2251, 31.89, 15.80),
        ("Diff-Instruct", 1, "UNet", "2.6B", 0.907, 5.48, 0.2264, 31.85, 21.62),
        ("SIM", 1, "UNet", "2.6B", 0.925, 5.54, 0.2277, 31.90, 18.84),
        ("Diff-Instruct++", 1, "UNet", "2.6B", 0.908, 5.53, 0.2265, 31.85, 21.42),
        ("DI*", 1, "UNet", "2.6B", 0.933, 5.57, 0.2305, 31.75, 19.09),
        ("DI* (long)", 1, "UNet", "2.6B", 0.983, 5.65, 0.2335, 31.57, 21.15),
        ("DI*-DPO (long)", 1, "UNet", "2.6B", 1.034, 5.65, 0.2342, 31.58, 22.12)],
    "hpsv2": [
        ("SDXL-base, 50 steps", 30.85, 29.30, 28.98, 27.05, 29.05),
        ("SDXL-DPO, 50 steps", 32.01, 30.75, 30.70, 28.24, 30.42),
        ("SD3.5-large, 28 steps", 31.89, 30.19, 30.39, 28.01, 30.12),
        ("FLUX-dev, 50 steps", 32.09, 30.44, 31.17, 29.09, 30.70),
        ("DMD2-SDXL, 1 step", 29.72, 27.96, 27.64, 26.55, 27.97),
        ("Diff-Instruct, 1 step", 31.15, 29.71, 29.72, 28.20, 29.70),
        ("SIM, 1 step", 31.97, 30.46, 30.13, 28.08, 30.16),
        ("Diff-Instruct++, 1 step", 31.19, 29.88, 29.61, 28.21, 29.72),
        ("DI*, 1 step", 32.26, 30.57, 30.10, 27.95, 30.22),
        ("DI*, 1 step (long)", 33.22, 31.67, 31.25, 28.62, 31.19),
        ("DI*-DPO, 1 step (long)", 33.92, 32.80, 32.71, 29.62, 32.26)]}
PAGE_PROMPTS = 3200  # a browser does not load the images of 30,000 prompts
PUBLISHED_SCORES = ("imagereward", "aesthetic", "pickscore", "clip")


# ------------------------------------------------------------------------------------------------ statistics


def bootstrap_interval(values, resamples=1000, seed=0):
    """The central 95% of the means of resampled values (n,): (low, high)."""
    values, generator = numpy.asarray(values, float), numpy.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    return tuple(float(bound) for bound in numpy.percentile(means, [2.5, 97.5]))


def summary(values):
    low, high = bootstrap_interval(values)
    return {"mean": float(numpy.mean(values)), "low": low, "high": high, "prompts": len(values)}


def chunk_deviation(values, chunk=CHUNK):
    """The standard deviation (of a population) of the means of consecutive chunks, as hpsv2 prints it.

    Only whole chunks count; None where there are not two.
    """
    whole = len(values) // chunk
    return float(numpy.reshape(values[:whole * chunk], (whole, chunk)).mean(1).std()) if whole > 1 else None


def whole_lines(path):
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"}\n")]


def read_records(folder):
    """{prompt's index: its latest record} of all processes that ever wrote."""
    found = {}
    for path in sorted(folder.glob("scores-*.jsonl")):
        for position, line in enumerate(whole_lines(path)):
            record = json.loads(line)
            record["features"] = (path.name.replace("scores", "features").replace("jsonl", "f32"), position)
            if record["time"] >= found.get(record["index"], record)["time"]:
                found[record["index"]] = record
    return found


def read_models(output_dir, digest, prompts):
    """{name: {settings, folder, facts, records of the chosen prompts}}, a benchmark's models in a folder."""
    chosen, models = {prompt.index for prompt in prompts}, {}
    found = {path: json.loads(path.read_text()) for path in sorted(Path(output_dir).glob("*/settings.json"))}
    for path, settings in sorted(found.items(), key=lambda pair: pair[1]["place"]):
        held = read_records(path.parent)
        records = {index: held[index] for index in sorted(held) if index in chosen}
        if settings["prompts"] == digest and records:
            facts = path.parent / "facts.json"
            models[settings["name"]] = {
                "settings": settings, "folder": path.parent, "records": records,
                "facts": json.loads(facts.read_text()) if facts.exists() else {}}
    return models


def features_of(model, width):
    """(images, width) of a model's chosen prompts, read where their lines say."""
    held = {}
    for record in model["records"].values():
        file, _ = record["features"]
        if file not in held:
            held[file] = numpy.fromfile(model["folder"] / file, "<f4").reshape(-1, width)
    return numpy.stack([held[file][position] for file, position in (
        record["features"] for record in model["records"].values())])


def summarize(models, prompts, real):
    """What results.json says of each model; differences are to the first, on the prompts that both have."""
    groups = {prompt.index: prompt.group for prompt in prompts}
    found, first = {}, next(iter(models.values()))["records"]
    for name, model in models.items():
        records, scores = model["records"], {}
        entry = {"prompts": len(records), "scores": scores, **{
            part: model[part] for part in ("facts", "settings")}}
        for key in next(iter(records.values()))["scores"]:
            values = {index: record["scores"][key] for index, record in records.items()}
            scores[key] = summary(list(values.values())) | {"groups": {}}
            for group in dict.fromkeys(groups[index] for index in records if groups[index]):
                own = [value for index, value in values.items() if groups[index] == group]
                scores[key]["groups"][group] = summary(own) | {"chunk_deviation": chunk_deviation(own)}
            both = [index for index in records if index in first and key in first[index]["scores"]]
            if both and records is not first:
                scores[key]["difference"] = summary(
                    [values[index] - first[index]["scores"][key] for index in both])
        seconds = [record["seconds"] for record in records.values() if record["seconds"] is not None]
        entry["seconds_per_10"] = 10 * float(numpy.mean(seconds)) if seconds else None
        memory = [record["memory"] for record in records.values() if record["memory"]]
        entry["peak_memory"] = max(memory) if memory else None
        if real is not None:
            features = features_of(model, len(real["mu"]))
            entry["fid"] = frechet_distance(statistics(features), real) if len(features) > 1 else None
        found[name] = entry
    return found


# ------------------------------------------------------------------------------------------------ tables


def digits(key):
    two = {"aesthetic", "clip", "hpsv2.0", "hpsv2.1", "official"}
    name = key.partition(":")[0]
    return {"imagereward": 3}.get(name, 2 if name in two else 4)  # your own: of unknown size


def shown(value, key):
    number = f"{value['mean']:.{digits(key)}f}"
    if value["low"] == value["high"]:  # of one prompt
        return number
    return f"{number} [{value['low']:.{digits(key)}f}, {value['high']:.{digits(key)}f}]"


def title(key):
    kind, _, location = key.partition(":")
    location = CLIP_SCORE if key == "clip" else location  # a CLIP score is none without the model's name
    name = TITLES.get(kind, key)
    return f"{name} ({location.rstrip('/').rsplit('/', 1)[-1]})" if location and kind in TITLES else name


def size_of(parameters):
    if not parameters:
        return ""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e8 else f"{parameters / 1e6:.1f}M"


def counted(entry, of):
    return entry["prompts"] if entry["prompts"] == of else f"{entry['prompts']} of {of}"


def main_table(results, benchmark, of):
    """(header, rows) in the columns and the order of the paper, its own rows below and marked."""
    keys = list(dict.fromkeys(key for entry in results.values() for key in entry["scores"]))
    if benchmark == "hpsv2":
        return style_table(results, keys, of)
    with_fid = any("fid" in entry for entry in results.values())
    with_memory = any(entry["peak_memory"] for entry in results.values())
    header = ["model", "prompts", "steps", "type", "parameters", *map(title, keys), "seconds per 10 images",
              *["FID"] * with_fid, *["peak GPU memory"] * with_memory]
    rows = []
    for name, entry in results.items():
        facts, scores = entry["facts"], entry["scores"]
        seconds, fid = entry["seconds_per_10"], entry.get("fid")
        memory = f"{entry['peak_memory'] / 2**30:.1f} GiB" if entry["peak_memory"] else ""
        rows.append([name, counted(entry, of), facts.get("steps", ""), facts.get("type", ""),
                     size_of(facts.get("parameters")),
                     *(shown(scores[key], key) if key in scores else "" for key in keys),
                     f"{seconds:.2f}" if seconds else "", *[f"{fid:.2f}" if fid else ""] * with_fid,
                     *[memory] * with_memory])
    for name, steps, kind, parameters, *values, last in PUBLISHED.get(benchmark, []):
        scores = dict(zip(PUBLISHED_SCORES, values))
        kinds = [key.partition(":")[0] for key in keys]
        seconds, fid = (last, "") if benchmark == "parti" else ("", last)
        rows.append([f"{name} (published)", SIZES[benchmark], steps, kind, parameters,
                     *(f"{scores[kind]:.{digits(kind)}f}" if kind in scores else "" for kind in kinds),
                     seconds, *[fid] * with_fid, *[""] * with_memory])
    return header, rows


def style_table(results, keys, of):
    """The same for hpsv2: each style's mean with the deviation that hpsv2 prints, and the average."""
    header = ["model", "prompts", *(f"{title(key)} {style}" for key in keys for style in (
        *HPS_STYLES.values(), "Average"))]
    rows = []
    for name, entry in results.items():
        row = [name, counted(entry, of)]
        for key in keys:
            own = entry["scores"].get(key)
            for value in [own and own["groups"].get(style) for style in HPS_STYLES]:
                mean = f"{value['mean']:.2f}" if value else ""
                deviation = value and value["chunk_deviation"]
                row.append(mean + (f" ± {deviation:.2f}" if deviation else ""))
            row.append(shown(own, key) if own else "")
        rows.append(row)
    for name, *values in PUBLISHED["hpsv2"] if keys[:1] == ["hpsv2.1"] else []:
        rows.append([f"{name} (published)", SIZES["hpsv2"], *(f"{value:.2f}" for value in values),
                     *[""] * (len(header) - 7)])
    return header, rows


def markdown_table(header, rows):
    rows = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows)


def group_tables(results):
    """Markdown of each score by group; empty where there are no groups."""
    text = ""
    keys = dict.fromkeys(key for entry in results.values() for key in entry["scores"])
    for key in keys:
        entries = {name: entry["scores"][key]["groups"] for name, entry in results.items()
                   if key in entry["scores"]}
        groups = dict.fromkeys(group for own in entries.values() for group in own)
        if groups:
            counts = {group: max(own[group]["prompts"] for own in entries.values() if group in own)
                      for group in groups}
            rows = [[group, counts[group], *(shown(own[group], key) if group in own else ""
                                             for own in entries.values())] for group in groups]
            text += f"\n## {title(key)} by group\n\n{markdown_table(['group', 'prompts', *entries], rows)}\n"
    return text


def differences_table(results):
    """Markdown of the paired differences to the first model; empty of one model."""
    first, *others = results
    rows = [[name, title(key), value["difference"]["prompts"], shown(value["difference"], key)]
            for name in others for key, value in results[name]["scores"].items() if "difference" in value]
    table = markdown_table(["model", "score", "prompts", "difference"], rows)
    return f"\n## Differences to {first}, prompt by prompt\n\n{table}\n" if rows else ""


# ------------------------------------------------------------------------------------------------ files


def write_report(output_dir, benchmark, digest, prompts, of, real, flags):
    """All files of a comparison of the chosen prompts of a benchmark of so many; returns the table."""
    models = read_models(output_dir, digest, prompts)
    results = summarize(models, prompts, real)
    header, rows = main_table(results, benchmark, of)
    part = "" if len(prompts) == of else (
        f"**A quick look: {len(prompts)} of {of} prompts; no figure is of the whole benchmark.**\n\n")
    text = (f"# {benchmark}\n\n{part}{markdown_table(header, rows)}\n\nMeans with 95% bootstrap intervals"
            " over prompts" + ("; ± is hpsv2's deviation of the means of 80" if benchmark == "hpsv2" else "")
            + ". Published rows are the paper's print (arXiv 2410.20898), not measured here; it does not say"
            " which CLIP gave its CLIP scores.\n"
            + differences_table(results) + group_tables(results))
    output_dir = Path(output_dir)
    (output_dir / "results.md").write_text(text)
    (output_dir / "results.json").write_text(json.dumps(
        {"benchmark": benchmark, "prompts": len(prompts), "of": of, "flags": flags, "models": results},
        indent=2))
    table = [{"model": name, "index": prompt.index, "prompt": prompt.text, "group": prompt.group,
              **model["records"][prompt.index]["scores"],
              "seconds": model["records"][prompt.index]["seconds"]}
             for name, model in models.items() for prompt in prompts if prompt.index in model["records"]]
    pandas.DataFrame(table).to_parquet(output_dir / "per_prompt.parquet")
    on_page = spread(prompts, PAGE_PROMPTS)
    if len(on_page) < len(prompts):
        part += f"Of {len(prompts)} prompts the page has {len(on_page)}, evenly spread."
    write_page(output_dir / "report.html", benchmark, part, header, rows, models, on_page)
    return markdown_table(header, rows)


def write_page(path, benchmark, part, header, rows, models, prompts):
    """One HTML file: the table, distributions, and the images side by side; searched and sorted in it."""
    keys = list(dict.fromkeys(key for model in models.values()
                              for key in next(iter(model["records"].values()))["scores"]))

    def image(model, index):
        file = model["folder"] / "thumbnails" / f"{index:05d}.jpg"
        return base64.b64encode(file.read_bytes()).decode() if file.exists() else None

    def values(model, index):
        scores = model["records"][index]["scores"] if index in model["records"] else {}
        return [scores.get(key) for key in keys]

    data = {"models": list(models), "scores": [title(key) for key in keys],
            "digits": [digits(key) for key in keys],
            "prompts": [[prompt.index, prompt.text, prompt.group] for prompt in prompts],
            "values": [[values(model, prompt.index) for prompt in prompts] for model in models.values()],
            "images": [[image(model, prompt.index) for prompt in prompts] for model in models.values()]}
    cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join(f"<tr{' class=published' if '(published)' in str(row[0]) else ''}>" + "".join(
        f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    page = (Path(__file__).with_name("report.html").read_text()
            .replace("{{title}}", html.escape(benchmark)).replace("{{note}}", html.escape(part.strip("*\n")))
            .replace("{{table}}", f"<tr>{cells}</tr>{body}")
            .replace("{{data}}", json.dumps(data).replace("<", "\\u003c")))
    path.write_text(page, encoding="utf-8")
