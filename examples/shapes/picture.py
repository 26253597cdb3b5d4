"""The quickstart's picture: images of the same captions and noise in rows, with their true preferences."""

import math
import textwrap

from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

import world


COLUMNS = 12
SIDE, GAP, LEFT, TOP, ROW = 112, 5, 176, 132, 162  # pixels: an image, a gap, margins for text, a row
LIT_BELOW, UNLIT, LIT_ABOVE = (226, 110, 60), (240, 240, 240), (40, 165, 125)  # colours of -1, 0 and 1


def write_preference(pen, box, value, font):
    """Write a true preference, or a dash for nan, into a box (left, top, right, bottom) of its colour."""
    found, strength = not math.isnan(value), min(1, abs(value))
    color = [round(gray + strength * (full - gray)) if found else gray
             for gray, full in zip(UNLIT, LIT_ABOVE if value > 0 else LIT_BELOW)]
    pen.rectangle(box, tuple(color))
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    text = f"{round(value, 2) + 0.0:+.2f}" if found else "-"  # the sum turns -0.0 into 0.0
    pen.text(middle, text, "black", font, anchor="mm")


def save_picture(path, captions, rows):
    """Save a picture with a row for each set of images.

    The columns are the first captions, with the first image of each and, under it, its true preference.
    Beside a row stand the mean true preference of all its images and the fraction that shows the right kind.

    Args:
        path: PNG to write.
        captions: n captions of the world, each repeated.
        rows: {title: images (n, 3, H, W) in [0, 1]}.
    """
    columns = [(LEFT + column * (SIDE + GAP), captions.index(caption))
               for column, caption in enumerate(list(dict.fromkeys(captions))[:COLUMNS])]
    size = (LEFT + len(columns) * (SIDE + GAP) - GAP, TOP + len(rows) * ROW - 2 * GAP)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    small, middle, large = map(ImageFont.load_default, (17, 20, 44))
    legend = f"true preference\n(+ lit from above,\n- lit from below),\nmean of {len(captions)} images"
    pen.text((0, TOP - 9), legend, "dimgray", small, anchor="ld")
    for left, index in columns:
        pen.text((left + SIDE / 2, TOP - 9), textwrap.fill(captions[index], 13), "dimgray", small,
                 anchor="md", align="center")
    for top, (title, images) in zip(range(TOP, picture.height, ROW), rows.items()):
        reading = world.read(images)
        preference = world.true_preference(reading)
        kind = world.alignment(reading, captions)["kind"].float().mean()
        pen.text((0, top), title, "black", middle)
        write_preference(pen, (0, top + 32, LEFT - 3 * GAP, top + 86), preference.nanmean().item(), large)
        pen.text((0, top + 98), f"kind right: {kind:.1%}", "black", middle)
        for left, index in columns:
            image = to_pil_image(images[index].clamp(0, 1))
            picture.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
            box = (left, top + SIDE + 2, left + SIDE - 1, top + ROW - 3 * GAP)
            write_preference(pen, box, preference[index].item(), middle)
    picture.save(path, optimize=True)
