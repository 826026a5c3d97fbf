"""The decoding parameters and the server's settings as command-line flags, made from what declares them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from topkapi.model.decoding.parameters import PARAMETERS, Kind, Parameter
from topkapi.model.flags import Option, add_flags, declared
from topkapi.service.settings import Settings


def add_parameter_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per decoding parameter; only flags that are given appear in the namespace."""
    parser.add_argument_group("decoding", "Without a flag, the checkpoint's own default, then the one shown.")
    add_flags(parser, map(_option, PARAMETERS))


def given_parameters(namespace: argparse.Namespace) -> dict[str, Any]:
    """The decoding parameters that were given as flags."""
    given = {parameter.name: getattr(namespace, parameter.name, None) for parameter in PARAMETERS}
    given["logit_bias"] = dict(given["logit_bias"]) if given["logit_bias"] else None
    return {name: value for name, value in given.items() if value is not None}


def add_setting_flags(parser: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """A flag for each setting that has one, or for those of these `names`."""
    add_flags(parser, declared({name: Settings.model_fields[name] for name in names or Settings.model_fields}))


def given_settings(namespace: argparse.Namespace) -> Settings:
    """The settings by the flags that were given, then the environment. Raises `SettingsError`."""
    return Settings.read(**{name: getattr(namespace, name, None) for name in Settings.model_fields})


def _option(parameter: Parameter) -> Option:
    about, meaning = ABOUT[parameter.kind], parameter.meaning
    if about.get("action") == "append":
        meaning += " May be given again."
    elif parameter.kind == "layers":
        meaning += " Numbers are separated by commas."
    default = parameter.default if parameter.kind in ("integer", "number") else None
    kind = bool if parameter.kind == "boolean" else about.get("type", str)
    return Option(parameter.name, kind, meaning, default, parameter.group, about)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None


def _layers(text: str) -> str | list[int]:
    try:
        return text if text in ("low", "high") else [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not low, high or numbers such as 0,2,4") from None


def _pair(text: str) -> tuple[int, float]:
    token_id, equals, number = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=NUMBER")
    try:
        return int(token_id), float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=NUMBER") from None


ABOUT: dict[Kind, dict[str, Any]] = {
    "integer": {"type": int}, "number": {"type": float}, "boolean": {"action": "store_true"},
    "text": {}, "prompt": {}, "strings": {"action": "append"}, "words": {"action": "append"},
    "integers": {"action": "append", "type": int, "metavar": "ID"},
    "integer_to_number": {"action": "append", "type": _pair, "metavar": "ID=NUMBER"},
    "layers": {"type": _layers, "metavar": "LAYERS"}, "schema": {"type": _json, "metavar": "JSON"},
}  # fmt: skip
"""How the values of each kind are typed."""
