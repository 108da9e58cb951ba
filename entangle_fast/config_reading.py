"""TOML and dicts into dataclasses, with errors that say what to type instead."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomlkit
from tomlkit.exceptions import TOMLKitError

T = TypeVar("T")

NONE = "none"  # TOML has no null; this says None where a key is optional


class ConfigError(ValueError):
    """A config that cannot be used. problem: what is wrong and the mend; key: its path; where: the file."""

    def __init__(self, problem: str, *, key: tuple[str, ...] = (), where: str = ""):
        super().__init__(": ".join(part for part in (where, ".".join(key), problem) if part))
        self.problem, self.key, self.where = problem, key, where


def in_keys(error: Exception, names: Mapping[str, tuple[str, ...]], default: tuple[str, ...], where: str = "") -> ConfigError:
    """An error that begins with an argument's name, in the words of the config: names gives the key of each argument."""
    named, _, problem = str(error).partition(": ")
    return ConfigError(problem, key=names[named], where=where) if named in names else ConfigError(str(error), key=default, where=where)


def from_toml(path: str | os.PathLike, cls: type[T]) -> T:
    """Read a TOML file into the dataclass `cls`.

    Raises FileNotFoundError, or ConfigError with the file, the line and the nearest right key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file; give the path of a TOML file")
    try:
        text = path.read_text(encoding="utf-8")
        data = tomlkit.parse(text).unwrap()
    except (ValueError, RecursionError, TOMLKitError) as error:
        raise ConfigError(f"not valid TOML: {error}", where=str(path)) from error
    try:
        return from_dict(cls, data, str(path))
    except ConfigError as error:
        line = _line_of(text, error.key)
        where = f"{path}:{line}" if line else str(path)
        raise ConfigError(error.problem, key=error.key, where=where) from error.__cause__


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "config") -> T:
    """Build the dataclass `cls` from nested mappings; `where` names their source in errors.

    Field types: int, float, bool, str, Literal, Optional, list, tuple, dict, dataclasses, Any.
    An int serves as a float; a bool never serves as a number; nan never passes, and infinity only
    in a field whose name says clip, whose default is infinite, or whose metadata has allow_inf.
    "none" is None in an optional field. Raises ConfigError.
    """
    return _build(cls, data, (), where)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts of a config dataclass; `from_dict` takes them back to an equal one."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if "table" in f.metadata:
            out[f.name] = {"name": _name_in(f.metadata["table"](), value), **to_dict(value)}
        elif dataclasses.is_dataclass(value):
            out[f.name] = to_dict(value)
        elif value is None and f.default is not None:
            out[f.name] = NONE
        else:
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def _name_in(table: Mapping[str, type], value: Any) -> str:
    names = [name for name, cls in table.items() if type(value) is cls]
    own = getattr(value, "name", None)
    if own in names:
        return own
    if len(names) != 1:
        raise ConfigError(f"{type(value).__name__} has the names {names} in the table; needs exactly one")
    return names[0]


def _build(cls: type, data: Any, key: tuple[str, ...], where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"got {_show(data)}, needs a table", key=key, where=where)
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in data:
        if name not in fields:
            raise ConfigError(f"unknown key; {nearest(name, fields)}", key=(*key, str(name)), where=where)
    values = {}
    for name, f in fields.items():
        path = (*key, name)
        if name not in data:
            if f.default is MISSING and f.default_factory is MISSING:
                needs = "a table with a name" if "table" in f.metadata else _describe(hints[name])
                raise ConfigError(f"missing; needs {needs}", key=path, where=where)
        elif "table" in f.metadata:
            values[name] = _choose(f.metadata["table"](), data[name], path, where)
        else:
            allow_inf = "clip" in name or f.default in (math.inf, -math.inf) or f.metadata.get("allow_inf", False)
            values[name] = _convert(data[name], hints[name], path, where, allow_inf)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(error.problem, key=(*key, *error.key), where=where) from error
    except (ValueError, TypeError) as error:  # the dataclass's own checks
        raise in_keys(error, {name: (*key, name) for name in fields}, key, where) from error


def _choose(table: Mapping[str, type], data: Any, key: tuple[str, ...], where: str) -> Any:
    """The dataclass that data["name"] picks from the table, built from the rest."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"got {_show(data)}, needs a table with a name", key=key, where=where)
    key_of_name = (*key, "name")
    if "name" not in data:
        raise ConfigError(f"missing; needs one of {_list(table)}", key=key_of_name, where=where)
    name = data["name"]
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"got {_show(name)}, {nearest(name, table)}", key=key_of_name, where=where)
    return _build(table[name], {k: v for k, v in data.items() if k != "name"}, key, where)


def _convert(value: Any, hint: Any, key: tuple[str, ...], where: str, allow_inf: bool) -> Any:
    origin, args = get_origin(hint) or hint, get_args(hint)

    def wrong(mend: str = "") -> ConfigError:
        problem = f"got {_show(value)}, needs {_describe(hint)}"
        return ConfigError(f"{problem}; {mend}" if mend else problem, key=key, where=where)

    if origin is Any or origin is object:
        return value
    if origin is Union or origin is types.UnionType:
        if type(None) in args and (value is None or value == NONE):
            return None
        for choice in (a for a in args if a is not type(None)):
            try:
                return _convert(value, choice, key, where, allow_inf)
            except ConfigError as error:
                last = error
        raise last if len(args) == 2 and type(None) in args else wrong()
    if origin is Literal:
        for choice in args:
            if type(value) is type(choice) and value == choice:
                return choice
        near = difflib.get_close_matches(str(value), map(str, args), 1)
        raise wrong(f"did you mean {near[0]!r}?" if near else "")
    if dataclasses.is_dataclass(origin):
        return _build(origin, value, key, where)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise wrong()
        item = args[1] if args else Any
        return {k: _convert(v, item, (*key, k), where, allow_inf) for k, v in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise wrong(f"write [{_toml(value)}]" if isinstance(value, (str, int, float)) else "")
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise wrong()
            items = args
        else:
            items = (args[0] if args else Any,) * len(value)
        return origin(_convert(v, t, (*key, f"[{i}]"), where, allow_inf) for i, (v, t) in enumerate(zip(value, items)))
    if origin is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong()
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isnan(number) or (math.isinf(number) and not allow_inf):
            raise wrong("finite, please")
        return number
    if origin in (int, bool, str):
        if type(value) is not origin:
            raise wrong()
        return value
    raise TypeError(f"{'.'.join(key)}: fields of type {hint} cannot be read from a config")


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Union or origin is types.UnionType:
        return " or ".join(repr(NONE) if a is type(None) else _describe(a) for a in args)
    if origin is Literal:
        return f"one of {_list(args)}"
    if origin in (list, tuple):
        several = [a for a in args if a is not Ellipsis]
        return f"a list of {' and '.join(_describe(a) for a in several)}" if several else "a list"
    if origin is dict or dataclasses.is_dataclass(origin):
        return "a table"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(origin, str(hint))


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}... ({type(value).__name__})" if len(text) > 60 else f"{text} ({type(value).__name__})"


def _toml(value: str | int | float) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _list(names: Iterable[Any]) -> str:
    return ", ".join(repr(n) for n in names)


def nearest(name: Any, right: Iterable[str]) -> str:
    """What was meant by a name that is none of these."""
    near = difflib.get_close_matches(str(name), list(right), 1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"needs one of {_list(right)}"


def _line_of(text: str, key: tuple[str, ...]) -> int | None:
    """Line (from 1) that sets `key`, or else its table; None when neither is written out."""
    table: tuple[str, ...] = ()
    nearest = None
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[+([^\[\]]+)\]+", line):
            path = table = _split(match[1])
        elif match := re.match(r"\s*([^=#\[\]]+?)\s*=", line):
            path = table + _split(match[1])
        else:
            continue
        if path == key:
            return number
        if path == key[: len(path)]:
            nearest = number
    return nearest


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip(" \t\"'") for part in dotted.split("."))
