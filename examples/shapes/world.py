"""The shapes world: captioned images of a single shape, and ground truth that is read back from images.

This file defines everything that is true by construction about the world; it contains no network.

An image is (3, 40, 40) RGB in [0, 1] and shows one shape on a plain background. Its caption names five
attributes: "a large red star on the left of a gray background". It leaves open the exact place, the rotation,
the tint (pale to vivid) and the *style*, a shading `lighting` in [-1, 1], from lit below to lit above.

The rule of taste: **light should come from above**. The true preference of an image is its lighting, which
is sampled independently of the attributes that captions name and of place, rotation and tint.
"""

import itertools
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F


RESOLUTION = 40
# A kind is a polygon with 2n vertices at alternating radii R and ratio * R: (n, ratio).
KINDS = {"circle": (60, math.cos(math.pi / 60)), "square": (4, math.cos(math.pi / 4)), "triangle": (3, 0.5),
         "star": (5, 0.45)}
COLORS = {"red": 0.0, "yellow": 52.0, "green": 125.0, "blue": 215.0, "purple": 285.0}  # hue in degrees
SIZES = {"small": 0.055, "large": 0.12}  # area as a fraction of the image
PLACES = {"left": 0.37, "right": 0.63}  # horizontal centre, in image widths
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "gray": (0.5, 0.5, 0.5), "black": (0.05, 0.05, 0.05),
               "pink": (0.95, 0.65, 0.75)}
ATTRIBUTES = {"size": SIZES, "color": COLORS, "kind": KINDS, "place": PLACES, "background": BACKGROUNDS}

# Attributes that captions leave open, sampled uniformly: half-ranges around the centre.
PLACE_JITTER, HEIGHT_JITTER, SIZE_JITTER = 0.05, 0.14, 0.07  # image widths; the size relative to its area
ROTATION_JITTER, HUE_JITTER = 20.0, 6.0  # degrees
TINT_RANGE = (0.6, 1.0)  # HSV saturation
MAX_HALO = 7.0  # rendered images reach 2.6; blurred over 3 pixels, 4; over 11 pixels, 8 and more
VALUE, SHADING = 0.64, 0.55  # HSV value of an unshaded shape; brightness change at one unit of height


def _captions():
    names = itertools.product(*ATTRIBUTES.values())
    captions = [f"a {size} {color} {kind} on the {place} of a {background} background"
                for size, color, kind, place, background in names]
    held_out = sorted(random.Random(0).sample(captions, 64))
    return [caption for caption in captions if caption not in held_out], held_out


TRAIN_CAPTIONS, HELD_OUT_CAPTIONS = _captions()
CAPTIONS_FILE = Path(__file__).with_name("captions.txt")  # the training captions, a line each


def parse_caption(caption):
    """Return the indices of the five attributes that a caption names, in the order of `ATTRIBUTES`."""
    words = caption.split()
    named = [words[1], words[2], words[3], words[6], words[9]]
    return [list(values).index(name) for name, values in zip(named, ATTRIBUTES.values())]


# ---------------------------------------------------------------------------------------------- renderer


def _grid(size, device=None):
    axis = (torch.arange(size, device=device) + 0.5) / size
    return torch.meshgrid(axis, axis, indexing="ij")


def _inside(kind, area, x, y, rotation, grid_y, grid_x):
    """Return the signed margin to the outline in image widths, positive inside. Arguments broadcast."""
    n, ratio = torch.tensor(list(KINDS.values()), device=grid_y.device)[kind].unbind(-1)
    wedge = math.pi / n
    outer = (area / (n * ratio * torch.sin(wedge))).sqrt()
    dx, dy = grid_x - x, grid_y - y
    angle = torch.atan2(dx, -dy) - torch.deg2rad(rotation)  # 0 is up, where every kind has a vertex
    folded = (torch.remainder(angle + wedge, 2 * wedge) - wedge).abs()
    # A square of rotation 0 rests on a side, so its outline is shifted by half a period.
    folded = torch.where(n == 4, wedge - folded, folded)
    inner = outer * ratio
    edge = outer * inner * torch.sin(wedge) / (inner * torch.sin(wedge - folded) + outer * torch.sin(folded))
    return edge - torch.hypot(dx, dy)


def _hsv_to_rgb(hue, saturation, value):
    """Convert hue in degrees, saturation and value in [0, 1], all (batch,), to RGB (batch, 3)."""
    offset = torch.tensor([5.0, 3.0, 1.0])
    k = torch.remainder(offset + hue[:, None] / 60, 6)
    return value * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def render(captions, generator):
    """Render one image for each caption.

    Args:
        captions: `batch` captions of this world.
        generator: a CPU `torch.Generator`; the images depend only on the captions and its state.

    Returns:
        images (batch, 3, 40, 40) in [0, 1], and a dict of open attributes, each (batch,): `x`, `y` in image
        widths, `rotation` in degrees, `tint` in [0.6, 1] and `lighting` in [-1, 1].
    """
    size, color, kind, place, background = torch.tensor([parse_caption(caption) for caption in captions]).T
    uniform = torch.rand(7, len(captions), generator=generator) * 2 - 1
    area = torch.tensor(list(SIZES.values()))[size] * (1 + SIZE_JITTER * uniform[0])
    x = torch.tensor(list(PLACES.values()))[place] + PLACE_JITTER * uniform[1]
    y = 0.5 + HEIGHT_JITTER * uniform[2]
    rotation = ROTATION_JITTER * uniform[3]
    hue = torch.tensor(list(COLORS.values()))[color] + HUE_JITTER * uniform[4]
    tint = TINT_RANGE[0] + (TINT_RANGE[1] - TINT_RANGE[0]) * (uniform[5] + 1) / 2
    lighting = uniform[6]

    supersampling = 4
    grid_y, grid_x = _grid(RESOLUTION * supersampling)
    per_image = [v[:, None, None] for v in (kind, area, x, y, rotation)]
    coverage = (_inside(*per_image, grid_y, grid_x) > 0).float()
    coverage = F.avg_pool2d(coverage[:, None], supersampling)

    height = (y[:, None, None] - _grid(RESOLUTION)[0]) / (0.88 * area.sqrt())[:, None, None]
    shading = (1 + SHADING * lighting[:, None, None] * height)[:, None]
    foreground = (_hsv_to_rgb(hue, tint, VALUE)[:, :, None, None] * shading).clamp(0, 1)
    backdrop = torch.tensor(list(BACKGROUNDS.values()))[background][:, :, None, None]
    images = coverage * foreground + (1 - coverage) * backdrop
    return images, {"x": x, "y": y, "rotation": rotation, "tint": tint, "lighting": lighting}


# ---------------------------------------------------------------------------------------------- ground truth


def _largest_component(mask):
    """Find the largest 4-connected component of each boolean mask (batch, H, W) by spreading labels."""
    batch, height, width = mask.shape
    labels = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float32)
    labels = labels.view(1, height, width) * mask
    while True:
        across = F.max_pool2d(labels[:, None], (1, 3), 1, (0, 1))
        down = F.max_pool2d(labels[:, None], (3, 1), 1, (1, 0))
        spread = torch.maximum(across, down)[:, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    flat = labels.long().flatten(1)
    counts = torch.zeros(batch, height * width + 1, device=mask.device).scatter_add_(
        1, flat, torch.ones_like(flat, dtype=torch.float32))
    counts[:, 0] = 0
    return mask & (labels == counts.argmax(1)[:, None, None])


def _fit_outline(mask, area, x, y):
    """Find the kind and rotation whose outline of equal area and centre best overlaps a mask (batch, H, W).

    Returns kind (batch,), rotation (batch,) in degrees and the intersection over union (batch,).
    """
    kinds, rotations = [], []
    for index, (n, _) in enumerate(KINDS.values()):
        period = 360 / n
        steps = max(1, round(period / 6))
        kinds += [index] * steps
        rotations += [period * ((step + 0.5) / steps - 0.5) for step in range(steps)]
    kinds = torch.tensor(kinds, device=mask.device)
    rotations = torch.tensor(rotations, device=mask.device)
    grid_y, grid_x = _grid(mask.shape[-1], mask.device)
    overlaps = []
    for start in range(0, len(mask), 64):  # (64, candidates, H, W) at a time
        part = slice(start, start + 64)
        per_image = [v[part, None, None, None] for v in (area, x, y)]
        candidates = [v[None, :, None, None] for v in (kinds, rotations)]
        outline = _inside(candidates[0], *per_image, candidates[1], grid_y, grid_x) > 0
        shape = mask[part, None]
        overlaps.append((outline & shape).sum((-1, -2)) / (outline | shape).sum((-1, -2)))
    overlap, best = torch.cat(overlaps).max(1)
    return kinds[best], rotations[best], overlap


def _nearest(distance, limit):
    """Return the index of the smallest of (batch, n) distances, or -1 beyond `limit`."""
    smallest, index = distance.min(1)
    return torch.where(smallest <= limit, index, -1)


@torch.no_grad()
def read(images):
    """Read the attributes of images by plain image processing: thresholds, moments and outlines.

    Args:
        images: (batch, 3, H, W) in [0, 1], square, any device.

    Returns:
        dict of (batch,) tensors. `found`: one shape was found (bool). `size`, `color`, `kind`, `place`,
        `background`: indices into `ATTRIBUTES`, -1 where not read. `x`, `y` (image widths), `rotation`
        (degrees), `tint` (saturation) and `lighting` (about [-1, 1] in rendered images, unbounded in others);
        nan where no shape was found.
    """
    images = images.float().clamp(0, 1)
    size = images.shape[-1]
    band = max(2, size // 20)
    frame = torch.ones(size, size, dtype=torch.bool, device=images.device)
    frame[band:-band, band:-band] = False
    border = images[:, :, frame]
    backdrop = border.median(-1).values
    flat = (border - backdrop[:, :, None]).abs().mean((1, 2)) < 0.06
    palette = torch.tensor(list(BACKGROUNDS.values()), device=images.device)
    background = torch.where(flat, _nearest(torch.cdist(backdrop, palette), 0.2), -1)

    distance = (images - backdrop[:, :, None, None]).norm(dim=1)
    visible = distance > 0.15
    contrast = (distance * visible).sum((1, 2)) / visible.sum((1, 2)).clamp(min=1)
    candidate = visible & (distance > 0.45 * contrast[:, None, None])
    mask = _largest_component(candidate)
    pixels = mask.sum((1, 2)).clamp(min=1)
    area = pixels / size**2
    alone = pixels / candidate.sum((1, 2)).clamp(min=1) > 0.9
    # Half-covered pixels form an outline whose length is about the root of the area; a smear has many more.
    halo = ((distance > 0.12 * contrast[:, None, None]) & ~mask).sum((1, 2)) / pixels.sqrt()
    plausible = (halo < MAX_HALO) & (area > 0.6 * SIZES["small"]) & (area < 1.6 * SIZES["large"])

    grid_y, grid_x = _grid(size, images.device)
    x, y = [(grid * mask).sum((1, 2)) / pixels for grid in (grid_x, grid_y)]
    kind, rotation, overlap = _fit_outline(mask, area, x, y)
    found = flat & alone & plausible & (overlap > 0.75)

    # Read colour and lighting inside the shape, away from edge pixels that mix with the background.
    interior = -F.max_pool2d(-mask[:, None].float(), 3, 1, 1)
    weight = interior / interior.sum((2, 3), keepdim=True).clamp(min=1)
    rgb = (images * weight).sum((2, 3))
    high, low = rgb.max(1).values, rgb.min(1).values
    tint = (high - low) / high.clamp(min=1e-6)
    red, green, blue = rgb.unbind(1)
    hue = torch.rad2deg(torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue))
    hues = torch.tensor(list(COLORS.values()), device=images.device)
    color = _nearest((torch.remainder(hue[:, None] - hues + 180, 360) - 180).abs(), 30)
    color = torch.where(tint > 0.25, color, -1)

    height = ((y[:, None, None] - grid_y) / (0.88 * area.sqrt())[:, None, None])[:, None]
    height = height - (height * weight).sum((2, 3), keepdim=True)
    brightness = images.mean(1, keepdim=True)
    covariance, variance, mean = [(value * weight).sum((1, 2, 3)) for value in (
        brightness * height, height**2, brightness)]
    lighting = covariance / variance.clamp(min=1e-6) / mean.clamp(min=1e-6) / SHADING

    middle = math.sqrt(math.prod(SIZES.values()))
    named = {"size": (area > middle).long(), "color": color, "kind": kind, "place": (x > 0.5).long()}
    reading = {name: torch.where(found, value, -1) for name, value in named.items()}
    reading |= {"found": found, "background": background}
    measured = {"x": x, "y": y, "rotation": rotation, "tint": tint, "lighting": lighting}
    return reading | {name: torch.where(found, value, math.nan) for name, value in measured.items()}


def alignment(reading, captions):
    """Return {attribute: (batch,) bool}, whether the images show the attributes that the captions name."""
    wanted = torch.tensor([parse_caption(caption) for caption in captions]).T
    return {name: reading[name].cpu() == index for name, index in zip(ATTRIBUTES, wanted)}


def true_preference(reading):
    """Return the rule of taste, light from above: measured lighting (batch,); nan without a shape."""
    return reading["lighting"]


def diversity(reading, captions):
    """Return the spread over noise of each open attribute, relative to the world's own (1 if equal).

    Images are grouped by caption. Each attribute's variance within groups (place across and down, rotation,
    tint) is pooled, and its root divided by the standard deviation in `render`. Rotation counts for kinds
    with a visible rotation. The value is nan unless some caption has at least two readable images.
    """
    sampled = {"x": PLACE_JITTER, "y": HEIGHT_JITTER, "rotation": ROTATION_JITTER,
               "tint": (TINT_RANGE[1] - TINT_RANGE[0]) / 2}  # half-ranges of uniform distributions
    circle = list(KINDS).index("circle")
    spread = {}
    for name, half_range in sampled.items():
        usable = reading["found"] & ((reading["kind"] != circle) if name == "rotation" else True)
        groups = {}
        for value, ok, caption in zip(reading[name].tolist(), usable.tolist(), captions, strict=True):
            if ok:
                groups.setdefault(caption, []).append(value)
        squares, freedom = 0.0, 0
        for values in groups.values():
            mean = sum(values) / len(values)
            squares += sum((value - mean) ** 2 for value in values)
            freedom += len(values) - 1
        spread[name] = math.sqrt(squares / freedom) / (half_range / math.sqrt(3)) if freedom else math.nan
    return spread
