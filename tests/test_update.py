"""What an update computes, compared with Algorithm 1 written by hand.

`ByHand` (losses and gradients) and `Optimizers` (clipping, AdamW, schedules, the average) know the flags, the
models' files and the batches, but call nothing of the script, so they cannot share its faults. Everything
runs in float64 on tiny networks of the real classes and in one process: further processes are threads whose
accelerators exchange values (`Process`).
"""

import contextlib
import dataclasses
import functools
import math
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import tiny_clip, tiny_pipeline, tiny_unet
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import CLIPTextModel, CLIPTokenizer


# ------------------------------------------------------------- the script's interface, used in this part only

Draw = namedtuple("Draw", "z noise timesteps prompts")  # z is (batch, steps, C, H, W)


class Started(Exception):
    """Raised in place of a run's first step; it carries the run."""


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def start_run(script, argv, load_models, monkeypatch, validates=True):
    """The run that `main` makes, stopped before its first step.

    `load_models(own, ...)` stands in for the script's `load_models`, which it gets as `own`.
    """
    build_terms = script.build_terms

    def build(args, models):
        with default_dtype(torch.float32):
            terms, observers = build_terms(args, models)
        for term in terms:
            for own in term.networks.values():
                own.to(next(models.reference.parameters()).dtype)
        return terms, observers

    def stop(run):
        raise Started(run)

    with monkeypatch.context() as patch:
        patch.setattr(script, "load_models", functools.partial(load_models, script.load_models))
        patch.setattr(script, "build_terms", build)
        if not validates:
            patch.setattr(script, "validate", lambda run: {})
        patch.setattr(script, "train_step", stop)
        with pytest.raises(Started) as started:
            script.main(script.FAMILY, script.parse_args(script.FAMILY, argv))
    return started.value.args[0]


def flags_of(script):
    """All flags of the script and of its extras."""
    return {flag for flags in script.declared_flags(script.FAMILY).values() for flag in flags}


def method_fields(script):
    return {field.name for field in dataclasses.fields(script.Method)}


def to_double(models):
    """Cast all networks and the forward process to float64."""
    for module in (models.reference, models.assistant, models.generator, models.text_encoders,
                   models.reward_vae, models.pipeline.vae):
        module.double()
    for name in ("process", "generator_process"):
        process = getattr(models, name)
        setattr(models, name, dataclasses.replace(process, alphas_cumprod=process.alphas_cumprod.double()))


def trained_of(script, models, name):
    """{name: parameter} of the parameters that training changes, before there is a run."""
    return script.trainable_parameters(getattr(models, name))


def parameters(run, name):
    """{name: parameter} of the parameters that a run trains, for the assistant or the generator."""
    return run.parameters[name]


def network(run, name):
    return run.terms[name].networks[name] if name == "preference" else getattr(run.models, name)


def average(run):
    """The generator's averaged weights, flat."""
    return torch.cat([value.detach().flatten() for value in run.ema.shadow_params])


def draw_of(batch):
    """One of the script's batches as a Draw."""
    return Draw(batch.z, batch.noise, batch.timesteps, list(batch.prompts))


def draws(run, name="generator", stream="generator"):
    """This process's batches for one update."""
    return [draw_of(batch) for batch in run.batches(name, stream)]


def watch_batches(run):
    """A list to which every batch drawn from now on is appended as (network, Draw)."""
    taken, batches = [], run.batches

    def watched(name, *more):
        for batch in batches(name, *more):
            taken.append((name, draw_of(batch)))
            yield batch
    run.batches = watched
    return taken


def backward(script, run, name, draw):
    """Run one network's step, with its backward, on one batch; returns its logs {name: (batch,)}."""
    batch = script.Batch(*draw)
    if name == "assistant":
        return script.assistant_step(run.models, batch, run.method, run.accelerator)
    return script.generator_step(run.models, batch, run.terms.values(), run.method, run.accelerator)


def set_scale(run, name, scale):
    """Scale a term of the generator's loss, as an observer may."""
    run.terms[name].scale = scale


def scales(run):
    return {name: term.scale for name, term in run.terms.items()}


def train_step(script, run):
    script.train_step(run)


def draw_step(script, run, monkeypatch):
    """Take a step of the run that draws its batches but computes nothing."""
    with monkeypatch.context() as patch:
        for name in ("assistant_step", "generator_step"):
            patch.setattr(script, name, lambda *_: {})
        patch.setattr(run, "update", lambda name: None)
        script.train_step(run)


def update(run, name):
    """Take one optimizer step of a network with the gradients that its parameters hold."""
    run.update(name)


def log(run, logs):
    """Record one batch's logs {name: (batch,)} for the next update."""
    run.record(logs)


def metrics(run):
    run.seconds = run.seconds or [0.0]
    return run.pop_metrics()


def skipped(run, name):
    return run.skipped[name]


def reason_to_end(run):
    """The reason to end the run after this step, or None: skipped updates or a signal."""
    return run.stop_reason()


def send_signal(run):
    """Leave the trace that a SIGTERM to this process leaves."""
    run.signals.append("SIGTERM")


def observe(run, metrics):
    """The reason to end the run that an observer gives for these metrics, or None."""
    return run.observe(metrics)


def validate(script, run):
    """Validate; returns the metrics."""
    return script.validate(run)


def export(script, run):
    script.export(run)


def save(run):
    run.save()


class Process:
    """The accelerator that one of several processes would have.

    `meet(rank, value)` returns the values of all processes; without it the others are not there.
    """

    def __init__(self, accelerator, rank, count, meet=None):
        self.accelerator, self.process_index, self.num_processes = accelerator, rank, count
        self.is_main_process = self.is_local_main_process = rank == 0
        self.meet = meet or (lambda rank, value: [value])

    def __getattr__(self, name):
        return getattr(self.accelerator, name)

    def reduce(self, tensor, reduction="sum", scale=1.0):
        values = torch.stack(self.meet(self.process_index, tensor)).double()
        return scale * (values.mean(0) if reduction == "mean" else values.sum(0))

    def gather(self, value):
        return torch.cat([one.reshape(-1, *one.shape[1:]) for one in self.meet(self.process_index, value)])


class IdleTerm:
    """A term that asks for the null prediction, adds nothing, and counts the updates that it is told of."""

    name, needs_null = "idle", True

    def __init__(self):
        self.told = 0

    def gradient(self, batch, predictions, predict):
        assert predictions.null.shape == predictions.x0.shape
        return torch.zeros_like(predictions.x0), {}

    def after_update(self, run):
        self.told += 1


def build_idle_term(scale, args, models):
    return IdleTerm()


# ------------------------------------------------------------------------------------- by hand: the flags

# Everything that an update depends on, always given on the command line, with values that make a difference.
SETTINGS = {
    "divergence": "score", "score_gradient": "full", "distance": "pseudo_huber", "pseudo_huber_c": 20.0,
    "weighting": "clean", "cfg_mode": "in", "cfg_scale": 3.0, "preference_scale": 0.7,
    "generator_timesteps": [399], "generator_prediction_type": None, "reward_steps": "last",
    "min_timestep": 20, "max_timestep": 979,
    "timestep_sampling": "uniform", "logit_mean": 0.0, "logit_std": 1.0,
    "reward": "test_update:build_reward", "reward_scale": 200.0,
    "learning_rate": 2e-3, "assistant_learning_rate": 5e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 1,
    "max_train_steps": 6, "lr_num_cycles": 1, "lr_power": 1.0, "adam_beta1": 0.3, "adam_beta2": 0.9,
    "adam_epsilon": 1e-3, "adam_weight_decay": 0.1, "max_grad_norm": 2.0, "use_ema": True, "ema_decay": 0.22,
    "assistant_updates": 2, "gradient_accumulation_steps": 2, "train_batch_size": 2, "seed": 3,
    "resolution": 16, "decode_batch_size": 2, "mixed_precision": "no", "logging_steps": 1}
THREE = [399, 250, 100]  # timesteps of a three-step generator
# {flag: another flag, without which it is refused}
NEEDS = {"preference_scale": "preference_unet", "ema_decay": "use_ema"}


def command_line(disk, output_dir, changes):
    """The settings of a run with these changes of SETTINGS, and its command line."""
    given = {"pretrained_model_name_or_path": disk / "epsilon", "generator_init": disk / "unet",
             "preference_unet": None, "prompts_file": disk / "prompts.txt",
             "output_dir": output_dir, **SETTINGS, **changes}
    argv = []
    for name, value in given.items():
        if value is not None and value is not False and (name not in NEEDS or given[NEEDS[name]]):
            argv += [f"--{name}", *([] if value is True else map(
                str, value if isinstance(value, list) else [value]))]
    return given, argv


# ---------------------------------------------------------------------------------- by hand: the algorithm


def build_reward():
    """A reward of the image that depends on the number in the prompt, and refuses values outside [0, 1]."""
    def reward(images, prompts):
        assert images.min() >= 0 and images.max() <= 1
        factor = torch.tensor([(1 + int(prompt.split()[-1])) / 5 for prompt in prompts])
        return factor.to(images) * (images[:, 0] ** 2 + images[:, 1] * images[:, 2]).mean((1, 2))
    return reward


@functools.cache
def frozen(kind, folder):
    if issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(folder).double().requires_grad_(False).eval()
    return kind.from_pretrained(folder)


def flat(values):
    """The tensors of a dict as one vector."""
    return torch.cat([value.detach().flatten() for value in values.values()])


class Network:
    """A folder's UNet with trained weights: all of them, or those of a LoRA, which is multiplied out."""

    def __init__(self, folder, trained=None, alpha=None):
        self.unet, self.alpha = frozen(UNet2DConditionModel, folder), alpha
        self.leaves = {name: value.detach().clone().requires_grad_()
                       for name, value in (trained or {}).items()}

    def set(self, vector):
        sizes = [value.numel() for value in self.leaves.values()]
        for value, part in zip(self.leaves.values(), vector.split(sizes)):
            value.data = part.view_as(value).clone()

    def to_double(self):
        for value in self.leaves.values():
            value.data = value.data.double()

    def weights(self):
        held, weights = dict(self.unet.named_parameters()), {}
        for name, value in self.leaves.items():
            if ".lora_A." not in name:
                weights[name] = value
                continue
            down, up = value, self.leaves[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix("base.").partition(".lora_A.")[0] + ".weight"
            product = torch.einsum("or,rn->on", up.flatten(1), down.flatten(1)).view_as(held[target])
            weights[target] = held[target] + (self.alpha or len(down)) / len(down) * product
        return {name: value for name, value in weights.items() if ".lora_B." not in name}

    def __call__(self, x_t, timesteps, text):
        return functional_call(self.unet, self.weights(), (x_t, timesteps),
                               {"encoder_hidden_states": text}).sample


class ByHand:
    """The losses of Algorithm 1 for a run's settings, on copies of its networks.

    The generator's loss is differentiated in one joint backward through everything that theorem 3.1
    differentiates; everything else is detached.
    """

    def __init__(self, settings, run):
        self.settings, folder = settings, Path(settings["pretrained_model_name_or_path"])
        scheduler = frozen(DDPMScheduler, folder / "scheduler")
        self.alphas, self.kind = scheduler.alphas_cumprod.double(), scheduler.config.prediction_type
        self.tokenizer = frozen(CLIPTokenizer, folder / "tokenizer")
        self.text_encoder = frozen(CLIPTextModel, folder / "text_encoder")
        self.vae = frozen(AutoencoderKL, folder / "vae")
        start, alpha = settings["generator_init"], settings.get("lora_alpha")
        self.assistant = Network(folder / "unet", parameters(run, "assistant"), alpha)
        self.generator = Network(folder / "unet" if start == "reference" else start,
                                 parameters(run, "generator"), alpha)
        self.reference = Network(folder / "unet")
        self.preference = Network(settings["preference_unet"]) if settings["preference_unet"] else None
        self.x0 = None

    def text(self, prompts):
        tokens = self.tokenizer(prompts, padding="max_length", max_length=16, truncation=True,
                                return_tensors="pt")
        return self.text_encoder(tokens.input_ids).last_hidden_state

    def coefficients(self, timesteps):
        signal = self.alphas[timesteps].view(-1, 1, 1, 1)
        return signal ** 0.5, (1 - signal) ** 0.5

    def clean(self, network, x_t, timesteps, text):
        a, s = self.coefficients(timesteps)
        output, own = network(x_t, timesteps, text), self.settings["generator_prediction_type"]
        return {"epsilon": (x_t - s * output) / a, "v_prediction": a * x_t - s * output,
                "sample": output}[own if own and network is self.generator else self.kind]

    def generate(self, z, text, network=None):
        """x0 after as many steps as z has noise for; its gradient is that of the last call."""
        times = [torch.full((len(z),), timestep) for timestep in self.settings["generator_timesteps"]]
        x_t, network = z[:, 0], network or self.generator
        for step in range(1, z.shape[1]):
            a, s = self.coefficients(times[step])
            x_t = (a * self.clean(network, x_t, times[step - 1], text) + s * z[:, step]).detach()
        return self.clean(network, x_t, times[z.shape[1] - 1], text)

    def images(self, x0):
        decoded = self.vae.decode(x0 / self.vae.config.scaling_factor).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    def assistant_losses(self, draw):
        """(batch,)."""
        text, (a, s) = self.text(draw.prompts), self.coefficients(draw.timesteps)
        x0 = self.generate(draw.z, text).detach()
        output = self.assistant(a * x0 + s * draw.noise, draw.timesteps, text)
        target = {"epsilon": draw.noise, "v_prediction": a * draw.noise - s * x0, "sample": x0}[self.kind]
        return ((output - target) ** 2).mean((1, 2, 3))

    def terms(self, draw):
        """The terms of the generator's loss, {name: (batch,)}; sets `x0`."""
        given, text = self.settings, self.text(draw.prompts)
        self.x0 = x0 = self.generate(draw.z, text)
        a, s = self.coefficients(draw.timesteps)
        full = (given["divergence"], given["score_gradient"]) == ("score", "full")
        x_t = a * (x0 if full else x0.detach()) + s * draw.noise
        d_assistant, d_plain, d_null, d_preferred = [
            self.clean(network, x_t, draw.timesteps, words) if network else None for network, words in (
                (self.assistant, text), (self.reference, text),
                (self.reference, self.text([""] * len(text))), (self.preference, text))]
        d_reference, out = d_plain, 0.0
        if given["cfg_mode"] == "in" and given["cfg_scale"] > 1:
            d_reference = d_null + given["cfg_scale"] * (d_plain - d_null)
        elif given["cfg_mode"] == "out":
            out = given["cfg_scale"]
        if not full:
            d_assistant, d_reference = d_assistant.detach(), d_reference.detach()
        per_score, per_x_t = (a / s**2, a) if given["weighting"] == "score" else (1.0, 1.0)

        def time_weight(reference):
            if given["weighting"] != "dmd":
                return 1.0
            return 1 / (x0 - reference).detach().abs().mean((1, 2, 3), keepdim=True)

        def along(difference, reference):
            """w(t) times a detached difference of scores, times x_t."""
            product = time_weight(reference) * per_score * difference.detach() * per_x_t * x0
            return product.sum((1, 2, 3))

        y = per_score * (d_assistant - d_reference)
        if given["divergence"] == "kl":
            terms = {"divergence": along(d_assistant - d_reference, d_reference)}
        else:
            length = (y.flatten(1).norm(dim=1) ** 2 + given["pseudo_huber_c"] ** 2) ** 0.5
            slope = 2 * y if given["distance"] == "l2" else y / length.view(-1, 1, 1, 1)
            bracket = per_score * (d_assistant - x0)
            terms = {"divergence": -(time_weight(d_reference) * slope * bracket).sum((1, 2, 3))}
        if out > 0:
            terms["cfg"] = -out * along(d_plain - d_null, d_plain)
        if self.preference:
            terms["preference"] = -given["preference_scale"] * along(d_preferred - d_plain, d_plain)
        whole = draw.z.shape[1] == len(given["generator_timesteps"])
        if given["reward_scale"] and (whole or given["reward_steps"] == "all"):
            terms["reward"] = -given["reward_scale"] * build_reward()(self.images(x0), draw.prompts)
        return terms

    def losses(self, name, draw):
        return self.assistant_losses(draw) if name == "assistant" else sum(self.terms(draw).values())

    def gradient(self, name, taken):
        """The flat gradient of one update from all of its batches, which have the same size."""
        leaves = getattr(self, name).leaves
        loss = sum(self.losses(name, draw).mean() for draw in taken) / len(taken)
        return flat(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())))))


class Optimizers:
    """Clipping, AdamW, learning rates and the average by their definitions, on flat vectors of weights."""

    def __init__(self, settings, run):
        self.settings = settings
        self.weights = {name: flat(parameters(run, name)) for name in ("assistant", "generator")}
        self.average, self.averaged = self.weights["generator"].clone(), 0
        self.done = dict.fromkeys(self.weights, 0)  # updates, skipped ones included: the schedule's position
        self.moments = {name: [0, 0.0, 0.0] for name in self.weights}

    def rate(self, name):
        given, n = self.settings, self.done[name]
        peak = given["learning_rate"]
        if name == "assistant" and given["assistant_learning_rate"] is not None:
            peak = given["assistant_learning_rate"]
        rounds = given["assistant_updates"] if name == "assistant" else 1
        warm, whole = given["lr_warmup_steps"] * rounds, given["max_train_steps"] * rounds
        kind = given["lr_scheduler"]
        if n < warm and kind != "constant":
            return peak * n / warm
        progress = (n - warm) / (whole - warm)
        if kind.startswith("constant"):
            return peak
        if kind == "linear":
            return peak * (1 - progress)
        if kind == "polynomial":  # down to 1e-7
            return 1e-7 + (peak - 1e-7) * (1 - progress) ** given["lr_power"]
        cycles = given["lr_num_cycles"] if kind == "cosine_with_restarts" else 1
        return peak * (1 + math.cos(math.pi * (progress * cycles % 1))) / 2

    def skip(self, name):
        self.done[name] += 1

    def update(self, name, gradient):
        given, rate = self.settings, self.rate(name)
        gradient = gradient * min(1.0, given["max_grad_norm"] / (gradient.norm().item() + 1e-6))
        steps, first, second = self.moments[name]
        beta1, beta2, steps = given["adam_beta1"], given["adam_beta2"], steps + 1
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        self.moments[name] = [steps, first, second]
        root = (second / (1 - beta2**steps)).sqrt() + given["adam_epsilon"]
        weights = self.weights[name] * (1 - rate * given["adam_weight_decay"])
        self.weights[name] = weights - rate * first / (1 - beta1**steps) / root
        self.done[name] += 1
        if name == "generator":
            n, self.averaged = self.averaged, self.averaged + 1
            decay = min((1 + n) / (10 + n), given["ema_decay"]) if n else 0.0
            self.average = decay * self.average + (1 - decay) * self.weights[name]

    def state(self):
        return self.weights | ({"average": self.average} if self.settings["use_ema"] else {})


def state_of(run):
    """A run's weights and average, which `Optimizers.state` predicts."""
    held = {name: flat(parameters(run, name)) for name in ("assistant", "generator")}
    return held | ({"average": average(run)} if run.ema is not None else {})


def apart(one, other):
    """The difference of two tensors relative to the second."""
    return ((one - other).norm() / other.norm()).item()


def moved_apart(found, expected, start):
    """The distance of two vectors of weights relative to the distance from their start."""
    return ((found - expected).norm() / (expected - start).norm().clamp(min=1e-12)).item()


# ----------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A folder of tiny models and prompts: a pipeline for each prediction type, two other UNets."""
    folder = tmp_path_factory.mktemp("update")
    clip = tiny_clip(folder / "clip")
    for kind in ("epsilon", "v_prediction", "sample"):
        tiny_pipeline(folder / kind, clip, kind)
    vae = AutoencoderKL.from_pretrained(tiny_pipeline(folder / "overshooting", clip) / "vae")
    vae.decoder.conv_out.weight.data *= 8
    vae.save_pretrained(folder / "overshooting" / "vae")
    for seed, name in ((7, "unet"), (8, "preference")):
        torch.manual_seed(seed)
        tiny_unet().save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("".join(f"prompt number {index}\n" for index in range(13)))
    return folder


@pytest.fixture(scope="module")
def loaded():
    """{flags of the models: (the models, their weights at the start of a run)}."""
    return {}


MODEL_FLAGS = ("pretrained_model_name_or_path", "generator_init", "reward", "reward_scale",
               "generator_lora_rank", "assistant_lora_rank", "shared_base", "gradient_checkpointing",
               "decode_batch_size", "lora_alpha", "generator_prediction_type")


@pytest.fixture
def start(script, disk, loaded, tmp_path, monkeypatch):
    """Start a run with changed flags, both trained networks moved away from where they start.

    Returns the run and its settings. Runs with the same flags and the same `twin` share their networks, whose
    weights are reset for each.
    """
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folders = (tmp_path / f"run-{number}" for number in range(10**6))

    def build(twin=0, output_dir=None, validates=True, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        settings, argv = command_line(disk, output_dir or next(folders), changes)
        key = twin, *(str(settings.get(name)) for name in MODEL_FLAGS)

        def load_models(own, *given):
            if key not in loaded:
                with default_dtype(torch.float32):
                    models = own(*given)
                to_double(models)
                random = torch.Generator().manual_seed(5)
                for name in ("assistant", "generator"):
                    for parameter in trained_of(script, models, name).values():
                        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
                loaded[key] = models, [value.detach().clone() for value in all_parameters(models)]
            models, weights = loaded[key]
            for parameter, value in zip(all_parameters(models), weights):
                parameter.data.copy_(value)
                parameter.grad = None
            return models
        return start_run(script, argv, load_models, monkeypatch, validates), settings
    with default_dtype(torch.float64):
        yield build


def all_parameters(models):
    modules = (models.reference, models.assistant, models.generator)
    return list({id(value): value for module in modules for value in module.parameters()}.values())


def some_draw(steps=1, timesteps=(150, 500, 900), numbers=(2, 11, 5)):
    """A batch drawn here and not by the script, with another timestep for each sample."""
    random = torch.Generator().manual_seed(17)
    z, *noise = (torch.randn(len(timesteps), 4, 8, 8, generator=random) for _ in range(steps + 1))
    z = torch.stack([z, *noise[1:]], 1)
    return Draw(z, noise[0], torch.tensor(timesteps), [f"prompt number {number}" for number in numbers])


def gradient_of(script, run, name, taken):
    """The flat gradient that the script accumulates from these batches, with the last logs."""
    for draw in taken:
        logs = backward(script, run, name, draw)
    gradient = flat({key: value.grad for key, value in parameters(run, name).items()})
    for value in parameters(run, name).values():
        value.grad = None
    return gradient, logs


# ------------------------------------------------------------------------------- the gradients of both steps


@pytest.mark.parametrize("kind, timesteps", [
    ("epsilon", [399]), ("v_prediction", [399]), ("sample", [399]), ("epsilon", THREE)])
def test_the_assistant_learns_by_denoising_score_matching_of_generated_samples(script, start, disk, kind,
                                                                              timesteps):
    """Its loss is right for each sample, its gradient is that of the mean, and no other network has one."""
    run, settings = start(pretrained_model_name_or_path=disk / kind, generator_timesteps=timesteps,
                          preference_unet=disk / "preference", gradient_accumulation_steps=1)
    by_hand, draw = ByHand(settings, run), some_draw(len(timesteps))
    gradient, logs = gradient_of(script, run, "assistant", [draw])
    torch.testing.assert_close(logs["loss_assistant"], by_hand.assistant_losses(draw))
    assert apart(gradient, by_hand.gradient("assistant", [draw])) < 1e-9
    for name in ("generator", "reference", "preference"):
        assert all(value.grad is None for value in network(run, name).parameters()), name


@pytest.mark.parametrize("name", ["assistant", "generator"])
def test_accumulated_batches_leave_the_mean_of_their_gradients(script, start, name):
    run, settings = start(gradient_accumulation_steps=2)
    taken = [some_draw(), some_draw(timesteps=(30, 400, 700), numbers=(0, 1, 12))]
    expected = ByHand(settings, run).gradient(name, taken)
    assert apart(gradient_of(script, run, name, taken)[0], expected) < 1e-6


@pytest.mark.parametrize("weighting", ["clean", "score", "dmd"])
def test_the_logs_hold_the_norm_of_the_gradient_at_x0_of_each_term(script, start, disk, weighting):
    """For all four terms; and the generator's gradient is that of their sum."""
    run, settings = start(cfg_mode="out", weighting=weighting, gradient_accumulation_steps=1,
                          preference_unet=disk / "preference")
    by_hand, draw = ByHand(settings, run), some_draw()
    gradient, logs = gradient_of(script, run, "generator", [draw])
    terms = by_hand.terms(draw)
    assert set(terms) == {"divergence", "cfg", "preference", "reward"}
    assert {key for key in logs if key.startswith("grad_") and "image" not in key} == {
        f"grad_{name}" for name in terms}
    for name, loss in terms.items():
        (at_x0,) = torch.autograd.grad(loss.sum(), by_hand.x0, retain_graph=True)
        torch.testing.assert_close(logs[f"grad_{name}"].double(), at_x0.flatten(1).norm(dim=1), rtol=1e-5,
                                   atol=0)
    scores = build_reward()(by_hand.images(by_hand.x0), draw.prompts)
    torch.testing.assert_close(logs["reward"].double(), scores.detach(), rtol=1e-5, atol=0)
    assert apart(gradient, by_hand.gradient("generator", [draw])) < 1e-6


def test_an_observer_scales_a_term_and_no_other(script, start, disk):
    """The scale reaches the gradient and the logged norm, and a checkpoint keeps it."""
    flags = {"cfg_mode": "out", "gradient_accumulation_steps": 1, "preference_unet": disk / "preference"}
    run, settings = start(**flags)
    by_hand, draw = ByHand(settings, run), some_draw()
    factors = {"divergence": 3.0, "reward": 0.25, "cfg": 0.0}
    plain = gradient_of(script, run, "generator", [draw])[1]
    for name, factor in factors.items():
        set_scale(run, name, factor)
    gradient, logs = gradient_of(script, run, "generator", [draw])
    terms = by_hand.terms(draw)
    for name in terms:
        torch.testing.assert_close(logs[f"grad_{name}"], factors.get(name, 1.0) * plain[f"grad_{name}"])
    leaves = by_hand.generator.leaves
    loss = sum(factors.get(name, 1.0) * value for name, value in terms.items()).mean()
    expected = flat(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())))))
    assert apart(gradient, expected) < 1e-6
    save(run)
    resumed, _ = start(resume_from_checkpoint="latest", output_dir=settings["output_dir"], **flags)
    assert scales(resumed) == factors | {"preference": 1.0}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_image_is_rewarded_for_its_own_prompt_however_few_are_decoded_at_once(script, start, size):
    run, settings = start(decode_batch_size=size, gradient_accumulation_steps=1)
    by_hand, draw = ByHand(settings, run), some_draw()
    terms = by_hand.terms(draw)
    (at_x0,) = torch.autograd.grad(terms["reward"].sum(), by_hand.x0)
    gradient, logs = gradient_of(script, run, "generator", [draw])
    torch.testing.assert_close(logs["grad_reward"].double(), at_x0.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    assert apart(gradient, by_hand.gradient("generator", [draw])) < 1e-6


def test_images_that_overshoot_are_clamped_before_they_are_rewarded(script, start, disk):
    """The reward refuses values outside [0, 1]; clamped values have no gradient, and the logs count them."""
    run, settings = start(pretrained_model_name_or_path=disk / "overshooting", gradient_accumulation_steps=1)
    by_hand, draw = ByHand(settings, run), some_draw()
    gradient, logs = gradient_of(script, run, "generator", [draw])
    expected = by_hand.gradient("generator", [draw])
    images = by_hand.images(by_hand.x0)
    outside = ((images == 0) | (images == 1)).double().mean((1, 2, 3))
    assert outside.min() > 0.1
    torch.testing.assert_close(logs["clamped"].double(), outside, rtol=0, atol=1e-3)
    assert apart(gradient, expected) < 1e-6


# ------------------------------------------------------------------------------- every setting of the method

# {setting: [(another value, further changes of SETTINGS)]}.
GRADIENT = {
    "divergence": [("kl", {})],
    "score_gradient": [("detached", {}), ("detached", {"weighting": "score"})],
    "distance": [("l2", {}), ("l2", {"score_gradient": "detached"})],
    "pseudo_huber_c": [(2.0, {})],
    "weighting": [("score", {}), ("dmd", {}), ("score", {"divergence": "kl", "cfg_mode": "out"}),
                  ("dmd", {"divergence": "kl", "cfg_mode": "out"})],
    "cfg_mode": [("out", {}), ("out", {"divergence": "kl"})],
    "cfg_scale": [(5.0, {}), (1.0, {}), (0.5, {}), (0.5, {"cfg_mode": "out"}), (0.0, {"cfg_mode": "out"})],
    "preference_scale": [(2.5, {})],
    "reward_scale": [(20.0, {})],
    "reward_steps": [("all", {"generator_timesteps": THREE})],
    "generator_timesteps": [([600], {}), (THREE, {})],
    "generator_prediction_type": [("sample", {}), ("v_prediction", {"generator_timesteps": THREE})],
}
TIMES = {"min_timestep", "max_timestep", "timestep_sampling", "logit_mean", "logit_std"}


@pytest.mark.parametrize("name, value, base", [
    (name, value, base) for name, cases in GRADIENT.items() for value, base in cases],
    ids=lambda value: " ".join(map(str, value.items() if isinstance(value, dict) else [value])) or "-")
def test_a_setting_of_the_method_changes_the_gradients_that_it_should_and_no_other(script, start, disk, name,
                                                                                  value, base):
    """Both networks have the gradients by hand for the changed setting, which differ only where they should.

    The rollout of the three-step generator ends after two steps, and has a reward only if all steps do.
    """
    run, settings = start(gradient_accumulation_steps=1, preference_unet=disk / "preference",
                          **base | {name: value})
    before = ByHand(SETTINGS | settings | {name: SETTINGS[name]}, run)
    by_hand = ByHand(settings, run)
    draw = some_draw(2 if settings["generator_timesteps"] == THREE else 1)
    for trained in ("assistant", "generator"):
        expected = by_hand.gradient(trained, [draw])
        assert apart(gradient_of(script, run, trained, [draw])[0], expected) < 1e-6, trained
        if name == "generator_timesteps" and value == THREE:
            continue  # a one-step generator has no rollout of two steps to compare with
        changed = apart(before.gradient(trained, [draw]), expected)
        acts = trained == "generator" or name.startswith("generator_")
        assert changed > 1e-3 if acts else changed < 1e-12, trained


@pytest.mark.parametrize("mode, scale, null", [
    ("in", 3.0, True), ("in", 1.0, False), ("in", 0.5, False), ("out", 0.5, True), ("out", 0.0, False)])
def test_the_reference_predicts_the_null_prompt_only_where_guidance_uses_it(script, start, mode, scale, null):
    """And the graphs of the score networks begin at x_t, so that they do not hold the generator's."""
    run, _ = start(cfg_mode=mode, cfg_scale=scale, gradient_accumulation_steps=1)
    rows, leaves = [], []
    handles = [network(run, name).register_forward_pre_hook(hook) for name, hook in (
        ("reference", lambda _, given: rows.append(len(given[0]))),
        ("assistant", lambda _, given: leaves.append(given[0].is_leaf)))]
    gradient_of(script, run, "generator", [some_draw()])
    for handle in handles:
        handle.remove()
    assert sum(rows) == (6 if null else 3) and leaves == [True]


@pytest.mark.parametrize("mode, scale", [("in", 3.0), ("in", 0.5), ("out", 0.5), ("out", 0.0)])
def test_guidance_is_the_same_where_another_term_asks_for_the_null_prediction(script, start, mode, scale):
    run, settings = start(cfg_mode=mode, cfg_scale=scale, term="test_update:build_idle_term",
                          gradient_accumulation_steps=1)
    by_hand, draw = ByHand(settings, run), some_draw()
    expected = by_hand.gradient("generator", [draw])
    assert apart(gradient_of(script, run, "generator", [draw])[0], expected) < 1e-6


def times_drawn(run):
    """400 timesteps for the update of each network."""
    return [torch.cat([draw.timesteps for draw in draws(run, name, name)]) for name in (
        "assistant", "generator")]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_timesteps_are_drawn_from_the_smallest_to_the_largest_inclusive(start, sampling):
    for low, high in ((20, 23), (976, 979)):
        run, _ = start(min_timestep=low, max_timestep=high, timestep_sampling=sampling, logit_std=2.0,
                       train_batch_size=200)
        for drawn in times_drawn(run):
            counts = torch.bincount(drawn, minlength=1000)[low:high + 1]
            assert counts.sum() == 400 and counts.min() > 40
            if sampling == "uniform":
                assert (counts - 100).abs().max() < 40


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.8, 1.0), (0.0, 0.4)])
def test_the_normal_of_the_timesteps_has_its_mean_and_deviation(start, mean, std):
    """Within four standard errors; the logit of a uniform timestep would have a deviation of 1.8."""
    run, settings = start(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std,
                          train_batch_size=200)
    low, high = settings["min_timestep"], settings["max_timestep"]
    for drawn in times_drawn(run):
        logits = torch.logit((drawn + 0.5 - low) / (high + 1 - low))
        assert logits.mean().item() == pytest.approx(mean, abs=4 * std / 20)
        assert logits.std().item() == pytest.approx(std, abs=4 * std / 28)


def test_uniform_timesteps_do_not_depend_on_the_normal(start):
    drawn = [torch.cat(times_drawn(start(train_batch_size=200, **more)[0])) for more in (
        {}, {"logit_mean": 3.0, "logit_std": 0.1})]
    assert torch.equal(*drawn)
    assert abs(drawn[0].double().mean() - 499.5) < 4 * 277 / 800**0.5 and 200 < drawn[0].double().std() < 350


# ------------------------------------------------------------------------ every setting of the optimizers

BOTH = {"assistant", "generator", "average"}
# {setting: [(another value, further changes of SETTINGS, what it changes of `Optimizers.state`)]}.
OPTIMIZER = {
    "learning_rate": [(1e-3, {}, {"generator", "average"}), (1e-3, {"assistant_learning_rate": None}, BOTH)],
    "assistant_learning_rate": [(1e-3, {}, {"assistant"}), (None, {}, {"assistant"})],
    "adam_beta1": [(0.8, {}, BOTH), (0.0, {}, BOTH)],
    "adam_beta2": [(0.5, {}, BOTH), (0.5, {"adam_beta1": 0.0}, BOTH)],
    "adam_epsilon": [(1e-1, {}, BOTH)],
    "adam_weight_decay": [(5.0, {}, BOTH), (5.0, {"adam_beta1": 0.0}, BOTH)],
    "lr_scheduler": [(kind, {}, BOTH) for kind in (
        "linear", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")],
    "lr_warmup_steps": [(3, {}, BOTH)],
    "lr_num_cycles": [(2, {"lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 0}, BOTH)],
    "lr_power": [(3.0, {"lr_scheduler": "polynomial"}, BOTH)],
    "max_train_steps": [(40, {}, BOTH), (40, {"lr_scheduler": "linear"}, BOTH)],
    "assistant_updates": [(3, {}, {"assistant"})],
    "max_grad_norm": [(0.01, {}, BOTH)],
    "use_ema": [(False, {}, {"average"})],
    "ema_decay": [(0.1, {}, {"average"}), (0.0, {}, {"average"})],
}
SAME = {("lr_scheduler", "cosine_with_restarts")}  # with one cycle it is `cosine`


def some_gradients(run):
    """A function that returns a new flat gradient of the named network at each call."""
    random = {name: torch.Generator().manual_seed(23) for name in ("assistant", "generator")}

    def draw(name):
        size = sum(value.numel() for value in parameters(run, name).values())
        entries, sizes = torch.randn(size, generator=random[name]), torch.rand(size, generator=random[name])
        return 1e-2 * entries * sizes**3
    return draw


def give(run, name, gradient):
    """Set the parameters' gradients to the parts of a flat one."""
    held = list(parameters(run, name).values())
    for value, part in zip(held, gradient.split([value.numel() for value in held])):
        value.grad = torch.empty_like(value).copy_(part.view_as(value))  # in its layout, as autograd does


def has_gradient(run, name):
    return any(value.grad is not None and value.grad.any() for value in parameters(run, name).values())


def updates_of(settings, steps):
    """The networks that so many steps update, in turn."""
    return (["assistant"] * settings["assistant_updates"] + ["generator"]) * steps


def train_on(run, by_hand, gradients, steps):
    """Update a run, and its optimizers by hand, on the same gradients."""
    for name in updates_of(by_hand.settings, steps):
        gradient = gradients(name)
        give(run, name, gradient)
        update(run, name)
        by_hand.update(name, gradient)


@pytest.mark.parametrize("name, value, base, changed", [
    (name, *case) for name, cases in OPTIMIZER.items() for case in cases],
    ids=lambda value: None if isinstance(value, set) else
    " ".join(map(str, value.items() if isinstance(value, dict) else [value])) or "-")
def test_a_setting_of_the_optimizers_changes_the_weights_that_it_should_and_no_other(start, name, value, base,
                                                                                    changed):
    """After four steps on given gradients; by hand, they are compared with the weights without the change."""
    run, settings = start(**base | {name: value})
    begun, by_hand = state_of(run), Optimizers(settings, run)
    unchanged = Optimizers(settings | {name: SETTINGS[name]}, run)
    train_on(run, by_hand, some_gradients(run), 4)
    found, expected, gradients = state_of(run), by_hand.state(), some_gradients(run)
    for trained in updates_of(unchanged.settings, 4):
        unchanged.update(trained, gradients(trained))
    assert set(found) == set(expected)
    for part in BOTH:
        if part not in expected:  # without --use_ema
            assert part in changed
            continue
        origin = begun["generator" if part == "average" else part]
        assert moved_apart(found[part], expected[part], origin) < 1e-8, part
        difference = moved_apart(unchanged.state()[part], expected[part], origin)
        if part in changed and (name, value) not in SAME:
            assert difference > 1e-3, part
        else:
            assert difference < 1e-12, part


@pytest.mark.parametrize("name", ["assistant", "generator"])
def test_a_gradient_is_clipped_only_above_the_largest_norm_and_is_gone_after_its_update(start, name):
    run, settings = start(adam_beta1=0.0, lr_warmup_steps=0)
    by_hand = Optimizers(settings, run)
    begun = by_hand.weights[name]
    direction = torch.randn(len(begun), generator=torch.Generator().manual_seed(1))
    for norm in (1.0, 50.0):
        gradient = norm * direction / direction.norm()
        give(run, name, gradient)
        update(run, name)
        by_hand.update(name, gradient)
        assert moved_apart(flat(parameters(run, name)), by_hand.weights[name], begun) < 1e-8
        assert not has_gradient(run, name)


def test_terms_are_told_of_each_update_of_the_generator_and_of_no_other(start):
    run, settings = start(term="test_update:build_idle_term")
    train_on(run, Optimizers(settings, run), some_gradients(run), 3)
    assert run.terms["idle"].told == 3


# The flags without an entry in GRADIENT, TIMES or OPTIMIZER: they choose models, prompts, precision or
# output, or other tests compare their updates.
MODELS = {"pretrained_model_name_or_path", "revision", "variant", "pretrained_vae_model_name_or_path",
          "reference_unet", "generator_init", "preference_unet", "reward", "reward_model_name_or_path",
          "reward_vae", "recipe", "term", "observer"}
LORA = {"generator_lora_rank", "assistant_lora_rank", "shared_base", "lora_alpha", "lora_layers"}
PROMPTS = {"dataset_name", "dataset_config_name", "dataset_split", "streaming", "prompts_file",
           "caption_column", "max_train_samples"}
DRAWS = {"seed", "train_batch_size", "gradient_accumulation_steps", "resolution"}
MACHINE = {"use_8bit_adam", "offload_ema", "mixed_precision", "gradient_checkpointing", "decode_batch_size",
           "enable_vae_tiling", "offload", "allow_tf32", "sharding", "dry_run"}
OUTPUT = {"output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
          "validation_prompts", "validation_reward", "num_validation_images", "validation_steps",
          "min_diversity", "logging_steps", "logging_dir", "report_to", "push_to_hub", "hub_model_id",
          "hub_token", "tracker_project_name", "config", "log_level", "validation_prompts_file"}


def test_every_field_of_the_method_has_an_entry(script):
    assert not method_fields(script) - set(GRADIENT) - TIMES


def test_every_flag_has_an_entry_or_is_known_to_change_no_update(script):
    """A new flag gets an entry in GRADIENT or OPTIMIZER where it changes an update."""
    flags = flags_of(script)
    tested = set(GRADIENT) | TIMES | set(OPTIMIZER)
    assert flags == tested | MODELS | LORA | PROMPTS | DRAWS | MACHINE | OUTPUT


# ------------------------------------------------------------------------------------------- whole updates


WHOLE = {
    "one step, all weights": {"adam_beta1": 0.0},
    "three steps, all weights": {"generator_timesteps": THREE, "reward_steps": "all", "cfg_mode": "out",
                                 "decode_batch_size": 1, "weighting": "dmd"},
    "LoRAs on one base": {
        "generator_lora_rank": 3, "assistant_lora_rank": 2, "shared_base": True, "adam_beta1": 0.0,
        "generator_init": "reference", "gradient_checkpointing": True},
    "LoRAs, kl": {"generator_lora_rank": 2, "assistant_lora_rank": 3, "lora_alpha": 5.0, "divergence": "kl",
                  "cfg_mode": "out", "weighting": "score", "gradient_accumulation_steps": 1,
                  "assistant_updates": 1},
}


@pytest.mark.parametrize("more", [
    pytest.param(more, id=name, marks=[pytest.mark.slow] * (name == "LoRAs, kl"))
    for name, more in WHOLE.items()])
def test_whole_steps_are_those_of_algorithm_1_by_hand(script, start, disk, more):
    """Two steps: in each, K_TA updates of the assistant and one of the generator, and the reference stays."""
    if more.get("cfg_mode") == "out":
        more = more | {"preference_unet": disk / "preference"}
    run, settings = start(max_grad_norm=0.5, lr_warmup_steps=0, **more)
    begun, by_hand, optimizers = state_of(run), ByHand(settings, run), Optimizers(settings, run)
    frozen_weights = {key: (value, value.detach().clone()) for key, value in network(
        run, "reference").named_parameters() if "lora" not in key}
    taken = watch_batches(run)
    for _ in range(2):
        taken.clear()
        train_step(script, run)
        for name in updates_of(settings, 1):
            own = [taken.pop(0) for _ in range(settings["gradient_accumulation_steps"])]
            assert {which for which, _ in own} == {name}
            optimizers.update(name, by_hand.gradient(name, [draw for _, draw in own]))
            getattr(by_hand, name).set(optimizers.weights[name])
        assert not taken
        for part, vector in optimizers.state().items():
            origin = begun["generator" if part == "average" else part]
            assert moved_apart(state_of(run)[part], vector, origin) < 1e-4, part
    for key, (value, before) in frozen_weights.items():
        assert torch.equal(value, before), key


def test_only_its_own_lora_of_a_shared_base_is_trained(start):
    run, _ = start(generator_lora_rank=3, assistant_lora_rank=2, shared_base=True, generator_init="reference")
    ranks = {name: {len(value) for key, value in parameters(run, name).items() if ".lora_A." in key}
             for name in ("assistant", "generator")}
    assert ranks == {"assistant": {2}, "generator": {3}}
    assert all("lora" in key for name in ranks for key in parameters(run, name))


# ---------------------------------------------------------------------------------------- noise and prompts


def drawn_in(script, run, steps, monkeypatch):
    """The samples of so many whole steps in their order, [(network, Draw of one sample)]."""
    taken = watch_batches(run)
    for _ in range(steps):
        draw_step(script, run, monkeypatch)
    return [(name, Draw(z, noise, time, prompt)) for name, draw in taken
            for z, noise, time, prompt in zip(*draw)]


def noises(samples):
    """All noise of some samples as tuples: the generator's for each of its steps, and that of x_t."""
    return [tuple(one.flatten().tolist()) for _, draw in samples for one in (*draw.z, draw.noise)]


def test_no_two_samples_of_a_run_share_noise(script, start, monkeypatch):
    """In two processes and two steps, each of four updates, each of two batches."""
    found = []
    for rank in range(2):
        run, _ = start(generator_timesteps=THREE, assistant_updates=3)
        run.accelerator = Process(run.accelerator, rank, 2)
        samples = drawn_in(script, run, 2, monkeypatch)
        assert len(samples) == 2 * 4 * 2 * 2
        found += samples
    assert len(set(noises(found))) == len(noises(found)) >= 2 * 64
    times = [tuple(draw.timesteps.tolist() for _, draw in found[first:first + 4])
             for first in range(0, len(found), 4)]
    assert len(set(times)) == len(times), "updates share timesteps"


def test_noise_timesteps_rollouts_and_order_of_prompts_are_functions_of_the_seed(script, start, monkeypatch):
    first, again, other = (drawn_in(script, start(seed=seed, generator_timesteps=THREE)[0], 4, monkeypatch)
                           for seed in (3, 3, 4))
    assert noises(first) == noises(again) and not set(noises(first)) & set(noises(other))
    for field in ("timesteps", "prompts"):
        one, same, another = ([getattr(draw, field) for _, draw in run] for run in (first, again, other))
        assert one == same and sum(map(lambda a, b: a == b, one, another)) < len(one) / 3, field
    ends = [[len(draw.z) for _, draw in run] for run in (first, again, other)]
    assert ends[0] == ends[1] != ends[2]


def test_processes_and_accumulated_batches_divide_the_samples_of_one_large_batch(start):
    """Two processes with two batches of two have the noise, timesteps and prompts of one batch of eight."""
    def taken(size, batches, rank, count):
        run, _ = start(train_batch_size=size, gradient_accumulation_steps=batches, assistant_updates=1)
        run.accelerator = Process(run.accelerator, rank, count)
        return [[(z.tolist(), noise.tolist(), time.item(), prompt) for z, noise, time, prompt in zip(*draw)]
                for _ in range(2) for draw in draws(run)]

    alone, (first, second) = taken(8, 1, 0, 1), (taken(2, 2, rank, 2) for rank in range(2))
    for number, batch in enumerate(alone):
        parts = [part[2 * number + k] for k in range(2) for part in (first, second)]
        assert sum(parts, []) == batch


def test_noise_is_standard_normal_and_the_generator_reads_other_noise_than_x_t(start):
    run, _ = start(train_batch_size=64, generator_timesteps=[399, 100])
    found = [draw for run.step in range(4) for draw in draws(run)]
    steps = {draw.z.shape[1] for draw in found}
    assert steps == {1, 2}
    for noise in (torch.cat([draw.z[:, 0] for draw in found]), torch.cat([draw.noise for draw in found]),
                  torch.cat([draw.z[:, 1] for draw in found if draw.z.shape[1] == 2])):
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
        assert abs((noise**4).mean() - 3) < 0.2
    for draw in found:
        one, other = draw.z[:, 0].flatten(), draw.noise.flatten()
        assert abs((one * other).mean()) < 0.04


def test_each_update_draws_its_own_last_step_of_the_rollout(script, start, monkeypatch):
    """All its batches share it; all three are equally likely, whatever those of other updates are."""
    run, _ = start(generator_timesteps=THREE)
    samples = drawn_in(script, run, 40, monkeypatch)
    ends = [{len(draw.z) for _, draw in samples[first:first + 4]} for first in range(0, len(samples), 4)]
    assert len(ends) == 120 and all(len(end) == 1 for end in ends)
    rounds = [[next(iter(end)) for end in ends[k::3]] for k in range(3)]
    for drawn in rounds:
        assert set(drawn) == {1, 2, 3} and min(map(drawn.count, (1, 2, 3))) >= 5
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert sum(map(lambda a, b: a == b, rounds[one], rounds[other])) < 25


def test_all_updates_together_take_each_prompt_once_in_an_epoch_in_a_new_order(script, start, monkeypatch):
    """Of thirteen prompts each step takes twelve; every thirteen in a row have each prompt once."""
    run, _ = start()
    taken = [draw.prompts for _, draw in drawn_in(script, run, 5, monkeypatch)]
    epochs = [taken[first:first + 13] for first in range(0, 52, 13)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"prompt number {number}" for number in range(13))
    assert len(set(map(tuple, epochs))) == 4
    assert epochs[0] != [f"prompt number {number}" for number in range(13)]


# ------------------------------------------------------------------------------------ the middle of a run

WATCHED = {"validation_prompts": ["prompt number 4", "prompt number 9"], "num_validation_images": 2}


def trained_apart(start, **more):
    """A run after three steps on given gradients, its settings, and its optimizers by hand.

    The average is far behind the weights.
    """
    run, settings = start(lr_warmup_steps=0, learning_rate=0.3, **WATCHED, **more)
    by_hand = Optimizers(settings, run)
    train_on(run, by_hand, some_gradients(run), 3)
    assert moved_apart(average(run), by_hand.weights["generator"], by_hand.average) > 0.05
    return run, settings, by_hand


def watch_generator(run):
    """A list to which the generator's inputs x_t are appended from now on, and the handle that ends it."""
    seen = []
    return seen, network(run, "generator").register_forward_pre_hook(
        lambda _, given: seen.append(given[0].detach().clone()))


def validated(script, run):
    """A validation's metrics and its noise (images, C, H, W)."""
    seen, handle = watch_generator(run)
    found = validate(script, run)
    handle.remove()
    return found, torch.cat(seen)


def test_a_validation_samples_the_average_and_leaves_weights_and_average_as_they_were(script, start):
    run, settings, optimizers = trained_apart(start)
    before = state_of(run)
    found, z = validated(script, run)
    after = state_of(run)
    for part in before:
        assert torch.equal(before[part], after[part]), part
    by_hand, scores = ByHand(settings, run), {}
    prompts = [prompt for prompt in WATCHED["validation_prompts"] for _ in range(2)]
    for name, weights in (("average", optimizers.average), ("trained", optimizers.weights["generator"])):
        by_hand.generator.set(weights)
        images = by_hand.images(by_hand.generate(z[:, None], by_hand.text(prompts)))
        scores[name] = build_reward()(images, prompts).mean().item()
    assert abs(scores["average"] - scores["trained"]) > 1e-3
    assert found["validation_reward"] == pytest.approx(scores["average"], rel=1e-5)


def test_training_continues_after_a_validation_as_without_one(script, start):
    found = []
    for validates in (True, False):
        run, _ = start(**WATCHED)
        train_step(script, run)
        if validates:
            validate(script, run)
        train_step(script, run)
        found.append(state_of(run))
    for part in found[0]:
        assert torch.equal(found[0][part], found[1][part]), part


def test_validation_noise_is_fixed_and_differs_between_images(script, start, monkeypatch):
    """It depends on the seed, not on the step or the batch size, and training has other noise."""
    run, _ = start(**WATCHED)
    first = validated(script, run)[1]
    training = noises(drawn_in(script, run, 3, monkeypatch))
    later = validated(script, run)[1]
    assert len(first) == 4 and torch.equal(first, later)
    assert len({tuple(one.flatten().tolist()) for one in first}) == 4
    assert not {tuple(one.flatten().tolist()) for one in first} & set(training)
    assert torch.equal(validated(script, start(train_batch_size=3, **WATCHED)[0])[1][:4], first)
    assert not torch.isclose(validated(script, start(seed=4, **WATCHED)[0])[1], first).any()


def test_the_average_is_what_is_exported(script, start):
    run, settings, optimizers = trained_apart(start)
    before = state_of(run)
    export(script, run)
    weights = load_file(Path(settings["output_dir"]) / "unet" / "diffusion_pytorch_model.safetensors")
    exported = flat({name: weights[name].double() for name in parameters(run, "generator")})
    assert moved_apart(exported, optimizers.average, optimizers.weights["generator"]) < 1e-5
    for part in before:
        assert torch.equal(before[part], state_of(run)[part]), part


def test_a_checkpoint_restores_weights_moments_schedules_average_and_position(script, start, monkeypatch):
    """Three steps, a checkpoint that another run loads, and two more steps are five steps by hand."""
    run, settings = start(**WATCHED)
    begun, by_hand, gradients = state_of(run), Optimizers(settings, run), some_gradients(run)
    prompts = [draw.prompts for _, draw in drawn_in(script, run, 3, monkeypatch)]
    train_on(run, by_hand, gradients, 3)
    save(run)
    resumed, _ = start(resume_from_checkpoint="latest", output_dir=settings["output_dir"], **WATCHED)
    assert resumed is not run and resumed.step == 3
    train_on(resumed, by_hand, gradients, 2)
    for part, vector in by_hand.state().items():
        begin = begun["generator" if part == "average" else part]
        assert moved_apart(state_of(resumed)[part], vector, begin) < 1e-8, part
    more = drawn_in(script, resumed, 1, monkeypatch)
    whole = drawn_in(script, start(**WATCHED)[0], 4, monkeypatch)
    assert noises(more) == noises(whole[36:])
    assert prompts + [draw.prompts for _, draw in more] == [draw.prompts for _, draw in whole]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["assistant", "generator"])
def test_an_update_that_is_not_finite_changes_no_weight_and_no_moment(start, capsys, name, bad):
    """The next update is Adam's first, and the schedule has moved on by one."""
    run, settings = start(lr_warmup_steps=0)
    begun, by_hand = state_of(run)[name], Optimizers(settings, run)
    gradient = some_gradients(run)(name)
    broken = gradient.clone()
    broken[7] = bad
    give(run, name, broken)
    update(run, name)
    assert torch.equal(flat(parameters(run, name)), begun) and skipped(run, name) == 1
    assert not has_gradient(run, name)
    assert "not finite" in capsys.readouterr().err
    give(run, name, gradient)
    update(run, name)
    by_hand.skip(name)
    by_hand.update(name, gradient)
    assert moved_apart(flat(parameters(run, name)), by_hand.weights[name], begun) < 1e-8
    assert skipped(run, name) == 1


def test_ten_updates_in_a_row_that_are_not_finite_end_a_run_and_a_good_one_between_does_not(start):
    run, _ = start()
    gradient = some_gradients(run)("generator")

    def updates(*finite):
        for good in finite:
            give(run, "assistant", some_gradients(run)("assistant"))
            update(run, "assistant")
            give(run, "generator", gradient if good else gradient * math.nan)
            update(run, "generator")

    updates(*[False] * 9)
    assert reason_to_end(run) is None
    updates(True, *[False] * 9)
    assert reason_to_end(run) is None and skipped(run, "generator") == 18
    updates(False)
    assert "10 updates of the generator in a row" in reason_to_end(run)


class Meeting:
    """Exchange of values between threads, each of which waits for all others."""

    def __init__(self, count):
        self.barrier, self.values = threading.Barrier(count, timeout=20), [None] * count

    def __call__(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


def in_processes(runs, function):
    """Call `function(rank, run)` in a thread for each run, as processes would; raises the first error."""
    meeting, errors = Meeting(len(runs)), []
    for rank, run in enumerate(runs):
        if isinstance(run.accelerator, Process):
            run.accelerator = run.accelerator.accelerator
        run.accelerator = Process(run.accelerator, rank, len(runs), meeting)

    def call(rank, run):
        try:
            function(rank, run)
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()
    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def twins(start):
    """Two runs with networks of their own, as two processes have them, and their settings."""
    (one, settings), (other, _) = (start(twin=twin, lr_warmup_steps=0) for twin in range(2))
    return [one, other], settings


@pytest.mark.parametrize("name", ["assistant", "generator"])
@pytest.mark.parametrize("bad", [0, 1])
def test_all_processes_skip_an_update_that_is_not_finite_in_one_of_them(twins, bad, name):
    runs, settings = twins
    gradient, begun = some_gradients(runs[0])(name), state_of(runs[0])[name]
    by_hand = Optimizers(settings, runs[0])

    def skip(rank, run):
        give(run, name, gradient * (math.nan if rank == bad else 1))
        update(run, name)

    def go_on(rank, run):
        give(run, name, gradient)
        update(run, name)

    in_processes(runs, skip)
    for run in runs:
        assert torch.equal(flat(parameters(run, name)), begun) and skipped(run, name) == 1
    in_processes(runs, go_on)
    by_hand.skip(name)
    by_hand.update(name, gradient)
    for run in runs:
        assert moved_apart(flat(parameters(run, name)), by_hand.weights[name], begun) < 1e-8


@pytest.mark.parametrize("name", ["assistant", "generator"])
def test_a_signal_to_one_process_ends_all_after_their_update(twins, name):
    runs, settings = twins
    gradient, begun = some_gradients(runs[0])(name), state_of(runs[0])[name]
    by_hand = Optimizers(settings, runs[0])
    by_hand.update(name, gradient)
    send_signal(runs[1])

    def go_on(rank, run):
        give(run, name, gradient)
        update(run, name)
    in_processes(runs, go_on)
    for run, words in zip(runs, ("ended by a signal to another process", "ended by SIGTERM")):
        assert moved_apart(flat(parameters(run, name)), by_hand.weights[name], begun) < 1e-8
        assert reason_to_end(run) == words


def test_metrics_are_means_over_batches_updates_and_processes_without_skipped_updates(twins):
    runs, _ = twins
    gradient = some_gradients(runs[0])("generator")
    found = [None, None]

    def train(rank, run):
        for values, factor in (([1.0, 3.0], 1.0), ([100.0, 100.0], math.nan), ([5.0, 7.0], 1.0)):
            for value in values:
                log(run, {"own": torch.full((2,), value + 10 * rank)})
            give(run, "generator", gradient * factor)
            update(run, "generator")
        found[rank] = metrics(run)
    in_processes(runs, train)
    assert [line["own"] for line in found] == [pytest.approx((4 + 14) / 2)] * 2
    assert [line["skipped_generator"] for line in found] == [1, 1]
    norm = gradient.norm().item()
    assert found[0]["grad_norm_generator"] == pytest.approx(norm)


def test_gradients_are_averaged_over_processes_once_in_an_update(script, disk, tmp_path, monkeypatch):
    """DDP in a group of one process: the optimizer sees the gradients that a hook of the exchange triples."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    open_accelerator = script.open_accelerator

    def opened(args):
        accelerator = Process(open_accelerator(args), 0, 2)
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        return accelerator

    settings, argv = command_line(disk, tmp_path / "ddp", {"assistant_updates": 1})
    monkeypatch.setattr(script, "open_accelerator", opened)
    try:
        run = start_run(script, argv, lambda own, *given: own(*given), monkeypatch)
        calls, seen = {"assistant": [], "generator": []}, {}

        def triple(name, bucket):
            calls[name].append(bucket.is_last())
            future = torch.futures.Future()
            future.set_result(3 * bucket.buffer())
            return future
        for name in calls:
            network(run, name).register_comm_hook(name, triple)
        monkeypatch.setattr(run, "update", lambda name: seen.setdefault(name, flat(
            {key: value.grad.double() for key, value in parameters(run, name).items()})))
        by_hand, taken = ByHand(settings, run), watch_batches(run)
        for name in calls:
            getattr(by_hand, name).to_double()
        train_step(script, run)
    finally:
        torch.distributed.destroy_process_group()
    assert {name: sum(ends) for name, ends in calls.items()} == {"assistant": 1, "generator": 1}
    for name, gradient in seen.items():
        own = [Draw(draw.z.double(), draw.noise.double(), draw.timesteps, draw.prompts)
               for which, draw in taken if which == name]
        with default_dtype(torch.float64):  # transformers 4 makes CLIP's causal mask in it
            expected = 3 * by_hand.gradient(name, own)
        assert apart(gradient, expected) < 1e-2, name


def test_the_diversity_alarm_rings_below_its_fraction_of_the_first_validation_and_not_above(start):
    names = ["validation_diversity_over_noise", "validation_diversity_over_prompts"]
    first = dict(zip(names, (0.2, 0.4)))
    for factors, rings in [((1, 1), None), ((0.51, 0.51), None), ((3, 3), None), ((0.49, 1), names[0]),
                           ((1, 0.49), names[1]), ((math.nan, 1), names[0])]:
        run, _ = start(min_diversity=0.5, validation_prompts=["a", "b"], validates=False)
        assert observe(run, first) is None
        assert observe(run, {"reward": 0.0}) is None
        reason = observe(run, {name: first[name] * factor for name, factor in zip(names, factors)})
        assert reason is None if rings is None else rings in reason
