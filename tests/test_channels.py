"""Images and videos that are 1 or 3 pixels high keep their colours."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as PILImage

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Sample, Text, Video
from mmdora.core.config import VideoConfig
from tests.batch_families import BATCH_FAMILIES
from tests.families import FAMILIES, Family
from tests.test_encoding import user

COLOR = (200, 100, 0)
FAMILIES_OF_ALL_KINDS = FAMILIES | BATCH_FAMILIES


def levels(encoder: Encoder, part: Image | Video) -> set[float]:
    """Return the different pixel values of one medium of a single colour; padding is 0."""
    encoded = encoder.encode_prompt(Sample("s", (user(part, Text("What?")),), "test"))
    pixels = next(value for key, value in encoded.items() if key.startswith("pixel_values"))
    return set(np.round(pixels.unique().numpy(), 3).tolist()) - {0.0}


@pytest.fixture(scope="module", params=FAMILIES_OF_ALL_KINDS)
def family(request) -> tuple[Family, Encoder]:
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM needs num2words")
    family = FAMILIES_OF_ALL_KINDS[request.param]
    return family, Encoder(family.build()[1], VideoConfig(num_frames=4))


@pytest.mark.parametrize("height", [1, 3])
def test_low_images_and_videos_keep_their_colours(family, height, tmp_path):
    """Before: Video-LLaVA mixed the channels of these images, and Qwen's video processors those of these videos."""

    def written(height: int) -> Image:
        PILImage.new("RGB", (36, height), COLOR).save(path := tmp_path / f"{height}.png")
        return Image(path)

    def frames(height: int) -> Video:
        (folder := tmp_path / f"frames{height}").mkdir()
        for i in range(4):
            PILImage.new("RGB", (36, height), COLOR).save(folder / f"{i}.png")
        return Video(folder)

    media, encoder = family[0].media, family[1]
    for kind, make in (("image", written), ("video", frames)):
        if kind in media:
            assert levels(encoder, make(height)) == levels(encoder, make(4))
