"""Write docs/settings.md from the comments in mmdora/core/config.py: every key of a run's YAML."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "mmdora" / "core" / "config.py"
SECTIONS = {
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


def settings(source: str) -> str:
    """The page, from the text of config.py."""
    lines = source.splitlines()
    out = [
        "# Settings",
        "",
        "Every key of a run's YAML. `make docs` writes this page from `mmdora/core/config.py`; any key can be set on",
        "the command line: `mmdora train CONFIG section.key=value`.",
    ]
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or node.name not in SECTIONS:
            continue
        out += ["", f"## {SECTIONS[node.name]}", ""]
        if doc := ast.get_docstring(node):
            out += [doc, ""]
        out += ["| key | type | default | |", "|---|---|---|---|"]
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                out.append(row(field, lines))
    return "\n".join(out) + "\n"


def row(field: ast.AnnAssign, lines: list[str]) -> str:
    assert isinstance(field.target, ast.Name)
    kind = ast.unparse(field.annotation).replace("|", "\\|")
    if kind.startswith("Annotated["):
        kind = kind.removeprefix("Annotated[").split(",")[0]
    default = "required" if field.value is None or "Field(min" in ast.unparse(field.value) else ast.unparse(field.value)
    comment = lines[(field.end_lineno or field.lineno) - 1].partition("  # ")[2].replace("|", "\\|")
    name = field.target.id.rstrip("_")
    return f"| `{name}` | `{kind}` | `{default}` | {comment} |"


if __name__ == "__main__":
    (HERE / "settings.md").write_text(settings(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
