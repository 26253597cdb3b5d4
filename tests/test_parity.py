"""Our rewards against the packages hpsv2 and image-reward at real size, on random weights (PARITY_SEED).

Bars, float32 on the CPU, in the packages' own units (hpsv2.score gives a cosine): scores 1e-5, image
gradients 1e-4 relative, from the same tensors. Each way to get a model wrong must miss the first tenfold, so
that random weights prove something. What it leaves unproved: the hub's files (weights, BERT's vocabulary).
"""

import contextlib
import os
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torchvision.transforms import Compose
from torchvision.transforms.functional import to_pil_image, to_tensor
from transformers.activations import QuickGELUActivation

from official_models import randomize, write_hps, write_imagereward
from utils import rewards
from utils.official import import_image_reward, load_official
from utils.rewards import load_reward


pytestmark = pytest.mark.parity
SEED = int(os.environ.get("PARITY_SEED", 0))
SCORE, GRADIENT = 1e-5, 1e-4
SIZES = [(224, 224), (512, 512), (300, 461), (100, 400), (400, 100), (60, 45), (225, 223), (40, 1000)]
PROMPTS = ["a photo of a red cat", "A <b>Cat</b> &amp;amp; a “dog” — naïve  café…", "", "42",
           "日本語, 😀 and it's <b>bold</b>", "a very long prompt, " * 40,
           "<|endoftext|> and <end_of_text>", "Ã©tÃ© &lt;3\tthe\u00a0end"]


@pytest.fixture(autouse=True, scope="module")
def threads():
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(1)


def pil_image(size, mode="RGB", contrast=1.0):
    """An image with slopes, waves and noise, so that no part of the preprocessing goes unnoticed."""
    generator = torch.Generator().manual_seed(SEED + size[0] * size[1])
    rows, columns = [torch.linspace(0, 1, length) for length in size]
    waves = torch.sin(40 * rows[:, None] + 25 * columns * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))
    image = 0.4 * rows[:, None] + 0.3 * (1 + waves) / 2 + 0.3 * torch.rand(3, *size, generator=generator)
    return to_pil_image(0.5 + contrast * (image - 0.5)).convert(mode)


def batch(size, contrast=1.0):
    return to_tensor(pil_image(size, contrast=contrast))[None]


def score_and_gradient(score, images, prompts):
    images = images.clone().requires_grad_()
    scores = score(images, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient


def assert_equal(ours, theirs):
    assert (ours[0] - theirs[0]).abs().max() <= SCORE
    assert theirs[1].norm() > 0 and (ours[1] - theirs[1]).norm() <= GRADIENT * theirs[1].norm()


@contextlib.contextmanager
def without_antialiasing():
    interpolate = torch.nn.functional.interpolate

    def plain(*inputs, antialias, **more):
        return interpolate(*inputs, **more)
    with mock.patch("torch.nn.functional.interpolate", plain):
        yield


@contextlib.contextmanager
def with_quick_gelu(model):
    found = [(module, name) for module in model.modules() for name in ("activation_fn", "intermediate_act_fn")
             if hasattr(module, name)]
    held = [getattr(*place) for place in found]
    for place in found:
        setattr(*place, QuickGELUActivation())
    assert found
    yield
    for place, activation in zip(found, held):
        setattr(*place, activation)


# ---------------------------------------------------------------------------------------------- HPSv2.1


@pytest.fixture(scope="module")
def hps():
    """ours; package: images and prompts scored as in hpsv2.score; tensors: the same from tensors."""
    import hpsv2
    from hpsv2 import img_score

    path = write_hps(SEED)
    hpsv2.score(pil_image((8, 8)), "loads the model", hps_version="v2.1")
    model, transforms = img_score.model_dict["model"], img_score.model_dict["preprocess_val"]
    tokenizer = img_score.get_tokenizer("ViT-H-14")

    def score(image, prompt):
        output = model(image[None], tokenizer([prompt]))
        return (output["image_features"] @ output["text_features"].T)[0, 0]

    def tensors(images, prompts):  # all but the first two transforms: to RGB, to a tensor
        preprocess = Compose(transforms.transforms[2:])
        return torch.stack([score(preprocess(image), prompt) for image, prompt in zip(images, prompts)])

    reward = load_reward("hpsv2.1")
    yield SimpleNamespace(path=path, reward=reward, score=hpsv2.score, tensors=tensors,
                          ours=lambda images, prompts: reward(images, prompts) / 100)
    img_score.model_dict.clear()
    path.unlink()  # gigabytes, of no more use


@pytest.mark.parametrize("size, prompt", list(zip(SIZES, PROMPTS)))
def test_hps_has_the_score_and_gradient_of_hpsv2(hps, size, prompt):
    images = batch(size)
    assert_equal(*(score_and_gradient(score, images, [prompt]) for score in (hps.ours, hps.tensors)))


def test_hps_in_one_batch_is_the_hpsv2_score_of_each_image(hps):
    pil_images = [pil_image((300, 461)), pil_image((300, 461), "L"), pil_image((300, 461), "P")]
    images = torch.stack([to_tensor(image.convert("RGB")) for image in pil_images])
    with torch.no_grad():
        ours = hps.ours(images, PROMPTS[:3])
    theirs = [hps.score(*pair, hps_version="v2.1")[0] for pair in zip(pil_images, PROMPTS)]
    assert (ours - torch.tensor(theirs)).abs().max() <= SCORE


def test_hpsv2_takes_no_image_with_an_alpha_channel(hps):
    with pytest.raises(RuntimeError):
        hps.score(pil_image((224, 224), "RGBA"), "a cat", hps_version="v2.1")


def test_hps_2_0_and_the_package_by_its_name(hps):
    (hps.path.parent / "HPS_v2_compressed.pt").symlink_to(hps.path)
    older, official = load_reward(f"hpsv2.0:{hps.path.parent}"), load_official("hpsv2.0")
    image, prompt = pil_image((300, 461)), PROMPTS[1]
    with torch.no_grad():
        scores = [older(batch((300, 461)), [prompt]), official(batch((300, 461)), [prompt])]
    expected = hps.score(image, prompt, hps_version="v2.0")[0]
    assert all(abs(score.item() / 100 - expected) <= SCORE for score in scores)


HPS_WRONG = {
    "no antialias": lambda reward: without_antialiasing(),
    "centre crop": lambda reward: mock.patch.object(
        reward, "preprocess", lambda images: rewards.resize_and_crop(images, 224, 224)),
    "quick_gelu": with_quick_gelu,
    "wrong token pooled": lambda reward: mock.patch.object(
        getattr(reward.model.text_model, "text_model", reward.model.text_model), "eos_token_id", 49406),
    "no text cleaning": lambda reward: mock.patch.object(rewards, "clean", lambda text: text),
}


@pytest.mark.parametrize("variant", HPS_WRONG)
@torch.no_grad()
def test_a_wrong_hps_misses_tenfold(hps, variant):
    images, prompts = batch((512, 700)), [PROMPTS[1]]
    right = hps.ours(images, prompts)
    with HPS_WRONG[variant](hps.reward):
        wrong = hps.ours(images, prompts)
    assert torch.equal(hps.ours(images, prompts), right)
    assert (right - wrong).abs() >= 10 * SCORE


# ------------------------------------------------------------------------------------------ ImageReward


@pytest.fixture(scope="module")
def imagereward():
    """As above; `package` is what ImageReward.load returns."""
    path = write_imagereward(SEED)
    package = load_official("imagereward").model

    def tensors(images, prompts):  # resize, crop, normalise; not to RGB, to a tensor
        preprocess = Compose([package.preprocess.transforms[index] for index in (0, 1, 4)])
        tokens = package.blip.tokenizer(prompts, padding="max_length", truncation=True, max_length=35,
                                        return_tensors="pt")
        return package.score_gard(tokens.input_ids, tokens.attention_mask, preprocess(images))[:, 0]

    yield SimpleNamespace(path=path, ours=load_reward("imagereward"), package=package, tensors=tensors)
    path.unlink()


@pytest.mark.parametrize("size, prompt", list(zip(SIZES, PROMPTS)))
def test_imagereward_has_the_score_and_gradient_of_the_package(imagereward, size, prompt):
    """With little contrast, for a whole one overshoots when resized: PIL clips that, torchvision does not."""
    images = batch(size, contrast=0.5)
    assert_equal(*(score_and_gradient(score, images, [prompt])
                   for score in (imagereward.ours, imagereward.tensors)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
@torch.no_grad()
def test_imagereward_of_an_image_that_need_not_be_resized(imagereward, mode):
    image = pil_image((224, 224), mode)
    ours = imagereward.ours(to_tensor(image.convert("RGB"))[None], [PROMPTS[1]])
    assert abs(ours.item() - imagereward.package.score(PROMPTS[1], image)) <= SCORE


@torch.no_grad()
def test_imagereward_of_images_has_the_score_of_the_package(imagereward):
    pil_images = [pil_image(size) for size in SIZES]
    images = torch.stack([rewards.from_image(imagereward.ours, image) for image in pil_images])
    ours = imagereward.ours(images, PROMPTS)
    theirs = [imagereward.package.score(*pair) for pair in zip(PROMPTS, pil_images)]
    assert (ours - torch.tensor(theirs)).abs().max() <= SCORE


@pytest.mark.parametrize("size", SIZES[1:])
@torch.no_grad()
def test_imagereward_of_a_tensor_differs_by_pil_rounding_alone(imagereward, size):
    """PIL rounds to 256 levels after each of two passes, and clips there."""
    images = to_tensor(pil_image(size))[None]
    rounded = rewards.from_image(imagereward.ours, pil_image(size))[None]
    levels = (255 * (imagereward.ours.preprocess(images) - rounded)).abs()
    assert levels.mean() < 0.4 and (levels > 1.1).float().mean() < 1e-4
    scores = imagereward.ours(torch.cat([imagereward.ours.preprocess(images), rounded]), PROMPTS[:1] * 2)
    print(f"{size}: {scores[0]:.4f} of the tensor, {scores[1]:.4f} of the image")


@torch.no_grad()
def test_imagereward_at_its_35_tokens(imagereward):
    """[CLS], 33 words, [SEP] fit; a 34th word is not read."""
    images = batch((224, 224)).expand(4, -1, -1, -1)
    words = ["go", "up"] * 16 + ["go"]
    prompts = [" ".join(part) for part in (words[:32], words, words + ["up"], words + ["no"] * 9)]
    assert len(imagereward.ours.tokenizer(prompts[1]).input_ids) == 35
    ours = imagereward.ours(images, prompts)
    for score, prompt in zip(ours, prompts):
        assert abs(score.item() - imagereward.package.score(prompt, pil_image((224, 224)))) <= SCORE
    assert ours[1] == ours[2] == ours[3] and (ours[0] - ours[1]).abs() > 10 * SCORE


@contextlib.contextmanager
def with_epsilon(model, epsilon):
    layers = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    held = [layer.eps for layer in layers]
    for layer in layers:
        layer.eps = epsilon
    yield
    for layer, eps in zip(layers, held):
        layer.eps = eps


def second_token(reward):
    text = reward.text.forward

    def shifted(**inputs):
        output = text(**inputs)
        output.last_hidden_state = output.last_hidden_state.roll(-1, 1)
        return output
    return mock.patch.object(reward.text, "forward", shifted)


IMAGEREWARD_WRONG = {
    "no antialias": lambda reward: without_antialiasing(),
    "zeros around": lambda reward: mock.patch.object(
        rewards, "resize_and_crop", lambda images, side, *_, **__: rewards.resize_and_pad(images, side)),
    "layer-norm eps 1e-5": lambda reward: with_epsilon(reward.vision, 1e-5),
    "quick_gelu": with_quick_gelu,
    "wrong token pooled": second_token,
}


@pytest.mark.parametrize("variant", IMAGEREWARD_WRONG)
@torch.no_grad()
def test_a_wrong_imagereward_misses_tenfold(imagereward, variant):
    images, prompts = batch((512, 700)), [PROMPTS[1]]
    right = imagereward.ours(images, prompts)
    with IMAGEREWARD_WRONG[variant](imagereward.ours):
        wrong = imagereward.ours(images, prompts)
    assert torch.equal(imagereward.ours(images, prompts), right)
    assert (right - wrong).abs() >= 10 * SCORE


# -------------------------------------------------------------------------------------------- aesthetic


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory):
    """OpenAI's CLIP ViT-L/14 by `clip`, the head by image-reward's AestheticScore; its folder for ours."""
    clip = pytest.importorskip("clip", reason="only with requirements-official.txt")
    from transformers import CLIPConfig, CLIPModel

    import_image_reward()
    from ImageReward.models.AestheticScore import AestheticScore

    model = randomize(clip.model.CLIP(768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12), SEED)
    with mock.patch("clip.load", lambda *_, **__: (model, clip.clip._transform(224))):
        package = AestheticScore(None)
    folder = tmp_path_factory.mktemp("aesthetic")
    sizes = {"text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                             "projection_dim": 768, "eos_token_id": 49407},
             "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                               "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768}}
    same = CLIPModel(CLIPConfig(projection_dim=768, **sizes))
    same.load_state_dict(rewards.hps_state_dict(model.state_dict()))
    same.save_pretrained(folder)
    torch.save(randomize(package.mlp, SEED).state_dict(), folder / rewards.AESTHETIC_FILE)
    yield SimpleNamespace(ours=load_reward(f"aesthetic:{folder}"), package=package)
    shutil.rmtree(folder)


@pytest.mark.parametrize("size", SIZES)
def test_aesthetic_has_the_score_and_gradient_of_the_package(aesthetic, size, tmp_path):
    def tensors(images, prompts):
        preprocess = Compose([aesthetic.package.preprocess.transforms[index] for index in (0, 1, 4)])
        embeds = aesthetic.package.clip_model.encode_image(preprocess(images))
        return aesthetic.package.mlp(torch.nn.functional.normalize(embeds))[:, 0]

    images = batch(size, contrast=0.5)
    assert_equal(*(score_and_gradient(score, images, [""]) for score in (aesthetic.ours, tensors)))
    if size == (224, 224):
        pil_image(size, contrast=0.5).save(tmp_path / "image.png")
        with torch.no_grad():
            theirs = aesthetic.package.score("", str(tmp_path / "image.png"))
            assert abs(aesthetic.ours(images, [""]).item() - theirs) <= SCORE


@pytest.mark.parametrize("variant", ["no antialias", "gelu"])
@torch.no_grad()
def test_a_wrong_aesthetic_misses_tenfold(aesthetic, variant):
    images = batch((512, 700))
    right = aesthetic.ours(images, [""])
    if variant == "no antialias":
        with without_antialiasing():
            wrong = aesthetic.ours(images, [""])
    else:
        forward = torch.nn.functional.gelu
        with mock.patch.object(QuickGELUActivation, "forward", lambda self, values: forward(values)):
            wrong = aesthetic.ours(images, [""])
    assert (right - wrong).abs() >= 10 * SCORE
