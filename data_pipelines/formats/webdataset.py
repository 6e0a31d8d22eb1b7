"""WebDataset: tar shards in which the files of a sample have names that are equal up to the first dot.

    cats-0000.tar: 000.jpg 000.json 001.jpg 001.txt …

`.json` is a row of any other format, whose media are the sample's images and videos; `.txt` is a caption; `.cls` is the
category. `path` is a shard, a folder of shards, or `cats-{0000..0009}.tar`. Shards have random access, so an epoch is
shuffled as a whole and resumes exactly. Source: https://github.com/webdataset/webdataset#the-webdataset-format
"""

from __future__ import annotations

from data_pipelines.formats.huggingface import Container
from data_pipelines.formats.registry import DATASET_FORMATS


@DATASET_FORMATS.register("webdataset")
class WebDataset(Container):
    """WebDataset shards (tar): `.json` (a row of any format) or `.txt` (a caption), with images and videos."""
