"""Measure a training iteration against a plain implementation of the same mathematics, in one run.

    python examples/benchmark_step.py                          # the shapes world, a minute on a CPU
    python examples/benchmark_step.py --model sdxl --count     # only FLOPs; needs no GPU
    python examples/benchmark_step.py --model sdxl --mixed_precision bf16 --gradient_checkpointing \\
        --generator_init reference --generator_lora_rank 64 --assistant_lora_rank 64 --shared_base \\
        --train_batch_size 1
    python examples/benchmark_step.py --model sdxl --ways ours --mixed_precision bf16 \\
        --gradient_checkpointing --use_8bit_adam --train_batch_size 2

`sdxl` and `sd15` have the real dimensions and random weights; flags that this script does not know go to the
training script. Whole iterations of Algorithm 1 are run: ours, and a plain way with three networks, a forward
for each prediction, float32 weights under autocast, one joint backward and PyTorch's default AdamW. Both see
the same samples, and their gradients are compared first. The script prints seconds (medians; on the shapes
world the ways take turns) and their parts, FLOPs by PyTorch's counter, the fraction of the rate of a matrix
product in the same run, peak memory on a GPU, every forward and backward with its number of samples, and the
time of one step against 50 of the same pipeline. `accelerate launch` with several processes: --ways ours.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "shapes")]
from utils import memory


CONFIGS, ASSETS = ROOT / "examples" / "configs", ROOT / "examples" / "shapes" / "assets"
SHAPES = ["--cfg_scale=2", "--reward_scale=25", "--train_batch_size=24", "--resolution=40",
          "--generator_timesteps=999", f"--reward_model_name_or_path={ASSETS / 'reward'}"]
# {--model: (training script, its flags)}
MODELS = {
    "shapes": ("sd15", [f"--pretrained_model_name_or_path={ASSETS / 'teacher'}",
                        f"--generator_init={ASSETS / 'one_step'}", *SHAPES]),
    "shapes_sdxl": ("sdxl", [f"--pretrained_model_name_or_path={ASSETS / 'teacher_sdxl'}",
                             f"--generator_init={ASSETS / 'one_step_sdxl'}", *SHAPES]),
} | {name: (name, [f"--pretrained_model_name_or_path={CONFIGS / name}",
                   f"--pretrained_vae_model_name_or_path={CONFIGS / name / 'vae'}",
                   f"--reward_model_name_or_path={CONFIGS / 'clip_h'}"]) for name in ("sd15", "sdxl")}
PROMPTS = ["a large red star on the left of a gray background", "a small blue circle on a white background"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="shapes", help="Models to measure.")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["ours", "plain"],
                        help="Implementations to measure; the others are ours with one change each.")
    parser.add_argument("--rounds", type=int, default=10, help="Iterations to measure, after two of warm-up.")
    parser.add_argument("--count", action="store_true",
                        help="Only count FLOPs, on tensors without data, on any machine.")
    return parser.parse_known_args()


# ---------------------------------------------------------------------------------------------- the plain way


def plain_sample(models, z, timestep, conditioning):
    """Return x0 = (z - s_T eps(z, T, c)) / a_T for a generator that predicts epsilon."""
    alpha = models.process.alphas_cumprod[timestep]
    output = models.generator(z, torch.full((len(z),), timestep, device=z.device), **conditioning).sample
    return (z - (1 - alpha).sqrt() * output.to(z.dtype)) / alpha.sqrt()


def plain_prediction(network, process, x_t, timesteps, conditioning):
    alpha = process.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return (x_t - (1 - alpha).sqrt() * network(x_t, timesteps, **conditioning).sample.to(x_t.dtype)
            ) / alpha.sqrt()


def plain_noise(process, x0, noise, timesteps):
    alpha = process.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise


def plain_assistant_step(models, batch, method, accelerator):
    """Backpropagate the error of the assistant's noise prediction on the generator's samples."""
    conditioning = models.family.encode_prompts(models.pipeline, batch.prompts, **models.encoding)
    with accelerator.autocast():
        with torch.no_grad():
            x0 = plain_sample(models, batch.z[:, 0], method.generator_timesteps[0], conditioning)
        x_t = plain_noise(models.process, x0, batch.noise, batch.timesteps)
        guess = models.assistant(x_t, batch.timesteps, **conditioning).sample.to(x_t.dtype)
    accelerator.backward(torch.nn.functional.mse_loss(guess, batch.noise))
    return {}


def plain_generator_step(models, batch, terms, method, accelerator):
    """Backpropagate the sum of the method's own losses in one pass; frozen weights get no gradient."""
    conditioning, null = script.encode(models, batch.prompts, method.guided)
    process, timesteps = models.process, batch.timesteps
    a, s = process.coefficients(timesteps)
    frozen = [parameter for parameter in models.assistant.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    with accelerator.autocast():
        x0 = plain_sample(models, batch.z[:, 0], method.generator_timesteps[0], conditioning)
        x_t = plain_noise(process, x0, batch.noise, timesteps)
        with torch.set_grad_enabled(method.full):
            d_assistant = plain_prediction(models.assistant, process, x_t, timesteps, conditioning)
            d_plain = plain_prediction(models.reference, process, x_t, timesteps, conditioning)
            d_reference = d_plain
            if method.guided:
                with torch.set_grad_enabled(method.full and method.cfg_mode == "in"):
                    d_null = plain_prediction(models.reference, process, x_t, timesteps, null)
                if method.cfg_mode == "in":
                    d_reference = d_null + method.cfg_scale * (d_plain - d_null)
    divergence = script.score_divergence_loss if method.divergence == "score" else script.kl_divergence_loss
    loss = divergence(x0, d_assistant, d_reference, a, s, method)
    if method.cfg_mode == "out" and method.guided:
        loss = loss + script.implicit_reward_loss(
            x0, d_plain - d_null, d_plain, a, s, method.cfg_scale, method)
    for scale, reward in models.trained_rewards.values():
        images = models.family.decode(models.reward_vae, x0).clamp(0, 1)
        loss = loss - scale * reward(images, batch.prompts)
    accelerator.backward(loss.mean())
    for parameter in frozen:
        parameter.requires_grad_(True)
    return {}


def plain(way):
    """Use float32 weights, as is usual under autocast, and PyTorch's default memory format and AdamW."""
    contiguous(way)
    default_adamw(way)
    for network in networks(way):
        network.float()
    way.steps = {"assistant_step": plain_assistant_step, "generator_step": plain_generator_step}


# ------------------------------------------------------------------------------------- ours with one change


def networks(way):
    return [getattr(way.run.models, name) for name in ("reference", "assistant", "generator")]


def contiguous(way):
    for module in (*networks(way), way.run.models.reward_vae):
        module.to(memory_format=torch.contiguous_format)


def default_adamw(way):
    for name, optimizer in way.run.optimizers.items():
        (group,) = optimizer.param_groups
        kept = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        way.run.optimizers[name] = torch.optim.AdamW(group["params"], **kept)


def two_forwards(way):
    """Predict conditionally and unconditionally with the reference in two forwards instead of one."""
    reference = way.run.models.reference
    forward = reference.forward

    def in_turns(x_t, timesteps, **conditioning):
        if len(x_t) == way.run.args.train_batch_size:
            return forward(x_t, timesteps, **conditioning)
        samples = []
        for half in range(2):
            part = functools.partial(lambda half, value: value.chunk(2)[half], half)
            samples.append(forward(part(x_t), part(timesteps), **script.tree_map(part, conditioning)).sample)
        return SimpleNamespace(sample=torch.cat(samples))
    reference.forward = in_turns


def compiled_blocks(way):
    for network in networks(way):
        getattr(network, "base", network).compile_repeated_blocks()


def one_sample(way):
    """Let the assistant reuse the sample of the generator's update, as DMD2 does; noise stands in for it."""
    step = way.steps["assistant_step"]

    def without_generator(*given):
        with mock.patch.object(script, "generate", lambda generator, family, process, z, *_: z[:, 0]):
            return step(*given)
    way.steps["assistant_step"] = without_generator


# ------------------------------------------------------------------------------------------------- measuring


class Flops(TorchDispatchMode):
    """Count FLOPs by PyTorch's registry; its FlopCounterMode hooks modules, which breaks autograd.grad."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # to models that look whether a mask is all ones
        output = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output


WAYS = {"ours": lambda way: None} | {way.__name__: way for way in (
    plain, contiguous, default_adamw, two_forwards, compiled_blocks, one_sample)}


class Way:
    """One implementation: its own training run and its measurements."""

    def __init__(self, name, args, process, accelerator):
        args = copy.copy(args)
        if name == "plain":
            args.shared_base = None
        set_seed(0)
        with random_weights(args, accelerator.device):
            models = script.load_models(script.FAMILY, args, process, script.find_rewards(args), accelerator)
        self.name, self.accelerator, self.seconds = name, accelerator, []
        terms, observers = script.build_terms(args, models)
        self.run = script.TrainingRun(args, models, terms, observers, script.Prompts(PROMPTS, 0), accelerator)
        self.steps = {step: getattr(script, step) for step in ("assistant_step", "generator_step")}
        WAYS[name](self)

    def iterate(self, **functions):
        with mock.patch.multiple(script, **self.steps | functions):
            script.train_step(self.run)
        self.run.logs = {}

    def timed(self):
        self.seconds.append(clocked(self.accelerator.device, self.iterate)[0])

    def gradients(self):
        """Return {network: {name: gradient}} for one batch, without an update."""
        run, found = self.run, {}
        models, samples = run.models, range(run.args.train_batch_size)
        noise = script.sample_noise(0, "generator", 0, samples, models.latent_shape, run.method,
                                    models.process, self.accelerator.device)
        batch = script.Batch(*noise, [run.prompts.at(index) for index in samples])
        for name, terms in (("assistant", []), ("generator", [run.terms.values()])):
            self.steps[f"{name}_step"](models, batch, *terms, run.method, self.accelerator)
            found[name] = {key: value.grad.cpu() for key, value in run.parameters[name].items()}
            run.optimizers[name].zero_grad(set_to_none=True)
        return found

    def count(self):
        """Return the FLOPs of one iteration, and [calls, samples] of the networks' forwards and backwards."""
        counts, handles = {}, []

        def add(key, samples):
            counts[key] = [value + more for value, more in zip(counts.get(key, (0, 0)), (1, samples))]

        def note(name):
            def after(module, given, output):
                sample = output.sample
                add(f"{name} forward", len(sample))
                if sample.requires_grad:
                    sample.register_hook(lambda gradient: add(f"{name} backward", len(gradient)))
            return after

        for name in ("generator", "assistant", "reference"):
            network = self.accelerator.unwrap_model(getattr(self.run.models, name))
            handles.append(network.register_forward_hook(note(name)))
        with Flops() as flops:
            self.iterate()
        for handle in handles:
            handle.remove()
        return flops.total, counts

    def parts(self, rounds):
        """Return median seconds of an iteration's parts; the generator's step includes both gradients."""
        spent, found = {}, []

        def timed(name, function):
            def run(*given):
                seconds, output = clocked(self.accelerator.device, function, *given)
                spent[name] = spent.get(name, 0) + seconds
                return output
            return run

        functions = {name: timed(name, function) for name, function in self.steps.items()}
        for term in self.run.terms.values():
            term.gradient = timed(f"{term.name}_gradient", term.gradient)
        for _ in range(rounds):
            spent.clear()
            self.iterate(**functions)
            found.append(dict(spent))
        for term in self.run.terms.values():
            del term.gradient
        return {name: statistics.median(values[name] for values in found) for name in found[0]}


@contextlib.contextmanager
def random_weights(args, device):
    """Create models of the real dimensions from their configurations, directly on the device."""
    with device if args.dry_run else contextlib.nullcontext():
        with memory.configurations_only() if args.dry_run else contextlib.nullcontext():
            yield


def clocked(device, function, *given, **more):
    """Call the function and return (seconds, its result), synchronising the device before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    output = function(*given, **more)
    wait()
    return time.perf_counter() - start, output


def matrix_product(device, dtype, rounds=10):
    """Return the FLOP/s of square matrix products, the best of three sizes and `rounds` rounds."""
    best = 0
    for size in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048):
        one, other = torch.randn(2, size, size, device=device, dtype=dtype)
        for _ in range(rounds):
            best = max(best, 2 * size**3 / clocked(device, torch.matmul, one, other)[0])
    return best


def inference(args, process, device, dtype, rounds):
    """Return {steps: seconds} of the pipeline's call: 50 steps with guidance, and one step without."""
    with random_weights(args, device):
        pipeline = script.load_pipeline(script.FAMILY, args, dtype)
    pipeline.to(device).set_progress_bar_config(disable=True)
    size = {"prompt": PROMPTS[:1], "height": args.resolution, "width": args.resolution}
    calls = {50: (pipeline.scheduler, {"num_inference_steps": 50, "guidance_scale": 7.5}),
             1: (process.exported_scheduler(pipeline.scheduler),
                 {"num_inference_steps": 1, "timesteps": args.generator_timesteps, "guidance_scale": 0})}
    seconds = {steps: [] for steps in calls}
    for _ in range(rounds + 1):
        for steps, (scheduler, more) in calls.items():
            pipeline.scheduler = scheduler
            seconds[steps].append(clocked(device, pipeline, **size, **more)[0])
    return {steps: statistics.median(values[1:]) for steps, values in seconds.items()}


def count(own, args, process):
    """Print the counts of --count."""
    accelerator = memory.meta_accelerator(args.mixed_precision)
    device = accelerator.device
    with memory.meta_kernels(script):
        for name in own.ways:
            way = Way(name, args, process, accelerator)
            flops, counts = way.count()
            print(f"{name:6} {flops / 1e12:.3f} TFLOP\n       {listed(counts)}")
        models, family = way.run.models, script.FAMILY
        latents = torch.zeros(1, *models.latent_shape, device=device)

        def encode():
            return family.encode_prompts(models.pipeline, PROMPTS[:1], **models.encoding)
        parts, conditioning = [], encode()
        with torch.no_grad(), accelerator.autocast():
            for part in (encode,
                         lambda: models.reference(latents, latents[:, 0, 0, 0].long(), **conditioning),
                         lambda: family.decode(models.pipeline.vae, latents)):
                with Flops() as flops:
                    part()
                parts.append(flops.total / 1e12)
    text, unet, vae = parts
    print(f"pipeline: text {text:.3f} TFLOP, UNet {unet:.3f}, decoder {vae:.3f}; one step"
          f" {(text + unet + vae) / (2 * text + 100 * unet + vae):.2%} of 50 guided ones")


def listed(counts):
    return ", ".join(f"{kind} {calls} ({samples} samples)"
                     for kind, (calls, samples) in sorted(counts.items()))


def difference(one, other):
    """Return the norm of the difference between two gradients, relative to the norm of the second."""
    apart, whole = (sum(values.double().square().sum() for values in tensors)
                    for tensors in ([one[key] - value for key, value in other.items()], other.values()))
    return (apart / whole).sqrt().item()


def measure(ways, rounds):
    """Return {way: its figures}; the ways take turns."""
    figures = {way.name: {"gradients": way.gradients()} for way in ways}
    for round in range(rounds + 2):
        for way in ways:
            way.timed()
    for way in ways:
        flops, counts = way.count()
        figures[way.name] |= {"seconds": statistics.median(way.seconds[2:]), "flops": flops, "counts": counts,
                              "parts": way.parts(max(rounds // 2, 2))}
    return figures


def main():
    own, flags = parse_args()
    global script
    name, given = MODELS[own.model]
    script = importlib.import_module(f"train_diff_instruct_star_{name}")
    args = script.parse_args(script.FAMILY, ["--dry_run", *given, *flags])
    args.dry_run = own.count or not own.model.startswith("shapes")  # build models from configurations
    if args.dry_run:
        args.generator_init = "reference"
    process = script.check_models(script.FAMILY, args)
    if own.count:
        return count(own, args, process)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    device, half = accelerator.device, accelerator.mixed_precision == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    if accelerator.num_processes > 1 and own.ways != ["ours"]:
        script.exit_with_error("--ways: only ours can be measured with several processes")
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()} CPU"
    print(f"{own.model}, batch {args.train_batch_size}, {args.resolution} pixels, {dtype}, {name},"
          f" {accelerator.num_processes} x {torch.get_num_threads()} threads, torch {torch.__version__},"
          f" diffusers {diffusers.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    peak = matrix_product(device, dtype)
    generated = inference(args, process, device, dtype, 3)
    figures = {}
    for names in [own.ways] if own.model.startswith("shapes") else [[way] for way in own.ways]:
        ways = [Way(name, args, process, accelerator) for name in names]
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        figures |= measure(ways, own.rounds)
        if cuda and len(names) == 1:
            figures[names[0]]["memory"] = (torch.cuda.max_memory_allocated() / 2**30,
                                           torch.cuda.max_memory_reserved() / 2**30)
        del ways
    print(f"matrix product of {dtype}: {peak / 1e12:.2f} TFLOP/s")
    for name, figure in figures.items():
        memory = ", peak {:.1f} GiB, {:.1f} reserved".format(*figure["memory"]) if "memory" in figure else ""
        print(f"{name:6} {figure['seconds']:.4f} s, {figure['flops'] / 1e12:.3f} TFLOP,"
              f" {figure['flops'] / figure['seconds'] / peak:.1%} of the matrix product's{memory}")
        print("       " + ", ".join(f"{part} {value:.4f} s" for part, value in figure["parts"].items()))
        print("       " + listed(figure["counts"]))
    ours = figures.pop("ours", None)
    for name, figure in figures.items() if ours else ():
        apart = ", ".join(f"{network} {difference(ours['gradients'][network], gradients):.1e}"
                          for network, gradients in figure["gradients"].items())
        print(f"ours / {name}: {ours['seconds'] / figure['seconds']:.3f}; gradients differ by {apart} of"
              " their norm")
    print(f"pipeline: 50 guided steps {generated[50]:.3f} s, one step {generated[1]:.4f} s,"
          f" {generated[1] / generated[50]:.2%}")


if __name__ == "__main__":
    main()
