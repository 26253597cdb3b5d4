"""Flags from a file: the extra of `--config`."""

import difflib
import os

import yaml


FLAGS = {
    "config": {
        "help": "YAML file with one `name: value` per flag, or the args.json of an earlier run. The command"
                " line wins, and a --recipe on it resets the flags that recipes set."},
}
ALTERNATIVES = (("prompts_file", "dataset_name"), ("validation_prompts", "validation_prompts_file"))
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def expand(argv, parser, script):
    """The words of the command line, and before them those of the file that --config names.

    All values of the file are text until the parser reads them, so that `no` and `5e-7` are what they are on
    a command line. Exits if the file cannot be read or names an unknown flag.
    """
    words, actions = [str(word).partition("=") for word in argv], parser._option_string_actions
    given = {actions[name].dest: value or " ".join(argv[place:place + 1])
             for place, (name, _, value) in enumerate(words, 1) if name in actions}
    flag = f"--config {given['config']}"
    with script.exit_on_error(f"{flag} cannot be read", "give a YAML file of flags, or an args.json"):
        with open(os.path.expanduser(given["config"]), encoding="utf-8-sig") as file:
            content = yaml.load(file, yaml.BaseLoader)
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping from flags to values")
        for name, value in content.items():
            if isinstance(value, dict):  # rewards with their scales
                content[name] = [f"{key}={scale}" for key, scale in value.items()]
        content = without_derived({name.removeprefix("--"): value for name, value in content.items()}, script)
    if {"recipe", "reward_scale"} & {*given}:
        with script.exit_on_error(f"{flag} beside --recipe or --reward_scale"):
            content = with_recipe(content, given, script)
    expanded, others = [], {other for pair in ALTERNATIVES if {*pair} & {*given} for other in pair}
    for name, value in content.items():
        action = actions.get(f"--{name}")
        if action is None:
            near = difflib.get_close_matches(f"--{name}", actions, 1)
            script.exit_with_error(f"{flag}: {name} is no flag of this script" + (
                f"; did you mean {near[0][2:]}?" if near else ""))
        if action.dest not in given and action.dest not in others:
            with script.exit_on_error(f"{flag}: {name}"):
                expanded += words_of(f"--{name}", value, action)
    return expanded + [*argv]


def words_of(name, value, action):
    """The words that give a flag its value; ValueError if the flag takes no such value."""
    if action.nargs == 0:
        if str(value).lower() not in SWITCHES:
            raise ValueError(f"{value} is neither true nor false")
        return [name] * SWITCHES[value.lower()]
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in listed):
        raise ValueError("its value is too deeply nested")
    if action.nargs in ("+", "*"):
        return [name, *listed] if listed else []
    if isinstance(value, list) and action.default != [] and action.dest != "reward":
        raise ValueError("it takes one value, not a list")
    return [f"{name}={one}" for one in listed]


def without_derived(content, script):
    """Flags without empty ones, and of an args.json without what a run derives from the other flags."""
    content = {name: value for name, value in content.items()
               if value not in ("null", "~", "") and name != script.SAMPLES}
    if content.get("assistant_learning_rate") == content.get("learning_rate"):
        content.pop("assistant_learning_rate", None)
    if {"decode_batch_size", "resolution"} <= {*content}:
        at_once = max(1, script.DECODED_PIXELS // int(content["resolution"])**2)
        if int(content["decode_batch_size"]) == at_once:
            del content["decode_batch_size"]
    if "validation_prompts_file" in content:
        content.pop("validation_prompts", None)
    return content


def with_recipe(content, given, script):
    """Apply the --recipe or --reward_scale of the command line, `given`, to the flags of the file.

    A recipe drops the flags that recipes set. A reward whose scale is that of the file's --reward_scale gets
    the new one, or goes if that is 0.
    """
    recipes = [script.RECIPES.get(name, script.RECIPES["di_star_in"])[1]  # di_star_dpo's is the same
               for name in (content.get("recipe"), given.get("recipe"))]
    old = float(content.get("reward_scale", recipes[0]))
    new = float(given.get("reward_scale", recipes[1] if "recipe" in given else old))
    rewards, kept = content.get("reward", []), []
    for reward in [rewards] if isinstance(rewards, str) else rewards:
        name, scale = script.name_and_scale(reward)
        if script.short_name(name) in script.REWARDS[1:] or scale not in (None, old):
            kept.append(reward)
        elif new:
            kept.append(name)
    reset = (*script.RECIPE_FLAGS, "recipe") if "recipe" in given else ("reward_scale",)
    return {name: value for name, value in content.items() if name not in reset} | {"reward": kept}
