"""One way to read a picture: fully decoded, upright, 8-bit RGB; or a MediaError that names the file."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_pipelines.samples import MediaError


def load_image(path: Path, data: bytes | None = None) -> Image.Image:
    """The picture at `path` as RGB; alpha lies over white, EXIF orientation is applied, an animation gives its first
    frame.

    Raises MediaError for a missing, truncated or unreadable file and for one over Pillow's decompression-bomb limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path if data is None else io.BytesIO(data)) as image:
                image.load()  # all of it: `verify()` passes truncated JPEGs
                return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise MediaError(path, "no such file") from None
    except Image.DecompressionBombWarning as error:
        raise MediaError(path, f"too large to decode safely ({error})") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise MediaError(path, f"cannot be read as a picture ({error})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in (
        "I;16",
        "I;16B",
        "I;16L",
        "I",
    ):  # 16-bit grey: 65535 is white; convert("RGB") would clip at 255
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
