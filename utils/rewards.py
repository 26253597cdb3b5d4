"""Preference models as differentiable rewards and scorers, with official weights in transformers' classes.

    from utils.rewards import from_image, load_reward

    reward = load_reward("hpsv2.1").to("cuda")
    scores = reward(images, prompts)   # (batch, 3, H, W) in [0, 1], list of str -> (batch,)
    images = torch.stack([from_image(reward, image) for image in pil_images])

| name | score | official weights |
| --- | --- | --- |
| `pickscore` | cosine, about 0.22 | yuvalkirstain/PickScore_v1 |
| `hpsv2.1`, `hpsv2.0` | 100 x cosine, about 28 | xswu/HPSv2: HPS_v2.1_compressed.pt, HPS_v2_compressed.pt |
| `imagereward` | about -2 to 2 | THUDM/ImageReward: ImageReward.pt |
| `clip` | 100 x cosine, about 33 | laion/CLIP-ViT-g-14-laion2B-s12B-b42K |
| `clip-dmd2` | the same by DMD2's protocol | the same |
| `aesthetic` | LAION aesthetic predictor 2, 1 to 10 | github.com: improved-aesthetic-predictor |
| `mps` | overall MPS: 100 x cosine | RE-N-Y/mpsv1, its authors' weights as safetensors |

MPS's authors publish a pickled module, which is refused here; RE-N-Y/mpsv1 is a third party's copy of its
weights. `NAME:LOCATION` reads other weights from a folder, a file, or owner/name or owner/name/file on the
hub. For `pickscore`, `clip` and `clip-dmd2` the location is a whole repository with model and processor.
For the others, the tokenizer (CLIP for `aesthetic`) is read from the checkpoint's folder if it is there, else
from the hub.
`MODULE:FACTORY` is your own reward.

Images may have any float dtype, must be on the reward's device, and receive gradients. Preprocessing follows
the official models, in float32 or better. Most packages resize 8-bit images, which rounds; `from_image` does
so too, so that the scores of its tensors equal the packages'.

A training script loads this file by its path, so it must import nothing from the repository.
"""

import contextlib
import functools
import html
import importlib
import importlib.util
import math
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import InterpolationMode, center_crop, resize, to_tensor
from transformers import (
    AutoConfig,
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel
from transformers.utils import logging


PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore's processor, HPS's tokenizer
CLIP_SCORE = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"  # DMD2's model; the paper does not name its own
DMD2_PREFIX, DMD2_SIDE = "A photo depicts ", 256  # of DMD2's CLIP score; `clip` has neither
HPS_HUB = "xswu/HPSv2"
HPS_FILES = {"hpsv2.1": "HPS_v2.1_compressed.pt", "hpsv2.0": "HPS_v2_compressed.pt"}
IMAGEREWARD_HUB, IMAGEREWARD_FILE = "THUDM/ImageReward", "ImageReward.pt"
AESTHETIC_CLIP = "openai/clip-vit-large-patch14"
AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_ADDRESS = ("https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
                     + AESTHETIC_FILE)

# HPS: open_clip's ViT-H-14, which reads the text at its highest token; here that is the end-of-text token.
HPS_CONFIG = {
    "projection_dim": 1024,
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                      "num_attention_heads": 16, "patch_size": 14, "image_size": 224, "hidden_act": "gelu",
                      "layer_norm_eps": 1e-5, "projection_dim": 1024},
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                    "num_attention_heads": 16, "vocab_size": 49408, "max_position_embeddings": 77,
                    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": 1024,
                    "bos_token_id": 49406, "eos_token_id": 49407}}
HPS_KEYS = [  # (open_clip's name, transformers' name), all applied in this order
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.", ".self_attn."), (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2.")]

# ImageReward: BLIP's ViT-L/16, with a layer norm epsilon of 1e-6, and BERT-base with cross-attention.
IMAGEREWARD_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                      "num_attention_heads": 16, "image_size": 224, "patch_size": 16, "hidden_act": "gelu",
                      "layer_norm_eps": 1e-6}
IMAGEREWARD_TEXT = {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024,
                    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                    "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
                    "is_decoder": True}
IMAGEREWARD_KEYS = [
    (r"^blip\.visual_encoder\.", "vision."), (r"^blip\.text_encoder\.", "text."), (r"^mlp\.layers\.", "mlp."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^(vision\..*)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision\..*)\.attn\.proj\.", r"\1.self_attn.projection.")]
# MPS: a CLIP of HPS's size whose image tokens attend to the text. Text tokens that are irrelevant to the
# condition below, its authors' "overall", are masked.
MPS_HUB, MPS_FILE, MPS_RELEVANCE = "RE-N-Y/mpsv1", "model.safetensors", 0.01
MPS_SIZES = {"layers": 4, "head": 64}
MPS_CONDITION = ("light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs,"
                 " structure, instance, texture, quantity, attributes, position, number, location, word,"
                 " things.")
MPS_KEYS = [(r"^mps\.", ""), (r"^cross_model\.layers\.(\d+)\.0\.fn\.", r"crosses.\1."),
            (r"^cross_model\.layers\.(\d+)\.1\.fn\.", r"selves.\1."),
            (r"\.ff_out\.1\.", ".ff_out."), (r"\.ff\.0\.", ".ff_in."), (r"\.ff\.2\.", ".ff_out.")]
MPS_UNUSED = r"\.norm\.bias$|\.inv_freq$|\.position_ids$"  # constants
# Heads of BLIP's pretraining, which the score does not use, and a constant.
IMAGEREWARD_UNUSED = r"^blip\.(vision_proj|text_proj)\.|\.position_ids$"
IMAGEREWARD_MEAN, IMAGEREWARD_STD = 0.16717362830052426, 1.0333394966054072


# ------------------------------------------------------------------------------------------------ rewards


def resize_and_crop(images, side, crop, anchor=math.floor):
    """Resize the shorter side of images (batch, 3, H, W) in [0, 1] to `side`, antialiased bicubic, and crop.

    CLIP's image processors do the same, with rounding to 8 bits. `anchor` rounds half pixels of the centre
    crop: transformers' first processor rounds down, torchvision to even.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    size = [int(side * length / short) for length in (height, width)]
    if size != [height, width]:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = [anchor((length - crop) / 2) for length in size]
    return images[..., top:top + crop, left:left + crop]


def resize_and_pad(images, side):
    """Resize the longer side of images (batch, 3, H, W) to `side`, antialiased bicubic; pad it with zeros.

    As in hpsv2, values are not clamped, and the padding is black before the normalisation.
    """
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    size = [max(round(length * scale), 1) for length in (height, width)]
    if size != [height, width]:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
    (top, left), (bottom, right) = zip(*((rest // 2, rest - rest // 2) for rest in (side - n for n in size)))
    return F.pad(images, (left, right, top, bottom))


def normalized(reward, images):
    """Preprocess images (batch, 3, H, W) in [0, 1] for a reward's network, in float32 or better."""
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()  # antialiased bicubic has no half-precision kernel on every device
    return (reward.preprocess(images) - reward.mean) / reward.std


def check_batch(images, prompts):
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(f"{len(images)} images need a list of equally many prompts, not {prompts!r:.80}")


class ClipReward(torch.nn.Module):
    """CLIP-type preference model: the plain cosine of image and prompt (PickScore: about 0.22).

    Preprocessing follows the processor (resize the shorter side, crop the centre, normalise) in
    differentiable operations, without its rounding to 8 bits. The training scripts have the same class.
    """

    scale = 1.0

    def __init__(self, model, processor):
        super().__init__()
        self.model, self.tokenizer = model, processor.tokenizer
        self.size = processor.image_processor.size["shortest_edge"]
        self.crop = processor.image_processor.crop_size["height"]
        self.register_buffer("mean", torch.tensor(processor.image_processor.image_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(processor.image_processor.image_std).view(3, 1, 1))

    def preprocess(self, images):
        return resize_and_crop(images, self.size, self.crop)

    def tokenize(self, prompts):
        return self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt",
                              max_length=self.model.config.text_config.max_position_embeddings)

    def embed(self, images):
        """Embed images (batch, 3, H, W) in [0, 1] as unit vectors (batch, width) of the vision tower."""
        pixels = normalized(self, images).to(self.model.dtype)
        seen = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(seen.float(), dim=-1)

    def forward(self, images, prompts):
        """Score images (batch, 3, H, W) in [0, 1] with their prompts, differentiably; returns (batch,)."""
        check_batch(images, prompts)
        pixels = normalized(self, images)
        tokens = self.tokenize(prompts).to(pixels.device)
        output = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                            pixel_values=pixels.to(self.model.dtype))
        return self.scale * (output.image_embeds.to(pixels) * output.text_embeds.to(pixels)).sum(-1)


class ClipScore(ClipReward):
    """CLIP score: 100 x the cosine of image and prompt."""

    scale = 100.0


class Dmd2ClipScore(ClipScore):
    """CLIP score as DMD2 measures it: with "A photo depicts " before the prompt, which is cleaned as in HPS,
    and the central square of the image resized to 256 by Lanczos's filter before CLIP's own preprocessing.

    Images of CLIP's own size, 224, count as preprocessed: `from_image` makes them.
    """

    def preprocess(self, images):
        if images.shape[-2:] == (self.crop, self.crop):
            return images
        return super().preprocess(lanczos(center_crop(images, min(images.shape[-2:])), DMD2_SIDE))

    def tokenize(self, prompts):
        return super().tokenize([DMD2_PREFIX + clean(prompt) for prompt in prompts])


def lanczos(images, side):
    """Resize square images (batch, 3, n, n) in [0, 1] to `side` as PIL's LANCZOS does, without rounding."""
    given = images.shape[-1]
    centres = (torch.arange(side, dtype=images.dtype, device=images.device) + 0.5) * given / side
    pixels = torch.arange(given, dtype=images.dtype, device=images.device) + 0.5
    away = (pixels - centres[:, None]) / max(given / side, 1)
    weights = torch.sinc(away) * torch.sinc(away / 3) * (away.abs() < 3)
    weights = weights / weights.sum(1, keepdim=True)
    return (weights @ images @ weights.T).clamp(0, 1)


class HpsReward(ClipReward):
    """Human preference score 2.0 or 2.1: 100 x the cosine of a fine-tuned ViT-H-14."""

    scale = 100.0

    def preprocess(self, images):
        return resize_and_pad(images, self.model.config.vision_config.image_size)

    def tokenize(self, prompts):
        return super().tokenize([clean(prompt) for prompt in prompts])


def clean(text):
    """Clean a prompt as open_clip does: fix its encoding, unescape HTML, collapse spaces, lower-case it."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split()).lower()
    for word in ("start", "end"):  # open_clip spells the special tokens differently
        text = text.replace(f"<|{word}oftext|>", f"<| {word}oftext |>")
        text = text.replace(f"<{word}_of_text>", f"<|{word}oftext|>")
    return text


def swiglu(values):
    one, gate = values.chunk(2, dim=-1)
    return one * F.silu(gate)


class CrossBlock(torch.nn.Module):
    """MPS's cross-attention of image tokens to text tokens, with one key head and a parallel feed-forward."""

    def __init__(self, width, head):
        super().__init__()
        self.head, linear = head, functools.partial(torch.nn.Linear, bias=False)
        self.norm = torch.nn.LayerNorm(width, bias=False)
        self.to_q, self.to_kv = linear(width, width), linear(width, 2 * head)
        self.to_out = linear(width, width)
        self.ff_in, self.ff_out = linear(width, 8 * width), linear(4 * width, width)

    def forward(self, image, text, mask):
        """Attend from image (batch, n, width) to text (batch, m, width) where mask (batch, m) is true."""
        seen = self.norm(image)
        queries = self.to_q(seen).unflatten(-1, (-1, self.head)).transpose(1, 2)
        found = multi_query(queries, *self.to_kv(text).chunk(2, dim=-1), mask[:, None, None])
        return image + self.to_out(found) + self.ff_out(swiglu(self.ff_in(seen)))


class SelfBlock(torch.nn.Module):
    """MPS's self-attention of image tokens, with rotary positions and a parallel feed-forward."""

    def __init__(self, width, head):
        super().__init__()
        linear = functools.partial(torch.nn.Linear, bias=False)
        self.sizes = (width, head, head, 8 * width)
        self.norm = torch.nn.LayerNorm(width, bias=False)
        self.fused_attn_ff_proj = linear(width, sum(self.sizes))
        self.attn_out, self.ff_out = linear(width, width), linear(4 * width, width)

    def forward(self, image):
        queries, keys, values, wide = self.fused_attn_ff_proj(self.norm(image)).split(self.sizes, dim=-1)
        head, places = keys.shape[-1], torch.arange(image.shape[1], device=image.device)
        angles = places[:, None] / 10000 ** (torch.arange(0, head, 2, device=image.device) / head)
        angles = torch.cat([angles, angles], dim=-1)
        queries, keys = (rotated(value, angles.to(image.dtype)) for value in (
            queries.unflatten(-1, (-1, head)).transpose(1, 2), keys))
        return image + self.attn_out(multi_query(queries, keys, values)) + self.ff_out(swiglu(wide))


def rotated(values, angles):
    """Apply rotary positions to values (..., n, head) by angles (n, head)."""
    one, other = values.chunk(2, dim=-1)
    return values * angles.cos() + torch.cat([-other, one], dim=-1) * angles.sin()


def multi_query(queries, keys, values, mask=None):
    """Attend from queries (batch, heads, n, head) to keys and values (batch, m, head): (batch, n, width)."""
    keys, values = (part[:, None].expand(-1, queries.shape[1], -1, -1) for part in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, mask).transpose(1, 2).flatten(2)


class MpsReward(ClipReward):
    """Overall multi-dimensional preference score: the cosine times the model's logit scale, 100.

    The reference normalises the relevance over a batch, which makes an image's score depend on the other
    images; here it is normalised per image, as in the reference at batch size 1.
    """

    def __init__(self, model, processor, layers, head):
        super().__init__(model, processor)
        width = model.config.projection_dim
        self.crosses = torch.nn.ModuleList(CrossBlock(width, head) for _ in range(layers))
        self.selves = torch.nn.ModuleList(SelfBlock(width, head) for _ in range(layers))

    def read(self, prompts):
        """Return text tokens (batch, m, width) and embeddings (batch, width) of prompts."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length,
                             return_tensors="pt").input_ids.to(self.mean.device)
        output = self.model.text_model(input_ids=ids)
        return map(self.model.text_projection, (output.last_hidden_state, output.pooler_output))

    def forward(self, images, prompts):
        """Score images (batch, 3, H, W) in [0, 1] with their prompts, differentiably; returns (batch,)."""
        check_batch(images, prompts)
        pixels = normalized(self, images)
        seen = self.model.vision_model(pixel_values=pixels.to(self.model.dtype)).last_hidden_state
        seen = self.model.visual_projection(seen)
        texts, embeddings = self.read([*prompts, MPS_CONDITION])
        text, prompt, condition = texts[:-1], embeddings[:-1], texts[-1]
        relevance = torch.einsum("bid,jd->bij", text, condition).amax(2)
        mask = relevance / relevance.amax(1, keepdim=True) > MPS_RELEVANCE
        for cross, own in zip(self.crosses, self.selves):
            seen = own(cross(seen, text, mask))
        cosine = F.cosine_similarity(seen[:, 0].to(pixels), prompt.to(pixels))
        return self.model.logit_scale.exp().to(pixels) * cosine


def score_head(width):
    """Build the five linear layers that ImageReward and the aesthetic score end with."""
    sizes = [width, 1024, 128, 64, 16, 1]
    first, second, third, fourth, last = (torch.nn.Linear(*pair) for pair in zip(sizes, sizes[1:]))
    drop = torch.nn.Identity()  # in the place of dropout, because nothing is trained here
    return torch.nn.Sequential(first, drop, second, drop, third, drop, fourth, last)


class ScoreHeadReward(torch.nn.Module):
    """Base of ImageReward and the aesthetic score: square crop, CLIP's normalisation, five-layer head."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        processor = CLIPImageProcessor()
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std).view(3, 1, 1), persistent=False)

    def preprocess(self, images):
        return resize_and_crop(images, self.size, self.size, anchor=round)

    def forward(self, images, prompts):
        """Score images (batch, 3, H, W) in [0, 1] with their prompts, differentiably; returns (batch,)."""
        check_batch(images, prompts)
        pixels = normalized(self, images)
        features = self.features(pixels, prompts).to(self.mlp[0].weight.dtype)  # float32 or better
        return self.mlp(features)[:, 0]


class ImageReward(ScoreHeadReward):
    """ImageReward 1.0: BLIP's text model reads the prompt and attends to the image."""

    def __init__(self, vision, text, tokenizer):
        super().__init__(vision.image_size)
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.mlp, self.tokenizer = score_head(text.hidden_size), tokenizer

    def features(self, pixels, prompts):
        """Return the text model's first token, (batch, 768)."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35,
                                return_tensors="pt").to(pixels.device)
        seen = self.vision(pixels.to(self.vision.dtype)).last_hidden_state
        return self.text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                         encoder_hidden_states=seen).last_hidden_state[:, 0]

    def forward(self, images, prompts):
        return (super().forward(images, prompts) - IMAGEREWARD_MEAN) / IMAGEREWARD_STD


class AestheticReward(ScoreHeadReward):
    """LAION's aesthetic predictor 2 on the normalised CLIP ViT-L/14 embedding; prompts are ignored."""

    def __init__(self, clip):
        super().__init__(clip.config.vision_config.image_size)
        self.vision, self.projection = clip.vision_model, clip.visual_projection
        self.mlp = score_head(clip.config.projection_dim)

    def embed(self, images):
        """Embed images as unit vectors, with the interface of `ClipReward.embed`."""
        return self.features(normalized(self, images), None)

    def features(self, pixels, prompts):
        seen = self.vision(pixel_values=pixels.to(self.projection.weight.dtype)).pooler_output
        return F.normalize(self.projection(seen).to(pixels), dim=-1)


def from_image(reward, image):
    """Convert a PIL image to a tensor in [0, 1] that `reward` scores as the official scorer scores the image.

    The tensor is (3, size, size), preprocessed for this reward only, which does not resize it again. Most
    packages resize 8-bit images, which rounds; hpsv2 resizes a tensor. Your own reward gets all pixels.
    """
    image = image.convert("RGB")
    if not isinstance(reward, (ClipReward, ScoreHeadReward)):
        return to_tensor(image)
    if isinstance(reward, Dmd2ClipScore):
        image = center_crop(image, min(image.size)).resize((DMD2_SIDE, DMD2_SIDE), Image.LANCZOS)
    if not isinstance(reward, HpsReward):
        image = resize(image, reward.size, InterpolationMode.BICUBIC)
    return reward.preprocess(to_tensor(image)[None])[0]


# ------------------------------------------------------------------------------------------------ loading


def load_reward(name, dtype=torch.float32):
    """Load a reward by its name (see the top of this file), frozen, on the CPU.

    Raises:
        ValueError: the name is unknown, a file cannot be read, or a checkpoint belongs to another model; the
            message lists keys that are missing, unexpected or of another shape.
        FileNotFoundError: the location is neither a file, nor a folder with the file, nor on the hub.
        ImportError: ftfy, which HPS and `clip-dmd2` need, is not installed.
    """
    reward = find_reward(name)(dtype)
    return reward.requires_grad_(False).eval() if isinstance(reward, torch.nn.Module) else reward


def find_reward(name):
    """Look up a reward's files without loading it; returns its loader, a function of the dtype."""
    kind, _, location = name.partition(":")
    if kind in FINDERS:
        return FINDERS[kind](location)
    sys.path.insert(0, os.getcwd())
    with as_value_error(f"{name} is none of {', '.join(FINDERS)} and no importable MODULE:FACTORY"):
        factory = getattr(importlib.import_module(kind), location)
    return lambda dtype: factory()


def find_clip(kind, default, default_processor, location):
    location, processor = location or default, location or default_processor
    config = check_clip(location)
    processor = fetch(CLIPProcessor, processor)
    check_vocabulary(processor.tokenizer, config.text_config.vocab_size, location)
    return lambda dtype: kind(load_clip(location).to(dtype), processor)


def find_clip_h(location, file):
    """Find a checkpoint of HPS or MPS, and CLIP ViT-H's tokenizer beside it or on the hub."""
    path = find_file(location, file)
    source = sibling_or_default(path, "tokenizer_config.json", CLIP_H)
    tokenizer = fetch(CLIPTokenizer, source)
    check_vocabulary(tokenizer, HPS_CONFIG["text_config"]["vocab_size"], source)
    return path, tokenizer


def check_ftfy():
    if importlib.util.find_spec("ftfy") is None:
        raise ImportError("it cleans prompts with ftfy: pip install ftfy")


def find_dmd2_clip(location):
    check_ftfy()
    return find_clip(Dmd2ClipScore, CLIP_SCORE, CLIP_SCORE, location)


def find_hps(file, location):
    check_ftfy()
    path, tokenizer = find_clip_h(location or HPS_HUB, file)

    def loader(dtype):
        with init_empty_weights():
            model = CLIPModel(CLIPConfig(**HPS_CONFIG))
        fill(model, hps_state_dict(read_checkpoint(path, "state_dict")), path)
        processor = CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer)
        return HpsReward(model.to(dtype), processor)
    return loader


def find_mps(location):
    path, tokenizer = find_clip_h(location or MPS_HUB, MPS_FILE)

    def loader(dtype):
        side = HPS_CONFIG["vision_config"]["image_size"]
        processor = CLIPProcessor(tokenizer=tokenizer, image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}))
        with init_empty_weights():
            reward = MpsReward(CLIPModel(CLIPConfig(**HPS_CONFIG)), processor, **MPS_SIZES)
        used = {name: value for name, value in read_checkpoint(path).items()
                if not re.search(MPS_UNUSED, name)}
        fill(reward, renamed(used, MPS_KEYS) | {"mean": reward.mean, "std": reward.std}, path)
        for part in reward.children():
            part.to(dtype)
        return reward
    return loader


def find_imagereward(location):
    path = find_file(location or IMAGEREWARD_HUB, IMAGEREWARD_FILE)
    source = sibling_or_default(path, "tokenizer_config.json", "google-bert/bert-base-uncased")
    tokenizer = fetch(BertTokenizer, source)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    check_vocabulary(tokenizer, IMAGEREWARD_TEXT["vocab_size"], source)

    def loader(dtype):
        text = BlipTextConfig(**IMAGEREWARD_TEXT, attn_implementation="eager")  # the only choice in BLIP
        with init_empty_weights():
            reward = ImageReward(BlipVisionConfig(**IMAGEREWARD_VISION), text, tokenizer)
        used = {name: value for name, value in read_checkpoint(path).items()
                if not re.search(IMAGEREWARD_UNUSED, name)}
        fill(reward, renamed(used, IMAGEREWARD_KEYS), path)
        return with_whole_head(reward, dtype)
    return loader


def find_aesthetic(location):
    path = find_file(location, AESTHETIC_FILE) if location else fetch_aesthetic()
    clip = sibling_or_default(path, "config.json", AESTHETIC_CLIP)
    check_clip(clip)

    def loader(dtype):
        reward = AestheticReward(load_clip(clip))
        fill(reward.mlp, renamed(read_checkpoint(path), [(r"^layers\.", "")]), path)
        return with_whole_head(reward, dtype)
    return loader


FINDERS = {
    "pickscore": functools.partial(find_clip, ClipReward, PICKSCORE, CLIP_H),
    **{name: functools.partial(find_hps, file) for name, file in HPS_FILES.items()},
    "imagereward": find_imagereward,
    "clip": functools.partial(find_clip, ClipScore, CLIP_SCORE, CLIP_SCORE),
    "aesthetic": find_aesthetic,
    "mps": find_mps,
}
REWARDS = tuple(FINDERS)  # names that the training scripts accept
FINDERS["clip-dmd2"] = find_dmd2_clip  # a score of the evaluation


@contextlib.contextmanager
def as_value_error(subject):
    """Turn any exception inside into a ValueError: `subject`, then the exception's message."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{subject}: {str(error) or type(error).__name__}") from error


def find_file(location, file):
    """Return the path of a checkpoint: `location` itself, or `file` in a folder or a hub repository."""
    path = Path(location)
    path = path / file if path.is_dir() else path
    if path.is_file():
        return path
    owner, *rest = location.split("/", 2)
    if Path(location).exists() or owner in ("", ".", "..", "~") or "://" in location or not rest:
        raise FileNotFoundError(f"{location} is neither a file, nor a folder with {file}, nor on the hub"
                                " (owner/name or owner/name/file)")
    repository, file = f"{owner}/{rest[0]}", rest[1] if rest[1:] else file
    with as_value_error(f"{file} of {repository} cannot be read from the hub"):
        return Path(hf_hub_download(repository, file))


def fetch_aesthetic():
    """Download the aesthetic predictor from its publication into torch's cache; returns its path."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / AESTHETIC_FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with as_value_error(f"give aesthetic:FOLDER with the file, as {AESTHETIC_ADDRESS} cannot be read"):
            torch.hub.download_url_to_file(AESTHETIC_ADDRESS, str(path))
    return path


def fetch(kind, location):
    """Load a configuration, tokenizer or processor of transformers from a folder or the hub."""
    with as_value_error(f"{location} has no readable {kind.__name__}"):
        return kind.from_pretrained(location)


def check_vocabulary(tokenizer, size, location):
    """Refuse a tokenizer without its vocabulary, which loads but reads every prompt as unknown words."""
    if len(tokenizer) != size:
        raise ValueError(f"{location} has a tokenizer of {len(tokenizer)} tokens, not {size}: files missing?")


def sibling_or_default(path, marker, default):
    """Return the folder of a checkpoint if it contains the file `marker`, else `default`, a hub id."""
    return path.parent if (path.parent / marker).is_file() else default


def read_checkpoint(path, part=None):
    """Read a state dict from a file, or from the entry `part` in it."""
    with as_value_error(f"{path} is not a readable checkpoint"):
        is_safe = path.suffix == ".safetensors"
        held = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    held = held.get(part) if part and isinstance(held, dict) else held
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise ValueError(f"{path} contains no {part or 'state dict'} of names and tensors")
    return held


def renamed(state_dict, keys):
    """Rename the keys of a state dict by pairs (pattern, replacement), applied in order."""
    def rename(name):
        for pattern, replacement in keys:
            name = re.sub(pattern, replacement, name)
        return name
    return {rename(name): value for name, value in state_dict.items()}


def hps_state_dict(state_dict):
    """Convert open_clip's CLIP to CLIPModel: split q, k and v, transpose the projections."""
    state_dict = renamed(state_dict, HPS_KEYS)
    for name in list(state_dict):
        if name in ("visual_projection.weight", "text_projection.weight"):
            state_dict[name] = state_dict[name].T.contiguous()
        if ".in_proj_" in name:
            for part, value in zip("qkv", state_dict.pop(name).chunk(3)):
                state_dict[name.replace("in_proj_", f"{part}_proj.")] = value
    return state_dict


def key_mismatches(state_dict, expected, shown=3):
    """Describe in one line why a state dict does not load strictly, with a few keys; empty if it does."""
    kinds = {"missing": [name for name in expected if name not in state_dict],
             "unexpected": [name for name in state_dict if name not in expected],
             "of another shape": [name for name in expected if name in state_dict and getattr(
                 state_dict[name], "shape", None) != expected[name].shape]}
    return "; ".join(f"{len(names)} {kind} ({', '.join(names[:shown])}{', ...' if names[shown:] else ''})"
                     for kind, names in kinds.items() if names)


def fill(model, state_dict, path):
    if mismatches := key_mismatches(state_dict, model.state_dict()):
        raise ValueError(f"{path} does not fit (names as in transformers): {mismatches}")
    model.load_state_dict(state_dict, assign=True)


def check_clip(location):
    config = fetch(AutoConfig, location)
    if config.model_type != "clip":
        raise ValueError(f"{location} contains a model of type {config.model_type}, not clip")
    return config


def load_clip(location):
    """Load a CLIPModel strictly: the library would only warn of missing weights and make them random."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with as_value_error(f"{location} cannot be loaded as a CLIPModel"):
            model, report = CLIPModel.from_pretrained(
                location, output_loading_info=True, ignore_mismatched_sizes=True)
    finally:
        logging.set_verbosity(verbosity)
    wrong = [f"{kind.removesuffix('_keys')} {str(name[0] if isinstance(name, tuple) else name)}"
             for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]
             if "position_ids" not in str(name)]  # a constant in older files
    if wrong:
        raise ValueError(f"{location} does not fit CLIPModel: {', '.join(wrong[:5])}")
    return model


def with_whole_head(reward, dtype):
    """Cast a reward's networks to `dtype`, except its head, which would round the score in half precision."""
    for part in reward.children():
        part.to(torch.promote_types(dtype, torch.float32) if part is reward.mlp else dtype)
    return reward
