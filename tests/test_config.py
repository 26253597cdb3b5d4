"""Flags from a file: `--config run.yaml`, or the args.json of an earlier run; what stands beside it wins."""

import json

import pytest


@pytest.fixture
def parse(script, flags, tmp_path):
    """The flags that a run gets from files and command line; `content` is YAML, or a dict for args.json."""
    def run(content, *words):
        path = tmp_path / ("args.json" if isinstance(content, dict) else "run.yaml")
        path.write_text(json.dumps(content) if isinstance(content, dict) else content)
        given = [f"--config={path}", f"--output_dir={tmp_path / 'run'}", *words]
        return script.parse_args(script.FAMILY, given)
    return run


@pytest.fixture
def saved(script, flags, tmp_path):
    """What a run of these flags writes to its args.json."""
    def run(**more):
        args = script.parse_args(script.FAMILY, flags(tmp_path / "first", **more))
        return script.saved_args(args)
    return run


WHOLE = """
# Every kind of value; `no`, `5e-7` and `0042` are what they are on a command line.
prompts_file: p.txt
mixed_precision: no
learning_rate: 5e-7
hub_model_id: 0042
generator_timesteps: [999, 499]
validation_prompts:
  - "yes"
  - a cat = a dog
reward:
  pickscore: 2
  mine:build: 0.5
use_ema: true
streaming: false
revision:
min_diversity: 0.25
"""


def test_a_file_gives_every_kind_of_flag(script, parse):
    args = parse(WHOLE)
    assert (args.mixed_precision, args.learning_rate, args.hub_model_id) == ("no", 5e-7, "0042")
    assert args.generator_timesteps == [999, 499] and args.validation_prompts == ["yes", "a cat = a dog"]
    assert args.reward == {"pickscore": 2, "mine:build": 0.5}
    assert (args.use_ema, args.streaming, args.revision, args.min_diversity) == (True, False, None, 0.25)
    assert args.extras["terms/alarms"] == "--min_diversity"


def test_the_command_line_wins_over_the_file(parse):
    args = parse(WHOLE, "--learning_rate", "1e-3", "--reward=pickscore=7", "--validation_prompts", "a bird",
                 "--generator_timesteps=399")
    assert (args.learning_rate, args.reward) == (1e-3, {"pickscore": 7})
    assert args.validation_prompts == ["a bird"] and args.generator_timesteps == [399]


def test_a_flag_of_the_command_line_replaces_its_alternative_in_the_file(parse):
    args = parse(WHOLE, "--dataset_name=a/b")
    assert args.prompts_file is None and args.dataset_name == "a/b"
    content = WHOLE.replace("validation_prompts:", "validation_prompts_file: v.txt\nterm:")
    assert parse(content.partition("term:")[0], "--validation_prompts", "a").validation_prompts_file is None


def test_a_file_may_resume(script, parse, tmp_path):
    (tmp_path / "run").mkdir()
    assert parse("prompts_file: p.txt\nresume_from_checkpoint: latest").resume_from_checkpoint is None
    with pytest.raises(SystemExit):
        parse("prompts_file: p.txt\nresume_from_checkpoint: checkpoint-7")


@pytest.mark.parametrize("more", [
    {}, {"recipe": "kl_only"}, {"reward": "mine:build=3", "use_ema": True, "min_diversity": 0.5,
                                "validation_prompts": ["a cat", "a dog"], "resolution": 32}])
def test_args_json_is_the_same_run(script, parse, saved, more):
    held = saved(**more)
    again = script.saved_args(parse(held))
    assert {name for name in held if held[name] != again[name]} == {"output_dir"}


def test_what_a_run_derives_is_derived_anew(script, parse, saved):
    held = saved(learning_rate=1e-4, resolution=1024) | {"output_dir": "elsewhere"}
    args = parse(held, "--learning_rate=2e-4", "--resolution=512")
    assert args.assistant_learning_rate == 2e-4 and args.decode_batch_size == 31
    own = held | {"assistant_learning_rate": 3e-4}
    assert parse(own, "--learning_rate=2e-4").assistant_learning_rate == 3e-4
    assert parse(held | {"decode_batch_size": 2}, "--resolution=512").decode_batch_size == 2


@pytest.mark.parametrize("recipe, reward", [
    ("sim", {}), ("di_star_in_reward_10", {"pickscore": 10}), ("di_star_out", {"pickscore": 100})])
def test_a_recipe_on_the_command_line_is_the_whole_recipe(script, parse, saved, recipe, reward):
    held = saved(recipe="diff_instruct_pp")
    assert held["reward"] == {"pickscore": 100} and held["divergence"] == "kl"
    args = parse(held, "--recipe", recipe)
    found = args.divergence, args.reward_scale, args.cfg_scale, args.cfg_mode
    assert found == script.RECIPES[recipe] and args.reward == reward


def test_a_recipe_leaves_rewards_with_scales_of_their_own(parse, saved):
    held = saved() | {"reward": {"pickscore": 100.0, "mine:build": 100.0, "aesthetic": 100.0, "clip": 3.0}}
    assert parse(held, "--recipe=sim").reward == {"aesthetic": 100, "clip": 3}
    assert parse(held, "--recipe=di_star_in_reward_1").reward == {
        "pickscore": 1, "mine:build": 1, "aesthetic": 100, "clip": 3}


def test_a_scale_of_the_command_line_is_that_of_the_rewards_without_their_own(parse, saved):
    held = saved() | {"reward": {"pickscore": 100.0, "clip": 3.0}}
    assert parse(held, "--reward_scale", "5").reward == {"pickscore": 5, "clip": 3}
    assert parse(held, "--reward_scale=0").reward == {"clip": 3}
    assert parse(held, "--recipe=sim", "--reward_scale=7").reward == {"pickscore": 7, "clip": 3}
    assert parse(held, "--cfg_scale=3").reward == {"pickscore": 100, "clip": 3}


def test_a_recipe_forgets_the_dpo_reference_of_another(script, parse, saved):
    held = saved(recipe="di_star_dpo")
    assert held["reference_unet"] and parse(held, "--recipe=di_star_in").reference_unet is None


@pytest.mark.parametrize("content, line", [
    ("learning_rates: 1", "run.yaml: learning_rates is no flag of this script; did you mean learning_rate?"),
    ("learning_rate: fast", "argument --learning_rate: invalid float value: 'fast'"),
    ("learning_rate: [1, 2]", "learning_rate: it takes one value, not a list"),
    ("use_ema: maybe", "use_ema: maybe is neither true nor false"),
    ("reward: {pickscore: {scale: 1}}", "reward: "), ("- a", "it is not a mapping from flags to values"),
    ("a: [", "run.yaml cannot be read"), ("", "it is not a mapping from flags to values")])
def test_a_file_that_is_wrong_is_refused_by_name(parse, capsys, content, line):
    with pytest.raises(SystemExit) as ending:
        parse(content, "--prompts_file=p.txt")
    error = capsys.readouterr().err
    assert ending.value.code == 2 and error.count("\n") == 1 and line in error


def test_a_file_that_is_missing_is_refused(script, capsys):
    for words in (["--config", "nowhere.yaml"], ["--config"]):
        with pytest.raises(SystemExit):
            script.parse_args(script.FAMILY, [*words])
        assert "--config" in capsys.readouterr().err
