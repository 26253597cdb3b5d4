"""Shared code of the evaluation's and the examples' command lines; a training script carries its own."""

import argparse
import contextlib
import difflib
import errno
import inspect
import json
import logging
import math
import os
import re
import sys
import warnings


# LCMScheduler warns at every call that the first step is not its last timestep, which is intended here.
logging.getLogger("diffusers.schedulers.scheduling_lcm").addFilter(
    lambda record: "timestep schedule" not in record.getMessage())
warnings.filterwarnings("ignore", message=".*torch_dtype")  # newer releases renamed this argument of loaders


def exit_with_error(message):
    """Print a one-line error to standard error (hub tokens redacted) and exit with status 2."""
    bars = list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ()))
    for bar in bars:
        bar.close()
    line = "error: " + re.sub(r"\bhf_\w{6,}", "hf_...", " ".join(message.split()))
    print("\n" * bool(bars) + line, file=sys.stderr)
    raise SystemExit(2)


def is_disk_full(error):
    """Whether an exception is that of a full disk, which each library words in its way."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(re.search(
        r"No space left|os error 28\b|quota exceeded|PytorchStreamWriter", str(error)))


@contextlib.contextmanager
def exit_on_error(subject, remedy=""):
    """Turn any exception inside into a one-line error: `subject` (a flag or file), its message, `remedy`."""
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        if "weights_only" in words:  # torch's own words advise to switch it off
            words = "it holds more than tensors, and is not read because such a file can run code"
        if is_disk_full(error):
            words = "disk full"
        exit_with_error(f"{subject}: {words[:300]}" + (f"; {remedy}" if remedy else ""))


def number(kind, accepts, description):
    """Make an argparse type for numbers of the given kind, int or float, that `accepts` returns true for."""
    def parse(text):
        if not accepts(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return value
    parse.__name__ = kind.__name__  # argparse names it where the text is not a number
    return parse


positive_int = number(int, lambda value: value > 0, "a whole number above 0")
non_negative_int = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1")
non_negative_float = number(float, lambda value: 0 <= value < math.inf, "a finite number of at least 0")


def timestep(text):
    """Parse a timestep: a whole number, or 1000 sigma for flow matching, which may have a fraction."""
    value = non_negative_float(text)
    return int(value) if value.is_integer() else value


timestep.__name__ = "float"


def quiet_libraries():
    """Silence warnings and bars of diffusers and transformers: the programs say what matters themselves."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def load_pipeline(name_or_path, **settings):
    """Load a diffusers pipeline from a folder or the hub, even if a component is absent (SD3 without T5)."""
    from diffusers import DiffusionPipeline

    config = DiffusionPipeline.load_config(name_or_path, revision=settings.get("revision"))
    absent = {name: None for name, part in config.items() if isinstance(part, list) and part[0] is None}
    return DiffusionPipeline.from_pretrained(name_or_path, **absent, **settings)


def is_denoiser(kind):
    """Whether a class is a denoiser of diffusers: a model that is neither an autoencoder nor a ControlNet."""
    from diffusers import ModelMixin

    return (isinstance(kind, type) and issubclass(kind, ModelMixin) and not hasattr(kind, "decode")
            and "ControlNet" not in kind.__name__)


def network_of(pipeline):
    """Return (component name, network) of a pipeline's denoiser, its UNet or transformer."""
    for name, part in pipeline.components.items():
        if is_denoiser(type(part)):
            return name, part
    exit_with_error(f"{type(pipeline).__name__} has neither a UNet nor a transformer")


def network_name(index):
    """Return the component name of the denoiser in the content of a model_index.json; None if unknown."""
    import diffusers

    return next((name for name, part in index.items() if isinstance(part, (list, tuple))
                 and is_denoiser(getattr(diffusers, part[1] or "", None))), None)


def steps_at(pipeline, timesteps):
    """Return the call arguments that make a pipeline step at `timesteps`: {timesteps}, or {sigmas} of a flow.

    PixArt's pipeline would snap the size to its own list of resolutions; the arguments turn that off.
    """
    taken = inspect.signature(pipeline.__call__).parameters
    plain = {"use_resolution_binning": False} if "use_resolution_binning" in taken else {}
    if "timesteps" in taken:
        return {"timesteps": timesteps, **plain}
    return {"sigmas": [timestep / 1000 for timestep in timesteps], **plain}


def write_atomically(path, content):
    """Write bytes or text through a temporary file: a killed run or a full disk leaves no half of it."""
    aside = path.with_name(path.name + ".unfinished")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk's error names no file
        raise


def write_json_atomically(path, content):
    """Write a JSON file as `write_atomically` does."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show every default except None and the False of a switch."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parse flags without abbreviations, show the defaults in the help, and report errors in one line."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": Formatter, "allow_abbrev": False} | settings)

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        for name, value in vars(found).items():
            values = value if isinstance(value, list) else [value]
            if any(isinstance(text, str) and not text.strip() for text in values):
                exit_with_error(f"--{name} is empty; was a variable of the shell not set?")
            if any(re.search("[\ud800-\udfff]", str(text)) for text in values):
                exit_with_error(f"--{name} is not UTF-8")
        return found

    def _get_values(self, action, given):
        # A shell leaves the ~ of --flag=~/folder as it is.
        return super()._get_values(action, [*map(os.path.expanduser, given)])

    def error(self, message):
        unknown = re.findall(r"--\w+", message)[:1] if message.startswith("unrecognized") else []
        near = [f"did you mean {match}? " for name in unknown
                for match in difflib.get_close_matches(name, self._option_string_actions, 1)]
        exit_with_error(f"{message}; {''.join(near)}see --help")
