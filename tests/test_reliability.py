"""What a run survives: kills, signals, a full disk, damaged files, bad numbers, bad rewards."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same, metrics, validation_images
from safetensors.torch import load_file


def refused(train, capsys, *given, **more):
    """The one line of a run that ends with status 2."""
    with pytest.raises(SystemExit) as ending:
        train(*given, **more)
    assert ending.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def state(folder):
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")} | {
        "trainer": torch.load(folder / "trainer.pt", weights_only=True)}


@pytest.mark.slow
@pytest.mark.parametrize("family, variant", [("sd15", "lora"), ("sdxl", "full")])
def test_short_stress(family, variant):
    """`make stress` in short."""
    result = subprocess.run([sys.executable, Path(__file__).with_name("stress.py"), "--kills=4",
                             f"--families={family}", f"--variants={variant}"], capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{family} {variant}: killed 4 times" in result.stdout


# ---------------------------------------------------------------------------------------- not finite


def test_an_update_that_is_not_finite_is_skipped_counted_and_logged(train, own_reward, tmp_path, capsys):
    """The second of three: the generator and its Adam stay, the assistant goes on, the run too."""
    reward = own_reward("return images.mean((1, 2, 3)) / (0 if len(calls) == 2 else 1)")
    out = train(tmp_path / "run", reward=f"{reward}=2", max_train_steps=3, checkpointing_steps=1)
    first, second, third = (state(out / f"checkpoint-{step}") for step in (1, 2, 3))
    assert_same(first["generator.safetensors"], second["generator.safetensors"])
    assert_same(first["trainer"]["optimizers"]["generator"]["state"],
                second["trainer"]["optimizers"]["generator"]["state"])
    for one, other in ((first, second), (second, third)):
        moved = [key for key, value in one["assistant.safetensors"].items()
                 if not torch.equal(value, other["assistant.safetensors"][key])]
        assert moved
    assert any(not torch.equal(value, third["generator.safetensors"][key])
               for key, value in second["generator.safetensors"].items())
    assert [line["skipped_generator"] for line in metrics(out)] == [0, 1, 1]
    assert [line["skipped_assistant"] for line in metrics(out)] == [0, 0, 0]
    assert "reward" not in metrics(out)[1] and "loss_assistant" in metrics(out)[1]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert "step 2" in line and f"reward_{reward}" in line and "grad_norm_generator" in line


def test_after_too_many_in_a_row_the_run_is_saved_and_ends(script, train, own_reward, tmp_path, capsys,
                                                           monkeypatch):
    assert script.MAX_SKIPPED == 10
    monkeypatch.setattr(script, "MAX_SKIPPED", 2)
    reward = own_reward("return images.mean((1, 2, 3)) * (1 if len(calls) in (1, 3) else float('nan'))")
    line = refused(train, capsys, tmp_path / "run", reward=f"{reward}=2", max_train_steps=9)
    assert "2 updates of the generator in a row" in line and "--resume_from_checkpoint latest" in line
    assert (tmp_path / "run" / "checkpoint-5" / "state.json").exists()
    assert metrics(tmp_path / "run")[-1]["skipped_generator"] == 3
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_a_reward_that_raises_is_named_with_its_prompts_above_its_own_traceback(train, own_reward, tmp_path):
    reward = own_reward("if len(calls) == 2:\n    raise KeyError('no such thing')\n"
                        "return images.mean((1, 2, 3))")
    with pytest.raises(RuntimeError, match=f"--reward {reward} failed with the prompts .'prompt") as raised:
        train(tmp_path / "run", reward=f"{reward}=2")
    assert isinstance(raised.value.__cause__, KeyError)


# ------------------------------------------------------------------------------------------ validation


WATCHED = {"validation_prompts": ["a cat", "a dog"], "num_validation_images": 3, "validation_steps": 2}


def test_a_validation_logs_reward_and_diversity_of_its_images(train, tmp_path):
    out = train(tmp_path / "run", **WATCHED)
    lines = [line for line in metrics(out) if "validation_reward" in line]
    assert [line["step"] for line in lines] == [0, 2]
    for line in lines:
        name = f"validation/step-{line['step']:06d}"
        rows = json.loads((out / f"{name}.json").read_text())
        assert [row["prompt"] for row in rows] == ["a cat"] * 3 + ["a dog"] * 3
        assert len({row["reward"] for row in rows}) == 6
        mean = sum(row["reward"] for row in rows) / 6
        assert line["validation_reward"] == pytest.approx(mean, rel=1e-5, abs=1e-7)
        images = torch.tensor(validation_images(out, line["step"])).unflatten(0, (2, 3)) / 255
        for kind, spread in {"noise": images.std(1), "prompts": images.mean(1).std(0)}.items():
            assert line[f"validation_diversity_over_{kind}"] == pytest.approx(spread.mean().item(), abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["noise", "prompts"])
def test_lost_diversity_ends_a_run_that_can_go_on(train, own_reward, tmp_path, capsys, lost):
    """A reward for one flat image whatever the prompt; of one prompt, only the noise has diversity."""
    reward = own_reward("-(images - 0.8).square().mean((1, 2, 3))")
    more = {"validation_prompts": ["a cat"]} if lost == "noise" else {"num_validation_images": 1}
    given = WATCHED | {"reward": f"{reward}=1e5", "learning_rate": 0.02, "max_train_steps": 60} | more
    line = refused(train, capsys, tmp_path / "run", **given, min_diversity=0.6)
    name = f"validation_diversity_over_{lost}"
    lines = [line for line in metrics(tmp_path / "run") if name in line]
    kept = [line[name] / lines[0][name] for line in lines]
    assert kept[-1] < 0.6 and min(kept[:-1]) >= 0.6
    assert f"{name} is {kept[-1]:.0%} of its start, below --min_diversity 0.6" in line
    step = lines[-1]["step"]
    assert 0 < step < 60 and (tmp_path / "run" / f"checkpoint-{step}" / "state.json").exists()
    given |= {"resume_from_checkpoint": "latest", "max_train_steps": step + 3}
    line = refused(train, capsys, tmp_path / "run", **given, min_diversity=0.6)  # of the same start
    assert f"step {step + 2} is saved" in line
    train(tmp_path / "run", **given, min_diversity=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [
    {"validation_prompts": ["a cat"]}, {"num_validation_images": 1}, {"validation_prompts": None}])
def test_a_run_goes_on_with_other_validation_prompts(train, tmp_path, changed):
    train(tmp_path / "run", **WATCHED)
    more = {name: value for name, value in (WATCHED | changed).items()
            if (WATCHED | changed)["validation_prompts"] or name == "max_train_steps"}
    train(tmp_path / "run", **more, max_train_steps=4, resume_from_checkpoint="latest")
    assert metrics(tmp_path / "run")[-1]["step"] == 4


def test_a_file_of_another_step_is_not_taken_for_one_of_the_checkpoint(train, tmp_path, capsys):
    out = train(tmp_path / "run", checkpointing_steps=1)
    (out / "checkpoint-2" / "generator.safetensors").write_bytes(
        (out / "checkpoint-1" / "generator.safetensors").read_bytes())
    state = json.loads((out / "checkpoint-2" / "state.json").read_text())
    del state["digests"]  # as older checkpoints are
    (out / "checkpoint-2" / "state.json").write_text(json.dumps(state))
    line = refused(train, capsys, out, max_train_steps=3, resume_from_checkpoint="latest")
    assert "generator.safetensors is damaged" in line and "not of step 2" in line


def test_a_run_without_one_good_update_is_no_result(train, own_reward, tmp_path, capsys):
    reward = own_reward("images.mean((1, 2, 3)) * float('nan')")
    line = refused(train, capsys, tmp_path / "run", reward=f"{reward}=2")
    assert "no update of the generator was finite" in line and not (tmp_path / "run" / "README.md").exists()


@pytest.mark.parametrize("body, words", [
    ("images.mean()", "returned a Tensor of shape ()"), ("[0.0] * len(images)", "returned a list"),
    ("images.mean((1, 2, 3)).detach()", "has no gradient")])
def test_a_reward_that_breaks_its_contract_is_named(train, own_reward, tmp_path, capsys, body, words):
    reward = own_reward(body)
    assert f"--reward {reward} {words}" in refused(train, capsys, tmp_path / "run", reward=f"{reward}=2")


# ------------------------------------------------------------------------------------- signals, disks


@pytest.mark.parametrize("number", [
    signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (
        signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))])
def test_a_signal_ends_the_run_after_its_step_saved(train, own_reward, tmp_path, capsys, number):
    body = "if len(calls) == 2 and not os.path.exists('{0}'):\n    open('{0}', 'w').close()\n" \
           "    os.kill(os.getpid(), {1})\nreturn images.mean((1, 2, 3))"
    given = {"reward": f"{own_reward(body.format(tmp_path / 'sent', int(number)))}=2", "max_train_steps": 4}
    line = refused(train, capsys, tmp_path / "run", **given)
    assert f"ended by {number.name}; step 2 is saved" in line
    train(tmp_path / "run", **given, resume_from_checkpoint="latest")
    train(tmp_path / "alone", **given)
    assert_same(state(tmp_path / "run" / "checkpoint-4"), state(tmp_path / "alone" / "checkpoint-4"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")


@pytest.mark.parametrize("call", [
    2, *(pytest.param(call, marks=pytest.mark.slow) for call in range(3, 8))])
def test_a_signal_is_answered_at_the_end_of_the_optimizer_step(script, train, tmp_path, capsys, monkeypatch,
                                                              call):
    """Two assistant updates and one of the generator, each of two batches; a signal in one of the batches."""
    given = {"assistant_updates": 2, "gradient_accumulation_steps": 2, "train_batch_size": 2,
             "max_train_steps": 3, "logging_steps": 3, "use_ema": True}
    calls, encode = [], script.encode

    def signalled(*inputs, **more):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*inputs, **more)
    with monkeypatch.context() as patch:
        patch.setattr(script, "encode", signalled)
        line = refused(train, capsys, tmp_path / "run", **given)
    assert "ended by SIGTERM" in line and len(calls) == call + call % 2, "its step has two batches"
    train(tmp_path / "run", **given, resume_from_checkpoint="latest")
    train(tmp_path / "alone", **given)
    assert_same(state(tmp_path / "run" / "checkpoint-3"), state(tmp_path / "alone" / "checkpoint-3"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")


def test_a_signal_in_the_first_step_keeps_the_validation_before_it(script, train, tmp_path, capsys,
                                                                   monkeypatch):
    given = {"assistant_updates": 2, "validation_prompts": ["a cat"], "max_train_steps": 2}
    step = script.assistant_step

    def signalled(*inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*inputs)
    with monkeypatch.context() as patch:
        patch.setattr(script, "assistant_step", signalled)
        assert "step 0 is saved" in refused(train, capsys, tmp_path / "run", **given)
    state_file = tmp_path / "run" / "checkpoint-0" / "state.json"
    assert json.loads(state_file.read_text())["assistant_updates_done"] == 1
    train(tmp_path / "run", **given, resume_from_checkpoint="latest")
    train(tmp_path / "alone", **given)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")


def test_a_second_signal_ends_the_run_at_once_unless_a_launcher_repeats_the_first(script, monkeypatch):
    run, ended, now = SimpleNamespace(signals=[]), [], [100.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(script.os, "_exit", ended.append)
    script.catch_signals(run)
    for seconds in (0, 1, script.SAME_SIGNAL):
        now[0] = 100.0 + seconds
        signal.raise_signal(signal.SIGTERM)
    assert not ended and set(run.signals) == {"SIGTERM"}
    now[0] += 1
    signal.raise_signal(signal.SIGINT)
    assert ended == [128 + signal.SIGINT]


def test_a_full_disk_leaves_the_earlier_checkpoint(script, train, tmp_path, capsys, monkeypatch):
    """And the run goes on from it when there is room again."""
    save_file = script.save_file

    def full(tensors, path, metadata):
        if "unfinished-2" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)
    given = {"max_train_steps": 3, "checkpointing_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(script, "save_file", full)
        line = refused(train, capsys, tmp_path / "run", **given)
    assert "--output_dir" in line and "disk full" in line
    assert not (tmp_path / "run" / "unfinished-2").exists()
    train(tmp_path / "run", **given, resume_from_checkpoint="latest")
    train(tmp_path / "alone", **given)
    assert_same(state(tmp_path / "run" / "checkpoint-3"), state(tmp_path / "alone" / "checkpoint-3"))
    assert not list((tmp_path / "run").glob("unfinished-*"))


@pytest.mark.parametrize("name", ["state.json", "trainer.pt", "generator.safetensors"])
@pytest.mark.parametrize("damage", ["cut", *(pytest.param(damage, marks=pytest.mark.slow) for damage in (
    "zeros", "gone"))])
def test_a_damaged_checkpoint_is_named_and_stays(train, tmp_path, capsys, name, damage):
    given = {"max_train_steps": 3, "checkpointing_steps": 1}
    train(tmp_path / "run", **given | {"max_train_steps": 2})
    path = tmp_path / "run" / "checkpoint-2" / name
    content = path.read_bytes()
    {"cut": lambda: path.write_bytes(content[:len(content) // 2]), "gone": path.unlink,
     "zeros": lambda: path.write_bytes(b"\0" * len(content))}[damage]()
    if (name, damage) == ("state.json", "gone"):  # then it is none, and latest is the one before
        train(tmp_path / "run", **given, resume_from_checkpoint="latest")
        return
    line = refused(train, capsys, tmp_path / "run", **given, resume_from_checkpoint="checkpoint-2")
    assert "--resume_from_checkpoint" in line and "checkpoint-2" in line and name in line
    assert path.exists() == (damage != "gone")
    train(tmp_path / "run", **given, resume_from_checkpoint="latest")
    warning = capsys.readouterr().err
    assert "checkpoint-2 is damaged" in warning and "the run resumes from checkpoint-1" in warning


def test_what_a_finished_run_left_is_written_again(train, tmp_path):
    """Where its last step is saved but its pipeline is not."""
    out = train(tmp_path / "run")
    before = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    (out / "model_index.json").unlink()
    (out / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    train(out, resume_from_checkpoint="latest")
    assert_same(load_file(out / "unet" / "diffusion_pytorch_model.safetensors"), before)
    assert (out / "model_index.json").exists()


def test_latest_says_what_it_removes(train, tmp_path, capsys):
    """A run that was killed within its first checkpoint."""
    (tmp_path / "run" / "unfinished-7").mkdir(parents=True)
    (tmp_path / "run" / "args.json").write_text("{}")
    train(tmp_path / "run", resume_from_checkpoint="latest")
    assert "unfinished-7 is removed" in capsys.readouterr().err
