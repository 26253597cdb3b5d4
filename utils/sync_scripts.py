"""Write the body of the SD1.5 script, all from its marker line on, under every other training script's head.

    python utils/sync_scripts.py    # make sync
"""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
MARKER = "# ---- body: the same to the letter in every training script;"
SOURCE = ROOT / "train_diff_instruct_star_sd15.py"


def split(path):
    """The head and the body of a training script; ValueError where it has not exactly one marker line."""
    text = path.read_text(encoding="utf-8")
    if text.count(f"\n{MARKER}") != 1:
        raise ValueError(f"{path.name} needs one line that begins with {MARKER!r}")
    head, _, body = text.partition(f"\n{MARKER}")
    return head + "\n", MARKER + body


def scripts(root=ROOT):
    """Every training script of the repository."""
    return sorted([*root.glob("train_*.py"), *root.glob("examples/families/train_*.py")])


def main():
    _, body = split(SOURCE)
    for path in scripts():
        head, own = split(path)
        if own != body:
            path.write_text(head + body, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: the body is written anew")


if __name__ == "__main__":
    main()
