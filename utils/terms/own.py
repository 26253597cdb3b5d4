"""The user's own terms and observers, from installed modules or files in the working directory."""

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


def completed(part, contract):
    """An object of any class, which inherits from the contract what it lacks."""
    if not isinstance(part, contract):
        part.__class__ = type(type(part).__name__, (type(part), contract), {})
    return part


def build(args, models, script):
    """(terms, {flag: observer}); exits if a factory fails or two terms have the same name."""
    terms, observers = [], {}
    for flag, scale, factory in factories(args, script):
        with script.exit_on_error(flag):
            if scale:
                terms.append(completed(factory(scale[0] or 1.0, args, models), script.Term))
            else:
                observers[flag] = completed(factory(args, models), script.Observer)
    names = [term.name for term in terms]
    if repeated := {name for name in names if names.count(name) > 1 or name in TAKEN}:
        script.exit_with_error(f"--term: more than one term has the name {', '.join(sorted(repeated))}")
    return terms, observers


def card_lines(args, shown):
    """The terms that the model card lists."""
    return [f"{scale or 1:g} x {name}" for name, scale in args.term]
