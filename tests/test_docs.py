"""The pages and the shipped files say what the code says."""

from __future__ import annotations

import re

from docs.build import settings
from mmdora.core.config import RunConfig
from tests.conftest import ROOT


def test_the_settings_page_is_current():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings((ROOT / "mmdora" / "core" / "config.py").read_text(encoding="utf-8")), "run `make docs`"


def test_the_lock_holds_no_addresses():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    assert not re.search(r"^--(?!hash)", lock, re.MULTILINE)


def test_every_yaml_in_the_readme_is_a_config():
    import yaml

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        RunConfig.model_validate(yaml.safe_load(block))


def test_the_base_model_is_small():
    size = sum(f.stat().st_size for f in (ROOT / "assets" / "tiny-llava").iterdir())
    assert size <= 8 * 2**20
