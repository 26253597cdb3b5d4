#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Publish a finished run on the Hugging Face hub: pipeline, LoRA, a rich card and its images.

    python examples/push.py --output_dir outputs/sdxl-paper-short --hub_model_id somebody/di-star-sdxl \\
        --evaluation results/parti results/hpsv2

Published are the components that model_index.json names, which must be complete, the LoRA file, and the card
with its images; checkpoints, logs and metrics are not. --evaluation adds tables of eval_benchmarks.py to the
card. The same command continues an interrupted upload: files that the hub already has are not sent again.
"""

import sys
from pathlib import Path

from huggingface_hub import create_repo, upload_folder


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.card import published_files, read_card, read_table, write_rich_card
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
    args = parser.parse_args(argv)
    with exit_on_error(f"--output_dir {args.output_dir} holds no finished run"):
        read_card(args.output_dir)
    args.tables = []
    for folder in args.evaluation or []:
        with exit_on_error(f"--evaluation {folder} holds no results.md of eval_benchmarks.py"):
            args.tables.append(read_table(folder))
    with exit_on_error(f"--output_dir {args.output_dir} cannot be published"):
        args.published = published_files(args.output_dir)
    return args


def main(args):
    name = args.hub_model_id or args.output_dir.resolve().name
    with exit_on_error(f"--hub_model_id: no repository {name}", "run `hf auth login`, or give another name"):
        repository = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    with exit_on_error(f"--output_dir {args.output_dir} is not published",
                       "the same command continues the upload"):
        write_rich_card(args.output_dir, repository, args.tables)
        upload_folder(repo_id=repository, folder_path=args.output_dir, token=args.hub_token,
                      commit_message="Diff-Instruct* training", allow_patterns=args.published)
    print(f"{args.output_dir} is published as {repository}")


if __name__ == "__main__":
    main(parse_args())
