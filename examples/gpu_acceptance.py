"""Check on one GPU, without the hub, everything that cannot be checked on a CPU: `make gpu`.

    python examples/gpu_acceptance.py                      # all parts; meant for one GPU of 80 GB
    python examples/gpu_acceptance.py --only lora export   # run these parts again

The models have the real sizes and random weights. They are stored in --work_dir, which needs 40 GB, in memory
if /dev/shm has room. Each part is a process that is stopped after 8 minutes. When it ends, it appends a line
to results.jsonl in --output_dir, and a later call continues with the parts that have none. The script prints
a line for each check, passed or short of its goal, and a table at the end. Without a GPU, every part runs in
a small form on the shapes world and reports what it leaves out.
"""

import argparse
import gc
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from utils.card import read_validation  # noqa: E402


CONFIGS, ASSETS = ROOT / "examples" / "configs", ROOT / "examples" / "shapes" / "assets"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SD15 = "SD1.5" if GPU else "shapes world"
SECONDS = 480
# For every process: the hub is offline, and the sitecustomize.py in PYTHONPATH watches the process.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | (
    {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if GPU else {"ACCELERATE_USE_CPU": "true"})
WATCH = """import os
if "WATCH_SYNC" in os.environ or "MEMORY_GB" in os.environ:
    import torch
    if "MEMORY_GB" in os.environ:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(float(os.environ["MEMORY_GB"]) * 1e9 / whole)
    if "WATCH_SYNC" in os.environ:
        torch.cuda.set_sync_debug_mode("warn")
"""
LORA = ["--generator_lora_rank=64", "--assistant_lora_rank=64"]
EIGHT_BIT = ["--use_8bit_adam"] if importlib.util.find_spec("bitsandbytes") else []


class Part:
    """Results of a part: (check, figure, goal, whether it passes or None), printed as they are added."""

    def __init__(self, work):
        self.work, self.checks, self.ends = work, [], time.perf_counter() + SECONDS - 20

    def add(self, check, figure, goal="", passed=None):
        self.checks.append((check, figure, goal, passed))
        word = {True: "pass", False: "FALL SHORT", None: "noted"}[passed]
        print(f"{word}: {check}: {figure}" + (f" (goal: {goal})" if goal else ""), flush=True)

    def leave_out(self, what):
        self.add(what, "left out: no GPU")

    def run(self, *command, **environment):
        """Run a Python or bash script of the repository; returns its output, raises an error if it fails."""
        program = ["bash"] if command[0].endswith(".sh") else [sys.executable]
        (self.work / "watch").mkdir(exist_ok=True)
        (self.work / "watch" / "sitecustomize.py").write_text(WATCH)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | ENVIRONMENT | {
            "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, [
                str(self.work / "watch"), os.environ.get("PYTHONPATH")]))} | environment
        process = subprocess.Popen(
            [*program, str(ROOT / command[0]), *map(str, command[1:])], cwd=self.work, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            out, error = process.communicate(timeout=max(self.ends - time.perf_counter(), 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and its children, which would keep using the GPU
            raise
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {(error or out)[-1500:]}")
        return out + error


def attempt(function):
    """Return whether a function succeeds, and `runs` or its error."""
    try:
        function()
        return True, "runs"
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


# ------------------------------------------------------------------------------------------------- models


KINDS = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
         "text_encoder": transformers.CLIPTextModel,
         "text_encoder_2": transformers.CLIPTextModelWithProjection}


def tokenizer(folder, length=77):
    """Write a byte-level CLIP tokenizer with CLIP's two special tokens at the end of 49,408, as in CLIP."""
    from tokenizers import pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    vocabulary += [f"<unused-{index}>" for index in range(49406 - len(vocabulary))]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": length, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def random_model(kind, config, folder=None, seed=0):
    """Create a random float16 model from a configuration, and save it if a folder is given."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float16)
    with DEVICE:
        model = kind.from_config(config) if issubclass(kind, diffusers.ModelMixin) else kind(config)
    torch.set_default_dtype(torch.float32)
    if folder:
        model.save_pretrained(folder)
    return model


def models_of(family, work):
    """Return the flags that name a family's models, made at the first call; small ones without a GPU."""
    if not GPU:
        sibling = "_sdxl" if family == "sdxl" else ""
        return [f"--pretrained_model_name_or_path={ASSETS / f'teacher{sibling}'}",
                f"--pretrained_vae_model_name_or_path={ASSETS / f'teacher{sibling}' / 'vae'}",
                f"--generator_init={ASSETS / f'one_step{sibling}'}", "--resolution=40", "--cfg_scale=2",
                f"--reward_model_name_or_path={ASSETS / 'reward'}", "--generator_timesteps=999",
                "--reward_scale=25"]
    folder, clip = work / family, work / "clip_h"
    if not (clip / "whole").exists():
        config = transformers.CLIPConfig.from_pretrained(CONFIGS / "clip_h")
        random_model(transformers.CLIPModel, config, clip)
        transformers.CLIPProcessor(image_processor=transformers.CLIPImageProcessor(),
                                   tokenizer=tokenizer(clip)).save_pretrained(clip)
        (clip / "whole").touch()
    if not (folder / "whole").exists():
        shutil.copytree(CONFIGS / family, folder, dirs_exist_ok=True)
        for part in sorted(path.parent for path in folder.glob("*/config.json")):
            kind = KINDS[part.name]
            config = (kind.load_config(part) if issubclass(kind, diffusers.ModelMixin)
                      else kind.config_class.from_pretrained(part))
            random_model(kind, config, part)
            if "encoder" in part.name:
                tokenizer(folder / part.name.replace("text_encoder", "tokenizer"))
        start = random_model(diffusers.UNet2DConditionModel,
                             diffusers.UNet2DConditionModel.load_config(folder / "unet"), seed=1)
        torch.save(start.state_dict(), work / f"{family}_1step_unet_fp16.bin")  # the format of DMD2's weights
        (folder / "whole").touch()
        torch.cuda.empty_cache()
    return [f"--pretrained_model_name_or_path={folder}", f"--reward_model_name_or_path={clip}",
            f"--pretrained_vae_model_name_or_path={folder / 'vae'}",
            f"--generator_init={work / f'{family}_1step_unet_fp16.bin'}"]


def prompts_file(work):
    (work / "prompts.txt").write_text("a lighthouse in a storm\na raccoon in a spacesuit\na red star\n")
    return f"--prompts_file={work / 'prompts.txt'}"


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------- parts


def kernels(part):
    """Operations whose limits or results differ on a GPU."""
    def upsampling(size):
        values = torch.zeros(size, 256, 512, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        values = values.to(memory_format=torch.channels_last)
        torch.autograd.grad(F.interpolate(values, scale_factor=2.0).sum(), values)

    if GPU:
        runs, figure = attempt(lambda: upsampling(7))
        part.add("the decoder's last upsampling at 1024 pixels, batch 7, backward", figure, "runs", runs)
        part.add("the same at batch 8, which training decodes in two chunks",
                 attempt(lambda: upsampling(8))[1])
    else:
        part.leave_out("the decoder's last upsampling at 1024 pixels")
    side = 128 if GPU else 8
    query = torch.randn(1, 1, side**2, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    runs, figure = attempt(lambda: torch.autograd.grad(
        F.scaled_dot_product_attention(query, query, query).sum(), query))
    part.add(f"attention of head size 512 over {side**2} places, backward", figure, "runs", runs)
    images = torch.rand(1, 3, 8 * side, 8 * side, device=DEVICE, requires_grad=True)
    runs, figure = attempt(lambda: torch.autograd.grad(
        F.interpolate(images, 2 * side, mode="bicubic", antialias=True).sum(), images))
    part.add("antialiased bicubic, backward", figure, "runs", runs)
    script = importlib.import_module("train_diff_instruct_star_sd15")
    ended = []
    settings = argparse.Namespace(adam_beta1=0.0, adam_beta2=0.99, adam_epsilon=1e-8, adam_weight_decay=0.01,
                                  use_8bit_adam=False)
    makers = (lambda weights: torch.optim.AdamW(weights, lr=1e-2, betas=(0.0, 0.99), fused=True),
              lambda weights: script.make_optimizer(settings, weights, 1e-2))
    for make in makers:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 64, 3, 3, device=DEVICE, dtype=torch.float64))
        optimizer = make([weight])
        for _ in range(4):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        ended.append(weight.detach())
    part.add("fused AdamW and ours without first moments, float64, differ by",
             f"{(ended[0] - ended[1]).abs().max():.1e}", "0", torch.equal(*ended))
    try:
        adam = importlib.import_module("bitsandbytes.optim").AdamW8bit
    except ImportError:
        return part.add("8-bit Adam", "left out: bitsandbytes is not installed")
    weight = torch.nn.Parameter(torch.randn(128, 128, device=DEVICE))
    weight.grad = torch.randn_like(weight)
    runs, figure = attempt(adam([weight], lr=1e-2).step)
    part.add("8-bit Adam", figure, "runs", runs)


def step(part, name, flags, ways, goals):
    """Check an iteration's time and share of the peak rate, and its memory against the estimate."""
    flags = ["--mixed_precision=bf16", "--gradient_checkpointing", *flags] if GPU else []
    printed = part.run("examples/benchmark_step.py", f"--model={'sdxl' if GPU else 'shapes'}",
                       f"--rounds={4 if GPU else 1}", "--ways", *ways, *flags)
    name = name if GPU else "shapes world"
    found = re.findall(r"^(\w+) +([\d.]+) s, ([\d.]+) TFLOP, ([\d.]+)% of the matrix product's"
                       r"(?:, peak ([\d.]+) GiB, ([\d.]+) reserved)?", printed, re.MULTILINE)
    for way, seconds, tflop, share, peak, reserved in found:
        goal, passed = "", None
        if way in goals.get("share", ()) and GPU:
            goal, passed = "at least 55%", float(share) >= 55
        part.add(f"{name}, {way}: {seconds} s, {float(tflop) / float(seconds):.3g} TFLOP/s, share of a matrix"
                 " product's rate", f"{share}%", goal, passed)
    for way, ratio in re.findall(r"^ours / (\w+): ([\d.]+)", printed, re.MULTILINE):
        goal = "at most 0.7" if way == "plain" and GPU else ""
        part.add(f"{name}, ours / {way}, seconds", ratio, goal, float(ratio) <= 0.7 if goal else None)
    if not GPU:
        return part.leave_out(f"{name}: peak memory against --dry_run")
    peak, reserved = (float(value) for value in found[0][4:])
    configs = [f"--pretrained_model_name_or_path={CONFIGS / 'sdxl'}",
               f"--pretrained_vae_model_name_or_path={CONFIGS / 'sdxl' / 'vae'}",
               f"--reward_model_name_or_path={CONFIGS / 'clip_h'}", "--generator_init=reference"]
    printed = part.run("train_diff_instruct_star_sdxl.py", "--dry_run", *configs, *flags)
    estimated = float(re.search(r"one GPU: ([\d.]+) GiB", printed)[1])
    part.add(f"{name}, peak allocated against --dry_run's {estimated} GiB; reserved {reserved}",
             f"{peak} GiB", "within 10%", abs(peak / estimated - 1) <= 0.1)
    if "memory" in goals:
        part.add(f"{name}, peak", f"{peak} GiB", f"at most {goals['memory']} GiB", peak <= goals["memory"])


def full(part):
    """SDXL, all weights, 8-bit Adam, batch 2, on one GPU of 80 GB."""
    if not GPU:
        return part.leave_out("all weights of SDXL")
    step(part, f"SDXL, all weights, batch 2{'' if EIGHT_BIT else ', no bitsandbytes'}",
         [*EIGHT_BIT, "--train_batch_size=2"], ["ours"], {"memory": 79})


def compiled(part):
    """All weights of SDXL at batch 2, with compiled blocks."""
    if not GPU:
        return part.leave_out("all weights of SDXL with compiled blocks")
    step(part, "SDXL, all weights, batch 2, compiled blocks", [*EIGHT_BIT, "--train_batch_size=2"],
         ["compiled_blocks"], {"share": ["compiled_blocks"]})


def lora(part):
    """SDXL, LoRAs on one shared base, against the plain way."""
    step(part, "SDXL, LoRAs, batch 1", [*LORA, "--shared_base", "--train_batch_size=1"], ["ours", "plain"],
         {"memory": 16})


def lora_2(part):
    """SDXL, LoRAs on one shared base, at batch 2."""
    if not GPU:
        return part.leave_out("LoRAs of SDXL at batch 2")
    step(part, "SDXL, LoRAs, batch 2", [*LORA, "--shared_base", "--train_batch_size=2"], ["ours"], {})


def launch(part):
    """The 24 GB launch script: three updates under a limit of 24 GB, and where it waits for the device."""
    out = part.work / "launched"
    shutil.rmtree(out, ignore_errors=True)
    watch = {"WATCH_SYNC": "1", "MEMORY_GB": "24"} if GPU else {}
    printed = part.run("examples/sdxl_lora_24gb.sh", *models_of("sdxl", part.work), prompts_file(part.work),
                       "--output_dir", out, "--max_train_steps=3", "--logging_steps=1",
                       "--validation_steps=3", "--gradient_accumulation_steps=2",
                       "--mixed_precision=" + ("bf16" if GPU else "no"), **watch)
    part.add("sdxl_lora_24gb.sh, three updates" + (" under 24 GB" if GPU else ""),
             f"{metrics(out)[-2]['seconds_per_step']:.2f} s each", "runs",
             (out / "model_index.json").exists())
    if not GPU:
        return part.leave_out("waits for the device, the limit of 24 GB")
    waits = sorted(set(re.findall(r"(\w+\.py:\d+): UserWarning: called a synchronizing", printed)))
    part.add("places that wait for the device", ", ".join(waits) or "none")


def resume(part):
    """A LoRA run that is stopped and resumed, against an uninterrupted one."""
    common = [*models_of("sd15", part.work), prompts_file(part.work), *LORA, "--train_batch_size=2",
              "--logging_steps=1", "--learning_rate=1e-5", "--mixed_precision=" + ("bf16" if GPU else "no")]
    last = []
    for name, stages in (("alone", [3]), ("resumed", [2, 3])):
        out = part.work / name
        shutil.rmtree(out, ignore_errors=True)
        for steps in stages:
            part.run("train_diff_instruct_star_sd15.py", *common, f"--output_dir={out}",
                     f"--max_train_steps={steps}", "--resume_from_checkpoint=latest")
        last.append(metrics(out)[-1])
    names = [name for name in last[0] if name.startswith(("reward", "grad", "loss", "y_norm"))]
    apart = max(abs(last[0][name] - last[1][name]) / (abs(last[0][name]) + 1e-8) for name in names)
    part.add(f"{SD15}, LoRAs, resumed at step 2: metrics of step 3 differ by at most", f"{apart:.1e} of each",
             "0.01", apart <= 0.01)


def gradients(part):
    """Gradients at x0 in bf16 against float32, with the assistant moved away from the reference."""
    script = importlib.import_module("train_diff_instruct_star_sdxl")
    family = script.FAMILY
    torch.backends.cudnn.allow_tf32 = False  # otherwise float32 is not exact
    found, x0 = {}, None
    for precision in ("no", "bf16"):
        args = script.parse_args(family, [
            "--dry_run", *models_of("sdxl", part.work), f"--mixed_precision={precision}",
            "--gradient_checkpointing", *(["--resolution=512"] if GPU else [])])
        args.generator_init = "reference" if GPU else args.generator_init
        accelerator = Accelerator(cpu=not GPU, mixed_precision=precision)
        process = script.check_models(family, args)
        models = script.load_models(family, args, process, script.find_rewards(args), accelerator)
        with torch.no_grad():
            for index, value in enumerate(script.trainable_parameters(models.assistant).values()):
                noise = torch.randn(value.shape, generator=script.seeded_rng(0, "moved", 0, index))
                value += 0.05 * value.std().nan_to_num() * noise.to(DEVICE)
        batch = script.Batch(*script.sample_noise(0, "check", 0, [0], models.latent_shape,
                                                  script.method_of(args), models.process, DEVICE),
                             ["a lighthouse in a storm"])
        conditioning, null = script.encode(models, batch.prompts, True)
        a, s = models.process.coefficients(batch.timesteps)
        if x0 is None:
            with torch.no_grad():
                x0 = script.generate(models.generator, family, models.process, batch.z,
                                     args.generator_timesteps, conditioning)
        for mode in ("in", "out"):
            args.cfg_mode = mode
            terms, _ = script.build_terms(args, models)
            graph_terms = [term for term in terms if term.needs_graph]
            x_t = (a * x0 + s * batch.noise).requires_grad_()
            with accelerator.autocast():
                d_assistant = script.predict(models.assistant, family, models.process, x_t, batch.timesteps,
                                             conditioning)
                d_reference, d_null = script.predict_reference(
                    models, x_t, batch.timesteps, conditioning, null,
                    any(term.needs_null for term in graph_terms))
            predictions = script.Predictions(x0, x_t, a, s, d_assistant, d_reference, d_null,
                                             len(graph_terms))
            if mode == "out":
                found[precision, "y without guidance"] = (d_assistant - d_reference).detach().double().cpu()
            del d_assistant, d_reference, d_null  # `predictions` holds the graphs alone
            for term in terms:
                value, _ = term.gradient(batch, predictions, None)
                predictions.release_graph(term)
                if term.name != "reward" or mode == "in":
                    name = "reward" if term.name == "reward" else f"{term.name}, guidance {mode}"
                    found[precision, name] = value.double().cpu()
        del models, predictions, terms, graph_terms, x_t
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for precision, name in found if precision == "no"]:
        one, other = found["no", name].flatten(), found["bf16", name].flatten()
        cosine = F.cosine_similarity(one, other, dim=0).item()
        if name.startswith("y "):
            part.add(f"{name}: norm, and of its error in bf16",
                     f"{one.norm():.3g}, {(one - other).norm():.3g}")
            continue
        part.add(f"gradient at x0 of {name}, bf16 against float32: norms {one.norm():.3g},"
                 f" {other.norm():.3g}; cosine", f"{cosine:.4f}", "above 0.98", cosine > 0.98)


def sharding(part):
    """--sharding fsdp in one process (NCCL), saved and resumed."""
    out = part.work / "sharded"
    shutil.rmtree(out, ignore_errors=True)
    for steps in (1, 2):
        part.run("train_diff_instruct_star_sd15.py", *models_of("sd15", part.work), prompts_file(part.work),
                 "--sharding=fsdp", "--train_batch_size=1", "--logging_steps=1", f"--output_dir={out}",
                 "--gradient_checkpointing", f"--max_train_steps={steps}", "--resume_from_checkpoint=latest",
                 "--checkpoints_total_limit=1", "--mixed_precision=" + ("bf16" if GPU else "no"),
                 WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    step = metrics(out)[-1]["step"]
    part.add(f"{SD15}, --sharding fsdp with one process, resumed", f"step {step}", "step 2",
             step == 2 and (out / "model_index.json").exists())


def export(part):
    """The launch script's exported pipeline against training's images; scorers against their packages."""
    out = part.work / "launched"
    if not (out / "model_index.json").exists():
        launch(part)
    script = importlib.import_module("train_diff_instruct_star_sdxl")
    args = json.loads((out / "args.json").read_text())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    script.load_extra("decoding", "--reward_vae").reward_vae(  # tiled like the run's
        argparse.Namespace(**args), pipeline, torch.float32, script.load)
    side = args["resolution"] // pipeline.vae_scale_factor
    z = torch.randn(4, side, side, generator=script.seeded_rng(args["seed"], "validation", 0, 0))
    image = pipeline(args["validation_prompts"][0], latents=z[None].to(DEVICE), height=args["resolution"],
                     width=args["resolution"], num_inference_steps=1, guidance_scale=0,
                     timesteps=args["generator_timesteps"], output_type="pt").images[0].cpu()
    _, first = read_validation(out, 3)[0]
    first = first.resize(image.shape[:0:-1], Image.Resampling.NEAREST)  # small ones are enlarged
    shown = torch.frombuffer(bytearray(first.tobytes()), dtype=torch.uint8).view(*image.shape[1:], 3) / 255
    apart = (image - shown.movedim(2, 0)).abs().mean().item()
    part.add("the exported pipeline in float32 against training's validation image, mean difference",
             f"{apart:.4f}", "at most 0.02", apart <= 0.02)
    if not GPU or not all(map(importlib.util.find_spec, ("hpsv2", "ImageReward"))):
        return part.add("scorers in batches against their packages", "left out: no GPU, or no packages")
    printed = part.run("examples/benchmark_rewards.py", "--random_weights")
    for reward, ratio in re.findall(r"^(\S+) +ours, batches of \d+ +[\d.]+ images/s +([\d.]+) x$", printed,
                                    re.MULTILINE):
        part.add(f"{reward} in batches, times the package's images a second", ratio, "at least 5",
                 float(ratio) >= 5)


def quickstart(part):
    """The quickstart of the shapes world."""
    if not GPU:
        return part.leave_out("the quickstart: make quickstart runs it")
    out = part.work / "quickstart"
    part.run("examples/shapes/quickstart.py", "--output_dir", out)
    (row,) = re.findall(r"^\| 0 \| .*", (out / "report.md").read_text(), re.MULTILINE)
    gain = float(re.search(r"\| \+([\d.]+) \(", row)[1])
    part.add("the quickstart's gain in true preference", f"{gain}", "at least 0.5", gain >= 0.5)


PARTS = {function.__name__: function for function in (
    kernels, full, compiled, lora, lora_2, resume, sharding, launch, gradients, export, quickstart)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="Run these parts, even if already done.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu_acceptance"), help="Results.")
    parser.add_argument("--work_dir", type=Path, help="Folder for models and runs (default: in memory).")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work_dir is None:
        roomy = Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 45e9
        args.work_dir = Path("/dev/shm/gpu_acceptance") if GPU and roomy else args.output_dir / "work"
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args


def main():
    args = parse_args()
    results = args.output_dir / "results.jsonl"
    if args.part:
        part, started = Part(args.work_dir.resolve()), time.perf_counter()
        try:
            PARTS[args.part](part)
        except (Exception, SystemExit) as error:  # a script refuses its flags by SystemExit
            part.add(args.part, f"{type(error).__name__}: {str(error)[-1500:]}", "ends", False)
        finally:  # delete what no later part reads
            for name in ("alone", "resumed", "sharded"):
                shutil.rmtree(part.work / name, ignore_errors=True)
        line = {"part": args.part, "seconds": round(time.perf_counter() - started), "checks": part.checks,
                "device": torch.cuda.get_device_name() if GPU else "CPU", "torch": torch.__version__,
                "diffusers": diffusers.__version__, "date": time.strftime("%Y-%m-%d")}
        with open(results, "a") as file:
            file.write(json.dumps(line) + "\n")
        return
    results.touch()
    lines = {line["part"]: line for line in map(json.loads, results.read_text().splitlines())}
    wanted = args.only or list(PARTS)
    for name in args.only or [name for name in PARTS if name not in lines]:
        print(f"-- {name}: {PARTS[name].__doc__}", flush=True)
        own = [sys.executable, __file__, "--part", name, "--output_dir", str(args.output_dir),
               "--work_dir", str(args.work_dir)]
        try:
            subprocess.run(own, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            print(f"FALL SHORT: {name}: stopped after {SECONDS} s; a later call starts it again", flush=True)
    lines = {line["part"]: line for line in map(json.loads, results.read_text().splitlines())}
    rows = ["| part | check | figure | goal | |", "| --- | --- | --- | --- | --- |"]
    for name in filter(lines.get, PARTS):
        for check, figure, goal, passed in lines[name]["checks"]:
            word = {True: "pass", False: "falls short", None: ""}[passed]
            rows.append(f"| {name} | {check} | {figure.splitlines()[-1]} | {goal} | {word} |")
    made_with = sorted({f"`{line['device']}`, torch {line['torch']}, diffusers {line['diffusers']},"
                        f" {line['date']}" for line in lines.values()})
    table = "\n".join([*made_with, "", *rows]) + "\n"
    (args.output_dir / "table.md").write_text(table)
    print("\n" + table)
    missed = [name for name in wanted if name not in lines
              or any(check[3] is False for check in lines[name]["checks"])]
    if missed:
        sys.exit(f"error: falls short or is missing: {', '.join(missed)}")


if __name__ == "__main__":
    main()
