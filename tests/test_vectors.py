"""Scores equal those of the official scorers, for every recorded case.

`MMDORA_VECTORS` names another folder of cases. A kind of case without a function in tests/official fails.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.official import KINDS

VECTORS = Path(os.environ.get("MMDORA_VECTORS", Path(__file__).parent / "vectors"))


def cases():
    for path in sorted(VECTORS.glob("*.json")):
        seen: Counter[str] = Counter()
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            kind = case["kind"]
            yield pytest.param(path.stem, case, id=f"{path.stem}-{kind}-{seen[kind]}")
            seen[kind] += 1


@pytest.mark.parametrize(("file", "case"), cases())
def test_equals_the_official_scorer(file, case):
    kind = KINDS.get((file, case["kind"]))
    assert kind is not None, f"{file}.json: no function for cases of kind {case['kind']!r}"
    expected, found = case["expected"], kind.answer(case["input"])
    if isinstance(expected, dict):
        expected = {k: v for k, v in expected.items() if k not in kind.ignored}
        found = {k: v for k, v in found.items() if k in expected or k not in kind.optional}
    check(found, expected, kind.tolerance)


def check(found, expected, tolerance, where="answer"):
    """Compare recursively: floats within a relative tolerance, NaN equal to NaN."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}: {found!r} is not {expected!r}"
        assert found.keys() == expected.keys(), f"{where}: keys differ"
        for key in expected:
            check(found[key], expected[key], tolerance, f"{where}[{key!r}]")
    elif isinstance(expected, list):
        assert len(found) == len(expected), f"{where}: {found!r} is not {expected!r}"
        for i, (item, expected_item) in enumerate(zip(found, expected, strict=True)):
            check(item, expected_item, tolerance, f"{where}[{i}]")
    elif isinstance(expected, float):
        same = math.isnan(found) if math.isnan(expected) else math.isclose(found, expected, rel_tol=tolerance)
        assert same, f"{where}: {found!r} is not {expected!r}"
    else:
        assert found == expected, f"{where}: {found!r} is not {expected!r}"
        assert isinstance(found, bool) == isinstance(expected, bool)
