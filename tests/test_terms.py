"""Terms and observers: those of the user's own, and what the extras of utils/ declare."""

import json
import re

import pytest
import torch
from conftest import REPOSITORY, assert_same, generator_gradient, metrics, set_method
from safetensors.torch import load_file


PAGE = (REPOSITORY / "docs" / "method.md").read_text()
EXAMPLE = re.search(r"```python\n# my_term.py\n(.*?)```", PAGE, re.DOTALL)[1]
STATEFUL = """
class Counting:
    name = "counting"
    def __init__(self, weight, args, models):
        self.weight, self.seen, self.updates = weight, torch.zeros(2), 0
    def gradient(self, batch, predictions, predict):
        other = predict(HELD["models"].reference, predictions.x_t.detach(), batch.timesteps * 0 + 500)
        other = other.detach()
        return self.weight * (1 + self.seen[0]) * (predictions.x0 - other), {}
    def after_update(self, run):
        self.seen = self.seen + torch.tensor([0.5, 1.0])
        self.updates += 1
    def state_dict(self):
        return {"seen": self.seen, "updates": self.updates}
    def load_state_dict(self, state):
        self.seen, self.updates = state["seen"], state["updates"]

HELD = {}

def build(scale, args, models):
    HELD["models"] = models
    HELD["term"] = Counting(scale, args, models)
    return HELD["term"]

class Balance:
    def __init__(self, args, models):
        self.calls = 0
    def observe(self, run, metrics):
        self.calls += 1
        if "grad_counting" in metrics and "grad_divergence" in metrics:
            run.terms["counting"].scale *= 0.9
    def state_dict(self):
        return {"calls": self.calls}
    def load_state_dict(self, state):
        self.calls = state["calls"]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the working directory; returns its name, which no other test has."""
    def write(content):
        name = "own_" + "".join(letter if letter.isalnum() else "_" for letter in tmp_path.name)
        (tmp_path / f"{name}.py").write_text("import torch\n\n" + content)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        return name
    return write


def test_the_example_of_the_page_adds_its_gradient(script, prepare, module):
    name = module(EXAMPLE)
    prepared = prepare(recipe="sim", term=f"{name}:build=0.25")
    found = generator_gradient(script, prepared)
    (term,) = [term for term in prepared.terms if term.name == "color_cast"]
    prepared.terms.remove(term)
    without = generator_gradient(script, prepared)
    batch, models = prepared.batch, prepared.models
    conditioning, _ = script.encode(models, batch.prompts, null=False)
    x0 = script.generate(models.generator, script.FAMILY, models.process, batch.z, [999], conditioning)
    a, s = models.process.coefficients(batch.timesteps)
    x_t = (a * x0 + s * batch.noise).detach()
    d_reference = script.predict(models.reference, script.FAMILY, models.process, x_t, batch.timesteps,
                                 conditioning)
    drift = (x0 - d_reference).mean((2, 3))
    (drift.square().sum() * 64 * 0.25 / 2 / len(x0)).backward()  # of 8 x 8 entries, the reference held fixed
    expected = torch.cat([p.grad.flatten() for p in script.trainable_parameters(models.generator).values()])
    assert (found - without - expected).norm() < 1e-3 * expected.norm() and expected.norm() > 0


def test_the_example_of_the_page_trains_and_its_observer_ends_the_run(train, module, tmp_path, capfd):
    name = module(EXAMPLE.replace("self.limit = 10", "self.limit = -1"))
    out = train(tmp_path / "run", term=f"{name}:build=0.1")
    assert all(line["grad_color_cast"] > 0 and line["drift"] > 0 for line in metrics(out))
    assert f"0.1 x {name}:build" in (out / "README.md").read_text().replace("\n", " ")
    with pytest.raises(SystemExit):
        train(tmp_path / "ended", term=f"{name}:build=0.1", observer=f"{name}:DriftAlarm", max_train_steps=3)
    assert "the latents drift in colour; step 1 is saved" in capfd.readouterr().err
    assert (tmp_path / "ended" / "checkpoint-1" / "state.json").exists()


def test_an_observer_may_end_a_run_at_its_first_validation(train, module, tmp_path, capfd):
    name = module("class Alarm:\n    def __init__(self, args, models):\n        pass\n"
                  "    def observe(self, run, metrics):\n        return 'seen enough'\n")
    more = {"observer": f"{name}:Alarm", "validation_prompts": ["a cat"]}
    with pytest.raises(SystemExit):
        train(tmp_path / "run", **more)
    assert "seen enough; step 0 is saved" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoint-0" / "state.json").exists()


@pytest.mark.slow
def test_the_state_of_a_term_and_the_scale_that_an_observer_set_are_resumed(train, module, tmp_path):
    name = module(STATEFUL)
    more = {"term": f"{name}:build=0.01", "observer": f"{name}:Balance", "checkpointing_steps": 2}
    whole = train(tmp_path / "whole", **more, max_train_steps=4)
    train(tmp_path / "cut", **more, max_train_steps=2)
    cut = train(tmp_path / "cut", **more, max_train_steps=4, resume_from_checkpoint="latest")
    saved = [torch.load(out / "checkpoint-4" / "trainer.pt", weights_only=True) for out in (whole, cut)]
    assert_same(*saved)
    assert saved[0]["terms"]["counting"]["updates"] == 4
    assert saved[0]["scales"]["counting"] == pytest.approx(0.9**4)
    assert metrics(whole) == metrics(cut)


@pytest.mark.parametrize("more, words", [
    ({"term": "absent_module:build"}, "--term absent_module:build: No module named"),
    ({"observer": "json:absent"}, "--observer json:absent"),
    ({"term": "{own}:build=0"}, "--term"), ({"term": "{own}:build=much"}, "--term")])
def test_what_is_no_term_is_refused_before_a_model_loads(script, flags, module, tmp_path, monkeypatch, capsys,
                                                         more, words):
    name = module(EXAMPLE)
    given = {key: value.format(own=name) for key, value in more.items()}
    monkeypatch.setattr(script, "load_models", None)
    with pytest.raises(SystemExit) as ending:
        script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(tmp_path / "run", **given)))
    (line,) = capsys.readouterr().err.splitlines()
    assert ending.value.code == 2 and words in line


GRADIENT = """
class Own:
    name = "own"
    def gradient(self, batch, predictions, predict):
        x0 = predictions.x0
        return RETURNED
def build(scale, args, models):
    return Own()
"""


@pytest.mark.parametrize("returned, words", [
    ("x0[:1], {}", "its gradient is a Tensor of shape (1, 4, 8, 8), not a tensor of (4, 4, 8, 8)"),
    ("x0.mean(), {}", "its gradient is a Tensor of shape ()"),
    ("0, {}", "its gradient is a int of shape ()"), ("x0", "returned a Tensor, not a gradient and a dict"),
    ("None", "returned a NoneType, not"), ("(x0, None)", "returned a tuple, not"),
    ("x0, {'size': x0.mean()}", "its log size is a Tensor of shape (), not a tensor of (4,)")])
def test_what_a_term_returns_wrongly_is_named(train, module, tmp_path, capfd, returned, words):
    name = module(GRADIENT.replace("RETURNED", returned))
    with pytest.raises(SystemExit):
        train(tmp_path / "run", term=f"{name}:build")
    assert f"--term {name}:build" in (line := capfd.readouterr().err.splitlines()[-1]) and words in line


@pytest.mark.parametrize("flag, body, words", [
    ("term", "class Own:\n    name = 'own'\n", "without the method `gradient`"),
    ("term", "class Own:\n    def gradient(self, *given):\n        pass\n", "the term has no `name`"),
    ("term", "def Own():\n    pass\n", "returned a NoneType without the method"),
    ("observer", "class Own:\n    pass\n", "without the method `observe`"),
    ("observer", "class Own:\n    def observe(self, run, metrics):\n        pass\n"
                 "    def state_dict(self):\n        return {'device': torch.Generator()}\n",
     "state_dict holds")])
def test_what_is_no_term_or_observer_is_refused_before_the_first_step(train, module, tmp_path, capfd, flag,
                                                                      body, words):
    name = module(body + "def build(*given):\n    return Own()\n")
    with pytest.raises(SystemExit):
        train(tmp_path / "run", **{flag: f"{name}:build"})
    assert f"--{flag} {name}:build" in (line := capfd.readouterr().err.splitlines()[-1]) and words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["divergence", "reward"])
def test_two_terms_of_one_name_are_refused(train, module, tmp_path, capfd, name):
    own = module(EXAMPLE.replace("color_cast", name))
    with pytest.raises(SystemExit):
        train(tmp_path / "run", term=f"{own}:build")
    assert f"more than one term has the name {name}" in capfd.readouterr().err.splitlines()[-1]


def test_another_term_is_another_run(train, module, tmp_path, capfd):
    name = module(EXAMPLE)
    out = train(tmp_path / "run", term=f"{name}:build=0.1", max_train_steps=1)
    for more in ({"term": f"{name}:build=0.2"}, {}):
        with pytest.raises(SystemExit):
            train(out, resume_from_checkpoint="latest", **more)
        assert "--term is" in capfd.readouterr().err.splitlines()[-1]
    train(out, resume_from_checkpoint="latest", term=f"{name}:build=0.1")


def test_a_dry_run_says_that_it_does_not_count_the_term(train, module, tmp_path, capsys):
    name = module(EXAMPLE)
    train(tmp_path / "run", term=f"{name}:build=0.1", dry_run=True)
    assert f"not counted: {name}:build" in capsys.readouterr().out


@pytest.mark.parametrize("graphs", [1, 2])
def test_terms_share_one_graph_which_the_last_of_them_drops(script, prepare, graphs):
    """A second term that differentiates the predictions finds their graph whole; after it they have none."""
    prepared, seen = prepare(recipe="sim"), []

    class Second(script.Term):
        name, needs_graph = "second", True

        def gradient(self, batch, predictions, predict):
            pulled = predictions.pull_back(predictions.assistant, torch.ones_like(predictions.x0))
            return predictions.a * pulled, {}

    class Last(script.Term):
        name = "last"

        def gradient(self, batch, predictions, predict):
            seen.append([value.requires_grad for value in (predictions.assistant, predictions.reference)])
            return torch.zeros_like(predictions.x0), {}
    prepared.terms += [Second()] * (graphs - 1) + [Last()]
    logs = script.generator_step(prepared.models, prepared.batch, prepared.terms, prepared.method,
                                 prepared.accelerator)
    assert seen == [[False, False]] and ("grad_second" in logs) == (graphs == 2)


def test_a_gradient_with_a_graph_trains_the_generator_alone(script, prepare):
    prepared = prepare(recipe="sim")

    class Attached(script.Term):
        name = "attached"

        def gradient(self, batch, predictions, predict):
            other = predict(prepared.models.assistant, predictions.x_t.detach(), batch.timesteps)
            return predictions.x0 - (other.detach() if self.detaches else other), {}
    found = []
    for detaches in (True, False):
        term = Attached()
        term.detaches = detaches
        prepared.terms = [script.Divergence(prepared.method), term]
        found.append(generator_gradient(script, prepared))
        assert all(parameter.grad is None for parameter in prepared.models.assistant.parameters())
    assert torch.equal(*found) and found[0].norm() > 0


def test_only_terms_that_act_at_this_step_are_asked(script, prepare):
    prepared = prepare(recipe="sim", generator_timesteps=[999, 499])

    class Last(script.Term):
        name, last_step_only = "last", True

        def gradient(self, batch, predictions, predict):
            return torch.ones_like(predictions.x0), {}
    prepared.terms.append(Last())
    for steps in (1, 2):
        noise = script.sample_noise(0, "generator", 0, range(4), (4, 8, 8), prepared.method,
                                    prepared.models.process, "cpu", steps)
        batch = script.Batch(*noise, prepared.batch.prompts)
        logs = script.generator_step(prepared.models, batch, prepared.terms, prepared.method,
                                     prepared.accelerator)
        assert ("grad_last" in logs) == (steps == 2)


def test_the_scale_of_a_term_multiplies_its_gradient(script, prepare):
    prepared = prepare(recipe="di_star_in")
    whole = generator_gradient(script, prepared)
    parts = []
    for kept in ("divergence", "reward"):
        for term in prepared.terms:
            term.scale = float(term.name == kept)
        parts.append(generator_gradient(script, prepared))
    assert (parts[0] + parts[1] - whole).norm() < 1e-5 * whole.norm()
    assert min(part.norm() for part in parts) > 0
    set_method(script, prepared)
    assert [term.scale for term in prepared.terms] == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------- extras


def test_the_script_lists_the_flags_that_its_extras_declare(script):
    for name, listed in script.EXTRAS.items():
        flags = script.read_flags(name).items()
        switches = {flag: settings.get("action") != "store_true" and None for flag, settings in flags}
        assert {flag: settings.get("default", switches[flag]) for flag, settings in flags} == listed, name


def test_an_extra_is_one_module_for_all_flags_that_ask_for_it(script):
    assert script.load_extra("lora", "--shared_base") is script.load_extra("lora", "--generator_lora_rank")


def test_a_run_moves_between_a_checkout_and_a_lone_script(script, flags, train, tmp_path, monkeypatch):
    out = train(tmp_path / "run", max_train_steps=1)
    saved = out / "checkpoint-1" / "state.json"
    for file in (tmp_path / "alone.py", script.__file__):  # whether the extras lie beside it
        monkeypatch.setattr(script, "__file__", str(file))
        script.read_flags.cache_clear()
        args = script.parse_args(script.FAMILY, flags(out, resume_from_checkpoint="latest"))
        assert args.state["step"] == 1
        saved.write_text(json.dumps(json.loads(saved.read_text()) | {"args": script.saved_args(args)}))


def declared(script):
    return {name: settings for flags in script.declared_flags(script.FAMILY).values()
            for name, settings in flags.items()}


def test_a_flag_without_the_flag_that_it_needs_is_refused(script, flags, tmp_path, capsys):
    values = {"validation_reward": "clip=1", "preference_scale": 2, "min_diversity": 0.5, "lora_alpha": 4,
              "lora_layers": "to_k", "shared_base": True}
    assert {name for name, settings in declared(script).items() if "needs" in settings} == values.keys()
    for name, value in values.items():
        with pytest.raises(SystemExit):
            script.parse_args(script.FAMILY, flags(tmp_path / "run", **{name: value}))
        needed = declared(script)[name]["needs"].split("/")
        assert f"--{name} needs --{' or --'.join(needed)}" in capsys.readouterr().err


def test_the_help_names_each_flag_once_and_states_each_default(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        script.parse_args(script.FAMILY, ["--help"])
    text = capsys.readouterr().out
    for name, settings in declared(script).items():
        entry = re.search(rf"^  --{name}\b.*?(?=^  -|\n\n|\Z)", text, re.DOTALL | re.MULTILINE)[0]
        assert entry.split("\n")[0].count(f"--{name} ") <= 1 and f"--{name}, --{name}" not in entry
        default = script.FAMILY.defaults.get(name, settings.get("default"))
        if default not in (None, []):
            words = " ".join(map(str, default)) if isinstance(default, list) else default
            source = "the start's own, else " * (name in script.LOOKED_UP)
            assert f"(default: {source}{words})" in " ".join(entry.split()), name
    assert "(default: 0)" in text


@pytest.mark.parametrize("given, expected", [
    ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [0.5, 1.0, 0.5, 0.0]),
    ({"lr_scheduler": "polynomial", "lr_power": 2}, [9 / 16, 4 / 16, 1 / 16, 0])])
def test_schedules_follow_their_cycles_and_power(train, tmp_path, given, expected):
    """The rate after each of four updates; a polynomial schedule ends at 1e-7."""
    out = train(tmp_path / "run", **given, max_train_steps=4)
    rates = [line["lr_generator"] / 1e-3 for line in metrics(out)]
    assert rates == pytest.approx(expected, abs=2e-4)


def test_the_tracker_gets_the_project_name(script, train, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script.Accelerator, "init_trackers", lambda self, name, *_: seen.append(name))
    train(tmp_path / "run", tracker_project_name="lighthouses", max_train_steps=1)
    assert seen == ["lighthouses"]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["tracker_project_name"] == "lighthouses"
    assert load_file(tmp_path / "run" / "checkpoint-1" / "generator.safetensors")
