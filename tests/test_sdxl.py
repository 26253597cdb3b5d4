"""What only SDXL has: two text encoders, size conditions, null prompt, its VAE's precision, DMD2's file."""

import pytest
import torch
from conftest import halves, tiny_unet
from diffusers import AutoencoderKL, StableDiffusionXLPipeline


PROMPTS = ["a large red star", "a cat", ""]


@pytest.fixture
def family():
    return "sdxl"


@pytest.fixture
def pipeline(tiny):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny["pipeline"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_defaults_are_the_models_of_the_paper(script, tmp_path, monkeypatch):
    args = script.parse_args(script.FAMILY, ["--prompts_file=absent.txt", "--dry_run"])
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert args.reward_model_name_or_path == "yuvalkirstain/PickScore_v1"
    assert (args.generator_timesteps, args.resolution, args.recipe) == ([399], 1024, "di_star_in")
    asked = []
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "unet.bin")
    base = torch.nn.Linear(3, 2, bias=False)
    base.config = None
    monkeypatch.setattr(torch.nn.Linear, "from_config", lambda config: torch.nn.Linear(3, 2, bias=False),
                        raising=False)
    monkeypatch.setattr(script.load_extra("starts", "a test"), "hf_hub_download",
                        lambda *where: asked.append(where) or tmp_path / "unet.bin")
    unet, lora = script.load_network(script.FAMILY, args.generator_init, base, shared=False)
    assert asked == [("tianweiy/DMD2", "dmd2_sdxl_1step_unet_fp16.bin")]
    assert torch.equal(unet.weight, torch.ones(2, 3)) and lora is None


def test_the_unet_is_conditioned_as_the_pipeline_does_it(script, pipeline):
    """Against what the pipeline's own call hands to its UNet, guided, at a square resolution."""
    seen = []
    forward = pipeline.unet.forward

    def watched(*given, **conditioning):
        seen.append(conditioning)
        return forward(*given, **conditioning)
    pipeline.unet.forward = watched
    pipeline(PROMPTS, height=16, width=16, num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    conditional, null = halves(script.FAMILY.encode_prompts(pipeline, PROMPTS, 16, null=True))
    (call,) = seen
    torch.testing.assert_close(call["encoder_hidden_states"], torch.cat(
        [null["encoder_hidden_states"], conditional["encoder_hidden_states"]]))
    for name in ("text_embeds", "time_ids"):
        torch.testing.assert_close(call["added_cond_kwargs"][name], torch.cat(
            [null["added_cond_kwargs"][name], conditional["added_cond_kwargs"][name]]))
    assert conditional["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3


@pytest.mark.parametrize("zeros", [True, False])
def test_the_null_prompt_matches_the_pipeline_and_an_empty_prompt_is_encoded(script, tiny, pipeline, tmp_path,
                                                                             flags, zeros):
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    pipeline.save_pretrained(tmp_path / "pipeline")
    given = flags(tmp_path / "run", pretrained_model_name_or_path=tmp_path / "pipeline")
    args = script.parse_args(script.FAMILY, given)
    pipeline = script.load_pipeline(script.FAMILY, args, torch.float32)
    conditional, null = halves(script.FAMILY.encode_prompts(pipeline, PROMPTS, 16, null=True))
    for values in (null["encoder_hidden_states"], null["added_cond_kwargs"]["text_embeds"]):
        assert (values == 0).all() == zeros
    empty = conditional["encoder_hidden_states"][2]
    assert empty.norm() > 0 and torch.equal(empty, null["encoder_hidden_states"][2]) == (not zeros)


def test_the_vae_stays_in_float32_unless_another_is_given(load, tiny, tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny["pipeline"], subfolder="vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(tmp_path / "vae")
    for more, dtype in (({}, torch.float32), ({"pretrained_vae_model_name_or_path": tmp_path / "vae"},
                                              torch.bfloat16)):
        models = load(mixed_precision="bf16", **more).models
        assert models.reward_vae.dtype == models.pipeline.vae.dtype == dtype
        assert models.reference.dtype == models.pipeline.text_encoder_2.dtype == torch.bfloat16
        assert models.generator.dtype == models.assistant.dtype == torch.float32
        bias = models.pipeline.vae.decoder.conv_out.bias.float()
        torch.testing.assert_close(bias, vae.decoder.conv_out.bias - (0 if more else 1), rtol=1e-2, atol=1e-2)


def test_a_file_as_dmd2_publishes_it_loads_and_a_renamed_key_is_named(load, tmp_path, capsys):
    weights = tiny_unet("sdxl").half().state_dict()
    path = tmp_path / "dmd2_sdxl_1step_unet_fp16.bin"

    torch.save(weights, path)
    for key, value in load(generator_init=path).models.generator.state_dict().items():
        assert torch.equal(value, weights[key].float())
    weights["add_embedding.linear_3.weight"] = weights.pop("add_embedding.linear_1.weight")
    capsys.readouterr()
    torch.save(weights, path)
    with pytest.raises(SystemExit) as ending:
        load(generator_init=path)
    error = capsys.readouterr().err.splitlines()[-1]
    assert ending.value.code == 2 and "--generator_init" in error
    assert 'it lacks add_embedding.linear_1.weight, and has' in error
    assert "add_embedding.linear_3.weight in excess" in error
