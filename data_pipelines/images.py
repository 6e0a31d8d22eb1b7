"""One way to read a picture: fully decoded, upright, 8-bit RGB; or a MediaError that names the file."""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from data_pipelines.mediafiles import check_regular
from data_pipelines.samples import MediaError

ORIENTATION = 0x0112  # the EXIF tag; Pillow reads XMP's too
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of Pillow's formats, those that run another program or the system's own drawing code on the file.
UNSAFE = {"EPS", "WMF"}
# Of the longer side to the shorter, Qwen's own limit: processors enlarge the shorter, and would take GBs for a line.
MOST_ASPECT = 200


def load_image(path: Path, data: bytes | None = None) -> Image.Image:
    """The picture at `path` as RGB; alpha lies over white, EXIF orientation is applied, an animation gives its first
    frame. `data` holds the file's bytes where it lies in a shard; `path` then only names it.

    Raises MediaError for a missing, truncated or unreadable file, for one over Pillow's decompression-bomb limit and
    for one that is all but a line.
    """
    if data is None:
        check_regular(path)
    elif not data:
        raise MediaError(path, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged tags, which we don't use
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path if data is None else io.BytesIO(data), formats=_formats()) as image:
                image.load()  # all of it: `verify()` passes truncated JPEGs
                turn = _orientation(image)
                picture = _rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise MediaError(path, f"too large to decode safely ({error})") from error
    except Exception as error:  # Pillow's plugins raise whatever a damaged file leads them to
        reason = str(error).replace(repr(str(path)), "it") or type(error).__name__
        raise MediaError(path, f"cannot be read as a picture ({reason})") from error
    if max(picture.size) > MOST_ASPECT * min(picture.size):
        raise MediaError(path, f"{picture.width} x {picture.height}: one side is over {MOST_ASPECT} x the other")
    return picture if turn is None else picture.transpose(turn)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in UNSAFE)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns the picture upright, by its EXIF tags. Damaged tags say nothing of the pixels: the picture is then
    taken as it is stored."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(np.asarray(image).astype(np.float64), image.mode)
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(values: np.ndarray, mode: str) -> Image.Image:
    """Grey of more than 8 bits, which `convert("RGB")` would clip at 255. White is 65535 for integers; for floats 1,
    or 255 where one is above 1."""
    values = np.nan_to_num(values, nan=0.0)
    if mode == "F":
        scale = 255.0 if values.max() <= 1 else 1.0
    else:
        scale = 1 / 257
    return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    """CIE L*a*b*, which Pillow turns into RGB only by way of colour profiles."""
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    picture = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    assert picture is not None
    return picture
