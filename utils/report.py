"""Summarise the scores: means, intervals and the paper's tables, written as results.json, results.md,
per_prompt.parquet and report.html, a page that shows the images side by side.
"""

import html
import io
import json
import math
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy
import pandas
from matplotlib.figure import Figure

from utils.benchmarks import CHUNK, HPS_STYLES, SIZES, Prompt, spread
from utils.cli import write_atomically, write_json_atomically
from utils.diversity import cosine_distance, lpips_distances
from utils.fid import frechet_distance, statistics
from utils.rewards import CLIP_SCORE


TITLES = {"imagereward": "ImageReward", "aesthetic": "Aesthetic", "pickscore": "PickScore",
          "clip": "CLIP score", "clip-dmd2": "CLIP score of DMD2", "hpsv2.1": "HPSv2.1",
          "hpsv2.0": "HPSv2.0", "mps": "MPS", "lpips": "Diversity (LPIPS)"}
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
# FIDs that DMD2's authors publish in their repository (name, steps, type, parameters, FID), and how they are
# measured: the size of --fid_size and the number of real images (all of val2014; DMD2's coco10k/subset).
DMD2_FIDS = {"coco30k": [("DMD2-SD1.5", 1, "UNet", "0.9B", 8.35)],
             "coco10k": [("DMD2-SDXL", 1, "UNet", "2.6B", 19.01), ("DMD2-SDXL", 4, "UNet", "2.6B", 19.32)]}
DMD2_PROTOCOLS = {"coco30k": (256, 40_504), "coco10k": (512, 10_000)}
PAGE_IMAGES = 3200  # per model: a browser cannot handle the scores of 30,000 prompts
PUBLISHED_SCORES = ("imagereward", "aesthetic", "pickscore", "clip")
# Scores that use the paper's weights, so that its published rows are comparable. The paper does not name the
# CLIP model of its CLIP scores, so these are marked.
PAPERS = {"imagereward": "imagereward", "official:imagereward": "imagereward", "aesthetic": "aesthetic",
          "pickscore": "pickscore", "clip": "clip", "clip-dmd2": "clip", "hpsv2.1": "hpsv2.1",
          "official:hpsv2.1": "hpsv2.1"}
PROTOCOLS = {
    "parti": "one image per prompt, and seconds on a GPU that the paper does not name",
    "coco30k": "one image per caption",
    "coco10k": "one image per caption",
    "hpsv2": "one image per prompt, means by style; hpsv2's program reads .jpg files, as --hps_jpeg does"}
QUANTILES = (0.5, 0.9, 0.99)
FILES = ("results.md", "results.json", "per_prompt.parquet", "report.html", "sweep.png")
# 97.5% quantiles of Student's t distribution with 2 to 38 degrees of freedom, for 3 to 39 samples.
STUDENT = (4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604,
           2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595,
           2.0555, 2.0518, 2.0484, 2.0452, 2.0423, 2.0395, 2.0369, 2.0345, 2.0322, 2.0301, 2.0281, 2.0262,
           2.0244)
FEW_IMAGES = 10_000  # FID of fewer images is marked: its bias depends on their number


# ------------------------------------------------------------------------------------------------ statistics


def mean_interval(values, resamples=1000, seed=0):
    """Return (low, high), a 95% interval of the mean of values (n,).

    From 40 values on it is the central 95% of the means of resampled values, which is too narrow for fewer:
    these have Student's interval, and fewer than 3 have none, (None, None).
    """
    values, generator = numpy.asarray(values, float), numpy.random.default_rng(seed)
    if len(values) < 3:
        return None, None
    if len(values) - 3 < len(STUDENT):
        half = STUDENT[len(values) - 3] * float(values.std(ddof=1)) / len(values)**0.5
        return float(values.mean()) - half, float(values.mean()) + half
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    return tuple(float(bound) for bound in numpy.percentile(means, [2.5, 97.5]))


def summary(values):
    low, high = mean_interval(values)
    return {"mean": float(numpy.mean(values)), "low": low, "high": high, "prompts": len(values)}


def chunk_deviation(values, chunk=CHUNK):
    """Return the population standard deviation of the means of consecutive chunks, as hpsv2 prints it.

    Only whole chunks count; None if there are fewer than two.
    """
    whole = len(values) // chunk
    return float(numpy.reshape(values[:whole * chunk], (whole, chunk)).mean(1).std()) if whole > 1 else None


def read_json(path, is_valid):
    """Read a JSON file; a ValueError names a file that is damaged or holds something else."""
    try:
        content = json.loads(path.read_text())
        if not is_valid(content):
            raise ValueError("something else is in it")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or give another --output_dir") from error
    return content


def is_settings(content):
    kinds = {"name": str, "place": int, "prompts": str, "model": dict}
    return isinstance(content, dict) and all(
        isinstance(content.get(key), kind) for key, kind in kinds.items())


def is_facts(content):
    return isinstance(content, dict) and isinstance(content.get("parameters", 0), int)


def is_rewards(content):
    return isinstance(content, list) and all(isinstance(name, str) for name in content)


def whole_lines(path):
    """Return the lines of a file of scores, without an unfinished last line, which a killed run leaves.

    Raises:
        ValueError: the file is empty, or its last line is no record's beginning.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    begins = b'{"index": '
    if not lines and not rest:
        raise ValueError(f"{path} is empty; delete it, and its images are scored again")
    if rest[:len(begins)] != begins[:len(rest)]:
        raise ValueError(f"{path} is damaged, its last line is no record of scores; delete the line")
    return [line + b"\n" for line in lines]


def read_records(folder):
    """Return {key of an image: its latest record, with the rank whose file has it} over all processes.

    Raises:
        ValueError: a line is not a record; the message names its file.
    """
    found = {}
    for path in sorted(folder.glob("scores-*.jsonl")):
        for number, line in enumerate(whole_lines(path), 1):
            try:
                record = json.loads(line)
                key = record["index"], record.get("image", 0)
                names = ("seconds", "memory", *["decoder_seconds"] * ("batch" in record))
                costs = [record[name] for name in names if record[name] is not None]
                numbers = [record["time"], *record["scores"].values(), *costs]
                scores = next(iter(found.values()), record)["scores"].keys()
                kinds = [*((part, int) for part in key), (record.get("written", {}), dict)]
                if not (all(isinstance(*pair) for pair in kinds) and all(map(math.isfinite, numbers))
                        and record["scores"].keys() == scores):
                    raise ValueError("a value is wrong")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is damaged, line {number} is no record of scores ({error!r:.80});"
                                 " delete the line to score its image again") from error
            record["rank"] = path.stem.removeprefix("scores-")
            if record["time"] >= found.get(key, record)["time"]:
                found[key] = record
    return found


def read_model(folder):
    """Return {settings, folder, facts, records} of a model's folder; a ValueError names a damaged file."""
    facts, rewards = folder / "facts.json", folder / "rewards.json"
    return {"settings": read_json(folder / "settings.json", is_settings), "folder": folder,
            "records": read_records(folder),
            "facts": (read_json(facts, is_facts) if facts.exists() else {}) | {
                "rewards": read_json(rewards, is_rewards) if rewards.exists() else []}}


def read_models(output_dir, digest, prompts):
    """Return {name: model} of a benchmark's models in their order, with the records of the chosen prompts."""
    chosen, models = {prompt.key for prompt in prompts}, {}
    found = [read_model(path.parent) for path in sorted(Path(output_dir).glob("*/settings.json"))]
    for model in sorted(found, key=lambda model: model["settings"]["place"]):
        records = {key: record for key, record in sorted(model["records"].items()) if key in chosen}
        if model["settings"]["prompts"] == digest and records:
            models[model["settings"]["name"]] = model | {"records": records}
    return models


def row_type(width):
    """Return the type of a row in a file of features: the image's key, its features and a checksum of all."""
    return numpy.dtype([("width", "<i4"), ("index", "<i4"), ("image", "<i4"), ("values", "<f4", (width,)),
                        ("checksum", "<u4")])


def make_row(key, values):
    """Return the bytes of a row of features (width,) of the image with this key."""
    row = numpy.zeros((), row_type(len(values)))
    row["width"], (row["index"], row["image"]), row["values"] = len(values), key, values
    row["checksum"] = zlib.crc32(row.tobytes()[:-4])
    return row.tobytes()


def read_features(path):
    """Return {key of an image: its features} of the undamaged rows of a file, the latest of each image."""
    width = int(numpy.fromfile(path, "<i4", 1).sum()) if path.exists() else 0
    rows = numpy.fromfile(path, row_type(width)) if 0 < width < 2**20 else []
    return {(int(row["index"]), int(row["image"])): row["values"] for row in rows
            if row["checksum"] == zlib.crc32(row.tobytes()[:-4])}


def whole_rows(path, width):
    """Return the size in bytes of a file's whole rows of features; 0 if it has none of this width."""
    if not path.exists() or width not in numpy.fromfile(path, "<i4", 1):
        return 0
    size = row_type(width).itemsize
    return path.stat().st_size // size * size


def find_features(folder, records, kind):
    """Return {key of an image: its features} of those records that have them undamaged."""
    held = {rank: read_features(folder / f"{kind}-{rank}.rows") for rank in {
        record["rank"] for record in records.values()}}
    return {key: held[record["rank"]][key] for key, record in records.items() if key in held[record["rank"]]}


def features_of(model, kind):
    """Return features (images, width) of a model's images in record order.

    Raises:
        ValueError: a file lacks rows; the message names it.
    """
    found = find_features(model["folder"], model["records"], kind)
    for key, record in model["records"].items():
        if key not in found:
            path, image = model["folder"] / f"{kind}-{record['rank']}.rows", Prompt(key[0], "", image=key[1])
            raise ValueError(f"{path} lacks the features of image {image.name}; give the flags of"
                             f" {model['settings']['name']} again, which computes them")
    return numpy.stack([*found.values()])


def values_of(model, widths, device):
    """Return {score: {prompt index: mean over its images}}, with diversities where there are several."""
    records, found = model["records"], {}
    for key in next(iter(records.values()))["scores"]:
        held = {}
        for (index, _), record in records.items():
            held.setdefault(index, []).append(record["scores"][key])
        found[key] = {index: float(numpy.mean(values)) for index, values in held.items()}
    rows, names = {}, {}
    for row, key in enumerate(records):
        rows.setdefault(key[0], []).append(row)
        names.setdefault(key[0], []).append(Prompt(key[0], "", image=key[1]).name)
    several = {index: own for index, own in rows.items() if len(own) > 1}
    vectors = features_of(model, "embeddings") if several and "embeddings" in widths else None
    if vectors is not None:
        found[f"diversity:{model['settings']['diversity']}"] = {
            index: cosine_distance(vectors[own]) for index, own in several.items()}
    apart = several and lpips_distances(model["folder"], {index: names[index] for index in several}, device)
    return found | ({"lpips": apart} if apart else {})


def distances(models, widths, real, teacher):
    """Return {model: {fid, patch_fid}} to the real images' statistics or to the model in folder `teacher`.

    `fid_images` is the smaller number of images in a distance.
    """
    found = {name: {} for name in models}
    for kind, distance in (("features", "fid"), ("patches", "patch_fid")):
        if kind not in widths:
            continue
        known, most = real.get(kind), math.inf
        if teacher:
            own = next((model for model in models.values() if model["folder"].name == teacher), None)
            most = len(own["records"]) if own else 0  # the teacher must have at least as many images
            known = statistics(features_of(own, kind)) if most > 1 else None
        for name, model in models.items():  # one after another, because features are large
            images = len(model["records"])
            found[name][distance] = None
            if known and 1 < images <= most and model["folder"].name != teacher:
                found[name][distance] = frechet_distance(statistics(features_of(model, kind)), known)
                found[name]["fid_images"] = min(images, known.get("images", images))
                found[name]["real_images"] = known.get("images")
    return found


def latency(records):
    """Return quantiles of seconds per image, with and without decoding; None unless at batch size 1."""
    alone = list(records.values())
    if len(alone) < 2 or any(record.get("batch") != 1 for record in alone):
        return None
    whole = [record["seconds"] for record in alone]
    before = [record["seconds"] - record["decoder_seconds"] for record in alone]
    return {name: dict(zip(map(str, QUANTILES), numpy.quantile(values, QUANTILES).tolist()))
            for name, values in (("whole", whole), ("without decoder", before))}


def summarize(models, prompts, widths, real, teacher=None, device="cpu"):
    """Summarise each model for results.json; differences are to the first, on the prompts that both have.

    Intervals are over prompts, of the means over a prompt's images. FID is computed to `real`, {kind:
    statistics}, or to `teacher`, the name of a model's folder.
    """
    groups = {prompt.index: prompt.group for prompt in prompts}
    values = {name: values_of(model, widths, device) for name, model in models.items()}
    measured, first, found = distances(models, widths, real, teacher), next(iter(models)), {}
    for name, model in models.items():
        records, scores = model["records"], {}
        entry = {"prompts": len({index for index, _ in records}), "images": len(records), "scores": scores,
                 **{part: model[part] for part in ("facts", "settings")}, **measured.get(name, {})}
        for key, held in values[name].items():
            scores[key] = summary(list(held.values())) | {"groups": {}}
            for group in dict.fromkeys(groups[index] for index in held if groups[index]):
                own = [value for index, value in held.items() if groups[index] == group]
                scores[key]["groups"][group] = summary(own) | {"chunk_deviation": chunk_deviation(own)}
            others = values[first].get(key, {})
            both = [index for index in held if index in others]
            if both and name != first:
                scores[key]["difference"] = summary([held[index] - others[index] for index in both])
        seconds = [record["seconds"] for record in records.values() if record["seconds"] is not None]
        entry["seconds_per_10"] = 10 * float(numpy.mean(seconds)) if seconds else None
        entry["latency"] = latency(records)
        memory = [record["memory"] for record in records.values() if record["memory"]]
        entry["peak_memory"] = max(memory) if memory else None
        model["values"], found[name] = values[name], entry
    return found


# ------------------------------------------------------------------------------------------------ tables


def digits(key):
    two = {"aesthetic", "clip", "clip-dmd2", "hpsv2.0", "hpsv2.1", "official"}
    name = key.partition(":")[0]
    return {"imagereward": 3}.get(name, 2 if name in two else 4)  # the scale of a user's score is unknown


def shown(value, key):
    number = f"{value['mean']:.{digits(key)}f}"
    if value["low"] == value["high"]:  # fewer than 3 prompts, or equal values
        return number
    return f"{number} [{value['low']:.{digits(key)}f}, {value['high']:.{digits(key)}f}]"


def title(key):
    kind, _, location = key.partition(":")
    if kind == "diversity":
        return f"Diversity ({title(location)})"
    if key in ("clip", "clip-dmd2"):  # a CLIP score is meaningless without its model
        location = CLIP_SCORE
    name = TITLES.get(kind, key)
    return f"{name} ({location.rstrip('/').rsplit('/', 1)[-1]})" if location and kind in TITLES else name


def size_of(parameters):
    if not parameters:
        return ""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e8 else f"{parameters / 1e6:.1f}M"


def counted(entry, of):
    count = entry["prompts"] if entry["prompts"] == of else f"{entry['prompts']} of {of}"
    several = entry["images"] // entry["prompts"]
    return count if several == 1 else f"{count}, {several} images each"


def reward_of(key):
    """Return the name of a score as a reward, without the location of its weights or its protocol."""
    kind = key.removeprefix("official:").partition(":")[0].removesuffix("-dmd2")
    return kind if kind in TITLES else key


def columns(results):
    """Return {score: models trained on it}, with the scores that no model was trained on first."""
    keys = dict.fromkeys(key for entry in results.values() for key in entry["scores"])
    trained = {key: [name for name, entry in results.items() if reward_of(key) in map(
        reward_of, entry["facts"].get("rewards", []))] for key in keys}
    return dict(sorted(trained.items(), key=lambda pair: bool(pair[1])))


def heading(key, trained, style=""):
    return f"{title(key)} {style}".strip() + (f", trained on by {', '.join(trained)}" if trained else "")


def main_table(results, benchmark, of, teacher=None):
    """Return (header, rows) in the paper's columns and order, followed by its published rows, marked."""
    trained = columns(results)
    to = f" to {teacher}" * bool(teacher)
    distances = {name: words + to for name, words in (("fid", "FID"), ("patch_fid", "patch FID"))
                 if any(name in entry for entry in results.values())}
    if benchmark == "hpsv2":
        return style_table(results, trained, of, distances)
    with_memory = any(entry["peak_memory"] for entry in results.values())
    header = ["model", "prompts", "steps", "type", "parameters",
              *(heading(key, names) for key, names in trained.items()), "seconds per 10 images",
              *distances.values(), *["peak GPU memory"] * with_memory]
    rows = []
    for name, entry in results.items():
        facts, scores, seconds = entry["facts"], entry["scores"], entry["seconds_per_10"]
        memory = f"{entry['peak_memory'] / 2**30:.1f} GiB" if entry["peak_memory"] else ""
        rows.append([name, counted(entry, of), facts.get("steps", ""), facts.get("type", ""),
                     size_of(facts.get("parameters")),
                     *(shown(scores[key], key) if key in scores else "" for key in trained),
                     f"{seconds:.2f}" if seconds else "",
                     *(distance(entry, which) for which in distances), *[memory] * with_memory])
    has_fid = "fid" in distances and not teacher
    published = published_rows(results, benchmark, trained, has_fid)
    return header, rows + [row + [""] * (len(header) - len(row)) for row in published]


def published_rows(results, benchmark, trained, has_fid):
    """Return the published rows up to the column of FID; an FID by another or an unknown protocol has (?).

    The paper does not say how it measures FID: for DMD2-SDXL it prints 15.80, DMD2's authors 19.01.
    """
    rows = []
    for name, *facts, imagereward, aesthetic, pickscore, clip, last in PUBLISHED.get(benchmark, []):
        scores = dict(zip(PUBLISHED_SCORES, (imagereward, aesthetic, pickscore, clip)))
        cells = [f"{scores[PAPERS[key]]:.{digits(key)}f}" + " (?)" * (PAPERS[key] == "clip")
                 if PAPERS.get(key) in scores else "" for key in trained]
        ends = [last] if benchmark == "parti" else ["", *[f"{last:.2f} (?)"] * has_fid]
        if any(cells):
            rows.append([f"{name} (published)", SIZES[benchmark], *facts, *cells, *ends])
    mark = "" if all(has_dmd2_protocol(entry, benchmark) for entry in results.values()) else " (?)"
    for name, *facts, fid in DMD2_FIDS.get(benchmark, []) if has_fid else []:
        cells = [""] * len(trained)
        rows.append([f"{name} (published)", SIZES[benchmark], *facts, *cells, "", f"{fid:.2f}{mark}"])
    return rows


def has_dmd2_protocol(entry, benchmark):
    """Whether a model's FID, if it has one, is measured as DMD2's authors measure theirs."""
    if entry.get("fid") is None:
        return True
    is_whole = entry["prompts"] == entry["images"] == SIZES.get(benchmark)
    measured = entry["settings"]["fid"][0], entry.get("real_images")
    return (is_whole and measured == DMD2_PROTOCOLS.get(benchmark)
            and entry["facts"].get("nvidia_inception", False))


def distance(entry, which):
    if entry.get(which) is None:
        return ""
    images = entry.get("fid_images", entry["images"])
    return f"{entry[which]:.2f}" + f" ({images} images)" * (images < FEW_IMAGES)


def style_table(results, trained, of, distances):
    """Return hpsv2's main table: each style's mean with the deviation that hpsv2 prints, and the average."""
    header = ["model", "prompts", *(heading(key, names, style) for key, names in trained.items()
                                    for style in (*HPS_STYLES.values(), "Average")), *distances.values()]
    rows = []
    for name, entry in results.items():
        row = [name, counted(entry, of)]
        for key in trained:
            own = entry["scores"].get(key)
            for value in [own and own["groups"].get(style) for style in HPS_STYLES]:
                mean = f"{value['mean']:.{digits(key)}f}" if value else ""
                deviation = value and value["chunk_deviation"]
                row.append(mean + (f" ± {deviation:.{digits(key)}f}" if deviation else ""))
            row.append(shown(own, key) if own else "")
        rows.append(row + [distance(entry, which) for which in distances])
    papers = [PAPERS.get(key) == "hpsv2.1" for key in trained]
    for name, *values in PUBLISHED["hpsv2"] if any(papers) else []:
        cells = [f"{value:.2f}" if own else "" for own in papers for value in values]
        rows.append([f"{name} (published)", SIZES["hpsv2"], *cells, *[""] * len(distances)])
    return header, rows


def markdown_table(header, rows):
    rows = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows)


def group_tables(results):
    """Return Markdown tables of each score by group; empty if there are no groups."""
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
    """Return a Markdown table of paired differences to the first model; empty for one model."""
    first, *others = results
    rows = [[name, title(key), value["difference"]["prompts"], shown(value["difference"], key)]
            for name in others for key, value in results[name]["scores"].items() if "difference" in value]
    table = markdown_table(["model", "score", "prompts", "difference"], rows)
    return f"\n## Differences to {first}, prompt by prompt\n\n{table}\n" if rows else ""


def latency_table(results):
    """Return a Markdown table of milliseconds per image; empty if no model ran at batch size 1."""
    rows = [[name, *(f"{1000 * value:.0f}" for part in entry["latency"].values() for value in part.values())]
            for name, entry in results.items() if entry["latency"]]
    header = ["model", *(f"{part}, {quantile:.0%}" for part in ("whole", "without decoder")
                         for quantile in QUANTILES)]
    return f"\n## Milliseconds of one image, by quantiles\n\n{markdown_table(header, rows)}\n" if rows else ""


def plot_sweeps(results, path):
    """Plot scores against FID, seconds or guidance scale, a line per sweep; returns whether there are any."""
    lines = {}
    for entry in results.values():
        model = entry["settings"]["model"]
        if model.get("sweep"):
            lines.setdefault(model["sweep"], []).append(
                (model["guidance_scale"], model["num_inference_steps"], entry))
    points = [point for line in lines.values() for point in line]
    both = [len({point[part] for point in points}) > 1 for part in (0, 1)]
    word, where = "guidance scale", lambda point: point[0]
    if any(entry.get("fid") is not None for *_, entry in points):
        word, where = "FID", lambda point: point[2]["fid"]
    elif both[1]:
        word, where = "seconds per 10 images", lambda point: point[2]["seconds_per_10"]
    if all(both):  # one line per scale
        lines = {f"{name}, guidance {scale}": [point for point in line if point[0] == scale]
                 for name, line in lines.items() for scale in {point[0]: 0 for point in line}}
    keys = list(dict.fromkeys(key for *_, entry in points for key in entry["scores"]))
    figure = Figure(figsize=(4 * len(keys), 3.4), layout="constrained")
    for place, key in enumerate(keys, 1):
        axes = figure.add_subplot(1, len(keys), place, xlabel=word, ylabel=title(key))
        for name, line in lines.items():
            drawn = [(where(point), point) for point in sorted(line, key=lambda point: point[:2])
                     if where(point) is not None and key in point[2]["scores"]]
            heights = [point[2]["scores"][key]["mean"] for _, point in drawn]
            axes.plot([x for x, _ in drawn], heights, marker="o", label=name)
            for (x, (scale, steps, _)), height in zip(drawn, heights):
                words = f"{steps} steps" if both[1] else f"guidance {scale}"
                axes.annotate(words, (x, height), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.locator_params(axis="x", nbins=5)
        axes.margins(0.15)
        axes.legend(fontsize=8)
    if points:
        content = io.BytesIO()
        figure.savefig(content, dpi=110)
        write_atomically(path, content.getvalue())
    return bool(points)


# ------------------------------------------------------------------------------------------------ files


def write_report(output_dir, benchmark, digest, prompts, of, widths, real, teacher, flags, device):
    """Write all files of a comparison on the chosen of a benchmark's `of` prompts; returns the main table."""
    models = read_models(output_dir, digest, prompts)
    results = summarize(models, prompts, widths, real, teacher, device)
    header, rows = main_table(results, benchmark, of, teacher)
    count = len({prompt.index for prompt in prompts})
    part = "" if count == of else (
        f"**A quick look: {count} of {of} prompts; no figure covers the whole benchmark.**\n\n")
    output_dir = Path(output_dir)
    has_sweeps = plot_sweeps(results, output_dir / "sweep.png")
    sweep = "\n## Sweeps\n\n![sweep](sweep.png)\n" if has_sweeps else ""
    published = "" if "(published)" not in str(rows) else (
        " Published rows are copied from the paper (arXiv 2410.20898), those of an FID alone from DMD2's"
        f" repository, not measured here: {PROTOCOLS[benchmark]}; (?) marks a CLIP model that the paper"
        " does not name, and an FID whose protocol is another one or unknown.")
    few = f" FID of fewer than {FEW_IMAGES:,} images is marked: it is the more too large the fewer they are."
    marked = any(entry.get("fid_images", FEW_IMAGES) < FEW_IMAGES for entry in results.values())
    text = (f"# {benchmark}\n\n{part}{markdown_table(header, rows)}\n\nMeans with 95% intervals over prompts"
            " (Student's below 40 prompts, none below 3, bootstrap from 40)"
            + ("; ± is hpsv2's deviation of the means of 80" if benchmark == "hpsv2" else "")
            + ("; hpsv2 scores are of JPEGs" if flags.get("hps_jpeg") else "")
            + f".{few * marked}{published}\n" + sweep + differences_table(results) + latency_table(results)
            + group_tables(results))
    write_atomically(output_dir / "results.md", text)
    write_json_atomically(output_dir / "results.json", {
        "benchmark": benchmark, "prompts": count, "of": of, "flags": flags, "models": results})
    table = [{"model": name, "index": prompt.index, "prompt": prompt.text, "group": prompt.group,
              **model["records"][prompt.key]["scores"],
              "seconds": model["records"][prompt.key]["seconds"], "image": prompt.image}
             for name, model in models.items() for prompt in prompts if prompt.key in model["records"]]
    write_atomically(output_dir / "per_prompt.parquet", pandas.DataFrame(table).to_parquet())
    on_page = spread(prompts, PAGE_IMAGES)
    if len(on_page) < len(prompts):
        part += f"The page shows {len(on_page)} of the {len(prompts)} images of a model, evenly spread."
    sweep = '<img src="sweep.png" alt="sweep">' if sweep else ""
    write_page(output_dir / "report.html", benchmark, part, header, rows, sweep, models, columns(results),
               on_page)
    return markdown_table(header, rows)


def write_page(path, benchmark, part, header, rows, sweep, models, trained, prompts):
    """Write an HTML page with the table, the scores' distributions and the images side by side.

    It needs no network, and shows the thumbnails from the models' folders beside it.
    """
    def values(model, prompt):
        if prompt.key not in model["records"]:
            return [None] * len(trained)
        scores = model["records"][prompt.key]["scores"]
        held = [scores.get(key, model["values"].get(key, {}).get(prompt.index)) for key in trained]
        return [None if value is None else round(value, digits(key) + 2) for key, value in zip(trained, held)]

    data = {"models": list(models), "scores": [heading(key, names) for key, names in trained.items()],
            "digits": [digits(key) for key in trained], "names": [prompt.name for prompt in prompts],
            "folders": [quote(model["folder"].name) for model in models.values()],
            "prompts": [[prompt.index, prompt.text, prompt.group, prompt.image] for prompt in prompts],
            "values": [[values(model, prompt) for prompt in prompts] for model in models.values()]}
    cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join(f"<tr{' class=published' if '(published)' in str(row[0]) else ''}>" + "".join(
        f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    page = (Path(__file__).with_name("report.html").read_text().replace("{{title}}", html.escape(benchmark))
            .replace("{{note}}", html.escape(part.replace("*", "").strip()))
            .replace("{{table}}", f"<tr>{cells}</tr>{body}").replace("{{sweep}}", sweep)
            .replace("{{data}}", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")))
    write_atomically(path, page)
