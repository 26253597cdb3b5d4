"""What the command lines of the evaluation and the examples share; the training scripts have their own."""

import argparse
import difflib
import math
import re
import sys


# Copied from train_diff_instruct_star_sd15.py
def fail(message):
    """End the run for bad input: one line on standard error without the hub's tokens, exit status 2."""
    print("error: " + re.sub(r"\bhf_\w{6,}", "hf_...", " ".join(message.split())), file=sys.stderr)
    raise SystemExit(2)


# Copied from train_diff_instruct_star_sd15.py
def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Copied from train_diff_instruct_star_sd15.py
class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}; see --help")

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        found, unknown = self.parse_known_args(words, namespace)
        for name, value in vars(found).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not text.strip():
                    fail(f"--{name} is empty; was a variable of the shell not set?")
        if not unknown:
            return found
        name = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, 1)
        if name.startswith("-"):
            fail(f"there is no {name}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        before = [word for word in words[:words.index(name)] if word.startswith("-")]
        place = f" after {before[-1]}" if before else ""
        fail(f"{name!r}{place} belongs to no flag; a switch takes no value")


# Copied from train_diff_instruct_star_sd15.py
def plain(number):
    """A number's text as it is; Python would also read 1_000, spaces, and the digits of other scripts."""
    if not re.fullmatch("[-+.0-9a-zA-Z]{1,40}", number):
        raise ValueError(number)
    return number


# Copied from train_diff_instruct_star_sd15.py
def positive(number):
    value = int(plain(number))
    if not 0 < value < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is not a whole number from 1 to 2^32 - 1")
    return value


# Copied from train_diff_instruct_star_sd15.py
def whole(number):
    value = int(plain(number))
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is not a whole number from 0 to 2^32 - 1")
    return value


# Copied from train_diff_instruct_star_sd15.py
def non_negative(number):
    value = float(plain(number))
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{number} is not a finite number of at least 0")
    return value


# Copied from train_diff_instruct_star_sd15.py
def token(text):
    if not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError("a token has neither spaces nor line breaks")
    return text
