"""Alarms that end a run whose reward is being hacked: the extra of --min_diversity."""

FLAGS = {
    "min_diversity": {"type": "fraction", "resumable": True,
        "needs": "validation_prompts/validation_prompts_file",
        "help": "Save and end the run if the diversity of the validation images falls below this fraction of"
                " its start: the sign of a hacked reward."},
}


class DiversityAlarm:
    """An observer; `script.Observer` supplies the rest of its contract."""

    def __init__(self, least):
        self.least, self.first = least, {}

    def observe(self, run, metrics):
        """The reason to end the run, or None."""
        found = {name: value for name, value in metrics.items() if name.startswith("validation_diversity_")}
        self.first = self.first or found
        for name, value in found.items():
            first = self.first[name]
            kept = value / first if first else 1
            if not kept >= self.least:  # NaN, too
                return (f"{name} is {kept:.0%} of its start, below --min_diversity {self.least:g}: start anew"
                        " with a smaller scale, or export an earlier step with examples/export.py")
        return None

    def state_dict(self):
        return {"first": self.first}

    def load_state_dict(self, state):
        self.first = state["first"]


def state_of(args):
    """The state.json of the checkpoint that a run resumes from; {} for a new run and a dry run."""
    return getattr(args, "state", {})


def check(args, script):
    """ValueError if there is no diversity to watch, or if a resumed run would measure a different one."""
    if args.num_validation_images * len(args.validation_prompts) < 2:
        raise ValueError("needs more than one image of --validation_prompts")
    if state := state_of(args):
        for name in ("validation_prompts", "num_validation_images"):
            if getattr(args, name) != (held := state["args"].get(name)):
                raise ValueError(f"--{name} is {getattr(args, name)}, but {args.resume_from_checkpoint} was"
                                 f" made with {held}; resume with the same flags")


def build(args, models, script):
    """(no terms, {name: the observer})."""
    class Observer(DiversityAlarm, script.Observer):
        pass
    observer = Observer(args.min_diversity)
    observer.first = state_of(args).get("first_diversity", {})  # from older checkpoints
    return [], {"min_diversity": observer}


def card_lines(args, shown):
    """The terms that the model card lists: none."""
    return []
