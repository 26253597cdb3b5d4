#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Generate images for a benchmark's prompts, score them and compare models in a table and a web page.

    accelerate launch eval_benchmarks.py --benchmark parti --dtype float16 --output_dir results/parti \\
        --model "SDXL --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0" \\
        --model "DI* --pretrained_model_name_or_path outputs/di-star-sdxl --timesteps 399 --guidance_scale 0"

Model flags outside of --model apply to every model; without --model they describe the only model. The same
command continues a run that was killed: images that have scores are not sampled again. Another run with the
same --output_dir adds its models to the comparison. The noise of an image depends only on --seed, its number
and the position of its prompt in the benchmark, so that batches, processes and --limit change no image.
"""

import argparse
import contextlib
import copy
import errno
import fcntl
import gc
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

from utils import cli
from utils.cli import (
    Parser,
    exit_with_error,
    is_disk_full,
    network_name,
    network_of,
    non_negative_float,
    non_negative_int,
    positive_int,
    steps_at,
    timestep,
    write_atomically,
    write_json_atomically,
)


# ------------------------------------------------------------------------------------------------ settings

SCORES = {"parti": ["imagereward", "aesthetic", "pickscore", "clip"], "hpsv2": ["hpsv2.1"],
          "coco30k": ["imagereward", "aesthetic", "pickscore", "clip"],
          "coco10k": ["imagereward", "aesthetic", "pickscore", "clip"],
          **dict.fromkeys(("drawbench", "geneval", "dpg", "pickapic", "prompts"),
                          ["imagereward", "aesthetic", "pickscore", "clip", "hpsv2.1"])}
IMAGES_PER_PROMPT = {"geneval": 4, "dpg": 4}  # 1 for the others
FID_SIZES = {"coco30k": 256}  # pixels: DMD2's for SD1.5; for the others 512, DMD2's for SDXL
# Diversity is measured in the vision tower of the first of these that is among the scores.
TOWERS = ("clip", "aesthetic", "hpsv2.1", "hpsv2.0", "pickscore")
THUMBNAIL = 192  # pixels; longer side of the images on the page
LOCATIONS = ("pretrained_model_name_or_path", "unet", "lora", "images")  # flags that may be paths of files


@contextlib.contextmanager
def exit_on_full_disk():
    """Turn the error of a full disk, which each library words in its way, into one line."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            exit_with_error(f"disk full: {str(error):.300}; make room and give the same command again")
        raise


@contextlib.contextmanager
def exit_on_error(subject, remedy=""):
    """Turn any exception inside into a one-line error as utils/cli.py does, or into that of a full disk."""
    with cli.exit_on_error(subject, remedy), exit_on_full_disk():
        yield


def model_parser():
    parser = Parser(add_help=False)
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", help="Text-to-image pipeline of diffusers (folder or hub id).")
    add("--revision", help="Revision of the pipeline on the hub.")
    add("--variant", help="Variant of the pipeline's weights, such as fp16.")
    add("--unet", "--transformer", help="Replace the pipeline's UNet or transformer by this network (folder,"
        " hub id or weights file, owner/name/file on the hub).")
    add("--lora", help="Load this LoRA (folder, hub id or file, owner/name/file on the hub).")
    add("--scheduler", help="Replace the scheduler by this class of diffusers, such as LCMScheduler.")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="Pipeline dtype.")
    add("--num_inference_steps", type=positive_int, nargs="+",
        help="Number of steps; each of several values becomes a row (default: 50).")
    add("--timesteps", type=timestep, nargs="+",
        help="Timesteps to sample at, 1000 sigma for flow matching; one-step DMD2 and DI* need 399 (default:"
             " the scheduler's).")
    add("--guidance_scale", type=non_negative_float, nargs="+",
        help="Guidance scale, 0 for one-step models; each of several values becomes a row (default: the"
             " pipeline's own).")
    add("--resolution", type=positive_int, help="Height and width in pixels (default: the pipeline's own).")
    add("--max_sequence_length", type=positive_int,
        help="Number of prompt tokens that SD3's T5 and the like read (default: the pipeline's own).")
    add("--images", help="Score the images of this folder instead of a pipeline's, sorted by name in the"
        " order of the prompts; for hpsv2 it may contain one folder per style.")
    return parser


def build_parser():
    parser = Parser(description=__doc__, parents=[model_parser()],
                    usage="accelerate launch eval_benchmarks.py [flags]")
    add = parser.add_argument
    add("--model", action="append", metavar="'NAME [flags]'",
        help="Name a model and give its flags; repeat --model to compare several.")
    add("--name", help="Name of the only model, without --model (default: its folder's or repository's).")
    add("--benchmark", choices=SCORES, default="parti", help="Benchmark to run, see utils/benchmarks.py.")
    add("--prompts_file", help="Read the prompts from this file (a folder for hpsv2) instead of the hub.")
    add("--caption_column", default="text",
        help="Column of the prompts in the file of coco30k, coco10k or prompts.")
    add("--limit", type=positive_int, help="Use only this many prompts, evenly spread, for a quick look.")
    add("--scores", nargs="+", help="Scores to compute: a name in utils/rewards.py, NAME:LOCATION for other"
        " weights, official:NAME, or your own MODULE:FACTORY (default: the benchmark's).")
    add("--images_per_prompt", type=positive_int,
        help="Images to generate per prompt; with several, their diversity is measured (default: 4 for"
             " geneval and dpg, 1 for the others).")
    add("--fid_real", help="Compute FID to these images: a folder, an .npz file of their mu and sigma, or"
        " the name of a model in this comparison, its teacher.")
    add("--inception", help="TorchScript file of FID's network, NVIDIA's inception-2015-12-05.pt.")
    add("--fid_size", type=positive_int,
        help="Resize images to this many pixels before FID (default: 256 for coco30k, 512 for the others).")
    add("--patch_fid", action="store_true",
        help="Also compute FID of the central 299 pixels of the images, without resizing.")
    add("--hps_jpeg", action="store_true",
        help="Save images as JPEG of quality 75 and read them again before an hpsv2 score, as its official"
             " program does.")
    add("--output_dir", help="Folder for the scores, the table and the page (default: results/BENCHMARK).")
    add("--seed", type=non_negative_int, default=0, help="Seed of all noise.")
    add("--batch_size", type=positive_int, default=1, help="Images per batch, on each process.")
    add("--save_images", action="store_true", help="Save the images as .png files.")
    add("--export", choices=IMAGES_PER_PROMPT,
        help="Lay out the images for the benchmark's own program, and print the command that scores them"
             " there.")
    return parser


def parse_models(args):
    """Return {name: settings} from --model and the flags outside of it; contradictions end the run."""
    parser, models = model_parser(), {}
    shared = argparse.Namespace(**{action.dest: getattr(args, action.dest) for action in parser._actions})
    for_all = {flag for action in build_parser()._actions for flag in action.option_strings} - {
        flag for action in parser._actions for flag in action.option_strings}
    for text in args.model or [None]:
        with exit_on_error(f"--model {text!r} cannot be split into words"):
            words = shlex.split(text) if text else []
        named = [*itertools.takewhile(lambda word: not word.startswith("--"), words)]
        name, words = " ".join(named) if text else args.name, words[len(named):]
        if text and (name.startswith("-") or not re.search(r"\w", name)):
            exit_with_error(f"--model {text!r} must begin with the model's name")
        for flag in (word.partition("=")[0] for word in words):
            if flag in for_all:
                exit_with_error(f"--model {name!r}: {flag} is not a flag of one model; give it outside of"
                                " --model")
        model = parser.parse_args(words, namespace=copy.copy(shared))
        own = parser.parse_args(words) if text else shared
        sources = [source for source in (model.pretrained_model_name_or_path, model.images) if source]
        ignored = [f"--{flag}" for flag, value in vars(own).items()
                   if flag != "images" and value != parser.get_default(flag)]
        steps, timesteps = own.num_inference_steps or [], own.timesteps or []
        for wrong, message in [
            (len(sources) != 1, f"{name or 'the model'} needs exactly one of --pretrained_model_name_or_path"
                                " and --images"),
            (own.images and ignored, f"{' '.join(ignored)} has no effect with --images, which exist already"),
            (steps and timesteps and steps != [len(timesteps)],
             f"--num_inference_steps {' '.join(map(str, steps))} contradicts --timesteps, which lists"
             f" {len(timesteps)}"),
            (model.resolution and model.resolution % 8,
             f"--resolution {model.resolution} is not divisible by 8"),
        ]:
            if wrong:
                exit_with_error(message)
        if steps and not timesteps:
            model.timesteps = None
        name = name or Path(sources[0]).resolve().name
        if model.images:
            model.guidance_scale, model.num_inference_steps = None, None
        for row, one in expand_sweep(name, model).items():
            if folder_name(row) in map(folder_name, models):
                exit_with_error(f"two models are named {row}: give each --model its own name")
            models[row] = one
    return models


def expand_sweep(name, model):
    """Return {name: settings} of a model's sweep, an entry per guidance scale and number of steps."""
    if model.timesteps:
        model.num_inference_steps = [len(model.timesteps)]
    scales, counts, rows = model.guidance_scale or [None], model.num_inference_steps or [50], {}
    for scale, steps in itertools.product(scales, counts):
        words = [name, f"guidance {scale:g}"] if len(scales) > 1 else [name]
        one = copy.copy(model)
        one.guidance_scale, one.num_inference_steps = scale, steps
        if len(scales) * len(counts) > 1:
            one.sweep = name
        rows[", ".join(words + [f"{steps} steps"] * (len(counts) > 1))] = one
    return rows


def parse_args(argv=None):
    """Parse the flags and add `models`, {name: settings}; contradictions end the run with status 2."""
    args = build_parser().parse_args(argv)
    args.models = parse_models(args)
    args.scores = args.scores or SCORES[args.benchmark]
    args.output_dir = args.output_dir or f"results/{args.benchmark}"
    args.images_per_prompt = args.images_per_prompt or IMAGES_PER_PROMPT.get(args.benchmark, 1)
    args.save_images = args.save_images or bool(args.export)
    args.teacher = find_teacher(args) if args.fid_real else None
    for wrong, message in [
        (args.name and args.model, "--name is for a single model; with --model, the name precedes its flags"),
        (args.caption_column != "text" and (args.benchmark not in ("coco30k", "coco10k", "prompts")
                                            or Path(args.prompts_file or "").suffix == ".pkl"),
         f"--caption_column has no effect with --benchmark {args.benchmark} and --prompts_file"
         f" {args.prompts_file}, whose columns are fixed"),
        (args.fid_size and not args.inception,
         "--fid_size has no effect without --inception and --fid_real"),
        (args.patch_fid and not args.inception,
         "--patch_fid has no effect without --inception and --fid_real"),
        (args.patch_fid and Path(args.fid_real or "").is_file(),
         f"--patch_fid needs images, but --fid_real {args.fid_real} contains only statistics"),
        (args.hps_jpeg and not any(map(is_hps, args.scores)),
         "--hps_jpeg has no effect without an hpsv2 score; add hpsv2.1 to --scores"),
        (args.export and args.export != args.benchmark, f"--export {args.export} needs"
         f" --benchmark {args.export}, not {args.benchmark}"),
        (args.export == "dpg" and args.images_per_prompt > 4,
         f"--images_per_prompt {args.images_per_prompt}: DPG-Bench's program reads at most 4"),
        (len(set(args.scores)) < len(args.scores), f"--scores {' '.join(args.scores)}: a score is repeated"),
        (bool(args.fid_real) != bool(args.inception),
         "FID needs both --fid_real (real images) and --inception (NVIDIA's inception-2015-12-05.pt)"),
        (not Path(args.inception or ".").exists(), f"--inception {args.inception} does not exist"),
        (not args.teacher and (not Path(args.fid_real or ".").exists()
                               or Path(args.fid_real or ".", "settings.json").exists()),
         f"--fid_real {args.fid_real} is neither a folder of images nor a model in this comparison"),
    ]:
        if wrong:
            exit_with_error(message)
    args.fid_size = args.fid_size or FID_SIZES.get(args.benchmark, 512)
    return args


def is_hps(key):
    return key.removeprefix("official:").partition(":")[0] in ("hpsv2.1", "hpsv2.0")


def find_teacher(args):
    """Return the name of the model's folder that --fid_real refers to; None if it refers to images."""
    given, output_dir = Path(args.fid_real), Path(args.output_dir)
    if given.exists() and not (given / "settings.json").exists():
        return None
    held = {folder_name(name) for name in args.models}
    held |= {path.parent.name for path in output_dir.glob("*/settings.json")}
    inside = given.resolve().parent == output_dir.resolve()
    name = given.name if inside else folder_name(args.fid_real)
    return name if name in held else None


def folder_name(name):
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "model"


ARGS = parse_args() if __name__ == "__main__" else None

import diffusers
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from tqdm.auto import tqdm

from utils import starts
from utils.benchmarks import PROGRAMS, by_number, export, images_of, load_benchmark, spread
from utils.fid import (
    IMAGE_SUFFIXES,
    Inception,
    open_image,
    prepare,
    prepare_patch,
    reference_statistics,
)
from utils.official import find_official, through_jpeg
from utils.places import WEIGHTS_FILES, fault_of
from utils.report import (
    FILES,
    features_of,
    find_features,
    make_row,
    read_model,
    read_records,
    whole_lines,
    whole_rows,
    write_report,
)
from utils.rewards import find_reward, from_image


# ------------------------------------------------------------------------------------------------ sampling


def seeded_rng(seed, index, image=0):
    """Return the random generator of an image's noise, determined by the arguments alone."""
    place = f"{seed}/{index}" + f"/{image}" * bool(image)
    digest = hashlib.blake2b(place.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def load_pipeline(model, device):
    """Load the pipeline that a model's settings describe; failure ends the run."""
    source = model.pretrained_model_name_or_path
    with exit_on_error(f"--pretrained_model_name_or_path {source} cannot be loaded"):
        pipeline = cli.load_pipeline(
            source, torch_dtype=getattr(torch, model.dtype), variant=model.variant, revision=model.revision)
    component, network = network_of(pipeline)
    if model.unet:
        with exit_on_error(f"--unet {model.unet} cannot be loaded into {source}"):
            network = starts.replacement(model.unet, network, component, type(pipeline).__name__)
            setattr(pipeline, component, network)
    if model.lora:
        with exit_on_error(f"--lora {model.lora} cannot be loaded into {source}"):
            starts.load_lora(pipeline, network, component, model.lora)
            if not getattr(network, "peft_config", None):  # diffusers only warns
                raise ValueError("it changes nothing, because it belongs to another model")
    if model.scheduler:
        pipeline.scheduler = getattr(diffusers, model.scheduler).from_config(pipeline.scheduler.config)
    own, kind = pipeline.scheduler.config.get("prediction_type"), model.unet and starts.prediction_type_of(
        model.unet)
    if kind and own not in (None, kind):
        print(f"--unet {model.unet} predicts {kind}, and is read so; the pipeline's scheduler says {own}")
        pipeline.scheduler.register_to_config(prediction_type=kind)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it would black out images, and the black images would be scored
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


class Sampler:
    """Generate images from the prompts' own noise with a pipeline, and measure time and memory."""

    def __init__(self, model, seed, device):
        self.scorers = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # not counted
        self.pipeline, self.seed, self.device = load_pipeline(model, device), seed, device
        given = {"num_inference_steps": model.num_inference_steps, "guidance_scale": model.guidance_scale,
                 "height": model.resolution, "width": model.resolution,
                 "max_sequence_length": model.max_sequence_length}
        given |= steps_at(self.pipeline, model.timesteps) if model.timesteps else {}
        self.settings = {name: value for name, value in given.items() if value is not None}
        kind, taken = type(self.pipeline).__name__, inspect.signature(self.pipeline.__call__).parameters
        for name in ("prompt", "generator", *self.settings):
            if name not in taken:
                exit_with_error(f"{model.pretrained_model_name_or_path}: {kind} has no argument {name}")
        networks = {name: part for name, part in self.pipeline.components.items()
                    if isinstance(part, torch.nn.Module)}
        self.decoder_seconds = 0.0
        if hasattr(getattr(self.pipeline, "vae", None), "decode"):
            self.pipeline.vae.decode = self.timed(self.pipeline.vae.decode)
        self.facts = {"type": "UNet" if hasattr(self.pipeline, "unet") else "DiT",
                      "parameters": sum(value.numel() for value in network_of(self.pipeline)[1].parameters()),
                      "pipeline": kind, "steps": model.num_inference_steps,
                      "weights": {name: fingerprint(part) for name, part in networks.items()}}

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, decode):
        def timed_decode(*given, **settings):
            started = self.now()
            decoded = decode(*given, **settings)
            self.decoder_seconds += self.now() - started
            return decoded
        return timed_decode

    def __call__(self, prompts):
        """Return PIL images and {seconds, decoder_seconds, batch, memory (None on a CPU)} per image."""
        on_gpu = self.device.type == "cuda"
        rngs = [seeded_rng(self.seed, *prompt.key) for prompt in prompts]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.decoder_seconds, started = 0.0, self.now()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="invalid value encountered in cast")
            try:
                images = self.pipeline(prompt=[prompt.text for prompt in prompts], generator=rngs,
                                       **self.settings).images
            except RuntimeWarning as error:
                raise ValueError("the images are not finite; try another --dtype") from error
        return images, {"seconds": (self.now() - started) / len(prompts), "batch": len(prompts),
                        "decoder_seconds": self.decoder_seconds / len(prompts),
                        "memory": torch.cuda.max_memory_allocated() - self.scorers if on_gpu else None}


class ImageFolder:
    """Read images made elsewhere, with the interface of `Sampler`."""

    def __init__(self, paths):
        self.paths, self.facts = paths, {}

    def __call__(self, prompts):
        return [open_image(self.paths[prompt.key]) for prompt in prompts], {"seconds": None, "memory": None}


def find_images(folder, prompts):
    """Return {key of an image: its file} of a whole benchmark; a wrong number of files ends the run."""
    folders = {prompt.group: Path(folder) / prompt.group for prompt in prompts}
    absent = [group for group, path in folders.items() if not group or not path.is_dir()]
    if 0 < len(absent) < len(folders):
        exit_with_error(f"--images {folder} has no folder {absent[0]}, unlike for the other styles")
    if absent:
        folders = dict.fromkeys(folders, Path(folder))
    found = {folder: sorted((path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES),
                            key=by_number) for folder in folders.values()}
    for folder, paths in found.items():
        wanted = sum(folders[prompt.group] == folder for prompt in prompts)
        if len(paths) != wanted:
            exit_with_error(f"--images {folder} has {len(paths)} images, but the benchmark needs {wanted}:"
                            " --images_per_prompt for each prompt")
    paths = {folder: iter(paths) for folder, paths in found.items()}
    return {prompt.key: next(paths[folders[prompt.group]]) for prompt in prompts}


def fingerprint(network):
    """Return a hash of a network's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ results


class Results:
    """Append one process's records of one model: a row of each kind of features, then a line of scores.

    Whatever a killed run left after its last whole line or row is cut off, and so is what a full disk took of
    a record. The files are made with the first image, so that an empty file of scores is a damaged one.
    """

    def __init__(self, folder, rank, widths):
        with exit_on_error(f"--output_dir {folder.parent}"):
            self.lock = open(folder / f"lock-{rank}", "w")
        with exit_on_error(f"--output_dir {folder.parent}: another run is writing into {folder.name}",
                           "wait until it ends"):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.scores, self.files = folder / f"scores-{rank}.jsonl", {}
        self.paths = {kind: folder / f"{kind}-{rank}.rows" for kind in widths}
        self.widths = widths

    def open_files(self):
        """Open the files of features and scores, in the order of writing, and cut off what is not whole."""
        sizes = {path: whole_rows(path, self.widths[kind]) for kind, path in self.paths.items()}
        sizes[self.scores] = sum(map(len, whole_lines(self.scores)))
        for kind, (path, size) in zip((*self.paths, "scores"), sizes.items()):
            self.files[kind] = open(path, "ab", buffering=0)
            self.files[kind].truncate(size)

    def close(self):
        for file in (*self.files.values(), self.lock):
            file.close()

    def write(self, record, features):
        if not self.files:
            self.open_files()
        rows = {kind: make_row((record["index"], record["image"]), features[kind]) for kind in self.widths}
        rows["scores"] = json.dumps(record).encode() + b"\n"
        sizes = {kind: file.seek(0, os.SEEK_END) for kind, file in self.files.items()}
        try:
            for kind, row in rows.items():
                if self.files[kind].write(row) < len(row):  # a full disk takes a part first
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            error.filename = str(self.files[kind].name)  # a full disk's error names no file
            for kind, size in sizes.items():
                self.files[kind].truncate(size)
                if not size:
                    Path(self.files[kind].name).unlink()
            raise


def stamp(path):
    return [path.stat().st_size, path.stat().st_mtime_ns]


def digest_of(content):
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def write_image(folder, place, image, **settings):
    """Write a PIL image; returns {place: its size, time and hash}, by which a change is seen later."""
    content = io.BytesIO()
    image.save(content, **settings)
    write_atomically(folder / place, content.getvalue())
    return {place: [*stamp(folder / place), digest_of(content.getvalue())]}


def write_thumbnail(folder, prompt, image):
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return write_image(folder, thumbnail_of(prompt), small, format="JPEG", quality=80)


def thumbnail_of(prompt):
    return f"thumbnails/{prompt.name}.jpg"


def png_of(prompt):
    return f"images/{prompt.name}.png"


def is_unchanged(folder, place, record):
    """Whether an image's file is as it was when the image was scored; a copy with another time is."""
    path, known = folder / place, record.get("written", {}).get(place)
    if not path.is_file() or not path.stat().st_size:
        return False
    return known is None or known[:2] == stamp(path) or known[2] == digest_of(path.read_bytes())


def files_digest(*locations, endings=(*WEIGHTS_FILES, "config.json", "index.json")):
    """Return a hash of the sizes and modification times of local files, to detect changes."""
    found = {}
    for root in (Path(location).resolve() for location in locations if location):
        for path in [root] if root.is_file() else sorted([*root.glob("*"), *root.glob("*/*")]):
            if path.name.lower().endswith(endings) and not path.parent.name.startswith("checkpoint-"):
                found[str(path)] = stamp(path)
    return digest_of(json.dumps(found).encode())


def resolved(model):
    """Return a model's settings with the paths of local files in full, so that equal files compare equal."""
    return {flag: str(Path(value).resolve()) if flag in LOCATIONS and Path(value or "").exists() and value
            else value for flag, value in model.items()}


def read_results(output_dir):
    """Return {folder: model} of the models in the output folder; a damaged file ends the run."""
    with exit_on_error(f"--output_dir {output_dir}"):
        for path in (output_dir, *output_dir.glob("*/thumbnails"), *output_dir.glob("*/images")):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path} is not a folder")
        for path in (output_dir / name for name in FILES):
            if path.is_dir():
                raise ValueError(f"{path} is a folder, but a file is to be written there")
        return {path.parent: read_model(path.parent) for path in sorted(output_dir.glob("*/settings.json"))}


def find_reason(name, held, given):
    """Say why results with `held` as the setting `name` are not those of `given`; empty if they are."""
    if name == "model":
        held, given = resolved(held), resolved(given)
        flags = [f"another --{flag}" for flag in given if held.get(flag) != given[flag] and flag != "sweep"]
        return " and ".join(flags)
    reasons = {"files": "its files have changed", "fid": "the settings of FID differ",
               "diversity": "other --images_per_prompt or --scores for diversity", "prompts": "other prompts"}
    return reasons.get(name, f"another --{name}") if held != given else ""


def check_results_folder(folder, settings, results):
    """End the run if results in a model's folder, or in those beside it, are another run's."""
    for other, model in results.items():
        names = settings if other == folder else (
            "benchmark", "prompts", "seed", "fid", "hps_jpeg", "diversity")
        reasons = (find_reason(name, model["settings"].get(name), settings[name]) for name in names)
        if model["records"] and (reason := next(filter(None, reasons), "")):
            exit_with_error(f"--output_dir {folder.parent} holds other results, of {other.name}: {reason};"
                            " give another folder" + " or name" * (other == folder))
    if folder.exists() and not folder.is_dir():
        exit_with_error(f"--output_dir {folder.parent}: {folder} is not a folder")
    if folder.exists() and any(folder.iterdir()) and folder not in results:
        exit_with_error(f"--output_dir {folder.parent}: {folder} is not empty and contains no results")


def check_images(results, prompts, kinds, given, save_images):
    """End the run if features or .png files of the results are damaged and this run does not make them anew.

    Args:
        results: {folder: model}. kinds: of features that the flags ask for. given: folders of this run's
            models, whose missing features are computed, and with `save_images` their .png files.
    """
    chosen = {prompt.key: png_of(prompt) for prompt in prompts}
    for folder, model in results.items():
        records = {key: record for key, record in model["records"].items() if key in chosen}
        with exit_on_error(f"--output_dir {folder.parent}"):
            for path in folder.glob("*.f32") if kinds else []:
                raise ValueError(f"{path} is of an earlier version, whose features do not name their images;"
                                 " give another --output_dir")
            for kind in kinds if records and folder not in given else []:
                features_of(model | {"records": records}, kind)
            for key, record in records.items() if folder not in given or not save_images else []:
                path = folder / chosen[key]
                if path.exists() and not is_unchanged(folder, chosen[key], record):
                    raise ValueError(f"{path} was changed after it was scored; delete it, or give the flags"
                                     f" of {model['settings']['name']} again with --save_images")


# ------------------------------------------------------------------------------------------------ scoring


@torch.no_grad()
def score(key, scorer, images, prompts, device):
    """Score image tensors, one by one if their sizes differ; returns a list of floats."""
    if len({image.shape for image in images}) > 1:
        return [score(key, scorer, [image], [prompt], device)[0] for image, prompt in zip(images, prompts)]
    with exit_on_error(f"--scores {key}"):
        found = scorer(torch.stack(images).to(device), prompts)
        if not isinstance(found, torch.Tensor) or found.shape != (len(prompts),):
            shape = tuple(getattr(found, "shape", ()))
            raise ValueError(f"it returned a {type(found).__name__} of shape {shape}, not ({len(prompts)},)")
    return found.float().tolist()


def as_jpegs(images, files):
    """Pass PIL images through JPEG, except those that were read from a JPEG file."""
    return [image if file.lower().endswith((".jpg", ".jpeg")) else through_jpeg(image)
            for image, file in zip(images, files)]


class Features:
    """Compute features of images, for FID or diversity: `extract` of the batch that `prepare` makes."""

    def __init__(self, prepare, network, extract):
        self.prepare, self.network, self.extract = prepare, network, extract
        self.width = self(torch.stack([prepare(Image.new("RGB", (64, 64)))])).shape[1]

    @torch.no_grad()
    def __call__(self, inputs):
        """Return features (batch, width) of a batch of prepared images."""
        device = next((value.device for value in self.network.parameters()), inputs.device)
        return self.extract(inputs.to(device)).float().cpu().numpy()


def evaluate(name, model, prompts, everything, scorers, extractors, args, accelerator):
    """Sample and score the images of one model that have no scores; n processes take every n-th each."""
    folder, device = Path(args.output_dir) / folder_name(name), accelerator.device
    paths = find_images(model.images, everything) if model.images else {}
    stamps = {key: stamp(path) for key, path in paths.items()}
    held = read_records(folder)
    computed = [set(find_features(folder, held, kind)) for kind in extractors]

    def is_done(prompt):
        record = held.get(prompt.key)
        if not record or stamps and record["file"] != stamps[prompt.key]:
            return False
        has_png = is_unchanged(folder, png_of(prompt), record)  # of which a lost thumbnail is made
        return (all(prompt.key in keys for keys in computed) and (has_png or not args.save_images)
                and (has_png or is_unchanged(folder, thumbnail_of(prompt), record)))

    todo = [prompt for prompt in prompts if not is_done(prompt)]
    accelerator.wait_for_everyone()  # all have read before any process writes
    mine = todo[accelerator.process_index::accelerator.num_processes]
    if not mine:
        return
    sample = ImageFolder(paths) if model.images else Sampler(model, args.seed, device)
    if accelerator.is_main_process:
        facts, networks = dict(sample.facts), dict(scorers)
        if "features" in extractors:
            networks["inception"] = extractors["features"].network
            facts["nvidia_inception"] = networks["inception"].is_nvidia
        if not (folder / "facts.json").exists():
            write_json_atomically(folder / "facts.json", facts | environment(networks, device))
    for kind in ("thumbnails", *(["images"] if args.save_images else [])):
        (folder / kind).mkdir(exist_ok=True)
    results = Results(folder, accelerator.process_index, {
        kind: extractor.width for kind, extractor in extractors.items()})

    def attempt(batch):
        with exit_on_error(name):
            try:
                return sample(batch)
            except Exception:
                progress.close()  # before the error is printed
                raise

    def prepare_batch(images, batch):
        """Write the files and prepare the scorers' inputs on the CPU while the next batch is sampled."""
        written = [write_thumbnail(folder, prompt, image) for image, prompt in zip(images, batch)]
        for image, prompt, files in zip(images, batch, written):
            if args.save_images or (folder / png_of(prompt)).exists():
                files |= write_image(folder, png_of(prompt), image, format="PNG")
        sources = [str(paths.get(prompt.key, "")) for prompt in batch]
        inputs = {key: [from_image(scorer, image) for image in (
            as_jpegs(images, sources) if args.hps_jpeg and is_hps(key) else images)]
            for key, scorer in scorers.items()}
        return written, inputs, {kind: torch.stack([extractor.prepare(image) for image in images])
                                 for kind, extractor in extractors.items()}

    def finish(batch, cost, prepared):
        written, inputs, crops = prepared.result()
        texts = [prompt.text for prompt in batch]
        scores = {key: score(key, scorer, inputs[key], texts, device) for key, scorer in scorers.items()}
        features = {kind: extractor(crops[kind]) for kind, extractor in extractors.items()}
        for row, prompt in enumerate(batch):
            values = {key: value[row] for key, value in scores.items()}
            if not all(map(math.isfinite, values.values())):
                exit_with_error(f"--scores of {name}, prompt {prompt.index} ({prompt.text!r:.60}): {values}")
            results.write({"index": prompt.index, "image": prompt.image, "scores": values, **cost,
                           "time": time.time(), "file": stamps.get(prompt.key), "written": written[row]},
                          {kind: value[row] for kind, value in features.items()})

    batches = [mine[start:start + args.batch_size] for start in range(0, len(mine), args.batch_size)]
    progress = tqdm(total=len(mine), desc=name, disable=not accelerator.is_local_main_process, mininterval=1)
    with contextlib.closing(results), ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as last, progress:
        for position, batch in enumerate(batches):
            if position == 0 and not model.images:
                attempt(batch)  # warm-up, not measured
            images, cost = attempt(batch)
            last.close()  # finish the previous batch; leaving this block, also by an error, does so too
            last.callback(finish, batch, cost, pool.submit(prepare_batch, images, batch))
            progress.update(len(batch))


def remake_thumbnails(folder, prompts):
    """Make the lost or damaged thumbnails of a model from its .png files, as far as it has these."""
    records = read_records(folder)
    for prompt in prompts:
        record = records.get(prompt.key)
        if (record and not is_unchanged(folder, thumbnail_of(prompt), record)
                and is_unchanged(folder, png_of(prompt), record)):
            (folder / "thumbnails").mkdir(exist_ok=True)
            write_thumbnail(folder, prompt, open_image(folder / png_of(prompt)))


def rewards_of(model):
    """Return the names of the rewards that a model was trained on, from args.json or model cards.

    A LoRA or network may lie inside a run's folder or its checkpoints, also as a file; parents are searched.
    """
    found = {}
    for part, above in ((model.pretrained_model_name_or_path, 0), (model.lora, 3), (model.unet, 3)):
        for source in [Path(part), *Path(part).parents[:above]] if part else []:
            with contextlib.suppress(Exception):  # the card is optional
                if (source / "args.json").is_file():
                    found |= json.loads((source / "args.json").read_text())["reward"]
                    break
                if source.is_dir() or (len(source.parts) == 2 and not source.exists()):
                    card = source / "README.md" if source.is_dir() else str(source)
                    found |= dict.fromkeys(ModelCard.load(card).data.to_dict().get("reward") or [])
    return list(found)


def environment(scorers, device):
    """Describe how a model was scored, for results.json: versions, device, hashes of the scorers."""
    packages = ("torch", "diffusers", "transformers", "accelerate")
    return {"versions": {name: version(name) for name in packages},
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "scorers": {key: fingerprint(scorer) for key, scorer in scorers.items()
                        if isinstance(scorer, torch.nn.Module)}}


def load_scorers(loaders, device):
    scorers = {}
    for key, loader in loaders.items():
        with exit_on_error(f"--scores {key}"):
            scorer = loader(torch.float32)
            if not callable(scorer):
                raise ValueError(f"{scorer!r:.60} is not a function of images and prompts")
        is_module = isinstance(scorer, torch.nn.Module)
        scorers[key] = scorer.to(device).requires_grad_(False).eval() if is_module else scorer
    return scorers


def find_scorer(key):
    """Return the loader of a score, a function of the dtype; official:NAME is a package's own scorer."""
    kind, _, name = key.partition(":")
    return find_official(name) if kind == "official" else find_reward(key)


# ------------------------------------------------------------------------------------------------ main


def check_model(name, model):
    """End the run if files of a model are missing or do not fit, as far as can be seen before loading."""
    for flag in ("pretrained_model_name_or_path", "unet", "lora"):
        if (place := getattr(model, flag)) and (fault := fault_of(place)):
            exit_with_error(f"--{flag} {place}: {fault}")
    source = model.pretrained_model_name_or_path
    with exit_on_error(f"--pretrained_model_name_or_path {source} contains no pipeline"):
        component = network_name(DiffusionPipeline.load_config(source, revision=model.revision))
    card = Path(source) / "README.md" if Path(source).is_dir() else source
    with contextlib.suppress(OSError, ValueError):  # the card is optional
        data = ModelCard.load(card).data.to_dict()
        made_for, length = data.get("generator_timesteps"), data.get("max_sequence_length")
        if starts.are_timesteps(made_for) and not model.timesteps:
            exit_with_error(f"{name} was trained for its own timesteps: give it --timesteps"
                            f" {' '.join(map(str, made_for))} --guidance_scale 0")
        if length and not model.max_sequence_length:
            exit_with_error(f"{name} was trained for another length of prompts: give it --max_sequence_length"
                            f" {length}")
    if model.unet and component:
        with exit_on_error(f"--unet {model.unet} cannot take the place of the network of {source}"):
            whole = starts.find_weights(model.unet, component) is None
            theirs, own = (starts.find_network(held, component)[0] if whole else {}
                           for held in (model.unet, source))
            for key in ("cross_attention_dim", "in_channels", "addition_embed_type", "num_layers",
                        "joint_attention_dim", "caption_channels"):
                if theirs.get(key) != own.get(key):
                    raise ValueError(f"it belongs to another model: {key} differs")
    kind = getattr(diffusers, model.scheduler, None) if model.scheduler else diffusers.SchedulerMixin
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        exit_with_error(f"--scheduler {model.scheduler} is not a scheduler of diffusers")


def check(args):
    """Check all inputs before a model loads.

    Returns:
        The prompts; {folder: settings} of the models, with a `place` in the comparison if they have no scores
        yet; {score: loader}.
    """
    source = f" of --prompts_file {args.prompts_file}" if args.prompts_file else ""
    with exit_on_error(f"--benchmark {args.benchmark}{source}"):
        everything = load_benchmark(args.benchmark, args.prompts_file, args.caption_column)
    loaders = {}
    for key in args.scores:
        with exit_on_error(f"--scores {key}"):
            loaders[key] = find_scorer(key)
    towers = [key for kind in TOWERS for key in args.scores if key.partition(":")[0] == kind]
    if args.inception and not all(map(importlib.util.find_spec, ("cleanfid", "torch_fidelity"))):
        exit_with_error("FID needs two more packages: pip install clean-fid torch-fidelity")
    common = {"benchmark": args.benchmark, "seed": args.seed, "scores": args.scores,
              "prompts": digest_of(json.dumps([prompt.text for prompt in everything]).encode()),
              "diversity": towers[0] if towers and args.images_per_prompt > 1 else None,
              "hps_jpeg": args.hps_jpeg or None,  # as in results that know no such flag
              "fid": args.inception and [args.fid_size, args.patch_fid, files_digest(args.inception)]}
    locations, settings = [key.partition(":")[2] for key in args.scores], {}
    output_dir, results = Path(args.output_dir), read_results(Path(args.output_dir))
    for name, model in args.models.items():
        if not model.images:
            check_model(name, model)
        elif not Path(model.images).is_dir():
            exit_with_error(f"--images {model.images} is not a folder")
        else:
            find_images(model.images, images_of(everything, args.images_per_prompt))
        files = files_digest(model.pretrained_model_name_or_path, model.unet, model.lora, *locations)
        own = common | {"name": name, "model": resolved(vars(model)), "files": files}
        check_results_folder(output_dir / folder_name(name), own, results)
        settings[output_dir / folder_name(name)] = own
    kinds = [*["features"] * bool(args.inception), *["patches"] * args.patch_fid,
             *["embeddings"] * bool(common["diversity"])]
    check_images(results, images_of(spread(everything, args.limit), args.images_per_prompt), kinds, settings,
                 args.save_images)
    fresh = [folder for folder in settings if folder not in results or not results[folder]["records"]]
    last = max((model["settings"]["place"] for folder, model in results.items() if folder not in fresh),
               default=-1)
    for place, folder in enumerate(fresh, last + 1):
        settings[folder]["place"] = place
    return everything, settings, loaders


def load_extractors(args, tower, scorers, device):
    """Return {kind: Features} that the flags ask for, of FID, patch FID and diversity."""
    extractors = {}
    if args.inception:
        with exit_on_error(f"--inception {args.inception}"):
            inception = Inception(args.inception).to(device)
            extractors["features"] = Features(partial(prepare, size=args.fid_size), inception, inception)
            if args.patch_fid:
                extractors["patches"] = Features(prepare_patch, inception, inception)
    if tower:
        scorer = scorers[tower]
        extractors["embeddings"] = Features(partial(from_image, scorer), scorer, scorer.embed)
    return extractors


def load_real(args, extractors, accelerator):
    """Return {kind: statistics} of --fid_real's images; empty if it is a model in this comparison."""
    real = {}
    for kind in ("features", "patches"):
        if args.fid_real and not args.teacher and kind in extractors:
            size = args.fid_size if kind == "features" else "both sides at least 299"
            made_with = str([size, files_digest(
                args.fid_real, args.inception, endings=(*IMAGE_SUFFIXES, *WEIGHTS_FILES, ".npz"))])
            with exit_on_error(f"--fid_real {args.fid_real}"), accelerator.main_process_first():
                real[kind] = reference_statistics(
                    args.fid_real, extractors[kind], Path(args.output_dir) / f"real-{kind}.npz", made_with)
                if len(real[kind]["mu"]) != extractors[kind].width:
                    raise ValueError(f"it has {len(real[kind]['mu'])} features, but --inception has"
                                     f" {extractors[kind].width}")
    return real


@exit_on_full_disk()
def main(args):
    cli.quiet_libraries()
    everything, settings, loaders = check(args)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # processes do not end together
    accelerator = Accelerator(kwargs_handlers=[patience])
    if os.environ.get("WORLD_SIZE", "1") != str(accelerator.num_processes):
        exit_with_error(f"{os.environ['WORLD_SIZE']} processes were started, but accelerate sees"
                        f" {accelerator.num_processes}, and each would do all the work; without a GPU, set"
                        " ACCELERATE_USE_CPU=true")
    output_dir, common = Path(args.output_dir), next(iter(settings.values()))
    for folder, content in settings.items():
        with exit_on_error(f"--output_dir {output_dir}"):
            folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            if "place" in content:
                (folder / "facts.json").unlink(missing_ok=True)
                write_json_atomically(folder / "settings.json", content)
            write_json_atomically(folder / "rewards.json", rewards_of(args.models[content["name"]]))
    if accelerator.is_main_process and args.images_per_prompt > 1:
        if not common["diversity"]:
            print(f"diversity is not measured: --scores has none of {', '.join(TOWERS)}")
        if not (args.save_images and importlib.util.find_spec("lpips")):
            print("LPIPS is not measured: it needs `pip install lpips` and --save_images")
    if accelerator.is_main_process and args.teacher and len(list(output_dir.glob("*/settings.json"))) < 2:
        print(f"FID is not measured yet: {args.teacher} is the only model here")
    accelerator.wait_for_everyone()
    prompts = images_of(spread(everything, args.limit), args.images_per_prompt)
    images = images_of(everything, args.images_per_prompt)
    scorers = load_scorers(loaders, accelerator.device)
    extractors = load_extractors(args, common["diversity"], scorers, accelerator.device)
    real = load_real(args, extractors, accelerator)
    for name, model in args.models.items():
        evaluate(name, model, prompts, images, scorers, extractors, args, accelerator)
        gc.collect()
        torch.cuda.empty_cache()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        flags = {name: value for name, value in vars(args).items() if name != "models"}
        widths = {kind: extractor.width for kind, extractor in extractors.items()}
        with exit_on_error(f"--output_dir {output_dir}"):
            for path in output_dir.glob("*/settings.json"):
                remake_thumbnails(path.parent, prompts)
            print(write_report(output_dir, args.benchmark, common["prompts"], prompts, len(everything),
                               widths, real, args.teacher, flags, accelerator.device))
        print(f"{output_dir / 'results.md'}, and with the images {output_dir / 'report.html'}")
        for name in args.models if args.export else []:
            folder = output_dir / folder_name(name)
            with exit_on_error(f"--export of {name}"):
                command = export(args.export, prompts, folder / "images", folder / args.export)
            print(f"{name}, in a copy of {PROGRAMS[args.export]}: {command}")
    accelerator.end_training()


if __name__ == "__main__":
    main(ARGS)
