"""Many processes: DDP and FSDP2 train as one process does, and a sharded run continues on any number."""

import itertools
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import WELL_CONDITIONED, metrics
from safetensors.torch import load_file


DOUBLE = Path(__file__).with_name("double.py")
LORA = {"generator_lora_rank": 3, "assistant_lora_rank": 2, "generator_init": "reference"}
MORE = WELL_CONDITIONED | {"max_train_steps": 3, "use_ema": True, "assistant_updates": 2,
                           "validation_steps": 1, "validation_prompts": ["a cat", "a dog"]}


@pytest.fixture
def launch(family, flags, tmp_path, run_warm):
    """Run the script in float64 in so many processes; returns its folder and what each process saw."""
    def run(name, processes, kill_at=0, signal_at=0, **more):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        ran = run_warm(DOUBLE, family, *flags("run", **more), cwd=folder, processes=processes,
                       ACCELERATE_USE_CPU="true", WATCH_KILL_AT=str(kill_at),
                       WATCH_SIGNAL_AT=str(signal_at))
        expected = -signal.SIGKILL if kill_at else 2 if signal_at else 0
        assert set(ran.statuses) == {expected}, ran.stderr[-3000:]
        if kill_at:
            return folder / "run", None
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
        return folder / "run", ranks
    return run


def exported(folder):
    lora, part = folder / "pytorch_lora_weights.safetensors", folder / "unet"
    part = part if part.exists() else folder / "transformer"
    return load_file(lora if lora.exists() else part / "diffusion_pytorch_model.safetensors")


def assert_equal_runs(one, other):
    """Weights and logs within a relative 1e-6; logs are written as float32."""
    weights, others = exported(one), exported(other)
    assert next(iter(weights.values())).dtype == torch.float64
    for key, value in weights.items():
        assert (value - others[key]).norm() <= 1e-6 * value.norm(), key
    last = Path("validation", "step-000003.png")
    assert (one / last).read_bytes() == (other / last).read_bytes()
    mine, theirs = metrics(one), metrics(other)
    assert len(mine) == len(theirs) > 0
    for line, expected in zip(theirs, mine):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


def assert_each_sample_once(ranks, alone):
    """Processes share a run's prompts and noise; none samples what another does."""
    for kind in ("prompts", "noise"):
        sampled = list(itertools.chain(*(rank[kind] for rank in ranks)))
        assert sorted(sampled) == sorted(alone[kind])
        assert len(set(map(tuple, sampled))) == len(sampled) > 20


@pytest.mark.parametrize("family, first, kinds", [
    pytest.param("sdxl", {}, {"fsdp": {"sharding": "fsdp", "gradient_checkpointing": True}},
                 marks=pytest.mark.slow),
    pytest.param("sdxl", {}, {"ddp": {}}, marks=pytest.mark.slow),
    ("sd15", LORA, {"ddp": {"shared_base": True, "gradient_checkpointing": True}}),
    pytest.param("sd15", {"generator_timesteps": [399, 299, 199, 99]},
                 {"ddp": {}, "fsdp": {"sharding": "fsdp"}}, marks=pytest.mark.slow),
    *(pytest.param(family, more | {"generator_timesteps": 1000}, {"ddp": {}, "fsdp": {"sharding": "fsdp"}},
                   marks=pytest.mark.slow)
      for family, more in {"sd3": {}, "flux2_klein": {"resolution": 32}}.items()),
    pytest.param("pixart", {"generator_timesteps": 400}, {"fsdp": {"sharding": "fsdp"}},
                 marks=pytest.mark.slow),
    pytest.param("sd3", LORA | {"generator_timesteps": 1000}, {"ddp": {"shared_base": True}},
                 marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_twice_the_batch(launch, first, kinds):
    first = MORE | first | {"gradient_accumulation_steps": 2}
    one, (alone,) = launch("one", 1, train_batch_size=2, **first)
    for name, more in kinds.items():
        two, ranks = launch(name, 2, train_batch_size=1, **first | more)
        assert_equal_runs(one, two)
        assert_each_sample_once(ranks, alone)
        for kind, held, whole in itertools.chain(*(rank["held"].values() for rank in ranks)):
            assert (kind == "DTensor" and held < 0.6 * whole) if name == "fsdp" else held == whole


@pytest.mark.parametrize("batch, more", [
    (1, {}), *(pytest.param(batch, {}, marks=pytest.mark.slow) for batch in range(2, 9)),
    *(pytest.param(batch, {"sharding": "fsdp"}, marks=pytest.mark.slow) for batch in (1, 4, 6, 8))])
def test_a_signal_to_one_process_stops_all_at_the_end_of_the_same_update(launch, more, batch):
    """A step has the assistant's two updates and the generator's, each of two batches of two processes."""
    more = WELL_CONDITIONED | more | {
        "max_train_steps": 3, "assistant_updates": 2, "use_ema": True, "train_batch_size": 1,
        "gradient_accumulation_steps": 2, "logging_steps": 3}
    whole, every = launch("whole", 2, **more)
    cut, before = launch("cut", 2, signal_at=batch, **more)
    updates = (batch + 1) // 2
    assert [rank["batches"] for rank in before] == [2 * updates] * 2
    (state,) = cut.glob("checkpoint-*/state.json")
    state = json.loads(state.read_text())
    assert (state["step"], state["assistant_updates_done"]) == divmod(updates, 3)
    assert state["prompts_seen"] == 4 * updates
    cut, after = launch("cut", 2, resume_from_checkpoint="latest", **more)
    for kind in ("prompts", "noise"):
        for one, *parts in zip(every, before, after):
            assert one[kind] == [sampled for part in parts for sampled in part[kind]]
    weights, others = exported(whole), exported(cut)
    for key, value in weights.items():
        assert torch.equal(value, others[key]), key
    (line,), (other,) = metrics(whole), metrics(cut)
    assert other == pytest.approx(line, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl"])
def test_a_sharded_run_continues_on_any_number_of_processes(launch, tmp_path):
    """Three processes leave some without a part of the smallest tensors."""
    more = MORE | {"sharding": "fsdp", "checkpointing_steps": 2}
    whole, _ = launch("whole", 1, train_batch_size=6, **more)
    launch("killed", 3, kill_at=3, train_batch_size=2, **more)
    files = {path.name for path in (tmp_path / "killed" / "run" / "checkpoint-2").iterdir()}
    assert {"state.json", "trainer.pt"} == {name for name in files if not name.endswith(".safetensors")}
    assert {name[:11] for name in files if name.endswith(".safetensors")} == {"shard-00001", "shard-00002",
                                                                              "shard-00003"}
    for processes in (1, 2):
        name = f"continued-{processes}"
        shutil.copytree(tmp_path / "killed", tmp_path / name)
        run, ranks = launch(name, processes, resume_from_checkpoint="latest", train_batch_size=1,
                            gradient_accumulation_steps=6 // processes, **more)
        assert {position for rank in ranks for position, _ in rank["prompts"]} == set(range(36, 54))
        assert_equal_runs(whole, run)


@pytest.mark.slow
def test_a_dry_run_in_two_processes_is_that_of_one(script, flags, run_warm):
    alone, two = (run_warm(script.__file__, *flags("run", dry_run=True), processes=processes,
                           ACCELERATE_USE_CPU="true") for processes in (1, 2))
    assert alone.returncode == two.returncode == 0, two.stderr[-2000:]
    assert alone.stdout == two.stdout and "estimated peak of one GPU" in alone.stdout


def test_the_weights_are_gathered_in_half_precision(load, request):
    """And kept in float32, as MixedPrecisionPolicy has it; the blocks' parts are given up after a forward."""
    request.addfinalizer(torch.distributed.destroy_process_group)
    models = load(sharding="fsdp", mixed_precision="bf16").models
    seen = []
    convolution = models.generator.mid_block.resnets[0].conv1
    convolution.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    conditioning = {"encoder_hidden_states": torch.zeros(1, 2, 16)}
    with torch.autocast("cpu", torch.bfloat16):
        models.generator(torch.zeros(1, 4, 8, 8), torch.tensor([1]), **conditioning)
    assert seen == [torch.bfloat16]
    assert convolution.weight.dtype == torch.float32 and type(convolution.weight.data).__name__ == "DTensor"
