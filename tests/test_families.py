"""Families of examples/families: whole runs on tiny models, and what stock diffusers makes of the result."""

import re

import diffusers
import diffusers.schedulers.scheduling_lcm as lcm
import pytest
import torch
from conftest import assert_same, metrics
from safetensors.torch import load_file


FAMILIES = ["sd3", "flux2_klein", "pixart"]
STEPS = {"sd3": [1000, 900, 750.5, 500], "flux2_klein": [1000, 967.38, 908.14, 767.19],
         "pixart": [400, 300, 200, 100]}
LORA = {"generator_lora_rank": 2, "assistant_lora_rank": 2, "shared_base": True}
pytestmark = pytest.mark.parametrize("family", FAMILIES)


def weights_of(out, script):
    return load_file(out / script.PART / "diffusion_pytorch_model.safetensors")


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
    network, size = getattr(pipeline, script.PART), 32 if family == "flux2_klein" else 16
    z, *_ = script.sample_noise(0, "validation", 0, range(2), (network.config.in_channels, 8, 8),
                                script.Method(), "cpu", steps)
    noises = iter(z[:, 1:].unbind(1))
    monkeypatch.setattr(lcm, "randn_tensor", lambda *_, **__: next(noises))
    call = {"sigmas": [timestep / 1000 for timestep in timesteps]}
    if family == "pixart":
        call = {"timesteps": timesteps, "use_resolution_binning": False}
    latents = pipeline(prompt=["a cat"] * 2, latents=z[:, 0], height=size, width=size, guidance_scale=0,
                       output_type="latent", **call).images
    if "sigmas" in call:
        assert pipeline.scheduler.sigmas.tolist() == pytest.approx([*call["sigmas"], 0], abs=1e-7)
    given = [] if script.CONTINUOUS else [pipeline.scheduler.alphas_cumprod, "epsilon"]
    with torch.no_grad():
        conditioning = script.encode_prompts(pipeline, ["a cat"] * 2, size)
        x0 = script.generate(network, script.Diffusion(*given), z, timesteps, conditioning)
        x0 = script.unpack(pipeline.vae, x0) if family == "flux2_klein" else x0
    assert (latents - x0).norm() < 1e-6 * x0.norm()
    moved = weights_of(out, script)
    start = load_file(tiny["pipeline"] / script.PART / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(moved[key], start[key]) for key in start)
    first, last = [line for line in metrics(out) if "validation_reward" in line]
    assert first["validation_reward"] != last["validation_reward"] and metrics(out)[1]["grad_divergence"] > 0


def test_a_run_resumes_to_the_bit(script, family, train, tmp_path):
    more = {"generator_timesteps": STEPS[family], "resolution": 32 if family == "flux2_klein" else 16,
            "use_ema": True, "max_train_steps": 4, "checkpointing_steps": 2}
    whole = train(tmp_path / "whole", **more)
    train(tmp_path / "cut", **more | {"max_train_steps": 2})
    cut = train(tmp_path / "cut", **more, resume_from_checkpoint="latest")
    assert_same(weights_of(whole, script), weights_of(cut, script))
