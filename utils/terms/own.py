"""The user's own terms and observers, from installed modules or files in the working directory."""

import functools
import io

import torch


FLAGS = {
    "term": {"action": "append", "default": [], "type": "name_and_scale", "metavar": "MODULE:FACTORY[=SCALE]",
        "help": "Add a term of your own to the generator's loss: FACTORY(scale, args, models) returns it."},
    "observer": {"action": "append", "default": [], "metavar": "MODULE:FACTORY",
        "help": "Let an observer of your own watch the run: FACTORY(args, models) returns it."},
}

TAKEN = ("divergence", "cfg", "preference", "reward")  # names of the built-in terms


def factories(args, script):
    """[(flag, [scale], factory)] of --term, and [(flag, [], factory)] of --observer."""
    found = []
    for name, *scale in [*args.term, *((name,) for name in args.observer)]:
        flag = f"--{'term' if scale else 'observer'} {name}"
        with script.exit_on_error(flag, "give an importable MODULE:FACTORY"):
            found.append((flag, scale, script.import_factory(name)))
    return found


def check(args, script):
    """Exit if a factory cannot be imported."""
    factories(args, script)


def completed(part, contract, method):
    """An object of any class, which inherits from the contract what it lacks.

    Raises TypeError if it lacks `method`, or if its state is nothing that a checkpoint can hold.
    """
    held = getattr(type(part), method, getattr(part, method, None))
    if not callable(held) or held is getattr(contract, method):
        raise TypeError(f"the factory returned a {type(part).__name__} without the method `{method}`")
    if not isinstance(part, contract):
        part.__class__ = type(type(part).__name__, (type(part), contract), {})
    kept = io.BytesIO()
    torch.save(part.state_dict(), kept)
    kept.seek(0)
    try:
        torch.load(kept, weights_only=True)
    except Exception as error:
        raise TypeError("its state_dict holds more than tensors and plain values") from error
    return part


def checked(flag, gradient, script, batch, predictions, predict):
    """What a term's `gradient` returns; exits if it breaks the contract, which broadcasting would hide."""
    found = gradient(batch, predictions, predict)
    x0 = predictions.x0
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        script.exit_with_error(f"{flag} returned a {type(found).__name__}, not a gradient and a dict of logs")
    for name, value, shape in [("gradient", found[0], x0.shape), *(
            (f"log {name}", value, x0.shape[:1]) for name, value in found[1].items())]:
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            script.exit_with_error(f"{flag}: its {name} is a {type(value).__name__} of shape"
                                   f" {tuple(getattr(value, 'shape', ()))}, not a tensor of {tuple(shape)}")
    return found


def build(args, models, script):
    """(terms, {flag: observer}); exits if a factory fails or two terms have the same name."""
    terms, observers = [], {}
    for flag, scale, factory in factories(args, script):
        with script.exit_on_error(flag):
            if scale:
                term = completed(factory(scale[0] or 1.0, args, models), script.Term, "gradient")
                if not isinstance(term.name, str) or not term.name:
                    raise TypeError("the term has no `name`")
                term.gradient = functools.partial(checked, flag, term.gradient, script)
                terms.append(term)
            else:
                observers[flag] = completed(factory(args, models), script.Observer, "observe")
    names = [term.name for term in terms]
    if repeated := {name for name in names if names.count(name) > 1 or name in TAKEN}:
        script.exit_with_error(f"--term: more than one term has the name {', '.join(sorted(repeated))}")
    return terms, observers


def card_lines(args, shown):
    """The terms that the model card lists."""
    return [f"{scale or 1:g} x {name}" for name, scale in args.term]
