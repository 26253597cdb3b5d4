"""Whole runs and single steps of the training script on tiny random pipelines."""

import json
import os
import shutil
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    LORA_FILE,
    WELL_CONDITIONED,
    assert_same,
    generator_gradient,
    halves,
    metrics,
    set_method,
    tiny_pipeline,
    tiny_unet,
    validation_images,
)
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file


def unet_weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def relative_difference(one, other, tiny):
    """How far two runs' generators are apart, as a fraction of their way from their common start."""
    start = load_file(tiny["unet"] / "diffusion_pytorch_model.safetensors")
    one, other, start = [torch.cat([weights[key].flatten() for key in start]).double()
                         for weights in (unet_weights(one), unet_weights(other), start)]
    return (one - other).norm() / (one - start).norm()


# ------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("rank", [0, 2])
def test_generator_and_assistant_move_and_nothing_else(script, train, tiny, tmp_path, monkeypatch, rank):
    held = {}
    load_models = script.load_models

    def watched(*arguments):
        models = load_models(*arguments)
        held["models"] = models
        held["before"] = {name: {key: value.clone() for key, value in module.state_dict().items()}
                          for name, module in modules(models).items()}
        return models

    def modules(models):
        return {"reference": models.reference, "scorers": models.scorers, "generator": models.generator,
                "text_encoder": models.pipeline.text_encoder, "assistant": models.assistant}

    monkeypatch.setattr(script, "load_models", watched)
    out = train(tmp_path / "run", max_train_steps=1, assistant_lora_rank=rank)
    for name, module in modules(held["models"]).items():
        same = [torch.equal(value, held["before"][name][key]) for key, value in module.state_dict().items()]
        if name == "generator":
            assert not any(same)
        elif name == "assistant":
            keys = [key for key, equal in zip(module.state_dict(), same) if not equal]
            assert keys and (rank == 0 or all("lora" in key for key in keys))
        else:
            assert all(same), name
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert_same(load_file(out / part), load_file(tiny["pipeline"] / part))
    start = load_file(tiny["unet"] / "diffusion_pytorch_model.safetensors")
    assert not any(torch.equal(value, start[key]) for key, value in unet_weights(out).items())


@pytest.mark.parametrize("recipe", ["di_star_in", "di_star_out", "diff_instruct_pp"])
def test_the_generator_update_reaches_only_the_generator(script, prepare, recipe):
    prepared = prepare(recipe=recipe)
    models = prepared.models
    assert generator_gradient(script, prepared).norm() > 0
    for module in (models.assistant, models.reference, models.scorers, models.pipeline.vae,
                   models.pipeline.text_encoder):
        assert all(parameter.grad is None for parameter in module.parameters())


def test_the_assistant_update_reaches_only_the_assistant(script, prepare):
    prepared = prepare()
    models = prepared.models
    script.assistant_step(models, prepared.batch, prepared.method, prepared.accelerator)
    assert all(parameter.grad.norm() > 0 for parameter in models.assistant.parameters())
    for module in (models.generator, models.reference, models.scorers, models.pipeline.text_encoder):
        assert all(parameter.grad is None for parameter in module.parameters())


# ------------------------------------------------------------------------------------- what is computed


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["di_star_in", "di_star_out", "sim", "diff_instruct_pp", "kl_only"])
def test_the_loop_calls_the_losses_of_its_recipe(script, train, tmp_path, monkeypatch, recipe):
    divergence, reward_scale, cfg_scale, cfg_mode = script.RECIPES[recipe]
    calls = {}

    def spy(name):
        function = getattr(script, name)

        def wrapper(*arguments):
            calls[name] = arguments
            return function(*arguments)
        monkeypatch.setattr(script, name, wrapper)

    names = ("score_divergence_loss", "kl_divergence_loss", "implicit_reward_loss", "guided_prediction",
             "reward_gradient", "assistant_loss")
    for name in names:
        spy(name)
    train(tmp_path / "run", recipe=recipe, max_train_steps=1, weighting="dmd", pseudo_huber_c=0.3)
    used = {f"{divergence}_divergence_loss", "assistant_loss"}
    used |= {"reward_gradient"} if reward_scale else set()
    used |= {"guided_prediction"} if cfg_mode == "in" else {"implicit_reward_loss"}
    assert set(calls) == used
    method = calls[f"{divergence}_divergence_loss"][-1]
    assert (method.divergence, method.weighting, method.cfg_scale) == (divergence, "dmd", cfg_scale)
    assert (method.distance, method.pseudo_huber_c) == ("pseudo_huber", 0.3)
    if reward_scale:
        assert calls["reward_gradient"][-1]["pickscore"][0] == reward_scale
    if cfg_mode == "in":
        assert calls["guided_prediction"][-1] == cfg_scale
        assert (calls["guided_prediction"][1] is None) == (cfg_scale <= 1)
    else:
        assert calls["implicit_reward_loss"][-2:] == (cfg_scale, method)


@pytest.mark.parametrize("recipe, scale", [("di_star_in", 7.5), ("di_star_out", 7.5), ("di_star_out", 0.5)])
def test_the_update_is_one_joint_backward_of_the_sum_of_losses(script, prepare, recipe, scale):
    """Batch mean of divergence, guidance and reward losses, differentiated through all networks at once.

    *out* guidance acts at any scale above 0, so it needs the null prediction below 1 as well.
    """
    prepared = prepare(recipe=recipe, cfg_scale=scale)
    models, args, diffusion = prepared.models, prepared.args, prepared.models.process
    gradient = generator_gradient(script, prepared)
    z, noise, timesteps, prompts = vars(prepared.batch).values()
    conditioning, null = halves(script.FAMILY.encode_prompts(models.pipeline, prompts, 16, null=True))
    a, s = diffusion.coefficients(timesteps)
    x0 = script.generate(models.generator, script.FAMILY, diffusion, z, [999], conditioning)
    x_t = a * x0 + s * noise
    d_assistant = script.predict(models.assistant, script.FAMILY, diffusion, x_t, timesteps, conditioning)
    d_plain = script.predict(models.reference, script.FAMILY, diffusion, x_t, timesteps, conditioning)
    d_null = script.predict(models.reference, script.FAMILY, diffusion, x_t, timesteps, null)
    d_guided = d_null + 7.5 * (d_plain - d_null)
    inside = args.cfg_mode == "in"
    d_reference = d_guided if inside else d_plain
    method = script.Method()  # the defaults but for guidance
    loss = script.score_divergence_loss(x0, d_assistant, d_reference, a, s, method)
    if not inside:
        loss = loss - scale * ((d_plain - d_null).detach() * x0).sum((1, 2, 3))
    images = script.FAMILY.decode(models.pipeline.vae, x0).clamp(0, 1)
    (loss - 100 * models.rewards["pickscore"][1](images, prompts)).mean().backward()
    joint = torch.cat([parameter.grad.flatten() for parameter in models.generator.parameters()])
    assert (gradient - joint).norm() < 1e-5 * joint.norm()


def test_recipes_give_different_gradients_on_one_batch(script, prepare):
    prepared = prepare(recipe="di_star_in")
    reward, gradients = prepared.models.rewards["pickscore"][1], {}
    for recipe in script.RECIPES:
        divergence, reward_scale, cfg_scale, cfg_mode = script.RECIPES[recipe]
        prepared.models.rewards = {"pickscore": (reward_scale, reward)} if reward_scale else {}
        set_method(script, prepared, divergence=divergence, cfg_scale=cfg_scale, cfg_mode=cfg_mode)
        gradients[recipe] = generator_gradient(script, prepared)
    names = list(gradients)
    for index, one in enumerate(names):
        for other in names[:index]:
            difference = (gradients[one] - gradients[other]).norm()
            assert difference > 1e-3 * gradients[one].norm(), (one, other)


def test_kl_and_the_detached_score_move_the_generator_the_same_way(script, prepare):
    """On one sample, where the positive weight is a mere factor; the full gradient points elsewhere."""
    prepared = prepare(batch_size=1, recipe="kl_only")
    kl = generator_gradient(script, prepared)
    set_method(script, prepared, divergence="score", score_gradient="detached")
    detached = generator_gradient(script, prepared)
    set_method(script, prepared, divergence="score")
    full = generator_gradient(script, prepared)
    assert torch.cosine_similarity(kl, detached, dim=0) > 1 - 1e-5
    assert torch.cosine_similarity(kl, full, dim=0) < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_changes_no_gradient(script, prepare, rank):
    plain, checkpointed = [
        generator_gradient(script, prepare(assistant_lora_rank=rank, gradient_checkpointing=on))
        for on in (False, True)]
    assert (plain - checkpointed).norm() <= 1e-6 * plain.norm()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [
    "di_star_in", "di_star_out", "sim", "diff_instruct_pp", "diff_instruct", "di_star_in_reward_1",
    "di_star_in_reward_10", "di_star_in_cfg_4.5", "score_only", "kl_only"])
def test_every_recipe_trains(script, train, tmp_path, recipe):
    out = train(tmp_path / "run", recipe=recipe, max_train_steps=1)
    (line,) = metrics(out)
    _, reward_scale, cfg_scale, cfg_mode = script.RECIPES[recipe]
    assert ("reward" in line) == (reward_scale > 0)
    assert ("grad_cfg" in line) == (cfg_mode == "out")
    assert line["grad_norm_generator"] > 0 or cfg_scale == 0  # unguided, the two models agree at the start


def test_accumulated_batches_train_as_one_larger_batch(train, tiny, tmp_path):
    one = train(tmp_path / "one", train_batch_size=4, **WELL_CONDITIONED)
    two = train(tmp_path / "two", train_batch_size=2, gradient_accumulation_steps=2, **WELL_CONDITIONED)
    half = train(tmp_path / "half", train_batch_size=2, **WELL_CONDITIONED)
    assert relative_difference(one, two, tiny) < 1e-5
    assert relative_difference(one, half, tiny) > 1e-2


# --------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("family, kind", [
    ("sd15", "full"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("sd15", "lora"), ("sd15", "shared"), ("sd15", "stream"))), ("sdxl", "shared")])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(script, train, tmp_path, monkeypatch, kind):
    """Stopped in its third step, after logging steps that no checkpoint holds."""
    more = {"max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True, "assistant_updates": 2,
            "lr_scheduler": "cosine", "lr_warmup_steps": 1, "validation_prompts": ["a cat", "a dog"],
            "validation_steps": 4, "train_batch_size": 2}
    if kind == "lora":
        more["assistant_lora_rank"] = 2
    if kind == "shared":
        more |= {"assistant_lora_rank": 2, "generator_lora_rank": 3, "shared_base": True,
                 "generator_init": "reference"}
    if kind == "stream":
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "prompts.txt").write_text("\n".join(f"prompt {index}" for index in range(7)))
        more |= {"prompts_file": None, "dataset_name": tmp_path / "data", "streaming": True}
    whole = train(tmp_path / "whole", **more)

    train_step = script.train_step

    def stopped(trainer):
        if trainer.step == 3:
            raise KeyboardInterrupt
        train_step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(script, "train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", **more)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [0, 1, 2, 3]
    parts = train(tmp_path / "parts", resume_from_checkpoint="latest", **more)

    assert metrics(parts) == metrics(whole)
    assert [line["step"] for line in metrics(whole)] == [0, 1, 2, 3, 4, 4]
    one, other = whole / "checkpoint-4", parts / "checkpoint-4"
    for name in ("generator.safetensors", "assistant.safetensors"):
        assert_same(load_file(one / name), load_file(other / name))
    kept = [torch.load(folder / "trainer.pt", weights_only=True) for folder in (one, other)]
    assert_same(*kept)
    assert {"ema", "logs", "observers", "optimizers", "scales", "schedules", "terms"} == set(kept[0])
    seen = [json.loads((folder / "state.json").read_text())["prompts_seen"] for folder in (one, other)]
    assert seen == [4 * 3 * 2] * 2
    assert_same(unet_weights(parts), unet_weights(whole))
    image = "validation/step-000004.png"
    assert (parts / image).read_bytes() == (whole / image).read_bytes()


def test_only_the_newest_checkpoints_are_kept_where_asked(train, tmp_path):
    out = train(tmp_path / "run", max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in out.glob("*-[0-9]*")) == ["checkpoint-2", "checkpoint-3"]


# --------------------------------------------------------------------------------------------- exporting


@pytest.mark.parametrize("family, prediction_type, zero_snr", [
    ("sd15", "epsilon", False), ("sd15", "v_prediction", False), ("sd15", "sample", False),
    ("sdxl", "v_prediction", True)])
def test_a_stock_pipeline_generates_what_training_did(script, family, train, tiny, tmp_path, prediction_type,
                                                      zero_snr):
    """Latents to 1e-5 and the validation image to one grey level, for every prediction type."""
    import numpy

    folder = tiny_pipeline(tmp_path / "pipeline", tiny["clip"], prediction_type, family)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", rescale_betas_zero_snr=zero_snr)
    scheduler.save_pretrained(folder / "scheduler")
    prompt = "a large cat"
    out = train(tmp_path / "run", pretrained_model_name_or_path=folder, use_ema=True,
                validation_prompts=[prompt], num_validation_images=1, generator_timesteps=899)
    pipeline = DiffusionPipeline.from_pretrained(out)
    z = torch.randn(4, 8, 8, generator=script.seeded_rng(0, "validation", 0, 0))[None]
    call = {"prompt": prompt, "latents": z, "height": 16, "width": 16, "num_inference_steps": 1,
            "timesteps": [899], "guidance_scale": 0}

    diffusion = script.VariancePreserving(scheduler.alphas_cumprod, prediction_type)
    conditioning = script.FAMILY.encode_prompts(pipeline, [prompt], 16)
    with torch.no_grad():
        x0 = script.generate(pipeline.unet, script.FAMILY, diffusion, z[:, None], [899], conditioning)
        image = script.FAMILY.decode(pipeline.vae, x0).clamp(0, 1)
    torch.testing.assert_close(pipeline(**call, output_type="latent").images, x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pipeline(**call, output_type="pt").images, image, rtol=1e-5, atol=1e-5)

    generated = numpy.asarray(pipeline(**call).images[0]).astype(int)
    assert abs(generated - validation_images(out, 2)[0]).max() <= 1
    assert generated.std() > 5


def test_the_average_is_what_is_exported(train, tmp_path):
    """With a decay of 0 the average is the last generator; else it lags behind it."""
    plain, followed, lagging = [unet_weights(train(tmp_path / name, **more)) for name, more in {
        "plain": {}, "followed": {"use_ema": True, "ema_decay": 0.0},
        "lagging": {"use_ema": True, "ema_decay": 0.999}}.items()]
    assert_same(followed, plain)
    assert not any(torch.equal(lagging[key], plain[key]) for key in plain)


def test_stock_diffusers_loads_the_exported_lora_whole(script, train, tiny, tmp_path):
    out = train(tmp_path / "run", generator_lora_rank=2, generator_init="reference", max_train_steps=1,
                checkpointing_steps=1)
    trained = load_file(out / "checkpoint-1" / "generator.safetensors")
    trained = {key.removeprefix("base."): value for key, value in trained.items()}
    assert all("lora" in key for key in trained), "a checkpoint holds what was trained, not the frozen base"
    assert any("attn" in key for key in trained) and any("conv1" in key for key in trained)
    pipeline = DiffusionPipeline.from_pretrained(tiny["pipeline"])
    pipeline.load_lora_weights(out, weight_name=LORA_FILE, adapter_name="generator")
    loaded = {key: value for key, value in pipeline.unet.state_dict().items() if "lora" in key}
    assert_same(loaded, trained)
    config = pipeline.unet.peft_config["generator"]
    assert (config.r, config.lora_alpha) == (2, 2)


# -------------------------------------------------------------------------------------- generator's start


@pytest.fixture
def reference(family):
    torch.manual_seed(0)
    return tiny_unet(family)


@pytest.fixture
def start(script, flags, tiny, reference, tmp_path):
    """The generator that the flags make of a start, on a random reference."""
    def build(init, **more):
        args = script.parse_args(script.FAMILY, flags(tmp_path / "run", generator_init=init, **more))
        return script.load_generator(script.FAMILY, args, reference, torch.float32)
    return build


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_generator_starts_from_one_weights_file(family, start, tmp_path, suffix):
    """In half precision, as DMD2 publishes its files."""
    torch.manual_seed(5)
    weights = tiny_unet(family).half().state_dict()
    path = tmp_path / f"unet_fp16.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    started = start(path).state_dict()
    assert_same(dict(started), {key: value.float() for key, value in weights.items()})


@pytest.mark.parametrize("folder", ["unet", "pipeline"])
def test_the_generator_starts_from_a_unet_or_pipeline_folder(start, tiny, folder):
    subfolder = "unet" if folder == "pipeline" else None
    expected = UNet2DConditionModel.from_pretrained(tiny[folder], subfolder=subfolder).state_dict()
    assert_same(dict(start(tiny[folder]).state_dict()), dict(expected))


def test_the_generator_starts_as_a_copy_of_the_reference(start, reference):
    generator = start("reference")
    assert_same(dict(generator.state_dict()), dict(reference.state_dict()))
    held = [{value.data_ptr() for value in unet.parameters()} for unet in (generator, reference)]
    assert not held[0] & held[1]
    assert all(parameter.requires_grad for parameter in generator.parameters())


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload",)


def test_a_weights_file_runs_no_code(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv_in.weight": Payload()}, tmp_path / "unet.bin")
    with pytest.raises(SystemExit):
        start(tmp_path / "unet.bin")
    assert not (tmp_path / "payload").exists()


@pytest.mark.parametrize("misfit, words", [
    (lambda weights: weights.pop("conv_in.bias"), "it lacks conv_in.bias, and has nothing in excess"),
    (lambda weights: weights.update(extra=torch.zeros(2)), "it lacks nothing, and has extra in excess"),
    (lambda weights: weights.update({"conv_in.bias": torch.zeros(2)}), "size mismatch for conv_in.bias"),
], ids=["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_named_in_one_line(family, start, tmp_path, capsys, misfit, words):
    weights = tiny_unet(family).state_dict()
    misfit(weights)
    save_file(weights, tmp_path / "unet.safetensors")
    with pytest.raises(SystemExit) as ending:
        start(tmp_path / "unet.safetensors")
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--generator_init" in line and words in line


# ------------------------------------------------------------------------------------ in other processes


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_script_runs_alone_in_an_empty_folder(script, flags, tmp_path, run_warm):
    """The default recipe; and it says which file it lacks where a flag asks for an extra."""
    shutil.copy(script.__file__, tmp_path)
    name = os.path.basename(script.__file__)
    ran = run_warm(name, *flags("run", max_train_steps=1))
    assert ran.returncode == 0 and (tmp_path / "run" / "model_index.json").exists(), ran.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {name, "run"}
    for extra, more in {"memory": {"dry_run": True}, "sharding": {"sharding": "fsdp"},
                        "offload": {"offload": True}, "rewards": {"reward": "imagereward=1"}}.items():
        ran = run_warm(name, *flags("other", **more))
        (line,) = ran.stderr.splitlines()
        assert ran.returncode == 2 and line.startswith("error: --") and f"needs utils/{extra}.py" in line
        assert not (tmp_path / "other").exists()


# ----------------------------------------------------------------------------------- what an update does


@pytest.fixture
def trainer(script, load):
    """Before its first step, with prompts numbered by position."""
    def build(**more):
        prepared = load(**more)
        prompts = script.Prompts([f"prompt {index}" for index in range(13)], 0)
        return script.TrainingRun(prepared.args, prepared.models, prepared.terms, prepared.observers, prompts,
                                  prepared.accelerator)
    return build


@pytest.mark.parametrize("name", ["assistant", "generator"])
def test_gradients_are_clipped_to_their_norm_before_the_optimizer_sees_them(trainer, name):
    made = trainer(max_grad_norm=0.5)
    parameters, seen = list(made.parameters[name].values()), []
    made.optimizers[name].register_step_pre_hook(lambda *_: seen.append(
        torch.cat([parameter.grad.flatten() for parameter in parameters])))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    whole = sum(parameter.numel() for parameter in parameters) ** 0.5
    made.update(name)
    assert seen[0].norm().item() == pytest.approx(0.5, rel=1e-4) and (seen[0] > 0).all()
    assert made.logs[f"grad_norm_{name}"][0].item() == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("more", [
    {}, {"generator_lora_rank": 2, "assistant_lora_rank": 2, "shared_base": True,
         "generator_init": "reference"}],
    ids=["full", "lora"])
def test_assistant_and_reference_see_the_times_of_the_batch(script, trainer, more):
    """The assistant in both steps and the reference, each sample at its own; the generator at T."""
    made = trainer(cfg_scale=1, **more)
    seen, times = {name: [] for name in ("generator", "assistant", "reference")}, []
    for name, called in seen.items():
        network = getattr(made.models, name)
        network.register_forward_pre_hook(lambda _, given, called=called: called.append(given[1].tolist()))
    for name, step in (("assistant", script.assistant_step), ("generator", script.generator_step)):
        for batch in made.batches(name, name):
            times.append(batch.timesteps.tolist())
            terms = [made.terms.values()] if name == "generator" else []
            step(made.models, batch, *terms, made.method, made.accelerator)
    assert seen["assistant"] == times and seen["reference"] == times[1:]
    assert seen["generator"] == [[999] * 4] * 2
    assert all(len(set(batch)) == 4 for batch in times) and times[0] != times[1]


def test_processes_take_other_noise_and_prompts_and_accumulation_goes_on(trainer):
    """Two processes with two accumulated batches of two: the eight samples of one batch of eight."""
    def samples(size, rounds, rank, processes):
        made = trainer(batch_size=size, gradient_accumulation_steps=rounds)
        made.accelerator = SimpleNamespace(device="cpu", num_processes=processes, process_index=rank,
                                           reduce=lambda tensor: tensor)
        found = [(z.flatten().tolist(), noise.flatten().tolist(), time.item(), prompt)
                 for z, noise, times, prompts in map(attrgetter("z", "noise", "timesteps", "prompts"),
                                                     made.batches("generator", "g"))
                 for z, noise, time, prompt in zip(z, noise, times, prompts)]
        assert made.prompts_seen == 8
        return found

    alone = samples(8, 1, 0, 1)
    parts = [samples(2, 2, rank, 2) for rank in range(2)]
    assert parts[0][:2] + parts[1][:2] + parts[0][2:] + parts[1][2:] == alone
    assert len({tuple(sample[0]) for sample in alone}) == len({sample[3] for sample in alone}) == 8
