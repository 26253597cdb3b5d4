"""Exports as others read them: the index of the real pipelines, and the other supported set of packages."""

import json
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import REPOSITORY, tiny_t5


# The model_index.json of the real pipelines, and what training changes in it.
SCHEDULER = {"sd15": "PNDMScheduler", "sdxl": "EulerDiscreteScheduler",
             "pixart": "DPMSolverMultistepScheduler", "sd3": "FlowMatchEulerDiscreteScheduler",
             "flux2_klein": "FlowMatchEulerDiscreteScheduler"}
CLIP = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"]}
PROJECTED = ["transformers", "CLIPTextModelWithProjection"]
INDEX = {
    "sd15": {"_class_name": "StableDiffusionPipeline", **CLIP,
             "unet": ["diffusers", "UNet2DConditionModel"],
             "feature_extractor": ["transformers", "CLIPImageProcessor"],
             "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]},
    "sdxl": {"_class_name": "StableDiffusionXLPipeline", **CLIP,
             "unet": ["diffusers", "UNet2DConditionModel"],
             "text_encoder_2": PROJECTED, "tokenizer_2": ["transformers", "CLIPTokenizer"],
             "force_zeros_for_empty_prompt": True, "add_watermarker": None},
    "sd3": {"_class_name": "StableDiffusion3Pipeline", **CLIP, "text_encoder": PROJECTED,
            "text_encoder_2": PROJECTED, "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "text_encoder_3": ["transformers", "T5EncoderModel"],
            "tokenizer_3": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "SD3Transformer2DModel"]},
    "pixart": {"_class_name": "PixArtAlphaPipeline", "text_encoder": ["transformers", "T5EncoderModel"],
               "tokenizer": ["transformers", "T5Tokenizer"], "vae": ["diffusers", "AutoencoderKL"],
               "transformer": ["diffusers", "Transformer2DModel"]},
    "flux2_klein": {"_class_name": "Flux2KleinPipeline", "text_encoder": ["transformers", "Qwen3ForCausalLM"],
                    "tokenizer": ["transformers", "Qwen2TokenizerFast"], "is_distilled": True,
                    "transformer": ["diffusers", "Flux2Transformer2DModel"],
                    "vae": ["diffusers", "AutoencoderKLFlux2"]}}
CHANGED = {"sd15": {"scheduler": ["diffusers", "LCMScheduler"], "feature_extractor": [None, None],
                    "safety_checker": [None, None]},
           "sdxl": {"scheduler": ["diffusers", "LCMScheduler"]},
           "pixart": {"scheduler": ["diffusers", "LCMScheduler"],
                      "transformer": ["diffusers", "PixArtTransformer2DModel"]}}  # the class's newer name
FAMILIES = ["sdxl", "pixart", *(pytest.param(name, marks=pytest.mark.slow)
                               for name in ("sd15", "sd3", "flux2_klein"))]


@pytest.fixture
def real(family, tiny, tmp_path):
    """The family's tiny pipeline with the real one's index, as release 4 of transformers wrote it."""
    place = shutil.copytree(tiny["pipeline"], tmp_path / "real")
    if family == "sd3":
        from transformers import T5Config, T5EncoderModel

        _, tokenizer = tiny_t5(place / "tokenizer_3")
        torch.manual_seed(5)
        T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=40, d_kv=8, d_ff=16, num_layers=1,
                                num_heads=2, pad_token_id=0, eos_token_id=1)).save_pretrained(
            place / "text_encoder_3")
    if CLIP["tokenizer"] in INDEX[family].values():
        for name in ("tokenizer", "tokenizer_2"):
            for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
                if (place / name).exists():
                    shutil.copy(tiny["clip"] / file, place / name / file)
    index = INDEX[family] | {"scheduler": ["diffusers", SCHEDULER[family]]}
    (place / "model_index.json").write_text(json.dumps(index))
    return place


@pytest.fixture
def exported(family, train, real, tmp_path):
    return train(tmp_path / "run", pretrained_model_name_or_path=real, max_train_steps=1,
                 generator_init="reference", resolution=32 if family == "flux2_klein" else 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_index_is_the_real_one_but_for_what_training_changes(family, exported):
    index = json.loads((exported / "model_index.json").read_text())
    expected = INDEX[family] | {"scheduler": ["diffusers", SCHEDULER[family]]} | CHANGED.get(family, {})
    assert {name: index.get(name) for name in expected} == expected
    for name in index.keys() - expected:  # newer releases of diffusers add optional parts
        assert index[name] in ([None, None], False) or name.startswith("_"), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizers_are_the_references_own_to_the_byte(exported, real):
    for folder in real.glob("tokenizer*"):
        for path in folder.iterdir():
            assert (exported / folder.name / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", ["sd15"])
def test_a_read_only_reference_leaves_no_read_only_export(train, real, tmp_path):
    for path in (real / "tokenizer", *(real / "tokenizer").iterdir()):
        path.chmod(0o555)
    out = train(tmp_path / "run", pretrained_model_name_or_path=real, max_train_steps=1)
    for path in (out / "tokenizer", *(out / "tokenizer").iterdir()):
        assert path.stat().st_mode & 0o200, path


@pytest.mark.parametrize("family", ["sd15"])
def test_a_reference_without_a_slow_tokenizer_gets_its_files(train, tiny, tmp_path):
    """Release 5 of transformers saves the first two; the slow tokenizer of release 4 reads the others."""
    from transformers import CLIPTokenizer

    names = {path.name for path in (tiny["pipeline"] / "tokenizer").iterdir()}
    out = train(tmp_path / "run", max_train_steps=1)
    assert {path.name for path in (out / "tokenizer").iterdir()} >= names | {"vocab.json", "merges.txt"}
    (out / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    words = "a cat, 42!"
    assert CLIPTokenizer.from_pretrained(out / "tokenizer")(words) == CLIPTokenizer.from_pretrained(
        tiny["pipeline"] / "tokenizer")(words)


# Loads a pipeline offline and saves its image from given latents; each set runs it.
RUN = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, sys.argv[1])
import numpy, torch
from utils import cli
pipeline = cli.load_pipeline(sys.argv[2])
call = cli.steps_at(pipeline, [int(sys.argv[4])])
image = pipeline("a cat and 42 dogs", latents=torch.load(sys.argv[3], weights_only=True), guidance_scale=0,
                 height=16, width=16, output_type="np", **call).images
numpy.save(sys.argv[5], image)
"""


@pytest.mark.parity
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "pixart"])
def test_the_other_set_generates_what_this_one_does_from_an_export_of_this_one(family, exported, tmp_path):
    other = {".venv": ".venv-official", ".venv-official": ".venv"}[sys.prefix.rpartition("/")[2]]
    python = REPOSITORY / other / "bin" / "python"
    timestep = json.loads((exported / "args.json").read_text())["generator_timesteps"][0]
    network = next(part for part in ("unet", "transformer") if (exported / part).exists())
    channels = json.loads((exported / network / "config.json").read_text())["in_channels"]
    torch.save(torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(1)), tmp_path / "z.pt")
    images = []
    for number, executable in enumerate((sys.executable, python)):
        ran = subprocess.run([executable, "-c", RUN, REPOSITORY, exported, tmp_path / "z.pt",
                              str(int(timestep)), tmp_path / f"{number}.npy"], capture_output=True, text=True,
                             cwd=tmp_path, timeout=300)
        assert ran.returncode == 0, ran.stderr[-3000:]
        images.append(numpy.load(tmp_path / f"{number}.npy"))
    assert images[0].std() > 0 and abs(images[0] - images[1]).max() <= 1e-4
