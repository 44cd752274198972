"""What each setting allows: one rule per dataclass field, which checks and normalises a value and describes itself."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from palp_fast.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Rule:
    """`convert` returns the normalised value, or raises ValueError or TypeError; `allowed` says what is right.

    kind is "int", "float", "bool", "choice", "text", "path", "images" or "subjects", for the command line.
    """

    kind: str
    allowed: str
    convert: Callable[[Any], Any]
    choices: tuple = ()
    later: tuple = ()

    def check(self, field: str, value: Any) -> Any:
        """The normalised value. Raises ConfigError naming field, value and what is allowed."""
        if any(value is later or (isinstance(value, str) and value == later) for later in self.later):
            raise ConfigError(f"{field}: {value!r} is not available in this version; allowed: {self.allowed}")
        try:
            return self.convert(value)
        except ConfigError:
            raise
        except (ValueError, TypeError):
            raise ConfigError(f"{field}: {value!r} is not allowed; allowed: {self.allowed}") from None


def ruled(rule: Rule, meaning: str, **kwargs: Any) -> Any:
    """A dataclass field that carries its rule and meaning; `default=` as in dataclasses.field, none when required."""
    return dataclasses.field(metadata={"rule": rule, "meaning": meaning}, **kwargs)


def rule_of(field: dataclasses.Field) -> Rule:
    return field.metadata["rule"]


def optional(rule: Rule, meaning: str) -> Rule:
    """The same rule, with None as one more value; `meaning` says in a few words what None stands for."""

    def convert(value: Any) -> Any:
        return None if value is None else rule.convert(value)

    return dataclasses.replace(rule, allowed=f"{rule.allowed}, or None ({meaning})", convert=convert)


def integer(least: int, *, multiple: int = 1, most: int = 2**63 - 1) -> Rule:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError
        if not least <= value <= most or value % multiple:
            raise ValueError
        return int(value)

    what = "an integer" if multiple == 1 else f"a multiple of {multiple}"
    return Rule("int", f"{what} >= {least}" + (f" and <= {most}" if most < 2**63 - 1 else ""), convert)


def number(*, above: float | None = None, least: float | None = None) -> Rule:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        if not math.isfinite(value) or (above is not None and value <= above) or (least is not None and value < least):
            raise ValueError
        return float(value)

    return Rule("float", f"a finite number {f'> {above:g}' if above is not None else f'>= {least:g}'}", convert)


def boolean() -> Rule:
    def convert(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    return Rule("bool", "True or False", convert)


def choice(*values: Any, later: tuple = ()) -> Rule:
    """One of `values`; `later` are documented values that this version does not have yet."""

    def convert(value: Any) -> Any:
        for allowed in values:
            if type(value) is type(allowed) and value == allowed:
                return allowed
        raise ValueError

    return Rule("choice", ", ".join(map(repr, values)), convert, values, later)


def text(*, empty: bool = False, pattern: str | None = None, allowed: str | None = None) -> Rule:
    def convert(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError
        if not (empty or value.strip()) or (pattern and not re.fullmatch(pattern, value)):
            raise ValueError
        return value

    return Rule("text", allowed or ("a text" if empty else "a text that is not empty"), convert)


def path(allowed: str) -> Rule:
    def convert(value: Any) -> str:
        value = os.fspath(value)
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise ValueError
        return value

    return Rule("path", allowed, convert)


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean ...?)" for an unknown name, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Settings:
    """Base of the config dataclasses: keyword names are checked with suggestions, values by their rules.

    Remembers which fields were given, so that a preset gives way to them even where they equal the default.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Settings:
        names = [field.name for field in dataclasses.fields(cls)]
        for name in kwargs:
            if name not in names:
                hint = nearest(name, names) or f"; allowed: {', '.join(names)}"
                raise ConfigError(f"{name}: unknown field of {cls.__name__}{hint}")
        given = frozenset(names[: len(args)]) | frozenset(kwargs)
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in given:
                raise ConfigError(f"{field.name}: missing; {cls.__name__} needs {rule_of(field).allowed}")
        self = super().__new__(cls)
        object.__setattr__(self, "_given", given)
        return self

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not field.default:
                object.__setattr__(self, field.name, rule_of(field).check(self._label(field.name), value))

    def _label(self, field: str) -> str:
        return field

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were given, in declaration order: calling the class with them makes an equal object."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in self._given}

    def replace(self, **changes: Any) -> Settings:
        """A copy with some fields changed; fields that were never given stay open to presets."""
        return type(self)(**{**self.given, **changes})

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.given)


def _rebuild(cls: type, given: dict[str, Any]) -> Settings:
    return cls(**given)
