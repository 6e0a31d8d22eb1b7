"""Run commands in one process that has not imported torch; print each one's exit code, output and heavy imports."""

from __future__ import annotations

import io
import json
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout

from mmdora.cli import main

HEAVY = {"torch", "transformers", "deepspeed"}


def run(arguments: list[str]) -> dict[str, object]:
    out, error, code = io.StringIO(), io.StringIO(), 0
    start = time.perf_counter()
    with redirect_stdout(out), redirect_stderr(error):
        try:
            main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:
            traceback.print_exc()
            code = -1
    seconds = time.perf_counter() - start
    imported = sorted(HEAVY & set(sys.modules))
    return {"code": code, "error": error.getvalue(), "imported": imported, "seconds": round(seconds, 3)}


if __name__ == "__main__":
    cases = json.loads(sys.stdin.read())
    print(json.dumps({name: run(arguments) for name, arguments in cases.items()}))
