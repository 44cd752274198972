"""TOML in and out, as small as a config needs it: texts, numbers, booleans, lists of texts, and tables of subjects."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from palp_fast.errors import ConfigError


def read(file: str | os.PathLike) -> dict[str, Any]:
    """The keys and values of a TOML file. Raises ConfigError naming the file."""
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {str(file)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"config file {str(file)!r} is not valid TOML: {error}") from error


def write(values: dict[str, Any], file: str | os.PathLike) -> None:
    """Writes `values` (None left out) to `file`. Raises ConfigError for what TOML cannot say, such as a PIL image."""
    values = {key: value for key, value in values.items() if value is not None}
    subjects = values.pop("subjects", ())
    lines = _lines(values, "")
    for i, subject in enumerate(subjects):
        lines += ["", "[[subjects]]", *_lines(subject.given, f"subjects[{i}].")]
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(values: dict[str, Any], where: str) -> list[str]:
    return [f"{key} = {_literal(value, where + key)}" for key, value in values.items() if value is not None]


def _literal(value: Any, field: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | os.PathLike):
        # JSON's escapes are TOML's, except that TOML also wants DEL escaped.
        return json.dumps(os.fspath(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return f"[{', '.join(_literal(item, field) for item in value)}]"
    raise ConfigError(f"{field}: {value!r} cannot be written to TOML; allowed there: paths of folders and image files")
