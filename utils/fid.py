"""Frechet inception distance by clean-fid's protocol, with an Inception network that the user provides.

An image is cropped to its central square, resized to `size` with PIL's Lanczos filter (DMD2: 256 for SD1.5,
512 for SDXL), then resized to 299 channel by channel in floating point ("clean"). The features come from
NVIDIA's `inception-2015-12-05.pt`, the file that clean-fid downloads, or from any TorchScript file that takes
(batch, 3, 299, 299) in 0 to 255. clean-fid does the resizing, torch-fidelity the distance.
"""

import contextlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop
from tqdm.auto import tqdm

from utils.cli import write_atomically


PATCH = 299  # pixels; input size of Inception
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def open_image(path):
    """Read an image file completely, as RGB; a ValueError names a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # each format raises its own errors
        raise ValueError(f"{path} is not a readable image: {error}") from error


def square(image, size):
    """Crop a PIL image to its central square and resize it to (size, size), RGB."""
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS)


def prepare(image, size):
    """Prepare a PIL image for the network: float32 (3, 299, 299) in 0 to 255."""
    return resized(square(image, size))


def resized(image):
    """Resize an RGB image as clean-fid does."""
    from cleanfid.resize import build_resizer

    return torch.from_numpy(build_resizer("clean")(numpy.array(image))).permute(2, 0, 1)


def prepare_patch(image):
    """Prepare the central 299 pixels of an image without resizing, for patch FID (DMD2's protocol).

    An image with a side below 299 is not cropped: it is resized whole, as in DMD2.
    """
    image = image.convert("RGB")
    return resized(center_crop(image, PATCH) if min(image.size) >= PATCH else image)


class Inception(torch.nn.Module):
    """Compute features (batch, width) of images (batch, 3, 299, 299) in 0 to 255 with a TorchScript file."""

    def __init__(self, path):
        super().__init__()
        self.network = torch.jit.load(path, map_location="cpu").eval()
        self.is_nvidia = hasattr(self.network, "layers")

    @torch.no_grad()
    def forward(self, images):
        if self.is_nvidia:  # skip its own resizing, as clean-fid does
            return self.network.layers.forward((images - 128) / 128).flatten(1)
        return self.network(images).flatten(1)


def statistics(features):
    """Return {mu (width,), sigma (width, width)} of features (images, width), in float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise ValueError(f"FID needs at least 2 images, not {len(features)}")
    return fid_features_to_statistics(torch.as_tensor(features, dtype=torch.float64))


def frechet_distance(one, other):
    """Return |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2)) of two statistics."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if one["mu"].shape != other["mu"].shape:
        raise ValueError(f"features of width {len(one['mu'])} and {len(other['mu'])}: different networks")
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def reference_statistics(location, features_of, cache, made_with, batch_size=16):
    """Return the statistics and number of a folder of real images, or the statistics in an .npz file.

    Args:
        features_of: computes features of what its `prepare` makes of images. made_with: key of the cache.

    Raises:
        ValueError: there are no images, or one cannot be read. A bad .npz file raises numpy's errors.
    """
    if Path(location).is_file():
        held = numpy.load(location, allow_pickle=False)
        return {name: held[name].astype(float) for name in ("mu", "sigma")}
    with contextlib.suppress(Exception):  # absent or truncated: computed again
        held = numpy.load(cache)
        if str(held["made_with"]) == made_with:
            return {"mu": held["mu"], "sigma": held["sigma"], "images": int(held["images"])}
    inside = [*Path(location).glob("*"), *Path(location).glob("*/*")]
    paths = sorted(path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError("it contains no images")
    features = []
    with ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(paths), batch_size), desc="real images", mininterval=1):
            batch = pool.map(lambda path: features_of.prepare(open_image(path)),
                             paths[start:start + batch_size])
            features.append(features_of(torch.stack(list(batch))))
    found = statistics(numpy.concatenate(features)) | {"images": len(paths)}
    content = io.BytesIO()
    numpy.savez(content, **found, made_with=made_with)
    write_atomically(cache, content.getvalue())
    return found
