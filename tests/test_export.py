"""Exporting a checkpoint: what the run itself exports, to the bit, from a folder that is only read."""

import hashlib
import importlib
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import LORA_FILE, REPOSITORY, assert_same, write_state
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file


sys.path.insert(0, str(REPOSITORY / "examples"))
export, generate = map(importlib.import_module, ("export", "generate"))
LORA = {"generator_lora_rank": 2, "assistant_lora_rank": 2, "generator_init": "reference"}
SHARED = LORA | {"shared_base": True}
STEPS = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-2}
BF16 = {"mixed_precision": "bf16"}


def export_checkpoint(run, step, folder, *more):
    """Export a checkpoint in this process; returns the folder."""
    given = [f"--checkpoint={run / f'checkpoint-{step}'}", f"--output_dir={folder}"]
    export.main(export.parse_args([*given, *more]))
    return folder


def hashes(folder):
    """{path: (digest, time of the last change)} of all files of a folder."""
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


def exported(folder):
    """{path: content} of the exported files in a folder; safetensors as their tensors and metadata."""
    found = {}
    for path in filter(lambda path: path.is_file(), folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith("checkpoint-") or name in ("args.json", "metrics.jsonl"):
            continue
        found[name] = path.read_bytes()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found[name] = [load_file(path), file.metadata()]
    return found


def weights(folder):
    """The weights of an exported network."""
    (path,) = [*folder.glob("unet/*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return load_file(path)


def differ(one, other):
    assert one.keys() == other.keys()
    return any(not torch.equal(one[name], other[name]) for name in one)


def image_of_card(folder, monkeypatch, block=0):
    """Run a Python block of a card and return the pixels of its image."""
    block = (folder / "README.md").read_text().split("```python\n")[block + 1].partition("```")[0]
    monkeypatch.chdir(folder.parent)
    torch.manual_seed(0)
    exec(block, {})
    return numpy.asarray(Image.open("image.png")).astype(int)


# ----------------------------------------------------------------------------------- what is exported


@pytest.mark.parametrize("family, more", [
    ("sd15", SHARED | {"use_ema": True}), ("sdxl", {"use_ema": True} | BF16),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("sd15", {"use_ema": True}), ("sd15", SHARED | BF16), ("sd3", {"use_ema": True} | BF16), ("sd15", {}),
        ("sdxl", LORA), ("sd3", SHARED), ("pixart", {"use_ema": True}), ("pixart", LORA),
        ("flux2_klein", {}), ("flux2_klein", LORA | {"shared_base": "assistant"} | BF16)))])
def test_the_last_checkpoint_gives_what_the_run_exported(train, tmp_path, family, more):
    """Weights, LoRA, configurations and card; an earlier one gives other weights. The run is untouched."""
    timestep = {"pixart": 400, "sd3": 1000, "flux2_klein": 1000}.get(family, 999)
    run = train(tmp_path / "run", **STEPS | {"generator_timesteps": timestep} | more)
    before = hashes(run)
    last = export_checkpoint(run, 2, tmp_path / "last" / "run")
    earlier = export_checkpoint(run, 1, tmp_path / "earlier")
    assert hashes(run) == before
    assert_same(exported(last), exported(run))
    assert "for 1 updates on 13 prompts" in (earlier / "README.md").read_text()
    assert differ(weights(last), weights(earlier))
    if "generator_lora_rank" in more:
        assert differ(*(load_file(folder / LORA_FILE) for folder in (last, earlier)))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"sharding": "fsdp"}], ids=["whole", "sharded"])
def test_the_average_is_exported_unless_the_raw_weights_are_asked_for(train, tmp_path, more):
    run = train(tmp_path / "run", **STEPS | more, use_ema=True)
    averaged = weights(export_checkpoint(run, 2, tmp_path / "averaged"))
    raw = weights(export_checkpoint(run, 2, tmp_path / "raw", "--non_ema"))
    assert_same(averaged, weights(run))
    assert differ(raw, averaged)
    if not more:
        assert_same(raw, load_file(run / "checkpoint-2" / "generator.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl"])
@pytest.mark.parametrize("use_ema", [True, False])
def test_a_run_sharded_over_processes_is_exported_by_one(script, flags, run_warm, tmp_path, use_ema):
    """Three processes leave some without a part of the smallest tensors."""
    ran = run_warm(script.__file__, *flags("run", **STEPS, sharding="fsdp", use_ema=use_ema), processes=3,
                   ACCELERATE_USE_CPU="true")
    assert ran.returncode == 0, ran.stderr[-3000:]
    run, before = tmp_path / "run", hashes(tmp_path / "run")
    assert not (run / "checkpoint-2" / "generator.safetensors").exists()
    last, earlier = (export_checkpoint(run, step, tmp_path / str(step) / "run") for step in (2, 1))
    assert_same(exported(last), exported(run))
    assert differ(weights(last), weights(earlier)) and hashes(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("family, more", [("sdxl", {"use_ema": True}), ("sd15", LORA)])
def test_dtype_and_variant_are_those_of_all_files(train, tmp_path, monkeypatch, family, more):
    run = train(tmp_path / "run", **STEPS | more)
    folder = export_checkpoint(run, 2, tmp_path / "half", "--dtype=float16", "--variant=fp16")
    files = {path.relative_to(folder) for path in folder.glob("*/*.safetensors")}
    assert {path.parent.name for path in files} >= {"unet", "vae", "text_encoder"}
    assert len({path.stat().st_mode for path in folder.rglob("*") if path.is_file()}) == 1
    for path in files:
        whole = load_file(run / path.parent / path.name.replace(".fp16", ""))
        assert path.name.endswith(".fp16.safetensors")
        assert_same(load_file(folder / path), {name: value.half() for name, value in whole.items()})
    if "generator_lora_rank" in more:
        lora, half = load_file(run / LORA_FILE), load_file(folder / LORA_FILE)
        assert_same(half, {name: value.half() for name, value in lora.items()})
    image = image_of_card(folder, monkeypatch)
    assert numpy.abs(image - image_of_card(run, monkeypatch)).max() <= 4


@pytest.mark.parametrize("family, more", [
    ("sd15", SHARED), pytest.param("sd3", LORA | {"generator_timesteps": 1000}, marks=pytest.mark.slow)])
def test_the_lora_alone_generates_on_its_reference_as_the_card_says(train, tiny, tmp_path, monkeypatch, more):
    run = train(tmp_path / "run", **STEPS | more)
    folder = export_checkpoint(run, 2, tmp_path / "lora", "--lora_only")
    named = ["pytorch_lora_weights_kohya.safetensors"] if "shared_base" in more else []
    assert {path.name for path in folder.iterdir()} == {"README.md", "scheduler", LORA_FILE, *named}
    for name in (LORA_FILE, *named):
        assert_same(load_file(folder / name), load_file(run / name))
    shutil.copytree(tiny["pipeline"], tmp_path / tiny["pipeline"].name)
    image = image_of_card(folder, monkeypatch)
    assert numpy.abs(image - image_of_card(run, monkeypatch)).max() <= 1
    assert (image == image_of_card(run, monkeypatch, block=1)).all(), "the run's own card says it too"


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_other_programs_read_the_lora_in_their_naming(train, tiny, tmp_path):
    """kohya's file, converted back by the library, is the same LoRA, with its alpha."""
    run = train(tmp_path / "run", **STEPS | LORA, lora_alpha=7, lora_layers="to_k,to_out.0,conv1")
    held = load_file(run / "pytorch_lora_weights_kohya.safetensors")
    assert all(name.startswith("lora_unet_") for name in held) and not any("lora_A" in name for name in held)
    assert {value.item() for name, value in held.items() if name.endswith(".alpha")} == {7}
    outputs = []
    for name in (LORA_FILE, "pytorch_lora_weights_kohya.safetensors"):
        pipeline = DiffusionPipeline.from_pretrained(tiny["pipeline"])
        pipeline.load_lora_weights(run, weight_name=name)
        pipeline.fuse_lora()
        outputs.append({key: value for key, value in pipeline.unet.state_dict().items() if "lora" not in key})
    assert outputs[0].keys() == outputs[1].keys()
    for key, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("more", [[], pytest.param(["--unet"], marks=pytest.mark.slow)])
def test_the_example_generates_with_a_lora_on_its_base(train, tiny, tmp_path, more):
    """As the run's own pipeline does, from the start that is given beside it."""
    started = {"generator_init": tiny["unet"]} if more else {}
    run = train(tmp_path / "run", **STEPS | LORA | started)
    base = [f"--pretrained_model_name_or_path={tiny['pipeline']}", f"--lora={run}",
            *(f"{flag}={tiny['unet']}" for flag in more)]
    images = []
    for number, given in enumerate((base, [f"--pretrained_model_name_or_path={run}"], base[:1])):
        flags = [] if number < 2 else ["--timesteps=999", "--resolution=16"]
        generate.main(generate.parse_args([*given, *flags, "--prompts=a cat", "--num_images_per_prompt=2",
                                           "--grid", f"--output_dir={tmp_path / str(number)}"]))
        images.append(numpy.asarray(Image.open(tmp_path / str(number) / "grid.png")).astype(int))
    assert abs(images[0] - images[1]).max() <= 1 < abs(images[0] - images[2]).max()


NAMED = ["# The run started from somebody/a: load its unet into the pipeline first."]


@pytest.mark.parametrize("start, reference, lines", [
    ("reference", None, []), ("somebody/a", "somebody/b", NAMED), ("reference", "somebody/a", NAMED),
    ("somebody/dmd/weights.bin", None, [
        "path = hf_hub_download('somebody/dmd', 'weights.bin')",
        "pipeline.unet.load_state_dict(torch.load(path, weights_only=True))"]),
    ("somebody/dmd/lora.safetensors", None, []), ("somebody/dmd/lora.safetensors", "somebody/a", NAMED)])
def test_the_card_of_a_lora_says_on_what_it_was_trained(script, monkeypatch, tmp_path, start, reference,
                                                        lines):
    """A LoRA that the training started from is in the one that it ended with, its reference is not."""
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / "weights.bin")
    save_file({"unet.to_k.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    lora = script.load_extra("lora", "a test")
    monkeypatch.setattr(lora, "hf_hub_download", lambda name, file: tmp_path / file)
    args = SimpleNamespace(generator_init=start, reference_unet=reference)
    assert lora.start_code(args, script.FAMILY, str)[1] == lines


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl"])
def test_the_example_generates_with_what_was_exported(train, run_warm, tmp_path):
    """Exported as a user does it, in a process of its own, from models that have moved since the run."""
    def call(tool, *given):
        ran = run_warm(REPOSITORY / "examples" / tool, *given)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout

    run = train(tmp_path / "run", **STEPS)
    said = call("export.py", "--checkpoint=run/checkpoint-1", "--output_dir=out", "--dtype=bfloat16")
    assert said == "the generator of step 1, its raw weights, is in out\n"
    call("generate.py", "--pretrained_model_name_or_path=out", "--prompts=a cat", "--output_dir=images")
    assert Image.open(tmp_path / "images" / "00000.png").size == (16, 16)
    assert run.exists()


def test_models_may_have_moved_and_prompts_be_gone(train, tiny, tmp_path):
    models = shutil.copytree(tiny["pipeline"], tmp_path / "models")
    prompts = shutil.copy(tiny["prompts"], tmp_path / "prompts.txt")
    run = train(tmp_path / "run", **STEPS, pretrained_model_name_or_path=models, prompts_file=prompts)
    models.rename(tmp_path / "moved")
    (tmp_path / "prompts.txt").write_text("others\n")
    folder = export_checkpoint(run, 2, tmp_path / "out", f"--pretrained_model_name_or_path={tmp_path}/moved")
    assert_same(weights(folder), weights(run))
    assert "for 2 updates on 13 prompts and no images" in (folder / "README.md").read_text()


# -------------------------------------------------------------------------------------- what is refused


def rewrite(path, args=(), **changes):
    """Change entries of a state.json, and flags among its args."""
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | changes | {"args": state["args"] | dict(args)}))


@pytest.fixture
def checkpoint(script, flags, tmp_path):
    """A checkpoint's folder as far as it is read before a model loads."""
    def build(**more):
        folder = tmp_path / "run" / "checkpoint-1"
        args = script.parse_args(script.FAMILY, flags(tmp_path / "run", **more))
        write_state(script, folder, args, files={"generator.safetensors": 5}, later={"unknown": 1})
        (folder / "generator.safetensors").write_bytes(b"12345")
        (tmp_path / "run" / "args.json").write_text("{}")
        return folder
    return build


@pytest.fixture
def refused(capfd, tmp_path, monkeypatch):
    """Export and return the one line that it ends with; no model was loaded and nothing was written."""
    def run(*given):
        before = hashes(tmp_path)
        with pytest.raises(SystemExit) as ending, monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "__init__", None)
            export.main(export.parse_args([
                f"--checkpoint={tmp_path}/run/checkpoint-1", f"--output_dir={tmp_path}/out", *given]))
        (line,) = capfd.readouterr().err.splitlines()
        assert ending.value.code == 2 and line.startswith("error: ")
        assert hashes(tmp_path) == before and not (tmp_path / "new").exists()
        return line
    return run


@pytest.mark.parametrize("given, words", [
    ("--checkpoint={out}/absent", "absent is not a complete checkpoint"),
    ("--checkpoint={out}/run", "state.json"),
    ("--output_dir={out}", "it is not empty; choose another folder"),
    ("--output_dir={out}/run/checkpoint-1/new", "it lies inside the run"),
    ("--output_dir={out}/run/new", "it lies inside the run"),
    ("--output_dir={out}/run/args.json", "is a file"),
    ("--output_dir={out}/run/args.json/new", "is a file"),
    ("--lora_only", "trained no LoRA; leave the flag out"),
    ("--variant=../fp16", "--variant ../fp16"),
    ("--dtype=int8", "--dtype"), ("--family=other", "--family"),
    ("--family=sdxl", "is no Stable Diffusion XL network"),
    ("--pretrained_model_name_or_path={out}", "--pretrained_model_name_or_path {out} is not a pipeline"),
    ("--pretrained_model_name_or_path=", "is empty"),
    ("", "checkpoint-1 is damaged")])
def test_bad_input_is_one_line_before_a_model_loads(checkpoint, refused, tmp_path, given, words):
    checkpoint()
    assert words.format(out=tmp_path) in refused(*([given.format(out=tmp_path)] if given else []))


@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "generator.safetensors").write_bytes(b"1234"), "generator.safetensors is cut"),
    (lambda folder: (folder / "generator.safetensors").unlink(), "generator.safetensors"),
    (lambda folder: (folder / "state.json").unlink(), "state.json"),
    (lambda folder: rewrite(folder / "state.json", digests={"generator.safetensors": "another"}),
     "the bytes of generator.safetensors have changed"),
    (lambda folder: (folder / "state.json").write_text("{"), "is not a complete checkpoint"),
    (lambda folder: (folder / "state.json").write_text("[]"), "is not a complete checkpoint"),
    (lambda folder: (folder / "state.json").write_text('{"files": {}}'), "is not a complete checkpoint")])
def test_a_damaged_checkpoint_is_refused(checkpoint, refused, damage, words):
    damage(checkpoint())
    assert words in refused() and "take another" in refused()


def test_a_lora_run_whose_precision_is_unknown_must_be_told(checkpoint, refused):
    rewrite(checkpoint(**LORA) / "state.json", {"mixed_precision": None})
    assert "--mixed_precision: give no or bf16" in refused()


@pytest.mark.parametrize("family", ["pixart"])
def test_a_pipeline_that_loads_no_lora_is_not_left_with_one_alone(checkpoint, refused):
    checkpoint(**LORA, generator_timesteps=400)
    assert "--lora_only: PixArtAlphaPipeline cannot load a LoRA" in refused("--lora_only")


def test_a_missing_extra_is_named(checkpoint, refused, script, monkeypatch, tmp_path):
    checkpoint(**LORA)
    monkeypatch.setattr(script, "extra_path", lambda name: tmp_path / "utils" / f"{name}.py")
    assert re.search(r"needs? utils/lora.py", refused())


def test_two_families_of_one_pipeline_need_the_flag(checkpoint, refused, script, monkeypatch):
    checkpoint()
    monkeypatch.setattr(importlib.import_module("train_diff_instruct_star_sdxl").FAMILY, "pipeline_class",
                        script.FAMILY.pipeline_class, raising=False)
    assert "--family: 2 families have the pipeline StableDiffusionPipeline" in refused()


def test_weights_of_another_network_are_named(train, tiny, tmp_path, capsys):
    run = train(tmp_path / "run", **STEPS | LORA | {"lora_layers": "to_q"})
    rewrite(run / "checkpoint-2" / "state.json", {"lora_layers": "to_k"})
    with pytest.raises(SystemExit):
        export_checkpoint(run, 2, tmp_path / "out")
    assert "checkpoint-2 does not fit the models of the run's flags" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
