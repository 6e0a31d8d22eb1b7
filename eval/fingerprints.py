"""Perceptual fingerprints of images and videos, to find copies that were resized, re-encoded or resampled.

An image's fingerprint is a thumbnail of 8 x 8 colours and the 64 bits of pHash: the signs of its lowest spatial
frequencies relative to their median (Zauner, "Implementation and benchmarking of perceptual image hash functions",
2010). Two images are near copies if at most `NEAR_BITS` bits differ, which is fast to test for many images, and no cell
of the thumbnails differs by more than `NEAR_COLOUR`, which separates drawings that share a layout. On NLVR's drawings,
JPEGs at half size differed by at most 12 bits and 23 levels, and any two different images by at least 42 levels. Crops,
mirror images and images inside other images are not found.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache

import numpy as np
from PIL import Image as PILImage

from data_pipelines.images import load_image
from data_pipelines.index import cache_folder
from data_pipelines.samples import Image, MediaError, Video
from data_pipelines.video import load_video
from mmdora.core.config import VideoConfig
from mmdora.core.errors import UserError

VERSION = 1  # of the cache's contents
SIDE, CELLS = 16, 8  # pixels: the side of the image that is hashed, and of the thumbnail
FRAMES = 4  # of a video, evenly spaced from the first to the last
NEAR_BITS = 12  # of 64
NEAR_COLOUR = 30  # of 255
NEAR_FRAMES = 0.75  # share of a video's frames that need a near copy in the other video
MAX_PAIRS = 2**14  # pairs of frames whose thumbnails are compared at once

Fingerprint = np.ndarray  # uint8 [frames, SIDE, SIDE, 3]: 1 frame for an image, FRAMES for a video


def fingerprint(part: Image | Video) -> Fingerprint | None:
    """Return the fingerprint, or None if the file cannot be read."""
    try:
        if isinstance(part, Image):
            frames = [load_image(part.path, part.data)]
        else:
            video = load_video(part.path, VideoConfig(num_frames=FRAMES), part.data)
            frames = [PILImage.fromarray(frame) for frame in video.frames]
    except MediaError:
        return None
    return np.stack([np.asarray(f.resize((SIDE, SIDE), PILImage.Resampling.BOX)) for f in frames])


class FingerprintIndex:
    """Held-out fingerprints; `search` returns those that have near copies among other fingerprints."""

    def __init__(self, held_out: Sequence[Fingerprint]):
        self.num_frames = np.array([len(f) for f in held_out], int)
        self.owners = np.repeat(np.arange(len(held_out)), self.num_frames)
        self.bits, self.cells = _hash(held_out)

    def search(self, others: Sequence[Fingerprint]) -> list[tuple[int, int]]:
        """Return near copies as pairs of indices (held out, other). NEAR_FRAMES of a video's frames must be near."""
        if not others or not len(self.owners):
            return []
        bits, cells = _hash(others)
        owners = np.repeat(np.arange(len(others)), [len(f) for f in others])
        # Bits are +1 and -1, so a matrix product counts equal bits minus different ones.
        frames, other_frames = np.nonzero(self.bits @ bits.T >= 64 - 2 * NEAR_BITS)
        near = np.zeros(len(frames), bool)
        for i in range(0, len(frames), MAX_PAIRS):
            chunk = slice(i, i + MAX_PAIRS)
            colour_distance = np.abs(self.cells[frames[chunk]] - cells[other_frames[chunk]]).max(1)
            near[chunk] = colour_distance <= NEAR_COLOUR
        # A held-out frame counts once for each other file, however many of its frames are near.
        pairs = np.unique(np.stack([frames[near], owners[other_frames[near]]]), axis=1)
        files, counts = np.unique(np.stack([self.owners[pairs[0]], pairs[1]]), axis=1, return_counts=True)
        enough = counts >= NEAR_FRAMES * self.num_frames[files[0]]
        return [(int(held_out), int(other)) for held_out, other in files[:, enough].T]


def _hash(fingerprints: Sequence[Fingerprint]) -> tuple[np.ndarray, np.ndarray]:
    """Return pHash bits, float32 of +1 and -1 [frames, 64], and thumbnails, float32 [frames, CELLS * CELLS * 3]."""
    pixels = np.concatenate([*fingerprints, np.empty((0, SIDE, SIDE, 3), np.uint8)]).astype(np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    low = (_cosines() @ grey @ _cosines().T).reshape(-1, 64)
    # In a plain area all frequencies are noise, so a bit is set only if it exceeds the median by one level.
    above = low > np.median(low[:, 1:], axis=1, keepdims=True) + 1
    step = SIDE // CELLS
    cells = pixels.reshape(-1, CELLS, step, CELLS, step, 3).mean((2, 4)).reshape(len(pixels), CELLS * CELLS * 3)
    return np.where(above, 1, -1).astype(np.float32), cells


@cache
def _cosines() -> np.ndarray:
    """Return the eight lowest rows of the discrete cosine transform, float32 [8, SIDE]."""
    places = 2 * np.arange(SIDE)[None] + 1
    return np.cos(np.pi * places * np.arange(8)[:, None] / (2 * SIDE)).astype(np.float32)


class FingerprintCache:
    """Fingerprints in the user's cache, by path, size and modification time."""

    def __init__(self, database: sqlite3.Connection):
        self.database = database

    def get(self, part: Image | Video) -> Fingerprint | None:
        """Return the fingerprint, or None if the file cannot be read. Only plain files are cached: neither files in a
        shard nor directories of images."""
        if part.data is not None or not part.path.is_file():
            return fingerprint(part)
        status = part.path.stat()
        key = (str(part.path.absolute()), type(part).__name__, status.st_size, status.st_mtime_ns)
        query = "SELECT content FROM files WHERE (path, kind, size, changed) = (?, ?, ?, ?)"
        if row := self.database.execute(query, key).fetchone():
            return np.frombuffer(row[0], np.uint8).reshape(-1, SIDE, SIDE, 3)
        computed = fingerprint(part)
        if computed is not None:
            self.database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", (*key, computed.tobytes()))
        return computed


@contextmanager
def fingerprint_cache() -> Iterator[FingerprintCache]:
    """Open the user's cache of fingerprints. Raises UserError if it cannot be used."""
    path = cache_folder().parent / f"fingerprints-{VERSION}.sqlite"
    hint = "set MMDORA_CACHE to use another cache folder"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: {error.strerror} ({hint})") from error
    try:
        with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = OFF")  # entries lost in a power cut are computed again
            database.execute(
                "CREATE TABLE IF NOT EXISTS files "
                "(path TEXT, kind TEXT, size INTEGER, changed INTEGER, content BLOB, PRIMARY KEY (path, kind))"
            )
            yield FingerprintCache(database)
    except sqlite3.Error as error:
        raise UserError(f"{path}: {error}; remove it, or {hint}") from error
