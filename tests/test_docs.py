"""The pages and the shipped files say what the code says."""

from __future__ import annotations

import re

from docs.build import settings_page
from mmdora.core.config import RunConfig
from tests.conftest import ROOT


def test_the_settings_page_is_current():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page(), "run `make docs`"


def test_every_key_has_a_description_and_bounds_are_shown():
    schema = RunConfig.model_json_schema()
    keys = [
        (section, key, field)
        for section, definition in {"RunConfig": schema, **schema["$defs"]}.items()
        for key, field in definition["properties"].items()
    ]
    assert len(keys) > 90
    assert [f"{section}.{key}" for section, key, field in keys if not field.get("description")] == []
    page = settings_page()
    for row in (
        "| `warmup_ratio` | number in [0, 1) | `0.03` |",
        "| `max_steps` | integer >= 1 or null | `null` |",
        "| `learning_rate` | number >= 0 or null | `null` |",
        "| `lr_scheduler` | `cosine`, `linear`, `constant` | `cosine` |",
        "| `model_config` | mapping or null | `null` |",
    ):
        assert row in page


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


def test_no_text_installs_mmdora_from_a_package_index():
    """The package is not published."""
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "mmdora").rglob("*.py"),
        *(ROOT / "eval").rglob("*.py"),
    ]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    assert [page for page, text in texts.items() if re.search(r"pip install ['\"]?mmdora", text)] == []
