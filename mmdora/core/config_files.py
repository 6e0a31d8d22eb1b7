"""Find, read, override, validate and write a run's YAML."""

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
    """Return the shipped file `configs/...` or `assets/...`, from the wheel or the repository's root; else None."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / "_shipped", package.parent):
        if name.startswith(("configs/", "assets/")) and (root / name).exists():
            return root / name
    return None


def find_path(value: str) -> Path:
    """Return a path of a config, relative to the working directory or, if it does not exist there, to shipped files."""
    path = Path(value).expanduser()
    if not path.exists() and not path.is_absolute():
        return shipped_path(path.as_posix()) or path
    return path


def path_exists(value: str) -> bool:
    """Return whether a data path exists. A pattern of shards counts as existing: its files are listed when it is
    read."""
    return find_path(value).exists() or not {"*", "{"}.isdisjoint(value)


def shipped_configs() -> list[Path]:
    """Return the files of the shipped configs, sorted by name."""
    quickstart = shipped_path("configs/quickstart.yaml")
    return sorted(quickstart.parent.rglob("*.yaml")) if quickstart else []


def shipped_name(path: Path) -> str:
    """Return the name of a shipped config, as commands take it: `quickstart`, `paper/...`."""
    folder = shipped_path("configs/quickstart.yaml")
    assert folder is not None
    return path.relative_to(folder.parent).with_suffix("").as_posix()


def find_config(name: str) -> Path:
    """Return the file of a config, given its path or the name of a shipped one (`quickstart`). Raises UserError."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_path(f"configs/{name}.yaml") or shipped_path(name)
    if shipped is not None and shipped.is_file():
        return shipped
    known = [shipped_name(file) for file in shipped_configs()]
    raise UserError(
        f"no config at {name!r}.{nearest(path.name.removesuffix('.yaml'), known)} Shipped configs: {', '.join(known)}"
    )


def load_config(name: str, overrides: list[str] | None = None) -> RunConfig:
    """Load a config by path or shipped name and apply `section.key=value` overrides.

    Raises UserError that lists every invalid key and value.
    """
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
    """Validate a tree of plain values as a RunConfig. Raises UserError that lists every problem."""
    return parse_section(RunConfig, tree, f"{source} is not a valid config")


def parse_section(kind: type[S], values: dict[str, Any], heading: str) -> S:
    """Validate plain values as a section. Raises UserError that lists every problem below `heading`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_describe(e) for e in error.errors()]
        raise UserError(f"{heading}:\n" + "\n".join(f"  {p}" for p in problems)) from None


def judge_config(url: str | None, model: str | None, verdicts: str | None) -> JudgeConfig | None:
    """Return the judge that the command line names, or None. Raises UserError."""
    given = {"url": url, "model": model, "verdicts": verdicts}
    if all(value is None for value in given.values()):
        return None
    return parse_section(JudgeConfig, given, "--judge-url, --judge-model and --verdicts")


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML. `load_config` reads it back to an equal config."""
    tree = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def make_folder(folder: Path, option: str) -> None:
    """Create a folder for results. Raises UserError that names the option if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot make the folder {folder} ({error.strerror})") from error


def _describe(error: Any) -> str:
    """Describe a pydantic error as `key: message`, with the nearest known key if the key is unknown."""
    location = tuple(step for step in error["loc"] if " " not in str(step))  # without the tags of unions
    key = ".".join(str(step) for step in location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return f"{key}: unknown key.{nearest(str(location[-1]), known)} Known: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{key}: required, but missing"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    found = f" (found {value!r})" if isinstance(value, str | int | float | bool) or value is None else ""
    return f"{key}: {message}{found}" if key else message


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    """Return the keys of the section at `location`, read from the JSON schema."""
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
    options = [o for o in node.get("anyOf", node.get("oneOf", [])) if o.get("type") != "null"]
    node = options[0] if options else node
    return schema["$defs"][node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else node


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the dotted key of a `section.key=value` override; list items go by index, and the value is YAML.

    Raises UserError that quotes the override.
    """
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
