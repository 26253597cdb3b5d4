"""Starts in the forms in which others published them: each file is made here, by its own program's rules."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import REPOSITORY, load_script, tiny_pipeline, tiny_unet
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from utils import starts


PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
             "sd3": "StableDiffusion3Pipeline", "flux2_klein": "Flux2KleinPipeline",
             "pixart": "PixArtAlphaPipeline"}


each_unet = pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])


def other_unet(family):
    torch.manual_seed(21)
    return tiny_unet(family)


# ------------------------------------------------------------------------------ the authors' names of a UNet

PARTS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
         "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def original_name(name, layers=1, up_blocks=("CrossAttnUpBlock2D", "UpBlock2D")):
    """The name that the authors of Stable Diffusion gave to a weight of diffusers' UNet."""
    for part, own in PARTS.items():
        if name.startswith(f"{part}."):
            return own + name.removeprefix(part)
    block, *rest = name.split(".")
    if block == "mid_block":
        kind, index, *inner = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
    else:
        number, kind, index, *inner = rest
        first, down = int(number) * (layers + 1), block == "down_blocks"
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{inner[-1]}"
        if kind == "upsamplers":
            has_attention = "CrossAttn" in up_blocks[int(number)]
            return f"output_blocks.{first + layers}.{1 + has_attention}.conv.{inner[-1]}"
        place = f"{'input' if down else 'output'}_blocks.{first + int(index) + down}"
        place += f".{int(kind == 'attentions')}"
    if kind == "resnets":
        inner = [RESNET[inner[0]], *inner[1:]]
    return ".".join([place, *inner])


def in_original_names(unet):
    return {f"model.diffusion_model.{original_name(name)}": value
            for name, value in unet.state_dict().items()}


# {family: ({part: the authors' name}, {q: their name for q, k and v in one}, {block: their name})}
TRANSFORMERS = {
    "sd3": ({"pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj",
             "context_embedder": "context_embedder", "proj_out": "final_layer.linear", "norm_out.linear":
             "final_layer.adaLN_modulation.1", "attn.to_out.0": "x_block.attn.proj",
             "attn2.to_out.0": "x_block.attn2.proj", "attn.to_add_out": "context_block.attn.proj",
             "norm1.linear": "x_block.adaLN_modulation.1",
             "norm1_context.linear": "context_block.adaLN_modulation.1",
             **{f"time_text_embed.{part}_embedder.linear_{1 + number // 2}": f"{own}_embedder.mlp.{number}"
                for part, own in (("timestep", "t"), ("text", "y")) for number in (0, 2)},
             **{f"{attention}.norm_{part}": f"x_block.{attention}.ln_{part}"
                for attention in ("attn", "attn2") for part in "qk"},
             **{f"attn.norm_added_{part}": f"context_block.attn.ln_{part}" for part in "qk"},
             **{f"ff{kind}.net.{layer}": f"{own}_block.mlp.{place}" for kind, own in (("", "x"), (
                 "_context", "context")) for layer, place in (("0.proj", "fc1"), ("2", "fc2"))}},
            {"attn.to_q": "x_block.attn.qkv", "attn.add_q_proj": "context_block.attn.qkv",
             "attn2.to_q": "x_block.attn2.qkv"}, {"transformer_blocks": "joint_blocks"}),
    "flux2_klein": ({"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
                     "norm_out.linear": "final_layer.adaLN_modulation.1",
                     "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
                     "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
                     **{f"{part}.linear": f"{part}.lin" for part in (
                         "double_stream_modulation_img", "double_stream_modulation_txt",
                         "single_stream_modulation")},
                     "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
                     "attn.norm_added_q": "txt_attn.norm.query_norm",
                     "attn.norm_added_k": "txt_attn.norm.key_norm", "ff.linear_in": "img_mlp.0",
                     "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0",
                     "ff_context.linear_out": "txt_mlp.2", "attn.to_qkv_mlp_proj": "linear1",
                     "attn.to_out": "linear2"},
                    {"attn.to_q": "img_attn.qkv", "attn.add_q_proj": "txt_attn.qkv"},
                    {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"})}


def in_authors_names(family, network):
    """The weights of a transformer as its authors name and lay them out: shift before scale in some."""
    (parts, fused, blocks), weights, found = TRANSFORMERS[family], network.state_dict(), {}
    last = f"transformer_blocks.{network.config.num_layers - 1}.norm1_context" if family == "sd3" else "-"
    for name, value in weights.items():
        block, part = re.fullmatch(r"(\w*transformer_blocks\.\d+)?\.?(.*)", name).groups()
        part, dot, end = (part, "", "") if part in parts else part.rpartition(".")
        place = f"{blocks[block.split('.')[0]]}.{block.split('.')[1]}." if block else ""
        if part in fused:
            others = [weights[f"{block}.{part.replace('_q', f'_{one}')}.{end}"] for one in "qkv"]
            found[f"{place}{fused[part]}.{end}"] = torch.cat(others)
        elif re.search(r"attn2?\.(to|add)_[kv]", part):
            continue
        elif family == "flux2_klein" and part in ("attn.norm_q", "attn.norm_k"):
            kind = {"q": "norm.query_norm", "k": "norm.key_norm"}[part[-1]]
            found[place + ("" if "single" in block else "img_attn.") + kind + ".scale"] = value
        else:
            if part == "norm_out.linear" or name.startswith(last):
                value = torch.cat(value.chunk(2)[::-1])
            end = "scale" if "query_norm" in parts[part] or "key_norm" in parts[part] else end
            found[f"{place}{parts[part]}{dot}{end}"] = value
    return found


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
@pytest.mark.parametrize("family", ["sd3", "flux2_klein"])
def test_a_transformer_in_its_authors_names_is_a_start(script, family, load, tiny, tmp_path, prefix):
    network = getattr(diffusers, script.FAMILY.network_class).from_pretrained(
        tiny["pipeline"], subfolder="transformer")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    named = {f"{prefix}{name}": value for name, value in in_authors_names(family, network).items()}
    save_file({name: value.contiguous() for name, value in named.items()}, tmp_path / "start.safetensors")
    models = load(generator_init=tmp_path / "start.safetensors",
                  resolution=32 if family == "flux2_klein" else 16).models
    assert_holds(models.generator, network.state_dict())


# ------------------------------------------------------------------------------------- files of a network

def as_half(unet, place):
    unet.half().save_pretrained(place, variant="fp16")


def in_pipeline(unet, place):
    as_half(unet, place / "unet")


def in_shards(unet, place):
    unet.save_pretrained(place, max_shard_size="30KB")
    assert len(list(place.glob("*-of-*.safetensors"))) > 1


def in_half_shards(unet, place):
    unet.half().save_pretrained(place, max_shard_size="30KB", variant="fp16")
    assert (place / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()


def as_bin(unet, place):
    unet.save_pretrained(place, safe_serialization=False)
    assert not list(place.glob("*.safetensors"))


def as_half_bin(unet, place):
    unet.half().save_pretrained(place, safe_serialization=False, variant="fp16")


def checkpoint(unet, place):
    """A whole model in one file, in half precision, with the other parts beside the UNet."""
    others = {"first_stage_model.decoder.conv_in.weight": torch.ones(2), "alphas_cumprod": torch.ones(3)}
    weights = {name: value.half() for name, value in (in_original_names(unet) | others).items()}
    unet.half()
    save_file(weights, place := place.with_suffix(".safetensors"))
    return place


def original_unet(unet, place):
    weights = {name.removeprefix("model.diffusion_model."): value
               for name, value in in_original_names(unet).items()}
    torch.save({"state_dict": weights}, place := place.with_suffix(".ckpt"))
    return place


FORMS = [as_half, in_pipeline, in_shards, in_half_shards, as_bin, as_half_bin, checkpoint, original_unet]


def some_slow(values, quick, name=str):
    """Parameters, of which only the quick ones are of the quick tests."""
    return [pytest.param(value, id=name(value), marks=[pytest.mark.slow] * (value not in quick))
            for value in values]


@pytest.fixture(params=some_slow(FORMS, [as_half, in_shards, checkpoint], lambda form: form.__name__))
def place(request, family, tmp_path):
    """A file or folder that holds a UNet, and this UNet."""
    unet = other_unet(family)
    made = request.param(unet, tmp_path / "start")
    return made or tmp_path / "start", unet.float().state_dict()


def assert_holds(network, weights):
    held = network.state_dict()
    assert held.keys() == weights.keys()
    assert all(torch.equal(value.float(), weights[name]) for name, value in held.items())


@each_unet
def test_each_form_is_a_start_a_reference_and_a_preference_model(load, place):
    path, weights = place
    given = {"generator_init": path, "reference_unet": path, "preference_unet": path}
    prepared = load(**given, timestep_sampling="uniform")
    for network in (prepared.models.generator, prepared.models.reference, prepared.terms[1].network):
        assert_holds(network, weights)


@each_unet
def test_each_form_takes_the_place_of_a_network_in_the_evaluation(tiny, place):
    path, weights = place
    assert_holds(evaluated(tiny["pipeline"], f"--unet={path}").unet, weights)


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_damaged_weights_are_not_replaced_by_those_in_half_precision(script, flags, tiny, tmp_path, capsys,
                                                                     program):
    other_unet("sd15").save_pretrained(tmp_path / "start")
    as_half(other_unet("sd15"), tmp_path / "start")
    path = tmp_path / "start" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit):
        if program == "train":
            script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(
                tmp_path / "run", generator_init=tmp_path / "start")))
        else:
            evaluated(tiny["pipeline"], f"--unet={tmp_path / 'start'}")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "start" in line and "fp16" not in line


def test_the_evaluation_refuses_a_network_that_lacks_weights(tiny, tmp_path, capsys):
    other_unet("sd15").save_pretrained(tmp_path / "start")
    path = tmp_path / "start" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_out.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(SystemExit):
        evaluated(tiny["pipeline"], f"--unet={tmp_path / 'start'}")
    assert "its weights lack conv_out.weight" in capsys.readouterr().err


def test_a_pipeline_in_half_precision_alone_is_a_reference(load, tiny, tmp_path):
    diffusers.StableDiffusionPipeline.from_pretrained(tiny["pipeline"]).to(torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16")
    pipeline = load(pretrained_model_name_or_path=tmp_path / "half").models.pipeline
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.float32
    half = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert_holds(pipeline.unet, {name: value.float() for name, value in half.items()})


def test_an_original_file_that_lacks_a_weight_is_named(script, flags, tmp_path, capsys):
    weights = in_original_names(other_unet("sd15"))
    del weights["model.diffusion_model.out.2.bias"]
    save_file(weights, tmp_path / "start.safetensors")
    with pytest.raises(SystemExit):
        script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(
            tmp_path / "run", generator_init=tmp_path / "start.safetensors")))
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--generator_init" in line and "conv_out.bias" in line


# --------------------------------------------------------------------------------------------------- LoRAs

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2", "conv1",
          "conv_shortcut", "time_emb_proj", "downsamplers.0.conv")


def random_lora(network, layers=LAYERS, rank=4, alpha=2, uneven=False):
    """({module: (down, up)}, {module: alpha}), of other ranks and alphas in each third module if `uneven`."""
    generator, pairs, alphas = torch.Generator().manual_seed(5), {}, {}
    for name, module in network.named_modules():
        if name.endswith(layers) and hasattr(module, "weight"):
            own = 3 if uneven and len(pairs) % 3 == 0 else rank
            weight = module.weight
            down = torch.randn(own, *weight.shape[1:], generator=generator)
            up = torch.randn(len(weight), own, *(1,) * (weight.ndim - 2), generator=generator)
            pairs[name], alphas[name] = (down, up), 1.5 if own == 3 else alpha
    return pairs, alphas


def merged(network, pairs, alphas):
    """The network's weights with W + alpha / rank up down for each pair."""
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    for name, (down, up) in pairs.items():
        weights[f"{name}.weight"] += alphas[name] / len(down) * (up.flatten(1) @ down.flatten(1)).view_as(
            weights[f"{name}.weight"])
    return weights


def kohya(pairs, alphas, rename=lambda name: name):
    """As kohya's trainer, LCM, DMD2, Hyper-SD and SDXL-Lightning name them."""
    weights = {}
    for name, (down, up) in pairs.items():
        start = f"lora_unet_{rename(name).replace('.', '_')}"
        weights |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up,
                    f"{start}.alpha": torch.tensor(float(alphas[name]))}
    return weights


def dotted(pairs, alphas, prefix="", down="lora_A", up="lora_B"):
    weights = {}
    for name, pair in pairs.items():
        weights |= {f"{prefix}{name}.{part}.weight": value for part, value in zip((down, up), pair)}
        if alphas:
            weights[f"{prefix}{name}.alpha"] = torch.tensor(float(alphas[name]))
    return weights


def write_peft(folder, weights, alphas, name="adapter_model.safetensors"):
    """As PEFT's `save_pretrained`, which keeps alphas in its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / name)
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 4, "lora_alpha": alphas, "target_modules": ["to_q"], "rank_pattern": {},
        "base_model_name_or_path": "somebody/model", "inference_mode": True, "alpha_pattern": {}}))
    return folder


def unet_loras():
    """{name of a form: function of a UNet and a folder that returns (place, pairs, alphas)}."""
    def saved(make, **more):
        def write(unet, folder):
            pairs, alphas = random_lora(unet, **more)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(make(pairs, alphas), folder / "lora.safetensors")
            return folder / "lora.safetensors", pairs, alphas
        return write

    def original(name):
        return original_name(f"{name}.weight").removesuffix(".weight")

    def peft(unet, folder):
        pairs, alphas = random_lora(unet)
        return write_peft(folder, dotted(pairs, {}, "base_model.model."), 2), pairs, alphas

    def peft_with_prefix(unet, folder):
        pairs, alphas = random_lora(unet)
        return write_peft(folder, dotted(pairs, {}, "base_model.model.unet."), 2), pairs, alphas

    def as_diffusers(unet, folder):
        pairs, _ = random_lora(unet, alpha=4)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dotted(pairs, {}, "unet."), folder / "pytorch_lora_weights.safetensors")
        return folder, pairs, dict.fromkeys(pairs, 4)

    def pickled(unet, folder):
        pairs, alphas = random_lora(unet)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(kohya(pairs, alphas), folder / "lora.pt")
        return folder / "lora.pt", pairs, alphas

    return {"kohya": saved(kohya), "uneven": saved(kohya, uneven=True),
            "authors": saved(lambda *lora: kohya(*lora, original)),
            "bare": saved(dotted), "alphas": saved(lambda *lora: dotted(*lora, "unet."), uneven=True),
            "diffusion_model": saved(lambda *lora: dotted(*lora, "diffusion_model.", "lora_down", "lora_up")),
            "old": saved(lambda pairs, alphas: dotted(pairs, alphas, "unet.", "lora.down", "lora.up")),
            "peft": peft, "peft_unet": peft_with_prefix, "diffusers": as_diffusers, "pickled": pickled}


@pytest.fixture(params=some_slow(unet_loras(), ["kohya", "uneven", "peft"]))
def lora(request, tiny, tmp_path):
    """(place of a LoRA on the UNet of the pipeline, this UNet's weights, those with the LoRA merged)."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny["pipeline"], subfolder="unet")
    place, pairs, alphas = unet_loras()[request.param](unet, tmp_path / "lora")
    return place, unet.state_dict(), merged(unet, pairs, alphas)


def assert_close(network, weights):
    held = network.state_dict()
    assert held.keys() == weights.keys()
    for name, value in weights.items():
        assert (held[name] - value).norm() <= 1e-5 * value.norm(), name


@each_unet
def test_each_naming_of_a_lora_is_a_reference_and_a_start_on_it(load, lora):
    place, weights, with_lora = lora
    models = load(generator_init=place, reference_unet=place).models
    assert_close(models.reference, with_lora)
    assert_close(models.generator, {name: 2 * with_lora[name] - weights[name] for name in weights})


@each_unet
def test_each_naming_of_a_lora_goes_on_with_its_alphas(script, load, lora):
    place, weights, with_lora = lora
    models = load(generator_init=place, generator_lora_rank=4, assistant_lora_rank=2,
                  shared_base=True).models
    trained = {name.rpartition(".lora_")[0].removeprefix("base.")
               for name in script.trainable_parameters(models.generator)}
    assert trained == {name.removesuffix(".weight") for name in weights
                       if not torch.equal(weights[name], with_lora[name])}
    assert_close(script.load_extra("lora", "a test").fuse_lora(models.generator), with_lora)


@each_unet
def test_each_naming_of_a_lora_is_that_of_the_evaluation(tiny, lora):
    place, _, with_lora = lora
    pipeline = evaluated(tiny["pipeline"], f"--lora={place}")
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()
    assert_close(pipeline.unet, with_lora)


def test_the_evaluation_takes_a_lora_from_the_hub_by_its_file_and_by_its_repository(tiny, on_hub):
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny["pipeline"], subfolder="unet")
    expected = merged(unet, *random_lora(unet, rank=4, alpha=1))
    on_hub("somebody/lora", lambda folder: as_kohya_lora(unet, folder / "pytorch_lora_weights.safetensors"))
    for name in ("somebody/lora", "somebody/lora/pytorch_lora_weights.safetensors"):
        pipeline = evaluated(tiny["pipeline"], f"--lora={name}")
        pipeline.unet.fuse_lora()
        pipeline.unet.unload_lora()
        for key, value in pipeline.unet.state_dict().items():  # the file is in half precision
            assert (value - expected[key]).norm() <= 2e-3 * value.norm()


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("place", ["missing.safetensors", "a/missing.bin", "./a/b/missing.pt"])
def test_a_file_that_is_missing_is_said(script, flags, tmp_path, monkeypatch, capsys, place, alone):
    monkeypatch.chdir(tmp_path)
    if alone:
        monkeypatch.setattr(script, "extra_path", lambda name: tmp_path / f"{name}.py")
    with pytest.raises(SystemExit):
        script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(
            tmp_path / "run", generator_init=place)))
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--generator_init {place}" in line and ("no such file" in line or alone and "Repo id" in line)


def evaluated(pipeline, *flags):
    """The pipeline that the evaluation loads."""
    evaluation = load_script("eval_benchmarks")
    (model,) = evaluation.parse_args([f"--pretrained_model_name_or_path={pipeline}", *flags]).models.values()
    evaluation.check_model("a model", model)
    return evaluation.load_pipeline(model, "cpu")


def original_klein(pairs):
    """FLUX.2's authors' names of LoRAs on the double blocks' image side, whose q, k and v are one layer."""
    weights = {}
    for name, (down, up) in pairs.items():
        place, layer = re.fullmatch(r"transformer_blocks\.(\d+)\.attn\.(.*)", name).groups()
        if layer == "to_q":
            ups = [pairs[name.replace("to_q", f"to_{one}")][1] for one in "qkv"]
            weights |= {f"diffusion_model.double_blocks.{place}.img_attn.qkv.lora_A.weight": down,
                        f"diffusion_model.double_blocks.{place}.img_attn.qkv.lora_B.weight": torch.cat(ups)}
        if layer == "to_out.0":
            weights |= {f"diffusion_model.double_blocks.{place}.img_attn.proj.lora_A.weight": down,
                        f"diffusion_model.double_blocks.{place}.img_attn.proj.lora_B.weight": up}
    return weights


FLOW_FORMS = {
    **{prefix: lambda pairs, alphas, prefix=prefix: dotted(pairs, alphas, prefix)
       for prefix in ("transformer.", "diffusion_model.", "", "base_model.model.transformer.")},
    "authors": None}


@pytest.mark.parametrize("family, form", [
    *(("sd3", form) for form in FLOW_FORMS if form != "authors"),
    *(pytest.param("flux2_klein", form, marks=pytest.mark.slow) for form in FLOW_FORMS)])
def test_a_lora_on_a_transformer_with_any_prefix(script, family, load, tiny, tmp_path, form):
    kind = getattr(diffusers, script.FAMILY.network_class)
    network = kind.from_pretrained(tiny["pipeline"], subfolder="transformer")
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k",
              "transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.to_out.0")
    names = [name for name, _ in network.named_modules() if name in layers]
    pairs, alphas = random_lora(network, tuple(names))
    if form == "authors":  # their one layer has one down-projection for q, k and v
        shared = pairs[layers[0]][0]
        pairs = {name: (shared if "to_out" not in name else down, up) for name, (down, up) in pairs.items()}
        alphas = dict.fromkeys(pairs, 4)
    weights = original_klein(pairs) if form == "authors" else FLOW_FORMS[form](pairs, alphas)
    pairs = {name: pair for name, pair in pairs.items() if name in names}
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "lora.safetensors")
    models = load(generator_init=tmp_path / "lora.safetensors",
                  resolution=32 if family == "flux2_klein" else 16).models
    assert_close(models.generator, merged(network, pairs, alphas))
    place = evaluated(tiny["pipeline"], f"--lora={tmp_path / 'lora.safetensors'}").transformer
    place.fuse_lora()
    place.unload_lora()
    assert_close(place, merged(network, pairs, alphas))


# What is more than a LoRA, and what of one is lost: {name: (how a folder of PEFT's is changed, words)}.
def with_dora(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.conv_in.dora_scale"] = torch.ones(2)
    save_file(weights, folder / "adapter_model.safetensors")


def without_config(folder):
    (folder / "adapter_config.json").unlink()


def with_nan(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("change, words", [
    (with_dora, "more than a LoRA: base_model.model.conv_in.dora_scale"),
    (without_config, "its alpha is in adapter_config.json"), (with_nan, "finite weight")])
@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_a_lora_that_would_be_half_read_is_refused(script, flags, tiny, tmp_path, capsys, program, change,
                                                   words):
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny["pipeline"], subfolder="unet")
    weights = dotted(random_lora(unet)[0], {}, "base_model.model.")
    change(folder := write_peft(tmp_path / "lora", weights, 2))
    with pytest.raises(SystemExit):
        if program == "train":
            script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(
                tmp_path / "run", generator_init=folder)))
        else:
            evaluated(tiny["pipeline"], f"--lora={folder}")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --") and str(folder) in line and words in line


def test_a_lora_on_few_layers_of_a_shared_base_is_exported(train, tiny, tmp_path):
    """The assistant's LoRA has more layers than the generator's, an rsLoRA: alpha / sqrt(rank) scales it."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny["pipeline"], subfolder="unet")
    weights = dotted(random_lora(unet, ("to_q",))[0], {}, "base_model.model.")
    folder = write_peft(tmp_path / "lora", weights, 2)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    out = train(tmp_path / "run", generator_init=folder, generator_lora_rank=4, assistant_lora_rank=2,
                shared_base=True, max_train_steps=1)
    with_lora = diffusers.UNet2DConditionModel.from_pretrained(out, subfolder="unet").state_dict()
    for file in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        pipeline = evaluated(tiny["pipeline"], f"--lora={out / file}")
        pipeline.unet.fuse_lora()
        pipeline.unet.unload_lora()
        assert_close(pipeline.unet, with_lora)


@pytest.mark.parametrize("foreign", ["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_nowhere"])
def test_what_is_no_layer_of_the_network_is_named(script, flags, tiny, tmp_path, capsys, foreign):
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny["pipeline"], subfolder="unet")
    weights = kohya(*random_lora(unet, ("to_q",)))
    weights |= {f"{foreign}.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")}
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(SystemExit):
        script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(
            tmp_path / "run", generator_init=tmp_path / "lora.safetensors")))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --generator_init") and (
        "text_encoder" in line if "te" in foreign.split("_")[1] else "nowhere" in line)


def test_the_evaluation_loads_the_part_for_the_text_encoder(tiny, tmp_path):
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny["pipeline"], subfolder="unet")
    weights = kohya(*random_lora(unet, ("to_q",)))
    place = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    weights |= {f"{place}.lora_down.weight": torch.ones(4, 16),
                f"{place}.lora_up.weight": torch.ones(16, 4)}
    save_file(weights, tmp_path / "lora.safetensors")
    pipeline = evaluated(tiny["pipeline"], f"--lora={tmp_path / 'lora.safetensors'}")
    assert pipeline.unet.peft_config and pipeline.text_encoder.peft_config


@pytest.mark.parametrize("flag", ["--unet", "--lora"])
def test_the_evaluation_refuses_a_lora_as_a_network_and_a_network_as_a_lora(tiny, tmp_path, capsys, flag):
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny["pipeline"], subfolder="unet")
    weights = kohya(*random_lora(unet)) if flag == "--unet" else unet.state_dict()
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit):
        evaluated(tiny["pipeline"], f"{flag}={tmp_path / 'x.safetensors'}")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {flag}") and ("give it as --lora" in line) == (flag == "--unet")


# -------------------------------------------------------------------- the known starts, in their own formats

@pytest.fixture
def on_hub():
    """Put files into the hub's cache: takes a repository's name and a function that fills its folder."""
    made = []

    def put(name, fill):
        folder = Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"))
        made.append(folder)
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        fill(folder / "snapshots" / ("0" * 40))
    yield put
    for folder in made:
        shutil.rmtree(folder)


def pickled(unet, path):
    """As DMD2's files: a plain dict of half-precision weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(unet.half().state_dict(), path)


def as_file(unet, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(unet.half().state_dict(), path)


def as_kohya_lora(unet, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = kohya(*random_lora(unet, rank=4, alpha=1))
    save_file({name: value.half() for name, value in weights.items()}, path)


DMD2_SD15 = ("tianweiy/DMD2/model/sdv1.5/laion6.25_sd_baseline_8node_guidance1.75_lr5e-7_seed10_dfake10"
             "_diffusion1000_gan1e-3_resume_fid8.35_checkpoint_model_041000/pytorch_model.bin")
# (family, name on the hub, how its file is made or None for a whole pipeline, timesteps)
KNOWN = [
    ("sdxl", "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin", pickled, [399]),
    ("sdxl", "tianweiy/DMD2/dmd2_sdxl_4step_unet_fp16.bin", pickled, [999, 749, 499, 249]),
    ("sd15", DMD2_SD15, pickled, [999]),
    ("sdxl", "XDG-XHS/distar_short_1step", in_pipeline, [399]),
    ("sdxl", "ByteDance/Hyper-SD/Hyper-SDXL-1step-Unet.safetensors", as_file, [800]),
    ("sdxl", "ByteDance/SDXL-Lightning/sdxl_lightning_1step_unet_x0.safetensors", as_file, [999]),
    ("sd15", "stabilityai/sd-turbo", None, [999]),
    ("sdxl", "stabilityai/sdxl-turbo", None, [999]),
    ("pixart", "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512", None, [400]),
    ("flux2_klein", "black-forest-labs/FLUX.2-klein-4B", None, [1000, 967.38, 908.14, 767.19]),
    ("sd3", "stabilityai/stable-diffusion-3.5-large-turbo", None, [1000, 857.69, 602.15, 8.93]),
    ("sdxl", "tianweiy/DMD2/dmd2_sdxl_4step_lora_fp16.safetensors", as_kohya_lora, [999, 749, 499, 249]),
    ("sdxl", "latent-consistency/lcm-lora-sdxl", as_kohya_lora, [999, 759, 499, 259]),
    ("sdxl", "ByteDance/Hyper-SD/Hyper-SDXL-4steps-lora.safetensors", as_kohya_lora, [999, 749, 499, 249]),
    ("sdxl", "ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors", as_kohya_lora,
     [999, 749, 499, 249])]


@pytest.mark.parametrize("family, name, make, timesteps", [
    pytest.param(*row, id=row[1].rpartition("/")[2], marks=[pytest.mark.slow] * (row[0] == "flux2_klein" or
                 "ByteDance" in row[1] and "x0" not in row[1] or "4step" in row[1])) for row in KNOWN])
def test_a_known_start_is_read_at_its_timesteps(script, family, load, tiny, on_hub, name, make, timesteps):
    kind, component = getattr(diffusers, script.FAMILY.network_class), script.FAMILY.network_name
    network = kind.from_pretrained(tiny["pipeline"], subfolder=component)
    if make:
        network = other_unet(family) if make != as_kohya_lora else network
        repository, file = name.split("/")[:2], "/".join(name.split("/")[2:])
        file = file or "pytorch_lora_weights.safetensors" * (make == as_kohya_lora)
        on_hub("/".join(repository), lambda folder: make(network, folder / file))
    else:
        on_hub(name, lambda folder: shutil.copytree(tiny["pipeline"], folder))
    prepared = load(generator_init=name, resolution=None if family != "flux2_klein" else 32)
    assert prepared.args.generator_timesteps == timesteps
    assert prepared.args.resolution == (32 if family == "flux2_klein" else 16)
    kinds = {"sdxl_lightning_1step_unet_x0.safetensors": "sample"}
    assert getattr(prepared.models.generator_process, "prediction_type", None) == kinds.get(
        name.rpartition("/")[2], getattr(prepared.models.process, "prediction_type", None))
    expected = network.float().state_dict()
    if make == as_kohya_lora:
        pairs, alphas = random_lora(network, rank=4, alpha=1)
        expected = merged(network, {layer: [part.half().float() for part in pair]
                                    for layer, pair in pairs.items()}, alphas)
    assert_close(prepared.models.generator, expected)
    words = {"ByteDance/Hyper-SD/Hyper-SDXL-4steps-lora.safetensors": "deterministic steps",
             "stabilityai/stable-diffusion-3.5-large-turbo": "give --reward_steps all",
             "ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors": "deterministic steps"}
    assert len(prepared.args.warnings) == (name in words)
    assert all(words[name] in line for line in prepared.args.warnings)


def test_the_pages_table_has_the_known_starts():
    page = (REPOSITORY / "docs" / "recipes.md").read_text()
    for _, name, _, timesteps in KNOWN:
        (row,) = [line.split(" | ") for line in page.splitlines() if f" | `{name}` | " in line]
        assert row[3] == " ".join(map(str, timesteps))


def test_the_timesteps_of_the_lcm_lora_are_those_of_its_scheduler():
    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]


def test_trailing_timesteps_are_those_of_diffusers():
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing")
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == starts.trailing(steps)


# ------------------------------------------------------------------------------------------ at the real size

@pytest.fixture
def real_unet(family):
    """The UNet of the real size, without weights."""
    config = diffusers.UNet2DConditionModel.load_config(REPOSITORY / "examples" / "configs" / family,
                                                        subfolder="unet")
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel.from_config(config)


@pytest.mark.slow
@pytest.mark.parametrize("family, layers, file_size", [
    ("sdxl", 788, 393_854_592), ("sd15", 278, 134_621_556)])
def test_all_layers_of_the_published_loras_are_known_at_the_real_size(family, real_unet, layers, file_size):
    """Those that a dry run counts: in half precision they are LCM-LoRA's files but for the header."""
    ends, weights = tuple(f".{layer}" for layer in starts.LORA_LAYERS.split(",")), {}
    for name, module in real_unet.named_modules():
        if f".{name}".endswith(ends):
            start, shape = f"lora_unet_{name.replace('.', '_')}", module.weight.shape
            weights |= {f"{start}.lora_down.weight": torch.zeros(()).expand(64, *shape[1:]),
                        f"{start}.lora_up.weight": torch.zeros(()).expand(shape[0], 64),
                        f"{start}.alpha": torch.tensor(8.0)}
    state, config = starts.read_lora(weights, Path("lora.safetensors.here"), real_unet, "unet",
                                     PIPELINES[family])
    assert len(state) == 2 * layers and (config["r"], config["lora_alpha"]) == (64, 8.0)
    assert 2 * sum(value.numel() for value in state.values()) == pytest.approx(file_size, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_all_weights_have_their_original_names_at_the_real_size(real_unet):
    weights = real_unet.state_dict()
    named = {f"model.diffusion_model.{original_name(name, 2, real_unet.config.up_block_types)}": value
             for name, value in weights.items()}
    assert "model.diffusion_model.output_blocks.5.2.conv.weight" in named
    found = starts.from_original(named, real_unet)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in weights.items()}


# ---------------------------------------------------------------------- in which order the sources count

def test_the_flag_counts_before_the_card_and_that_before_the_table_and_the_default(script, flags, tmp_path):
    """A start named like DMD2's, beside a card; what the flag contradicts is said."""
    folder = tmp_path / "dmd2_sdxl_4step"
    other_unet("sd15").save_pretrained(folder)
    more = {"generator_init": folder, "resolution": None}

    def look_up(**given):
        args = script.parse_args(script.FAMILY, flags(tmp_path / "run", **more | given))
        return args.generator_timesteps, args.resolution, args.warnings
    assert look_up() == ([999, 749, 499, 249], 16, [])
    (folder / "README.md").write_text("---\ngenerator_timesteps: [700]\nresolution: 32\n---\n")
    assert look_up() == ([700], 32, [])
    timesteps, resolution, warnings = look_up(generator_timesteps=[300], resolution=24)
    assert (timesteps, resolution) == ([300], 24)
    assert warnings == [f"--{name}, but {folder} is made for {own}, which is used without the flag"
                        for name, own in (("resolution is 24", 32), ("generator_timesteps is 300", 700))]
    plain = folder.rename(tmp_path / "plain")
    (plain / "README.md").unlink()
    timesteps, _, (warning,) = look_up(generator_init=plain)
    assert timesteps == [999] and "does not state its timesteps: 999 is used" in warning
    assert look_up(generator_init="reference") == ([999], 16, [])
    assert look_up(generator_init="reference", resolution=32)[1:] == (
        32, [f"--resolution is 32, but {flags(tmp_path)[0].partition('=')[2]} is made for 16, which is used"
             " without the flag"])


@pytest.mark.parametrize("name, value", [
    *(("generator_timesteps", value) for value in ("399", "['399']", "[[399]]", "[-1]", "[1001]", "[3, 9]",
                                                "[399.5]")),
    *(("resolution", value) for value in ("'512'", "-16", "[16, 16]"))])
def test_a_card_of_other_values_is_said_and_ignored(script, flags, tmp_path, name, value):
    other_unet("sd15").save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "README.md").write_text(f"---\n{name}: {value}\n---\n")
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run", generator_init=tmp_path / "start",
                                                  resolution=None))
    assert (args.generator_timesteps, args.resolution) == ([999], 16)
    assert args.warnings[0].startswith(name) and args.warnings[0].endswith("is ignored")


def test_a_known_name_of_a_folder_above_is_not_the_start(script, flags, tmp_path):
    other_unet("sd15").save_pretrained(tmp_path / "lcm-lora-comparison" / "mine")
    args = script.parse_args(script.FAMILY, flags(
        tmp_path / "run", generator_init=tmp_path / "lcm-lora-comparison" / "mine"))
    assert args.generator_timesteps == [999] and "does not state its timesteps" in args.warnings[0]


def test_a_scheduler_without_a_prediction_type_means_epsilon(script, flags, tiny, tmp_path):
    """As in the first configurations of Stable Diffusion; of the reference, it is not the generator's own."""
    place = shutil.copytree(tiny["pipeline"], tmp_path / "old")
    path = place / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["prediction_type"]
    path.write_text(json.dumps(config))
    tiny_pipeline(tmp_path / "v", tiny["clip"], "v_prediction")

    def look_up(**given):
        args = script.parse_args(script.FAMILY, flags(tmp_path / "run", **given))
        return args.generator_prediction_type, " ".join(args.warnings)
    assert look_up(generator_init=place)[0] is None
    assert look_up(generator_init=tiny["pipeline"], pretrained_model_name_or_path=place)[0] is None
    assert look_up(generator_init=place, pretrained_model_name_or_path=tmp_path / "v")[0] == "epsilon"
    for flag in ("reference_unet", "preference_unet"):
        assert "predicts v_prediction, but is read as epsilon" in look_up(**{flag: tmp_path / "v"})[1]
        assert "predicts" not in look_up(**{flag: place})[1]


def test_the_evaluation_reads_a_network_as_its_own_scheduler_says(tiny, tmp_path, capsys):
    tiny_pipeline(tmp_path / "v", tiny["clip"], "v_prediction")
    as_file(other_unet("sd15"), tmp_path / "sdxl_lightning_1step_unet_x0.safetensors")
    for place, kind in ((tmp_path / "v", "v_prediction"), (tiny["pipeline"], "epsilon"),
                        (tmp_path / "sdxl_lightning_1step_unet_x0.safetensors", "sample")):
        pipeline = evaluated(tiny["pipeline"], f"--unet={place}", "--scheduler=LCMScheduler")
        assert pipeline.scheduler.config.prediction_type == kind
        assert (f"predicts {kind}" in capsys.readouterr().out) == (kind != "epsilon")


def test_a_finished_run_is_a_start_as_its_card_says(train, script, flags, tmp_path):
    """Also its prediction type, which the scheduler keeps."""
    out = train(tmp_path / "first", generator_timesteps=[600], generator_prediction_type="sample",
                max_train_steps=1)
    args = script.parse_args(script.FAMILY, flags(tmp_path / "second", generator_init=out, resolution=None))
    assert (args.generator_timesteps, args.resolution) == ([600], 16)
    assert args.generator_prediction_type == "sample" and args.warnings == []


def test_instaflow_is_refused(script, flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(script.FAMILY, flags(
            tmp_path / "run", generator_init="XCLiu/instaflow_0_9B_from_sd_1_5"))
    assert "InstaFlow predicts data minus noise" in capsys.readouterr().err


# --------------------------------------------------------------------------------- what a start predicts

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_start_of_known_output_has_the_x0_of_its_prediction_type(script, load, kind):
    """Its output is 0.3 everywhere; assistant and reference are read as the reference's scheduler says."""
    models = load(generator_prediction_type=kind).models
    with torch.no_grad():
        models.generator.conv_out.weight.zero_()
        models.generator.conv_out.bias.fill_(0.3)
    z = torch.randn(2, 1, 4, 8, 8)
    conditioning, _ = script.encode(models, ["a cat", "a dog"], null=False)
    x0 = script.generate(models.generator, models.family, models.generator_process, z, [700], conditioning)
    square = models.process.alphas_cumprod[700]
    a, s = square.sqrt(), (1 - square).sqrt()
    expected = {"epsilon": (z[:, 0] - 0.3 * s) / a, "v_prediction": a * z[:, 0] - 0.3 * s,
                "sample": torch.full_like(z[:, 0], 0.3)}[kind]
    assert (x0 - expected).abs().max() < 1e-5
    assert models.process.prediction_type == "epsilon"


@pytest.mark.parametrize("family, steps", [("sd15", [999]), ("sdxl", [999, 499])])
def test_the_stock_pipeline_reads_the_generator_as_training_did(script, family, train, tmp_path, monkeypatch,
                                                               steps):
    import diffusers.schedulers.scheduling_lcm as lcm

    out = train(tmp_path / "run", generator_prediction_type="sample", generator_timesteps=steps)
    pipeline = getattr(diffusers, PIPELINES[family]).from_pretrained(out)
    assert pipeline.scheduler.config.prediction_type == "sample"
    z = torch.randn(2, len(steps), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    noises = iter(z[:, 1:].unbind(1))
    monkeypatch.setattr(lcm, "randn_tensor", lambda *_, **__: next(noises))
    latents = pipeline(["a cat"] * 2, latents=z[:, 0], timesteps=steps, guidance_scale=0, height=16, width=16,
                       output_type="latent").images
    process = script.VariancePreserving(pipeline.scheduler.alphas_cumprod, "sample")
    with torch.no_grad():
        x0 = script.generate(pipeline.unet, script.FAMILY, process, z, steps,
                             script.FAMILY.encode_prompts(pipeline, ["a cat"] * 2, 16))
    assert (latents - x0).norm() < 1e-6 * x0.norm()


@pytest.mark.parametrize("family", ["sd3"])
def test_a_flow_has_no_other_prediction_type(script, family, flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(
            tmp_path / "run", generator_prediction_type="sample")))
    assert "--generator_prediction_type sample: a flow-matching network" in capsys.readouterr().err


def test_a_start_whose_samples_are_no_latents_is_said(script, train, tmp_path, capfd):
    unet = other_unet("sd15")
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()
    unet.save_pretrained(tmp_path / "start")  # predicts zero: epsilon's x0 is z / a, sample's 0
    square = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012,
                                     beta_schedule="scaled_linear").alphas_cumprod
    for number, (timestep, kind, expected) in enumerate([
            (999, "epsilon", square[999]**-0.5), (20, "epsilon", None), (999, "sample", 0.0)]):
        train(tmp_path / str(number), generator_init=tmp_path / "start", generator_timesteps=[timestep],
              generator_prediction_type=kind, max_train_steps=1, train_batch_size=32, resolution=16)
        said = re.search(r"standard deviation of ([\d.e+-]+)", capfd.readouterr().err)
        assert bool(said) == (expected is not None)
        assert not said or float(said[1]) == pytest.approx(float(expected), rel=0.05)
    train(tmp_path / "reference", generator_init="reference", max_train_steps=1)
    assert "standard deviation" not in capfd.readouterr().err


@pytest.mark.parametrize("family, steps, gain", [
    ("sd3", [1000, 857.69, 602.15, 8.93], 0.00893), ("sd15", [999, 499], None), ("sd15", [999, 3], 0.0588),
    pytest.param("sd3", [1000, 250], None, marks=pytest.mark.slow)])
def test_a_last_call_that_hardly_changes_the_sample_is_said(script, flags, family, tmp_path, steps, gain):
    """Its gain is sigma, or s / a: at timestep 3, s^2 is about 4 x 0.00086."""
    for more in ({}, {"reward_steps": "all"}, {"reward_scale": 0}):
        args = script.parse_args(script.FAMILY, flags(tmp_path / "run", generator_timesteps=steps, **more))
        said = re.search(r"adds ([\d.]+) of .* give --reward_steps all", " ".join(args.warnings))
        assert bool(said) == (gain is not None and not more)
        assert not said or float(said[1]) == pytest.approx(gain, rel=0.01)
