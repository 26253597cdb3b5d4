"""What the command lines of the evaluation and the examples share; a training script has its own."""

import argparse
import contextlib
import inspect
import json
import logging
import math
import re
import sys
import warnings


# LCMScheduler remarks at every call that a step does not begin at its last timestep, which is what we mean.
logging.getLogger("diffusers.schedulers.scheduling_lcm").addFilter(
    lambda record: "timestep schedule" not in record.getMessage())
warnings.filterwarnings("ignore", message=".*torch_dtype")  # newer releases call the loaders' flag otherwise


def fail(message):
    """End the run for bad input: one line on standard error without the hub's tokens, exit status 2."""
    bars = list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ()))
    for bar in bars:
        bar.close()
    line = "error: " + re.sub(r"\bhf_\w{6,}", "hf_...", " ".join(message.split()))
    print("\n" * bool(bars) + line, file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def blame(what, remedy=""):
    """End the run with one line where a library raises: `what`, a flag or file, and then its own words."""
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        fail(f"{what}: {words[:300]}" + (f"; {remedy}" if remedy else ""))


def number(kind, accepts, description):
    """An argparse type: a number of a kind, int or float, that is accepted."""
    def parse(text):
        if not accepts(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return value
    parse.__name__ = kind.__name__  # by which argparse calls what is no number
    return parse


positive_int = number(int, lambda value: value > 0, "a whole number above 0")
non_negative_int = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1")
non_negative_float = number(float, lambda value: 0 <= value < math.inf, "a finite number of at least 0")


def timestep(text):
    """A timestep of a generator: whole, or of flow matching, where it is 1000 sigma, with a fraction."""
    value = non_negative_float(text)
    return int(value) if value.is_integer() else value


timestep.__name__ = "float"


def load_pipeline(name_or_path, **settings):
    """The diffusers pipeline of a folder or hub id, also one that lacks a part, as SD3 does without T5."""
    from diffusers import DiffusionPipeline

    config = DiffusionPipeline.load_config(name_or_path, revision=settings.get("revision"))
    absent = {name: None for name, part in config.items() if isinstance(part, list) and part[0] is None}
    return DiffusionPipeline.from_pretrained(name_or_path, **absent, **settings)


def network_of(pipeline):
    """(The place of a pipeline's UNet or transformer in it, that network)."""
    for name in ("unet", "transformer", "prior", "decoder"):
        if getattr(pipeline, name, None) is not None:
            return name, getattr(pipeline, name)
    fail(f"{type(pipeline).__name__} has neither a UNet nor a transformer")


def steps_at(pipeline, timesteps):
    """The arguments of a pipeline's call for steps at these timesteps: {timesteps}, or of flow {sigmas}.

    PixArt's would also generate at the nearest of its own resolutions; it is told not to.
    """
    taken = inspect.signature(pipeline.__call__).parameters
    plain = {"use_resolution_binning": False} if "use_resolution_binning" in taken else {}
    if "timesteps" in taken:
        return {"timesteps": timesteps, **plain}
    return {"sigmas": [timestep / 1000 for timestep in timesteps], **plain}


def write_whole(path, content):
    """A JSON file, whole or not at all."""
    aside = path.with_suffix(".unfinished")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    aside.replace(path)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations whose help states the defaults; an error is one line."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": Formatter, "allow_abbrev": False} | settings)

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        for name, value in vars(found).items():
            if any(isinstance(text, str) and not text.strip() for text in (
                    value if isinstance(value, list) else [value])):
                fail(f"--{name} is empty; was a variable of the shell not set?")
        return found

    def error(self, message):
        fail(f"{message}; see --help")
