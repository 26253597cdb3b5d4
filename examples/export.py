#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Export the generator of an earlier checkpoint as a finished pipeline, into a folder outside the run.

    python examples/export.py --checkpoint outputs/sdxl-paper-short/checkpoint-500 \\
        --output_dir outputs/sdxl-step-500 --dtype float16 --variant fp16

The pipeline, the LoRA files of a LoRA run, and the model card are those that the training script writes when
a run ends, but for the card's validation. The run's folder is only read, so the run may still be training.
The models that it started from are read where its flags say, relative paths from the working directory.
"""

import contextlib
import importlib
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace


ROOT = Path(__file__).resolve().parents[1]
SCRIPT, PLACES = "train_diff_instruct_star_", (ROOT, ROOT / "examples" / "families")
sys.path[:0] = map(str, PLACES)
from utils.cli import Parser, exit_on_error, exit_with_error, quiet_libraries


FAMILIES = sorted(path.stem.removeprefix(SCRIPT) for place in PLACES for path in place.glob(f"{SCRIPT}*.py"))
MODELS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "reference_unet",
          "generator_init")


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="Checkpoint folder of a run.")
    add("--output_dir", type=Path, required=True, help="New or empty folder outside the run.")
    add("--non_ema", action="store_true", help="Export the raw weights, not the average of --use_ema.")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="Dtype of weights.")
    add("--variant", help="Weights variant in the pipeline's file names, such as fp16.")
    add("--lora_only", action="store_true",
        help="Write only the LoRA files, their scheduler and the model card.")
    add("--family", choices=FAMILIES, help="Family of the models (default: by the class of the pipeline).")
    add("--mixed_precision", choices=["no", "bf16"],
        help="Precision of an older run, set by accelerate's configuration, whose checkpoint does not tell.")
    for name in MODELS:
        add(f"--{name}", help="Use this in place of the run's flag, for a model that has moved.")
    args = parser.parse_args(argv)
    if args.variant and not args.variant.replace("_", "").isalnum():
        exit_with_error(f"--variant {args.variant} must consist of letters and digits, such as fp16")
    with exit_on_error(f"--output_dir {args.output_dir}", "choose another folder"):
        check_output_dir(args.output_dir, args.checkpoint.resolve())
    return args


def check_output_dir(folder, checkpoint):
    """Raise OSError unless the folder is new or empty, can be written, and lies outside the run."""
    run = checkpoint.parent if (checkpoint.parent / "args.json").exists() else checkpoint
    existing = next(filter(os.path.lexists, (folder, *folder.absolute().parents)))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"{existing} is a file, a broken link or read-only")
    if folder.resolve().is_relative_to(run):
        raise OSError("it lies inside the run, which the export leaves as it is")
    if existing == folder and any(folder.iterdir()):
        raise OSError("it is not empty")


ARGS = parse_args() if __name__ == "__main__" else None

import diffusers
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file


def read_checkpoint(args):
    """Return state.json of a whole checkpoint; exits if the checkpoint lacks what the flags ask for."""
    with exit_on_error(f"--checkpoint {args.checkpoint} is not a complete checkpoint", "take another"):
        state = importlib.import_module(SCRIPT + "sd15").read_state(args.checkpoint)
    rank, precision = map(state["args"].get, ("generator_lora_rank", "mixed_precision"))
    if args.lora_only and not rank:
        exit_with_error(f"--lora_only: the run of {args.checkpoint} trained no LoRA; leave the flag out")
    if rank and not (args.mixed_precision or precision or "facts" in state):
        exit_with_error("--mixed_precision: give no or bf16 as accelerate's configuration did, because the"
                        " LoRA's frozen weights had this precision")
    return state


def find_family(args, place, revision):
    """Return (the module of the training code, the family) of --family or of the reference pipeline."""
    kind, remedy = None, "if it has moved, give the flag here"
    if not args.family:
        with exit_on_error(f"--pretrained_model_name_or_path {place} is not a pipeline", remedy):
            kind = diffusers.DiffusionPipeline.load_config(place, revision=revision)["_class_name"]
    modules = [importlib.import_module(SCRIPT + name) for name in FAMILIES if args.family in (None, name)]
    found = {module.FAMILY: sys.modules[module.main.__module__] for module in modules
             if kind in (None, module.FAMILY.pipeline_class)}
    if len(found) != 1:
        exit_with_error(f"--family: {len(found)} families have the pipeline {kind}; choose one of"
                        f" {', '.join(FAMILIES)}")
    (family, script), = found.items()
    return script, family


def run_flags(script, family, args, saved, facts):
    """Return the run's flags as its parser made them; an older checkpoint lacks newer flags."""
    parser = script.make_parser(family)
    flags = parser.parse_args([])
    vars(flags).update(saved, output_dir=str(args.output_dir))
    flags.mixed_precision = args.mixed_precision or facts.get("mixed_precision") or flags.mixed_precision
    changed = {name for name, value in vars(flags).items() if value != parser.get_default(name)}
    needed = [name for name in script.EXTRAS if name == "lora" or name.startswith("terms/")]
    flags.extras = {name: f"--{flag}" for name in needed for flag in script.EXTRAS[name] if flag in changed}
    for name, flag in flags.extras.items():
        with exit_on_error(f"{flag} of the run"):
            script.load_extra(name, flag)
    return flags


def read_weights(args, flags):
    """Return the trained weights {name: tensor}; of an average in trainer.pt, a list in the same order.

    A sharded checkpoint holds all tensors of the run by name: generator/NAME, ema/NAME and, for the states of
    the optimizers, generator/NAME/STATE.
    """
    folder, averaged = args.checkpoint, flags.use_ema and not args.non_ema
    with exit_on_error(f"--checkpoint {folder} is damaged", "take another"):
        if flags.sharding:
            reader, prefix = dcp.HuggingFaceStorageReader(str(folder)), "ema/" if averaged else "generator/"
            held = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
                    for name, tensor in reader.read_metadata().state_dict_metadata.items()
                    if name.startswith(prefix) and name.count("/") == 1}
            dcp.load(held, storage_reader=reader, no_dist=True)
            return {name.removeprefix(prefix): tensor for name, tensor in held.items()}
        if averaged:
            saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
            return saved["ema"]["shadow_params"]
        return load_file(folder / "generator.safetensors")


def load_generator(script, family, args, flags):
    """Return the generator with the checkpoint's weights, in the memory format of a run."""
    weights = read_weights(args, flags)
    frozen = torch.bfloat16 if flags.mixed_precision == "bf16" else torch.float32
    generator = script.load_generator(family, flags, script.load_reference(family, flags, frozen), frozen)
    script.Replicated(SimpleNamespace(device="cpu")).place(generator)
    parameters = script.trainable_parameters(generator)
    with exit_on_error(f"--checkpoint {args.checkpoint} does not fit the models of the run's flags"):
        weights = weights if isinstance(weights, dict) else dict(zip(parameters, weights, strict=True))
        shapes = [{name: value.shape for name, value in held.items()} for held in (weights, parameters)]
        if shapes[0] != shapes[1]:
            raise ValueError("its weights have other names or shapes")
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
    return generator


def unloaded_pipeline(script, family, flags):
    """Return a stand-in for the pipeline: its class's name, which components it has, and its scheduler."""
    place, kind, config = flags.pretrained_model_name_or_path, getattr(diffusers, family.pipeline_class), {}
    with contextlib.suppress(OSError):
        config = kind.load_config(place, revision=flags.revision)
    scheduler = script.load(getattr(diffusers, family.components["scheduler"]), place, subfolder="scheduler",
                            revision=flags.revision)
    return type(family.pipeline_class, (), {
        "components": {name: config.get(name, [name])[0] for name in family.components},
        "_optional_components": kind._optional_components, "scheduler": scheduler})()


def write_card(script, run, args):
    """Write the script's model card, whose code loads the pipeline in the dtype and variant.

    Without the dtype, transformers would load text encoders as saved and diffusers the rest in float32.
    """
    more = f", variant={args.variant!r}" if args.variant else ""
    more += f", torch_dtype=torch.{args.dtype}" if args.dtype != "float32" else ""
    script.write_card(run, args.output_dir.resolve().name, more, args.lora_only)


def main(args):
    quiet_libraries()
    state = read_checkpoint(args)
    saved = state["args"] | {name: value for name in MODELS if (value := getattr(args, name))}
    script, family = find_family(args, saved["pretrained_model_name_or_path"], saved.get("revision"))
    facts = state.get("facts", {"hardware": "unknown hardware", "prompts": "an unknown number of"})  # older
    flags, dtype = run_flags(script, family, args, saved, facts), getattr(torch, args.dtype)
    if args.lora_only and not hasattr(getattr(diffusers, family.pipeline_class), "load_lora_weights"):
        exit_with_error(f"--lora_only: {family.pipeline_class} cannot load a LoRA; export the whole pipeline")
    not_exported = {"preference_unet": None, "reward_vae": None}
    process = script.generator_process(
        flags, script.check_models(family, SimpleNamespace(**vars(flags) | not_exported)))
    generator = load_generator(script, family, args, flags)
    pipeline = unloaded_pipeline(script, family, flags) if args.lora_only else script.load_pipeline(
        family, flags, dtype, getattr(generator, "base", generator))
    pipeline.scheduler = process.exported_scheduler(pipeline.scheduler)
    with exit_on_error(f"--output_dir {args.output_dir} is not complete", "remove it and export again"):
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if flags.generator_lora_rank:
            lora = script.load_extra("lora", "--generator_lora_rank")
            generator = lora.export(family, generator, args.output_dir, dtype)
        if args.lora_only:
            pipeline.scheduler.save_pretrained(args.output_dir / "scheduler")
        else:
            setattr(pipeline, family.network_name, generator)
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module):
                    script.cast(part, dtype)
            pipeline.save_pretrained(args.output_dir, variant=args.variant)
            script.copy_tokenizers(flags, pipeline, args.output_dir)
        for path in args.output_dir.rglob("*.safetensors"):  # safetensors leaves them to their owner alone
            path.chmod(stat.S_IMODE(args.output_dir.stat().st_mode) & 0o666)
        models = SimpleNamespace(family=family, pipeline=pipeline, generator_process=process)
        write_card(script, SimpleNamespace(args=flags, models=models, facts=facts, step=state["step"]), args)
    weights = "averaged" if flags.use_ema and not args.non_ema else "raw"
    print(f"the generator of step {state['step']}, its {weights} weights, is in {args.output_dir}")


if __name__ == "__main__":
    main(ARGS)
