#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Publish a finished run on the Hugging Face hub: pipeline or LoRA, card, pictures; no checkpoints, no logs.

    python examples/push.py --output_dir outputs/sdxl-paper-short --hub_model_id somebody/di-star-sdxl \\
        --evaluation results/parti results/hpsv2

--evaluation adds the tables of eval_benchmarks.py to the card. The same command continues an upload that was
cut off: files that the hub has already are not sent again.
"""

import argparse
import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.programs import Parser, fail, first_line, token


def parse_args(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="the run's folder")
    add("--hub_model_id", help="repository; unless given the name of --output_dir, under your own")
    add("--hub_token", type=token, help="better: log in once with `hf auth login`")
    add("--evaluation", type=Path, nargs="+", default=[], help="folders of eval_benchmarks.py's results")
    args = parser.parse_args(argv)
    try:
        args.card = (args.output_dir / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        fail(f"--output_dir {args.output_dir} holds no finished run: {first_line(error)}")
    if "\n- diff-instruct-star\n" not in args.card or "\n## Limits\n" not in args.card:
        fail(f"--output_dir {args.output_dir} holds no finished run: its README.md is not such a run's card")
    args.tables = []
    for folder in args.evaluation:
        try:
            text = (folder / "results.md").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            fail(f"--evaluation {folder} holds no results.md of eval_benchmarks.py: {first_line(error)}")
        args.tables.append("##" + text.split("\n## ")[0].strip())
    return args


ARGS = parse_args() if __name__ == "__main__" else None

from huggingface_hub import ModelCard, create_repo, upload_folder


# Copied from train_diff_instruct_star_sd15.py
def find_repository(args):
    """The run's repository on the hub, made where it is not there yet; ends the run where it cannot be."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # the hub's client has its own
        fail(f"--hub_model_id: no repository {name}: {first_line(error)}; log in with `hf auth login`, or"
             " give another name")


# Copied from train_diff_instruct_star_sd15.py
def publish(folder, repository, token):
    """Upload a finished run: pipeline or LoRA, card, pictures; what the hub has already is not sent again."""
    parts = ("assistant_lora", "pictures", "scheduler", "text_encoder", "text_encoder_2", "tokenizer",
             "tokenizer_2", "unet", "vae")
    patterns = ["README.md", "model_index.json", "pytorch_lora_weights.safetensors"]
    upload_folder(repo_id=repository, folder_path=folder, token=token,
                  commit_message="Diff-Instruct* training",
                  allow_patterns=patterns + [f"{part}/*" for part in parts])


def named(text, repository):
    """A card's text under the name that its title, and its lines to load it, are to have."""
    before = re.search(r"^# (.+)$", text, re.MULTILINE)[1]
    text = text.replace(f"# {before}\n", f"# {repository}\n", 1)
    for load in ("from_pretrained", "load_lora_weights"):
        text = text.replace(f"{load}({before!r}", f"{load}({repository!r}")
    return text


def with_evaluation(text, tables):
    """A card's text with tables before its limits, in the place of earlier ones."""
    section = "\n\n".join(["## Evaluation", *tables])
    text = re.sub(r"^## Evaluation\n.*?(?=^## Limits$)", "", text, flags=re.DOTALL | re.MULTILINE)
    return text.replace("## Limits\n", f"{section}\n\n## Limits\n", 1)


def main(args):
    repository = find_repository(args)
    text = named(args.card, repository)
    if args.tables:
        text = with_evaluation(text, args.tables)
    try:
        ModelCard(text).save(args.output_dir / "README.md")
        publish(args.output_dir, repository, args.hub_token)
    except Exception as error:  # the hub's client has its own
        fail(f"--output_dir {args.output_dir} is not uploaded: {first_line(error)}; the same command goes on")
    print(f"{args.output_dir} is published as {repository}")


if __name__ == "__main__":
    main(ARGS)
