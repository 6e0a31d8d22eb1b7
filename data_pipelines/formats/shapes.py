"""A small world of coloured shapes, made from a seed as ordinary files in LLaVA's format.

`path: data/shapes/counting_train.json` names a task (`base`, `counting`, `motion`, `retained`) and a split (`train`,
`held_out`). Where the file does not exist yet, its pictures (JPEG and PNG), clips (H.264 mp4) and questions are made;
then it is read like any LLaVA file. A scene belongs to one split by a hash of what it shows, so no scene is ever in
both.
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
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from data_pipelines.formats.llava import LLaVA
from data_pipelines.formats.registry import DATASET_FORMATS
from mmdora.core.errors import UserError

CANVAS = 96  # pixels, both ways
FRAMES = 8  # in a clip
COLORS = {
    "red": (215, 50, 45),
    "green": (45, 160, 75),
    "blue": (50, 95, 215),
    "yellow": (235, 200, 50),
    "purple": (145, 65, 175),
}
SHAPES = ("circle", "square", "triangle")
SEED = 0
HELD_OUT_SHARE = 8  # one scene in eight


@dataclass(frozen=True)
class Thing:
    """A shape on the canvas; x, y is its centre and r its radius, in pixels; it ends at `to` where the scene is a
    clip."""

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
    return "held_out" if zlib.crc32(repr(scene).encode()) % HELD_OUT_SHARE == 0 else "train"


def image_scene(rng: random.Random, things: int) -> Scene:
    """`things` shapes that do not touch; colours and shapes may repeat."""
    scene: list[Thing] = []
    while len(scene) < things:
        r = rng.randint(10, 13)
        x, y = rng.randint(r + 1, CANVAS - r - 2), rng.randint(r + 1, CANVAS - r - 2)
        if all((x - t.x) ** 2 + (y - t.y) ** 2 > (r + t.r + 4) ** 2 for t in scene):
            scene.append(Thing(rng.choice(list(COLORS)), rng.choice(SHAPES), x, y, r))
    return tuple(scene)


def clip_scene(rng: random.Random, straight: bool) -> Scene:
    """One shape that moves: anywhere, or (`straight`) left, right, up or down."""
    while True:
        (thing,) = image_scene(rng, 1)
        to = [rng.randint(thing.r + 1, CANVAS - thing.r - 2) for _ in range(2)]
        if straight:
            stays = rng.randrange(2)
            to[stays] = (thing.x, thing.y)[stays]
        if max(abs(to[0] - thing.x), abs(to[1] - thing.y)) >= (44 if straight else 34):
            return (Thing(thing.color, thing.shape, thing.x, thing.y, thing.r, (to[0], to[1])),)


def draw(scene: Scene, time: float = 0.0) -> PILImage.Image:
    """The scene as an RGB picture; `time` runs from 0 to 1 over a clip."""
    zoom = 2  # drawn twice as large and reduced, for smooth edges
    picture = PILImage.new("RGB", (CANVAS * zoom, CANVAS * zoom), (238, 238, 234))
    pen = ImageDraw.Draw(picture)
    for thing in scene:
        end = thing.to or (thing.x, thing.y)
        x = (thing.x + (end[0] - thing.x) * time) * zoom
        y = (thing.y + (end[1] - thing.y) * time) * zoom
        outline(pen, thing.shape, x, y, thing.r * zoom, COLORS[thing.color])
    return picture.reduce(zoom)


def outline(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int] | int
) -> None:
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    else:
        pen.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=fill)


# Questions. Those of the base model's own training first: none of them counts or names a direction of motion.


def _only(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    keys = [key(t) for t in scene]
    return [t for t in scene if keys.count(key(t)) == 1]


def _place(what: str, x: int, y: int, when: str = "") -> list[tuple[str, str]]:
    """Questions on which third of the canvas a point lies in, where it is clear of the borders between thirds."""
    third, clear = CANVAS // 3, 4
    ways = ((x, "on the", ("left", "middle", "right")), (y, "at the", ("top", "middle", "bottom")))
    out = []
    for value, where, (low, middle, high) in ways:
        if min(abs(value - third), abs(value - 2 * third)) >= clear:
            question = f"{when}is the {what} {where} {low}, {middle} or {high}?"
            out.append((question[0].upper() + question[1:], (low, middle, high)[value // third]))
    return out


def image_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every question of the base's own types that the picture answers without doubt."""
    out: list[Question] = []
    for t in _only(scene, lambda t: t.shape):
        out.append(("color", f"What color is the {t.shape}?", t.color))
        out += [("place", q, a) for q, a in _place(t.shape, t.x, t.y)]
    for t in _only(scene, lambda t: t.color):
        out.append(("shape", f"What shape is the {t.color} thing?", t.shape))
        out += [("place", q, a) for q, a in _place(f"{t.color} thing", t.x, t.y)]
    names = {t.name for t in scene}
    out += [("exists", f"Is there a {name}?", "yes") for name in sorted(names)]
    mixed = sorted({f"{a.color} {b.shape}" for a in scene for b in scene} - names)
    absent = mixed + sorted({f"{c} {s}" for c in COLORS for s in SHAPES} - names - set(mixed))
    hard = rng.sample(mixed, min(len(mixed), len(names) - 1))
    out += [("exists", f"Is there a {n}?", "no") for n in hard + rng.sample(absent, len(names) - len(hard))]
    return out


def clip_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """What the base can tell of a clip: colour, shape, and where the thing is at the start and at the end."""
    (t,) = scene
    assert t.to is not None
    what = rng.choice(("thing", t.shape, t.name))
    out: list[Question] = [
        ("clip color", f"What color is the {t.shape}?", t.color),
        ("clip shape", f"What shape is the {t.color} thing?", t.shape),
    ]
    out += [("clip start", q, a) for q, a in _place(what, t.x, t.y, "At the start, ")]
    out += [("clip end", q, a) for q, a in _place(what, *t.to, "At the end, ")]
    return out


def counting_questions(scene: Scene) -> list[Question]:
    return [("counting", "How many things are there?", str(len(scene)))]


def motion_questions(scene: Scene) -> list[Question]:
    (t,) = scene
    assert t.to is not None
    dx, dy = t.to[0] - t.x, t.to[1] - t.y
    answer = ("left" if dx < 0 else "right") if dx else ("up" if dy < 0 else "down")
    return [("motion", f"Which way does the {t.shape} move?", answer)]


# Tasks: a scene, and its questions with the most wanted first.


def _base(rng: random.Random, index: int) -> tuple[Scene, list[Question]]:
    if index % 4 == 3:
        scene = clip_scene(rng, straight=False)
        questions = clip_questions(scene, rng)
    else:
        scene = image_scene(rng, 1 + index // 4 % 3)
        questions = image_questions(scene, rng)
    return scene, rng.sample(questions, len(questions))


def _counting(rng: random.Random, index: int) -> tuple[Scene, list[Question]]:
    """The answers run through 1, 2, 3 and 4, so that none is the common one."""
    scene = image_scene(rng, 1 + index % 4)
    return scene, counting_questions(scene)


def _motion(rng: random.Random, index: int) -> tuple[Scene, list[Question]]:
    scene = clip_scene(rng, straight=True)
    return scene, motion_questions(scene)


@dataclass(frozen=True)
class Task:
    make: Callable[[random.Random, int], tuple[Scene, list[Question]]]
    train: int  # scenes
    held_out: int
    turns: int  # at most so many questions of a training scene


TASKS = {
    "base": Task(_base, train=24_000, held_out=2_000, turns=8),
    "retained": Task(_base, train=400, held_out=300, turns=1),
    "counting": Task(_counting, train=1_500, held_out=384, turns=1),
    "motion": Task(_motion, train=1_000, held_out=256, turns=1),
}


@DATASET_FORMATS.register("shapes")
class Shapes(LLaVA):
    """A small world of coloured shapes, made from a seed as ordinary files in LLaVA's format."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return False  # its rows are LLaVA's

    def files(self, path: Path, media: Path) -> list[Path]:
        """The file, made first where it does not exist. Raises UserError where its name is no task and split."""
        if not path.exists():
            make(path)
        return super().files(path, media)


def make(path: Path) -> None:
    """Write `<task>_<split>.json` and the folder of its media. Atomic: two processes may call it at once."""
    task_name, _, split = path.stem.partition("_")
    if task_name not in TASKS or split not in ("train", "held_out") or path.suffix != ".json":
        names = ", ".join(f"{t}_train.json, {t}_held_out.json" for t in TASKS)
        raise UserError(f"{path}: the shapes world has no such file; it makes {names}")
    task = TASKS[task_name]
    aside = path.parent / f".{path.stem}.{os.getpid()}"
    (aside / path.stem).mkdir(parents=True)
    rng = random.Random(f"{SEED} {path.stem}")
    rows: list[dict[str, object]] = []
    while len(rows) < (task.train if split == "train" else task.held_out):
        scene, questions = task.make(rng, len(rows))
        if split_of(scene) != split:
            continue
        turns = task.turns if split == "train" else 1
        rows.append(_write_row(aside, path.stem, len(rows), scene, questions[:turns]))
    (aside / path.name).write_text(json.dumps(rows, indent=0), encoding="utf-8")
    # The JSON is moved last: where it exists, its media do.
    if not path.exists():
        shutil.rmtree(path.parent / path.stem, ignore_errors=True)
        (aside / path.stem).replace(path.parent / path.stem)
        (aside / path.name).replace(path)
    shutil.rmtree(aside)


def _write_row(folder: Path, stem: str, index: int, scene: Scene, questions: list[Question]) -> dict[str, object]:
    if scene[0].to is not None:
        kind, name = "video", f"{stem}/{index:05d}.mp4"
        _write_clip(folder / name, scene)
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


def _write_clip(path: Path, scene: Scene) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "12", "preset": "veryfast"})
        stream.width = stream.height = CANVAS
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(FRAMES):
            picture = np.asarray(draw(scene, i / (FRAMES - 1)))
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
