"""The shapes world: what is rendered is read back, and the rule of taste is independent of all else."""

import importlib
import json

import pytest
import torch
from conftest import REPOSITORY

import world


CAPTIONS = world.TRAIN_CAPTIONS + world.HELD_OUT_CAPTIONS


@pytest.fixture(scope="module")
def rendered():
    """2,000 captions from all of the world's, their images, what these show and what is read."""
    order = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(1)).tolist()
    captions = [CAPTIONS[order[index % len(order)]] for index in range(2000)]
    images, truth = world.render(captions, torch.Generator().manual_seed(2))
    return captions, images, truth, world.read(images)


@pytest.mark.slow
def test_every_attribute_is_read_right(rendered):
    captions, _, _, reading = rendered
    held_out = torch.tensor([caption in world.HELD_OUT_CAPTIONS for caption in captions])
    assert held_out.sum() > 100
    for name, right in world.alignment(reading, captions).items():
        assert right.float().mean() >= 0.98, name
        assert right[held_out].float().mean() >= 0.98, name


def test_place_tint_and_lighting_are_measured(rendered):
    _, _, truth, reading = rendered
    found = reading["found"]
    assert found.float().mean() >= 0.99
    for name, limit in {"x": 0.01, "y": 0.01, "tint": 0.02, "lighting": 0.05}.items():
        assert (reading[name] - truth[name])[found].abs().mean() < limit, name


def test_rotation_is_measured_up_to_the_symmetry_of_the_shape(rendered):
    _, _, truth, reading = rendered
    for index, (kind, (corners, _)) in enumerate(world.KINDS.items()):
        if kind == "circle":
            continue
        chosen, period = reading["kind"] == index, 360 / corners
        error = (reading["rotation"] - truth["rotation"])[chosen]
        error = torch.remainder(error + period / 2, period) - period / 2
        assert error.abs().mean() < 4, kind


@pytest.mark.slow
def test_the_true_preference_is_uncorrelated_with_all_else(rendered):
    captions, _, truth, reading = rendered
    found = reading["found"]
    preference = world.true_preference(reading)[found]
    other = {name: truth[name] for name in ("x", "y", "rotation", "tint")}
    wanted = torch.tensor([world.parse_caption(caption) for caption in captions]).T
    for name, index in zip(world.ATTRIBUTES, wanted):
        other |= {f"{name} {value}": (index == number).float()
                  for number, value in enumerate(world.ATTRIBUTES[name])}
    for name, value in other.items():
        assert torch.corrcoef(torch.stack([preference, value[found]]))[0, 1].abs() < 0.1, name
    with_lighting = torch.corrcoef(torch.stack([preference, truth["lighting"][found]]))[0, 1]
    assert with_lighting > 0.98


@pytest.mark.slow
def test_diversity_is_one_for_the_world_and_none_for_one_image():
    captions = [CAPTIONS[index] for index in range(0, 320, 8) for _ in range(12)]
    images, _ = world.render(captions, torch.Generator().manual_seed(3))
    for name, value in world.diversity(world.read(images), captions).items():
        assert 0.9 < value < 1.1, name
    repeated = images[::12].repeat_interleave(12, 0)
    for name, value in world.diversity(world.read(repeated), captions).items():
        assert value < 1e-4, name


def two_shapes():
    left, right = [world.render([f"a small red circle on the {side} of a white background"] * 20,
                                torch.Generator().manual_seed(4))[0] for side in ("left", "right")]
    return torch.minimum(left, right)


NO_SHAPES = {
    "noise": lambda: torch.rand(20, 3, 40, 40, generator=torch.Generator().manual_seed(6)),
    "flat fields": lambda: torch.linspace(0, 1, 20).view(20, 1, 1, 1).repeat(1, 3, 40, 40),
    "two shapes": two_shapes,
}


@pytest.mark.parametrize("name", NO_SHAPES)
def test_what_is_no_single_shape_is_not_found(name):
    reading = world.read(NO_SHAPES[name]())
    assert not reading["found"].any()
    assert (reading["kind"] == -1).all() and (reading["color"] == -1).all()
    assert world.true_preference(reading).isnan().all()


@pytest.mark.parametrize("window", [(1, 21), (21, 1)])
@pytest.mark.slow
def test_shapes_smeared_over_half_the_image_are_not_found(window):
    images, _ = world.render(CAPTIONS, torch.Generator().manual_seed(5))
    padding = [length // 2 for length in window]
    smeared = torch.nn.functional.avg_pool2d(images, window, 1, padding, count_include_pad=False)
    assert world.read(smeared)["found"].float().mean() < 0.02


def test_images_are_a_function_of_captions_and_seed():
    first, second, other = [world.render(CAPTIONS[:20], torch.Generator().manual_seed(seed))[0]
                            for seed in (0, 0, 1)]
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1


def test_captions_name_each_combination_once():
    assert len(CAPTIONS) == 2 * 5 * 4 * 2 * 4
    assert len({tuple(world.parse_caption(caption)) for caption in CAPTIONS}) == len(CAPTIONS)
    for caption in CAPTIONS:
        indices = zip(world.ATTRIBUTES.values(), world.parse_caption(caption))
        size, color, kind, place, background = [list(values)[index] for values, index in indices]
        assert caption == f"a {size} {color} {kind} on the {place} of a {background} background"


def test_held_out_captions_are_no_training_captions():
    assert len(world.HELD_OUT_CAPTIONS) == 64
    assert not set(world.HELD_OUT_CAPTIONS) & set(world.TRAIN_CAPTIONS)


def test_preference_labels_follow_the_lighting_with_noise():
    """A tenth of clear labels is flipped, equal lighting is a coin toss, and the seed decides."""
    labels = importlib.import_module("build_pipelines").preference_labels
    high, low = torch.full((20_000,), 1.0), torch.full((20_000,), -1.0)

    def fraction(first, second):
        return labels(first, second, torch.Generator().manual_seed(0)).mean().item()

    assert fraction(high, low) == pytest.approx(0.9, abs=0.01)
    assert fraction(low, high) == pytest.approx(0.1, abs=0.01)
    assert fraction(high, high) == pytest.approx(0.5, abs=0.015)
    odds = 1 / (1 + torch.tensor(-0.3 / 0.3).exp().item())
    assert fraction(high, high - 0.3) == pytest.approx(0.8 * odds + 0.1, abs=0.015)
    assert fraction(high, high - 0.3) == fraction(high, high - 0.3)


def test_shipped_configurations_name_no_folder_of_the_machine_that_made_them():
    files = list((REPOSITORY / "examples" / "shapes" / "assets").rglob("config.json"))
    assert len(files) > 10
    for path in files:
        assert not str(json.loads(path.read_text()).get("_name_or_path", "")).startswith("/"), path


def test_many_empty_tokens_are_one_to_the_same_figures(tiny_families):
    """Of an SD3 without T5, whose second kind of attention has no text: the shortcut of its training."""
    build = importlib.import_module("build_pipelines")
    pipeline = build.load_pipeline(tiny_families["sd3"]["pipeline"]).to(torch.float32)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    network = pipeline.transformer

    def run():
        embeds, _, pooled, _ = pipeline.encode_prompt(["a red cat", "two"], None, None,
                                                      do_classifier_free_guidance=False)
        output = network(latents, timestep=torch.tensor([900.0, 30.0]), encoder_hidden_states=embeds,
                         pooled_projections=pooled).sample
        network.zero_grad()
        output.square().sum().backward()
        return embeds.shape[1], output.detach(), [value.grad for value in network.parameters()]
    count, output, gradients = run()
    with build.empty_tokens_as_one():
        few, same, alike = run()
    assert (count, few) == (16 + 256, 16 + 1)
    torch.testing.assert_close(same, output, rtol=1e-5, atol=1e-6)
    for one, other in zip(alike, gradients):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item() + 1e-7)
    assert torch.equal(run()[1], output)


def test_the_file_of_captions_is_that_of_the_world():
    assert world.CAPTIONS_FILE.read_text().splitlines() == world.TRAIN_CAPTIONS
