"""The quickstart: its picture shows the measured images and nothing else, and its models have their flags."""

import runpy
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import build_pipelines
import picture
import quickstart
import world


CAPTIONS = [caption for caption in world.HELD_OUT_CAPTIONS[:14] for _ in range(2)]


@pytest.fixture(scope="module")
def images():
    return world.render(CAPTIONS, torch.Generator().manual_seed(1))[0]


def cells(path, rows):
    """The images of a picture, and the colours of the values below them: [row][column]."""
    side = picture.SIDE
    corners = [[(picture.LEFT + column * (side + picture.GAP), picture.TOP + row * picture.ROW)
                for column in range(picture.COLUMNS)] for row in range(rows)]
    with Image.open(path) as opened:
        return ([[opened.crop((left, top, left + side, top + side)) for left, top in row] for row in corners],
                [[opened.getpixel((left, top + side + 3)) for left, top in row] for row in corners])


def test_the_picture_shows_the_first_image_of_each_of_the_first_twelve_captions(tmp_path, images):
    """In the order of its rows, which are not taken for each other."""
    rows = {"teacher": images, "before": images.roll(2, 0), "after": images.flip(2)}
    picture.save_picture(tmp_path / "picture.png", CAPTIONS, rows)
    with Image.open(tmp_path / "picture.png") as opened:
        assert opened.size == (picture.LEFT + 12 * (picture.SIDE + picture.GAP) - picture.GAP,
                               picture.TOP + 3 * picture.ROW - 2 * picture.GAP)
    shown, _ = cells(tmp_path / "picture.png", 3)
    teacher, before, after = [
        [to_pil_image(image).resize((picture.SIDE, picture.SIDE), Image.Resampling.LANCZOS)
         for image in row[:24:2]] for row in rows.values()]
    assert CAPTIONS[:24:2] == world.HELD_OUT_CAPTIONS[:12]
    assert shown == [teacher, before, after] != [teacher, after, before]


def test_a_value_has_the_colour_of_its_sign_and_none_without_a_shape(tmp_path, images):
    picture.save_picture(tmp_path / "picture.png", CAPTIONS, {
        "as rendered": images, "upside down": images.flip(2), "no shape": torch.full_like(images, 0.5)})
    _, colors = cells(tmp_path / "picture.png", 3)
    lit_above = world.true_preference(world.read(images))[:24:2] > 0
    assert 2 < lit_above.sum() < 10
    for above, rendered, flipped, empty in zip(lit_above.tolist(), *colors):
        assert (rendered[1] > rendered[0]) == above and (flipped[1] > flipped[0]) != above
        assert empty == picture.UNLIT


@pytest.mark.parametrize("given, scale", [([], 100), (["--reward_scale=7"], 7)])
def test_the_model_of_four_steps_has_its_flags_and_a_given_flag_wins(tmp_path, monkeypatch, given, scale):
    launched = []
    monkeypatch.setattr(build_pipelines.subprocess, "run",
                        lambda words: launched.extend(words) or SimpleNamespace(returncode=0))
    quickstart.post_train(quickstart.MODELS["sd15_4step"], tmp_path / "pipeline", 0, given)
    start = next(index for index, word in enumerate(launched) if "train_diff_instruct_star_sd15.py" in word)
    script = load_script("train_diff_instruct_star_sd15")
    args = script.parse_args(script.FAMILY, launched[start + 1:])
    assert args.generator_timesteps == [999, 749, 499, 249] and args.generator_init.endswith("four_step")
    assert args.reward_steps == "last" and list(args.reward.values()) == [scale]


@pytest.mark.parametrize("name", quickstart.MODELS)
def test_a_model_has_a_script_and_shipped_files(name):
    model = quickstart.MODELS[name]
    assert all((quickstart.ASSETS / folder).is_dir() for folder in (model.reference, model.start))
    assert (quickstart.REPOSITORY / build_pipelines.script_of(model.family)).exists()


@pytest.mark.parametrize("platform, kept", [("darwin", {"ACCELERATE_USE_CPU": "true"}), ("linux", {})])
def test_the_quickstart_stays_on_the_cpu_of_a_mac(monkeypatch, platform, kept):
    """Accelerate would pick MPS there."""
    with monkeypatch.context() as patched:
        patched.setattr(quickstart.sys, "platform", platform)
        held = runpy.run_path(quickstart.__file__)["ENVIRONMENT"]
    assert {name: value for name, value in held.items() if name.startswith("ACCELERATE")} == kept
