"""The plain way beside ours: equal gradients, and the forwards and backwards of Algorithm 1."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY


sys.path.insert(0, str(REPOSITORY / "examples"))
benchmark_step, gpu_acceptance = map(importlib.import_module, ("benchmark_step", "gpu_acceptance"))
LORA = {"generator_lora_rank": 3, "assistant_lora_rank": 2, "generator_init": "reference"}


@pytest.fixture
def plain(script, monkeypatch):
    monkeypatch.setattr(benchmark_step, "script", script, raising=False)
    return {"assistant": benchmark_step.plain_assistant_step,
            "generator": benchmark_step.plain_generator_step}


@pytest.mark.slow
@pytest.mark.parametrize("family, more", [
    ("sd15", {}), ("sd15", {"recipe": "di_star_out"}), ("sd15", {"recipe": "diff_instruct_pp"}),
    ("sd15", {"score_gradient": "detached"}), ("sd15", {"cfg_scale": 1, "weighting": "dmd"}),
    ("sdxl", {}), ("sdxl", LORA | {"gradient_checkpointing": True, "distance": "l2"})],
    ids=["in", "out", "kl", "detached", "unguided", "sdxl", "sdxl_lora"])
def test_the_plain_way_has_the_same_gradients(script, prepare_double, plain, more):
    shared = {"shared_base": True} if "generator_lora_rank" in more else {}
    ours, other = prepare_double(**more | shared), prepare_double(**more)
    for name in ("assistant", "generator"):
        for prepared, step in ((ours, getattr(script, f"{name}_step")), (other, plain[name])):
            terms = [prepared.terms] if name == "generator" else []
            step(prepared.models, prepared.batch, *terms, prepared.method, prepared.accelerator)
        mine, theirs = ({key: value.grad for key, value in script.trainable_parameters(
            getattr(prepared.models, name)).items()} for prepared in (ours, other))
        assert benchmark_step.difference(mine, theirs) < (1e-12 if name == "assistant" else 1e-6), (
            "but for the decoder and the reward in float32")
        assert all(value.norm() > 0 for value in theirs.values())


@pytest.mark.slow
@pytest.mark.parametrize("updates, more", [(1, {}), (2, {"cfg_scale": 0}), (3, LORA)])
def test_the_counts_are_those_of_algorithm_1(script, load, plain, updates, more):
    """K_TA assistant updates, each on new samples, then one of the generator, through both score networks."""
    prepared = load(**{"batch_size": 2, "assistant_updates": updates, "recipe": "sim"} | more)
    way = object.__new__(benchmark_step.Way)
    way.accelerator = prepared.accelerator
    way.steps = {name: getattr(script, name) for name in ("assistant_step", "generator_step")}
    way.run = script.TrainingRun(prepared.args, prepared.models, prepared.terms, prepared.observers,
                                 script.Prompts(["a"], 0), way.accelerator)
    flops, counts = way.count()
    samples = 2 if "cfg_scale" in more else 4
    assert counts == {
        "generator forward": [updates + 1, 2 * (updates + 1)], "generator backward": [1, 2],
        "assistant forward": [updates + 1, 2 * (updates + 1)],
        "assistant backward": [updates + 1, 2 * (updates + 1)],
        "reference forward": [1, samples], "reference backward": [1, samples]}
    way.steps = {f"{name}_step": function for name, function in plain.items()}
    more, counts = way.count()
    assert counts["reference forward"] == [samples // 2, samples] and more == flops > 0


@pytest.mark.slow
@pytest.mark.once
def test_the_acceptance_runs_in_its_small_form_and_goes_on(tmp_path):
    """Without a GPU: what can be tried passes, the rest is named as left out; a second call repeats none."""
    def run():
        command = [sys.executable, gpu_acceptance.__file__, f"--output_dir={tmp_path}"]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    ran = run()
    assert ran.returncode == 0 and "FALL SHORT" not in ran.stdout, ran.stdout + ran.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {line["part"]: line["checks"] for line in lines}
    assert list(found) == list(gpu_acceptance.PARTS)
    assert sum(check[3] is True for checks in found.values() for check in checks) >= 10
    for part in ("kernels", "full", "lora_2", "launch", "export", "quickstart"):
        assert any("left out" in check[1] for check in found[part])
    again = run()
    assert again.returncode == 0 and "-- kernels" not in again.stdout
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(lines)


@pytest.mark.slow
def test_a_part_that_falls_short_ends_the_acceptance_with_its_name(tmp_path):
    line = {"part": "kernels", "seconds": 1, "checks": [["a sum", "3", "2", False]], "device": "CPU",
            "torch": "2", "diffusers": "0", "date": "2026-01-01"}
    others = [line | {"part": part, "checks": []} for part in gpu_acceptance.PARTS if part != "kernels"]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [line, *others]))
    ran = subprocess.run([sys.executable, gpu_acceptance.__file__, f"--output_dir={tmp_path}"],
                         capture_output=True, text=True)
    assert ran.returncode == 1 and "falls short or is missing: kernels" in ran.stderr
    assert "| kernels | a sum | 3 | 2 | falls short |" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_the_benchmark_runs(run_warm):
    """On one image of the shapes world."""
    result = run_warm(REPOSITORY / "examples" / "benchmark_step.py", "--rounds=1", "--train_batch_size=1")
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == ["shapes,", "matrix", "ours", "plain",
                                                                     "ours", "pipeline:"]
    assert "reference forward 1 (2 samples)" in result.stdout and "reference forward 2" in result.stdout
