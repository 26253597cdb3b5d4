"""What a training script and the repository's other programs each have of their own is the same."""

import argparse
import json
from functools import partial

import diffusers
import pandas
import pytest
from conftest import load_script

from utils import benchmarks, cli, starts


@pytest.fixture
def evaluation():
    return load_script("eval_benchmarks")


def ending(capsys, run):
    """The result of a call, or the exit status and the line with which it ends the run."""
    capsys.readouterr()
    try:
        return run()
    except SystemExit as end:
        return end.code, capsys.readouterr().err


def same(capsys, one, other):
    """What both calls do, which is the same."""
    found = ending(capsys, one)
    assert ending(capsys, other) == found
    return found


@pytest.mark.parametrize("message, line", [
    ("--seed is wrong", "--seed is wrong"), ("two\nlines and\ta  tab", "two lines and a tab"),
    ("a token hf_abcdefGHIJKL1234 in it", "a token hf_... in it"), ("", "")])
def test_exit_with_error(script, capsys, message, line):
    found = same(capsys, lambda: script.exit_with_error(message), lambda: cli.exit_with_error(message))
    assert found == (2, f"error: {line}\n")


@pytest.mark.parametrize("error, remedy, words", [
    (ValueError("no luck\nat all"), "", "no luck at all"), (KeyError(), "try again", "KeyError; try again"),
    (OSError("x" * 400), "give another", "x" * 300 + "; give another"),
    (RuntimeError("hf_abcdefgh"), "", "hf_...")])
def test_exit_on_error(script, capsys, error, remedy, words):
    def raising(exit_on_error):
        with exit_on_error("--flag value", remedy):
            raise error

    found = same(capsys, lambda: raising(script.exit_on_error), lambda: raising(cli.exit_on_error))
    assert found == (2, f"error: --flag value: {words}\n")


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
def test_exit_on_error_leaves_alone_what_ends_the_program(script, ends):
    for exit_on_error in (script.exit_on_error, cli.exit_on_error):
        with pytest.raises(ends), exit_on_error("--flag"):
            raise ends


NUMBERS = ["1", "0", "-1", "007", "1.5", "1e3", "4294967295", "4294967296", "nan", "inf", "-inf", "1e-400",
           "", "one", "0x10"]


@pytest.mark.parametrize("name", ["positive_int", "non_negative_int", "non_negative_float"])
@pytest.mark.parametrize("text", NUMBERS)
def test_number_types(script, name, text):
    def parsed(parse):
        try:
            return parse(text)
        except (ValueError, argparse.ArgumentTypeError) as error:
            return type(error), str(error), parse.__name__

    assert parsed(script.TYPES[name]) == parsed(getattr(cli, name))


def test_number_types_accept_what_they_say():
    def accepts(parse, text):
        try:
            return parse(text) is not None
        except Exception:
            return False

    for parse, accepted in [(cli.positive_int, ["1", "007", "4294967295", "4294967296"]),
                            (cli.non_negative_int, ["1", "0", "007", "4294967295"]),
                            (cli.non_negative_float, ["1", "0", "007", "1.5", "1e3", "4294967295",
                                                      "4294967296", "1e-400"])]:
        assert [text for text in NUMBERS if accepts(parse, text)] == accepted


@pytest.mark.parametrize("given", [["--zzz"], ["word"], ["--seed"], ["--see=1"], ["--seed=one"]])
def test_the_errors_of_a_command_line(script, evaluation, capsys, given):
    found = same(capsys, lambda: script.parse_args(script.FAMILY, given),
                 lambda: evaluation.parse_args(given))
    assert found[0] == 2 and found[1].endswith(" see --help\n") and found[1].count("\n") == 1


@pytest.mark.parametrize("given", [["--text="], ["--text", " "], ["--words", "a", ""]])
def test_an_empty_value_is_refused(capsys, given):
    parser = cli.Parser()
    parser.add_argument("--text")
    parser.add_argument("--words", nargs="+")
    name = given[0].rstrip("=")
    assert ending(capsys, lambda: parser.parse_args(given)) == (
        2, f"error: {name} is empty; was a variable of the shell not set?\n")


def test_the_help_shows_every_default_but_none_and_a_switch():
    parser = cli.Parser()
    for name, default in {"zero": 0, "zero_float": 0.0, "empty": [], "word": "text", "none": None}.items():
        parser.add_argument(f"--{name}", default=default, help=f"The {name}.")
    parser.add_argument("--switch", action="store_true", help="A switch.")
    text = parser.format_help()
    for shown in ("zero. (default: 0)", "zero_float. (default: 0.0)", "empty. (default: [])",
                  "word. (default: text)"):
        assert shown in text
    assert "none. (default" not in text and "switch. (default" not in text


def test_the_name_of_the_network_is_derived_from_the_pipeline(tiny_families):
    names = {"sd15": "unet", "sdxl": "unet", "sd3": "transformer", "pixart": "transformer",
             "flux2_klein": "transformer"}
    for family, name in names.items():
        folder = tiny_families[family]["pipeline"]
        pipeline = cli.load_pipeline(folder)
        assert cli.network_of(pipeline) == (name, getattr(pipeline, name))
        assert cli.network_name(json.loads((folder / "model_index.json").read_text())) == name
    assert not cli.is_denoiser(diffusers.AutoencoderKL) and not cli.is_denoiser(diffusers.ControlNetModel)


def test_an_empty_value_is_refused_alike(script, evaluation, capsys):
    words = "error: --caption_column is empty; was a variable of the shell not set?\n"
    given = ["--prompts_file=a", "--caption_column="]
    assert ending(capsys, lambda: script.parse_args(script.FAMILY, given)) == (2, words)
    assert ending(capsys, lambda: evaluation.parse_args(given)) == (2, words)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_find_network(script, evaluation, tiny):
    for folder in (tiny["pipeline"], tiny["unet"]):
        config, subfolder = script.find_network(script.FAMILY, folder)
        assert (config, subfolder) == starts.find_network(folder, "unet")
        assert config["_class_name"] == "UNet2DConditionModel"
        assert diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder=subfolder)
    for name in (tiny["clip"].parent / "absent", "somebody/absent"):
        errors = []
        for find_network in (partial(script.find_network, script.FAMILY),
                             lambda name: starts.find_network(name, "unet")):
            with pytest.raises(OSError) as error:
                find_network(name)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]


ROWS = ["a cat", "42", " a dog  ", "null", "", 'the word "STOP"', "  ", "naïve café, 日本語", "1.50", "NA",
        "true"]
EXPECTED = ["a cat", "42", "a dog", "null", 'the word "STOP"', "naïve café, 日本語", "1.50", "NA", "true"]


def write_prompts(folder, kind):
    path, text = folder / f"prompts.{kind}", "".join(f"{row}\n" for row in ROWS)
    if kind == "txt":
        path.write_text("\ufeff" + text, encoding="utf-8")
    elif kind == "tsv":
        path.write_text("text\tother\n" + "".join(f"{row}\t{index}\n" for index, row in enumerate(ROWS)))
    elif kind == "csv":
        pandas.DataFrame({"other": range(len(ROWS)), "text": ROWS}).to_csv(path, index=False)
    elif kind == "jsonl":
        values = [*ROWS, None, 7, 2.5, True]
        path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    else:
        pandas.DataFrame({"text": [*ROWS, None]}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_prompts_are_read_alike(script, flags, tmp_path, kind):
    path = write_prompts(tmp_path, kind)
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run", prompts_file=path))
    trained = script.read_prompts(args)
    evaluated = [prompt.text for prompt in benchmarks.load_benchmark("prompts", path)]
    assert trained == evaluated and trained[:len(EXPECTED)] == EXPECTED
    assert len(trained) == len(EXPECTED) + (3 if kind == "jsonl" else 0)


@pytest.mark.parametrize("content", [[["a cat"]], [{"a": "cat"}, "a dog"], [None, ""]])
def test_what_is_no_prompt_is_refused_alike(script, flags, tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in content))
    with pytest.raises(SystemExit):
        script.read_prompts(script.parse_args(script.FAMILY, flags(tmp_path / "run", prompts_file=path)))
    with pytest.raises(ValueError, match="has no prompts|not text"):
        benchmarks.load_benchmark("prompts", path)


def test_a_text_file_has_whatever_column_is_asked_for(script, flags, tmp_path):
    path = write_prompts(tmp_path, "txt")
    args = script.parse_args(
        script.FAMILY, flags(tmp_path / "run", prompts_file=path, caption_column="caption"))
    assert script.read_prompts(args) == [
        prompt.text for prompt in benchmarks.load_benchmark("prompts", path, "caption")] == EXPECTED
