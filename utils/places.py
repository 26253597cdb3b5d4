# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Look for models, datasets and files before anything loads, here and then on the hub.

Without a connection the libraries try each file of a name again and again, for a minute or more, and then
name another file. On resuming, a local model must have the configuration with which the checkpoint was made.
A training script that is copied alone does without these checks.
"""

import functools
import hashlib
import re
from pathlib import Path

from huggingface_hub import constants, get_session


WEIGHTS_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@functools.cache
def is_hub_reachable():
    """Ask the hub once for all names of a process."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # no name, no route, no proxy, or HF_HUB_OFFLINE
        return False
    return True


def fault_of(place, kind="models"):
    """Why a name is neither a folder or file here nor something on the hub, in words, or None.

    `kind` is models, datasets, or None for what must be here. If the hub cannot be reached, this process uses
    its cache from then on, without further attempts to connect.
    """
    if Path(place).exists():
        return None
    owner, *name = str(place).split("/")
    is_id = len(name) > 1 if str(place).endswith(WEIGHTS_FILES) else len(name) < 2
    if kind is None or owner in ("", ".", "..", "~") or not is_id:
        return "there is no such file or folder"
    if not is_hub_reachable():
        constants.HF_HUB_OFFLINE = True
        if not Path(constants.HF_HUB_CACHE, "--".join([kind, owner, *name[:1]])).exists():
            return "there is no such file or folder, and the hub cannot be reached"
    return None


def configuration_of(folder):
    """Digest of all configurations in the folder of a model or pipeline, without the libraries' versions."""
    files = sorted([*folder.glob("*config.json"), *folder.glob("*/*config.json")])
    loose = rb'"(_diffusers_version|transformers_version|_name_or_path)":\s*"[^"]*",?'
    held = [(path.name, re.sub(loose, b"", path.read_bytes())) for path in files]
    return hashlib.blake2b(repr(held).encode(), digest_size=16).hexdigest()


def check(family, args, exit_with_error):
    """Exit if a model, file or dataset that the flags of a training script name is neither here nor there.

    Sets `args.configurations`, {flag: digest} of local models; exits if the checkpoint that `args` resume has
    others.
    """
    names = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "reference_unet",
             "reward_vae"]
    if not args.dry_run:
        names += ["generator_init", "preference_unet", "prompts_file", "dataset_name"]
    if "pickscore" in [*args.reward, *args.validation_reward] and not args.dry_run:
        names.append("reward_model_name_or_path")
    for name in names:
        value = getattr(args, name)
        kind = {"prompts_file": None, "dataset_name": "datasets"}.get(name, "models")
        fault = None if value in (None, "reference") else fault_of(value, kind)
        if fault:
            exit_with_error(f"--{name.replace('unet', family.network_name)} {value}: {fault}")
        if kind == "models" and value and Path(value).is_dir():
            args.configurations[name] = digest = configuration_of(Path(value))
            if args.state.get("configurations", {}).get(name, digest) != digest:
                exit_with_error(f"--{name} {value}: its configuration is not the one that"
                                f" {args.resume_from_checkpoint} was made with")
