"""Copy the SD1.5 script into the SDXL script, all but the docstring and the family.

    python utils/sync_scripts.py    # make sync
"""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SOURCE, COPY = ROOT / "train_diff_instruct_star_sd15.py", ROOT / "train_diff_instruct_star_sdxl.py"
MARKS = ("# ---- imports and the contract of a family", "# ---- this script's family", "# ---- body")


def split(path):
    """[docstring, imports and contract, family, body] of a training script; ValueError without its marks."""
    text, parts = path.read_text(encoding="utf-8"), []
    for mark in MARKS:
        if text.count(f"\n{mark}") != 1:
            raise ValueError(f"{path.name} needs one line that begins with {mark!r}")
        part, _, text = text.partition(f"\n{mark}")
        parts.append(part)
        text = f"\n{mark}{text}"
    return [*parts, text]


def main():
    _, imports, _, body = split(SOURCE)
    docstring, own_imports, family, own_body = split(COPY)
    if (own_imports, own_body) != (imports, body):
        COPY.write_text("".join((docstring, imports, family, body)), encoding="utf-8")
        print(f"{COPY.relative_to(ROOT)}: the shared parts are rewritten")


if __name__ == "__main__":
    main()
