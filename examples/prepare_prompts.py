"""Prepare training prompts: clean, filter and deduplicate captions, and write them to a parquet file.

    python examples/prepare_prompts.py    # as in the paper: LAION captions with a score above 6.25
    python examples/prepare_prompts.py --dataset_name my/captions --caption_column caption \\
        --score_column aesthetic --min_score 6.25 --output_file captions.parquet

The paper trains on LAION-Aesthetics captions with a score above 6.25. LAION removed its own selections from
the hub in 2023; the default is the list that DMD2 published with its weights. Datasets are streamed; images
are never read. The result has one column, which the training scripts read by `--prompts_file prompts.parquet
--caption_column text`.
"""

import collections
import hashlib
import html
import itertools
import os
import sys
from pathlib import Path

from datasets import Dataset, load_dataset
from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import Parser, exit_on_error, exit_with_error, positive_int
from utils.places import fault_of
from utils.prompts import read_pickle, read_rows


DMD2_CAPTIONS = "tianweiy/DMD2/data/laion/captions_laion_score6.25.pkl"
GONE = "if it no longer exists, docs/recipes.md lists other prompts"


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--dataset_name", help="Dataset of captions (hub id or folder).")
    add("--dataset_file", default=DMD2_CAPTIONS,
        help="File of captions, used without --dataset_name: .pkl (a list of text), .parquet, .csv, .tsv,"
             " .json, .jsonl or .txt; a path, or owner/name/file or datasets/owner/name/file on the hub.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--dataset_split", default="train", help="Split of the dataset to read.")
    add("--caption_column", default="text", help="Column of the captions; LAION names it TEXT.")
    add("--score_column", help="Column of a score; the default file is already selected by score.")
    add("--min_score", type=float, help="Keep only rows with a score above this.")
    add("--min_words", type=positive_int, default=3, help="Drop captions of fewer words than this.")
    add("--max_words", type=positive_int, default=60, help="Drop longer captions; CLIP reads 75 tokens.")
    add("--max_samples", type=positive_int, help="Stop after this many prompts.")
    add("--output_file", type=Path, default=Path("prompts.parquet"), help="Parquet file to write.")
    args = parser.parse_args(argv)
    for wrong, message in [
        ((args.score_column is None) != (args.min_score is None),
         "--score_column and --min_score need each other"),
        (args.output_file.suffix != ".parquet", f"--output_file {args.output_file} must end in .parquet"),
        (args.output_file.exists(),
         f"--output_file {args.output_file} exists; delete it or choose another name"),
        (not args.output_file.parent.is_dir(),
         f"--output_file {args.output_file}: its folder does not exist"),
        (not os.access(args.output_file.parent, os.W_OK),
         f"--output_file {args.output_file}: its folder is read-only"),
        (args.min_words > args.max_words,
         f"--min_words {args.min_words} is more than --max_words {args.max_words}"),
    ]:
        if wrong:
            exit_with_error(message)
    return args


def read_file(name, columns):
    """Read a local or hub file: rows {column: text}, of a pickled list {"text": caption}."""
    path = Path(name)
    if not path.exists():
        repository = name.removeprefix("datasets/").split("/", 2)
        if len(repository) < 3 or repository[0] in ("", ".", "..", "~"):
            raise FileNotFoundError("it is neither a local file nor owner/name/file on the hub")
        kind = "dataset" if name.startswith("datasets/") else "model"
        if fault := fault_of("/".join(repository[:2]), f"{kind}s"):
            raise FileNotFoundError(fault)
        path = Path(hf_hub_download("/".join(repository[:2]), repository[2], repo_type=kind))
    if path.suffix == ".pkl":
        return [{"text": caption} for caption in read_pickle(path)]
    if path.suffix == ".json":
        return load_dataset("json", data_files=str(path), split="train", streaming=True)
    rows = read_rows(path, *columns)
    first = [*itertools.islice(rows, 1)]  # so that a wrong column is found here
    return (dict(zip(columns, row)) for row in itertools.chain(first, rows))


def read_dataset(args):
    """Stream a dataset from the hub or a folder."""
    folder = Path(args.dataset_name)
    if folder.is_file():
        raise NotADirectoryError("it is a file; use --dataset_file")
    if fault := fault_of(args.dataset_name, "datasets"):
        raise FileNotFoundError(fault)
    name = str(folder.resolve()) if folder.exists() else args.dataset_name  # a bare `csv` names a loader
    return load_dataset(name, args.dataset_config_name, split=args.dataset_split, streaming=True)


def clean(caption):
    """Return the caption as one line of plain text: unescape HTML, collapse white space."""
    return " ".join(html.unescape(caption).split()) if isinstance(caption, str) else ""


def reject(caption, args):
    """Return why a clean caption is rejected (length, addresses, too few letters), or None."""
    words = caption.split()
    if len(words) < args.min_words:
        return "too short"
    if len(words) > args.max_words:
        return "too long"
    if any(mark in caption.lower() for mark in ("http:", "https:", "www.", ".com", ".jpg", ".png")):
        return "an address or file name"
    if sum(letter.isalpha() for letter in caption) < 0.6 * len(caption.replace(" ", "")):
        return "mostly digits and symbols"
    return None


def select(rows, args):
    """Select prompts from rows, dicts with the caption and, if --score_column is given, the score.

    Returns:
        a list of prompts in the order of the rows, without duplicates (ignoring case and punctuation), and a
        Counter of the reasons for which rows were dropped.
    """
    prompts, dropped, seen = [], collections.Counter(), set()
    for row in rows:
        caption = clean(row[args.caption_column])
        reason = reject(caption, args)
        if args.score_column is not None and not float(row[args.score_column] or "nan") > args.min_score:
            reason = "of a low score"  # including NaN
        if reason is None:
            plain = "".join(letter for letter in caption.lower() if letter.isalnum())
            digest = hashlib.blake2b(plain.encode(), digest_size=8).digest()
            reason = "a duplicate" if digest in seen else None
            seen.add(digest)
        if reason is not None:
            dropped[reason] += 1
            continue
        prompts.append(caption)
        if len(prompts) == args.max_samples:
            break
    return prompts, dropped


def main():
    args = parse_args()
    place = args.dataset_name or args.dataset_file
    source = f"--{'dataset_name' if args.dataset_name else 'dataset_file'} {place}"
    columns = {"caption_column": args.caption_column, "score_column": args.score_column}
    columns = {flag: name for flag, name in columns.items() if name is not None}
    with exit_on_error(f"{source} cannot be loaded", "" if Path(place).exists() else GONE):
        rows = read_dataset(args) if args.dataset_name else read_file(args.dataset_file, [*columns.values()])
        names = getattr(rows, "column_names", None) or (
            [*next(iter(rows), [])] if isinstance(rows, list) else columns.values())
    for flag, name in columns.items():
        if name not in names:
            exit_with_error(f"--{flag} {name} is not in {source}; it has {', '.join(names)}")
    if hasattr(rows, "select_columns"):
        rows = rows.select_columns([*columns.values()])
    rows = tqdm(rows, desc="reading", unit=" rows", mininterval=1)
    with exit_on_error(f"{source} cannot be read completely"):
        prompts, dropped = select(rows, args)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common()) or "none"
    if not prompts:
        exit_with_error(f"{source} contains no prompts; rows dropped: {reasons}")
    aside = args.output_file.with_suffix(".unfinished")
    with exit_on_error(f"--output_file {args.output_file} cannot be written"):
        try:
            Dataset.from_dict({"text": prompts}).to_parquet(str(aside))
            os.replace(aside, args.output_file)
        finally:
            aside.unlink(missing_ok=True)
    print(f"{len(prompts):,} prompts in {args.output_file}, {args.output_file.stat().st_size / 1e6:.1f} MB;"
          f" rows dropped: {reasons}")


if __name__ == "__main__":
    main()
