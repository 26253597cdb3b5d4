"""Measure how much a prompt's images differ, with a scorer's vision tower and, if installed, LPIPS."""

import contextlib
import importlib.util
import itertools
import json

import numpy
import torch
from torchvision.transforms.functional import to_tensor
from tqdm.auto import tqdm

from utils.cli import write_json_atomically
from utils.fid import open_image, square


LPIPS_SIZE = 512  # pixels, as in DMD2, which gives lpips images in [0, 1] where it expects [-1, 1]


def cosine_distance(vectors):
    """Return the mean of 1 - cosine over pairs of unit vectors (n, width), n >= 2; 0 if all are equal."""
    vectors = numpy.asarray(vectors, float)
    pairs = len(vectors) * (len(vectors) - 1)
    return 1 - (numpy.square(vectors.sum(0)).sum() - numpy.square(vectors).sum()) / pairs


def lpips_distances(folder, images, device):
    """Return {index: mean LPIPS over the pairs of its images}, cached in the model's folder.

    Args:
        folder: a model's folder with `images/`. images: {index: names of its files}, two or more each.

    Returns:
        None if the package `lpips`, its network or an image is absent.
    """
    paths = {index: [folder / "images" / f"{name}.png" for name in names] for index, names in images.items()}
    if not importlib.util.find_spec("lpips") or not all(
            path.exists() for files in paths.values() for path in files):
        return None
    import lpips

    kept = folder / "lpips.json"
    stamps = {index: [[path.stat().st_size, path.stat().st_mtime_ns] for path in files]
              for index, files in paths.items()}
    held = {}
    with contextlib.suppress(Exception):  # absent or damaged: measured again
        held = {int(index): (files, float(value)) for index, (files, value) in json.loads(
            kept.read_text()).items()}
    todo = [index for index, files in stamps.items() if held.get(index, (None,))[0] != files]
    try:  # downloads the network
        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval() if todo else None
    except Exception as error:
        print(f"LPIPS is not measured, because its network cannot be loaded: {error}")
        return None
    for index in tqdm(todo, desc=f"LPIPS of {folder.name}", disable=not todo):
        tensors = [to_tensor(square(open_image(path), LPIPS_SIZE)) * 2 - 1 for path in paths[index]]
        with torch.no_grad():
            found = [network(one[None].to(device), other[None].to(device)).item()
                     for one, other in itertools.combinations(tensors, 2)]
        held[index] = stamps[index], float(numpy.mean(found))
    write_json_atomically(kept, held)
    return {index: held[index][1] for index in images}
