"""The decoding parameters as command-line flags, made from the parameter table."""

from __future__ import annotations

import argparse
import json
from typing import Any

from topkapi.model.decoding.parameters import PARAMETERS, Parameter


def add_parameter_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per decoding parameter; only flags that are given appear in the namespace."""
    group = parser.add_argument_group("decoding", "Without a flag, the checkpoint's own default, then the one shown.")
    for parameter in PARAMETERS:
        group.add_argument(f"--{parameter.name.replace('_', '-')}", default=argparse.SUPPRESS, **_options(parameter))


def given_parameters(namespace: argparse.Namespace) -> dict[str, Any]:
    """The decoding parameters that were given as flags."""
    given = {parameter.name: getattr(namespace, parameter.name, None) for parameter in PARAMETERS}
    given["logit_bias"] = dict(given["logit_bias"]) if given["logit_bias"] else None
    return {name: value for name, value in given.items() if value is not None}


def _options(parameter: Parameter) -> dict[str, Any]:
    description = parameter.meaning.replace("%", "%%")
    if parameter.kind == "boolean":
        return {"action": "store_true", "help": description}
    if parameter.kind in ("strings", "words"):
        return {"action": "append", "metavar": "TEXT", "help": f"{description} May be given again."}
    if parameter.kind in ("text", "prompt"):
        return {"metavar": "TEXT", "help": description}
    if parameter.kind == "layers":
        return {"type": _layers, "metavar": "LAYERS", "help": f"{description} Numbers are separated by commas."}
    if parameter.kind == "schema":
        return {"type": _json, "metavar": "JSON", "help": description}
    if parameter.kind == "integers":
        return {"action": "append", "type": int, "metavar": "ID", "help": f"{description} May be given again."}
    if parameter.kind == "integer_to_number":
        return {"action": "append", "type": _pair, "metavar": "ID=NUMBER", "help": f"{description} May be given again."}
    shown = "" if parameter.default is None else f" [{parameter.default}]"
    kind = int if parameter.kind == "integer" else float
    return {"type": kind, "metavar": "N" if kind is int else "X", "help": f"{description}{shown}"}


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
