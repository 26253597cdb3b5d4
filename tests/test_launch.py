"""The launch scripts and the configurations beside them: commands, memory, processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPOSITORY, load_script, metrics
from diffusers import UNet2DConditionModel

from utils.report import PUBLISHED


CONFIGS, ACCELERATE = (REPOSITORY / "examples" / name for name in ("configs", "accelerate"))


@pytest.fixture
def launched(tmp_path):
    """Where and with what a launch script calls `accelerate launch`: (folder, training script, flags)."""
    def run(name, *arguments, examples=REPOSITORY / "examples", cwd=tmp_path):
        (tmp_path / "accelerate").write_text('#!/bin/sh\nprintf "%s\\n" "$(pwd)" "$@"\n')
        (tmp_path / "accelerate").chmod(0o755)
        result = subprocess.run(["bash", Path(examples, f"{name}.sh"), *arguments], text=True, cwd=cwd,
                                env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True)
        assert result.returncode == 0, result.stderr
        folder, command, script, *given = result.stdout.splitlines()
        assert command == "launch"
        return Path(folder), Path(script), given
    return run


# The peak must leave room for what is not counted: the context, workspaces, fragmentation.
PEAKS = [("sdxl_lora_24gb", [], 10, 21), ("sdxl_4step", [], 10, 21), ("sdxl_full_80gb", [], 40, 70),
         ("sdxl_lora_16gb", [], 10, 14.5),
         ("sdxl_paper", ["short"], 30, 42), ("sd15", ["distil"], 20, 36), ("sd15", ["align"], 20, 36)]


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("name, arguments, low, high", PEAKS)
def test_a_launch_script_fits_its_gpu(launched, run_warm, name, arguments, low, high):
    """By --dry_run on configurations of the real dimensions; of the sharded run each of 8 GPUs."""
    model = "sd15" if "sd15" in name else "sdxl"
    _, script, given = launched(name, *arguments)
    ran = run_warm(script, *given, "--dry_run",
                   f"--pretrained_model_name_or_path={CONFIGS / model}",
                   f"--pretrained_vae_model_name_or_path={CONFIGS / model / 'vae'}",
                   f"--reward_model_name_or_path={CONFIGS / 'clip_h'}", ACCELERATE_USE_CPU="true")
    assert ran.returncode == 0, ran.stderr[-2000:]
    words = ran.stdout.splitlines()[-2].partition(", of 8: " if "paper" in name else "one GPU: ")[2].split()
    assert low < float(words[0]) < high and words[1].startswith("GiB")


@pytest.mark.parametrize("length, updates", [("short", 256), ("long", 1485)])
def test_the_paper_run_has_its_updates_and_recipe(launched, length, updates):
    _, script, given = launched("sdxl_paper", length, "--dry_run")
    module = load_script(script.stem)
    args = module.parse_args(module.FAMILY, given)
    assert (args.max_train_steps, args.generator_init) == (updates,
                                                           "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin")
    assert (args.divergence, args.reward_scale, args.cfg_scale, args.cfg_mode) == ("score", 100, 7.5, "in")
    assert args.train_batch_size * args.gradient_accumulation_steps * 8 == 128


@pytest.mark.parametrize("name, arguments", [pytest.param(*row[:2], id="-".join([row[0], *row[1]]))
                                             for row in PEAKS])
def test_a_launch_script_runs_in_the_folder_of_its_caller(launched, tmp_path, name, arguments):
    """Called by a relative path from another folder, with spaces in both: prompts and output are there."""
    repository, work = tmp_path / "a copy", tmp_path / "my work"
    shutil.copytree(REPOSITORY / "examples", repository / "examples",
                    ignore=lambda folder, names: [one for one in names if not one.endswith(".sh")])
    work.mkdir()
    more = ["--validation_prompts", "a cat", "two  dogs"]
    folder, script, given = launched(name, *arguments, *more, examples="../a copy/examples", cwd=work)
    assert folder == work and given[-3:] == more
    family = "sd15" if name == "sd15" else "sdxl"
    assert (work / script).resolve() == repository / f"train_diff_instruct_star_{family}.py"
    module = load_script(f"train_diff_instruct_star_{family}")
    args = module.parse_args(module.FAMILY, [*given, "--dry_run"])
    assert args.prompts_file == "prompts.parquet" and not Path(args.output_dir).is_absolute()


def test_the_script_of_table_1_has_the_rows_of_the_paper_that_have_public_weights(launched, tmp_path):
    """Called as above. The DPO reference's DI* has no public weights."""
    work, examples = tmp_path / "my work", tmp_path / "a copy" / "examples"
    work.mkdir()
    examples.mkdir(parents=True)
    shutil.copy(REPOSITORY / "examples" / "reproduce_table1.sh", examples)
    more = ["--limit", "2", "--model", "mine --images here"]
    folder, script, given = launched("reproduce_table1", "parti", *more, examples="../a copy/examples",
                                     cwd=work)
    assert folder == work and (work / script).resolve() == examples.parent / "eval_benchmarks.py"
    evaluation = load_script("eval_benchmarks")
    args = evaluation.parse_args(given)
    published = {row[0]: row[1] for row in PUBLISHED["parti"]}
    rows = {name: model for name, model in args.models.items() if name != "mine"}
    assert set(rows) == {*published} - {"DI*-DPO (long)"} and (args.limit, args.dtype) == (2, "float16")
    assert {name: model.num_inference_steps for name, model in rows.items()} == {
        name: published[name] for name in rows}
    guidance = {"SDXL-base": 7.5, "SDXL-DPO": 7.5, "SD3.5-large": 3.5, "FLUX-dev": 3.5}
    for name, model in rows.items():
        assert (model.guidance_scale, model.timesteps, model.scheduler) == (
            (guidance[name], None, None) if name in guidance else (0, [399], "LCMScheduler")), name
        assert model.dtype == "float16"
    assert len({model.unet or model.pretrained_model_name_or_path for model in rows.values()}) == 10


@pytest.mark.parametrize("name", ["sdxl_paper", "sd15", "reproduce_table1"])
def test_a_launch_script_without_its_argument_says_how(name):
    result = subprocess.run(["bash", REPOSITORY / "examples" / f"{name}.sh"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: usage: ")


def test_the_configurations_of_accelerate_are_valid():
    found = {path.name: load_config_from_file(str(path)) for path in ACCELERATE.iterdir()}
    assert {name: (config.distributed_type.value, config.num_machines, config.num_processes)
            for name, config in found.items()} == {
        "1_gpu.yaml": ("NO", 1, 1), "8_gpus_ddp.yaml": ("MULTI_GPU", 1, 8),
        "8_gpus_fsdp2.yaml": ("MULTI_GPU", 1, 8), "2_machines_of_8_gpus.yaml": ("MULTI_GPU", 2, 16)}


@pytest.mark.slow
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


def test_the_configurations_are_those_of_the_real_models():
    """Parameters as their model cards give them."""
    for model, millions in (("sd15", 859.5), ("sdxl", 2567.5)):
        config = json.loads((CONFIGS / model / "unet" / "config.json").read_text())
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        assert sum(value.numel() for value in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_syncing_writes_the_shared_parts_and_refuses_a_script_without_its_marks(tmp_path, monkeypatch):
    from utils import sync_scripts

    def script(name, shared):
        marks = [f"\n{mark}\n{part} {shared if part != 'family' else name}\n"
                 for mark, part in zip(sync_scripts.MARKS, ("imports", "family", "body"))]
        return f"docstring {name}\n" + "".join(marks)
    source, other = tmp_path / "train_a.py", tmp_path / "train_b.py"
    source.write_text(script("a", "new"))
    other.write_text(script("b", "old"))
    for name, value in {"ROOT": tmp_path, "SOURCE": source, "COPY": other}.items():
        monkeypatch.setattr(sync_scripts, name, value)
    sync_scripts.main()
    assert other.read_text() == script("b", "new") and source.read_text() == script("a", "new")
    other.write_text(script("b", "old").replace(sync_scripts.MARKS[2], ""))
    with pytest.raises(ValueError, match="train_b.py needs one line"):
        sync_scripts.main()
