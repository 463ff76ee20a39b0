"""Configuration: frozen sections read from YAML, with dotted overrides and errors that name the nearest key.

A section is a small pydantic model that stands beside the code it configures. A file is a mapping of
sections; unknown keys, duplicate keys and unreadable values are errors, all listed at once.
"""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from so8t_torch.core.errors import ConfigError

MAX_BYTES = 1 << 20
"""A configuration is written by hand; a larger file is a mistake or an attack."""

UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What the YAML reader raises: bad syntax or bytes, an impossible date or number, nesting without end."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 3


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key may appear once per mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: a key must be a name, got a {type(key).__name__}."
                )
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice; keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(section: type[S], path: str | Path | None = None, overrides: Iterable[str] = ()) -> S:
    """Read a configuration file and apply overrides.

    Args:
        section: the model of the whole file.
        path: YAML file, at most 1 MiB, or ``None`` for defaults only.
        overrides: ``"a.b=value"`` strings; the value is read as YAML.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid name), or invalid value; all are listed.
    """
    tree = {} if path is None else _read(Path(path))
    for override in overrides:
        _apply(tree, override)
    return parse_config(section, tree)


def parse_config(section: type[S], tree: Mapping[str, Any]) -> S:
    """Validate a mapping against a section; see ``load_config`` for the errors."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        lines = [_sentence(section, problem) for problem in error.errors()]
        raise ConfigError("The configuration is not valid:\n" + "\n".join(f"  {line}" for line in lines)) from None


def dump_config(section: Section) -> str:
    """Return the section as YAML in declaration order; ``load_config`` reads it back unchanged."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"No configuration file at {path}; give the path of a YAML file.")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(
            f"{path} has {path.stat().st_size} bytes, more than the {MAX_BYTES} a configuration may have."
        )
    try:
        tree = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_UniqueKeyLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except UNREADABLE as error:
        raise ConfigError(f"{path} is not readable as UTF-8 YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, but its top level is a {type(tree).__name__}.")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not all(name.split(".")):
        raise ConfigError(f"An override has the form section.key=value, but got {override!r}.")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except ConfigError:
        raise
    except UNREADABLE as error:
        raise ConfigError(f"The value of override {override!r:.80} is not readable as YAML: {error}") from error
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"Override {override!r}: {parent!r} holds the value {child!r} and has no keys inside.")
        node = child
    node[leaf] = value


def _sentence(section: type[Section], problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location) or "(whole file)"
    if problem["type"] == "value_error" and not location:
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg']} (got {_SHORT.repr(problem['input']):.400})"
    names = sorted(_names_at(section, location[:-1]))
    near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(names)}"
    return f"{where}: unknown key; {hint}"


def _names_at(section: type[Section], location: list[str]) -> set[str]:
    """Return the valid keys of the section(s) found by walking ``location`` from ``section``."""
    found: list[type[Section]] = [section]
    for part in location:
        inner = [
            s for owner in found if part in owner.model_fields for s in _sections(owner.model_fields[part].annotation)
        ]
        found = inner or found
    return {name for owner in found for name in owner.model_fields}


def _sections(annotation: Any) -> list[type[Section]]:
    """Return every section class inside an annotation such as ``A | B | None`` or ``Annotated[A | B, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, list, tuple, dict):
        return [s for argument in typing.get_args(annotation) for s in _sections(argument)]
    return []
