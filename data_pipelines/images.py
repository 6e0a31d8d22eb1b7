"""Load images: fully decoded, upright, 8-bit RGB; or a MediaError that names the file."""

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
# The formats of Pillow that run another program or the system's drawing code on the file.
UNSAFE = {"EPS", "WMF"}
# Longer side / shorter side; also Qwen's limit. Processors enlarge the shorter side: a line would take gigabytes.
MAX_ASPECT_RATIO = 200
CHANNELS = (1, 3)  # sizes that transformers takes for a number of channels


def load_image(path: Path, data: bytes | None = None) -> Image.Image:
    """Load an image as RGB: alpha is composited over white, the EXIF orientation is applied, and an animation gives its
    first frame. If `data` holds the file's bytes, `path` only names it.

    Raises MediaError for a missing, truncated or unreadable file, for an image over Pillow's decompression-bomb limit,
    and for an aspect ratio over MAX_ASPECT_RATIO.
    """
    if data is None:
        check_regular(path)
    elif not data:
        raise MediaError(path, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata, which is not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path if data is None else io.BytesIO(data), formats=_formats()) as file:
                file.load()  # decodes everything: `verify()` accepts truncated JPEGs
                transpose = _orientation(file)
                image = _rgb(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise MediaError(path, f"too large to decode safely ({error})") from error
    except Exception as error:  # Pillow's plugins raise any exception for damaged files
        reason = str(error).replace(repr(str(path)), "it") or type(error).__name__
        raise MediaError(path, f"cannot be read as an image ({reason})") from error
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        reason = f"{image.width} x {image.height} pixels: the aspect ratio is over {MAX_ASPECT_RATIO}"
        raise MediaError(path, reason)
    return image if transpose is None else image.transpose(transpose)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in UNSAFE)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that turns the image upright, by its EXIF tag. With damaged tags the image stays as it is
    stored, since its pixels are still valid."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_grey(np.asarray(image).astype(np.float64), image.mode)
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_grey(values: np.ndarray, mode: str) -> Image.Image:
    """Convert grey of more than 8 bits, which `convert("RGB")` would clip at 255. White is 65535 for integers; for
    floats it is 1, or 255 if any value is above 1."""
    values = np.nan_to_num(values, nan=0.0)
    if mode == "F":
        scale = 255.0 if values.max() <= 1 else 1.0
    else:
        scale = 1 / 257
    return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    """Convert CIE L*a*b*, for which Pillow needs colour profiles."""
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    assert converted is not None
    return converted


def unambiguous(image: Image.Image) -> Image.Image | np.ndarray:
    """Return what to give a processor for an RGB image: the image, or its array [3, height, width] if its height could
    be taken for a number of channels.

    transformers converts images to arrays [height, width, 3], and takes a first dimension of 1 or 3 for the channels.
    """
    return channels_first(np.asarray(image)) if image.height in CHANNELS else image


def channels_first(frames: np.ndarray) -> np.ndarray:
    """Return frames [..., height, width, 3] as [..., 3, height, width] if their height could be taken for a number of
    channels; others unchanged."""
    return np.ascontiguousarray(np.moveaxis(frames, -1, -3)) if frames.shape[-3] in CHANNELS else frames
