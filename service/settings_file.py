"""A YAML file with settings: one document, each setting once, none that there isn't."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from topkapi.model.errors import SettingsError
from topkapi.model.nearest import nearest
from topkapi.model.user_files import LONGEST_SETTINGS, read_file
from topkapi.model.wrong_values import shown
from topkapi.model.yaml_reading import parse_yaml


def read_settings(path: Path, known: Sequence[str], named: str) -> dict[str, Any]:
    """The settings of the file that the flag or variable `named` names, by theirs; what is null is left to others.

    Raises `SettingsError`.
    """
    if os.path.isdir(path) or not os.path.exists(path):
        raise SettingsError(f"{named} must be a file, not {shown(str(path))}", field="config")
    raw = read_file(path, LONGEST_SETTINGS, field="config", kind=SettingsError)
    try:
        document = parse_yaml(raw.decode("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "it can't be read"
        raise SettingsError(f"{path}{place} is not YAML: {problem}", field="config") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        hint = "write one setting a line, such as port: 8000"
        raise SettingsError(f"{path} must hold settings by their names", field="config", hint=hint)
    for name in document:
        if name not in known or name == "config":
            near = nearest(str(name), [each for each in known if each != "config"])
            hint = f"did you mean {near}?" if near else "topkapi config lists every setting"
            raise SettingsError(f"{path}: there is no setting {str(name)[:80]!r}", field="config", hint=hint)
    return {name: value for name, value in document.items() if value is not None}
