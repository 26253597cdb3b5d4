"""Prompts from every source as text, and randomness as a function of seed, stream, step and sample index."""

import csv
import io
import json

import pandas
import pyarrow.parquet
import pytest
import torch

from utils import benchmarks


# A table of prompts as hand-made ones are: numbers, quotation marks alone, at the start and within.
ODD = ["42", "0", '"', '"Starry night" by Van Gogh', 'a sign that says "open"', "caf\u00e9, night", " a cat "]
READ = [prompt.strip() for prompt in ODD]


def write_txt(path):
    path.write_text("\n\n".join(ODD) + "\n", encoding="utf-8")


def write_txt_of_windows(path):
    path.write_bytes("\r\n".join(ODD).encode("utf-8-sig"))


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(ODD), [99, ""]])


def write_tsv(path):
    rows = ["text\tCategory\tNote", *[f"{prompt}\tAbstract\t1" for prompt in ODD]]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_jsonl(path):
    rows = [{"text": 42}, {"text": 0}, *[{"text": prompt, "id": 7} for prompt in ODD[2:]], {"id": 8},
            {"text": None}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_parquet(path):
    from datasets import Dataset

    Dataset.from_dict({"id": list(range(len(ODD) + 1)), "text": [*ODD, None]}).to_parquet(str(path))


WRITERS = {"a.txt": write_txt, "b.txt": write_txt_of_windows, "c.csv": write_csv, "d.tsv": write_tsv,
           "e.jsonl": write_jsonl, "f.parquet": write_parquet}


@pytest.mark.parametrize("name", WRITERS)
def test_prompts_of_a_file_are_read_as_text(script, flags, tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert load(script, flags, tmp_path, prompts_file=tmp_path / name).prompts == READ


def load(script, flags, tmp_path, **more):
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run", **{"prompts_file": None, **more}))
    return script.Prompts(script.read_prompts(args), args.seed)


@pytest.mark.parametrize("name", ["c.csv", "e.jsonl", "f.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_of_a_dataset_folder(script, flags, tmp_path, name, streaming):
    """The words are those of the files."""
    (tmp_path / "data").mkdir()
    if name == "e.jsonl":
        (tmp_path / "data" / name).write_text("\n".join(json.dumps({"text": prompt}) for prompt in ODD))
    else:
        WRITERS[name](tmp_path / "data" / name)
    prompts = load(script, flags, tmp_path, dataset_name=tmp_path / "data", streaming=streaming)
    assert sorted(prompts.at(position) for position in range(len(READ))) == sorted(READ)


@pytest.fixture(params=["file", "dataset", "stream"])
def given(request, tmp_path):
    """Write a file; returns the flags that name it as a file or as a dataset."""
    def write(name, content):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / name).write_bytes(content)
        return {"prompts_file": tmp_path / "data" / name} if request.param == "file" else {
            "dataset_name": tmp_path / "data", "streaming": request.param == "stream"}
    return write


@pytest.mark.parametrize("name, content", [
    ("a.csv", b"text\na cat, on a mat, oil, 4k\na dog\n"), ("a.csv", b"id,text\n1,a cat, on a mat\n"),
    ("a.csv", b"text\na cat\na dog, in the rain\n"), ("a.jsonl", b'{"text": ["a cat"]}\n'),
    ("a.jsonl", b'{"text": {"a": "cat"}}\n'), ("a.parquet", b"no parquet"), ("a.csv", b"caption\na cat\n")])
def test_what_cannot_be_read_whole_is_refused(script, flags, given, capsys, tmp_path, name, content):
    """Above all rows of more fields than the header, of which pandas would keep the last one alone."""
    flags_given = given(name, content)
    with pytest.raises(SystemExit):
        load(script, flags, tmp_path, **flags_given)
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")][-1]
    assert "--caption_column text of --" in line and "cannot be read" in line


def test_captions_of_bytes_are_text(script, flags, given, tmp_path):
    buffer = io.BytesIO()
    pandas.DataFrame({"text": [b"a cat", "caf\u00e9".encode(), None], "n": [1, 2, 3]}).to_parquet(buffer)
    found = load(script, flags, tmp_path, **given("a.parquet", buffer.getvalue()))
    assert found.prompts == ["a cat", "caf\u00e9"]


@pytest.mark.parametrize("name, content, prompts", [
    ("commas2.csv", None, "line 2 has 4 fields, the header 1"),
    ("later.csv", b"text\na cat\n\na dog, in the rain\n", "line 4 has 2 fields, the header 1"),
    ("narrow.csv", b"id,text\n1,a cat\n2\n", "line 3 has 1 fields, the header 2"),
    ("wide.tsv", b"text\tid\na cat\t1\t2\n", "line 2 has 3 fields, the header 2"),
    ("bom.jsonl", '\ufeff{"text": "a cat"}\n'.encode(), ["a cat"]),
    ("bom.csv", "\ufefftext\na cat\n".encode(), ["a cat"]),
    ("bom.tsv", "\ufefftext\ta\na cat\t1\n".encode(), ["a cat"]),
    ("num.jsonl", b'{"text": 42}\n{"text": null}\n\n{"text": 1.50}\n{"text": true}\n{"text": NaN}\n',
     ["42", "1.50", "true"]),
    ("blank.csv", b"\ntext,id\n\n \n,2\na cat,1\n", ["a cat"]),
    ("twice.csv", b"text,text\na cat,a dog\n", "text is ambiguous"),
    ("quote.csv", b'text\n"a cat\n', "line 2"), ("array.jsonl", b"[1]\n", "line 1 is no object"),
    ("cut.jsonl", b'{"text": "a cat"}\n{"text": "a', "line 2 is not JSON"),
    ("absent.jsonl", b'{"caption": "a cat"}\n', "its columns are caption"),
    ("latin.csv", b"text\ncaf\xe9\n", "line 2 is not UTF-8; convert it"),
    ("utf16.csv", "text\na cat\n".encode("utf-16"), "iconv -f UTF-16"),
    ("utf16.jsonl", '{"text": "a cat"}'.encode("utf-16-le"), "iconv -f UTF-16"),
    ("latin.txt", b"caf\xe9\n", "convert it"), ("utf16.txt", "a cat\n".encode("utf-16"), "convert it"),
    ("old.xlsx", b"", "is none of")])
def test_a_file_is_text_as_it_stands_or_one_line(script, flags, capsys, tmp_path, name, content, prompts):
    """Alike in training and evaluation."""
    path = tmp_path / name
    path.write_bytes(content or b"text\na cat, on a mat, oil, 4k\na dog\n")
    if isinstance(prompts, list):
        assert load(script, flags, tmp_path, prompts_file=path).prompts == prompts
        assert [prompt.text for prompt in benchmarks.load_benchmark("prompts", path)] == prompts
        return
    with pytest.raises(SystemExit):
        load(script, flags, tmp_path, prompts_file=path)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--prompts_file {path}" in line and prompts in line
    with pytest.raises(ValueError, match=prompts):
        benchmarks.load_benchmark("prompts", path)


def test_only_the_caption_column_of_a_parquet_file_is_read(script, flags, tmp_path, monkeypatch):
    pandas.DataFrame({"image": [b"x" * 1000] * 9, "text": ["a cat"] * 9}).to_parquet(tmp_path / "a.parquet")
    asked = []
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", lambda self, *, columns, _=(
        pyarrow.parquet.ParquetFile.iter_batches): asked.append(columns) or _(self, columns=columns))
    assert load(script, flags, tmp_path, prompts_file=tmp_path / "a.parquet").prompts == ["a cat"] * 9
    assert asked == [["text"]]


@pytest.mark.parametrize("source", ["file", "dataset", "stream"])
def test_only_the_first_prompts_are_used_where_asked(script, flags, tmp_path, source):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"prompt {index}"}) for index in range(9)))
    given = {"prompts_file": path} if source == "file" else {
        "dataset_name": tmp_path / "data", "streaming": source == "stream"}
    prompts = load(script, flags, tmp_path, max_train_samples=3, **given)
    assert {prompts.at(position) for position in range(12)} == {"prompt 0", "prompt 1", "prompt 2"}


def test_each_epoch_has_every_prompt_once_in_another_order(script):
    names = [f"prompt {index}" for index in range(50)]
    prompts = script.Prompts(names, seed=3)
    epochs = [[prompts.at(50 * epoch + row) for row in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(names) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [script.Prompts(names, seed=4).at(row) for row in range(50)] != epochs[0]


def test_a_prompt_is_a_function_of_its_position(script):
    names = [f"prompt {index}" for index in range(7)]
    in_order = script.Prompts(names, seed=0)
    expected = [in_order.at(position) for position in range(40)]
    jumping = script.Prompts(names, seed=0)
    for position in (39, 3, 20, 3, 0, 39):
        assert jumping.at(position) == expected[position]


# ------------------------------------------------------------------------------------------- randomness


def sample(script, name="generator", step=0, indices=range(8), seed=5, **timesteps):
    return script.sample_noise(seed, name, step, indices, (4, 2, 2), script.Method(**timesteps),
                               script.VariancePreserving(None, "epsilon"), "cpu")


def test_a_sample_does_not_depend_on_its_batch(script):
    whole = sample(script)
    halves = zip(sample(script, indices=range(4)), sample(script, indices=range(4, 8)))
    for one, parts in zip(whole, halves):
        assert torch.equal(one, torch.cat(parts))


@pytest.mark.parametrize("change", [
    {"seed": 6}, {"name": "assistant-0"}, {"step": 1}, {"indices": range(8, 16)}])
def test_seed_stream_step_and_index_each_change_every_sample(script, change):
    for one, other in zip(sample(script), sample(script, **change)):
        assert (one != other).flatten(1).any(1).all() if one.dim() > 1 else (one != other).any()


def test_noise_is_standard_normal_and_independent_of_the_generator_input(script):
    z, noise, _ = sample(script, indices=range(2000))
    for values in (z, noise):
        assert values.mean().abs() < 0.03
        assert (values.std() - 1).abs() < 0.03
    assert torch.corrcoef(torch.stack([z.flatten(), noise.flatten()]))[0, 1].abs() < 0.03


def test_times_are_uniform_with_both_ends(script):
    _, _, timesteps = sample(script, indices=range(2000), min_timestep=3, max_timestep=6)
    assert timesteps.unique().tolist() == [3, 4, 5, 6]
    assert all(abs(count - 500) < 100 for count in timesteps.bincount()[3:].tolist())
