"""Training data of the tiny base model: scenes of the shapes data as token blocks, block masks and patch labels."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data_pipelines.formats.shapes import CANVAS, COLORS, SHAPES, outline
from data_pipelines.images import load_image
from data_pipelines.samples import Sample
from data_pipelines.video import load_video
from mmdora.core.config import VideoConfig

ENGLISH = """
the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after words called just where most know get through back much before go
good new write our me man too any day same right look think also around another came come work three word must
because does part even place well such here take why things help put years different away again off went old number
great tell men say small every found still between name should home big give air line set own under read last never
us left end along while might next sound below saw something thought both few those always looked show large often
together asked house world going want school important until form food keep children feet land side without boy once
animals life enough took sometimes four head above kind began almost live page got earth need far hand high year
mother light parts country father let night following picture being study second eyes soon times story boys since
white days ever paper hard near sentence better best across during today others however sure means knew try told
young miles sun ways thing whole hear example heard several change answer room sea against top turned point city
play box boxes wall touching item items object objects tower block blocks exactly least black blue yellow grey
closely true false
"""
LATER_ANSWERS = [*"123456789", "up", "down", "left", "right"]


@dataclass
class Scene:
    """A scene prepared for training: pixels, its questions as token blocks, and labels of its patches."""

    pixels: Tensor  # image [3, size, size] or video [frames, 3, size, size]
    prefix: list[int]
    blocks: list[tuple[list[int], int]]  # (tokens of question and answer, number of answer tokens)
    patches: Tensor  # [patches, 3], see patch_labels
    num_objects: int

    @property
    def is_video(self) -> bool:
        return self.pixels.dim() == 4


def patch_labels(objects: list[dict], grid: int) -> Tensor:
    """Return labels [grid * grid, 3] of the patches: colour, shape and centre.

    Colour and shape are those of the object that covers over a third of the patch, -1 without one. The third label is 1
    if the patch holds an object's centre, else 0; objects are further apart than a patch is wide, so it holds one only.
    """
    mask = Image.new("L", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(mask)
    for number, t in enumerate(objects, 1):
        outline(pen, t["shape"], t["x"], t["y"], t["r"], number)
    cell = CANVAS // grid
    cells = np.asarray(mask).reshape(grid, cell, grid, cell).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
    labels = torch.tensor([-1, -1, 0]).repeat(grid * grid, 1)
    for number, t in enumerate(objects, 1):
        covered = torch.from_numpy((cells == number).mean(1) > 1 / 3)
        labels[covered, :2] = torch.tensor([list(COLORS).index(t["color"]), SHAPES.index(t["shape"])])
        labels[t["y"] // cell * grid + t["x"] // cell, 2] = 1
    return labels


def prepare(samples: list[Sample], rows: list[dict], processor, num_frames: int) -> list[Scene]:
    """Decode and tokenize every scene once, with the processor and template that inference uses."""
    tokenizer = processor.tokenizer
    size = processor.image_processor.size["height"]
    grid = math.isqrt(processor.num_image_tokens)
    scenes = []
    for sample, row in zip(samples, rows, strict=True):
        (media,) = sample.media()
        if row["scene"][0]["to"] is not None:
            video = load_video(media.path, VideoConfig(num_frames=num_frames))
            pixels = processor.video_processor(list(video.frames[None]), return_tensors="pt")["pixel_values_videos"][0]
            token, count = "<video>", num_frames * math.ceil(grid / 2) ** 2 + 1
        else:
            pixels = processor.image_processor([load_image(media.path)], return_tensors="pt")["pixel_values"][0, 0]
            # The whole image, and again as a 1 x 1 grid with newline tokens.
            token, count = "<image>", 2 * grid**2 + grid
        assert pixels.shape[-1] == size
        prefix = tokenizer(f"<s>USER: {token * count}\n", add_special_tokens=False).input_ids
        blocks = []
        for question, answer in zip(sample.messages[::2], sample.messages[1::2], strict=True):
            q = tokenizer(f"{question.text} ASSISTANT:", add_special_tokens=False).input_ids
            a = tokenizer(f" {answer.text}</s>", add_special_tokens=False).input_ids
            blocks.append((q + a, len(a)))
        scenes.append(Scene(pixels.half(), prefix, blocks, patch_labels(row["scene"], grid), len(row["scene"])))
    check_tokens(scenes[0], samples[0], processor)
    return scenes


def repeat_word(tokenizer, rng: random.Random) -> tuple[list[int], int]:
    """Return a block that asks to say a word; half of the words are answers of later tasks."""
    word = rng.choice(LATER_ANSWERS if rng.random() < 0.5 else ENGLISH.split())
    question = tokenizer(f"Say {word}. ASSISTANT:", add_special_tokens=False).input_ids
    answer = tokenizer(f" {word}</s>", add_special_tokens=False).input_ids
    return question + answer, len(answer)


def check_tokens(scene: Scene, sample: Sample, processor) -> None:
    """Assert that the training tokens equal what the chat template renders."""
    question, answer = (m.text for m in sample.messages[:2])
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    image_tokens = "<image>" * scene.prefix.count(processor.image_token_id)
    text = processor.apply_chat_template(turns).replace("<image>", image_tokens)
    expected = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert expected == scene.prefix + scene.blocks[0][0], "the recipe's tokens differ from the chat template's"


def collate(batch: list[Scene], pad: int) -> dict[str, Tensor]:
    """Return one padded batch; `block` is 0 on the scene, k on question k and -1 on padding."""
    length = max(len(s.prefix) + sum(len(b) for b, _ in s.blocks) for s in batch)
    ids = torch.full((len(batch), length), pad)
    labels = torch.full_like(ids, -100)
    block = torch.full_like(ids, -1)
    positions = torch.zeros_like(ids)
    for i, scene in enumerate(batch):
        end = len(scene.prefix)
        ids[i, :end], block[i, :end] = torch.tensor(scene.prefix), 0
        positions[i, :end] = torch.arange(end)
        for number, (tokens, answer) in enumerate(scene.blocks, 1):
            start, end = end, end + len(tokens)
            ids[i, start:end], block[i, start:end] = torch.tensor(tokens), number
            positions[i, start:end] = torch.arange(len(scene.prefix), len(scene.prefix) + len(tokens))
            labels[i, end - answer : end] = ids[i, end - answer : end]
    same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    images = [s.pixels for s in batch if not s.is_video]
    videos = [s.pixels for s in batch if s.is_video]
    size = batch[0].pixels.shape[-1]
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}
    if images:
        inputs["pixel_values"] = torch.stack(images).float()[:, None].repeat(1, 2, 1, 1, 1)
        inputs["image_sizes"] = torch.full((len(images), 2), size)
    if videos:
        inputs["pixel_values_videos"] = torch.stack(videos).float()
    return inputs | {"labels": labels}
