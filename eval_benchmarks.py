#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Generate images of a benchmark's prompts, score them, compare the models: a table and a page.

    accelerate launch eval_benchmarks.py --benchmark parti --dtype float16 --output_dir results/parti \\
        --model "SDXL --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0" \\
        --model "DI* --pretrained_model_name_or_path outputs/di-star-sdxl --timesteps 399 --guidance_scale 0"

A model's flags outside of --model hold for every model; without --model they are the one model. The same
command continues a run that was killed: what is scored is not sampled again. Another run into the same
--output_dir adds its models to the comparison. Every prompt's noise is a function of (--seed, its position in
the benchmark), so that batches, processes and --limit change no image.
"""

import argparse
import contextlib
import copy
import fcntl
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import re
import shlex
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

from utils import programs
from utils.programs import (
    Parser,
    blame,
    fail,
    non_negative_float,
    non_negative_int,
    positive_int,
    steps_at,
    timestep,
)


# ------------------------------------------------------------------------------------------------ settings

SCORES = {"parti": ["imagereward", "aesthetic", "pickscore", "clip"], "hpsv2": ["hpsv2.1"],
          "coco30k": ["imagereward", "aesthetic", "pickscore", "clip"],
          "prompts": ["imagereward", "aesthetic", "pickscore", "clip", "hpsv2.1"]}
THUMBNAIL = 192  # pixels, of the page's images
WEIGHTS_FILES = (".safetensors", ".bin", ".pt", ".pth")


def model_parser():
    parser = Parser(add_help=False)
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", help="Text-to-image pipeline of diffusers: a folder or hub id.")
    add("--revision", help="Revision of the pipeline on the hub.")
    add("--variant", help="Weights variant of the pipeline, such as fp16.")
    add("--unet", help="UNet that replaces the pipeline's: a folder, a hub id, or a weights file (on the hub"
        " owner/name/file).")
    add("--lora", help="LoRA to load: a folder, a file or a hub id.")
    add("--scheduler", help="Scheduler class of diffusers that replaces the pipeline's: LCMScheduler, say.")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="Pipeline's dtype.")
    add("--num_inference_steps", type=positive_int, help="Number of steps (default: 50).")
    add("--timesteps", type=timestep, nargs="+",
        help="Timesteps instead of a number of steps: 399 for the one step of DMD2 and DI*; of flow matching"
             " 1000 sigma.")
    add("--guidance_scale", type=non_negative_float,
        help="Guidance scale (default: the pipeline's own); one-step models need 0.")
    add("--resolution", type=positive_int, help="Height and width in pixels (default: the pipeline's own).")
    add("--images", help="Folder of images instead of a pipeline, by name in the order of the prompts; for"
        " hpsv2 it may hold one folder for each style.")
    return parser


def build_parser():
    parser = Parser(description=__doc__, parents=[model_parser()],
                    usage="accelerate launch eval_benchmarks.py [flags]")
    add = parser.add_argument
    add("--model", action="append", metavar="'NAME [flags]'",
        help="Name of a model and its flags; repeat the flag to compare several.")
    add("--name", help="Name of the one model without --model (default: its folder's or repository's).")
    add("--benchmark", choices=SCORES, default="parti", help="Benchmark; see utils/benchmarks.py.")
    add("--prompts_file", help="Prompts instead of the hub's: a file, for hpsv2 a folder.")
    add("--caption_column", default="text", help="Column of the prompts of coco30k or of your own.")
    add("--limit", type=positive_int, help="Use only N prompts, evenly spread, for a quick look.")
    add("--scores", nargs="+", help="Scores: names of utils/rewards.py, NAME:LOCATION for other weights,"
        " official:NAME, or your own MODULE:FACTORY (default: the benchmark's).")
    add("--fid_real", help="For FID: folder of real images, or .npz file of their mu and sigma.")
    add("--inception", help="For FID: a TorchScript file, NVIDIA's inception-2015-12-05.pt.")
    add("--fid_size", type=positive_int, default=512,
        help="For FID: size to which images are resized first (SD1.5: 256).")
    add("--output_dir", help="Folder of the models' scores, the table and the page (default:"
        " results/BENCHMARK).")
    add("--seed", type=non_negative_int, default=0, help="Seed of all noise.")
    add("--batch_size", type=positive_int, default=1, help="Images per process and batch.")
    add("--save_images", action="store_true", help="Keep the images as .png files.")
    return parser


def parse_models(args):
    """{name: settings} of --model and the flags outside of it; ends the run where they contradict."""
    parser, models = model_parser(), {}
    shared = argparse.Namespace(**{action.dest: getattr(args, action.dest) for action in parser._actions})
    for text in args.model or [None]:
        with blame(f"--model {text!r} cannot be split into words"):
            name, *words = shlex.split(text) if text else [args.name]
        if text and (name.startswith("-") or not re.search(r"\w", name)):
            fail(f"--model {text!r} must begin with the model's name")
        model = parser.parse_args(words, namespace=copy.copy(shared))
        own = parser.parse_args(words) if text else shared
        sources = [source for source in (model.pretrained_model_name_or_path, model.images) if source]
        ignored = [f"--{flag}" for flag, value in vars(own).items()
                   if flag != "images" and value != parser.get_default(flag)]
        steps, timesteps = own.num_inference_steps, own.timesteps or []
        for wrong, message in [
            (len(sources) != 1, f"{name or 'the model'} needs exactly one of --pretrained_model_name_or_path"
                                " and --images"),
            (own.images and ignored, f"{' '.join(ignored)} does nothing with --images, which exist already"),
            (steps and timesteps and steps != len(timesteps),
             f"--num_inference_steps {steps} contradicts --timesteps, which are {len(timesteps)}"),
            (model.resolution and model.resolution % 8,
             f"--resolution {model.resolution} is not divisible by 8"),
        ]:
            if wrong:
                fail(message)
        if steps and not timesteps:
            model.timesteps = None
        model.num_inference_steps = len(model.timesteps or []) or model.num_inference_steps or 50
        name = name or Path(sources[0]).resolve().name
        if folder_name(name) in map(folder_name, models):
            fail(f"two models are named {name}: give each --model a name of its own")
        models[name] = model
    return models


def parse_args(argv=None):
    """Flags, with `models`: {name: settings}; ends the run (status 2) where they contradict each other."""
    args = build_parser().parse_args(argv)
    args.models = parse_models(args)
    args.scores = args.scores or SCORES[args.benchmark]
    args.output_dir = args.output_dir or f"results/{args.benchmark}"
    for wrong, message in [
        (args.name and args.model, "--name is of a single model; with --model the name comes first in it"),
        (args.caption_column != "text" and args.benchmark in ("parti", "hpsv2"),
         f"--caption_column does nothing with --benchmark {args.benchmark}, which has columns of its own"),
        (args.fid_size != 512 and not args.inception,
         "--fid_size does nothing without --inception and --fid_real"),
        (len(set(args.scores)) < len(args.scores), f"--scores {' '.join(args.scores)}: one is given twice"),
        (bool(args.fid_real) != bool(args.inception),
         "FID needs both --fid_real, real images, and --inception, NVIDIA's inception-2015-12-05.pt"),
        *((not Path(getattr(args, flag) or ".").exists(), f"--{flag} {getattr(args, flag)} does not exist")
          for flag in ("fid_real", "inception")),
    ]:
        if wrong:
            fail(message)
    return args


def folder_name(name):
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "model"


ARGS = parse_args() if __name__ == "__main__" else None

import diffusers
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tqdm.auto import tqdm

from utils.benchmarks import load_benchmark, spread
from utils.fid import IMAGE_SUFFIXES, Inception, open_image, prepare, reference_statistics
from utils.official import find_official
from utils.report import read_records, whole_lines, write_report
from utils.rewards import find_file, find_reward, from_image


# ------------------------------------------------------------------------------------------------ sampling


def seeded_rng(seed, index):
    """The random numbers of a prompt's noise, a function of the two arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def load_pipeline(model, device):
    """The pipeline of a model's settings; ends the run where it cannot be loaded."""
    source = model.pretrained_model_name_or_path
    with blame(f"--pretrained_model_name_or_path {source} cannot be loaded"):
        pipeline = programs.load_pipeline(
            source, torch_dtype=getattr(torch, model.dtype), variant=model.variant, revision=model.revision)
    if model.unet:
        with blame(f"--unet {model.unet} cannot be loaded into {source}"):
            pipeline.unet = load_unet(model.unet, pipeline.unet)
    if model.lora:
        path = Path(model.lora)
        folder, file = (str(path.parent), path.name) if path.is_file() else (model.lora, None)
        with blame(f"--lora {model.lora} cannot be loaded into {source}"):
            pipeline.load_lora_weights(folder, weight_name=file)
            if not getattr(network_of(pipeline), "peft_config", None):  # diffusers only warns
                raise ValueError("it changes nothing, for it is another model's")
    if model.scheduler:
        pipeline.scheduler = getattr(diffusers, model.scheduler).from_config(pipeline.scheduler.config)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it would make images black, and those would be scored
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def network_of(pipeline):
    for name in ("unet", "transformer", "prior", "decoder"):
        if getattr(pipeline, name, None) is not None:
            return getattr(pipeline, name)
    fail(f"{type(pipeline).__name__} has neither a UNet nor a transformer")


def find_unet(name_or_path):
    """(configuration, subfolder) of the UNet in a UNet folder, a pipeline folder or a hub id of either."""
    with contextlib.suppress(OSError):
        return UNet2DConditionModel.load_config(name_or_path, subfolder="unet"), "unet"
    return UNet2DConditionModel.load_config(name_or_path), None


def load_unet(source, unet):
    """The UNet that takes the place of a pipeline's: of a folder, a hub id, or a file of its weights."""
    if source.endswith(WEIGHTS_FILES):
        path = find_file(source, Path(source).name)
        is_safe = path.suffix == ".safetensors"
        unet.load_state_dict(
            load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True))
        return unet
    found = UNet2DConditionModel.from_pretrained(source, subfolder=find_unet(source)[1],
                                                 torch_dtype=unet.dtype)
    for name in ("cross_attention_dim", "in_channels", "addition_embed_type"):
        if found.config[name] != unet.config[name]:
            raise ValueError(f"it is another model's, by its {name}")
    return found


class Sampler:
    """A pipeline that generates images from the prompts' own noise, and what that costs."""

    def __init__(self, model, seed, device):
        self.scorers = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # is not counted
        self.pipeline, self.seed, self.device = load_pipeline(model, device), seed, device
        given = {"num_inference_steps": model.num_inference_steps, "guidance_scale": model.guidance_scale,
                 "height": model.resolution, "width": model.resolution}
        given |= steps_at(self.pipeline, model.timesteps) if model.timesteps else {}
        self.settings = {name: value for name, value in given.items() if value is not None}
        kind, taken = type(self.pipeline).__name__, inspect.signature(self.pipeline.__call__).parameters
        for name in ("prompt", "generator", *self.settings):
            if name not in taken:
                fail(f"{model.pretrained_model_name_or_path}: {kind} takes no {name}")
        networks = {name: part for name, part in self.pipeline.components.items()
                    if isinstance(part, torch.nn.Module)}
        self.facts = {"type": "UNet" if hasattr(self.pipeline, "unet") else "DiT",
                      "parameters": sum(value.numel() for value in network_of(self.pipeline).parameters()),
                      "pipeline": kind, "steps": model.num_inference_steps,
                      "weights": {name: fingerprint(part) for name, part in networks.items()}}

    def __call__(self, prompts):
        """PIL images, and {seconds: of each, memory: bytes at the peak, None on a CPU}."""
        on_gpu = self.device.type == "cuda"
        rngs = [seeded_rng(self.seed, prompt.index) for prompt in prompts]
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="invalid value encountered in cast")
            try:
                images = self.pipeline(prompt=[prompt.text for prompt in prompts], generator=rngs,
                                       **self.settings).images
            except RuntimeWarning as error:
                raise ValueError("its images are not finite; try another --dtype") from error
        if on_gpu:
            torch.cuda.synchronize()
        return images, {"seconds": (time.perf_counter() - started) / len(prompts),
                        "memory": torch.cuda.max_memory_allocated() - self.scorers if on_gpu else None}


class ImageFolder:
    """Images made elsewhere, in the place of a `Sampler`."""

    def __init__(self, paths):
        self.paths, self.facts = paths, {}

    def __call__(self, prompts):
        return [open_image(self.paths[prompt.index]) for prompt in prompts], {"seconds": None, "memory": None}


def find_images(folder, prompts):
    """The files of all prompts of a benchmark; ends the run where their numbers differ."""
    folders = {prompt.group: Path(folder) / prompt.group for prompt in prompts}
    absent = [group for group, path in folders.items() if not group or not path.is_dir()]
    if 0 < len(absent) < len(folders):
        fail(f"--images {folder} has no folder {absent[0]}, as for the other styles")
    if absent:
        folders = dict.fromkeys(folders, Path(folder))
    found = {folder: sorted((path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES),
                            key=by_number) for folder in folders.values()}
    for folder, paths in found.items():
        wanted = sum(folders[prompt.group] == folder for prompt in prompts)
        if len(paths) != wanted:
            fail(f"--images {folder} has {len(paths)} images for {wanted} prompts")
    paths = {folder: iter(paths) for folder, paths in found.items()}
    return [next(paths[folders[prompt.group]]) for prompt in prompts]


def by_number(path):
    """2.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def fingerprint(network):
    """A hash of a network's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ results


class Results:
    """What one process has of one model: lines of scores, and features beside them, both only appended to.

    An image's line is written last; what a killed run left after the last whole line is cut off.
    """

    def __init__(self, folder, rank, width):
        self.lock = open(folder / f"lock-{rank}", "w")
        with blame(f"--output_dir {folder.parent}: another run is writing into {folder.name}",
                   "wait for its end"):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        whole = whole_lines(folder / f"scores-{rank}.jsonl")
        self.lines = open(folder / f"scores-{rank}.jsonl", "ab")
        self.lines.truncate(sum(map(len, whole)))
        self.features = None
        if width:
            self.features = open(folder / f"features-{rank}.f32", "ab")
            self.features.truncate(len(whole) * width * 4)

    def close(self):
        for file in filter(None, (self.lines, self.features, self.lock)):
            file.close()

    def write(self, record, features=None):
        if features is not None:
            self.features.write(features.astype("<f4").tobytes())
            self.features.flush()
        self.lines.write(json.dumps(record).encode() + b"\n")
        self.lines.flush()


def stamp(path):
    return [path.stat().st_size, path.stat().st_mtime_ns]


def files_digest(*locations, endings=(*WEIGHTS_FILES, "config.json", "index.json")):
    """A hash of the sizes and times of files on this machine, which tells whether they have changed."""
    found = {}
    for root in (Path(location).resolve() for location in locations if location):
        for path in [root] if root.is_file() else sorted([*root.glob("*"), *root.glob("*/*")]):
            if path.name.lower().endswith(endings) and not path.parent.name.startswith("checkpoint-"):
                found[str(path)] = stamp(path)
    return hashlib.blake2b(json.dumps(found).encode(), digest_size=8).hexdigest()


def write_once(path, content):
    """A JSON file, whole or not at all."""
    if not path.exists():
        aside = path.with_suffix(".unfinished")
        aside.write_text(json.dumps(content, indent=2) + "\n")
        aside.replace(path)


def has_scores(folder):
    """Whether a model's folder holds more than the settings of a run that ended before its first image."""
    return any(path.stat().st_size for path in folder.glob("scores-*.jsonl"))


def claim(folder, settings):
    """The path of a model's settings; ends the run where its folder, or one beside it, is of another run."""
    for path in filter(lambda path: has_scores(path.parent), sorted(folder.parent.glob("*/settings.json"))):
        own = path.parent == folder
        with blame(f"--output_dir {folder.parent}: {path} is damaged"):
            held = json.loads(path.read_text())
        for name in settings if own else ("benchmark", "prompts", "seed", "fid"):
            if held.get(name) != settings[name]:
                reason = {"files": "its files have changed", "fid": "for another FID"}.get(
                    name, f"its {name} was another")
                fail(f"--output_dir {folder.parent} holds other results, of {path.parent.name}: {reason};"
                     " give another folder" + (" or name" if own else ""))
    if folder.exists() and any(folder.iterdir()) and not (folder / "settings.json").exists():
        fail(f"--output_dir {folder.parent}: {folder} is not empty and holds no results")
    return folder / "settings.json"


# ------------------------------------------------------------------------------------------------ scoring


@torch.no_grad()
def score(scorer, images, prompts, device):
    """The scores of image tensors, a list of floats; one by one where their sizes differ."""
    if len({image.shape for image in images}) > 1:
        return [score(scorer, [image], [prompt], device)[0] for image, prompt in zip(images, prompts)]
    return scorer(torch.stack(images).to(device), prompts).float().tolist()


def evaluate(name, model, prompts, everything, scorers, inception, args, accelerator):
    """Sample and score what is not yet scored of one model; each process every n-th of it."""
    folder, device = Path(args.output_dir) / folder_name(name), accelerator.device
    paths = find_images(model.images, everything) if model.images else []
    stamps = [stamp(path) for path in paths]
    done = {index for index, record in read_records(folder).items()
            if not stamps or record["file"] == stamps[index]}
    accelerator.wait_for_everyone()  # before anyone writes
    todo = [prompt for prompt in prompts if prompt.index not in done]
    mine = todo[accelerator.process_index::accelerator.num_processes]
    if not mine:
        return
    sample = ImageFolder(paths) if model.images else Sampler(model, args.seed, device)
    if accelerator.is_main_process:
        scored_by = environment(scorers | {"inception": inception}, device)
        write_once(folder / "facts.json", sample.facts | scored_by)
    for kind in ("thumbnails", *(["images"] if args.save_images else [])):
        (folder / kind).mkdir(exist_ok=True)
    results = Results(folder, accelerator.process_index, inception and inception.width)

    def attempt(batch):
        with blame(name):
            try:
                return sample(batch)
            except Exception:
                progress.close()  # before the line of the error
                raise

    def prepare_batch(images, batch):
        """Write the files and make the scorers' inputs, on the CPU while the next batch is sampled."""
        for image, prompt in zip(images, batch):
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            small.save(folder / "thumbnails" / f"{prompt.index:05d}.jpg", quality=80)
            if args.save_images:
                image.save(folder / "images" / f"{prompt.index:05d}.png")
        inputs = {key: [from_image(scorer, image) for image in images] for key, scorer in scorers.items()}
        return inputs, [prepare(image, args.fid_size) for image in images] if inception else None

    def finish(batch, cost, prepared):
        inputs, crops = prepared.result()
        texts = [prompt.text for prompt in batch]
        scores = {key: score(scorer, inputs[key], texts, device) for key, scorer in scorers.items()}
        features = [None] * len(batch)
        if inception:
            features = inception(torch.stack(crops).to(device)).cpu().numpy()
        for row, prompt in enumerate(batch):
            values = {key: value[row] for key, value in scores.items()}
            if not all(map(math.isfinite, values.values())):
                fail(f"--scores: of {name}, prompt {prompt.index} ({prompt.text!r:.60}): {values}")
            results.write({"index": prompt.index, "scores": values, **cost, "time": time.time(),
                           "file": stamps[prompt.index] if stamps else None}, features[row])

    batches = [mine[start:start + args.batch_size] for start in range(0, len(mine), args.batch_size)]
    progress = tqdm(total=len(mine), desc=name, disable=not accelerator.is_local_main_process, mininterval=1)
    with contextlib.closing(results), ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as last, progress:
        for position, batch in enumerate(batches):
            if position == 0 and not model.images:
                attempt(batch)  # a warm-up that is not measured
            images, cost = attempt(batch)
            last.close()  # finishes the batch before, as does the end of this block, an error's too
            last.callback(finish, batch, cost, pool.submit(prepare_batch, images, batch))
            progress.update(len(batch))


def environment(scorers, device):
    """What results.json says of how a model was scored."""
    packages = ("torch", "diffusers", "transformers", "accelerate")
    return {"versions": {name: version(name) for name in packages},
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "scorers": {key: fingerprint(scorer) for key, scorer in scorers.items()
                        if isinstance(scorer, torch.nn.Module)}}


def load_scorers(loaders, device):
    scorers = {}
    for key, loader in loaders.items():
        with blame(f"--scores {key}"):
            scorer = loader(torch.float32)
            if not callable(scorer):
                raise ValueError(f"it is {scorer!r:.60}, not a function of images and prompts")
        is_module = isinstance(scorer, torch.nn.Module)
        scorers[key] = scorer.to(device).requires_grad_(False).eval() if is_module else scorer
    return scorers


def find_scorer(key):
    """What loads a score, a function of the dtype; `official:` has the packages' own."""
    kind, _, name = key.partition(":")
    return find_official(name) if kind == "official" else find_reward(key)


# ------------------------------------------------------------------------------------------------ main


def check_model(name, model):
    """End the run where a model's files are not there, as far as that can be told before they are loaded."""
    source = model.pretrained_model_name_or_path
    with blame(f"--pretrained_model_name_or_path {source} holds no pipeline"):
        DiffusionPipeline.load_config(source, revision=model.revision)
    card = Path(source) / "README.md" if Path(source).is_dir() else source
    with contextlib.suppress(OSError, ValueError):  # a card is of help, not needed
        made_for = ModelCard.load(card).data.to_dict().get("generator_timesteps")
        if made_for is not None and not model.timesteps:
            fail(f"{name} was trained for its own: give it --timesteps {' '.join(map(str, made_for))}"
                 " --guidance_scale 0")
    if model.unet and not model.unet.endswith(WEIGHTS_FILES):
        with blame(f"--unet {model.unet} has no UNet that can be read"):
            find_unet(model.unet)
    for flag in ("unet", "lora"):
        held = getattr(model, flag)
        if held and not Path(held).exists() and (held[0] in "./~" or "/" not in held):
            fail(f"--{flag} {held} is neither here nor on the hub, owner/name (/file for weights)")
    kind = getattr(diffusers, model.scheduler, None) if model.scheduler else diffusers.SchedulerMixin
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        fail(f"--scheduler {model.scheduler} is no scheduler of diffusers")


def check(args):
    """All that can be told before a model loads: prompts, {path of settings: settings}, scorers' loaders."""
    source = f" of --prompts_file {args.prompts_file}" if args.prompts_file else ""
    with blame(f"--benchmark {args.benchmark}{source}"):
        everything = load_benchmark(args.benchmark, args.prompts_file, args.caption_column)
    loaders = {}
    for key in args.scores:
        with blame(f"--scores {key}"):
            loaders[key] = find_scorer(key)
    if args.inception and not all(map(importlib.util.find_spec, ("cleanfid", "torch_fidelity"))):
        fail("FID needs two more packages: pip install clean-fid torch-fidelity")
    digest = hashlib.blake2b(json.dumps([prompt.text for prompt in everything]).encode(), digest_size=8)
    common = {"benchmark": args.benchmark, "prompts": digest.hexdigest(), "seed": args.seed,
              "scores": args.scores, "fid": args.fid_real and [args.fid_size, files_digest(
                  args.fid_real, args.inception, endings=(*IMAGE_SUFFIXES, *WEIGHTS_FILES, ".npz"))]}
    locations, settings = [key.partition(":")[2] for key in args.scores], {}
    for name, model in args.models.items():
        if not model.images:
            check_model(name, model)
        elif not Path(model.images).is_dir():
            fail(f"--images {model.images} is no folder")
        else:
            find_images(model.images, everything)
        files = files_digest(model.pretrained_model_name_or_path, model.unet, model.lora, *locations)
        own = common | {"name": name, "model": vars(model), "files": files}
        settings[claim(Path(args.output_dir) / folder_name(name), own)] = own
    return everything, settings, loaders


def load_inception(args, made_with, accelerator):
    """The network of FID's features and the statistics of the real images."""
    with blame(f"--inception {args.inception}"):
        inception = Inception(args.inception).to(accelerator.device)
        inception.width = inception(torch.zeros(1, 3, 299, 299, device=accelerator.device)).shape[1]
    with blame(f"--fid_real {args.fid_real}"), accelerator.main_process_first():
        real = reference_statistics(args.fid_real, inception, args.fid_size, accelerator.device, 16,
                                    Path(args.output_dir) / "fid_real.npz", made_with)
        if len(real["mu"]) != inception.width:
            raise ValueError(f"it has {len(real['mu'])} features, --inception {inception.width}")
    return inception, real


def main(args):
    for logging in (diffusers.utils.logging, transformers.utils.logging):  # which would report loading
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    everything, settings, loaders = check(args)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # processes end at different times
    accelerator = Accelerator(kwargs_handlers=[patience])
    output_dir, common = Path(args.output_dir), next(iter(settings.values()))
    for path, content in settings.items():
        with blame(f"--output_dir {output_dir}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            if not has_scores(path.parent):
                for name in ("settings.json", "facts.json"):
                    (path.parent / name).unlink(missing_ok=True)
            write_once(path, content | {"place": len(list(output_dir.glob("*/settings.json")))})
    accelerator.wait_for_everyone()
    prompts, scorers = spread(everything, args.limit), load_scorers(loaders, accelerator.device)
    inception = real = None
    if args.inception:
        inception, real = load_inception(args, str(common["fid"]), accelerator)
    for name, model in args.models.items():
        evaluate(name, model, prompts, everything, scorers, inception, args, accelerator)
        gc.collect()
        torch.cuda.empty_cache()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        flags = {name: value for name, value in vars(args).items() if name != "models"}
        print(write_report(output_dir, args.benchmark, common["prompts"], prompts, len(everything), real,
                           flags))
        print(f"{output_dir / 'results.md'}, and with the images {output_dir / 'report.html'}")
    accelerator.end_training()


if __name__ == "__main__":
    main(ARGS)
