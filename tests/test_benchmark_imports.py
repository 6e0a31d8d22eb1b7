"""Names of benchmarks are known without loading a deep-learning library."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "scipy", "pandas", "pyarrow", "datasets", "deepspeed", "av", "nltk")


def test_importing_the_benchmarks_imports_no_heavy_library():
    script = f"import sys, eval.benchmarks; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
