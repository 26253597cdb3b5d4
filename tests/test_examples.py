"""The launch scripts, and the prompts they train on."""

import importlib
import json
import os
import subprocess
import sys

import pandas
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPOSITORY, load_script, metrics


sys.path.insert(0, str(REPOSITORY / "examples"))
prepare_prompts = importlib.import_module("prepare_prompts")
CONFIGS, ACCELERATE = (REPOSITORY / "examples" / name for name in ("configs", "accelerate"))


# ------------------------------------------------------------------------------------- launch scripts


def dry_run(name, *arguments):
    """Run a launch script with --dry_run on configurations of the real dimensions; one GPU's GiB."""
    model = "sd15" if "sd15" in name else "sdxl"
    flags = ["--dry_run", f"--pretrained_model_name_or_path={CONFIGS / model}",
             f"--pretrained_vae_model_name_or_path={CONFIGS / model / 'vae'}",
             f"--reward_model_name_or_path={CONFIGS / 'clip_h'}"]
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
                                "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(["bash", REPOSITORY / "examples" / f"{name}.sh", *arguments, *flags],
                            env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    last = result.stdout.splitlines()[-1]
    return float(last.split("peak of one ")[1].split(" GiB")[-2 if "of 8" in last else 0].split()[-1])


def test_sdxl_by_loras_fits_24_gb_with_room_for_what_is_not_counted():
    assert 10 < dry_run("sdxl_lora_24gb") < 21


def test_sdxl_in_full_fits_80_gb_with_room_for_what_is_not_counted():
    assert 40 < dry_run("sdxl_full_80gb") < 70


def test_the_paper_s_run_fits_48_gb_on_8_gpus_with_room_for_what_is_not_counted():
    assert 30 < dry_run("sdxl_paper", "short") < 42


@pytest.mark.parametrize("length, updates", [("short", 256), ("long", 1485)])
def test_the_paper_s_run_has_its_updates_and_recipe(tmp_path, length, updates):
    """As its launch command is resolved by the training script."""
    (tmp_path / "accelerate").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    result = subprocess.run(["bash", REPOSITORY / "examples" / "sdxl_paper.sh", length, "--dry_run"],
                            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True)
    launch, script, *flags = result.stdout.splitlines()
    args = load_script(script.removesuffix(".py")).parse_args(flags)
    assert (args.max_train_steps, args.generator_init) == (updates,
                                                           "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin")
    assert (args.divergence, args.reward_scale, args.cfg_scale, args.cfg_mode) == ("score", 100, 7.5, "in")
    assert args.train_batch_size * args.gradient_accumulation_steps * 8 == 128


@pytest.mark.parametrize("stage", ["distil", "align"])
def test_sd15_fits_40_gb_with_room_for_what_is_not_counted(stage):
    assert 20 < dry_run("sd15", stage) < 36


@pytest.mark.parametrize("name", ["sdxl_paper", "sd15"])
def test_a_launch_script_without_its_argument_says_how(name):
    result = subprocess.run(["bash", REPOSITORY / "examples" / f"{name}.sh"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: usage: ")


# ---------------------------------------------------------------------- configurations of accelerate


def test_the_configurations_of_accelerate_are_valid():
    found = {path.name: load_config_from_file(str(path)) for path in ACCELERATE.iterdir()}
    assert {name: (config.distributed_type.value, config.num_machines, config.num_processes)
            for name, config in found.items()} == {
        "1_gpu.yaml": ("NO", 1, 1), "8_gpus_ddp.yaml": ("MULTI_GPU", 1, 8),
        "8_gpus_fsdp2.yaml": ("MULTI_GPU", 1, 8), "2_machines_of_8_gpus.yaml": ("MULTI_GPU", 2, 16)}


@pytest.mark.parametrize("family", ["sdxl"])
def test_two_machines_train_as_one_with_two_processes(script, flags, tmp_path):
    """With the configurations as they are, but for the number of processes, on the CPU."""
    def launch(name, config, *more):
        start = ["-m", "accelerate.commands.launch", f"--config_file={ACCELERATE / config}",
                 "--num_processes=2", *more, script.__file__, *flags(tmp_path / name, sharding="fsdp")]
        return subprocess.Popen([sys.executable, *start], stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                                env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})

    machines = [launch("two", "2_machines_of_8_gpus.yaml", f"--machine_rank={rank}",
                       "--main_process_port=29511") for rank in range(2)]
    for process in (*machines, launch("one", "8_gpus_fsdp2.yaml", "--main_process_port=29512")):
        assert process.wait(timeout=300) == 0, process.stderr.read()[-3000:]
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


# -------------------------------------------------------------------------------------------- prompts


@pytest.fixture
def captions(tmp_path):
    """Write a dataset of {caption: score}; returns its folder."""
    def write(rows):
        folder = tmp_path / "captions"
        folder.mkdir()
        pandas.DataFrame({"TEXT": list(rows), "score": list(rows.values())}).to_parquet(folder / "a.parquet")
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
    args = script.parse_args(flags(tmp_path / "run", prompts_file=tmp_path / "prompts.parquet"))
    assert script.read_prompts(args) == ["a cat on grass", "a dog on grass"]


def test_the_configurations_are_those_of_the_real_models():
    """Parameters as their model cards give them."""
    import torch
    from diffusers import UNet2DConditionModel

    for model, millions in (("sd15", 859.5), ("sdxl", 2567.5)):
        config = json.loads((CONFIGS / model / "unet" / "config.json").read_text())
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        assert sum(value.numel() for value in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
