"""Families of examples/families: whole runs on tiny models, and what stock diffusers makes of the result."""

import contextlib
import importlib
import re
import shutil
import sys
from types import SimpleNamespace

import diffusers
import diffusers.schedulers.scheduling_lcm as lcm
import numpy
import pytest
import torch
from conftest import REPOSITORY, assert_same, load_script, metrics, tiny_t5
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

import eval_benchmarks
from utils import cli


sys.path.insert(0, str(REPOSITORY / "examples"))
generate = importlib.import_module("generate")

FAMILIES = ["sd3", pytest.param("flux2_klein", marks=pytest.mark.slow), "pixart"]
STEPS = {"sd3": [1000, 900, 750.5, 500], "flux2_klein": [1000, 967.38, 908.14, 767.19],
         "pixart": [400, 300, 200, 100]}
LORA = {"generator_lora_rank": 2, "assistant_lora_rank": 2, "shared_base": True}
each_family = pytest.mark.parametrize("family", FAMILIES)


def weights_of(out, script):
    return load_file(out / script.FAMILY.network_name / "diffusion_pytorch_model.safetensors")


@each_family
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_the_stock_pipeline_generates_what_training_did(script, family, train, tiny, tmp_path, monkeypatch,
                                                        steps, more):
    timesteps = STEPS[family][:steps]
    out = train(tmp_path / "run", resolution=32 if family == "flux2_klein" else 16,
                generator_timesteps=timesteps, use_ema=True, max_train_steps=3,
                validation_prompts=["a cat"], num_validation_images=2, **more)
    words = re.search(r"^pipeline = .*$", (out / "README.md").read_text(), re.MULTILINE)[0]
    pipeline = eval(words.partition("= ")[2].replace("'run'", repr(str(out))), vars(diffusers))
    network, size = getattr(pipeline, script.FAMILY.network_name), 32 if family == "flux2_klein" else 16
    process_class = script.FAMILY.process_class
    z, *_ = script.sample_noise(0, "validation", 0, range(2), (network.config.in_channels, 8, 8),
                                script.Method(), process_class, "cpu", steps)
    noises = iter(z[:, 1:].unbind(1))
    monkeypatch.setattr(lcm, "randn_tensor", lambda *_, **__: next(noises))
    call = cli.steps_at(pipeline, timesteps)
    said = re.search(r"pipeline\((prompt=.*?)\)\.images", (out / "README.md").read_text(), re.DOTALL)[1]
    assert eval(f"dict({said})") == call | {
        "prompt": "a cat", "guidance_scale": 0, "height": size, "width": size}, "what the card says"
    latents = pipeline(prompt=["a cat"] * 2, latents=z[:, 0], height=size, width=size, guidance_scale=0,
                       output_type="latent", **call).images
    if "sigmas" in call:
        assert pipeline.scheduler.sigmas.tolist() == pytest.approx([*call["sigmas"], 0], abs=1e-7)
    given = [] if process_class.fractional_timesteps else [pipeline.scheduler.alphas_cumprod, "epsilon"]
    with torch.no_grad():
        conditioning = script.FAMILY.encode_prompts(pipeline, ["a cat"] * 2, size)
        x0 = script.generate(network, script.FAMILY, process_class(*given), z, timesteps, conditioning)
        if family == "flux2_klein":
            x0 = load_script("train_diff_instruct_star_flux2_klein").unpack(pipeline.vae, x0)
    assert (latents - x0).norm() < 1e-6 * x0.norm()
    moved = weights_of(out, script)
    start = load_file(tiny["pipeline"] / script.FAMILY.network_name / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(moved[key], start[key]) for key in start)
    first, last = [line for line in metrics(out) if "validation_reward" in line]
    assert first["validation_reward"] != last["validation_reward"] and metrics(out)[1]["grad_divergence"] > 0


@pytest.mark.slow
@each_family
def test_a_run_resumes_to_the_bit(script, family, train, tmp_path):
    more = {"generator_timesteps": STEPS[family], "resolution": 32 if family == "flux2_klein" else 16,
            "use_ema": True, "max_train_steps": 4, "checkpointing_steps": 2}
    whole = train(tmp_path / "whole", **more)
    train(tmp_path / "cut", **more | {"max_train_steps": 2})
    cut = train(tmp_path / "cut", **more, resume_from_checkpoint="latest")
    assert_same(weights_of(whole, script), weights_of(cut, script))


@each_family
def test_a_tokenizer_that_lacks_its_files_is_refused(family, train, tiny, tmp_path, capfd):
    """transformers makes one up, without a vocabulary or a chat template."""
    place = shutil.copytree(tiny["pipeline"], tmp_path / "place")
    for file in (place / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json" and (family != "flux2_klein" or "chat" in file.name):
            file.unlink()
    with pytest.raises(SystemExit):
        train(tmp_path / "run", pretrained_model_name_or_path=place, resolution=32)
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "place" in line


@each_family
def test_a_resolution_that_the_network_cannot_draw_is_refused(family, train, tmp_path, capfd):
    wrong = {24: "divisible by 16"} | ({144: "above 128"} if family == "sd3" else {})
    for resolution, words in wrong.items():
        with pytest.raises(SystemExit):
            train(tmp_path / "run", resolution=resolution)
        assert f"--resolution {resolution} is" in (line := capfd.readouterr().err) and words in line


# What is read of a prompt by each family's text encoders, and with T5 by SD3's: {family: (the flag's default
# or None, the part that takes the flag, its tokenizer, the tokens of the pipeline's other encoder, those of
# the chat template, "user: ")}.
READS = {"sd15": (None, None, "tokenizer", 16, 0), "sdxl": (None, None, "tokenizer", 16, 0),
         "sd3": (256, None, "tokenizer", 16, 0), "sd3 with T5": (256, "text_encoder_3", "tokenizer_3", 16, 0),
         "pixart": (120, "text_encoder", "tokenizer", 0, 0),
         "flux2_klein": (512, "text_encoder", "tokenizer", 0, 6)}
each_reader, each_with_the_flag = (pytest.mark.parametrize("reader, family", [
    pytest.param(reader, reader.split()[0], marks=[pytest.mark.slow] * (reader == "flux2_klein"))
    for reader, (default, *_) in READS.items() if default or every]) for every in (True, False))


@pytest.fixture
def reads(reader, family, tiny, tmp_path):
    """What `READS` has of a pipeline, and the flags that choose it."""
    place = tiny["pipeline"]
    if "T5" in reader:
        from transformers import T5Config, T5EncoderModel

        place, (_, tokenizer) = tmp_path / "with_t5", tiny_t5(tmp_path / "spiece")
        torch.manual_seed(5)
        encoder = T5EncoderModel(T5Config(
            vocab_size=len(tokenizer), d_model=40, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
            eos_token_id=1))
        diffusers.StableDiffusion3Pipeline.from_pretrained(
            tiny["pipeline"], text_encoder_3=encoder, tokenizer_3=tokenizer).save_pretrained(place)
    more = {"pretrained_model_name_or_path": place, "resolution": 32 if family == "flux2_klein" else 16}
    return *READS[reader], more


@each_reader
def test_the_limit_of_a_prompt_is_that_of_the_encoder_which_reads_most(script, load, reads):
    default, encoder, tokenizer, other, template, more = reads
    flags = [{}] if default is None else [{}, {"max_sequence_length": 7}]
    assert [*script.FAMILY.flags] == [*flags[-1]]
    for given in flags:
        models = load(**more, **given).models
        held = {name: models.encoding[name] for name in script.FAMILY.flags}
        found, limit = script.FAMILY.prompt_limit(models.pipeline, **held)
        assert found is getattr(models.pipeline, tokenizer)
        assert limit == (given.get("max_sequence_length", default) - template if encoder else other)


@each_with_the_flag
def test_max_sequence_length_reaches_the_text_encoder(script, load, reads):
    """The network's conditioning has so many tokens, for the null prompt, too."""
    default, encoder, _, other, _, more = reads
    for length in (default, 7):
        models = load(**more, max_sequence_length=length).models
        seen = []
        if encoder:
            getattr(models.pipeline, encoder).register_forward_pre_hook(
                lambda _, given, named: seen.append((*given, *named.values())[0].shape[1]), with_kwargs=True)
        for conditioning in script.encode(models, ["a cat", "a dog " * 9], null=True):
            assert conditioning["encoder_hidden_states"].shape[:2] == (2, other + length)
        assert {*seen} == ({length} if encoder else set())


@each_reader
def test_prompts_beyond_the_limit_are_said(script, load, reads, capsys):
    """Each letter is a token of T5 and of the language model; of the tiny CLIP, too."""
    default, encoder, _, other, template, more = reads
    prompts = ["x" * 3, "x" * 13, "x" * 200, "x" * 300, "x" * 600]
    for length in (None, 100)[:1 if default is None else 2]:
        held = load(**more, **{"max_sequence_length": length} if length else {})
        capsys.readouterr()
        script.warn_of_long_prompts(SimpleNamespace(
            args=held.args, models=held.models, prompts=script.Prompts(prompts, 0),
            accelerator=held.accelerator))
        limit = (length or default) - template if encoder else other
        count = sum(len(prompt) > limit for prompt in prompts)
        line = capsys.readouterr().err.strip()
        assert line.endswith(f"] {count} of the first 5 prompts are longer than the text encoder reads,"
                             f" {limit} tokens, and are cut")


@each_family
def test_the_card_gives_the_call_another_length(train, family, tmp_path):
    for length, line in ((None, ""), (7, "max_sequence_length=7, guidance_scale=0")):
        out = train(tmp_path / str(length), resolution=32 if family == "flux2_klein" else 16,
                    max_train_steps=1, max_sequence_length=length)
        card = (out / "README.md").read_text()
        assert line in card and ("max_sequence_length" in card) == bool(line)
        assert ModelCard.load(out / "README.md").data.to_dict().get("max_sequence_length") == length
        images = []
        for number, flags in enumerate([[], ["--max_sequence_length=7"], ["--max_sequence_length=9"]]):
            generate.main(generate.parse_args([
                f"--pretrained_model_name_or_path={out}", "--prompts", "a cat and a dog", *flags,
                f"--output_dir={out}/images-{number}"]))
            images.append((out / f"images-{number}" / "00000.png").read_bytes())
        assert (images[0] == images[1]) == (length == 7) and images[0] != images[2]  # else it is the card's


@pytest.mark.parametrize("family", ["sd3"])
def test_the_evaluation_asks_for_the_length_that_the_card_has(train, tmp_path, capsys):
    out = train(tmp_path / "run", max_train_steps=1, max_sequence_length=7)
    known = [f"--pretrained_model_name_or_path={out}", "--timesteps", "1000", "500"]
    for more, refused in (([], True), (["--max_sequence_length=7"], False)):
        (model,) = eval_benchmarks.parse_models(
            eval_benchmarks.build_parser().parse_args([*known, *more, "--name=run"])).values()
        with pytest.raises(SystemExit) if refused else contextlib.nullcontext():
            eval_benchmarks.check_model("run", model)
        assert ("give it --max_sequence_length 7" in capsys.readouterr().err) == refused
    sampler = eval_benchmarks.Sampler(model, 0, torch.device("cpu"))
    assert sampler.settings["max_sequence_length"] == 7


# What the models' own pages say of their transformers' size, in millions; the last is a transformer only.
SIZES = {"sd3": {"sd3.5_medium": 2243, "sd3.5_large": 8057}, "flux2_klein": {"flux2_klein_4b": 3876},
         "pixart": {"pixart": 611}}


@each_family
@pytest.mark.slow
def test_a_dry_run_of_the_real_size(script, family, flags, tmp_path, capfd):
    """From the shipped configurations: no tokenizer, no weights."""
    configs = REPOSITORY / "examples" / "configs"
    for name, millions in SIZES[family].items():
        kind = getattr(diffusers, script.FAMILY.network_class)
        with torch.device("meta"):
            network = kind.from_config(kind.load_config(configs / name, subfolder="transformer"))
        assert network.num_parameters() / 1e6 == pytest.approx(millions, abs=1)
    script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(
        tmp_path / "run", dry_run=True, pretrained_model_name_or_path=configs / next(iter(SIZES[family])),
        resolution=512, generator_init="reference", mixed_precision="bf16", gradient_checkpointing=True,
        **LORA)))
    rows = {line.split()[0]: line.split() for line in capfd.readouterr().out.splitlines()[1:]}
    held = float(rows["reference"][1].replace(",", ""))
    assert held == pytest.approx(next(iter(SIZES[family].values())), abs=1) and "estimated" in rows


@pytest.mark.slow
@each_family
def test_generate_and_evaluation_take_the_result(script, family, train, tiny, tmp_path):
    """Two steps each: generate.py's image is the stock pipeline's, and the start is compared with the end."""
    side, steps = 32 if family == "flux2_klein" else 16, STEPS[family][:2]
    out = train(tmp_path / "run", resolution=side, generator_timesteps=steps, max_train_steps=1)
    generate.main(generate.parse_args(["--pretrained_model_name_or_path", str(out), "--prompts", "a cat",
                                       "--output_dir", str(tmp_path / "images"), "--seed", "3"]))
    pipeline = cli.load_pipeline(out)
    image = pipeline(prompt="a cat", guidance_scale=0, height=side, width=side, output_type="np",
                     generator=torch.Generator().manual_seed(3), **cli.steps_at(pipeline, steps)).images
    made = numpy.asarray(Image.open(tmp_path / "images" / "00000.png"))
    assert abs(made / 255 - image[0]).max() <= 0.51 / 255
    evaluation, start = load_script("eval_benchmarks"), tiny["pipeline"]
    few = f"--timesteps {' '.join(map(str, steps))} --guidance_scale 0 --resolution {side}"
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    evaluation.main(evaluation.parse_args([
        "--benchmark=prompts", f"--prompts_file={tmp_path / 'prompts.txt'}", "--save_images",
        f"--output_dir={tmp_path / 'results'}", f"--scores=pickscore:{tiny['clip']}",
        f"--model=after --pretrained_model_name_or_path={out} {few}",
        f"--model=put_in --pretrained_model_name_or_path={out} --transformer={out} {few}",
        f"--model=before --pretrained_model_name_or_path={out} --transformer={start} {few}"]))
    images = {name: numpy.asarray(Image.open(next((tmp_path / "results" / name).rglob("00000.png"))))
              for name in ("after", "put_in", "before")}
    assert (images["after"] == images["put_in"]).all() and (images["after"] != images["before"]).any()
