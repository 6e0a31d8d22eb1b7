"""Synthetic images and videos of coloured shapes, generated from a seed as ordinary files in LLaVA's format.

`path: data/shapes/counting_train.json` names a task (`base`, `counting`, `motion`, `retained`) and a split (`train`,
`held_out`). If the file does not exist yet, its images (JPEG and PNG), videos (H.264 mp4) and questions are generated;
then it is read like any LLaVA file. A hash of the scene decides its split, so no scene is in both. Pillow and PyAV are
imported when a scene is drawn.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.formats.llava import LLaVA
from data_pipelines.formats.registry import DATASET_FORMATS
from mmdora.core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from PIL import ImageDraw

CANVAS = 96  # pixels, width and height
FRAMES = 8  # per video
COLORS = {
    "red": (215, 50, 45),
    "green": (45, 160, 75),
    "blue": (50, 95, 215),
    "yellow": (235, 200, 50),
    "purple": (145, 65, 175),
}
SHAPES = ("circle", "square", "triangle")
SEED = 0
HELD_OUT_SHARE = 8  # one scene in eight is held out


@dataclass(frozen=True)
class Thing:
    """A shape on the canvas: centre x, y and radius r in pixels. In a video it moves to `to`."""

    color: str
    shape: str
    x: int
    y: int
    r: int
    to: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


Scene = tuple[Thing, ...]
Question = tuple[str, str, str]  # (type, question, answer)


def split_of(scene: Scene) -> str:
    """Return the split of a scene. The hash covers its repr: renaming Thing or its fields would change the splits."""
    return "held_out" if zlib.crc32(repr(scene).encode()) % HELD_OUT_SHARE == 0 else "train"


def image_scene(rng: random.Random, things: int) -> Scene:
    """Draw `things` random shapes that do not touch; colours and shapes may repeat."""
    scene: list[Thing] = []
    while len(scene) < things:
        r = rng.randint(10, 13)
        x, y = rng.randint(r + 1, CANVAS - r - 2), rng.randint(r + 1, CANVAS - r - 2)
        if all((x - t.x) ** 2 + (y - t.y) ** 2 > (r + t.r + 4) ** 2 for t in scene):
            scene.append(Thing(rng.choice(list(COLORS)), rng.choice(SHAPES), x, y, r))
    return tuple(scene)


def video_scene(rng: random.Random, straight: bool) -> Scene:
    """Draw one moving shape. With `straight` it moves left, right, up or down, else in any direction."""
    while True:
        (thing,) = image_scene(rng, 1)
        to = [rng.randint(thing.r + 1, CANVAS - thing.r - 2) for _ in range(2)]
        if straight:
            fixed = rng.randrange(2)  # the axis along which it does not move
            to[fixed] = (thing.x, thing.y)[fixed]
        if max(abs(to[0] - thing.x), abs(to[1] - thing.y)) >= (44 if straight else 34):
            return (Thing(thing.color, thing.shape, thing.x, thing.y, thing.r, (to[0], to[1])),)


def draw(scene: Scene, time: float = 0.0) -> PILImage.Image:
    """Render the scene as an RGB image; `time` runs from 0 to 1 over a video."""
    from PIL import Image as PILImage
    from PIL import ImageDraw

    zoom = 2  # drawn at twice the size and reduced, for smooth edges
    image = PILImage.new("RGB", (CANVAS * zoom, CANVAS * zoom), (238, 238, 234))
    pen = ImageDraw.Draw(image)
    for thing in scene:
        end = thing.to or (thing.x, thing.y)
        x = (thing.x + (end[0] - thing.x) * time) * zoom
        y = (thing.y + (end[1] - thing.y) * time) * zoom
        outline(pen, thing.shape, x, y, thing.r * zoom, COLORS[thing.color])
    return image.reduce(zoom)


def outline(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int] | int
) -> None:
    """Draw a shape of radius r, centred at x, y."""
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    else:
        pen.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=fill)


# Questions. The first ones train the shipped base model; none of them asks for a count or a direction of motion.


def _unique(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    """Return the things whose key no other thing of the scene has."""
    keys = [key(t) for t in scene]
    return [t for t in scene if keys.count(key(t)) == 1]


def _place_questions(what: str, x: int, y: int, when: str = "") -> list[tuple[str, str]]:
    """Return questions on the third of the canvas that a point lies in, unless it is near a border between thirds."""
    third, margin = CANVAS // 3, 4
    ways = ((x, "on the", ("left", "middle", "right")), (y, "at the", ("top", "middle", "bottom")))
    out = []
    for value, where, (low, middle, high) in ways:
        if min(abs(value - third), abs(value - 2 * third)) >= margin:
            question = f"{when}is the {what} {where} {low}, {middle} or {high}?"
            out.append((question[0].upper() + question[1:], (low, middle, high)[value // third]))
    return out


def image_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Return all questions for the base model that the image answers unambiguously."""
    out: list[Question] = []
    for t in _unique(scene, lambda t: t.shape):
        out.append(("color", f"What color is the {t.shape}?", t.color))
        out += [("place", q, a) for q, a in _place_questions(t.shape, t.x, t.y)]
    for t in _unique(scene, lambda t: t.color):
        out.append(("shape", f"What shape is the {t.color} thing?", t.shape))
        out += [("place", q, a) for q, a in _place_questions(f"{t.color} thing", t.x, t.y)]
    names = {t.name for t in scene}
    out += [("exists", f"Is there a {name}?", "yes") for name in sorted(names)]
    mixed = sorted({f"{a.color} {b.shape}" for a in scene for b in scene} - names)
    absent = mixed + sorted({f"{c} {s}" for c in COLORS for s in SHAPES} - names - set(mixed))
    hard = rng.sample(mixed, min(len(mixed), len(names) - 1))
    out += [("exists", f"Is there a {n}?", "no") for n in hard + rng.sample(absent, len(names) - len(hard))]
    return out


def video_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Return questions for the base model on a video: colour, shape, and position at the start and at the end."""
    (t,) = scene
    assert t.to is not None
    what = rng.choice(("thing", t.shape, t.name))
    out: list[Question] = [
        ("clip color", f"What color is the {t.shape}?", t.color),
        ("clip shape", f"What shape is the {t.color} thing?", t.shape),
    ]
    out += [("clip start", q, a) for q, a in _place_questions(what, t.x, t.y, "At the start, ")]
    out += [("clip end", q, a) for q, a in _place_questions(what, *t.to, "At the end, ")]
    return out


def counting_questions(scene: Scene) -> list[Question]:
    """Return the question of the counting task."""
    return [("counting", "How many things are there?", str(len(scene)))]


def motion_questions(scene: Scene) -> list[Question]:
    """Return the question of the motion task."""
    (t,) = scene
    assert t.to is not None
    dx, dy = t.to[0] - t.x, t.to[1] - t.y
    answer = ("left" if dx < 0 else "right") if dx else ("up" if dy < 0 else "down")
    return [("motion", f"Which way does the {t.shape} move?", answer)]


# Tasks: each returns a scene and its questions, in the order in which they are used.


def _base(rng: random.Random, index: int) -> tuple[Scene, list[Question]]:
    if index % 4 == 3:
        scene = video_scene(rng, straight=False)
        questions = video_questions(scene, rng)
    else:
        scene = image_scene(rng, 1 + index // 4 % 3)
        questions = image_questions(scene, rng)
    return scene, rng.sample(questions, len(questions))


def _counting(rng: random.Random, index: int) -> tuple[Scene, list[Question]]:
    """The answers cycle through 1, 2, 3 and 4, so that they are balanced."""
    scene = image_scene(rng, 1 + index % 4)
    return scene, counting_questions(scene)


def _motion(rng: random.Random, index: int) -> tuple[Scene, list[Question]]:
    scene = video_scene(rng, straight=True)
    return scene, motion_questions(scene)


@dataclass(frozen=True)
class Task:
    """How the scenes of a task are drawn, and how many."""

    draw: Callable[[random.Random, int], tuple[Scene, list[Question]]]
    train: int  # scenes
    held_out: int  # scenes
    turns: int  # maximum number of questions per training scene


TASKS = {
    "base": Task(_base, train=24_000, held_out=2_000, turns=8),
    "retained": Task(_base, train=400, held_out=300, turns=1),
    "counting": Task(_counting, train=1_500, held_out=384, turns=1),
    "motion": Task(_motion, train=1_000, held_out=256, turns=1),
}


@DATASET_FORMATS.register("shapes")
class Shapes(LLaVA):
    """Synthetic images and videos of coloured shapes, generated from a seed as ordinary files in LLaVA's format."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return False  # its rows are LLaVA rows

    def files(self, path: Path, media: Path) -> list[Path]:
        """Return the file, generating it if it does not exist. Raises UserError if its name is not a task and split."""
        if not path.exists():
            generate(path)
        return super().files(path, media)


def generate(path: Path) -> None:
    """Write `<task>_<split>.json` and the folder of its media. Atomic: two processes may call it at the same time."""
    task_name, _, split = path.stem.partition("_")
    if task_name not in TASKS or split not in ("train", "held_out") or path.suffix != ".json":
        names = ", ".join(f"{t}_train.json, {t}_held_out.json" for t in TASKS)
        raise UserError(f"{path}: the shapes dataset has no such file; it has {names}")
    task = TASKS[task_name]
    temporary = path.parent / f".{path.stem}.{os.getpid()}"
    (temporary / path.stem).mkdir(parents=True)
    rng = random.Random(f"{SEED} {path.stem}")
    rows: list[dict[str, object]] = []
    while len(rows) < (task.train if split == "train" else task.held_out):
        scene, questions = task.draw(rng, len(rows))
        if split_of(scene) != split:
            continue
        turns = task.turns if split == "train" else 1
        rows.append(_write_row(temporary, path.stem, len(rows), scene, questions[:turns]))
    (temporary / path.name).write_text(json.dumps(rows, indent=0), encoding="utf-8")
    # The JSON is moved last: if it exists, so do its media.
    if not path.exists():
        shutil.rmtree(path.parent / path.stem, ignore_errors=True)
        (temporary / path.stem).replace(path.parent / path.stem)
        (temporary / path.name).replace(path)
    shutil.rmtree(temporary)


def _write_row(folder: Path, stem: str, index: int, scene: Scene, questions: list[Question]) -> dict[str, object]:
    if scene[0].to is not None:
        kind, name = "video", f"{stem}/{index:05d}.mp4"
        _write_video(folder / name, scene)
    else:
        kind, name = "image", f"{stem}/{index:05d}.{'jpg' if index % 2 else 'png'}"
        draw(scene).save(folder / name, quality=95)
    turns = []
    for number, (_, question, answer) in enumerate(questions):
        opening = f"<{kind}>\n" if number == 0 else ""
        turns += [{"from": "human", "value": opening + question}, {"from": "gpt", "value": answer}]
    things = [asdict(thing) for thing in scene]
    return {
        "id": f"{stem}-{index:05d}",
        kind: name,
        "conversations": turns,
        "category": questions[0][0],
        "scene": things,
    }


def _write_video(path: Path, scene: Scene) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "12", "preset": "veryfast"})
        stream.width = stream.height = CANVAS
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(FRAMES):
            image = np.asarray(draw(scene, i / (FRAMES - 1)))
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
