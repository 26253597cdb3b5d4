"""The official reward models at real size with random weights, in files of the official formats.

What the packages would fetch is put where they look for it, the cache of the hub: tokenizers, and the
weights that hpsv2 loads before it replaces them. CLIP's vocabulary is hpsv2's own; BERT's is made here.
"""

import json
import os
import shutil
import string
from pathlib import Path

import torch
from safetensors.torch import save_file


CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MED_CONFIG = {  # the architecture that ImageReward's med_config.json describes
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30524,
    "encoder_width": 1024, "add_cross_attention": True}


def in_hub_cache(repository):
    """The folder where the hub's client looks for a repository's files."""
    root = Path(os.environ["HF_HOME"]) / "hub" / f"models--{repository.replace('/', '--')}"
    folder = root / "snapshots" / "made-here"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text("made-here")
    return folder


@torch.no_grad()
def randomize(model, seed):
    """Random weights that let every part be felt: signals keep their size from layer to layer.

    The first embeddings are small, so that the epsilon of the first layer norm is a part of the result; so is
    what BERT's attention adds, for otherwise its tokens become one another's averages.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower() or ".ln_" in name or name.startswith("ln_"):
            values = (1 if name.endswith("weight") else 0) + 0.1 * values
        elif parameter.ndim < 2:
            values = 0.1 * values
        else:
            values = values / parameter[0].numel() ** 0.5
        if any(part in name for part in ("patch_embed", "pos_embed", "cls_token", "conv1", "class_embedding",
                                         "visual.positional_embedding")):
            values = 0.01 * values
        if "attention.output.dense" in name:
            values = 0.3 * values
        parameter.copy_(values)
    return model.eval()


def clip_tokenizer(folder):
    """hpsv2's vocabulary as transformers' CLIPTokenizer reads it."""
    from hpsv2.src.open_clip.tokenizer import _tokenizer

    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): index for token, index in _tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = sorted(_tokenizer.bpe_ranks, key=_tokenizer.bpe_ranks.get)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}))
    return folder


def bert_tokenizer(folder):
    """A vocabulary of BERT's size and special tokens: every single character of its own, and short pieces."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    letters = string.ascii_lowercase
    pieces = [*string.digits, *string.punctuation, *letters, "é", "ß", "中", "文", "я", "😀"]
    pieces += [one + other for one in letters for other in letters]
    pieces += [one + other + third for one in letters for other in letters for third in letters[:18:2]]
    pieces += ["##" + piece for piece in pieces if piece.isalnum()]
    unused = [f"[unused{index}]" for index in range(30522 - len(pieces))]
    vocabulary = [special.get(index, name) for index, name in enumerate(unused)] + pieces
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}))
    return folder


def write_hps(seed, version="v2.1"):
    """xswu/HPSv2 and what hpsv2.score needs beside it, in the hub's cache; returns the checkpoint's path."""
    from hpsv2.src.open_clip import create_model
    from hpsv2.utils import hps_version_map

    model = randomize(create_model("ViT-H-14"), seed)
    state_dict = {name: value.half() for name, value in model.state_dict().items()}
    path = in_hub_cache("xswu/HPSv2") / hps_version_map[version]
    torch.save({"state_dict": state_dict}, path)
    zeros = {name: torch.zeros(()).expand(value.shape) for name, value in state_dict.items()}
    torch.save(zeros, clip_tokenizer(in_hub_cache(CLIP_H)) / "open_clip_pytorch_model.bin")
    return path


def write_imagereward(seed):
    """THUDM/ImageReward and the tokenizer in the hub's cache; returns the checkpoint's path."""
    from utils.official import import_image_reward

    package = import_image_reward()
    for name in ("bert-base-uncased", "google-bert/bert-base-uncased"):
        bert_tokenizer(in_hub_cache(name))
    folder = in_hub_cache("THUDM/ImageReward")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    model = randomize(package.ImageReward(med_config=str(folder / "med_config.json")), seed)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    return folder / "ImageReward.pt"


def mps_weights(config, layers, head):
    """A random MPS under the names of its authors' module."""
    from transformers import CLIPConfig, CLIPModel

    clip, width = randomize(CLIPModel(CLIPConfig(**config)), 3), config["projection_dim"]
    shapes = {"0.fn.norm": (width,), "0.fn.to_q": (width, width), "0.fn.to_kv": (2 * head, width),
              "0.fn.to_out": (width, width), "0.fn.ff.0": (8 * width, width), "0.fn.ff.2": (width, 4 * width),
              "1.fn.norm": (width,), "1.fn.fused_attn_ff_proj": (9 * width + 2 * head, width),
              "1.fn.attn_out": (width, width), "1.fn.ff_out.1": (width, 4 * width)}
    generator = torch.Generator().manual_seed(4)
    weights = {f"mps.model.{name}": value.contiguous() for name, value in clip.state_dict().items()}
    for layer in range(layers):
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            weights[f"mps.cross_model.layers.{layer}.{name}.weight"] = values + (len(shape) == 1)
        weights[f"mps.cross_model.layers.{layer}.0.fn.norm.bias"] = torch.zeros(width)  # constants
        weights[f"mps.cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = torch.ones(head // 2)
    return weights


def mps_features(weights, image, text, mask, layers, head):
    """MPS's image features, token by token, in plain sums: image (n, width), text (m, width), mask (m,)."""
    def norm(name, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.norm.weight"])

    def wide(x):
        one, gate = x.split(x.shape[-1] // 2, dim=-1)
        return one * gate * torch.sigmoid(gate)

    def attend(queries, keys, values, kept):
        heads = []
        for query in queries.split(head, dim=-1):
            logits = query @ keys.T / head**0.5
            heads.append(logits.masked_fill(~kept, -torch.inf).softmax(-1) @ values)
        return torch.cat(heads, dim=-1)

    def turned(x):
        """Each pair (j, j + head / 2) as a complex number, turned by its position's angle."""
        pairs = torch.complex(x[:, :head // 2], x[:, head // 2:])
        speed = 10000 ** (-2 * torch.arange(head // 2) / head)
        angle = torch.arange(len(x))[:, None] * speed
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    for layer in range(layers):
        name = f"mps.cross_model.layers.{layer}.0.fn"
        seen = norm(name, image)
        keys, values = (text @ weights[f"{name}.to_kv.weight"].T).split(head, dim=-1)
        found = attend(seen @ weights[f"{name}.to_q.weight"].T, keys, values, mask)
        image = (image + found @ weights[f"{name}.to_out.weight"].T
                 + wide(seen @ weights[f"{name}.ff.0.weight"].T) @ weights[f"{name}.ff.2.weight"].T)
        name, width = f"mps.cross_model.layers.{layer}.1.fn", image.shape[-1]
        fused = norm(name, image) @ weights[f"{name}.fused_attn_ff_proj.weight"].T
        queries, keys, values, rest = fused.split((width, head, head, 8 * width), dim=-1)
        queries = torch.cat([turned(query) for query in queries.split(head, dim=-1)], dim=-1)
        found = attend(queries, turned(keys), values, torch.ones(len(image), dtype=torch.bool))
        image = (image + found @ weights[f"{name}.attn_out.weight"].T
                 + wide(rest) @ weights[f"{name}.ff_out.1.weight"].T)
    return image


def write_tiny(folder, clip_folder):
    """Two-layer official models by the packages' own modules, one folder each: {name: folder}, their configs.

    The tokenizers (and for `aesthetic` CLIP) are those of a tiny CLIPModel's folder, and BERT's as above.
    """
    from hpsv2.src.open_clip.model import CLIP
    from transformers import CLIPConfig

    from utils import rewards
    from utils.official import import_image_reward

    import_image_reward()
    from ImageReward.ImageReward import MLP
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer

    places = {name: folder / name for name in ("hpsv2.1", "imagereward", "aesthetic", "mps")}
    shutil.copytree(clip_folder, places["hpsv2.1"])
    shutil.copytree(clip_folder, places["aesthetic"])
    (places["hpsv2.1"] / "config.json").unlink()
    text = CLIPConfig.from_pretrained(clip_folder).text_config
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
              "image_size": 16}
    seen = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    read = {"context_length": 16, "vocab_size": text.vocab_size, "width": 16, "heads": 2, "layers": 2}
    model = randomize(CLIP(8, vision_cfg=seen, text_cfg=read), 0)
    torch.save({"state_dict": model.state_dict()}, places["hpsv2.1"] / "HPS_v2.1_compressed.pt")
    hps_config = {
        "projection_dim": 8, "vision_config": rewards.HPS_CONFIG["vision_config"] | vision | {
            "intermediate_size": 128, "projection_dim": 8},
        "text_config": rewards.HPS_CONFIG["text_config"] | {
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": text.vocab_size, "max_position_embeddings": 16, "projection_dim": 8,
            "bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id}}
    torch.save(randomize(MLP(8), 2).state_dict(), places["aesthetic"] / rewards.AESTHETIC_FILE)
    places["imagereward"].mkdir()
    bert_tokenizer(places["imagereward"])
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    parts = torch.nn.ModuleDict({"blip": torch.nn.ModuleDict({
        "visual_encoder": VisionTransformer(16, 8, embed_dim=32, depth=2, num_heads=2),
        "text_encoder": BertModel(BertConfig(**MED_CONFIG | sizes | {"encoder_width": 32}), False),
        "vision_proj": torch.nn.Linear(32, 4)}), "mlp": MLP(16)})
    torch.save(randomize(parts, 1).state_dict(), places["imagereward"] / "ImageReward.pt")
    shutil.copytree(clip_folder, places["mps"])
    save_file(mps_weights(hps_config, layers=2, head=4), places["mps"] / "model.safetensors")
    constants = {"HPS_CONFIG": hps_config, "MPS_SIZES": {"layers": 2, "head": 4},
                 "IMAGEREWARD_VISION": rewards.IMAGEREWARD_VISION | vision | {"intermediate_size": 128},
                 "IMAGEREWARD_TEXT": rewards.IMAGEREWARD_TEXT | sizes | {"encoder_hidden_size": 32}}
    return places, constants, {"hpsv2.1": model, "imagereward": parts}
