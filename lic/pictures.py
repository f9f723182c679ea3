"""Pictures that explain, with Pillow alone: panels side by side with words above, numbers as heat.

A picture is an array (H, W, 3) uint8.
"""

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TEXT_SIZE, GAP = 13, 8  # pixels
HEAT = np.array(  # black, violet, red, yellow, white: as bright as the number is large
    [[0, 0, 0], [80, 20, 120], [210, 60, 60], [250, 190, 60], [255, 255, 255]], np.float64
)


def png_bytes(image):
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")  # optimize=True: 4 % less in 6 times as long
    return buffer.getvalue()


def beside(pictures, captions):
    """Equally high pictures side by side on white, each below its caption.

    captions: a string each, of one line or several.
    """
    font = ImageFont.load_default(TEXT_SIZE)
    lines = max(caption.count("\n") + 1 for caption in captions)
    line_height = TEXT_SIZE * 5 // 4
    top = lines * line_height + GAP
    columns = []
    for picture, caption in zip(pictures, captions):
        height, width, _ = picture.shape
        text_width = max(font.getlength(line) for line in caption.split("\n"))
        column = Image.new("RGB", (max(width, math.ceil(text_width)), top + height), "white")
        draw = ImageDraw.Draw(column)
        for k, line in enumerate(caption.split("\n")):
            draw.text((0, GAP // 2 + k * line_height), line, "black", font)
        column.paste(Image.fromarray(picture), (0, top))
        columns += [np.asarray(column), np.full((top + height, GAP, 3), 255, np.uint8)]
    return np.concatenate(columns[:-1], axis=1)


def heat(values, largest):
    """Numbers from 0 to `largest`, (H, W), as colours: (H, W, 3) uint8."""
    places = np.linspace(0, 1, len(HEAT))
    share = np.clip(values / largest, 0, 1)
    colours = [np.interp(share, places, HEAT[:, channel]) for channel in range(3)]
    return np.stack(colours, axis=-1).round().astype(np.uint8)


def enlarged(values, side):
    """Each number of (h, w) as a square of side x side: (h * side, w * side)."""
    return values.repeat(side, axis=0).repeat(side, axis=1)
