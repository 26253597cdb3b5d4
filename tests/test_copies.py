"""The two scripts share whole functions and classes, and a program keeps them equal."""

import ast
import subprocess
import sys

import pytest
from conftest import REPOSITORY


sys.path.insert(0, str(REPOSITORY / "utils"))
import check_copies  # noqa: E402


SOURCE = """
def shared(x):
    return x + 1


@decorated
class Shared:
    value = 1


def different():
    return 1
"""
MARK = "# Copied from source.py\n"
COPY = SOURCE.replace("def shared", MARK + "def shared").replace("@decorated", MARK + "@decorated").replace(
    "return 1", "return 2")


@pytest.fixture
def compare(tmp_path):
    def run(copy):
        (tmp_path / "source.py").write_text(SOURCE)
        (tmp_path / "copy.py").write_text(copy)
        return check_copies.check(tmp_path / "copy.py", tmp_path)
    return run


def test_the_repository_s_copies_are_equal():
    result = subprocess.run([sys.executable, REPOSITORY / "utils" / "check_copies.py"], capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    assert "train_diff_instruct_star_sdxl.py" in result.stdout


def test_the_training_scripts_differ_only_where_the_models_do():
    repaired, wrong, copies, differing = check_copies.check(
        REPOSITORY / "train_diff_instruct_star_sdxl.py", REPOSITORY)
    source = check_copies.definitions((REPOSITORY / "train_diff_instruct_star_sd15.py").read_text())
    assert sorted(differing) == ["encode_prompts", "load_pipeline"]
    assert copies.keys() | set(differing) == source.keys() and not wrong


def test_the_training_scripts_constants_differ_only_where_the_models_do():
    """What is assigned outside functions carries no mark."""
    trees = [ast.parse((REPOSITORY / f"train_diff_instruct_star_{model}.py").read_text()).body
             for model in ("sd15", "sdxl")]
    one, other = [{ast.unparse(node.targets[0]): ast.unparse(node.value) for node in tree
                   if isinstance(node, ast.Assign)} for tree in trees]
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == {
        "DEFAULTS", "RECIPES", "(FAMILY, ADDITION_EMBED_TYPE)"}
    recipes, others = ast.literal_eval(one["RECIPES"]), ast.literal_eval(other["RECIPES"])
    assert {name for name in recipes | others if recipes[name] != others[name]} == {"di_star_dpo"}


def test_equal_copies_pass(compare):
    assert compare(COPY) == (COPY, [], {"shared": "source.py", "Shared": "source.py"}, ["different"])


@pytest.mark.parametrize("changed, name", [
    (COPY.replace("x + 1", "x + 2"), "shared"), (COPY.replace("value = 1", "value = 1  # one"), "Shared"),
    (COPY.replace("@decorated\n", ""), "Shared"), (COPY.replace(MARK + "def", "def"), "shared"),
    (COPY.replace("return x + 1", "return x + 1\n    # trailing\n    y = 2"), "shared")])
def test_a_copy_that_differs_is_named_and_repaired(compare, changed, name):
    repaired, wrong, _, _ = compare(changed)
    assert len(wrong) == 1 and f"copy.py: {name} " in wrong[0]
    assert repaired == COPY


def test_a_copy_without_a_source_is_named(compare):
    _, (line,), _, _ = compare(COPY.replace("source.py", "absent.py"))
    assert "absent.py does not exist" in line
    _, (line,), _, _ = compare(COPY + f"\n\n{MARK}def absent():\n    pass\n")
    assert "absent is not in source.py" in line


@pytest.mark.parametrize("slip", ["# copied from source.py", "# Copied from source.py.",
                                  "#Copied from source.py", "# Copied from: source.py"])
def test_a_mark_with_a_slip_is_named(compare, slip):
    _, (line,), _, _ = compare(COPY + f"\n\n{slip}\ndef more():\n    pass\n")
    assert "nearly a mark" in line


def test_fixing_fails_where_it_cannot_help(tmp_path, monkeypatch, capsys):
    (tmp_path / "source.py").write_text(SOURCE)
    gone = f"\n\n{MARK}def gone():\n    pass\n"
    (tmp_path / "copy.py").write_text(COPY.replace("value = 1", "value = 3") + gone)
    monkeypatch.setattr(check_copies, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["check_copies.py", "--fix"])
    with pytest.raises(SystemExit):
        check_copies.main()
    assert "value = 1" in (tmp_path / "copy.py").read_text()
    assert "gone is not in source.py" in capsys.readouterr().err
