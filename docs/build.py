"""Write docs/settings.md, the table of every key of a run's YAML, from the schema in `mmdora.core.config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmdora.core.config import RunConfig

PAGE = Path(__file__).parent / "settings.md"
# The sections in the order of the page, with the key that each stands under in the YAML.
SECTIONS = {
    "RunConfig": "The sections",
    "ModelConfig": "model",
    "VisionEncoderConfig": "model.vision_encoder",
    "LanguageModelConfig": "model.language_model",
    "PartConfig": "parts.<part>",
    "DataConfig": "data",
    "SourceConfig": "data.train.<i>",
    "VideoConfig": "data.video",
    "TrainingConfig": "training",
    "EvaluationConfig": "evaluation.<i>",
    "JudgeConfig": "evaluation.<i>.judge",
}
INTRODUCTION = """\
# Settings

Every key of a run's YAML. Any key can be set on the command line: `mmdora train CONFIG section.key=value`; items of
lists go by index (`data.train.0.weight=2`), and `data.train=[FILE]` is short for one dataset. `make docs` writes this
page from `mmdora/core/config/`.
"""


def settings_page() -> str:
    """Return the page as Markdown."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"] | {"RunConfig": schema}
    assert set(SECTIONS) == set(definitions), "a section of the config is missing on the page"
    return "\n".join([INTRODUCTION, *(section(definitions[name], title) for name, title in SECTIONS.items())])


def section(definition: dict[str, Any], title: str) -> str:
    heading = title if title.startswith("The") else f"`{title}`"
    lines = [f"## {heading}", "", " ".join(definition["description"].split()), ""]
    lines += ["| key | type | default | description |", "|---|---|---|---|"]
    for key, field in definition["properties"].items():
        default = "required" if key in definition.get("required", ()) else f"`{default_of(field)}`"
        cells = (f"`{key}`", type_of(field), default, field["description"])
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def default_of(field: dict[str, Any]) -> str:
    value = field.get("default")
    if "$ref" in field:
        return "{}"  # a section of its own, whose defaults are in its table
    return value if isinstance(value, str) else json.dumps(value)


def type_of(field: dict[str, Any]) -> str:
    """Return a field's type with its bounds, in words: `integer >= 1`, `number in (0, 1]`, `list of string`."""
    if options := field.get("anyOf", field.get("oneOf")):
        names = [type_of(option) for option in options]
        return " or ".join(dict.fromkeys(names))
    if "$ref" in field:
        return f"`{SECTIONS[field['$ref'].rpartition('/')[2]]}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    match field.get("type"):
        case "array":
            return f"list of {type_of(field['items'])}"
        case "object":
            values = field.get("additionalProperties")
            return f"mapping to {type_of(values)}" if isinstance(values, dict) and values else "mapping"
        case "integer" | "number" as kind:
            return f"{kind}{bounds_of(field)}"
        case str(kind):
            return kind
    return "any value"


def bounds_of(field: dict[str, Any]) -> str:
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum", field.get("exclusiveMaximum"))
    if low is not None and high is not None:
        return f" in {'[' if 'minimum' in field else '('}{low:g}, {high:g}{']' if 'maximum' in field else ')'}"
    if low is not None:
        return f" {'>=' if 'minimum' in field else '>'} {low:g}"
    return "" if high is None else f" {'<=' if 'maximum' in field else '<'} {high:g}"


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
