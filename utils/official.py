"""Scorers of the packages hpsv2 and image-reward: slow, without a gradient, as a reference to compare with.

    from utils.official import load_official

    scorer = load_official("hpsv2.1")   # or hpsv2.0, imagereward
    scores = scorer(images, prompts)    # or scorer.score(image, prompt) for one PIL image

Model, preprocessing and tokenizer are the packages'; weights are loaded once and images scored one by one.
hpsv2 runs unmodified. image-reward was written for transformers 4.15 to 4.55; on newer releases
`import_image_reward` restores the names that it needs, without changing any computation.
"""

import contextlib
import importlib.util
import io
import sys
import types
import warnings
from unittest import mock

import torch
import transformers
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from utils.rewards import (
    HPS_FILES,
    HPS_HUB,
    IMAGEREWARD_FILE,
    IMAGEREWARD_HUB,
    check_batch,
    find_file,
    sibling_or_default,
)


JPEG_QUALITY = 75  # Pillow's default; hpsv2 reads .jpg files and states no quality


def through_jpeg(image):
    """Return a PIL image as hpsv2's benchmark reads it from its .jpg file."""
    content = io.BytesIO()
    image.convert("RGB").save(content, format="JPEG", quality=JPEG_QUALITY)
    return Image.open(content).convert("RGB")


class OfficialScorer:
    """A package's scorer under the contract of `utils.rewards`; images are rounded to 8 bits."""

    def __init__(self):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def __call__(self, images, prompts):
        """Score images (batch, 3, H, W) in [0, 1] with their prompts; returns (batch,)."""
        check_batch(images, prompts)
        rounded = [to_pil_image((image * 255).round().byte().cpu()) for image in images]
        return torch.tensor([self.score(*pair) for pair in zip(rounded, prompts)], device=images.device)


class OfficialHps(OfficialScorer):
    """hpsv2's 100 x cosine, as its benchmark prints it, and in half precision on a GPU, as it does."""

    def __init__(self, path):
        super().__init__()
        from hpsv2.src.open_clip import create_model_and_transforms, get_tokenizer

        self.model, _, self.preprocess = create_model_and_transforms(
            "ViT-H-14", device=self.device, light_augmentation=True, output_dict=True)
        self.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
        self.model.eval()
        self.tokenizer = get_tokenizer("ViT-H-14")

    @torch.no_grad()
    def score(self, image, prompt):
        """Score a PIL image; hpsv2 does not accept an alpha channel."""
        pixels = self.preprocess(image).unsqueeze(0).to(self.device)
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            output = self.model(pixels, self.tokenizer([prompt]).to(self.device))
            return 100 * (output["image_features"] @ output["text_features"].T).item()


class OfficialImageReward(OfficialScorer):
    """image-reward's model, scored by its own `score`."""

    def __init__(self, path, med_config):
        super().__init__()
        package = import_image_reward()
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = package.load(str(path), device=str(self.device), med_config=str(med_config))

    @torch.no_grad()
    def score(self, image, prompt):
        """Score a PIL image."""
        return self.model.score(prompt, image)


def load_official(name):
    """Load the scorer `hpsv2.1`, `hpsv2.0` or `imagereward`; a location of other weights follows a colon."""
    return find_official(name)(torch.float32)


def find_official(name):
    """Look up a scorer's files without loading it; returns its loader, as `rewards.find_reward` does."""
    kind, _, location = name.partition(":")
    if kind in HPS_FILES:
        path = find_file(location or HPS_HUB, HPS_FILES[kind])
        return lambda dtype: OfficialHps(path)
    if kind == "imagereward":
        path = find_file(location or IMAGEREWARD_HUB, IMAGEREWARD_FILE)
        source = sibling_or_default(path, "med_config.json", IMAGEREWARD_HUB)
        med_config = find_file(str(source), "med_config.json")
        return lambda dtype: OfficialImageReward(path, med_config)
    raise ValueError(f"{name} has no official scorer; there are {', '.join(HPS_FILES)} and imagereward")


def import_image_reward():
    """Import image-reward, its source untouched.

    On newer transformers this provides the names that it lacks: two functions that moved and one that is
    imported but never called; an attribute of the tokenizer; two masks and the table of tied weights of the
    text model. If `clip` is not installed, an empty module takes its name, because only other scores use it.
    The package silences all warnings on import, which is undone.
    """
    absent = {"find_pruneable_heads_and_indices": None, **{
        name: getattr(transformers.pytorch_utils, name) for name in (
            "apply_chunking_to_forward", "prune_linear_layer")}}
    modeling = transformers.modeling_utils
    absent = {name: value for name, value in absent.items() if not hasattr(modeling, name)}
    stand_in = None if importlib.util.find_spec("clip") else types.ModuleType("clip")
    if stand_in:
        sys.modules["clip"] = stand_in
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        for name, value in absent.items():
            stack.enter_context(mock.patch.object(modeling, name, value, create=True))
        import ImageReward
        from ImageReward.models.BLIP import blip, med
    transformers.logging.set_verbosity(verbosity)
    if stand_in:
        del sys.modules["clip"]
    if not hasattr(blip.BertTokenizer, "additional_special_tokens_ids"):
        blip.BertTokenizer = type("BertTokenizer", (blip.BertTokenizer,), {
            "additional_special_tokens_ids": property(lambda self: self.convert_tokens_to_ids(["[ENC]"]))})
    for name, value in {"invert_attention_mask": invert_attention_mask, "all_tied_weights_keys": {},
                        "get_head_mask": lambda self, head_mask, layers: [None] * layers}.items():
        if not hasattr(med.BertPreTrainedModel, name):
            setattr(med.BertPreTrainedModel, name, value)
    return ImageReward


def invert_attention_mask(model, mask):
    """Turn a mask (batch, tokens) of ones and zeros into a bias that is added to attention scores."""
    return (1 - mask[:, None, None, :].to(model.dtype)) * torch.finfo(model.dtype).min
