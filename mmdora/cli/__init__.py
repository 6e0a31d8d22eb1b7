"""The command line: one file per command, each of which parses options, calls the code below and prints.

torch, transformers, pydantic and rich are imported inside the commands, so that `mmdora --help` takes under 0.5 s and
an invalid config is reported in under 2 s.
"""

from mmdora.cli.app import app, main

# In the order of `mmdora --help`.
# isort: off
from mmdora.cli import train
from mmdora.cli import doctor
from mmdora.cli import plan
from mmdora.cli import evaluate
from mmdora.cli import score
from mmdora.cli import submit
from mmdora.cli import compare
from mmdora.cli import leaderboard
from mmdora.cli import merge
from mmdora.cli import convert
from mmdora.cli import chat
from mmdora.cli import analyze
from mmdora.cli import list_names
# isort: on

__all__ = [
    "analyze",
    "app",
    "chat",
    "compare",
    "convert",
    "doctor",
    "evaluate",
    "leaderboard",
    "list_names",
    "main",
    "merge",
    "plan",
    "score",
    "submit",
    "train",
]
