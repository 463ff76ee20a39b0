"""Configuration: frozen sections read from YAML, with dotted overrides and errors that name the nearest key.

A section is a small pydantic model that stands beside the code it configures. A file is a mapping of
sections; unknown keys, duplicate keys and unreadable values are errors, all listed at once.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from so8t_torch.core.errors import ConfigError
from so8t_torch.core.files import read_text, shown

MAX_BYTES = 1 << 16
MAX_VALUES = 2000
MAX_DEPTH = 32
MAX_LISTED = 20
"""A configuration is written by hand; more bytes, names with values or levels than these are a mistake or an attack."""

UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What the YAML reader raises: bad syntax or characters, a number with too many digits, nesting without end."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 3


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without its surprises.

    A key may appear once per mapping. Only ``true`` and ``false`` are truth values: ``no``, ``on`` and ``off`` are
    words. Numbers are decimal: ``010`` and ``12:30`` are words, too, which a field for numbers reads or refuses.
    An alias counts as all the values it stands for, so that a few cannot stand for a billion; a tag, which names a
    constructor, is refused.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values = 0
        self._depth = 0
        self._inside: dict[str, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{_line(event)}: tags (!) are not read; write the plain value.")
        before = self._values
        self._values += 1
        self._depth += 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._inside:
                raise ConfigError(f"{_line(event)}: *{event.anchor:.40} stands for nothing written above it in full.")
            self._values += self._inside[event.anchor]
        if self._values > MAX_VALUES or self._depth > MAX_DEPTH:
            raise ConfigError(f"{_line(event)}: more than {MAX_VALUES} values or {MAX_DEPTH} levels of nesting.")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None and not isinstance(event, yaml.AliasEvent):
            self._inside[event.anchor] = self._values - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise ConfigError(f"{_line(key_node)}: a key must be a name, got a {type(key).__name__}.")
            if key in seen:
                raise ConfigError(f"{_line(key_node)}: key {_SHORT.repr(key)} is given twice; keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


_PlainLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _line(place: Any) -> str:
    return f"line {place.start_mark.line + 1}"


def _parsed(text: str) -> Any:
    """Return the value of a YAML text."""
    return yaml.load(text, Loader=_PlainLoader)


def load_config(section: type[S], path: str | Path | None = None, overrides: Iterable[str] = ()) -> S:
    """Read a configuration file and apply overrides.

    Args:
        section: the model of the whole file.
        path: YAML file, at most 64 KiB, or ``None`` for defaults only.
        overrides: ``"a.b=value"`` strings; the value is read as YAML.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid name), or invalid value; all are listed.
    """
    tree = {} if path is None else _read(path)
    for override in overrides:
        _apply(tree, override)
    return parse_config(section, tree, "" if path is None else shown(path))


def parse_config(section: type[S], tree: Mapping[str, Any], source: str = "") -> S:
    """Validate a mapping against a section.

    Args:
        section: the model of the whole mapping.
        tree: as read.
        source: the file it was read from, named in the error.

    Raises:
        ConfigError: unknown keys (with the nearest valid name) and invalid values, the first twenty of them.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        lines = [f"  {_sentence(section, problem)}" for problem in problems[:MAX_LISTED]]
        if len(problems) > MAX_LISTED:
            lines.append(f"  and {len(problems) - MAX_LISTED} more")
        name = f"The configuration {source}" if source else "The configuration"
        raise ConfigError(f"{name} is not valid:\n" + "\n".join(lines)) from None


def dump_config(section: Section) -> str:
    """Return the section as YAML in declaration order; ``load_config`` reads it back unchanged."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: str | Path) -> dict[str, Any]:
    text = read_text(path, ConfigError, limit=MAX_BYTES)
    try:
        tree = _parsed(text)
    except ConfigError as error:
        raise ConfigError(f"{shown(path)}: {error}") from error
    except UNREADABLE as error:
        raise ConfigError(f"{shown(path)} is not readable as UTF-8 YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{shown(path)} must hold a mapping of sections, but its top level is a {type(tree).__name__}."
        )
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not all(name.split(".")):
        raise ConfigError(f"An override has the form section.key=value, but got {override!r:.80}.")
    try:
        value = _parsed(text)
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
            raise ConfigError(
                f"Override {override!r:.80}: {parent!r:.80} holds {_SHORT.repr(child)} and has no keys inside."
            )
        node = child
    node[leaf] = value


def _sentence(section: type[Section], problem: Mapping[str, Any]) -> str:
    location = [f"{part:.80}" if isinstance(part, str) else str(part) for part in problem["loc"]]
    where = ".".join(location) or "(whole file)"
    if problem["type"] == "value_error" and not location:
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg']:.400} (got {_SHORT.repr(problem['input']):.400})"
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
