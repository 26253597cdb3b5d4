#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Draw a benchmark's prompts with text-to-image models, score the pictures, compare: a table and a page.

    accelerate launch eval_benchmarks.py --benchmark parti --dtype bfloat16 --output_dir results/parti \\
        --model "SDXL --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0" \\
        --model "DI* --pretrained_model_name_or_path outputs/di-star-sdxl --timesteps 399 --guidance_scale 0"

Flags of a model outside of --model hold for every model; without --model they are the one model. The same
command continues a run that was killed: what is scored is not drawn again. Another run into the same
--output_dir adds its models to the comparison. Every prompt's noise is a function of (--seed, its place in
the benchmark), so that batches, processes and --limit change no picture.
"""

import argparse
import contextlib
import copy
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

from utils.programs import Parser, fail, first_line, non_negative, positive, whole


# ------------------------------------------------------------------------------------------------ settings

SCORES = {"parti": ["imagereward", "aesthetic", "pickscore", "clip"], "hpsv2": ["hpsv2.1"],
          "coco30k": ["imagereward", "aesthetic", "pickscore", "clip"],
          "prompts": ["imagereward", "aesthetic", "pickscore", "clip", "hpsv2.1"]}
DTYPES = ("float32", "float16", "bfloat16")
THUMBNAIL = 192  # pixels, of the page's pictures
WEIGHTS_FILES = (".safetensors", ".bin", ".pt", ".pth")


def model_parser():
    parser = Parser(add_help=False, allow_abbrev=False)
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", help="any text-to-image pipeline of diffusers, folder or hub id")
    add("--revision", help="its revision")
    add("--variant", help="its weights' variant, such as fp16")
    add("--unet", help="another UNet: a folder, a hub id, or a weights file (on the hub owner/name/file)")
    add("--lora", help="a LoRA to load: a folder, a file or a hub id")
    add("--scheduler", help="a scheduler class of diffusers instead of its own: LCMScheduler, say")
    add("--dtype", choices=DTYPES, default="float32", help="of the pipeline. Default: float32")
    add("--num_inference_steps", type=positive, help="steps; unless given 50")
    add("--timesteps", type=whole, nargs="+", help="these instead: 399 for DMD2's and DI*'s one step")
    add("--guidance_scale", type=non_negative, help="unless given the pipeline's own; one-step models: 0")
    add("--resolution", type=positive, help="height and width; unless given the pipeline's own")
    add("--images", help="instead of a pipeline: a folder of pictures, by name in the order of the prompts;"
        " for hpsv2 one folder for each style in it")
    return parser


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, parents=[model_parser()],
                    usage="accelerate launch eval_benchmarks.py [flags]")
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="'NAME [flags]'", help="a model, with its name")
    add("--name", help="of the one model without --model; unless given its folder's or repository's")
    add("--benchmark", choices=SCORES, default="parti", help="see utils/benchmarks.py. Default: parti")
    add("--prompts_file", help="the benchmark's prompts instead of the hub's: a file, for hpsv2 a folder")
    add("--caption_column", default="text", help="column of coco30k's or your own prompts. Default: text")
    add("--limit", type=positive, help="only so many prompts, evenly spread, for a quick look")
    add("--scores", nargs="+", help="names of utils/rewards.py, NAME:PLACE for other weights, or your own"
        " MODULE:FACTORY; unless given the benchmark's")
    add("--fid_real", help="for FID: a folder of real pictures, or an .npz file of their mu and sigma")
    add("--inception", help="for FID: a TorchScript file, NVIDIA's inception-2015-12-05.pt")
    add("--fid_size", type=positive, default=512,
        help="pictures are resized to it first (SD1.5: 256). Default: 512")
    add("--output_dir", help="folders of models, table, page; unless given results/BENCHMARK")
    add("--seed", type=whole, default=0, help="of all noise. Default: 0")
    add("--batch_size", type=positive, default=1, help="pictures drawn and scored at once by each process")
    add("--save_images", action="store_true", help="keep the pictures as .png")
    return parser


def parse_models(args):
    """{name: settings} of --model and the flags outside of it; ends the run where they contradict."""
    parser = model_parser()
    shared = argparse.Namespace(**{action.dest: getattr(args, action.dest) for action in parser._actions})
    models = {}
    for text in args.model or [None]:
        try:
            name, *words = shlex.split(text) if text else [args.name]
        except ValueError as error:
            fail(f"--model {text!r} cannot be split into words: {error}")
        if text and (name.startswith("-") or not re.sub(r"\W", "", name)):
            fail(f"--model {text!r} must begin with the model's name")
        model = parser.parse_args(words, namespace=copy.copy(shared))
        places = [place for place in (model.pretrained_model_name_or_path, model.images) if place]
        if len(places) != 1:
            fail(f"{name or 'the model'} needs exactly one of --pretrained_model_name_or_path and --images")
        own = parser.parse_args(words) if text else shared
        drawing = [f"--{flag}" for flag, value in vars(own).items()
                   if flag != "images" and value != parser.get_default(flag)]
        if own.images and drawing:
            fail(f"{' '.join(drawing)} does nothing with --images, pictures that are made already")
        if own.timesteps and own.num_inference_steps not in (None, len(own.timesteps)):
            fail(f"--num_inference_steps {own.num_inference_steps} contradicts --timesteps, which are"
                 f" {len(own.timesteps)}")
        if own.num_inference_steps and not own.timesteps:
            model.timesteps = None
        model.num_inference_steps = len(model.timesteps or []) or model.num_inference_steps or 50
        if model.resolution and model.resolution % 8:
            fail(f"--resolution {model.resolution} is not divisible by 8")
        name = name or Path(places[0]).resolve().name
        if folder_of(name) in map(folder_of, models):
            fail(f"two models are named {name}: give each --model a name of its own")
        models[name] = model
    return models


def parse_args(argv=None):
    """Flags, with `models`: {name: settings}; ends the run (status 2) where they contradict each other."""
    args = build_parser().parse_args(argv)
    args.models = parse_models(args)
    if args.name and args.model:
        fail("--name is of a single model; with --model the name comes first in it")
    if args.benchmark in ("prompts", "coco30k") and not args.prompts_file:
        fail(f"--benchmark {args.benchmark} needs --prompts_file")
    if args.caption_column != "text" and args.benchmark not in ("prompts", "coco30k"):
        fail(f"--caption_column does nothing with --benchmark {args.benchmark}, which has columns of its own")
    if args.fid_size != 512 and not args.inception:
        fail("--fid_size does nothing without --inception and --fid_real")
    args.scores = args.scores or SCORES[args.benchmark]
    args.output_dir = args.output_dir or f"results/{args.benchmark}"
    if len(set(args.scores)) < len(args.scores):
        fail(f"--scores {' '.join(args.scores)}: one is given twice")
    if bool(args.fid_real) != bool(args.inception):
        fail("FID needs both --fid_real, real pictures, and --inception, NVIDIA's inception-2015-12-05.pt")
    for flag in ("fid_real", "inception"):
        if getattr(args, flag) and not Path(getattr(args, flag)).exists():
            fail(f"--{flag} {getattr(args, flag)} does not exist")
    return args


def folder_of(name):
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "model"


ARGS = parse_args() if __name__ == "__main__" else None

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

import diffusers
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torchvision.transforms.functional import to_tensor
from tqdm.auto import tqdm

from utils.benchmarks import load_benchmark, spread
from utils.fid import PICTURES, Inception, open_picture, prepare, reference_statistics
from utils.official import OfficialScorer
from utils.report import read_records, whole_lines, write_report
from utils.rewards import (
    ClipReward,
    ScoreHeadReward,
    find_file,
    find_reward,
    from_picture,
    misfits,
)


warnings.filterwarnings("ignore", message=".*torch_dtype")  # newer releases call the loaders' flag otherwise


# ------------------------------------------------------------------------------------------------ pictures


def noise_of(seed, index):
    """The generator of a prompt's noise, a function of its two arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def load_pipeline(model, device):
    """The pipeline of a model's settings; ends the run where it cannot be."""
    place = model.pretrained_model_name_or_path
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            place, torch_dtype=getattr(torch, model.dtype), variant=model.variant, revision=model.revision)
    except Exception as error:  # each library and format has its own
        fail(f"--pretrained_model_name_or_path {place} cannot be loaded: {first_line(error)}")
    if model.unet:
        pipeline.unet = load_unet(model, pipeline)
    if model.lora:
        path = Path(model.lora)
        try:
            if path.is_file():
                pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
            else:
                pipeline.load_lora_weights(model.lora)
        except Exception as error:
            fail(f"--lora {model.lora} cannot be loaded into {place}: {first_line(error)}")
        if not getattr(network_of(pipeline), "peft_config", None):  # diffusers only warns
            fail(f"--lora {model.lora} changes nothing of {place}: it is another model's")
    if model.scheduler:
        pipeline.scheduler = getattr(diffusers, model.scheduler).from_config(pipeline.scheduler.config)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it would paint pictures black, and those would be scored
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def network_of(pipeline):
    for name in ("unet", "transformer", "prior", "decoder"):
        if getattr(pipeline, name, None) is not None:
            return getattr(pipeline, name)
    fail(f"{type(pipeline).__name__} has neither a UNet nor a transformer")


# Copied from train_diff_instruct_star_sd15.py
def find_unet(name_or_path):
    """(configuration, subfolder) of the UNet in a UNet folder, a pipeline folder or a hub id of either."""
    with contextlib.suppress(OSError):
        return UNet2DConditionModel.load_config(name_or_path, subfolder="unet"), "unet"
    return UNet2DConditionModel.load_config(name_or_path), None


def load_unet(model, pipeline):
    place = model.unet
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        fail(f"--unet: {type(pipeline).__name__} has no UNet")
    try:
        if place.endswith(WEIGHTS_FILES):
            path = find_file(place, Path(place).name)
            safe = path.suffix == ".safetensors"
            weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
            wrong = misfits(weights, unet.state_dict())
            if wrong:
                fail(f"--unet {place} does not fit {model.pretrained_model_name_or_path}: {wrong}")
            unet.load_state_dict(weights)
            return unet
        found = UNet2DConditionModel.from_pretrained(place, subfolder=find_unet(place)[1],
                                                     torch_dtype=unet.dtype)
    except Exception as error:  # each format has its own
        fail(f"--unet {place} cannot be loaded: {first_line(error)}")
    if any(found.config[name] != unet.config[name] for name in (
            "cross_attention_dim", "in_channels", "addition_embed_type")):
        fail(f"--unet {place} is another model's than {model.pretrained_model_name_or_path}")
    return found


class Painter:
    """A pipeline that draws prompts from their own noise, and what that costs."""

    def __init__(self, model, seed, device):
        self.others = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # scorers, of no account
        self.pipeline, self.seed, self.device = load_pipeline(model, device), seed, device
        given = {"num_inference_steps": model.num_inference_steps, "guidance_scale": model.guidance_scale,
                 "height": model.resolution, "width": model.resolution, "timesteps": model.timesteps}
        self.settings = {name: value for name, value in given.items() if value is not None}
        wanted = {"prompt": "prompt", "generator": "generator"} | {
            name: "--resolution" if name in ("height", "width") else f"--{name}" for name in self.settings}
        taken = inspect.signature(self.pipeline.__call__).parameters
        for name, flag in wanted.items():
            if name not in taken:
                fail(f"{model.pretrained_model_name_or_path}: {type(self.pipeline).__name__} takes no {flag}")
        networks = {name: part for name, part in self.pipeline.components.items()
                    if isinstance(part, torch.nn.Module)}
        self.facts = {"type": "UNet" if hasattr(self.pipeline, "unet") else "DiT",
                      "parameters": sum(value.numel() for value in network_of(self.pipeline).parameters()),
                      "pipeline": type(self.pipeline).__name__, "steps": self.settings["num_inference_steps"],
                      "weights": {name: fingerprint(part) for name, part in networks.items()}}

    def __call__(self, prompts):
        """PIL pictures, and {seconds: of each, memory: bytes at the peak, None on a CPU}."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="invalid value encountered in cast")
            pictures = self.pipeline(prompt=[prompt.text for prompt in prompts], generator=[
                noise_of(self.seed, prompt.index) for prompt in prompts], **self.settings).images
        if on_gpu:
            torch.cuda.synchronize()
        return pictures, {"seconds": (time.perf_counter() - started) / len(prompts),
                          "memory": torch.cuda.max_memory_allocated() - self.others if on_gpu else None}


class Album:
    """Pictures made elsewhere."""

    def __init__(self, paths):
        self.paths, self.facts = paths, {}

    def __call__(self, prompts):
        pictures = [open_picture(self.paths[prompt.index]) for prompt in prompts]
        return pictures, {"seconds": None, "memory": None}


def find_pictures(folder, prompts):
    """The files of all prompts of a benchmark; ends the run where their numbers differ."""
    folders = {prompt.group: Path(folder) / prompt.group for prompt in prompts}
    absent = [group for group, place in folders.items() if not group or not place.is_dir()]
    if 0 < len(absent) < len(folders):
        fail(f"--images {folder} has no folder {absent[0]}, as for the other styles")
    if absent:
        folders = dict.fromkeys(folders, Path(folder))
    found = {place: sorted((path for path in place.glob("*") if path.suffix.lower() in PICTURES),
                           key=by_number) for place in folders.values()}
    for place, paths in found.items():
        wanted = sum(folders[prompt.group] == place for prompt in prompts)
        if len(paths) != wanted:
            fail(f"--images {place} has {len(paths)} pictures for {wanted} prompts")
    paths = {place: iter(paths) for place, paths in found.items()}
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

    A picture's line is written last; what a killed run left after the last whole line is cut off.
    """

    def __init__(self, folder, rank, width):
        self.lock = open(folder / f"lock-{rank}", "w")
        try:
            fcntl and fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"--output_dir {folder.parent}: another run is writing into {folder.name}; wait for its end")
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


def files_of(*places, endings=(*WEIGHTS_FILES, "config.json", "index.json")):
    """What tells whether files on this machine are the ones that were read: a hash of sizes and times."""
    found = {}
    for root in (Path(place).resolve() for place in places if place):
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


def scored(folder):
    """Whether a model's folder holds more than the settings of a run that ended before its first picture."""
    return any(path.stat().st_size for path in folder.glob("scores-*.jsonl"))


def claim(folder, settings):
    """The place of a model's settings; ends the run where its folder, or its company, is of another run."""
    for path in sorted(folder.parent.glob("*/settings.json")):
        if not scored(path.parent):
            continue
        try:
            held, own = json.loads(path.read_text()), path.parent == folder
        except ValueError as error:
            fail(f"--output_dir {folder.parent}: {path} is damaged: {first_line(error)}")
        names = settings if own else ("benchmark", "prompts", "seed", "fid")
        for name in names:
            if held.get(name) != settings[name]:
                what = {"files": "its files have changed", "fid": "for another FID"}.get(
                    name, f"its {name} was another")
                fail(f"--output_dir {folder.parent} holds other results, of {path.parent.name}: {what}; give"
                     " another folder" + (" or name" if own else ""))
    if folder.exists() and any(folder.iterdir()) and not (folder / "settings.json").exists():
        fail(f"--output_dir {folder.parent}: {folder} is not empty and holds no results")
    return folder / "settings.json"


# ------------------------------------------------------------------------------------------------ scoring


def prepared(scorer, picture):
    """What a scorer is given of a PIL picture."""
    if isinstance(scorer, OfficialScorer):
        return picture
    official = isinstance(scorer, (ClipReward, ScoreHeadReward))
    return from_picture(scorer, picture) if official else to_tensor(picture)


@torch.no_grad()
def score(scorer, inputs, prompts, device):
    if isinstance(scorer, OfficialScorer):
        return [scorer.score(*pair) for pair in zip(inputs, prompts)]
    if len({image.shape for image in inputs}) > 1:  # one's own score of pictures of several sizes
        return [score(scorer, [image], [prompt], device)[0] for image, prompt in zip(inputs, prompts)]
    return scorer(torch.stack(inputs).to(device), prompts).float().tolist()


def evaluate(name, model, prompts, everything, scorers, inception, args, accelerator):
    """Draw and score what is not yet scored of one model; each process every n-th of it."""
    folder = Path(args.output_dir) / folder_of(name)
    paths = find_pictures(model.images, everything) if model.images else []
    stamps = [stamp(path) for path in paths]
    done = {index for index, record in read_records(folder).items()
            if not stamps or record["file"] == stamps[index]}
    accelerator.wait_for_everyone()  # before anyone writes
    todo = [prompt for prompt in prompts if prompt.index not in done]
    mine = todo[accelerator.process_index::accelerator.num_processes]
    if not mine:
        return
    device = accelerator.device
    if model.images:
        draw = Album(paths)
    else:
        draw = Painter(model, args.seed, device)
    if accelerator.is_main_process:
        networks = scorers | {"inception": inception}
        write_once(folder / "facts.json", draw.facts | circumstances(networks, device))
    for kind in ("thumbnails", *(["images"] if args.save_images else [])):
        (folder / kind).mkdir(exist_ok=True)
    width = None
    if inception:
        width = inception(torch.zeros(1, 3, 299, 299, device=device)).shape[1]
    results = Results(folder, accelerator.process_index, width)

    def prepare_batch(pictures, batch):
        for picture, prompt in zip(pictures, batch):
            small = picture.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            small.save(folder / "thumbnails" / f"{prompt.index:05d}.jpg", quality=80)
            if args.save_images:
                picture.save(folder / "images" / f"{prompt.index:05d}.png")
        inputs = {key: [prepared(scorer, picture) for picture in pictures]
                  for key, scorer in scorers.items()}
        images = [prepare(picture, args.fid_size) for picture in pictures] if inception else None
        return inputs, images

    def finish(batch, cost, pending):
        inputs, images = pending.result()
        texts = [prompt.text for prompt in batch]
        scores = {key: score(scorer, inputs[key], texts, device) for key, scorer in scorers.items()}
        features = [None] * len(batch)
        if inception:
            features = inception(torch.stack(images).to(device)).cpu().numpy()
        for row, prompt in enumerate(batch):
            values = {key: value[row] for key, value in scores.items()}
            if not all(map(math.isfinite, values.values())):
                fail(f"--scores: of {name}, prompt {prompt.index} ({prompt.text!r:.60}): {values}")
            results.write({"index": prompt.index, "scores": values, **cost, "time": time.time(),
                           "file": stamps[prompt.index] if stamps else None}, features[row])

    def attempt(batch):
        try:
            return draw(batch)
        except Exception as error:  # each pipeline has its own
            if waiting:
                finish(*waiting)
            progress.close()
            what = "drew pictures that are not finite, try another --dtype" if isinstance(
                error, RuntimeWarning) else f"{type(error).__name__}: {first_line(error)}"
            fail(f"{name}: {what}")

    batches = [mine[start:start + args.batch_size] for start in range(0, len(mine), args.batch_size)]
    progress = tqdm(total=len(mine), desc=name, disable=not accelerator.is_local_main_process, mininterval=1)
    waiting = None  # the batch before, whose pictures are made ready while this one is drawn
    with contextlib.closing(results), ThreadPoolExecutor(1) as pool:
        if not model.images:
            attempt(batches[0])  # warm-up, not counted
        for batch in batches:
            pictures, cost = attempt(batch)
            if waiting:
                finish(*waiting)
            waiting = (batch, cost, pool.submit(prepare_batch, pictures, batch))
            progress.update(len(batch))
        finish(*waiting)
    progress.close()


def circumstances(scorers, device):
    """What results.json says of how a model was scored."""
    packages = ("torch", "diffusers", "transformers", "accelerate")
    return {"versions": {name: version(name) for name in packages},
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "scorers": {key: fingerprint(scorer) for key, scorer in scorers.items()
                        if isinstance(scorer, torch.nn.Module)}}


def load_scorers(loaders, device):
    scorers = {}
    for key, loader in loaders.items():
        try:
            scorer = loader(torch.float32)
        except Exception as error:  # each library and format has its own
            fail(f"--scores {key}: {first_line(error)}")
        if not callable(getattr(scorer, "score", scorer)):
            fail(f"--scores {key} made {scorer!r:.60}, not a function of images and prompts")
        scorers[key] = scorer.to(device).requires_grad_(False).eval() if isinstance(
            scorer, torch.nn.Module) else scorer
    return scorers


def find_scorers(args):
    """{name: what loads it}; ends the run where one cannot be found."""
    found = {}
    for key in args.scores:
        try:
            found[key] = find_reward(key)
        except Exception as error:
            fail(f"--scores {key}: {first_line(error)}")
    return found


def check(args):
    """All that can be told before a model loads: prompts, {place of settings: settings}, scorers' loaders."""
    try:
        everything = load_benchmark(args.benchmark, args.prompts_file, args.caption_column)
    except Exception as error:
        fail(f"--benchmark {args.benchmark}: {first_line(error)}")
    loaders = find_scorers(args)
    if args.inception:
        for package in ("cleanfid", "torch_fidelity"):
            if importlib.util.find_spec(package) is None:
                fail("FID needs two more packages: pip install clean-fid torch-fidelity")
    output_dir = Path(args.output_dir)
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents)
                    if folder.exists() or folder.is_symlink())
    if not existing.is_dir():
        fail(f"--output_dir {output_dir}: {existing} is a file or a broken link")
    digest = hashlib.blake2b(json.dumps([prompt.text for prompt in everything]).encode(), digest_size=8)
    common = {"benchmark": args.benchmark, "prompts": digest.hexdigest(), "seed": args.seed,
              "scores": args.scores, "fid": args.fid_real and [args.fid_size, files_of(
                  args.fid_real, args.inception, endings=(*PICTURES, *WEIGHTS_FILES, ".npz"))]}
    paths = {}
    for name, model in args.models.items():
        if model.images:
            if not Path(model.images).is_dir():
                fail(f"--images {model.images} is no folder")
            find_pictures(model.images, everything)
        else:
            place = model.pretrained_model_name_or_path
            try:
                DiffusionPipeline.load_config(place, revision=model.revision)
            except Exception as error:
                fail(f"--pretrained_model_name_or_path {place} holds no pipeline: {first_line(error)}")
            card = Path(place) / "README.md" if Path(place).is_dir() else place
            with contextlib.suppress(OSError, ValueError):  # a card is of help, not needed
                made_for = ModelCard.load(card).data.to_dict().get("generator_timestep")
                if made_for is not None and not model.timesteps:
                    fail(f"{name} draws in one step: give it --timesteps {made_for} --guidance_scale 0")
            if model.unet and not model.unet.endswith(WEIGHTS_FILES):
                try:
                    find_unet(model.unet)
                except OSError as error:
                    fail(f"--unet {model.unet} has no UNet that can be read: {first_line(error)}")
            for flag in ("unet", "lora"):
                held = getattr(model, flag)
                slashes = 2 if held and held.endswith(WEIGHTS_FILES) else 1
                if held and not Path(held).exists() and (held[0] in "./~" or held.count("/") < slashes):
                    fail(f"--{flag} {held} is neither here nor on the hub, owner/name (/file for weights)")
            kind = getattr(diffusers, model.scheduler, None) if model.scheduler else diffusers.SchedulerMixin
            if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
                fail(f"--scheduler {model.scheduler} is no scheduler of diffusers")
        scorers = [key.partition(":")[2] for key in args.scores]
        settings = common | {"name": name, "model": vars(model), "files": files_of(
            model.pretrained_model_name_or_path, model.unet, model.lora, *scorers)}
        paths[claim(output_dir / folder_of(name), settings)] = settings
    return everything, paths, loaders


def main(args):
    everything, settings, loaders = check(args)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # processes end at different times
    accelerator = Accelerator(kwargs_handlers=[patience])
    device = accelerator.device
    output_dir = Path(args.output_dir)
    for path, content in settings.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            if not scored(path.parent):
                for name in ("settings.json", "facts.json"):
                    (path.parent / name).unlink(missing_ok=True)
            write_once(path, content | {"place": len(list(output_dir.glob("*/settings.json")))})
    accelerator.wait_for_everyone()
    prompts = spread(everything, args.limit)
    scorers = load_scorers(loaders, device)
    inception = real = None
    if args.inception:
        try:
            inception = Inception(args.inception).to(device)
            with accelerator.main_process_first():
                made_with = str(next(iter(settings.values()))["fid"])
                real = reference_statistics(args.fid_real, inception, args.fid_size, device, 16,
                                            output_dir / "fid_real.npz", made_with)
        except ValueError as error:
            fail(first_line(error))
    for name, model in args.models.items():
        evaluate(name, model, prompts, everything, scorers, inception, args, accelerator)
        gc.collect()
        torch.cuda.empty_cache()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        flags = {name: value for name, value in vars(args).items() if name != "models"}
        digest = next(iter(settings.values()))["prompts"]
        print(write_report(output_dir, args.benchmark, digest, prompts, len(everything), real, flags))
        print(f"{output_dir / 'results.md'}, and with the pictures {output_dir / 'report.html'}")
    accelerator.end_training()


if __name__ == "__main__":
    main(ARGS)
