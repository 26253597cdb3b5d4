"""Files from elsewhere are data: a pickle or a module planted where one is loaded is not executed."""

import json
import pickle
import shutil
import sys

import numpy
import pytest
import torch
from conftest import REPOSITORY, load_script
from safetensors.torch import load_file


sys.path.insert(0, str(REPOSITORY / "examples"))
MARK = "executed"


class Planted:
    """Unpickled, it writes a file into the working directory."""

    def __reduce__(self):
        return open, (MARK, "w")


def plant(path, how):
    """A file that looks like weights and holds a pickle, as torch saves it or plain."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "torch":
        torch.save({"conv_in.weight": Planted()}, path)
    else:
        path.write_bytes(pickle.dumps({"conv_in.weight": Planted()}))
    return path


@pytest.fixture(params=["torch", "plain"])
def how(request):
    return request.param


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refuse(start, tmp_path):
    with pytest.raises(SystemExit) as ending:
        start()
    assert ending.value.code == 2
    assert not (tmp_path / MARK).exists()


def with_pickle(folder, target, how):
    """A copy of a model's folder whose weights are a pickle instead."""
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        kind = {"model": "pytorch_model.bin"}.get(path.stem, f"{path.stem}.bin")
        path.unlink()
        plant(target / kind, how)
    return target


def test_a_planted_file_would_be_executed(tmp_path, how):
    path = plant(tmp_path / "x.bin", how)
    if how == "torch":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert (tmp_path / MARK).exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_parts_of_the_reference(train, tiny, tmp_path, how, part):
    shutil.copytree(tiny["pipeline"], tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / part)
    with_pickle(tiny["pipeline"] / part, tmp_path / "pipeline" / part, how)
    refuse(lambda: train(tmp_path / "run", pretrained_model_name_or_path=tmp_path / "pipeline"), tmp_path)


@pytest.mark.parametrize("flag, source", [
    ("reference_unet", "unet"), ("generator_init", "unet"), ("reward_model_name_or_path", "clip"),
    ("reward_vae", "pipeline/vae"), ("pretrained_vae_model_name_or_path", "pipeline/vae")])
def test_models_of_flags(train, tiny, tmp_path, how, flag, source):
    kind, _, part = source.partition("/")
    folder = with_pickle(tiny[kind] / part, tmp_path / "model", how)
    refuse(lambda: train(tmp_path / "run", **{flag: folder}), tmp_path)


@pytest.mark.parametrize("name", ["unet.bin", "unet.pt", "unet.pth", "unet.safetensors",
                                  "lora/pytorch_lora_weights.safetensors", "lora/pytorch_lora_weights.bin"])
def test_weights_files_of_the_generator(train, tmp_path, how, name):
    path = plant(tmp_path / name, how)
    refuse(lambda: train(tmp_path / "run", generator_init=path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["trainer.pt", "generator.safetensors", "state.json"])
def test_a_checkpoint(train, tmp_path, how, file):
    out = train(tmp_path / "run", max_train_steps=1)
    state = json.loads((out / "checkpoint-1" / "state.json").read_text())
    path = plant(out / "checkpoint-1" / file, how)
    if file != "state.json":
        state["files"][file] = path.stat().st_size
        (out / "checkpoint-1" / "state.json").write_text(json.dumps(state))
    refuse(lambda: train(out, max_train_steps=2, resume_from_checkpoint="latest"), tmp_path)


@pytest.mark.parametrize("name", ["hpsv2.1", "hpsv2.0", "imagereward", "clip", "aesthetic"])
def test_rewards(train, tiny, tmp_path, how, name):
    path = plant(tmp_path / "weights.pt", how)
    if name == "clip":
        path = with_pickle(tiny["clip"], tmp_path / "clip", how)
    refuse(lambda: train(tmp_path / "run", reward=f"{name}:{path}=1"), tmp_path)


@pytest.mark.parametrize("name", ["prompts.parquet", "prompts.jsonl", "prompts.csv"])
def test_prompts(train, tmp_path, how, name):
    refuse(lambda: train(tmp_path / "run", prompts_file=plant(tmp_path / name, how)), tmp_path)


@pytest.mark.parametrize("name", ["train.pkl", "train.pickle", "train.parquet", "train.arrow", "data.py"])
def test_a_dataset(train, tmp_path, how, name):
    if name == "data.py":
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / name).write_text(f"open({MARK!r}, 'w')")
    else:
        plant(tmp_path / "data" / name, how)
    refuse(lambda: train(tmp_path / "run", prompts_file=None, dataset_name=tmp_path / "data"), tmp_path)


@pytest.fixture
def evaluate(tiny, tmp_path):
    """Run the evaluation of a tiny pipeline; keyword arguments change and add."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    evaluation = load_script("eval_benchmarks")

    def run(**more):
        given = {"benchmark": "prompts", "prompts_file": tmp_path / "prompts.txt",
                 "output_dir": tmp_path / "out", "scores": f"pickscore:{tiny['clip']}",
                 "num_inference_steps": 1, "resolution": 16,
                 "pretrained_model_name_or_path": tiny["pipeline"]} | more
        evaluation.main(evaluation.parse_args([f"--{name}={value}" for name, value in given.items()]))
    return run


@pytest.mark.parametrize("flag", ["unet", "lora", "inception"])
def test_files_of_the_evaluation(evaluate, tmp_path, how, flag):
    more = {"fid_real": tmp_path} if flag == "inception" else {}
    refuse(lambda: evaluate(**{flag: plant(tmp_path / "weights.bin", how)}, **more), tmp_path)


@pytest.mark.parametrize("score", [  # the package makes the whole model before it reads the file
    pytest.param("official:hpsv2.1", marks=pytest.mark.slow), "official:imagereward", "imagereward",
    "aesthetic"])
def test_scorers_of_the_evaluation(evaluate, tmp_path, how, score):
    place = plant(tmp_path / "models" / "ImageReward.pt", how)
    (tmp_path / "models" / "med_config.json").write_text("{}")
    place = place.parent if score == "official:imagereward" else place
    refuse(lambda: evaluate(scores=f"{score}:{place}"), tmp_path)


def test_the_statistics_of_real_images(evaluate, tmp_path):
    class Means(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3))
    torch.jit.trace(Means(), torch.zeros(2, 3, 299, 299)).save(tmp_path / "extractor.pt")
    numpy.savez(tmp_path / "real.npz", mu=numpy.array([Planted()], dtype=object), sigma=numpy.eye(3))
    refuse(lambda: evaluate(fid_real=tmp_path / "real.npz", inception=tmp_path / "extractor.pt"), tmp_path)


@pytest.mark.parametrize("program", ["eval", "generate"])
@pytest.mark.parametrize("where", ["pipeline", "part", "weights"])
def test_a_pipeline_with_code_of_its_own(evaluate, tiny, tmp_path, program, where):
    folder = tmp_path / "foreign"
    shutil.copytree(tiny["pipeline"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    code = f"open({MARK!r}, 'w')\n"
    if where == "pipeline":
        index["_class_name"] = ["pipeline", "Foreign"]
        (folder / "pipeline.py").write_text(code)
    if where == "part":
        index["unet"] = ["foreign", "Foreign"]
        (folder / "unet" / "foreign.py").write_text(code)
    if where == "weights":
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        plant(folder / "unet" / "diffusion_pytorch_model.bin", "torch")
    (folder / "model_index.json").write_text(json.dumps(index))
    if program == "eval":
        refuse(lambda: evaluate(pretrained_model_name_or_path=folder), tmp_path)
    else:
        import generate

        given = [f"--pretrained_model_name_or_path={folder}", "--prompts=a cat", "--timestep=999"]
        refuse(lambda: generate.main(generate.parse_args(given)), tmp_path)


def test_what_a_run_writes_is_read_without_pickles(train, tmp_path):
    """Weights are safetensors, the trainer's state loads with `weights_only`."""
    out = train(tmp_path / "run", use_ema=True, validation_prompts=["a cat"])
    kinds = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert kinds - {".txt"} == {".json", ".jsonl", ".safetensors", ".pt", ".md", ".png"}
    assert [path.name for path in out.rglob("*.pt")] == ["trainer.pt"]
    assert torch.load(out / "checkpoint-2" / "trainer.pt", weights_only=True)
    assert all(load_file(path) for path in out.rglob("*.safetensors"))
