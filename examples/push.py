#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Publish a finished run on the Hugging Face hub: pipeline, LoRA, a rich card and its images.

    python examples/push.py --output_dir outputs/sdxl-paper-short --hub_model_id somebody/di-star-sdxl \\
        --evaluation results/parti results/hpsv2

It publishes the components that model_index.json names, which must be complete, the LoRA files, and the card
with its images, but no checkpoints, logs or metrics. With --lora_only it publishes only the LoRA files, their
scheduler and a card that says how to load them on their base. --evaluation adds tables of eval_benchmarks.py
to the card. The same command continues an interrupted upload: files that the hub already has are not sent
again.
"""

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import create_repo, upload_folder


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.card import LORA_FILES, published_files, read_card, read_table, write_rich_card
from utils.cli import Parser, exit_on_error


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="Folder of the finished run.")
    add("--hub_model_id", help="Repository on the hub (default: your own, named as --output_dir).")
    add("--hub_token", help="Token for the hub; `hf auth login` is safer.")
    add("--evaluation", type=Path, nargs="+",
        help="Show the tables of these results folders of eval_benchmarks.py in the card (default: keep the"
             " tables that it has).")
    add("--lora_only", action="store_true", help="Publish a run's LoRA without the merged pipeline.")
    args = parser.parse_args(argv)
    with exit_on_error(f"--output_dir {args.output_dir} holds no finished run"):
        read_card(args.output_dir)
    args.tables = []
    for folder in args.evaluation or []:
        with exit_on_error(f"--evaluation {folder} holds no results.md of eval_benchmarks.py"):
            args.tables.append(read_table(folder))
    with exit_on_error(f"--output_dir {args.output_dir} cannot be published"):
        args.published = published_files(args.output_dir)
        if args.lora_only and "load_lora_weights(" not in read_card(args.output_dir).text:
            raise ValueError("--lora_only: its card loads no LoRA, for the run trained whole weights or its"
                             " pipeline cannot load one")
    return args


def publish(args, folder, patterns, repository):
    """Write the card in a folder and upload the files of the folder that match the patterns."""
    write_rich_card(folder, repository, args.tables, args.lora_only)
    upload_folder(repo_id=repository, folder_path=folder, token=args.hub_token,
                  commit_message="Diff-Instruct* training", allow_patterns=patterns)


def publish_lora(args, repository):
    """Publish the LoRA from a copy, so that the run's folder keeps the card of the whole pipeline."""
    with TemporaryDirectory() as aside:
        for path in args.output_dir.iterdir():
            if path.is_file():
                shutil.copy(path, aside)
            elif path.name in ("scheduler", "validation"):
                shutil.copytree(path, Path(aside, path.name))
        publish(args, Path(aside), ["README.md", "images/*", *LORA_FILES, "scheduler/*"], repository)


def main(args):
    name = args.hub_model_id or args.output_dir.resolve().name
    with exit_on_error(f"--hub_model_id: no repository {name}", "run `hf auth login`, or give another name"):
        repository = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    with exit_on_error(f"--output_dir {args.output_dir} is not published",
                       "the same command continues the upload"):
        if args.lora_only:
            publish_lora(args, repository)
        else:
            publish(args, args.output_dir, args.published, repository)
    print(f"{args.output_dir} is published as {repository}")


if __name__ == "__main__":
    main(parse_args())
