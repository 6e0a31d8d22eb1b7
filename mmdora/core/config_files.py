"""A run's YAML: found by path or shipped name, changed by overrides, read into a RunConfig with every problem told at
once, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from mmdora.core.config import JudgeConfig, RunConfig, Section
from mmdora.core.errors import UserError
from mmdora.core.registry import nearest

S = TypeVar("S", bound=Section)


def shipped_path(name: str) -> Path | None:
    """`configs/…` or `assets/…` as shipped: inside the wheel, or at the repository's root; None where it is in
    neither."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / "_shipped", package.parent):
        if name.startswith(("configs/", "assets/")) and (root / name).exists():
            return root / name
    return None


def find_path(value: str) -> Path:
    """A path of a config: relative to the working directory and, where nothing is there, to what is shipped."""
    path = Path(value).expanduser()
    if not path.exists() and not path.is_absolute():
        return shipped_path(path.as_posix()) or path
    return path


def find_config(name: str) -> Path:
    """A config by path, or by the name of a shipped one (`quickstart`). Raises UserError."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_path(f"configs/{name}.yaml") or shipped_path(name)
    if shipped is not None and shipped.is_file():
        return shipped
    folder = shipped_path("configs/quickstart.yaml")
    known = sorted(p.stem for p in folder.parent.glob("*.yaml")) if folder else []
    raise UserError(
        f"no config at {name!r}.{nearest(path.name.removesuffix('.yaml'), known)} Shipped configs: {', '.join(known)}"
    )


def load_config(name: str, overrides: list[str] | None = None) -> RunConfig:
    """The config at a path (or a shipped name) with `section.key=value` overrides. Raises UserError with every
    problem."""
    path = find_config(name)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections (model, parts, data, training), found {type(tree).__name__}")
    for override in overrides or []:
        apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], source: str) -> RunConfig:
    """A tree of plain values as a RunConfig. Raises UserError that lists every problem."""
    return parse_section(RunConfig, tree, f"{source} is not a valid config")


def parse_section(kind: type[S], values: dict[str, Any], trouble: str) -> S:
    """Plain values as a section. Raises UserError that lists every problem behind `trouble`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(e) for e in error.errors()]
        raise UserError(f"{trouble}:\n" + "\n".join(f"  {p}" for p in problems)) from None


def judge_config(url: str | None, model: str | None, verdicts: str | None) -> JudgeConfig | None:
    """The judge that a command line names, if it names one. Raises UserError."""
    given = {"url": url, "model": model, "verdicts": verdicts}
    if all(value is None for value in given.values()):
        return None
    return parse_section(JudgeConfig, given, "--judge-url, --judge-model and --verdicts")


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML: what `load_config` reads back to an equal one."""
    tree = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def _problem(error: Any) -> str:
    """One pydantic error as `key: what is wrong`, with the nearest known key for an unknown one."""
    key = ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        return f"{key}: unknown key.{nearest(str(error['loc'][-1]), known)} Known: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{key}: required, but missing"
    message = error["msg"].removeprefix("Value error, ")
    shown = error["input"]
    found = f" (found {shown!r})" if isinstance(shown, str | int | float | bool) or shown is None else ""
    return f"{key}: {message}{found}" if key else message


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    """The keys that the section at `location` knows, read off the schema."""
    schema = RunConfig.model_json_schema()
    node: dict[str, Any] = schema
    for step in location:
        node = _resolve(node, schema)
        if isinstance(step, int):
            node = node["items"]
        elif step in node.get("properties", {}):
            node = node["properties"][step]
        else:
            node = node["additionalProperties"]
    return list(_resolve(node, schema).get("properties", {}))


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    options = [o for o in node.get("anyOf", []) if o.get("type") != "null"]
    node = options[0] if options else node
    return schema["$defs"][node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else node


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key; list items go by index, values are YAML. Raises UserError that quotes the override."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; write section.key=value")
    try:
        value = yaml.safe_load(text)
        if isinstance(value, str) and _is_number(value):
            value = float(value)  # YAML 1.1 reads 2e-4 (without a point) as a string
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML ({error})") from error
    *path, last = key.split(".")
    node: Any = tree
    for step in path:
        node = _descend(node, step, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.lower().strip("+-") not in ("nan", "inf", "infinity")


def _descend(node: Any, step: str, override: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, step, override)]
    else:
        if node.get(step) is None:
            node[step] = {}
        child = node[step]
    if not isinstance(child, dict | list):
        raise UserError(f"{override!r}: {step!r} is a value ({child!r}), not a section")
    return child


def _index(items: list[Any], step: str, override: str) -> int:
    if not step.isdigit() or int(step) >= len(items):
        raise UserError(f"{override!r}: {step!r} is not an index into a list of {len(items)}")
    return int(step)


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that results go into. Raises UserError that names the option where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot make the folder {folder} ({error.strerror})") from error


def is_there(path: str) -> bool:
    """Whether a path names something; a pattern of shards is looked into when it is read."""
    return find_path(path).exists() or not {"*", "{"}.isdisjoint(path)
