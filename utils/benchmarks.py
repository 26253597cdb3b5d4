"""Read the benchmarks' prompts, verbatim, and lay out images for the benchmarks' own programs.

| name | prompts | groups | source, unless --prompts_file is given |
| --- | --- | --- | --- |
| `parti` | 1,632 | category | hub: PartiPrompts.tsv of nateraw/parti-prompts; or this file |
| `coco30k` | 30,000 captions of COCO 2014's validation images, as DMD2 for SD1.5 | | a file, see below |
| `coco10k` | 10,000 captions of these, as DMD2 for SDXL | | a file: DMD2's coco10k/all_prompts.pkl |
| `hpsv2` | 4 styles of 800 | style | hub: zhwang/HPDv2, benchmark/STYLE.json; or a folder of these files |
| `drawbench` | 200 | category | hub: sayakpaul/drawbench; or a table with its columns |
| `geneval` | 553, with 4 images each | tag | a file: its repository's prompts/evaluation_metadata.jsonl |
| `dpg` | 1,065, with 4 images each | | a folder of files: dpg_bench/prompts of ELLA's repository |
| `pickapic` | 500, Pick-a-Pic v1's test prompts | | hub: yuvalkirstain/pickapic_v1_no_images; or a table |
| `prompts` | your own | | a .txt, .csv, .tsv, .jsonl or .parquet file |

The last and the two of COCO also read a .pkl file of a list of text, as DMD2 publishes its captions.
GenEval and DPG-Bench are scored by their own programs, which read the images that `export` lays out.
"""

import itertools
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import load_dataset
from huggingface_hub import hf_hub_download
from PIL import Image

from utils.prompts import read_pickle, read_prompts, read_rows, read_text


SIZES = {"parti": 1632, "coco30k": 30_000, "coco10k": 10_000, "hpsv2": 3200, "drawbench": 200,
         "geneval": 553, "dpg": 1065, "pickapic": 500}
PROGRAMS = {"geneval": "github.com/djghosh13/geneval", "dpg": "github.com/TencentQQGYLab/ELLA"}
HPS_STYLES = {"anime": "Animation", "concept-art": "Concept-art", "paintings": "Painting", "photo": "Photo"}
CHUNK = 80  # images per mean; hpsv2 prints the deviation of ten means per style
PICKAPIC = "data/test_unique-00000-of-00001-73a51cbb6488571d.parquet"


@dataclass(frozen=True)
class Prompt:
    """One image of a prompt; `index` is the prompt's position in the whole benchmark, `image` its number.

    Its noise depends on `index` and `image`. `item` is for the benchmark's own program: a line of GenEval's
    metadata, or the name of a file of DPG-Bench.
    """

    index: int
    text: str
    group: str = ""
    item: str = ""
    image: int = 0

    @property
    def key(self):
        return self.index, self.image

    @property
    def name(self):
        """File name of the image, without suffix."""
        return f"{self.index:05d}" + f"-{self.image}" * bool(self.image)


def load_benchmark(name, prompts_file=None, caption_column="text"):
    """Return the prompts of a benchmark in its order, as the first image of each.

    Raises:
        ValueError: no file is given, it cannot be read, a style is missing, or the number of prompts differs
            from the benchmark's. Absent files, here or on the hub, raise the libraries' own errors.
    """
    groups = items = itertools.repeat("")
    if name == "hpsv2":
        texts, groups = read_hpsv2(prompts_file)
    elif name == "parti":
        # The hub has the repository's file; read as a dataset, a prompt loses its quotation marks.
        texts, groups = zip(*read_rows(prompts_file or hf_hub_download(
            "nateraw/parti-prompts", "PartiPrompts.tsv", repo_type="dataset"), "Prompt", "Category"))
    elif name == "drawbench":
        texts, groups = read_columns(prompts_file, "sayakpaul/drawbench", "Prompts", "Category")
    elif name == "pickapic":
        texts = read_prompts(prompts_file or hf_hub_download(
            "yuvalkirstain/pickapic_v1_no_images", PICKAPIC, repo_type="dataset"), "caption")
    elif prompts_file is None:
        raise ValueError("no --prompts_file is given")
    elif name == "geneval":
        texts, groups, items = read_geneval(prompts_file)
    elif name == "dpg":
        texts, items = read_folder(prompts_file)
    elif Path(prompts_file).suffix == ".pkl":
        texts = [caption.strip() for caption in read_pickle(prompts_file)
                 if isinstance(caption, str) and caption.strip()]
    else:
        texts = read_prompts(prompts_file, caption_column)
    if len(texts) != SIZES.get(name, len(texts)):
        raise ValueError(f"{len(texts)} prompts, not the benchmark's {SIZES[name]}; use --benchmark prompts"
                         " for prompts of your own")
    if not texts:
        raise ValueError("the file has no prompts")
    return [Prompt(index, *held) for index, held in enumerate(zip(texts, groups, items))]


def images_of(prompts, count):
    """Return `count` images of each prompt, prompt by prompt."""
    return [replace(prompt, image=image) for prompt in prompts for image in range(count)]


def spread(prompts, limit):
    """Return `limit` prompts, evenly spread; all of them if there is no limit."""
    kept = min(limit or len(prompts), len(prompts))
    return [prompts[row * len(prompts) // kept] for row in range(kept)]


def read_columns(prompts_file, hub, *columns):
    """Return columns of a file, or else of a dataset on the hub, as lists of text."""
    if prompts_file:
        rows = read_rows(prompts_file, *columns)
    else:
        rows = load_dataset(hub, split="train").select_columns([*columns]).to_list()
        rows = ([row[column] for column in columns] for row in rows)
    return zip(*rows)


def read_geneval(path):
    """Return the texts, tags and complete lines of GenEval's evaluation_metadata.jsonl."""
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    try:
        held = [json.loads(line) for line in lines]
        return [one["prompt"] for one in held], [one["tag"] for one in held], lines
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not GenEval's evaluation_metadata.jsonl: {error}") from error


def read_folder(folder):
    """Return the texts of a folder's .txt files and their names, in numerical order."""
    paths = sorted(Path(folder).glob("*.txt"), key=by_number)
    return [read_text(path).strip() for path in paths], [path.stem for path in paths]


def by_number(path):
    """Sort key that puts 2.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def read_hpsv2(folder):
    texts, groups = [], []
    for style in HPS_STYLES:
        path = Path(folder, f"{style}.json") if folder else Path(hf_hub_download(
            "zhwang/HPDv2", f"benchmark/{style}.json", repo_type="dataset"))
        if not path.is_file():
            raise ValueError(f"{path.name} is missing; the styles are {', '.join(HPS_STYLES)}")
        try:
            prompts = json.loads(read_text(path))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{path} is not a list of prompts")
        if len(prompts) != SIZES["hpsv2"] // 4:
            raise ValueError(f"{path} has {len(prompts)} prompts, not {SIZES['hpsv2'] // 4}")
        texts, groups = texts + prompts, groups + [style] * len(prompts)
    return texts, groups


def export(name, prompts, images, folder):
    """Lay out images for a benchmark's own program; returns the command that scores them.

    Args:
        name: `geneval` or `dpg`. prompts: every image of the chosen prompts, prompt by prompt.
        images: folder of the image files. folder: destination; images of an earlier export are deleted.

    Raises:
        ValueError: an image is not square, but DPG-Bench's program cuts squares out of a grid.
    """
    for path in [*folder.glob("[0-9]" * 5), *folder.glob("*.png")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for index, same in itertools.groupby(prompts, key=lambda prompt: prompt.index):
        same = list(same)
        paths = [images / f"{prompt.name}.png" for prompt in same]
        if name == "geneval":
            (folder / f"{index:05d}" / "samples").mkdir(parents=True, exist_ok=True)
            (folder / f"{index:05d}" / "metadata.jsonl").write_text(same[0].item + "\n", encoding="utf-8")
            for number, path in enumerate(paths):
                give_name(path, folder / f"{index:05d}" / "samples" / f"{number:04d}.png")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        opened = [Image.open(path) for path in paths]
        width, height = opened[0].size
        if width != height:
            raise ValueError(f"{paths[0]} is not square, but DPG-Bench's program cuts squares out of a grid")
        columns = min(2, len(opened))
        grid = Image.new("RGB", (columns * width, -(-len(opened) // columns) * height))
        for number, image in enumerate(opened):
            grid.paste(image, (number % columns * width, number // columns * height))
        grid.save(folder / f"{same[0].item}.png")
    place, results = shlex.quote(str(folder.resolve())), shlex.quote(f"{folder.resolve()}.jsonl")
    if name == "geneval":
        return (f"python evaluation/evaluate_images.py {place} --outfile {results}"
                f" --model-path OBJECT_DETECTOR && python evaluation/summary_scores.py {results}")
    return f"PIC_NUM={len(same)} bash dpg_bench/dist_eval.sh {place} {width}"


def give_name(source, target):
    """Make a hard link to a file, or a copy if the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
