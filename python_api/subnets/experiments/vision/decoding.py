"""Image files as RGB pixels, whatever kind a folder of photographs holds, or one sentence on what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SMALLEST = 16  # pixels on a side: less is an icon or a thumbnail, and blowing it up 14 times hides that
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
EXPECTED = (
    f"whole image files with 8 or 16 bits per channel (colour, grey, palette, CMYK), {SMALLEST} pixels or more a side"
)


class BadImage(ValueError):
    """A file that can't be used; the message is what is wrong with it, without its name."""


def read_rgb(path: Path) -> Image.Image:
    """The image in `path` as RGB, 8 bits, turned upright by its EXIF orientation.

    Grey, palette and CMYK images are converted, 16 bits are scaled to 8, what is transparent becomes white, and of an
    animation the first frame is taken. The name's suffix plays no part: contents say what a file is.

    Raises:
        BadImage: not a whole image, smaller than `SMALLEST` on a side, or pixels of another kind.
    """
    try:
        with Image.open(path) as image:
            if min(image.size) < SMALLEST:
                raise BadImage(f"{image.width}x{image.height} pixels, {SMALLEST} or more a side expected")
            return _to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Exception as error:  # OSError, SyntaxError, struct.error, ...: Pillow's errors depend on where damage lies
        raise BadImage(f"unreadable ({type(error).__name__}: {error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("floating-point pixels, 8 or 16 bits expected")
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert("RGB") would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"32-bit pixels from {values.min()} to {values.max()}, 8 or 16 bits expected")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(image, mask=image.getchannel("A"))
        return page
    return image.convert("RGB")


def centre_square(image: Image.Image, size: int, crop: float) -> np.ndarray:
    """uint8 [3, size, size]: the centre square whose side is `crop` of the image's shorter one, bicubic, antialiased.

    The same as bringing the shorter side to size / crop pixels and cutting out the centre, in one step.
    """
    side = crop * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(square).transpose(2, 0, 1)
