"""The training prompts that examples/prepare_prompts.py makes."""

import collections
import importlib
import os
import pickle
import subprocess
import sys

import pandas
import pytest
from conftest import REPOSITORY
from hub import Hub


sys.path.insert(0, str(REPOSITORY / "examples"))
prepare_prompts = importlib.import_module("prepare_prompts")


@pytest.fixture
def captions(tmp_path):
    """Write a dataset of {caption: score}; returns its folder."""
    def write(rows):
        folder = tmp_path / "captions"
        folder.mkdir()
        pandas.DataFrame({"text": list(rows), "score": list(rows.values())}).to_parquet(folder / "a.parquet")
        return folder
    return write


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Run the script; returns the prompts written, or its one line of error."""
    def run(capsys, *flags, output_file=tmp_path / "prompts.parquet"):
        monkeypatch.setattr(sys, "argv", ["prepare_prompts.py", f"--output_file={output_file}", *flags])
        try:
            prepare_prompts.main()
        except SystemExit as ending:
            assert ending.code == 2
            return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return list(pandas.read_parquet(output_file)["text"])
    return run


def test_prompts_are_cleaned_filtered_and_each_taken_once(captions, prepare, capsys):
    folder = captions({
        "A red fox &amp; its   cubs\nplay": 7, "a red fox, & its cubs play!": 7, "Two words": 7,
        "42 7 / 12 # 9": 7, " ".join(["word"] * 61): 7, "Buy it at www.shop.com today": 7,
        "IMG 0001.JPG of a dog": 7,
        "Un café à Nîmes": 7, "": 7, None: 7, "“Quoted” words, as they stand": 7})
    assert prepare(capsys, f"--dataset_name={folder}") == [
        "A red fox & its cubs play", "Un café à Nîmes", "“Quoted” words, as they stand"]


def test_only_scores_above_the_smallest_are_kept(captions, prepare, capsys):
    folder = captions({"a cat on grass": 6.25, "a dog on grass": 6.2500001, "a cow on grass": float("nan"),
                       "a hen on grass": 6.9})
    assert prepare(capsys, f"--dataset_name={folder}", "--score_column=score", "--min_score=6.25") == [
        "a dog on grass", "a hen on grass"]


def test_the_number_of_prompts_can_be_limited(captions, prepare, capsys):
    folder = captions({f"image number {number} of many": 7 for number in range(9)})
    assert len(prepare(capsys, f"--dataset_name={folder}", "--max_samples=4")) == 4


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"text": "a cat on grass"}\n{"text": null}\n', None),
    ("a.tsv", b"text\tn\na cat on grass\t1\n", None),
    ("a.csv", b"\xef\xbb\xbftext\na cat on grass\n", None), ("a.txt", b"a cat on grass\n", None),
    ("a.json", b'[{"text": "a cat on grass"}]', None), ("a.parquet", None, None),
    ("a.csv", b"text\na cat on grass, at night, 4k\n", "line 2 has 3 fields, the header 1"),
    ("a.csv", b"caption\na cat on grass\n", "its columns are caption"),
    ("captions", b"a cat on grass", "is none of"),
    ("a.html", b"a cat on grass", "is none of"), ("a.txt", b"caf\xe9 on the grass\n", "is not UTF-8")])
def test_a_local_file_is_read_by_its_suffix_or_refused(prepare, capsys, tmp_path, name, content, words):
    if content is None:
        pandas.DataFrame({"text": [b"a cat on grass"], "image": [b"x"]}).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    found = prepare(capsys, f"--dataset_file={tmp_path / name}")
    if words is None:
        assert found == ["a cat on grass"]
    else:
        assert f"--dataset_file {tmp_path / name} c" in found[0] and words in found[0]
        assert "hub" not in found[0] and "docs/recipes.md" not in found[0]


def test_scores_of_a_file_are_numbers(prepare, capsys, tmp_path):
    (tmp_path / "a.csv").write_text("text,score\na cat on grass,9\na dog on grass,10.5\na cow on grass,\n")
    flags = [f"--dataset_file={tmp_path / 'a.csv'}", "--score_column=score", "--min_score=9.5"]
    assert prepare(capsys, *flags) == ["a dog on grass"]


def test_an_output_that_cannot_be_written_is_one_line(captions, prepare, capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")
    monkeypatch.setattr(prepare_prompts.Dataset, "to_parquet", full)
    (line,) = prepare(capsys, f"--dataset_name={captions({'a cat on grass': 7})}")
    assert "--output_file" in line and line.endswith("disk full")
    assert not [*tmp_path.glob("prompts.*")]


class Planted:
    def __reduce__(self):
        return os.system, ("touch planted",)


def test_a_pickled_list_is_read_as_dmd2_published_it(prepare, capsys, tmp_path):
    (tmp_path / "captions.pkl").write_bytes(pickle.dumps(["A red fox &amp; its cubs", "Two words", None]))
    assert prepare(capsys, f"--dataset_file={tmp_path / 'captions.pkl'}") == ["A red fox & its cubs"]


@pytest.mark.parametrize("content", [Planted(), ["a cat on grass", Planted()], collections.Counter(["a"])],
                         ids=["alone", "in a list", "a class"])
def test_a_pickle_that_names_code_is_refused(prepare, capsys, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.pkl").write_bytes(pickle.dumps(content))
    (line,) = prepare(capsys, "--dataset_file=captions.pkl")
    assert "--dataset_file captions.pkl" in line and "only a list of text is read" in line
    assert not (tmp_path / "planted").exists() and not (tmp_path / "prompts.parquet").exists()


def test_the_default_is_fetched_from_the_hub_or_missed_in_one_line(tmp_path):
    with Hub() as hub:
        def run(folder):
            return subprocess.run([sys.executable, prepare_prompts.__file__], cwd=tmp_path, text=True,
                                  env=hub.environment(tmp_path / folder), capture_output=True)
        gone = run("empty")
        (line,) = [line for line in gone.stderr.splitlines() if line.startswith("error: ")]
        assert gone.returncode == 2
        assert line.endswith("if it no longer exists, docs/recipes.md lists other prompts")
        file = prepare_prompts.DMD2_CAPTIONS.removeprefix("tianweiy/DMD2/")
        hub.revisions["tianweiy/DMD2"] = {40 * "a": {file: pickle.dumps(["a red fox at play"])}}
        ran = run("home")
    assert ran.returncode == 0, ran.stderr
    assert list(pandas.read_parquet(tmp_path / "prompts.parquet")["text"]) == ["a red fox at play"]


@pytest.mark.parametrize("flags, named", [
    (["--caption_column=caption"], "--caption_column"), (["--score_column=score"], "--min_score"),
    (["--score_column=stars", "--min_score=1"], "--score_column"),
    (["--dataset_split=test"], "--dataset_name"),
    (["--min_words=9", "--max_words=8"], "--min_words"), (["--max_samples=0"], "--max_samples"),
    (["--dataset_name=/absent/folder"], "--dataset_name"), (["--max_words=3"], "--dataset_name"),
    (["--output_file=prompts.txt"], "--output_file"), (["--output_file=/absent/p.parquet"], "--output_file"),
])
def test_prompts_cannot_be_made_of_bad_input(captions, prepare, capsys, tmp_path, flags, named):
    folder = captions({"a cat on grass": 6.25})
    (line,) = prepare(capsys, f"--dataset_name={folder}", *flags)
    assert named in line and not (tmp_path / "prompts.parquet").exists()


def test_a_file_that_exists_is_not_overwritten(captions, prepare, capsys, tmp_path):
    (tmp_path / "prompts.parquet").write_text("mine")
    (line,) = prepare(capsys, f"--dataset_name={captions({'a cat on grass': 7})}")
    assert "--output_file" in line and (tmp_path / "prompts.parquet").read_text() == "mine"


def test_the_training_script_reads_the_prompts(script, flags, captions, prepare, capsys, tmp_path):
    prepare(capsys, f"--dataset_name={captions({'a cat on grass': 7, 'a dog on grass': 7})}")
    given = flags(tmp_path / "run", prompts_file=tmp_path / "prompts.parquet")
    args = script.parse_args(script.FAMILY, given)
    assert script.read_prompts(args) == ["a cat on grass", "a dog on grass"]
