"""The benchmarks' prompts, verbatim: Parti, COCO-30K, HPSv2, or your own.

| name | prompts | groups | read from, unless given as a file |
| --- | --- | --- | --- |
| `parti` | 1,632 | category | hub: nateraw/parti-prompts; or the repository's PartiPrompts.tsv |
| `coco30k` | 30,000 captions of COCO 2014's validation images | | a file, one a line, such as DMD2's list |
| `hpsv2` | 4 styles of 800 | style | hub: zhwang/HPDv2, benchmark/STYLE.json; or a folder of these files |
| `prompts` | your own | | a .txt, .csv, .tsv, .jsonl or .parquet file |
"""

import csv
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pandas
from datasets import load_dataset
from huggingface_hub import hf_hub_download


SIZES = {"parti": 1632, "coco30k": 30_000, "hpsv2": 3200}
HPS_STYLES = {"anime": "Animation", "concept-art": "Concept-art", "paintings": "Painting", "photo": "Photo"}
CHUNK = 80  # images of a style in one of the ten means whose deviation hpsv2 prints


@dataclass(frozen=True)
class Prompt:
    """One prompt; `index` is its position in the whole benchmark, of which its noise is a function."""

    index: int
    text: str
    group: str = ""


def load_benchmark(name, prompts_file=None, caption_column="text"):
    """The prompts of a benchmark in its order.

    Raises:
        ValueError: there is no file, it cannot be read, a style is missing, or the number of prompts is not
            the benchmark's. The libraries raise their own where a file is absent, here or on the hub.
    """
    if name == "hpsv2":
        texts, groups = read_hpsv2(prompts_file)
    elif name == "parti":
        texts, groups = read_parti(prompts_file)
    elif prompts_file is None:
        raise ValueError("no --prompts_file is given")
    else:
        values = column(read_table(prompts_file, caption_column), caption_column)
        texts = [text for text in map(str.strip, values) if text]
        groups = [""] * len(texts)
    if len(texts) != SIZES.get(name, len(texts)):
        raise ValueError(f"{len(texts)} prompts, not the benchmark's {SIZES[name]}; give --benchmark prompts"
                         " for prompts of your own")
    if not texts:
        raise ValueError("the file has no prompts")
    return [Prompt(index, *pair) for index, pair in enumerate(zip(texts, groups))]


def spread(prompts, limit):
    """`limit` of the prompts, evenly over the whole; all where there is no limit."""
    kept = min(limit or len(prompts), len(prompts))
    return [prompts[row * len(prompts) // kept] for row in range(kept)]


def read_parti(prompts_file):
    table = read_table(prompts_file) if prompts_file else load_dataset(
        "nateraw/parti-prompts", split="train").to_pandas()
    return column(table, "Prompt"), column(table, "Category")


def read_hpsv2(folder):
    texts, groups = [], []
    for style in HPS_STYLES:
        path = Path(folder, f"{style}.json") if folder else Path(hf_hub_download(
            "zhwang/HPDv2", f"benchmark/{style}.json", repo_type="dataset"))
        if not path.is_file():
            raise ValueError(f"{path.name} is missing; the styles are {', '.join(HPS_STYLES)}")
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


def read_table(path, text_column="text"):
    """A file's table as text, as the training scripts read it; the lines of a .txt are its `text_column`.

    `42` stays text, and in a .tsv file quotation marks are text too.
    """
    kind, text = Path(path).suffix.lower(), {"dtype": str, "keep_default_na": False}
    readers = {".txt": lambda path: pandas.DataFrame({
                   text_column: Path(path).read_text(encoding="utf-8-sig").split("\n")}),
               ".csv": functools.partial(pandas.read_csv, **text),
               ".tsv": functools.partial(pandas.read_csv, sep="\t", quoting=csv.QUOTE_NONE, **text),
               ".jsonl": functools.partial(pandas.read_json, lines=True, dtype=False),
               ".parquet": pandas.read_parquet}
    if kind not in readers:
        raise ValueError(f"{kind} is none of {', '.join(readers)}")
    return readers[kind](path)


def column(table, name):
    """The values of a column as text, without missing ones."""
    if name not in table:
        raise ValueError(f"there is no column {name}, but {', '.join(map(str, table)) or 'none'}")
    values = table[name].dropna()
    if not all(map(pandas.api.types.is_scalar, values)):
        raise ValueError(f"column {name} holds lists or records, not text")
    return list(map(str, values))
