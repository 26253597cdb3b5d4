"""Training learns: in the shapes world, 30 updates raise the reward of fixed noise and keep its diversity."""

import pytest
import torch
from conftest import metrics

import world
from build_pipelines import ASSETS


# Over the seeds 0 to 9 the gain of the validation reward was 0.0131 in the mean, with a standard deviation of
# 0.0016, and diversity was 0.82 to 1.34 of its start. The margin is four deviations below the mean.
MARGIN = 0.0067
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


@pytest.fixture
def learn(script, monkeypatch, tmp_path):
    """Train for 30 updates; returns the first and the last validation."""
    def run(seed):
        monkeypatch.setattr(script, "export", lambda trainer: None)
        script.main(script.FAMILY, script.parse_args(script.FAMILY, [
            f"--pretrained_model_name_or_path={ASSETS / 'teacher'}", f"--output_dir={tmp_path / 'run'}",
            f"--generator_init={ASSETS / 'one_step'}", f"--reward_model_name_or_path={ASSETS / 'reward'}",
            f"--prompts_file={world.CAPTIONS_FILE}", "--resolution=40", "--mixed_precision=no",
            "--cfg_scale=2", "--reward_scale=300", "--train_batch_size=8", "--max_train_steps=30",
            "--learning_rate=1e-4", "--assistant_learning_rate=4e-4", f"--seed={seed}",
            "--validation_steps=30", "--validation_prompts", *world.TRAIN_CAPTIONS[::32]]))
        first, last = [line for line in metrics(tmp_path / "run") if "validation_reward" in line]
        return first, last
    return run


def assert_learned(first, last):
    assert last["validation_reward"] - first["validation_reward"] > MARGIN
    for kind in ("noise", "prompts"):
        name = f"validation_diversity_over_{kind}"
        assert last[name] > 0.7 * first[name]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_thirty_updates_raise_the_reward_and_keep_diversity(learn, seed):
    assert_learned(*learn(seed))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["sign", "update"])
def test_it_would_not_pass_without_the_reward_sign_or_the_update(script, learn, monkeypatch, fault):
    if fault == "sign":
        reward_gradient = script.reward_gradient

        def reversed_gradient(*given):
            gradient, logs = reward_gradient(*given)
            return -gradient, logs
        monkeypatch.setattr(script, "reward_gradient", reversed_gradient)
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer, closure=None: None)
    with pytest.raises(AssertionError):
        assert_learned(*learn(0))
