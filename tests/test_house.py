"""The house: how large the scripts are, what stands where, and what stands once."""

import ast
import re

import pytest
from conftest import REPOSITORY

from utils import sync_scripts


SD15, SDXL = (REPOSITORY / f"train_diff_instruct_star_{name}.py" for name in ("sd15", "sdxl"))
FAMILIES = sorted((REPOSITORY / "examples" / "families").glob("*.py"))
STATEMENTS = 1569  # of the SD1.5 script; whoever raises it says what was removed
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]


def depth(node):
    """How deep blocks are nested below a node; an `elif` is no deeper than its `if`."""
    found = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                chained = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
                found = max(found, depth(child) + (isinstance(child, BLOCKS) and not chained))
    return found


def test_the_script_stays_within_its_statements():
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(tree(SD15))) <= STATEMENTS


@pytest.mark.parametrize("path", [SD15, SDXL, *FAMILIES], ids=lambda path: path.stem)
def test_functions_are_short_and_flat(path):
    for function in functions(path):
        assert function.end_lineno - function.lineno < 60, function.name
        assert depth(function) <= 4, function.name
    main = [function for function in functions(path) if function.name == "main"]
    assert all(function.end_lineno - function.lineno < 45 for function in main)


def test_the_algorithm_is_one_stretch():
    """From the forward process to `train_step`, in the order of reading and without anything between."""
    order = ["Method", "VariancePreserving", "score_divergence_loss", "kl_divergence_loss", "reward_gradient",
             "Predictions", "Term", "Divergence", "GuidanceReward", "ExplicitReward", "generate",
             "assistant_step", "generator_step", "train_step", "TrainingRun", "Models", "load_models",
             "read_prompts", "validate", "export", "exit_with_error", "parse_args", "check_models", "main"]
    lines = {node.name: node for node in tree(SD15).body if hasattr(node, "name")}
    places = [lines[name].lineno for name in order]
    assert places == sorted(places)
    assert lines["train_step"].end_lineno - lines["VariancePreserving"].lineno <= 450


def test_the_two_scripts_share_all_but_docstring_and_family():
    one, other = (sync_scripts.split(path) for path in (SD15, SDXL))
    assert (one[1], one[3]) == (other[1], other[3])
    assert one[0] != other[0] and one[2] != other[2]


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_a_family_is_a_class_that_imports_the_body(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    body = {node.name for node in tree(SD15).body if hasattr(node, "name")}
    assert not body & {node.name for node in tree(path).body if hasattr(node, "name")}
    named = re.search(r"To copy this file, take\s+(.*?) along", text, re.DOTALL)[1].replace("\n", " ")
    needed = {"train_diff_instruct_star_sd15.py"} | (
        {"utils/flow_matching.py"} if "utils.flow_matching" in text else set())
    assert set(named.split(" and ")) == needed


def test_extras_import_no_script():
    for path in (REPOSITORY / "utils").rglob("*.py"):
        imported = {alias.name for node in ast.walk(tree(path)) if isinstance(node, ast.Import)
                    for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)}
        assert not any(name.startswith("train_diff_instruct_star") for name in imported), path


def test_pages_and_names():
    assert (REPOSITORY / "README.md").read_text().count("\n") <= 220
    for path in (REPOSITORY / "tests").glob("test_*.py"):
        assert not [function.name for function in functions(path) if "_s_" in function.name], path.name
