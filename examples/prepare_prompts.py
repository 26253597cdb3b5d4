"""Make training prompts: captions, cleaned, filtered, deduplicated, as one parquet file.

    python examples/prepare_prompts.py    # the paper's kind: LAION captions with a score above 6.25
    python examples/prepare_prompts.py --dataset_name my/captions --caption_column caption \\
        --score_column aesthetic --min_score 6.25 --output_file captions.parquet

The paper trains on LAION-Aesthetics captions with a score above 6.25. LAION took its own selections off the
hub in 2023; the default is the list that DMD2 published with its weights. Rows of a dataset are streamed, and
images are never read. The result has one column: `--prompts_file prompts.parquet --caption_column text` in
the training scripts.
"""

import collections
import hashlib
import html
import os
import pickle
import sys
from pathlib import Path

from datasets import Dataset, load_dataset
from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import Parser, exit_on_error, exit_with_error, positive_int


DMD2_CAPTIONS = "tianweiy/DMD2/data/laion/captions_laion_score6.25.pkl"
GONE = "if it is gone, docs/recipes.md names other prompts"


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--dataset_name", help="Dataset of captions, a hub id or folder.")
    add("--dataset_file", default=DMD2_CAPTIONS,
        help="Without --dataset_name, one file of captions: .pkl (a list of text), .parquet, .csv, .json or"
             " .txt, a path or, on the hub, owner/name/file or datasets/owner/name/file.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--dataset_split", default="train", help="Split of the dataset.")
    add("--caption_column", default="text", help="Column of the captions; LAION spells it TEXT.")
    add("--score_column", help="Column of a score; the default file is selected by its score already.")
    add("--min_score", type=float, help="Keep the rows whose score is above it.")
    add("--min_words", type=positive_int, default=3, help="Drop shorter captions.")
    add("--max_words", type=positive_int, default=60, help="Drop longer captions; CLIP reads 75 tokens.")
    add("--max_samples", type=positive_int, help="Stop after N prompts.")
    add("--output_file", type=Path, default=Path("prompts.parquet"), help="Parquet file to write.")
    args = parser.parse_args(argv)
    for wrong, message in [
        ((args.score_column is None) != (args.min_score is None),
         "--score_column and --min_score go together"),
        (args.output_file.suffix != ".parquet", f"--output_file {args.output_file} must end in .parquet"),
        (args.output_file.exists(),
         f"--output_file {args.output_file} exists; remove it or choose another name"),
        (not args.output_file.parent.is_dir(),
         f"--output_file {args.output_file}: its folder does not exist"),
        (args.min_words > args.max_words,
         f"--min_words {args.min_words} is more than --max_words {args.max_words}"),
    ]:
        if wrong:
            exit_with_error(message)
    return args


class TextUnpickler(pickle.Unpickler):
    """Reads lists, numbers and text; a pickle that names a class or function, which might run, is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only a list of text is read")


def read_file(name):
    """Rows {"text": caption} of a pickled list, or a dataset of the file; from the hub if it is not here."""
    path = Path(name)
    if not path.exists():
        repository = name.removeprefix("datasets/").split("/", 2)
        if len(repository) < 3:
            raise FileNotFoundError("there is no such file here, and it is no owner/name/file of the hub")
        path = Path(hf_hub_download("/".join(repository[:2]), repository[2],
                                    repo_type="dataset" if name.startswith("datasets/") else "model"))
    if path.suffix == ".pkl":
        with open(path, "rb") as file:
            return [{"text": caption} for caption in TextUnpickler(file).load()]
    kind = {".txt": "text"}.get(path.suffix, path.suffix.removeprefix("."))
    return load_dataset(kind, data_files=str(path), split="train", streaming=True)


def read_dataset(args):
    """A streamed dataset of the hub or of a folder."""
    folder = Path(args.dataset_name)
    if folder.is_file():
        raise NotADirectoryError("it is a file; give it as --dataset_file")
    name = str(folder.resolve()) if folder.exists() else args.dataset_name  # `csv` would be a loader's name
    return load_dataset(name, args.dataset_config_name, split=args.dataset_split, streaming=True)


def clean(caption):
    """The caption as plain text on one line: HTML entities resolved, runs of white space made one space."""
    return " ".join(html.unescape(caption).split()) if isinstance(caption, str) else ""


def reject(caption, args):
    """Why a clean caption is no prompt, or None: too short, too long, an address, or hardly any words."""
    words = caption.split()
    if len(words) < args.min_words:
        return "too short"
    if len(words) > args.max_words:
        return "too long"
    if any(mark in caption.lower() for mark in ("http:", "https:", "www.", ".com", ".jpg", ".png")):
        return "an address or file name"
    if sum(letter.isalpha() for letter in caption) < 0.6 * len(caption.replace(" ", "")):
        return "mostly digits and signs"
    return None


def select(rows, args):
    """The prompts among rows (dicts with the caption, and the score where asked), and why others are none.

    Returns:
        a list of prompts, each once (case and punctuation do not tell two apart), in the rows' order; a
        Counter of the reasons for which rows were dropped.
    """
    prompts, dropped, seen = [], collections.Counter(), set()
    for row in rows:
        caption = clean(row[args.caption_column])
        reason = reject(caption, args)
        if args.score_column is not None and not (row[args.score_column] or 0) > args.min_score:
            reason = "of a low score"  # as is NaN, which is above nothing
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
    source = next(f"--{flag} {value}" for flag in ("dataset_name", "dataset_file")
                  if (value := getattr(args, flag)))
    with exit_on_error(f"{source} cannot be loaded", GONE):
        rows = read_dataset(args) if args.dataset_name else read_file(args.dataset_file)
        names = getattr(rows, "column_names", None) or list(next(iter(rows)))
    columns = {"caption_column": args.caption_column, "score_column": args.score_column}
    for flag, name in columns.items():
        if name is not None and name not in names:
            exit_with_error(f"--{flag} {name} is not in {source}; it has {', '.join(names)}")
    if not isinstance(rows, list):
        rows = rows.select_columns(list(filter(None, columns.values())))
    rows = tqdm(rows, desc="reading", unit=" rows", mininterval=1)
    with exit_on_error(f"{source} cannot be read to its end"):
        prompts, dropped = select(rows, args)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common()) or "none"
    if not prompts:
        exit_with_error(f"{source} has no prompts; rows dropped: {reasons}")
    aside = args.output_file.with_suffix(".unfinished")
    Dataset.from_dict({"text": prompts}).to_parquet(str(aside))
    os.replace(aside, args.output_file)
    print(f"{len(prompts):,} prompts in {args.output_file}, {args.output_file.stat().st_size / 1e6:.1f} MB;"
          f" rows dropped: {reasons}")


if __name__ == "__main__":
    main()
