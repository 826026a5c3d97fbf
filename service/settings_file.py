"""A YAML file with settings: one document, each setting once, none that there isn't."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from topkapi.model.errors import SettingsError
from topkapi.model.nearest import nearest
from topkapi.model.user_files import LONGEST_SETTINGS, read_file
from topkapi.model.wrong_values import shown


class _Once(yaml.SafeLoader):
    """Reads plain values, and refuses a name that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_settings(path: Path, known: Sequence[str], named: str) -> dict[str, Any]:
    """The settings of the file that the flag or variable `named` names, by theirs; what is null is left to others.

    Raises `SettingsError`.
    """
    if path.is_dir() or not path.exists():
        raise SettingsError(f"{named} must be a file, not {shown(str(path))}", field="config")
    raw = read_file(path, LONGEST_SETTINGS, field="config", kind=SettingsError)
    try:
        loader = _Once(raw.decode("utf-8"))
        try:
            document = loader.get_single_data()
        finally:
            loader.dispose()
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
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
