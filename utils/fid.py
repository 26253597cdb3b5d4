"""The Frechet inception distance by clean-fid's protocol, with an Inception file of the user's.

A picture is cropped to a square in its centre and resized by PIL's Lanczos to `size` (DMD2: 256 for SD1.5,
512 for SDXL), then channel by channel in floating point to 299 ("clean"). The features are those of NVIDIA's
`inception-2015-12-05.pt`, the file that clean-fid downloads, or of any TorchScript file that takes (batch, 3,
299, 299) in 0 to 255. The resizing is clean-fid's, the distance torch-fidelity's.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from PIL import Image
from tqdm.auto import tqdm

from utils.rewards import first_line


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def square(picture, size):
    """The centre of a PIL picture as RGB, (size, size)."""
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS)


def prepare(picture, size):
    """A PIL picture as the network takes it: float32 (3, 299, 299) in 0 to 255."""
    from cleanfid.resize import build_resizer

    return torch.from_numpy(build_resizer("clean")(numpy.array(square(picture, size)))).permute(2, 0, 1)


class Inception(torch.nn.Module):
    """Features (batch, width) of pictures (batch, 3, 299, 299) in 0 to 255.

    Raises:
        ValueError: a file that is no TorchScript module.
    """

    def __init__(self, path):
        super().__init__()
        try:
            self.network = torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"--inception {path} is no TorchScript file: {first_line(error)}") from error

    @torch.no_grad()
    def forward(self, images):
        if hasattr(self.network, "layers"):  # NVIDIA's, whose own resizing is left out, as clean-fid does
            return self.network.layers.forward((images - 128) / 128).flatten(1)
        return self.network(images).flatten(1)


def statistics(features):
    """{mu (width,), sigma (width, width)} in float64 of features (pictures, width)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise ValueError(f"FID needs at least 2 pictures, not {len(features)}")
    return fid_features_to_statistics(torch.as_tensor(features, dtype=torch.float64))


def frechet_distance(one, other):
    """|mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2)) of two statistics."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if one["mu"].shape != other["mu"].shape:
        raise ValueError(f"features of width {len(one['mu'])} and {len(other['mu'])}: of different networks")
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def reference_statistics(place, inception, size, device, batch_size, cache, made_with):
    """Of a folder of real pictures, kept in `cache` as `made_with`; or of an .npz file of mu and sigma.

    Raises:
        ValueError: no pictures, one that cannot be read, a file of other content or of another protocol.
    """
    if Path(place).is_file():
        return load_statistics(place)
    with contextlib.suppress(Exception):  # not there, cut off: made anew
        held = numpy.load(cache)
        if str(held["made_with"]) == made_with:
            return {"mu": held["mu"], "sigma": held["sigma"]}
    inside = [*Path(place).glob("*"), *Path(place).glob("*/*")]
    paths = sorted(path for path in inside if path.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"--fid_real {place} has no pictures")
    features = []
    with ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(paths), batch_size), desc="real pictures", mininterval=1):
            batch = pool.map(lambda path: prepare(open_picture(path), size), paths[start:start + batch_size])
            features.append(inception(torch.stack(list(batch)).to(device)).cpu())
    found = statistics(torch.cat(features))
    numpy.savez(cache, **found, made_with=made_with, pictures=len(paths))
    return found


def load_statistics(path):
    try:
        held = numpy.load(path, allow_pickle=False)
        return {"mu": held["mu"].astype(float), "sigma": held["sigma"].astype(float)}
    except Exception as error:  # a damaged one has its own
        raise ValueError(f"--fid_real {path} is no .npz file of mu and sigma: {error}") from error


def open_picture(path):
    """A picture of a file, read whole; ValueError, with its name, where it cannot be."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except Exception as error:  # each format has its own
        raise ValueError(f"{path} is no picture that can be read: {first_line(error)}") from error
