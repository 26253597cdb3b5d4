"""Bad input ends the run with one line that names the flag, before a model loads or a file is written."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import write_state


@pytest.fixture
def refusal(script, flags, tmp_path, monkeypatch, capfd):
    """Start a run that must be refused; returns the line on standard error."""
    def run(output_dir=None, **more):
        def load_models(*_):
            raise AssertionError("models were loaded")

        monkeypatch.setattr(script, "load_models", load_models)
        output_dir = output_dir or tmp_path / "run"
        before = sorted(output_dir.rglob("*")) if output_dir.exists() else None
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(output_dir, **more)))
        assert ending.value.code == 2
        assert (sorted(output_dir.rglob("*")) if output_dir.exists() else None) == before
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]
    return run


def test_recipes_are_the_rows_of_the_method(script):
    assert script.RECIPES == {
        "diff_instruct": ("kl", 0, 7.5, "in"), "diff_instruct_pp": ("kl", 100, 7.5, "in"),
        "sim": ("score", 0, 7.5, "in"), "di_star_out": ("score", 100, 7.5, "out"),
        "di_star_in": ("score", 100, 7.5, "in"), "di_star_in_reward_1": ("score", 1, 7.5, "in"),
        "di_star_in_reward_10": ("score", 10, 7.5, "in"), "di_star_in_cfg_4.5": ("score", 100, 4.5, "in"),
        "score_only": ("score", 0, 0, "in"), "kl_only": ("kl", 0, 0, "in")}
    dpo = ("score", 100, 7.5, "in", "mhdang/dpo-sd1.5-text2image-v1")
    assert script.known_recipes(script.FAMILY) == script.RECIPES | {"di_star_dpo": dpo}


def test_the_default_recipe_is_the_best_of_the_paper_with_the_exact_gradient(script, flags, tmp_path):
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run"))
    assert (args.divergence, args.reward_scale, args.cfg_scale, args.cfg_mode) == ("score", 100, 7.5, "in")
    assert args.score_gradient == "full"


def test_a_recipe_sets_what_is_not_given(script, flags, tmp_path):
    given = flags(tmp_path / "run", recipe="diff_instruct_pp", cfg_scale=0, cfg_mode="out")
    args = script.parse_args(script.FAMILY, given)
    assert (args.divergence, args.reward_scale, args.cfg_scale, args.cfg_mode) == ("kl", 100, 0, "out")
    for more, reference in (({}, script.FAMILY.dpo_unet), ({"reference_unet": "another"}, "another")):
        args = script.parse_args(script.FAMILY, flags(tmp_path / "run", recipe="di_star_dpo", **more))
        assert args.reference_unet == reference


@pytest.mark.parametrize("sign", [
    "args.json", "metrics.jsonl", "model_index.json", "README.md", "checkpoint-5/state.json"])
@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_folder_with_something_else_is_refused(refusal, tmp_path, sign, resume):
    path = tmp_path / "run" / sign
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    if sign != "args.json":  # a run that ended before its first checkpoint
        assert "--output_dir" in refusal(resume_from_checkpoint=resume)
    assert path.read_text() == "{}"


@pytest.mark.parametrize("names, usable", [
    (["slurm-12.out", "train.log", "x.err", ".gitignore", ".cache/a"], True),
    (["args.json", "metrics.jsonl", "validation/step-000000.png", "logs/a"], True),
    (["notes.md"], False), (["train.log.gz"], False), (["args.json", "model_index.json"], False),
    (["args.json", "checkpoint-5/state.json"], False)])
def test_a_folder_without_a_result_may_be_used(script, flags, refusal, tmp_path, names, usable):
    for name in names:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("{}")
    if usable:
        assert script.parse_args(script.FAMILY, flags(tmp_path / "run")).resume_from_checkpoint is None
    else:
        assert "--output_dir" in refusal()


def test_a_bare_checkpoint_name_is_looked_up_in_the_output_folder(script, flags, tmp_path):
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoint-1"
    write_state(script, folder, args)
    (tmp_path / "run" / "args.json").write_text("{}")
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run", resume_from_checkpoint="checkpoint-1"))
    assert args.resume_from_checkpoint == str(folder)


def test_an_output_dir_that_is_a_file_is_refused(script, flags, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    with pytest.raises(SystemExit):
        script.parse_args(script.FAMILY, flags(tmp_path / "run"))
    assert "--output_dir" in capsys.readouterr().err


class TestResuming:
    @pytest.fixture
    def checkpoint(self, script, flags, tmp_path):
        """A checkpoint's record of step 1 of a run of two steps; returns its run's folder."""
        args = script.parse_args(script.FAMILY, flags(tmp_path / "run"))
        folder = tmp_path / "run" / "checkpoint-1"
        write_state(script, folder, args)
        (tmp_path / "run" / "args.json").write_text("{}")
        return tmp_path / "run"

    def test_a_folder_that_is_no_checkpoint_is_refused(self, refusal, tmp_path):
        assert "--resume_from_checkpoint" in refusal(resume_from_checkpoint=tmp_path)

    @pytest.mark.parametrize("changed", [
        {"seed": 1}, {"recipe": "sim"}, {"sharding": "fsdp"}, {"use_ema": True}, {"cfg_scale": 3.0}])
    def test_a_changed_flag_is_refused(self, refusal, checkpoint, changed):
        line = refusal(checkpoint, resume_from_checkpoint="latest", **changed)
        assert line.startswith(f"error: --{next(iter(changed))} is ")

    def test_another_total_batch_size_is_refused(self, script, flags, refusal, checkpoint, monkeypatch):
        for more in ({"train_batch_size": 2}, {"gradient_accumulation_steps": 2}):
            line = refusal(checkpoint, resume_from_checkpoint="latest", **more)
            assert "--train_batch_size x gradient_accumulation_steps x processes is" in line
        latest = {"resume_from_checkpoint": "latest", "train_batch_size": 2}
        script.parse_args(script.FAMILY, flags(checkpoint, **latest, gradient_accumulation_steps=2))
        monkeypatch.setenv("WORLD_SIZE", "2")
        script.parse_args(script.FAMILY, flags(checkpoint, **latest))
        assert "--train_batch_size" in refusal(checkpoint, resume_from_checkpoint="latest")

    @pytest.mark.parametrize("content", [None, "x"])
    def test_a_file_that_is_missing_or_cut_short_is_named(self, refusal, checkpoint, content):
        path = checkpoint / "checkpoint-1" / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {"shard-1.safetensors": 2}}))
        if content:
            (path.parent / "shard-1.safetensors").write_text(content)
        line = refusal(checkpoint, resume_from_checkpoint="latest")
        assert "--resume_from_checkpoint" in line and "shard-1.safetensors" in line

    def test_a_run_that_is_further_already_is_refused(self, refusal, checkpoint):
        path = checkpoint / "checkpoint-1" / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 2}))
        assert "--max_train_steps" in refusal(checkpoint, resume_from_checkpoint="latest", max_train_steps=1)

    def test_latest_is_the_newest_finished_checkpoint(self, script, flags, checkpoint):
        state = (checkpoint / "checkpoint-1" / "state.json").read_text()
        for name in ("checkpoint-9", "checkpoint-10"):
            (checkpoint / name).mkdir()
            (checkpoint / name / "state.json").write_text(state)
        (checkpoint / "checkpoint-11").mkdir()
        args = script.parse_args(script.FAMILY, flags(checkpoint, resume_from_checkpoint="latest"))
        assert args.resume_from_checkpoint == str(checkpoint / "checkpoint-10")

    def test_latest_without_a_checkpoint_starts_at_the_beginning(self, script, flags, tmp_path):
        args = script.parse_args(script.FAMILY, flags(tmp_path / "run", resume_from_checkpoint="latest"))
        assert args.resume_from_checkpoint is None

    @pytest.mark.parametrize("changed", [
        {"max_train_steps": 9}, {"logging_steps": 3}, {"report_to": "wandb"}])
    def test_how_long_and_how_it_is_watched_may_change(self, script, flags, checkpoint, changed):
        args = script.parse_args(script.FAMILY, flags(checkpoint, resume_from_checkpoint="latest", **changed))
        assert args.resume_from_checkpoint == str(checkpoint / "checkpoint-1")


def test_the_hub_token_is_never_saved(script, flags, tmp_path):
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run", push_to_hub=True, hub_token="hf_secret"))
    assert args.hub_token == "hf_secret"
    assert "hf_secret" not in json.dumps(script.saved_args(args))


def test_help_answers_within_three_seconds(script):
    start = time.perf_counter()
    command = [sys.executable, script.__file__, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 3.0
    assert "--score_gradient" in result.stdout
    assert os.path.basename(script.__file__) in result.stdout
