"""Beyond the paper: generators of a few steps, preferences without a reward model, rewards only watched."""

import json

import diffusers.schedulers.scheduling_lcm as lcm
import pytest
import torch
from conftest import LORA_FILE, assert_same, generator_gradient, metrics, tiny_unet
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file

from examples.rewards.relative import Relative


FOUR = [999, 749, 499, 249]


def at(timestep):
    return torch.full((4,), timestep)


def with_steps(script, prepared, steps):
    """The prepared batch with noise for so many steps."""
    batch = prepared.batch
    z, *_ = script.sample_noise(0, "generator", 0, range(len(batch.z)), (4, 8, 8), prepared.method,
                                prepared.models.process, "cpu", steps)
    batch.z = z.to(batch.z)
    return prepared


# ------------------------------------------------------------------------------------------- few steps


def test_more_steps_draw_more_noise_and_leave_the_other_draws_as_they_are(script):
    one, four = (script.sample_noise(5, "generator", 2, range(3), (4, 2, 2), script.Method(),
                                     script.VariancePreserving, "cpu", steps)
                 for steps in (1, 4))
    assert one[0].shape == (3, 1, 4, 2, 2) and four[0].shape == (3, 4, 4, 2, 2)
    assert torch.equal(four[0][:, :1], one[0]) and all(map(torch.equal, one[1:], four[1:]))
    assert len(four[0].unique()) == four[0].numel()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timesteps", [FOUR, [999, 20, 1], [500, 499]])
def test_the_rollout_equals_the_stock_scheduler(script, kind, timesteps, monkeypatch):
    trained = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                            prediction_type=kind, clip_sample=True)
    process = script.VariancePreserving(trained.alphas_cumprod, kind)
    scheduler = process.exported_scheduler(trained)
    z = torch.randn(3, len(timesteps), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    unet = tiny_unet()
    conditioning = {"encoder_hidden_states": torch.randn(3, 5, 16)}
    noises = iter(z[:, 1:].unbind(1))
    monkeypatch.setattr(lcm, "randn_tensor", lambda *_, **__: next(noises))
    scheduler.set_timesteps(timesteps=timesteps)
    latents = z[:, 0]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = unet(latents, timestep, **conditioning).sample
            latents = scheduler.step(output, timestep, latents).prev_sample
        x0 = script.generate(unet, script.FAMILY, process, z, timesteps, conditioning)
    assert (latents - x0).norm() < 1e-6 * x0.norm()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_exported_pipeline_generates_what_validation_did(script, train, tiny, tmp_path, monkeypatch):
    out = train(tmp_path / "run", generator_timesteps=FOUR, use_ema=True, validation_prompts=["a cat"],
                num_validation_images=2, max_train_steps=3)
    pipeline = DiffusionPipeline.from_pretrained(out)
    method = script.Method(generator_timesteps=FOUR)
    process = script.VariancePreserving(pipeline.scheduler.alphas_cumprod, "epsilon")
    z, *_ = script.sample_noise(0, "validation", 0, range(2), (4, 8, 8), method, process, "cpu", 4)
    noises = iter(z[:, 1:].unbind(1))
    monkeypatch.setattr(lcm, "randn_tensor", lambda *_, **__: next(noises))
    latents = pipeline(["a cat"] * 2, latents=z[:, 0], height=16, width=16, timesteps=FOUR, guidance_scale=0,
                       output_type="latent").images
    with torch.no_grad():
        conditioning = script.FAMILY.encode_prompts(pipeline, ["a cat"] * 2, 16)
        x0 = script.generate(pipeline.unet, script.FAMILY, process, z, FOUR, conditioning)
        rewards = json.loads((out / "validation" / "step-000003.json").read_text())
        images = script.FAMILY.decode(pipeline.vae, x0).clamp(0, 1)
        clip = script.ClipReward(script.CLIPModel.from_pretrained(tiny["clip"]),
                                 script.CLIPProcessor.from_pretrained(tiny["clip"]))
        expected = clip(images, ["a cat"] * 2).tolist()
    assert (latents - x0).norm() < 1e-6 * x0.norm()
    assert [row["reward"] for row in rewards] == pytest.approx(expected, abs=1e-5)
    card = (out / "README.md").read_text()
    assert "A 4-step text-to-image generator" in card and "timesteps=[999, 749, 499, 249]" in card


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_gradient_is_that_of_the_last_call_alone(script, prepare, precision):
    """Under autocast too, which would hand on its copies of weights that were made without gradients."""
    prepared = with_steps(script, prepare(generator_timesteps=FOUR, mixed_precision=precision), 3)
    models, accelerator = prepared.models, prepared.accelerator
    family, process, z = models.family, models.process, prepared.batch.z
    conditioning, _ = script.encode(models, prepared.batch.prompts, null=False)
    x_t = z[:, 0]
    for step, timestep in enumerate(FOUR[:2]):
        with torch.no_grad(), accelerator.autocast():
            x0 = script.predict(models.generator, family, process, x_t, at(timestep), conditioning)
        a, s = process.coefficients(at(FOUR[step + 1]))
        x_t = a * x0 + s * z[:, step + 1]
    found = []
    for whole in (True, False):
        with accelerator.autocast():
            if whole:
                x0 = script.generate(models.generator, family, process, z, FOUR, conditioning)
            else:
                x0 = script.predict(models.generator, family, process, x_t, at(499), conditioning)
        x0.square().sum().backward()
        found.append([parameter.grad for parameter in models.generator.parameters()])
        assert all(gradient.norm() > 0 for gradient in found[-1])
        models.generator.zero_grad()
    assert_same(*found)


def test_one_step_is_the_plain_prediction_at_its_timestep(script, prepare):
    prepared = prepare()
    models, batch = prepared.models, prepared.batch
    conditioning, _ = script.encode(models, batch.prompts, null=False)
    given = models.generator, models.family, models.process
    x0 = script.generate(*given, batch.z, [999], conditioning)
    plain = script.predict(*given, batch.z[:, 0], at(999), conditioning)
    assert torch.equal(x0, plain)


@pytest.fixture
def begin(script, load):
    def build(**more):
        held = load(generator_timesteps=FOUR, **more)
        return script.TrainingRun(held.args, held.models, held.terms, held.observers,
                                  script.Prompts(["a", "b"], 0), held.accelerator)
    return build


def test_the_rollout_length_is_drawn_per_update_and_shared_by_its_batches(begin):
    run, ends = begin(gradient_accumulation_steps=2, batch_size=1), {"assistant": [], "generator": []}
    for run.step in range(40):
        for name in ends:
            one, other = [batch.z.shape[1] for batch in run.batches(name, name)]
            assert one == other
            ends[name].append(one)
    assert all(set(drawn) == {1, 2, 3, 4} for drawn in ends.values())
    assert ends["assistant"] != ends["generator"]


@pytest.mark.parametrize("reward_steps, rewarded", [("last", [4]), ("all", [1, 2, 3, 4])])
def test_the_divergence_acts_at_every_step_and_the_reward_where_it_is_meant_to(script, prepare, reward_steps,
                                                                               rewarded):
    prepared = prepare(generator_timesteps=FOUR, reward_steps=reward_steps)
    for steps in range(1, 5):
        with_steps(script, prepared, steps)
        logs = script.generator_step(prepared.models, prepared.batch, prepared.terms, prepared.method,
                                     prepared.accelerator)
        assert logs["grad_divergence"].min() > 0
        assert ("grad_reward" in logs) == (steps in rewarded)


@pytest.mark.slow
def test_a_run_of_four_steps_resumes_to_the_bit(train, tmp_path):
    more = {"generator_timesteps": FOUR, "use_ema": True, "max_train_steps": 6, "checkpointing_steps": 3}
    whole = train(tmp_path / "whole", **more)
    train(tmp_path / "cut", **more | {"max_train_steps": 3})
    cut = train(tmp_path / "cut", **more, resume_from_checkpoint="latest")
    file = "unet/diffusion_pytorch_model.safetensors"
    assert_same(load_file(whole / file), load_file(cut / file))
    assert metrics(whole) == metrics(cut)


# ----------------------------------------------------------------------------- preferences without a reward


@pytest.fixture
def preference(tiny, tmp_path):
    """A UNet beside the reference."""
    torch.manual_seed(23)
    unet = type(tiny_unet()).from_pretrained(tiny["pipeline"], subfolder="unet")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    unet.save_pretrained(tmp_path / "preference")
    return tmp_path / "preference"


@pytest.mark.parametrize("weighting", ["clean", "score"])
def test_with_kl_it_is_kl_with_that_reference(script, prepare_double, preference, weighting):
    """(S_A - S_R) - (S_P - S_R) = S_A - S_P, where w(t) knows no reference."""
    found, assistant = [], None
    for more in ({"preference_unet": preference, "preference_scale": 1}, {"reference_unet": preference}):
        prepared = prepare_double(recipe="kl_only", weighting=weighting, **more)
        if assistant:  # the assistant starts as the reference, which is another one
            prepared.models.assistant.load_state_dict(assistant)
        assistant = prepared.models.assistant.state_dict()
        found.append(generator_gradient(script, prepared))
    one, other = found
    assert (one - other).norm() < 1e-6 * one.norm() and one.norm() > 0
    alone = prepare_double(recipe="kl_only", weighting=weighting)
    alone.models.assistant.load_state_dict(assistant)
    assert (generator_gradient(script, alone) - one).norm() > 0.1 * one.norm(), "it changes the gradient"


@pytest.fixture
def preference_lora(script, train, tmp_path):
    """A LoRA on the reference as diffusers saves it."""
    out = train(tmp_path / "lora", generator_lora_rank=2, generator_init="reference", learning_rate=0.05)
    return out / LORA_FILE


@pytest.mark.slow
@pytest.mark.parametrize("shared_base", ["all", "assistant"])
def test_a_lora_on_the_shared_base_is_the_network_of_its_own(script, prepare_double, preference_lora,
                                                             shared_base):
    more = {"preference_unet": preference_lora, "generator_lora_rank": 2, "assistant_lora_rank": 2,
            "generator_init": "reference", "gradient_checkpointing": True, "recipe": "sim"}
    one, other = prepare_double(**more, shared_base=shared_base), prepare_double(**more)
    networks = [term.networks["preference"] for prepared in (one, other) for term in prepared.terms
                if term.name == "preference"]
    assert networks[0].base is one.models.reference.base
    assert not script.trainable_parameters(networks[0])
    assert not any("lora" in key for key in networks[1].state_dict())
    found = [generator_gradient(script, prepared) for prepared in (one, other)]
    assert (found[0] - found[1]).norm() < 1e-6 * found[0].norm()
    one.terms = [term for term in one.terms if term.name != "preference"]
    assert (generator_gradient(script, one) - found[0]).norm() > 1e-3 * found[0].norm()


def test_a_run_without_a_reward_model(train, preference, tmp_path):
    out = train(tmp_path / "run", preference_unet=preference, preference_scale=2, reward_scale=0)
    (first, *_), card = metrics(out), (out / "README.md").read_text()
    assert first["grad_preference"] > 0 and "grad_reward" not in first
    assert "the reward is 2 x the implicit reward of `preference`." in card.replace("\n", " ")


@pytest.mark.slow
def test_a_preference_model_is_counted(script, flags, tmp_path, preference, capsys):
    peaks = []
    for more in ({}, {"preference_unet": preference}):
        args = script.parse_args(script.FAMILY, flags(tmp_path / "run", dry_run=True, **more))
        script.main(script.FAMILY, args)
        peaks.append(capsys.readouterr().out)
    assert "\npreference " in peaks[1] and "\npreference " not in peaks[0]


# ---------------------------------------------------------------------------------- rewards only watched


def test_a_watched_reward_is_logged_and_changes_nothing(train, own_reward, tmp_path):
    watched = own_reward("images.mean((1, 2, 3))")
    plain, seen = [train(tmp_path / name, validation_prompts=["a cat", "a dog"], validation_steps=1, **more)
                   for name, more in {"plain": {}, "seen": {"validation_reward": watched}}.items()]
    file = "unet/diffusion_pytorch_model.safetensors"
    assert_same(load_file(plain / file), load_file(seen / file))
    new = f"validation_reward_{watched}"
    lines = [line for line in metrics(seen) if new in line]
    assert [line["step"] for line in lines] == [0, 1, 2] and all(0 < line[new] < 1 for line in lines)
    for line in lines:
        del line[new]
    assert lines == [line for line in metrics(plain) if "validation_reward" in line]


def test_it_may_be_the_only_reward(train, tmp_path):
    out = train(tmp_path / "run", recipe="sim", validation_prompts=["a cat"], validation_reward="pickscore")
    last = metrics(out)[-1]
    assert "validation_reward_pickscore" in last and "validation_reward" not in last


# ------------------------------------------------------------------------------------ the relative reward


def test_the_relative_reward_is_praise_against_blame(script, tiny):
    reward = script.ClipReward(script.CLIPModel.from_pretrained(tiny["clip"]),
                               script.CLIPProcessor.from_pretrained(tiny["clip"]))
    relative = Relative(reward, praise="good {}", blame="bad {}, {{}}", k=2)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = relative(images, ["a cat", "a {dog}"])
    praised = reward(images, ["good a cat", "good a {dog}"])
    blamed = reward(images, ["bad a cat, {}", "bad a {dog}, {}"])
    torch.testing.assert_close(found, 2 * praised - blamed)
    assert (praised - blamed).abs().min() > 1e-4
    gradient, twice, once = (torch.autograd.grad(one.sum(), images, retain_graph=True)[0]
                             for one in (found, praised, blamed))
    torch.testing.assert_close(gradient, 2 * twice - once)
    assert torch.equal(Relative(reward, "good {}", "bad {}", k=1)(images, ["a cat", "a {dog}"]), praised)


def test_it_trains_as_a_user_reward(train, tiny, tmp_path, monkeypatch):
    (tmp_path / "praise.py").write_text(
        "from examples.rewards.relative import Relative\nfrom utils.rewards import load_reward\n"
        f"def build():\n    reward = load_reward('pickscore:{tiny['clip']}')\n"
        "    return Relative(reward, 'good {}', 'bad {}', 2)\n")
    monkeypatch.chdir(tmp_path)
    out = train(tmp_path / "run", reward="praise:build=100")
    assert metrics(out)[-1]["grad_reward"] > 0
