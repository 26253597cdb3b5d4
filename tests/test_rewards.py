"""utils/rewards.py on two-layer models in the official formats; the rewards of the training scripts."""

import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, assert_same, metrics
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image, to_tensor

from official_models import mps_features, write_tiny
from utils import rewards
from utils.official import OfficialScorer, find_official, import_image_reward
from utils.rewards import find_file, find_reward, load_reward


NAMES = ["pickscore", "clip", "hpsv2.1", "imagereward", "aesthetic", "mps"]
SCORES = [*NAMES, "clip-dmd2"]  # the last is not a reward of the training scripts
PROMPTS = ["a red cat", "Two &amp; three"]


@pytest.fixture(scope="session")
def written(tmp_path_factory, tiny_families):
    clip = tiny_families["sd15"]["clip"]
    places, constants, official = write_tiny(tmp_path_factory.mktemp("official"), clip)
    return SimpleNamespace(places=places | dict.fromkeys(("pickscore", "clip", "clip-dmd2"), clip),
                           constants=constants, official=official)


@pytest.fixture
def places(written, monkeypatch):
    """{name: folder} of tiny models; the constants say their sizes."""
    for name, value in written.constants.items():
        monkeypatch.setattr(rewards, name, value)
    return written.places


def images(batch=2, height=20, width=28, dtype=torch.float32):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)


# -------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", SCORES)
def test_the_gradient_is_that_of_finite_differences(places, name):
    torch.set_default_dtype(torch.float64)  # transformers 4 makes CLIP's causal mask in it
    try:
        reward = load_reward(f"{name}:{places[name]}", torch.float64)
        x = (0.2 + 0.6 * images(dtype=torch.float64)).requires_grad_()  # not clamped
        (gradient,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        step = 1e-5 * direction
        with torch.no_grad():
            difference = (reward(x + step, PROMPTS) - reward(x - step, PROMPTS)).sum() / 2e-5
        assert gradient.abs().sum() > 0
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", SCORES)
def test_the_score_of_an_image_does_not_depend_on_its_batch(places, name):
    reward = load_reward(f"{name}:{places[name]}")
    x = images(3)
    prompts = [*PROMPTS, "a much longer prompt than the others"]
    together = reward(x, prompts)
    assert together.shape == (3,) and len(set(together.tolist())) == 3
    alone = torch.cat([reward(x[index:index + 1], prompts[index:index + 1]) for index in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_and_models(places, name, dtype):
    exact = load_reward(f"{name}:{places[name]}")
    x = images().to(dtype)
    expected = exact(x.float(), PROMPTS)
    torch.testing.assert_close(exact(x, PROMPTS), expected)
    if dtype is torch.bfloat16:
        x.requires_grad_()
        scores = load_reward(f"{name}:{places[name]}", dtype)(x, PROMPTS)
        assert scores.dtype == torch.float32 and (scores - expected).abs().max() < 0.05 * reward_scale(name)
        (gradient,) = torch.autograd.grad(scores.sum(), x)
        assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["clip", "hpsv2.1", "imagereward", "pickscore"])
def test_the_prompt_matters_and_the_weights_are_frozen(places, name):
    reward = load_reward(f"{name}:{places[name]}")
    assert not any(parameter.requires_grad for parameter in reward.parameters()) and not reward.training
    assert (reward(images(), ["one", "two"]) != reward(images(), ["three", "four"])).all()


# ------------------------------------------------------------------------------------- the official models


def test_hps_is_the_open_clip_cosine_of_the_same_image_and_tokens(written, places):
    from hpsv2.src.open_clip.transform import image_transform

    reward = load_reward(f"hpsv2.1:{places['hpsv2.1']}")
    preprocess = image_transform(16, is_train=False, resize_longest_max=True)
    pil_image = Image.fromarray((images(1)[0].permute(1, 2, 0) * 255).byte().numpy())
    tokens = reward.tokenize(PROMPTS[1:]).input_ids
    padded = torch.zeros(1, 16, dtype=torch.long)
    padded[:, :tokens.shape[1]] = tokens
    image, text, _ = written.official["hpsv2.1"](preprocess(pil_image)[None], padded)
    score = reward(to_tensor(pil_image)[None], PROMPTS[1:])
    torch.testing.assert_close(score, 100 * (image * text).sum(-1), rtol=1e-5, atol=1e-5)


def test_imagereward_matches_the_modules_of_the_package(written, places):
    reward = load_reward(f"imagereward:{places['imagereward']}")
    parts = written.official["imagereward"].eval()
    x = images(2, 16, 16)
    tokens = reward.tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    seen = parts["blip"]["visual_encoder"]((x - reward.mean) / reward.std)
    read = parts["blip"]["text_encoder"](
        tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:2]), return_dict=True).last_hidden_state
    expected = (parts["mlp"](read[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(reward(x, PROMPTS), expected, rtol=1e-5, atol=1e-5)


def test_mps_is_its_authors_sums(places, monkeypatch):
    """Their attention written out, with a mask that hides some of the prompt and not the rest."""
    monkeypatch.setattr(rewards, "MPS_RELEVANCE", 0.9)
    reward, sizes = load_reward(f"mps:{places['mps']}"), rewards.MPS_SIZES
    weights, x, clip = load_file(places["mps"] / "model.safetensors"), images(1, 16, 16), reward.model
    text, prompt = reward.read(PROMPTS[:1])
    condition = next(iter(reward.read([rewards.MPS_CONDITION])))[0]
    relevance = (text[0] @ condition.T).max(1).values
    mask = relevance / relevance.max() > 0.9
    assert 0 < mask.sum() < len(mask)
    seen = clip.vision_model(pixel_values=(x - reward.mean) / reward.std).last_hidden_state[0]
    features = mps_features(weights, clip.visual_projection(seen), text[0], mask, **sizes)
    expected = clip.logit_scale.exp() * torch.cosine_similarity(features[0], prompt[0], dim=0)
    torch.testing.assert_close(reward(x, PROMPTS[:1])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_pil_image_is_scored_as_its_pixels(places, name):
    """One that need not be resized exactly, another but for rounding; any sizes make one batch."""
    reward = load_reward(f"{name}:{places[name]}")
    pil_images = [Image.fromarray((images(1, *size)[0].permute(1, 2, 0) * 255).byte().numpy())
                  for size in ((16, 16), (20, 37))]
    batch = torch.stack([rewards.from_image(reward, image) for image in pil_images])
    assert batch.shape == (2, 3, 16, 16)
    scores = reward(batch, PROMPTS)
    for image, prompt, score, tolerance in zip(pil_images, PROMPTS, scores, (0, 0.02)):
        exact = reward(to_tensor(image)[None], [prompt])[0]
        torch.testing.assert_close(score, exact, rtol=1e-5, atol=1e-5 + tolerance * reward_scale(name))
    transparent = pil_images[1].convert("RGBA")
    assert_same(rewards.from_image(reward, transparent), batch[1])


def test_an_official_scorer_is_given_the_image_to_the_bit():
    class Recorder(OfficialScorer):
        def score(self, image, prompt):
            seen.append(image)
            return float(prompt)

    seen, scorer = [], Recorder()
    pil_image = Image.fromarray((images(1, 20, 37)[0].permute(1, 2, 0) * 255).byte().numpy())
    batch = torch.stack([rewards.from_image(scorer, pil_image)] * 2)
    assert scorer(batch, ["1", "2"]).tolist() == [1, 2]
    assert all(image.tobytes() == pil_image.tobytes() for image in seen)


@pytest.mark.parametrize("size", [(16, 16), (31, 20), (24, 31), (300, 512)])
def test_the_clip_score_of_dmd2_is_by_its_steps(places, size):
    """A square, Lanczos to 256, CLIP's own preprocessing in 8 bits; the prefix's tokens first."""
    reward = load_reward(f"clip-dmd2:{places['clip']}")
    image = Image.fromarray((images(1, *size)[0].permute(1, 2, 0) * 255).byte().numpy())
    steps = transforms.Compose([
        transforms.CenterCrop(min(size)), lambda image: image.resize((256, 256), Image.LANCZOS),
        transforms.Resize(16, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(16),
        transforms.ToTensor(), transforms.Normalize(reward.mean.flatten(), reward.std.flatten())])
    length = reward.model.config.text_config.max_position_embeddings
    for caption in ("a red cat", "Two &amp; three", "many words " * 40):
        plain = reward.tokenizer(caption.replace("&amp;", "&").lower()).input_ids
        tokens = [plain[0], *reward.tokenizer("a photo depicts").input_ids[1:-1], *plain[1:]]
        tokens = tokens if len(tokens) <= length else tokens[:length - 1] + tokens[-1:]
        output = reward.model(input_ids=torch.tensor([tokens]), pixel_values=steps(image)[None])
        expected = 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds)
        score = reward(rewards.from_image(reward, image)[None], [caption])
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)
        if max(size) > 16:  # as a tensor, without rounding; one of 16 x 16 would count as preprocessed
            score = reward(to_tensor(image)[None], [caption])
            torch.testing.assert_close(score, expected, rtol=0, atol=0.2)
        without = load_reward(f"clip:{places['clip']}")
        assert (without(rewards.from_image(without, image)[None], [caption]) - expected).abs() > 1e-3


def test_the_prefix_of_dmd2_is_three_tokens_before_those_of_the_caption():
    """In CLIP's own vocabulary, as hpsv2 has it; DMD2 puts them in and cuts at 77."""
    from hpsv2.src.open_clip.tokenizer import tokenize

    prefix = tokenize([rewards.DMD2_PREFIX])[0]
    assert prefix[4] == 49407 and not prefix[5:].any()
    captions = ["A dog", "Two &amp; three", "  spaces ", "'s", "", *("word " * n for n in range(70, 80))]
    tokens = tokenize(captions)
    expected = torch.cat([tokens[:, :1], prefix[1:4].expand(len(captions), 3), tokens[:, 1:]], 1)[:, :77]
    expected[:, 76][expected[:, 76] > 0] = 49407
    found = tokenize([rewards.DMD2_PREFIX + rewards.clean(caption) for caption in captions])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("given", [37, 256, 300, 1024])
def test_lanczos_is_that_of_pil_but_for_its_rounding(given):
    x = (0.25 + 0.5 * images(1, given, given)).mul(255).round() / 255  # no overshoot, which PIL clips midway
    expected = to_tensor(to_pil_image(x[0]).resize((256, 256), Image.LANCZOS))
    assert (rewards.lanczos(x, 256)[0] - expected).abs().max() < 1.5 / 255


def reward_scale(name):
    return 100 if name in ("clip", "clip-dmd2", "hpsv2.1") else 1


def test_the_longer_side_is_resized_and_zeros_are_around():
    """64 x 16 of ones to 32: a strip of 8 columns, as many zeros to both sides."""
    padded = rewards.resize_and_pad(torch.ones(1, 3, 64, 16), 32)
    expected = torch.zeros(32, 32)
    expected[:, 12:20] = 1
    torch.testing.assert_close(padded, expected.expand(1, 3, -1, -1))
    odd = rewards.resize_and_pad(torch.ones(1, 3, 32, 7), 32)  # 25 columns are left: 12 and 13
    assert odd[0, 0, 0].tolist() == [0] * 12 + [1] * 7 + [0] * 13
    assert rewards.resize_and_pad(torch.ones(1, 3, 1, 500), 32).shape == (1, 3, 32, 32)


def test_the_shorter_side_is_resized_by_whole_pixels_and_the_centre_cut():
    """16 x 27 to 8: 13.5 columns, of which 13; 5 are cut away, before them 2 (down) or 2 (even)."""
    ramp = torch.linspace(0, 1, 13).expand(1, 3, 8, 13)
    for anchor in (torch.math.floor, round):
        assert torch.equal(rewards.resize_and_crop(ramp, 8, 8, anchor), ramp[..., 2:10])
    eleven = ramp[..., :11]  # 3 are cut away: 1 or 2 before
    assert torch.equal(rewards.resize_and_crop(eleven, 8, 8), eleven[..., 1:9])
    assert torch.equal(rewards.resize_and_crop(eleven, 8, 8, anchor=round), eleven[..., 2:10])
    assert rewards.resize_and_crop(torch.zeros(1, 3, 16, 27), 8, 8).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("text, expected", [
    ("A  Cat\tand\u00a0DOG \n", "a cat and dog"), ("&amp;lt;b&amp;gt; &quot;x&quot;", '<b> "x"'),
    ("“curly” ’s", "\"curly\" 's"), ("Ã©tÃ©", "été"), ("", ""), ("42", "42"),
    ("<end_of_text>", "<|endoftext|>"), ("<|endoftext|>", "<| endoftext |>")])
def test_prompts_are_cleaned_as_open_clip_does(text, expected):
    assert rewards.clean(text) == expected


def test_importing_image_reward_leaves_the_process_as_it_was():
    before = (list(warnings.filters), "clip" in sys.modules, logging.getLogger("transformers").level)
    package = import_image_reward()
    assert (list(warnings.filters), "clip" in sys.modules, logging.getLogger("transformers").level) == before
    assert callable(package.load)


# ------------------------------------------------------------------------------------------------ bad files


def checkpoint(places, name):
    return next(path for kind in ("*.pt", "*.pth") for path in places[name].glob(kind))


@pytest.fixture
def broken(places, tmp_path):
    """A copy of a tiny model's folder, its checkpoint changed; returns the name that reads it."""
    def write(name, change):
        folder = tmp_path / name
        shutil.copytree(places[name], folder)
        path = folder / checkpoint(places, name).name
        held = torch.load(path, weights_only=True)
        torch.save(change(held), path)
        return f"{name}:{path}"
    return write


RENAMED = {"hpsv2.1": ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
           "imagereward": ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
                           "text.encoder.layer.1.crossattention.self.key.weight"),
           "aesthetic": ("layers.4.bias", "4.bias")}


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("kind", ["renamed", "absent", "shape"])
def test_a_checkpoint_with_a_wrong_key_is_refused_by_name(broken, name, kind):
    old, inside = RENAMED[name]

    def change(held):
        weights = held.get("state_dict", held)
        value = weights.pop(old)
        if kind == "renamed":
            weights[f"other.{old}"] = value
        elif kind == "shape":
            weights[old] = value[:-1]
        return held
    reward = broken(name, change)
    with pytest.raises(ValueError) as refusal:
        load_reward(reward)
    line = str(refusal.value)
    assert inside in line and "\n" not in line
    assert {"renamed": f"other.{old}", "absent": "1 missing", "shape": "1 of another shape"}[kind] in line


def test_a_clip_checkpoint_without_a_weight_is_refused(places, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(places["clip"], tmp_path / "clip")
    shutil.copy(checkpoint(places, "aesthetic"), tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    whole = load_file(file)
    other = {key: value for key, value in whole.items() if key != "visual_projection.weight"}
    more, moved = {"other": torch.zeros(2)}, {"visual_projection.weight": torch.zeros(2, 2)}
    for weights, words in [(other | more, "missing visual_projection.weight, unexpected other"),
                           (other, "missing visual_projection.weight"), (whole | more, "unexpected other"),
                           (other | moved, "mismatched visual_projection.weight")]:
        save_file(weights, file, metadata={"format": "pt"})
        for name in ("pickscore", "clip", "aesthetic"):
            with pytest.raises(ValueError, match=words):
                load_reward(f"{name}:{tmp_path / 'clip'}")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="clip cannot be loaded"):
        load_reward(f"clip:{tmp_path / 'clip'}")


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("content", [
    torch.zeros(3), [torch.zeros(3)], {"state_dict": [1]}, {0: torch.zeros(3)},
    {"state_dict": torch.zeros(3)}, b"", b"<html>not found</html>"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(broken, name, content):
    reward = broken(name, lambda held: content)
    if isinstance(content, bytes):
        Path(reward.partition(":")[2]).write_bytes(content)
    with pytest.raises(ValueError, match=r"\.pth?\b"):
        load_reward(reward)


@pytest.mark.parametrize("name", ["pickscore", "clip", "hpsv2.1", "imagereward"])
def test_a_folder_without_the_vocabulary_is_refused(places, tmp_path, name):
    """The libraries load a tokenizer of nothing from it, which reads all prompts as the same."""
    shutil.copytree(places[name], tmp_path / "copy")
    for file in ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.json"):
        (tmp_path / "copy" / file).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="copy has"):
        find_reward(f"{name}:{tmp_path / 'copy'}")


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("prompts", [["a"], "a", "abc", ["a", "b", "c", "d"], []])
def test_as_many_prompts_as_images(places, name, prompts):
    with pytest.raises(ValueError, match="3 images"):
        load_reward(f"{name}:{places[name]}")(images(3), prompts)


def test_without_ftfy_hps_is_refused_before_it_is_loaded(places, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises((ImportError, ValueError), match="ftfy"):
        find_reward(f"hpsv2.1:{places['hpsv2.1']}")


class Planted:
    def __reduce__(self):
        return os.mkdir, (os.environ["PLANTED"],)


@pytest.mark.parametrize("name", RENAMED)
def test_code_in_a_checkpoint_is_not_executed(broken, name, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    reward = broken(name, lambda held: {"state_dict": held, "code": Planted()})
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_reward(reward)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("name", [
    "hpsv2.1:absent.pt", "hpsv2.0:{}", "imagereward:./absent", "clip:{}", "pickscore:{}/absent",
    "aesthetic:/absent", "no_such_reward", "no_module:factory", "json:nothing"])
def test_a_reward_that_is_not_there_is_refused_before_it_is_loaded(name, tmp_path):
    with pytest.raises((OSError, ValueError)):
        find_reward(name.format(tmp_path))


@pytest.mark.parametrize("name", ["hpsv2.1:absent.pt", "imagereward:./absent", "clip"])
def test_an_official_scorer_that_is_not_there_is_refused_before_it_is_loaded(name):
    with pytest.raises((OSError, ValueError)):
        find_official(name)


def test_a_file_is_found_at_its_location(tmp_path):
    (tmp_path / "weights.pt").write_text("")
    assert find_file(str(tmp_path), "weights.pt") == find_file(str(tmp_path / "weights.pt"), "other.pt")
    with pytest.raises(FileNotFoundError, match="neither"):
        find_file("weights.pt", "weights.pt")


# -------------------------------------------------------------------------------- in the training scripts


def refused(capsys, run):
    with pytest.raises(SystemExit) as status:
        run()
    line = capsys.readouterr().err.splitlines()[-1]
    assert status.value.code == 2 and line.startswith(("error: --reward", "error: argument --reward"))
    return line


def test_an_own_reward_is_raised(train, own_reward, tmp_path):
    """Brightness, with enough steps for the generator to find it."""
    reward = own_reward("images.mean((1, 2, 3))")
    out = train(tmp_path / "run", reward=f"{reward}=1e5", learning_rate=1e-2, max_train_steps=20)
    values = [line["reward"] for line in metrics(out)]
    assert values[-1] > values[0] + 0.05


def test_each_term_of_a_sum_is_logged_and_its_gradient_adds(script, load, own_reward, places):
    """The sum's gradient at x0 is that of its terms, each scaled by its own."""
    terms = {"pickscore": 3.0, f"clip:{places['clip']}": 0.2, f"aesthetic:{places['aesthetic']}": 0.5,
             own_reward("images.square().mean((1, 2, 3))"): 7.0}
    given = [f"{name}={scale}" for name, scale in terms.items()]
    prepared = load(reward=given)
    models, x0, prompts = prepared.models, prepared.batch.noise, prepared.batch.prompts

    def gradient(rewards):
        return script.reward_gradient(
            x0, prompts, lambda z: script.FAMILY.decode(models.reward_vae, z), rewards)

    total, logs = gradient(models.rewards)
    short = ["pickscore", "clip", "aesthetic", list(terms)[-1]]
    assert list(models.rewards) == short
    parts = [gradient({name: models.rewards[name]}) for name in short]
    torch.testing.assert_close(total, sum(part for part, _ in parts), rtol=1e-4, atol=1e-6)
    for name, scale, (_, part) in zip(short, terms.values(), parts):
        assert_same(logs[f"reward_{name}"], part["reward"])
        assert_same(logs[f"grad_image_{name}"], part[f"grad_image_{name}"])
    mean = sum(scale * part["reward"] for scale, (_, part) in zip(terms.values(), parts)) / 10.7
    torch.testing.assert_close(logs["reward"], mean)


def test_a_run_with_several_rewards_logs_validates_and_says_them(train, places, tmp_path):
    rewards_given = ["pickscore=30", f"aesthetic:{places['aesthetic']}=2"]
    out = train(tmp_path / "run", reward=rewards_given, validation_prompts=["a cat", "a dog"])
    for line in metrics(out)[1:3]:  # before and after them are the validations
        total = 30 * line["reward_pickscore"] + 2 * line["reward_aesthetic"]
        assert line["reward"] == pytest.approx(total / 32)
        assert line["grad_image_pickscore"] > 0 and line["grad_image_aesthetic"] > 0
    record = json.loads((out / "validation" / "step-000002.json").read_text())
    assert set(record[0]) == {"prompt", "reward", "reward_pickscore", "reward_aesthetic", "box"}
    card = (out / "README.md").read_text()
    assert "the reward is 30 x pickscore + 2 x aesthetic." in card
    assert str(places["aesthetic"]) not in card


def test_all_of_them_in_one_run(script, train, written, tmp_path, monkeypatch):
    """In half precision and off the device between their uses; beside the script a file of tiny models."""
    (tmp_path / "utils").mkdir()
    sizes = "".join(f"{name} = {value!r}\n" for name, value in written.constants.items())
    text = (REPOSITORY / "utils" / "rewards.py").read_text()
    (tmp_path / "utils" / "rewards.py").write_text(f"{text}\n\n{sizes}")
    shutil.copy(REPOSITORY / "utils" / "offload.py", tmp_path / "utils")
    monkeypatch.setattr(script, "__file__", str(tmp_path / "script.py"))
    given = ["pickscore=1", *(f"{name}:{written.places[name]}=2" for name in NAMES[1:])]
    out = train(tmp_path / "run", reward=given, offload=True, mixed_precision="bf16",
                validation_prompts=["a cat"])
    for line in metrics(out)[1:3]:
        assert all(line[f"grad_image_{name}"] > 0 for name in NAMES)
        scores = [line[f"reward_{name}"] for name in NAMES]
        assert line["reward"] == pytest.approx((scores[0] + 2 * sum(scores[1:])) / 11, rel=1e-5)


@pytest.mark.slow
def test_a_sum_of_rewards_resumes_as_it_was(train, places, tmp_path):
    given = ["pickscore=30", f"clip:{places['clip']}=2"]
    more = {"reward": given, "max_train_steps": 4, "checkpointing_steps": 2}
    whole, cut = train(tmp_path / "whole", **more), tmp_path / "cut"
    train(cut, **more | {"max_train_steps": 2})
    train(cut, **more, resume_from_checkpoint="latest")
    assert metrics(whole) == metrics(cut)


@pytest.mark.parametrize("more", [{}, {"validation_prompts": ["a", "b"]}])
@pytest.mark.parametrize("body, words", [
    ("images.mean()", "returned a Tensor of shape (), not (4,)"),
    ("images.mean((2, 3))", "returned a Tensor of shape (4, 3), not"),
    ("images.mean((1, 2, 3)).tolist()", "returned a list of shape (), not"),
    ("images.detach().mean((1, 2, 3))", "has no gradient in the images")])
def test_a_reward_that_breaks_its_contract_is_named(train, own_reward, tmp_path, capsys, body, words, more):
    reward = own_reward(body)
    line = refused(capsys, lambda: train(tmp_path / "run", reward=["pickscore=1", f"{reward}=2"], **more))
    assert f"--reward {reward} {words}" in line


def test_a_reward_that_does_not_depend_on_the_images_is_named(train, own_reward, tmp_path, capsys):
    reward = own_reward("(0 * images.detach()).mean((1, 2, 3)).requires_grad_()")
    line = refused(capsys, lambda: train(tmp_path / "run", reward=["pickscore=1", f"{reward}=2"]))
    assert f"--reward {reward} has no gradient in the images" in line


def test_a_reward_that_raises_is_named_with_its_prompts(train, own_reward, tmp_path):
    reward = own_reward("return 1 / 0")
    with pytest.raises(RuntimeError, match=rf"--reward {reward} failed with the prompts \['prompt number"):
        train(tmp_path / "run", reward=f"{reward}=1")


@pytest.mark.parametrize("text, words", [
    ("def build(:", "invalid syntax"), ("1 / 0", "division by zero"),
    ("raise ImportError('a\\nb')", "a b; give one of pickscore,"),
    ("other = 3", "has no attribute 'build'"), ("build = 3", "'int' object is not callable"),
    ("def build(needed):\n    pass", "needed"),
    ("def build():\n    raise RuntimeError('no luck')", "no luck")])
def test_a_module_that_fails_is_named_in_one_line(train, tmp_path, monkeypatch, capsys, text, words):
    module = f"own_{abs(hash(text))}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(capsys, lambda: train(tmp_path / "run", reward=f"{module}:build=1"))
    assert words in line and module in line and not (tmp_path / "run").exists()


def test_a_factory_that_makes_no_reward_is_named(train, own_reward, tmp_path):
    reward = own_reward("None").replace(":build", ":nothing")
    (tmp_path / f"{reward.split(':')[0]}.py").write_text("def nothing():\n    pass\n")
    with pytest.raises(RuntimeError, match=f"--reward {reward} failed"):
        train(tmp_path / "run", reward=reward)


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_pipeline_loads(
        script, train, broken, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "load_pipeline", None)
    reward = broken("aesthetic", lambda held: {"layers.0.weight": held["layers.0.weight"]})
    line = refused(capsys, lambda: train(tmp_path / "run", reward=f"{reward}=1"))
    assert "9 missing (0.bias" in line


def test_a_clip_reward_without_a_weight_is_refused_in_one_line(train, tiny, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny["clip"], tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights["other"] = weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        train(tmp_path / "run", reward_model_name_or_path=tmp_path / "clip")
    assert "visual_projection.weight" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_script_alone_says_where_the_other_rewards_are(script, flags, tmp_path, run_warm):
    path = shutil.copy(script.__file__, tmp_path)
    ran = run_warm(path, *flags("run", reward="hpsv2.1=1"))
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert ran.returncode == 2 and line.startswith("error: --reward hpsv2.1 needs utils/rewards.py of the")


@pytest.mark.parametrize("size", [(16, 16), (20, 37), (61, 17), (15, 16), (16, 9), (7, 100), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pickscore_of_the_script_and_that_of_utils_are_equal(script, tiny, size, dtype):
    """Scores and gradients to the bit, for odd sizes."""
    there = load_reward(f"pickscore:{tiny['clip']}")
    here = script.ClipReward(there.model, script.CLIPProcessor.from_pretrained(tiny["clip"]))
    results = []
    for reward in (here, there):
        x = images(2, *size, dtype).requires_grad_()
        scores = reward(x, PROMPTS)
        results.append([scores, *torch.autograd.grad(scores.sum(), x)])
    assert_same(*results)
    assert results[0][1].abs().sum() > 0 and results[0][1].dtype == dtype


def test_the_rewards_of_the_script_and_those_of_utils_are_the_same(script, load, tiny):
    prepared, there = load(reward=["pickscore=1"]), load_reward(f"pickscore:{tiny['clip']}")
    assert_same(prepared.models.rewards["pickscore"][1](images(), PROMPTS), there(images(), PROMPTS))
    assert script.REWARDS == rewards.REWARDS
    assert script.PICKSCORE == rewards.PICKSCORE and script.PICKSCORE_PROCESSOR == rewards.CLIP_H
