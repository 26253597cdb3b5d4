"""Keep marked copies equal to their source: self-contained files share whole functions and classes.

    python utils/check_copies.py         # fails, naming each copy that differs
    python utils/check_copies.py --fix   # writes the source's text over the copies

A copy stands under a comment `# Copied from path/of/source.py`, has its source's name and is equal to it to
the letter. A function that equals its namesake in that source without the comment fails too: what is not
marked is what differs. A comment that is nearly the mark fails, so that no copy is lost by a slip.
"""

import argparse
import ast
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"# Copied from (\S+\.py)")


def definitions(text, name="<text>"):
    """{name: (first line, one past the last)} of a file's functions and classes, with decorators; from 0."""
    found = {}
    for node in ast.parse(text, name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            found[node.name] = (first, node.end_lineno)
    return found


def check(path, root):
    """Compare one file's marked copies with their sources.

    Returns:
        the file's text with every copy repaired; a list of what is wrong, one line each; the names of the
        copies; and the names that the file shares with its sources without being copies.
    """
    lines = path.read_text().splitlines()
    own = definitions("\n".join(lines), str(path))
    marks = {name: MARK.fullmatch(lines[first - 1]) for name, (first, _) in own.items() if first}
    copies = {name: mark[1] for name, mark in marks.items() if mark}
    sources = {}
    for source in sorted(set(copies.values())):
        if not (root / source).is_file():
            return "\n".join(lines) + "\n", [f"{path}: the source {source} does not exist"], copies, []
        text = (root / source).read_text()
        sources[source] = {name: text.splitlines()[slice(*span)] for name, span in definitions(text).items()}
    differing = []
    wrong = [f"{path.name}: line {number} is nearly a mark: {line.strip()}"
             for number, line in enumerate(lines, 1)
             if re.match(r"\s*#\W*copied from", line, re.IGNORECASE) and not MARK.fullmatch(line)]
    for name, (first, last) in sorted(own.items(), key=lambda item: -item[1][0]):  # from below: lines shift
        here = lines[first:last]
        if name in copies:
            there = sources[copies[name]].get(name)
            if there is None:
                wrong.append(f"{path.name}: {name} is not in {copies[name]}")
            elif here != there:
                wrong.append(f"{path.name}: {name} differs from {copies[name]}")
                lines[first:last] = there
            continue
        for source, others in sources.items():
            if name in others:
                differing.append(name)
                if others[name] == here:
                    wrong.append(f"{path.name}: {name} is a copy of {source}'s and is not marked as one")
                    lines.insert(first, f"# Copied from {source}")
    return "\n".join(lines) + "\n", wrong[::-1], copies, differing[::-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="make the copies equal to their sources")
    args = parser.parse_args()
    paths = [path for folder in (".", "utils", "examples", "examples/shapes") for path in
             sorted((ROOT / folder).glob("*.py"))]
    failures = []
    for path in paths:
        if not any(line.startswith("# Copied from") for line in path.read_text().splitlines()):
            continue
        repaired, wrong, copies, differing = check(path, ROOT)
        if args.fix and wrong:
            print(*(f"to be mended: {line}" for line in wrong), sep="\n")
            path.write_text(repaired)
            repaired, wrong, copies, differing = check(path, ROOT)
        print(f"{path.relative_to(ROOT)}: {len(copies)} copies, {len(wrong)} wrong; of the same name and"
              f" different: {', '.join(differing) or 'none'}")
        failures += wrong
    if failures:
        advice = "mend by hand" if args.fix else "`python utils/check_copies.py --fix` makes copies equal"
        print(*failures, f"error: {advice}", sep="\n", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
