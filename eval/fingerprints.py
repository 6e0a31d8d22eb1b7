"""What a picture or a clip looks like, in a few bytes: to find copies that were resized, re-encoded or cut anew.

A picture's fingerprint is a thumbnail of 8 × 8 colours and the 64 bits of pHash: the signs of its lowest spatial
frequencies about their median (Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010).
Two pictures are near where at most `NEAR_BITS` bits differ, which is quick to ask of many, and no cell of the
thumbnails differs by more than `NEAR_COLOUR`, which tells drawings apart that share their layout. On NLVR's drawings,
JPEGs of half the size differed by 12 bits and 23 levels at most, and no two pictures by less than 42 levels. Crops,
mirror images and pictures inside others are not found.
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

VERSION = 1  # of what the cache holds
SIDE, CELLS = 16, 8  # of what is hashed, and of the thumbnail, in pixels
FRAMES = 4  # of a clip, at equal steps from the first to the last
NEAR_BITS = 12  # of 64
NEAR_COLOUR = 30  # of 255
NEAR_FRAMES = 0.75  # of a clip's frames that must have a near one in the other
PAIRS = 2**14  # compared at once

Fingerprint = np.ndarray  # uint8 [frames, SIDE, SIDE, 3]: one of a picture, FRAMES of a clip


def fingerprint(part: Image | Video) -> Fingerprint | None:
    """None for a file that cannot be read."""
    try:
        if isinstance(part, Image):
            frames = [load_image(part.path, part.data)]
        else:
            clip = load_video(part.path, VideoConfig(num_frames=FRAMES), part.data)
            frames = [PILImage.fromarray(frame) for frame in clip.frames]
    except MediaError:
        return None
    return np.stack([np.asarray(f.resize((SIDE, SIDE), PILImage.Resampling.BOX)) for f in frames])


class Near:
    """Held-out fingerprints, of which `search` finds those that others are near to."""

    def __init__(self, held_out: Sequence[Fingerprint]):
        self.frames = np.array([len(f) for f in held_out], int)
        self.owners = np.repeat(np.arange(len(held_out)), self.frames)
        self.bits, self.cells = _described(held_out)

    def search(self, others: Sequence[Fingerprint]) -> list[tuple[int, int]]:
        """Places (held out, other) of what is near. A clip is near where enough of its frames are."""
        if not others or not len(self.owners):
            return []
        bits, cells = _described(others)
        owners = np.repeat(np.arange(len(others)), [len(f) for f in others])
        # Bits are ±1, so that a product of matrices counts those that are the same.
        frames, theirs = np.nonzero(self.bits @ bits.T >= 64 - 2 * NEAR_BITS)
        alike = np.zeros(len(frames), bool)
        for i in range(0, len(frames), PAIRS):
            these = slice(i, i + PAIRS)
            alike[these] = np.abs(self.cells[frames[these]] - cells[theirs[these]]).max(1) <= NEAR_COLOUR
        # A held-out frame counts once for each file that it is near to, in however many frames.
        pairs = np.unique(np.stack([frames[alike], owners[theirs[alike]]]), axis=1)
        files, counts = np.unique(np.stack([self.owners[pairs[0]], pairs[1]]), axis=1, return_counts=True)
        enough = counts >= NEAR_FRAMES * self.frames[files[0]]
        return [(int(mine), int(other)) for mine, other in files[:, enough].T]


def _described(fingerprints: Sequence[Fingerprint]) -> tuple[np.ndarray, np.ndarray]:
    """Bits as float32 ±1 [frames, 64], and thumbnails float32 [frames, CELLS * CELLS * 3]."""
    pixels = np.concatenate([*fingerprints, np.empty((0, SIDE, SIDE, 3), np.uint8)]).astype(np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    low = (_cosines() @ grey @ _cosines().T).reshape(-1, 64)
    # A plain area has no frequencies but noise: to count, one must be above the median by a level.
    above = low > np.median(low[:, 1:], axis=1, keepdims=True) + 1
    step = SIDE // CELLS
    cells = pixels.reshape(-1, CELLS, step, CELLS, step, 3).mean((2, 4)).reshape(len(pixels), CELLS * CELLS * 3)
    return np.where(above, 1, -1).astype(np.float32), cells


@cache
def _cosines() -> np.ndarray:
    """The eight lowest rows of the discrete cosine transform, float32 [8, SIDE]."""
    places = 2 * np.arange(SIDE)[None] + 1
    return np.cos(np.pi * places * np.arange(8)[:, None] / (2 * SIDE)).astype(np.float32)


class FingerprintCache:
    """Fingerprints of files, kept in the user's cache by path, size and time of change."""

    def __init__(self, database: sqlite3.Connection):
        self.database = database

    def get(self, part: Image | Video) -> Fingerprint | None:
        """As `fingerprint`. What lies in a shard, or in a directory of pictures, is not kept."""
        if part.data is not None or not part.path.is_file():
            return fingerprint(part)
        about = part.path.stat()
        key = (str(part.path.absolute()), type(part).__name__, about.st_size, about.st_mtime_ns)
        found = self.database.execute("SELECT content FROM files WHERE (path, kind, size, changed) = (?, ?, ?, ?)", key)
        if row := found.fetchone():
            return np.frombuffer(row[0], np.uint8).reshape(-1, SIDE, SIDE, 3)
        made = fingerprint(part)
        if made is not None:
            self.database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", (*key, made.tobytes()))
        return made


@contextmanager
def fingerprint_cache() -> Iterator[FingerprintCache]:
    """The user's cache of fingerprints. Raises UserError where it cannot be used."""
    path = cache_folder().parent / f"fingerprints-{VERSION}.sqlite"
    hint = "MMDORA_CACHE names another folder to cache in"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: {error.strerror} ({hint})") from error
    try:
        with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = OFF")  # what a power cut takes is made again
            database.execute(
                "CREATE TABLE IF NOT EXISTS files "
                "(path TEXT, kind TEXT, size INTEGER, changed INTEGER, content BLOB, PRIMARY KEY (path, kind))"
            )
            yield FingerprintCache(database)
    except sqlite3.Error as error:
        raise UserError(f"{path}: {error}; remove it, or {hint}") from error
