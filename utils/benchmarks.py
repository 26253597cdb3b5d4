"""The benchmarks' prompts, verbatim: Parti, COCO-30K, HPSv2, or one's own.

| name | prompts | groups | read from, unless given as a file |
| --- | --- | --- | --- |
| `parti` | 1,632 | category | hub: nateraw/parti-prompts; or the repository's PartiPrompts.tsv |
| `coco30k` | 30,000 captions of COCO 2014's validation images | | a file, one a line, such as DMD2's list |
| `hpsv2` | 4 styles of 800 | style | hub: zhwang/HPDv2, benchmark/STYLE.json; or a folder of these files |
| `prompts` | one's own | | a .txt, .csv, .tsv, .jsonl or .parquet file |
"""

import csv
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pandas
from datasets import load_dataset
from huggingface_hub import hf_hub_download

from utils.rewards import first_line


SIZES = {"parti": 1632, "coco30k": 30_000, "hpsv2": 3200}
HPS_STYLES = {"anime": "Animation", "concept-art": "Concept-art", "paintings": "Painting", "photo": "Photo"}
CHUNK = 80  # pictures of a style in one of the ten means whose deviation hpsv2 prints


@dataclass(frozen=True)
class Prompt:
    """One prompt; `index` is its place in the whole benchmark, of which its noise is a function."""

    index: int
    text: str
    group: str = ""


def load_benchmark(name, prompts_file=None, caption_column="text"):
    """The prompts of a benchmark in its order.

    Raises:
        ValueError: a file that cannot be read, a style that is missing, another number than the benchmark's.
        OSError: no file, and not on the hub.
    """
    if name == "hpsv2":
        texts, groups = read_hpsv2(prompts_file)
    elif name == "parti":
        texts, groups = read_parti(prompts_file)
    elif prompts_file is None:
        raise ValueError(f"{name} needs --prompts_file: one caption a line" if name == "coco30k" else
                         "--benchmark prompts needs --prompts_file")
    else:
        texts = column(read_table(prompts_file), caption_column, prompts_file)
        groups = [""] * len(texts)
    if len(texts) != SIZES.get(name, len(texts)):
        raise ValueError(f"--prompts_file {prompts_file} has {len(texts)} prompts, {name} {SIZES[name]}; for"
                         " a list of your own give --benchmark prompts")
    if not texts:
        raise ValueError(f"--prompts_file {prompts_file} has no prompts")
    return [Prompt(index, *pair) for index, pair in enumerate(zip(texts, groups))]


def spread(prompts, limit):
    """`limit` of the prompts, evenly over the whole; all where there is none."""
    kept = min(limit or len(prompts), len(prompts))
    return [prompts[row * len(prompts) // kept] for row in range(kept)]


def read_parti(prompts_file):
    table = read_table(prompts_file) if prompts_file else load_dataset(
        "nateraw/parti-prompts", split="train").to_pandas()
    source = prompts_file or "nateraw/parti-prompts"
    return column(table, "Prompt", source), column(table, "Category", source)


def read_hpsv2(folder):
    texts, groups = [], []
    for style in HPS_STYLES:
        path = Path(folder, f"{style}.json") if folder else Path(hf_hub_download(
            "zhwang/HPDv2", f"benchmark/{style}.json", repo_type="dataset"))
        if not path.is_file():
            raise ValueError(f"--prompts_file {folder} has no {style}.json; the four are"
                             f" {', '.join(HPS_STYLES)}")
        try:
            prompts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{path} is no list of prompts")
        if len(prompts) != SIZES["hpsv2"] // 4:
            raise ValueError(f"{path} has {len(prompts)} prompts, not {SIZES['hpsv2'] // 4}")
        texts, groups = texts + prompts, groups + [style] * len(prompts)
    return texts, groups


def read_table(path):
    """A file's table as text: `42` stays text, in .tsv a quotation mark is a plain character."""
    kind, plain = Path(path).suffix.lower(), {"dtype": str, "keep_default_na": False}
    readers = {".txt": lambda path: pandas.DataFrame({"text": [
                   line for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]}),
               ".csv": functools.partial(pandas.read_csv, **plain),
               ".tsv": functools.partial(pandas.read_csv, sep="\t", quoting=csv.QUOTE_NONE, **plain),
               ".jsonl": functools.partial(pandas.read_json, lines=True, dtype=False),
               ".parquet": pandas.read_parquet}
    if kind not in readers:
        raise ValueError(f"--prompts_file {path}: '{kind}' is none of {', '.join(readers)}")
    try:
        return readers[kind](path)
    except (OSError, ValueError) as error:  # ValueError: of UTF-8, of JSON, of Arrow, of pandas
        raise ValueError(f"--prompts_file {path} cannot be read: {first_line(error)}") from error


def column(table, name, source):
    if name not in table:
        raise ValueError(f"{source} has no column {name}, but {', '.join(map(str, table.columns)) or 'none'}")
    if table[name].isna().any():
        raise ValueError(f"{source} has no {name} in {int(table[name].isna().sum())} of its rows")
    return [str(value) for value in table[name]]
