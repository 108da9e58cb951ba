"""Options of methods as they are given: one that is unknown, or no number where a number is needed, is named before anything else."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers

from torch import Tensor

_NUMBERS = {"float": (float, numbers.Real, "a number"), "int": (int, numbers.Integral, "a whole number")}


def named(cls: type) -> type:
    """The dataclass, whose __init__ raises TypeError for what is none of its options, naming the nearest, and for what is no number where
    one is needed, ValueError for a share where a whole one is; whole numbers serve where a float is meant."""
    fields = {f.name: f.type for f in dataclasses.fields(cls) if f.init}
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *args, **options):
        for name in options:
            if name not in fields:
                near = sorted(difflib.get_close_matches(name, fields, 2))
                mend = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(fields)}"
                raise TypeError(f"{name}: {cls.__name__} has no such option; {mend}")
        given = [_number(name, kind, x) for (name, kind), x in zip(fields.items(), args)]
        init(self, *given, *args[len(given) :], **{name: _number(name, fields[name], x) for name, x in options.items()})

    cls.__init__ = __init__
    return cls


def _number(name: str, annotation: str, x):
    """x in the kind that its field is annotated with; other kinds of fields as they are."""
    kind, *optional = annotation.split(" | ")
    if kind not in _NUMBERS or (optional == ["None"] and x is None):
        return x
    make, fits, needs = _NUMBERS[kind]
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        got = repr(x) if isinstance(x, bool) else type(x).__name__
        raise TypeError(f"{name}: got {got}; needs {needs}{': give .item()' if isinstance(x, Tensor) else ''}")
    if not isinstance(x, fits):
        raise ValueError(f"{name}: got {x}; needs {needs}")
    return x if type(x) in (int, float) else make(x)  # numpy's as Python's: they go into config.toml
