"""What would be wrong without a word: odd models, bit rot, names and folders; it is refused, or is right."""

import errno
import functools
import importlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time

import diffusers
import pytest
import torch
from conftest import REPOSITORY, metrics, tiny_unet
from safetensors.torch import load_file, save_file

from utils import places, starts


sys.path.insert(0, str(REPOSITORY / "examples"))
generate = importlib.import_module("generate")


@pytest.fixture
def refused(train, tmp_path, capfd):
    """The one line on standard error of a run that is refused."""
    def run(output_dir=tmp_path / "run", **more):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            train(output_dir, **more)
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert ending.value.code == 2 and len(lines) == 1
        return lines[0]
    return run


@pytest.fixture
def changed(tiny, tmp_path):
    """A copy of the tiny pipeline whose JSON file has other values; None removes a key."""
    def write(file, **changes):
        place = shutil.copytree(tiny["pipeline"], tmp_path / "changed", dirs_exist_ok=True)
        held = json.loads((place / file).read_text()) | changes
        held = {key: value for key, value in held.items() if value is not None}
        (place / file).write_text(json.dumps(held))
        return place
    return write


# -------------------------------------------------------------------------------------------------- models


def test_a_scheduler_without_betas_is_refused(refused, tiny, tmp_path):
    """Playground v2.5 has EDM's, of which DDPM would take over nothing and use betas of its own."""
    place = shutil.copytree(tiny["pipeline"], tmp_path / "edm")
    shutil.rmtree(place / "scheduler")
    for kind in (diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler):
        kind().save_pretrained(place / "scheduler")
        line = refused(pretrained_model_name_or_path=place)
        assert f"its scheduler: {kind.__name__}" in line and "betas" in line


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path",
                                  "reward_vae"])
def test_a_vae_with_statistics_is_refused(refused, changed, flag):
    place = changed("vae/config.json", latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    line = refused(**{flag: place if flag.startswith("pretrained_model") else place / "vae"})
    assert f"--{flag}" in line and "latents_mean" in line


@pytest.mark.parametrize("channels", [8, 9])
@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "reference_unet", "generator_init"])
def test_a_network_for_inpainting_or_editing_is_refused(refused, tiny, tmp_path, flag, channels):
    unet = tiny_unet("sd15", in_channels=channels)
    if flag == "pretrained_model_name_or_path":
        place = shutil.copytree(tiny["pipeline"], tmp_path / "inpaint")
        unet.save_pretrained(place / "unet")
    else:
        unet.save_pretrained(place := tmp_path / "unet")
    line = refused(**{flag: place})
    assert f"--{flag} {place} reads {channels} channels, the VAE's latents have 4" in line


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_at_loading(refused, tiny, tmp_path, part, value):
    place = shutil.copytree(tiny["pipeline"], tmp_path / "bad")
    (file,) = (place / part).glob("*.safetensors")
    weights = load_file(file)
    name = next(key for key, tensor in weights.items() if tensor.is_floating_point())
    weights[name].view(-1)[0] = value
    save_file(weights, file, {"format": "pt"})
    line = refused(pretrained_model_name_or_path=place)
    assert str(place) in line and part in line and "finite" in line


def test_a_start_that_is_not_finite_is_named_at_loading(refused, tmp_path):
    weights = tiny_unet().state_dict()
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, tmp_path / "start.safetensors")
    line = refused(generator_init=tmp_path / "start.safetensors")
    assert "--generator_init" in line and "finite weight: conv_in.bias" in line


@pytest.mark.parametrize("wrapped", [
    lambda weights: {"module." + key: value for key, value in weights.items()},
    lambda weights: {"_orig_mod.module." + key: value for key, value in weights.items()},
    lambda weights: {"state_dict": weights, "step": 7}, lambda weights: {"model": weights},
    lambda weights: {"state_dict": {"module." + key: value for key, value in weights.items()}}])
def test_what_a_trainer_puts_around_weights_is_taken_off(script, load, tmp_path, wrapped):
    weights = tiny_unet().state_dict()
    torch.save(wrapped(weights), tmp_path / "start.pt")
    generator = load(generator_init=tmp_path / "start.pt").models.generator
    evaluated = starts.replacement(tmp_path / "start.pt", tiny_unet(), "unet", "StableDiffusionPipeline")
    for network in (generator, evaluated):
        assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("content, words", [
    ({"net." + key: value for key, value in tiny_unet().state_dict().items()}, "net.conv_in"),
    ({"step": 7, "weights": {"a": torch.ones(2)}}, "step, weights"),
    ({"a": os}, "it holds more than tensors")])
def test_a_file_of_other_names_is_said_by_its_names(refused, tmp_path, content, words):
    if content == {"a": os}:
        content = {"a": stat.S_ISDIR, "b": subprocess.Popen}
    torch.save(content, tmp_path / "start.pt")
    line = refused(generator_init=tmp_path / "start.pt")
    assert "--generator_init" in line and words in line and "weights_only" not in line


def test_a_tokenizer_without_a_length_is_refused_for_that(refused, changed):
    place = changed("tokenizer/tokenizer_config.json", model_max_length=None)
    assert "tokenizer_config.json lacks model_max_length" in refused(pretrained_model_name_or_path=place)


# ---------------------------------------------------------------------------------------------- checkpoints


def test_latest_of_a_run_without_a_checkpoint_starts_it(train, tmp_path):
    more = {"validation_prompts": ["a cat"], "min_diversity": 0.01, "resume_from_checkpoint": "latest"}
    assert metrics(train(tmp_path / "run", **more))[-1]["step"] == 2


@pytest.fixture
def run(train, tmp_path):
    """A run of three steps with a checkpoint of each."""
    return train(tmp_path / "run", max_train_steps=3, checkpointing_steps=1)


def rot(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["generator.safetensors", "assistant.safetensors", "trainer.pt"])
def test_bit_rot_is_refused_and_latest_falls_back(script, flags, train, run, refused, capfd, file):
    more = {"max_train_steps": 3, "checkpointing_steps": 1}
    before = (run / "checkpoint-3" / "generator.safetensors").read_bytes()
    rot(run / "checkpoint-3" / file)
    line = refused(**more, resume_from_checkpoint="checkpoint-3")
    assert "checkpoint-3" in line and f"the bytes of {file} have changed" in line
    train(run, **more, resume_from_checkpoint="latest")
    assert (f"checkpoint-3 is damaged: the bytes of {file} have changed since it was saved; the run resumes"
            " from checkpoint-2") in capfd.readouterr().err
    assert (run / "checkpoint-3" / "generator.safetensors").read_bytes() == before
    for folder in run.glob("checkpoint-*"):
        rot(folder / file)
    line = refused(**more | {"max_train_steps": 4}, resume_from_checkpoint="latest")
    assert all(f"checkpoint-{step} is damaged" in line for step in (1, 2, 3))


def test_a_checkpoint_of_before_digests_is_said_to_be_unchecked(train, run, capfd):
    path = run / "checkpoint-3" / "state.json"
    state = json.loads(path.read_text())
    assert state["digests"].keys() == state["files"].keys()
    del state["digests"]
    path.write_text(json.dumps(state))
    capfd.readouterr()
    train(run, max_train_steps=4, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert "checkpoint-3 has no digests" in capfd.readouterr().err
    train(run, max_train_steps=5, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert "no digests" not in capfd.readouterr().err


def test_a_model_whose_configuration_changed_under_its_name_is_not_resumed(train, refused, changed, tmp_path):
    """The same start saved again by a newer library is; another scheduler, network or tokenizer is not."""
    place = changed("scheduler/scheduler_config.json", _diffusers_version="0.1")
    train(tmp_path / "run", pretrained_model_name_or_path=place, max_train_steps=1)
    again = {"pretrained_model_name_or_path": place, "resume_from_checkpoint": "latest", "max_train_steps": 2}
    changed("scheduler/scheduler_config.json", beta_end=0.02)
    assert f"--pretrained_model_name_or_path {place}: its configuration is not" in refused(**again)
    changed("scheduler/scheduler_config.json", _diffusers_version="0.2")
    train(tmp_path / "run", **again)
    state = tmp_path / "run" / "checkpoint-1" / "state.json"
    state.write_text(json.dumps({name: value for name, value in json.loads(state.read_text()).items()
                                 if name != "configurations"}))  # of an older release
    train(tmp_path / "run", **again | {"resume_from_checkpoint": "checkpoint-1"})


def test_the_log_of_later_steps_is_kept_when_an_earlier_one_is_resumed(train, run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    foreign = ["foreign", "[1]", '{"step": "x"}']
    (run / "metrics.jsonl").write_text("\n".join([lines[0], *foreign, *lines[1:]]) + "\n")
    for number in (1, 2):
        train(run, max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="checkpoint-1")
        kept = (run / "metrics.after-1.jsonl").read_text().splitlines()
        if number == 1:
            assert kept == [*foreign, *lines[1:]]
    assert len(kept) == 3 + 2 + 1
    assert [line["step"] for line in metrics(run)] == [1, 2]


def test_files_of_weights_have_the_permissions_of_others(train, tmp_path):
    umask = os.umask(0o027)
    try:
        out = train(tmp_path / "run", generator_lora_rank=2)
    finally:
        os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()}
    assert modes == {0o640} and (out / "pytorch_lora_weights.safetensors").exists()


def test_a_schedule_that_changes_is_said(train, tmp_path, capfd):
    more = {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    for schedule, warned in (("cosine", True), ("constant_with_warmup", False)):
        train(tmp_path / schedule, max_train_steps=1, lr_scheduler=schedule)
        capfd.readouterr()
        train(tmp_path / schedule, max_train_steps=2, lr_scheduler=schedule, **more)
        assert ("ends at --max_train_steps, so" in capfd.readouterr().err) == warned


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("writer", ["save_file", "torch.save", "save_pretrained"])
def test_a_full_disk_is_said_and_nothing_half_written_stays(script, refused, tmp_path, monkeypatch, writer):
    def of_safetensors(*_, **__):
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def of_torch(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file")

    if writer == "save_file":
        monkeypatch.setattr(script, "save_file", of_safetensors)
    elif writer == "torch.save":
        monkeypatch.setattr(torch, "save", of_torch)
    else:
        monkeypatch.setattr(diffusers.AutoencoderKL, "save_pretrained", of_safetensors)
    line = refused(max_train_steps=1)
    assert "--output_dir" in line and "disk full" in line
    assert not [*(tmp_path / "run").glob("unfinished-*")]
    assert (tmp_path / "run" / "checkpoint-1").exists() == (writer == "save_pretrained")


def test_an_export_that_fails_leaves_the_earlier_result(script, train, refused, monkeypatch, tmp_path):
    out = train(tmp_path / "run", max_train_steps=1)
    before = {path: path.read_bytes() for part in ("unet", "vae") for path in (out / part).iterdir()}
    monkeypatch.setattr(diffusers.AutoencoderKL, "save_pretrained", full)
    refused(max_train_steps=2, resume_from_checkpoint="latest")
    assert before and all(path.read_bytes() == content for path, content in before.items())


# ----------------------------------------------------------------------------------------- names and folders


def test_the_same_model_by_another_path_is_the_same_run(train, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny["pipeline"].parent)
    out = train(tmp_path / "run", max_train_steps=1, pretrained_model_name_or_path=tiny["pipeline"].name)
    (tmp_path / "link").symlink_to(tiny["pipeline"])
    for step, place in enumerate((tiny["pipeline"], tmp_path / "link"), 2):
        train(out, max_train_steps=step, resume_from_checkpoint="latest", pretrained_model_name_or_path=place)


def test_the_same_prompts_by_another_file_are_the_same_run(train, refused, tiny, tmp_path):
    out = train(tmp_path / "run", max_train_steps=1)
    moved = shutil.copy(tiny["prompts"], tmp_path / "moved.txt")
    train(out, max_train_steps=2, resume_from_checkpoint="latest", prompts_file=moved)
    (tmp_path / "moved.txt").write_text("others")
    line = refused(max_train_steps=3, resume_from_checkpoint="latest", prompts_file=moved)
    assert "the prompts have changed" in line


def test_a_tilde_is_the_home_folder(script, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = script.parse_args(script.FAMILY, flags("~/run", validation_prompts=["a ~ b", "~ c"]))
    assert args.output_dir == str(tmp_path / "run") and args.validation_prompts == ["a ~ b", "~ c"]


@pytest.mark.parametrize("value, words", [
    ("outputs/run/unet", "no such file or folder"), ("./absent", "no such file or folder"),
    ("/absent/place", "no such file or folder"), ("absent.safetensors", "no such file or folder"),
    ("somebody/model", "and the hub cannot be reached"), ("a-name", "and the hub cannot be reached"),
    ("somebody/model/a.safetensors", "and the hub cannot be reached")])
@pytest.mark.parametrize("flag", ["generator_init", "pretrained_model_name_or_path", "dataset_name"])
def test_a_name_that_is_nowhere_is_said_at_once(refused, tmp_path, monkeypatch, value, words, flag):
    monkeypatch.setattr(places.constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    line = refused(**{flag: value} | ({"prompts_file": None} if flag == "dataset_name" else {}))
    assert time.monotonic() - started < 15
    assert line.startswith(f"error: --{flag} {value}: there is") and words in line


def test_a_name_in_the_cache_needs_no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(places.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(places.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--somebody--model").mkdir()
    assert places.fault_of("somebody/model") is None and places.constants.HF_HUB_OFFLINE
    assert places.fault_of("somebody/model", "datasets") and places.fault_of(tmp_path, None) is None


@pytest.mark.parametrize("given, words", [
    (["--lerning_rate=1"], "did you mean --learning_rate?"),
    (["--zzzzzz=1"], "unrecognized arguments: --zzzzzz=1; see"),
    (["--mixed_precision=fp16"], "would underflow in fp16"),
    (["--recipe=sim", "--reward=pickscore"], "--reward_scale is 0 (--recipe sim sets it to 0)"),
    (["--caption_column=caf\udce9"], "--caption_column is not UTF-8"),
    (["--validation_prompts", "a cat", "caf\udce9"], "--validation_prompts is not UTF-8")])
def test_a_flag_is_explained(script, flags, tmp_path, capfd, given, words):
    with pytest.raises(SystemExit) as ending:
        script.parse_args(script.FAMILY, [*flags(tmp_path / "run", mixed_precision=None), *given])
    assert ending.value.code == 2 and words in capfd.readouterr().err


@pytest.mark.slow
def test_torchrun_without_a_gpu_is_one_run_or_none(flags, tmp_path):
    """Accelerate would see one process in each of two, which would all write as the main one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               REPOSITORY / "train_diff_instruct_star_sd15.py", *flags("run", max_train_steps=1)]
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True,
                         timeout=300)
    assert ran.returncode and "set ACCELERATE_USE_CPU=true" in ran.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("program, known, flag", [
    ("examples/generate.py", "--pretrained_model_name_or_path", "--prompts"),
    ("examples/push.py", "--output_dir", "--evaluation"),
    ("examples/prepare_prompts.py", "--dataset_name", "--max_words"),
    ("examples/export.py", "--checkpoint", "--family"), ("eval_benchmarks.py", "--model", "--limit")])
def test_other_programs_explain_flags_alike(program, known, flag, tmp_path):
    needed = ["--output_dir=x"] * (program == "examples/export.py")
    for given, words in (([f"{known}=x", f"{flag[:-1]}=x"], f"did you mean {flag}?"),
                         ([f"{known}=caf\udce9"], f"{known} is not UTF-8")):
        ran = subprocess.run([sys.executable, REPOSITORY / program, *needed, *given], capture_output=True,
                             cwd=tmp_path)
        assert ran.returncode == 2 and words in ran.stderr.decode()


def test_generating_from_a_checkpoint_names_the_tool_that_exports_it(tmp_path, capsys):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(SystemExit):
        generate.main(generate.parse_args(
            [f"--pretrained_model_name_or_path={tmp_path}", "--prompts", "a cat"]))
    assert "examples/export.py" in capsys.readouterr().err


def test_files_of_wandb_lie_under_the_output_folder(script, train, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(script.Accelerator, "init_trackers", lambda self, *given: asked.append(given))
    out = train(tmp_path / "run", max_train_steps=1, logging_dir="trackers")
    assert asked[0][2] == {"wandb": {"dir": str(out / "trackers")}}
    assert not (out / "trackers").exists()  # without a tracker
    elsewhere = tmp_path / "elsewhere" / "trackers"
    monkeypatch.setattr(script.Accelerator, "__init__", functools.partialmethod(
        lambda self, make, **given: make(self, **given | {"log_with": None}), script.Accelerator.__init__))
    monkeypatch.setattr(script, "get_available_trackers", lambda: ["wandb"])
    out = train(tmp_path / "other", max_train_steps=1, logging_dir=elsewhere, report_to="wandb")
    assert elsewhere.is_dir() and (out / "model_index.json").exists()


# ------------------------------------------------------------------------------------------------- rewards


def test_a_reward_that_ends_the_process_is_an_error(train, own_reward, tmp_path):
    reward = own_reward("exit(0)")
    with pytest.raises(RuntimeError, match="failed with the prompts"):
        train(tmp_path / "run", reward=f"{reward}=1")


def test_scores_on_another_device_are_named(refused, own_reward):
    reward = own_reward("images.mean((1, 2, 3)).to('meta')")
    assert f"--reward {reward} returned scores on meta" in refused(reward=f"{reward}=1")


def test_an_exception_says_how_to_go_on(train, own_reward, tmp_path):
    reward = own_reward("1 / 0 if len(calls) == 2 else images.mean((1, 2, 3))")
    with pytest.raises(RuntimeError) as caught:
        train(tmp_path / "run", reward=f"{reward}=1", checkpointing_steps=1)
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert "ended at step 1; its checkpoints are intact: continue with --resume_from" in note
