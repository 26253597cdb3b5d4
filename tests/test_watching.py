"""What a run says and draws while it goes: the lines of its log, its pictures, its card."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import REPOSITORY, metrics, validation_images
from PIL import Image


WATCHED = {"validation_prompts": ["a cat", "a big dog"], "num_validation_images": 2, "validation_steps": 1,
           "max_train_steps": 3, "checkpointing_steps": 2}
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) (?:\[RANK 0\] )?(.*)")


@pytest.fixture
def said(train, tmp_path, capfd):
    """The lines that a run logs, without their dates and in order; nothing else may be on standard error."""
    def run(**more):
        capfd.readouterr()
        train(tmp_path / "run", **more)
        lines = [LINE.fullmatch(line) for line in capfd.readouterr().err.splitlines()]
        assert all(lines), "without a terminal there are whole dated lines alone"
        return [line[2] for line in lines]
    return run


def test_the_start_says_what_the_run_does(said, tmp_path):
    lines = said(max_train_steps=1, train_batch_size=3, gradient_accumulation_steps=2, assistant_updates=5,
                 recipe="diff_instruct_pp", reward="pickscore=7", checkpointing_steps=1)
    start = [line for line in lines if not line.startswith("--generator_init")]  # a random start has warnings
    for line, words in zip(start[:5], [
            ["Stable Diffusion 1.5 on 1 x cpu, precision no; trains 0.0648 million weights of the"],
            ["recipe diff_instruct_pp: kl divergence, guidance 7.5 (in), reward 7 x pickscore"],
            ["the generator starts from", "timesteps 999, at 16 pixels"],
            ["13 prompts; 1 updates of the generator, each after 5 of the assistant, of 6 samples"],
            [f"every 1 steps in {tmp_path / 'run'}; after SIGTERM"]], strict=True):
        assert all(part in line for part in words), line


def test_the_log_tells_the_run(said, train, tmp_path):
    lines = said(**WATCHED)
    held = metrics(tmp_path / "run")
    validations = [line for line in lines if "validation_reward " in line]
    assert [line.split(":")[0] for line in validations] == [f"step {step} of 3" for step in (0, 1, 2, 3)]
    for name in ("validation_reward", "validation_diversity_over_noise"):
        assert f"{name} {held[0][name]:.3g}" in validations[0]
    assert [line for line in lines if line.startswith("saved")] == [
        f"saved {tmp_path / 'run' / name}" for name in ("checkpoint-2", "checkpoint-3")]
    first, *_, last = [line for line in lines if "grad_reward" in line]
    assert re.search(r"step 1 of 3: .*seconds_per_step \S+; 0:00:\d\d left", first) and "left" not in last
    assert lines[-1].startswith(f"the result is in {tmp_path / 'run'}")
    again = said(**WATCHED | {"max_train_steps": 4}, resume_from_checkpoint="latest")
    assert f"resumed from {tmp_path / 'run' / 'checkpoint-3'}" in again


def test_log_level_leaves_out_what_matters_less(said):
    assert said(max_train_steps=1, log_level="warning", generator_init="reference") == []


def test_a_grid_has_captions_above_its_images(train, tmp_path):
    """The images stand apart on white; two prompts of one length have other letters above equal images."""
    run = train(tmp_path / "run", **WATCHED)
    rows = json.loads((run / "validation" / "step-000003.json").read_text())
    with Image.open(run / "validation" / "step-000003.png") as grid:
        pixels = numpy.asarray(grid)
    boxes = [row["box"] for row in rows]
    assert boxes[0][0] < boxes[0][2] < boxes[1][0] and boxes[0][3] < boxes[2][1]
    assert len({tuple(box) for box in boxes}) == 4 and (pixels[:, :boxes[0][0]] == 255).all()
    bands = [pixels[top - 20:top, left:right].mean(2) for left, top, right, _ in boxes]
    assert all((band < 128).sum() > 20 for band in bands), "there are letters"
    assert (bands[0] == bands[1]).all() and (bands[0] != bands[2]).any()


@pytest.mark.slow
def test_the_strip_shows_the_first_and_the_last_validation(train, tmp_path, curves):
    """It is renewed at each validation and when a run resumes; its images are those of the grids."""
    run, shapes = tmp_path / "run", []
    for steps in (2, 3):
        train(run, **WATCHED | {"max_train_steps": steps}, resume_from_checkpoint="latest")
        strip = numpy.asarray(Image.open(run / "before_after.png")).astype(int)
        shapes.append(strip.shape)
        for step in (0, steps):
            first = validation_images(run, step)[0].repeat(8, 0).repeat(8, 1).astype(int)
            height, width, _ = first.shape
            places = [(top, left) for top in range(strip.shape[0] - height + 1) for left in range(12)
                      if abs(strip[top:top + height, left:left + width] - first).max() <= 1]
            assert len(places) == 1, "it is there once"
    assert shapes[0] == shapes[1]
    assert (run / "curves.png").exists()


def test_the_strip_begins_with_the_first_validation_of_its_prompts(train, tmp_path):
    """Other prompts from step 2 on: there is no image of theirs before."""
    run = train(tmp_path / "run", **WATCHED | {"max_train_steps": 1})
    train(run, **WATCHED | {"max_train_steps": 3, "validation_prompts": ["a house"]},
          resume_from_checkpoint="latest")
    with Image.open(run / "before_after.png") as strip:
        assert strip.width < 200, "one column"
    assert "| | step 2 | step 3 |" in (run / "README.md").read_text()


def test_a_picture_that_cannot_be_drawn_ends_no_run(train, tmp_path, capfd):
    run = train(tmp_path / "run", **WATCHED | {"max_train_steps": 2})
    (run / "validation" / "step-000000.json").write_text("half a li")
    train(run, **WATCHED, resume_from_checkpoint="latest")
    error = capfd.readouterr().err
    assert "WARNING" in error and "before_after.png or curves.png could not be redrawn" in error
    assert (run / "checkpoint-3").exists()


def test_a_grid_of_very_many_images_shows_the_first(script, train, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROWS", 2)
    prompts = [f"prompt {number}" for number in range(7)]
    run = train(tmp_path / "run", validation_prompts=prompts, num_validation_images=1, max_train_steps=1)
    rows = json.loads((run / "validation" / "step-000001.json").read_text())
    assert [row["prompt"] for row in rows] == prompts and all("reward" in row for row in rows)
    assert [bool(row["box"]) for row in rows] == [True] * 4 + [False] * 3


def test_validation_prompts_come_from_a_file_too(script, flags, train, tmp_path, capsys):
    (tmp_path / "some.txt").write_text("\ufeffa cat\n\n a big dog \n")
    train(tmp_path / "run", validation_prompts_file=tmp_path / "some.txt", num_validation_images=1,
          max_train_steps=1, min_diversity=0.01)
    rows = json.loads((tmp_path / "run" / "validation" / "step-000001.json").read_text())
    assert [row["prompt"] for row in rows] == ["a cat", "a big dog"]
    (tmp_path / "empty.txt").write_text("\n")
    for more, words in (({"validation_prompts": ["a"], "validation_prompts_file": tmp_path / "some.txt"},
                         "by one of --validation_prompts and --validation_prompts_file"),
                        ({"validation_prompts_file": tmp_path / "empty.txt"}, "empty.txt has no prompts"),
                        ({"validation_prompts_file": tmp_path / "none.txt"}, "none.txt")):
        with pytest.raises(SystemExit):
            script.parse_args(script.FAMILY, flags(tmp_path / "other", **more))
        assert words in capsys.readouterr().err


def test_the_short_card_shows_the_validation(train, tmp_path):
    run = train(tmp_path / "run", **WATCHED)
    card, held = (run / "README.md").read_text(), metrics(run)
    first, last = held[0]["validation_reward"], held[-1]["validation_reward"]
    assert "![before and after](before_after.png)" in card and "| | step 0 | step 3 |" in card
    assert f"| validation reward | {first:.4g} | {last:.4g} |" in card
    assert "no images, on 1 x cpu." in card.replace("\n", " ")


@pytest.mark.parametrize("name, words", [
    ("swanlab", "--report_to swanlab is not installed: pip install swanlab"),
    ("tensorbord", "--report_to tensorbord is no tracker; choose from none, all")])
def test_a_tracker_that_is_not_installed_says_what_to_install(train, tmp_path, capsys, name, words):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", report_to=name)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_result_loads_without_noise(train, tmp_path):
    """The exported scheduler has no setting that its class does not know."""
    run = train(tmp_path / "run", max_train_steps=1)
    code = f"from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained({str(run)!r})"
    loaded = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True,
                            text=True, cwd=REPOSITORY)
    assert loaded.returncode == 0 and "variance_type" not in loaded.stderr
    assert "expected" not in loaded.stderr and "ignored" not in loaded.stderr


def test_a_mac_is_told_that_mps_may_lack_a_gradient(script, flags, tmp_path, monkeypatch):
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run"))
    for device, expected in (("mps", 1), ("cpu", 0)):
        lines = []
        monkeypatch.setattr(script, "logger", SimpleNamespace(warning=lines.append))
        monkeypatch.setattr(script, "Accelerator", lambda device=device, **_: SimpleNamespace(
            device=torch.device(device), num_processes=1, mixed_precision="no",
            distributed_type=SimpleNamespace(value="NO")))
        script.open_accelerator(args)
        assert len(lines) == expected and all("ACCELERATE_USE_CPU=true" in line for line in lines)
