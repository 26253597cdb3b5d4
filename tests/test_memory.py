"""LoRAs on one shared base, offloading and the dry run: less memory, the same numbers."""

import copy
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from conftest import (
    LORA_FILE,
    WELL_CONDITIONED,
    assert_same,
    metrics,
    tiny_unet,
    validation_images,
    write_state,
)
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from utils import memory, offload, starts


LORA = {"generator_lora_rank": 3, "assistant_lora_rank": 2, "generator_init": "reference"}


@pytest.fixture
def prepare(prepare_double):
    return lambda **more: prepare_double(**LORA | more)


def gradients(script, prepared):
    """What one step of each network leaves in its parameters' gradients, by name."""
    models, found = prepared.models, {}
    for name in ("assistant", "generator"):
        take_step(script, prepared, name)
        parameters = script.trainable_parameters(getattr(models, name))
        found |= {f"{name}: {key}": value.grad for key, value in parameters.items()}
        for network in (models.assistant, models.generator, models.reference):
            network.zero_grad()
    return found


def take_step(script, prepared, name):
    """One backward of a network."""
    terms = [prepared.terms] if name == "generator" else []
    getattr(script, f"{name}_step")(prepared.models, prepared.batch, *terms, prepared.method,
                                    prepared.accelerator)


def assert_close(one, other, tolerance=1e-6):
    assert one.keys() == other.keys() and len(one) > 10
    for key in one:
        assert one[key].norm() > 0, key
        assert (one[key] - other[key]).norm() <= tolerance * one[key].norm(), key


# --------------------------------------------------------------------------------------- one shared base


@pytest.mark.parametrize("score_gradient", ["full", "detached"])
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shared", ["assistant", "all"])
def test_a_shared_base_changes_no_gradient(script, prepare, shared, checkpointing, score_gradient):
    """Three networks in memory against one with its adapters on and off, in float64."""
    more = {"score_gradient": score_gradient, "recipe": "di_star_in"}
    separate = gradients(script, prepare(**more))
    together = gradients(script, prepare(shared_base=shared, gradient_checkpointing=checkpointing, **more))
    assert_close(separate, together)


@pytest.mark.parametrize("recipe", ["di_star_out", "diff_instruct_pp"])
def test_a_shared_base_changes_no_gradient_of_other_recipes(script, prepare, recipe):
    separate = gradients(script, prepare(recipe=recipe))
    together = gradients(script, prepare(recipe=recipe, shared_base=True, gradient_checkpointing=True))
    assert_close(separate, together)


def test_without_switching_back_the_gradients_would_differ(script, prepare, monkeypatch):
    """That the tests above can fail: recomputation with the adapter that ran last."""
    separate = gradients(script, prepare())
    prepared = prepare(shared_base=True, gradient_checkpointing=True)
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda *_: None)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_close(separate, gradients(script, prepared))


def test_one_base_is_in_memory_and_each_step_reaches_its_own_adapter(script, prepare):
    prepared = prepare(shared_base=True)
    models = prepared.models
    assert models.generator.base is models.assistant.base is models.reference.base is models.pipeline.unet
    for name in ("assistant", "generator"):
        take_step(script, prepared, name)
        reached = {key for key, value in models.pipeline.unet.named_parameters() if value.grad is not None}
        assert reached and all(f".{name}." in key for key in reached)
        models.pipeline.unet.zero_grad()


def test_the_reference_is_the_base_with_all_adapters_off(script, prepare, tiny):
    prepared = prepare(shared_base=True)
    models, batch = prepared.models, prepared.batch
    conditioning = script.FAMILY.encode_prompts(models.pipeline, batch.prompts, 16)
    plain = DiffusionPipeline.from_pretrained(tiny["pipeline"]).unet.double()
    plain.to(memory_format=torch.channels_last)  # whose kernels round otherwise
    with torch.no_grad():
        models.assistant(batch.noise, batch.timesteps, **conditioning)
        assert torch.equal(models.reference(batch.noise, batch.timesteps, **conditioning).sample,
                           plain(batch.noise, batch.timesteps, **conditioning).sample)


def test_runs_on_one_base_and_on_three_end_in_the_same_loras(train, tmp_path):
    more = LORA | WELL_CONDITIONED | {"max_train_steps": 3, "use_ema": True, "reward_scale": 10}
    separate = train(tmp_path / "separate", **more)
    together = train(tmp_path / "together", shared_base=True, gradient_checkpointing=True, **more)
    for file in ("pytorch_lora_weights.safetensors", "checkpoint-3/assistant.safetensors"):
        one, other = [load_file(out / file) for out in (separate, together)]
        assert any(one[key].norm() > 0 for key in one if "lora_B" in key)
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-7)


def test_only_the_adapters_are_trained(script, train, tiny, tmp_path, monkeypatch):
    held = {}
    load_models = script.load_models
    monkeypatch.setattr(script, "load_models", lambda *given: held.setdefault("models", load_models(*given)))
    monkeypatch.setattr(script, "export", lambda run: None)  # which fuses the LoRA
    out = train(tmp_path / "run", **LORA, shared_base=True, checkpointing_steps=2)
    base = held["models"].pipeline.unet
    plain = load_file(tiny["pipeline"] / "unet" / "diffusion_pytorch_model.safetensors")
    now = {key.replace(".base_layer", ""): value for key, value in base.state_dict().items()
           if "lora_" not in key}
    assert_same(now, plain)
    for name in ("assistant", "generator"):
        weights = load_file(out / "checkpoint-2" / f"{name}.safetensors")
        assert all(f".{name}." in key for key in weights)
        assert all(value.norm() > 0 for value in weights.values()), "B starts at zero and has moved"


# ------------------------------------------------------------------------------------ exporting LoRAs


def generate(pipeline, script, prompt):
    z = torch.randn(4, 8, 8, generator=script.seeded_rng(0, "validation", 0, 0))[None]
    return pipeline(prompt=prompt, latents=z, height=16, width=16, num_inference_steps=1, guidance_scale=0,
                    timesteps=script.FAMILY.defaults["generator_timesteps"], output_type="pt").images[0]


@pytest.mark.parametrize("family, shared", [("sd15", None), ("sd15", "all"), ("sdxl", "all")])
def test_lora_and_fused_export_generate_what_training_did(script, train, tiny, tmp_path, shared):

    prompt = "a large cat"
    out = train(tmp_path / "run", **LORA, shared_base=shared, validation_prompts=[prompt],
                num_validation_images=1, learning_rate=3e-2, use_ema=True)
    fused = DiffusionPipeline.from_pretrained(out)
    assert not any("lora" in key for key in fused.unet.state_dict())
    pipeline = DiffusionPipeline.from_pretrained(tiny["pipeline"])
    pipeline.scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
    before = generate(pipeline, script, prompt)
    pipeline.load_lora_weights(out, weight_name=LORA_FILE, adapter_name="generator")
    config = pipeline.unet.peft_config["generator"]
    assert (config.r, config.lora_alpha) == (3, 3)
    after = generate(pipeline, script, prompt)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(generate(fused, script, prompt), after, rtol=1e-4, atol=1e-4)
    assert abs(after.permute(1, 2, 0).numpy() - validation_images(out, 2)[0] / 255).max() < 1.1 / 255


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_lines_of_the_card_generate(train, tiny, tmp_path, monkeypatch, more):
    """Also where a text encoder's configuration asks for half precision, as those of SDXL do."""
    shutil.copytree(tiny["pipeline"], tmp_path / "reference")
    for path in (tmp_path / "reference").glob("text_encoder*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    train(tmp_path / "run", pretrained_model_name_or_path=tmp_path / "reference", **more)
    lines = (tmp_path / "run" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert (tmp_path / "image.png").exists()


def test_a_lora_is_fused_into_the_weights_that_it_is_on(train, tiny, tmp_path):
    start = load_file(tiny["unet"] / "diffusion_pytorch_model.safetensors")
    for flag in ("generator_init", "reference_unet"):
        out = train(tmp_path / flag, **LORA | {flag: tiny["unet"]}, learning_rate=0)
        assert_same(load_file(out / "unet" / "diffusion_pytorch_model.safetensors"), start)


# -------------------------------------------------------------------------------- a LoRA as the start


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where runs lie that several tests read: {family: folder}."""
    return {family: tmp_path_factory.mktemp(family) / "first" for family in ("sd15", "sdxl")}


@pytest.fixture
def lora(script, family, train, runs):
    """The LoRA of a run of one step."""
    if not runs[family].exists():
        train(runs[family], **LORA, learning_rate=3e-2, max_train_steps=1)
    return runs[family] / LORA_FILE


@pytest.mark.parametrize("family, start, published", [
    ("sd15", "somebody/a-lora", True), ("sd15", "somebody/lora/lora.safetensors", True),
    ("sd15", "somebody/exploration", False), ("sd3", "somebody/a-lora", False)])
def test_a_dry_run_counts_the_layers_of_a_published_lora(script, flags, tmp_path, monkeypatch, start,
                                                         published):
    """Of a generator's UNet; assistants and other networks get the family's."""
    args, made = script.parse_args(script.FAMILY, flags(
        tmp_path / "run", **LORA | {"generator_init": start}, dry_run=True)), {}
    lora = script.load_extra("lora", "a test")
    monkeypatch.setattr(lora, "make", lambda family, args, base, name, rank: made.update(
        {name: args.lora_layers}))
    with memory.layers_of_start(script.FAMILY, args, script):
        for name in ("generator", "assistant"):
            lora.make(script.FAMILY, args, None, name, 3)
    assert made == {"generator": starts.LORA_LAYERS if published else None, "assistant": None}


@pytest.mark.parametrize("shared", [None, "all"])
def test_a_lora_goes_on_as_it_was(script, load, lora, shared):
    more = LORA | {"generator_init": lora, "shared_base": shared}
    models = load(**more).models
    weights = load_file(lora)
    held = {key.removeprefix("base.").replace(".generator", ""): value
            for key, value in script.trainable_parameters(models.generator).items()}
    assert_same(held, {key.removeprefix("unet."): value for key, value in weights.items()})
    assert models.generator.base.peft_config["generator"].lora_alpha == 3
    assert all(value.requires_grad for value in held.values())


def test_a_lora_without_a_rank_is_fused_and_all_weights_are_trained(script, load, lora, tiny):
    models = load(generator_init=lora).models
    pipeline = DiffusionPipeline.from_pretrained(tiny["pipeline"])
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    expected = pipeline.unet.state_dict()
    held = models.generator.state_dict()
    assert held.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(held[key], expected[key])
    assert all(parameter.requires_grad for parameter in models.generator.parameters())


# ------------------------------------------------------------------- the alpha and the layers of new LoRAs


@pytest.mark.parametrize("given, expected", [({}, (3, 2)), ({"lora_alpha": 6}, (6, 6))],
                         ids=["rank", "alpha"])
@pytest.mark.parametrize("shared", [None, "all"])
def test_both_new_loras_have_the_alpha_of_the_flag_or_their_rank(load, given, expected, shared):
    models = load(**LORA, shared_base=shared, **given).models
    for name, alpha in zip(("generator", "assistant"), expected):
        network = getattr(models, name)
        assert network.base.peft_config[name].lora_alpha == alpha
        for layer in network.layers:
            assert layer.scaling[name] == alpha / LORA[f"{name}_lora_rank"]


def test_a_larger_alpha_changes_the_output_in_proportion_to_first_order(script, prepare, tiny):
    """With the same small LoRA weights, what the LoRA adds is twice as much at twice the alpha."""
    added = []
    for alpha in (1.5, 3):
        prepared = prepare(lora_alpha=alpha)
        models, batch = prepared.models, prepared.batch
        conditioning = script.FAMILY.encode_prompts(models.pipeline, batch.prompts, 16)
        with torch.no_grad():
            for name, parameter in script.trainable_parameters(models.generator).items():
                parameter *= 1e-5 if "lora_B" in name else 1
            whole, base = [network(batch.noise, batch.timesteps, **conditioning).sample
                           for network in (models.generator, models.reference)]
        added.append(whole - base)
    assert added[0].norm() > 0
    assert (added[1] - 2 * added[0]).norm() < 1e-3 * added[1].norm()


@pytest.mark.parametrize("layers", [["to_k"], ["to_q", "conv1"]], ids=",".join)
def test_only_the_named_layers_get_a_lora(script, load, layers):
    models = load(**LORA, lora_layers=", ".join(layers)).models
    for network in (models.generator, models.assistant):
        names = script.trainable_parameters(network)
        assert {name.partition(".lora_")[0].rpartition(".")[2] for name in names} == {*layers}
        plain = [name for name, module in models.reference.named_modules() if name.split(".")[-1] in layers]
        assert len(network.layers) == len(plain) > 0


def test_a_lora_of_other_layers_and_alpha_is_exported_and_goes_on(script, train, load, tiny, tmp_path):
    """The file says both, so that diffusers generates what training did."""
    out = train(tmp_path / "run", **LORA, lora_layers="to_k,to_v", lora_alpha=12, learning_rate=3e-2)
    pipeline = DiffusionPipeline.from_pretrained(tiny["pipeline"])
    pipeline.load_lora_weights(out, weight_name=LORA_FILE, adapter_name="generator")
    config = pipeline.unet.peft_config["generator"]
    assert config.lora_alpha == 12
    assert {name.split(".")[-1] for name in config.target_modules} == {"to_k", "to_v"}
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    held, expected = DiffusionPipeline.from_pretrained(out).unet.state_dict(), pipeline.unet.state_dict()
    assert held.keys() == expected.keys()
    for key in held:
        torch.testing.assert_close(held[key], expected[key])


def test_a_lora_start_keeps_its_alpha_and_layers(script, train, load, tmp_path):
    """The flags are then the assistant's alone."""
    start = train(tmp_path / "start", **LORA, lora_layers="to_k", lora_alpha=12) / LORA_FILE
    more = LORA | {"generator_init": start, "lora_alpha": 5, "lora_layers": "to_q"}
    models = load(**more).models
    for name, alpha, layer in (("generator", 12, "to_k"), ("assistant", 5, "to_q")):
        network = getattr(models, name)
        assert network.base.peft_config[name].lora_alpha == alpha
        assert all(f".{layer}." in key for key in script.trainable_parameters(network))


@pytest.mark.slow
@pytest.mark.parametrize("given", [LORA, {"assistant_lora_rank": 2}, {"generator_lora_rank": 2}], ids=str)
@pytest.mark.parametrize("layers", ["nowhere", "to_q,nowhere", "to_q, o_k", "to_q,"])
def test_layers_that_the_network_lacks_are_one_line(refused, given, layers):
    line = refused(**given, lora_layers=layers)
    assert f"error: --lora_layers {layers}: the unet has no layer" in line


def test_a_run_with_another_alpha_or_other_layers_is_another_run(script, train, flags, tmp_path, capfd):
    train(tmp_path / "run", **LORA)
    for changed in ({"lora_alpha": 9}, {"lora_layers": "to_k"}):
        more = LORA | {"resume_from_checkpoint": "latest"} | changed
        with pytest.raises(SystemExit):
            script.parse_args(script.FAMILY, flags(tmp_path / "run", **more))
        assert f"--{next(iter(changed))} is" in capfd.readouterr().err


# -------------------------------------------------------------------- a file or a LoRA as the reference


@pytest.fixture
def fused(lora, tiny):
    """The weights of the pipeline's network with the LoRA in them, as diffusers makes them."""
    pipeline = DiffusionPipeline.from_pretrained(tiny["pipeline"])
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.unet.state_dict()


def plain_weights(network):
    """Of a network, without the LoRAs on it."""
    return {key.removeprefix("base.").replace(".base_layer", ""): value
            for key, value in network.state_dict().items() if "lora_" not in key}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_reference_may_be_a_file_of_weights(load, tiny, tmp_path, kind):
    path = next(tiny["unet"].glob("*.safetensors"))
    expected = load_file(path)
    if kind == "bin":
        torch.save(expected, path := tmp_path / "unet.bin")
    models = load(reference_unet=path, generator_init="reference").models
    for network in (models.reference, models.assistant, models.generator, models.pipeline.unet):
        assert_same(plain_weights(network), expected)
    assert not any(parameter.requires_grad for parameter in models.reference.parameters())


@pytest.mark.parametrize("more", [{"generator_init": "reference"}, LORA, LORA | {"shared_base": True}],
                         ids=["full", "lora", "shared"])
def test_the_reference_may_be_a_lora_on_the_network_of_the_pipeline(load, lora, fused, more):
    models = load(reference_unet=lora, **more).models
    for network in (models.reference, models.assistant, models.generator):
        held = plain_weights(network)
        assert held.keys() == fused.keys()
        for key, value in held.items():
            torch.testing.assert_close(value, fused[key])
    assert [*getattr(models.pipeline.unet, "peft_config", {})] == (
        ["generator", "assistant"] if "shared_base" in more else []), "its own LoRA is in the weights"


def test_a_run_with_a_lora_as_the_reference_resumes_and_says_so(train, lora, tmp_path):
    more = {"reference_unet": lora, "max_train_steps": 2, "checkpointing_steps": 1}
    whole = train(tmp_path / "whole", **more)
    train(tmp_path / "parts", **more | {"max_train_steps": 1})
    parts = train(tmp_path / "parts", **more, resume_from_checkpoint="latest")
    assert_same(*[load_file(out / "unet" / "diffusion_pytorch_model.safetensors") for out in (whole, parts)])
    assert f"the reference is `{lora.name}`" in (whole / "README.md").read_text()


def test_a_reference_file_that_does_not_fit_is_one_line(refused, lora, tmp_path):
    weights = load_file(lora)
    save_file({key.replace("down_blocks.1", "down_blocks.7"): value for key, value in weights.items()},
              tmp_path / "lora.safetensors")
    save_file({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "unet.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for file in ("lora", "unet", "text"):
        path = tmp_path / f"{file}.safetensors"
        assert f"--reference_unet {path}" in refused(reference_unet=path)


# ------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def refused(script, flags, tmp_path, capfd):
    """Load a run's models, which must end it; returns the line on standard error."""
    def run(**more):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(tmp_path / "new", **more)))
        assert ending.value.code == 2
        *before, line = capfd.readouterr().err.splitlines()  # before: what libraries log as they load
        assert line.startswith("error: ") and not any("error: " in other for other in before)
        assert not (tmp_path / "new").exists()
        return line
    return run


@pytest.mark.parametrize("flag, value", [
    ("pretrained_vae_model_name_or_path", "absent"), ("pretrained_vae_model_name_or_path", "pipeline"),
    ("pretrained_vae_model_name_or_path", "clip"), ("reward_vae", "absent"), ("reward_vae", "clip"),
    ("reward_model_name_or_path", "absent"), ("reward_model_name_or_path", "unet"),
    ("reward_model_name_or_path", "pipeline/text_encoder"), ("pretrained_model_name_or_path", "absent"),
    ("reference_unet", "clip"), ("generator_init", "clip")])
def test_a_folder_without_such_a_model_is_refused_before_any_model_loads(refused, script, tiny, monkeypatch,
                                                                          flag, value):
    monkeypatch.setattr(script, "load_models", lambda *_: pytest.fail("too late"))
    kind, _, part = value.partition("/")
    path = tiny.get(kind, tiny["clip"].parent / kind) / part
    line = refused(**{flag: path})
    assert f"--{flag}" in line and str(path) in line


@pytest.mark.parametrize("missing", ["vae", "text_encoder", "tokenizer", "unet", "scheduler"])
def test_a_reference_without_one_of_its_parts_is_refused(refused, tiny, tmp_path, missing):
    shutil.copytree(tiny["pipeline"], tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / missing)
    line = refused(pretrained_model_name_or_path=tmp_path / "pipeline")
    assert str(tmp_path / "pipeline") in line


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_weights_cut_short_are_named(refused, tiny, tmp_path, part):
    shutil.copytree(tiny["pipeline"], tmp_path / "pipeline")
    (path,) = (tmp_path / "pipeline" / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    line = refused(pretrained_model_name_or_path=tmp_path / "pipeline")
    assert f"{tmp_path / 'pipeline'} {part} cannot be loaded" in line


def test_a_reward_without_its_processor_is_named(refused, tiny, tmp_path):
    weights = shutil.ignore_patterns("*token*", "vocab*", "merges*", "*processor*")
    shutil.copytree(tiny["clip"], tmp_path / "clip", ignore=weights)
    line = refused(reward_model_name_or_path=tmp_path / "clip")
    assert f"--reward_model_name_or_path {tmp_path / 'clip'}" in line


def test_a_shared_base_of_other_weights_is_refused(refused, tiny):
    line = refused(**LORA | {"generator_init": tiny["unet"]}, shared_base=True)
    assert "--shared_base" in line and "--generator_init" in line and "--shared_base assistant" in line


def test_lora_dropout_is_off(load, lora, tmp_path):
    weights, metadata = {}, {}
    with safe_open(lora, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    config = json.loads(metadata["lora_adapter_metadata"])
    config["unet.lora_dropout"] = 0.5
    metadata["lora_adapter_metadata"] = json.dumps(config)
    save_file(weights, tmp_path / "lora.safetensors", metadata)
    more = LORA | {"generator_init": tmp_path / "lora.safetensors"}
    models = load(**more).models
    dropouts = [module for module in models.generator.modules() if isinstance(module, torch.nn.Dropout)]
    assert any(module.p == 0.5 for module in dropouts)
    assert not any(module.training for module in dropouts)


@pytest.mark.parametrize("more, named", [
    ({"distributed_type": DistributedType.FSDP}, "FSDP"),
    ({"mixed_precision": "fp16"}, "--mixed_precision fp16")])
def test_unsupported_accelerate_configurations_are_refused(script, flags, tmp_path, capsys, monkeypatch,
                                                           more, named):
    given = {"distributed_type": DistributedType.NO, "mixed_precision": "no"} | more
    monkeypatch.setattr(script, "Accelerator", lambda **_: SimpleNamespace(**given, num_processes=1))
    with pytest.raises(SystemExit):
        script.open_accelerator(script.parse_args(script.FAMILY, flags(tmp_path / "run")))
    assert named in capsys.readouterr().err


def test_a_rank_that_differs_from_the_lora_is_refused(refused, lora):
    line = refused(**LORA | {"generator_init": lora, "generator_lora_rank": 5})
    assert "--generator_lora_rank 5" in line and "has 3" in line


@pytest.mark.parametrize("misfit, words", [
    (lambda weights: weights.update({name.replace("down_blocks.1", "down_blocks.7"): weights.pop(name)
                                     for name in list(weights) if "down_blocks.1" in name}), "names"),
    (lambda weights: weights.update({name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in
                                     weights.items() if "to_q.lora_B" in name}), "size mismatch"),
], ids=["names", "shapes"])
def test_a_lora_that_does_not_fit_is_refused(refused, lora, tmp_path, misfit, words):
    weights = load_file(lora)
    misfit(weights)
    save_file(weights, tmp_path / "lora.safetensors")
    line = refused(**LORA | {"generator_init": tmp_path / "lora.safetensors"})
    assert "--generator_init" in line and words in line


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "reference_unet", "generator_init"])
def test_models_of_the_other_family_are_refused(refused, family, tiny_families, flag):
    other = tiny_families["sdxl" if family == "sd15" else "sd15"]
    for folder in ("pipeline", "unet"):
        if (flag, folder) != ("pretrained_model_name_or_path", "unet"):
            assert f"--{flag}" in refused(**{flag: other[folder]})


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_weights_of_the_other_family_are_refused(refused, family, tmp_path):
    save_file(tiny_unet("sdxl" if family == "sd15" else "sd15").state_dict(), tmp_path / "unet.safetensors")
    line = refused(generator_init=tmp_path / "unet.safetensors")
    assert "--generator_init" in line and "size mismatch" in line


@pytest.mark.parametrize("changed", [
    {"generator_lora_rank": 4}, {"assistant_lora_rank": 4}, {"shared_base": "assistant"},
    {"reference_unet": "x"}])
def test_flags_that_change_the_model_are_refused_on_resuming(script, flags, tmp_path, capsys, changed):
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run", **LORA, shared_base=True))
    folder = tmp_path / "run" / "checkpoint-1"
    write_state(script, folder, args)
    (tmp_path / "run" / "args.json").write_text("{}")
    more = LORA | {"shared_base": True, "resume_from_checkpoint": "latest"} | changed
    with pytest.raises(SystemExit):
        script.parse_args(script.FAMILY, flags(tmp_path / "run", **more))
    assert f"--{next(iter(changed))}" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- offload


def test_offloading_and_tiling_run_and_offloading_changes_nothing(script, train, tmp_path, monkeypatch):
    used = []
    extra = script.load_extra("offload", "--offload")
    on_device = extra.on_device

    def watched(module, device):
        used.append(type(module).__name__)
        return on_device(module, device)

    more = {"use_ema": True, "validation_prompts": ["a cat"]}
    plain = train(tmp_path / "plain", **more)
    monkeypatch.setattr(extra, "on_device", watched)
    out = train(tmp_path / "offloaded", offload=True, offload_ema=True, **more)
    assert len(used) > 6 and "AutoencoderKL" in used
    weights = [load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (plain, out)]
    assert_same(*weights)
    assert metrics(plain) == metrics(out)
    train(tmp_path / "tiled", enable_vae_tiling=True, max_train_steps=1)


@pytest.mark.parametrize("resolution", [16, 24, 40, 56, 96])
def test_tiles_make_an_image_of_the_size_asked_for(script, load, resolution):
    models = load(enable_vae_tiling=True, resolution=resolution).models
    latents = torch.randn(1, 4, resolution // 2, resolution // 2)
    tiled = script.FAMILY.decode(models.reward_vae, latents)
    assert tiled.shape == (1, 3, resolution, resolution)
    models.reward_vae.disable_tiling()
    assert (tiled - script.FAMILY.decode(models.reward_vae, latents)).norm() < 0.5 * tiled.norm()


# ------------------------------------------------------------------------- less memory, the same numbers


@pytest.mark.parametrize("size", [1, 2, 3])
def test_decoding_in_chunks_changes_no_gradient(script, prepare_double, size, monkeypatch):
    """In float64, and no more than a chunk is decoded at once, also for a validation."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    seen, decode, found = [], script.FAMILY.decode, []
    monkeypatch.setattr(script.FAMILY, "decode", lambda vae, z: seen.append(len(z)) or decode(vae, z))
    for chunk in (None, size):
        seen.clear()
        prepared = prepare_double(batch_size=4, decode_batch_size=chunk)
        prepared.models.scorers.double()
        found.append(gradients(script, prepared))
    assert seen == {1: [1, 1, 1, 1], 2: [2, 2], 3: [3, 1]}[size]
    assert_close(*found, tolerance=1e-12)


def test_so_much_is_decoded_at_once_that_the_kernels_take_it(script, flags, tmp_path):
    """The decoder's last upsampling has 256 channels at full size; a kernel counts up to 2^31 - 1."""
    for resolution, size in ((1024, 7), (512, 31), (2048, 1), (4096, 1)):
        args = script.parse_args(script.FAMILY, flags(tmp_path / "run", resolution=resolution))
        assert args.decode_batch_size == size
        assert size == 1 or 256 * resolution**2 * size < 2**31 <= 256 * resolution**2 * (size + 1)


def test_a_validation_decodes_in_chunks_and_its_grid_can_be_opened(script, train, tmp_path, monkeypatch):
    seen, decode = [], script.FAMILY.decode
    monkeypatch.setattr(script.FAMILY, "decode", lambda vae, z: seen.append(len(z)) or decode(vae, z))
    monkeypatch.setattr(script, "GRID_SIDE", 40)
    out = train(tmp_path / "run", validation_prompts=["a cat"], num_validation_images=4, decode_batch_size=3,
                reward_scale=0)
    assert set(seen) == {3}, "the last batch is filled up"
    with Image.open(out / "validation" / "step-000002.png") as grid:
        assert grid.width < 75, "four images of 16 pixels would be 94 wide with their gaps"


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_without_momentum_is_adam_of_beta1_0_to_the_bit(script, decay):
    """In float64, and in channels-last; it stores half as much, and goes on from a state of Adam's own."""
    args = SimpleNamespace(adam_beta1=0.0, adam_beta2=0.99, adam_weight_decay=decay, adam_epsilon=1e-8,
                           use_8bit_adam=False)

    def ours(weights):
        return script.make_optimizer(args, weights, 1e-2)

    def plain_adam(weights):
        return torch.optim.AdamW(
            weights, lr=1e-2, betas=(0.0, 0.99), weight_decay=decay, eps=1e-8, fused=True)

    def run(make, then=None):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(4, 3, 3, 3).double().to(memory_format=torch.channels_last)),
                   torch.nn.Parameter(torch.randn(5).double())]
        made = make(weights)
        for step in range(6):
            if step == 3 and then:
                saved = copy.deepcopy(made.state_dict())
                made = then(weights)
                made.load_state_dict(saved)
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            made.step()
        return weights, made

    plain, _ = run(plain_adam)
    for make, then in ((ours, None), (plain_adam, ours)):
        weights, made = run(make, then)
        assert_same([w.data for w in weights], [w.data for w in plain])
        assert all(set(state) == {"step", "exp_avg_sq"} for state in made.state.values())


def test_a_run_goes_on_from_a_checkpoint_with_first_moments(script, train, tmp_path, monkeypatch):
    """As runs saved them that used AdamW itself."""
    more = {"max_train_steps": 2, "checkpointing_steps": 1}
    whole = train(tmp_path / "whole", **more)
    with monkeypatch.context() as patch:
        for hook in ("lend_first_moment", "drop_first_moment"):
            patch.setattr(script, hook, lambda *_: None)
        train(tmp_path / "parts", **more | {"max_train_steps": 1})
    saved = torch.load(tmp_path / "parts" / "checkpoint-1" / "trainer.pt", weights_only=True)
    assert "exp_avg" in saved["optimizers"]["generator"]["state"][0]
    parts = train(tmp_path / "parts", **more, resume_from_checkpoint="latest")
    for name in ("generator", "assistant"):
        assert_same(*[load_file(out / "checkpoint-2" / f"{name}.safetensors") for out in (whole, parts)])


@pytest.mark.parametrize("more", [
    pytest.param({"use_ema": True}, id="full"), pytest.param(LORA, marks=pytest.mark.slow, id="lora"),
    pytest.param({"validation_prompts": ["a cat"], "min_diversity": 0.1}, marks=pytest.mark.slow,
                 id="alarm")])
def test_a_run_goes_on_from_a_checkpoint_of_before_terms_and_observers(script, train, tmp_path, more):
    """Whose trainer.pt lacks both, and whose state.json has flags and a field that are gone."""
    more = {"max_train_steps": 2, "checkpointing_steps": 1} | more
    whole = train(tmp_path / "whole", **more)
    train(tmp_path / "parts", **more | {"max_train_steps": 1})
    folder = tmp_path / "parts" / "checkpoint-1"
    saved = torch.load(folder / "trainer.pt", weights_only=True)
    torch.save({name: saved[name] for name in ("optimizers", "schedules", "ema")}, folder / "trainer.pt")
    state = json.loads((folder / "state.json").read_text())
    for flag in ("lora_alpha", "lora_layers", "lr_num_cycles", "lr_power", "tracker_project_name", "term",
                 "observer"):
        del state["args"][flag]
    state["args"] |= {"max_skipped_updates": 10, "reward_processor_name_or_path": None}
    first = {name: value for name, value in metrics(tmp_path / "parts")[0].items()
             if name.startswith("validation_diversity_")}
    state |= {"first_diversity": first}
    state["files"]["trainer.pt"] = (folder / "trainer.pt").stat().st_size
    del state["digests"]
    (folder / "state.json").write_text(json.dumps(state))
    parts = train(tmp_path / "parts", **more, resume_from_checkpoint="latest")
    for name in ("generator", "assistant"):
        assert_same(*[load_file(out / "checkpoint-2" / f"{name}.safetensors") for out in (whole, parts)])
    if "min_diversity" in more:
        one, other = [torch.load(out / "checkpoint-2" / "trainer.pt", weights_only=True)["observers"]
                      for out in (whole, parts)]
        assert_same(one, other)


def test_an_alarm_may_be_added_and_taken_away_on_resuming(script, train, flags, tmp_path):
    more = {"validation_prompts": ["a cat"], "validation_steps": 1, "resume_from_checkpoint": "latest"}
    for step, least in enumerate((None, 0.1, None), 1):
        out = train(tmp_path / "run", **more, max_train_steps=step, min_diversity=least)
        saved = torch.load(out / f"checkpoint-{step}" / "trainer.pt", weights_only=True)
        assert ("min_diversity" in saved["observers"]) == bool(least)
    script.parse_args(script.FAMILY, flags(tmp_path / "run", **more, dry_run=True, min_diversity=0.1))


def test_the_input_of_a_lora_is_not_cast_to_float32_under_autocast(script, load, monkeypatch):
    """Autocast would cast it back: to the bit the same, with fewer casts."""
    def run(prepared):
        batch = prepared.batch
        conditioning = script.FAMILY.encode_prompts(prepared.models.pipeline, batch.prompts, 16)
        with Casts() as casts, torch.no_grad(), prepared.accelerator.autocast():
            sample = prepared.models.generator(batch.noise, batch.timesteps, **conditioning).sample
        return sample, casts.count

    prepared = load(mixed_precision="bf16", **LORA)
    sample, count = run(prepared)
    for layer in prepared.models.generator.layers:
        layer.cast_input_dtype_enabled = True
    plain, more = run(prepared)
    assert torch.equal(sample, plain) and count < more


class Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **kwargs or {})


def test_offloaded_modules_are_copied_to_the_device_and_not_back(monkeypatch):
    module, copies = torch.nn.Linear(3, 3), []
    held = [tensor.data_ptr() for tensor in module.parameters()]
    monkeypatch.setattr(torch.Tensor, "to", lambda value, *_, **__: copies.append(value) or value.clone())
    using = offload.offload([module], torch.device("cpu"))
    with using(module):
        assert not {tensor.data_ptr() for tensor in module.parameters()} & set(held)
    assert [tensor.data_ptr() for tensor in module.parameters()] == held and len(copies) == 2


@pytest.mark.parametrize("name", ["unet", "file"])
def test_each_network_is_placed_before_the_next_is_made(script, load, tiny, tmp_path, monkeypatch, name):
    """So that a process holds one whole trained network in host memory, not two, before it is sharded."""
    events = []
    copied, placed = copy.deepcopy, torch.nn.Module.to
    monkeypatch.setattr(script.copy, "deepcopy", lambda value, *more: (
        events.append("copied") if hasattr(value, "conv_in") else None) or copied(value, *more))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *given, **more: (
        events.append("placed") if "memory_format" in more and hasattr(module, "conv_in") else None)
        or placed(module, *given, **more))
    start = tiny["unet"] if name == "unet" else next(tiny["unet"].glob("*.safetensors"))
    load(generator_init=start)
    assert events == ["placed", "copied", "placed", "placed"], "the generator's weights are no copy"


def test_an_8_bit_update_keeps_channels_last(train, script, tmp_path, monkeypatch):
    """An optimizer that, like bitsandbytes', makes weights contiguous."""
    class Contiguous(torch.optim.SGD):
        def __init__(self, parameters, lr, **_):
            super().__init__(parameters, lr=lr)

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data = parameter.data.contiguous()

    runs, make = [], script.TrainingRun.__init__
    monkeypatch.setattr(script.TrainingRun, "__init__", lambda *given: runs.append(given[0]) or make(*given))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=Contiguous))
    train(tmp_path / "run", use_8bit_adam=True)
    for parameters in runs[0].parameters.values():
        convolutions = [value for value in parameters.values() if value.ndim == 4 and value.shape[-1] > 1]
        assert convolutions
        for value in convolutions:
            assert value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()


# -------------------------------------------------------------------------------------------- dry run


def dry(script, flags, capfd, output_dir, **more):
    """The table of a dry run: {name: numbers of its row}, and its last line's peak in GiB."""
    capfd.readouterr()
    script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(output_dir, dry_run=True, **more)))
    lines = capfd.readouterr().out.splitlines()
    assert not output_dir.exists()
    table = {line.split()[0]: [float(word.replace(",", "")) for word in line.split()[1::2]]
             for line in lines[1:-2]}
    assert "estimated peak" in lines[-2] and lines[-1].startswith("disk: ")
    return table, float(lines[-2].split("GPU: ")[1].split()[0])


def test_a_dry_run_leaves_your_own_reward_out(script, flags, tmp_path, capfd):
    table, peak = dry(script, flags, capfd, tmp_path / "run", reward="json:loads")
    assert table["scorers"][0] < 0.1


def test_a_dry_run_needs_configurations_alone(script, flags, tiny, tmp_path, capfd):
    """No weights and no tokenizers; the figures are those of the networks that a run would load."""
    folder = tmp_path / "configs"
    weights = shutil.ignore_patterns("*.safetensors", "*token*", "*.txt")
    shutil.copytree(tiny["pipeline"], folder, ignore=weights)
    table, _ = dry(script, flags, capfd, tmp_path / "run", pretrained_model_name_or_path=folder,
                   prompts_file="absent.txt", use_ema=True)
    millions = sum(value.numel() for value in tiny_unet("sdxl" if "sdxl" in script.__name__ else "sd15")
                   .parameters()) / 1e6
    for name in ("reference", "assistant", "generator"):
        assert table[name][0] == pytest.approx(millions, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"use_ema": True}, {"adam_beta1": 0.9}, LORA], ids=str)
def test_the_size_of_a_checkpoint_is_what_is_written(script, train, tmp_path, monkeypatch, more):
    held = {}
    save = script.TrainingRun.save
    monkeypatch.setattr(script.TrainingRun, "save", lambda run: held.update(run=run) or save(run))
    out = train(tmp_path / "run", **more)
    saved = torch.load(out / "checkpoint-2" / "trainer.pt", weights_only=True)
    states = [value for part in saved["optimizers"].values() for state in part["state"].values()
              for value in state.values() if value.ndim]
    weights = [value for name in ("assistant", "generator")
               for value in load_file(out / "checkpoint-2" / f"{name}.safetensors").values()]
    written = memory.size_of([*states, *weights, *saved["ema"].get("shadow_params", [])])
    assert held["run"].checkpoint_size() == written


WHOLE, SHARED = {}, LORA | {"shared_base": True, "gradient_checkpointing": True}


@pytest.mark.parametrize("family, more", [
    ("sd15", WHOLE),
    *(pytest.param("sd15", more, marks=pytest.mark.slow)
      for more in (SHARED, {"gradient_checkpointing": True})),
    *(pytest.param(family, more | {"resolution": 32}, marks=pytest.mark.slow)
      for family in ("sd3", "flux2_klein", "pixart") for more in (WHOLE, SHARED))])
def test_the_estimated_peak_is_that_of_a_real_step(script, flags, tmp_path, more):
    """The same accounting around a step on real tensors of the same models."""
    more = {"train_batch_size": 8, "resolution": 64, "use_ema": True} | more
    family = script.FAMILY
    estimated = script.main(family, script.parse_args(family, flags(tmp_path / "run", dry_run=True, **more)))
    args = script.parse_args(family, flags(tmp_path / "run", **more))
    prompts = script.Prompts(script.read_prompts(args), 0)
    with memory.PeakMemory() as counted:
        accelerator = Accelerator(cpu=True)
        models = script.load_models(
            family, args, script.check_models(family, args), script.find_rewards(args), accelerator)
        run = script.TrainingRun(args, models, *script.build_terms(args, models), prompts, accelerator)
        script.train_step(run)
        counted.peak = counted.now  # the first step makes what the optimizers hold
        script.train_step(run)
    assert estimated == pytest.approx(counted.peak, rel=0.05)
