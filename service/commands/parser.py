"""The command line's parser: mistakes told in two lines, with what was meant, in the words that were typed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from topkapi.model.errors import TopkapiError
from topkapi.model.nearest import nearest

MOST_LISTED = 12
"""Flags that a usage lists."""


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in two lines; the usage of a command with eighty flags would hide it.

    The namespace it returns has the parser of the command that was given as `parser`. A flag is spelt out: what a
    beginning of one stands for would change with the next flag that there is.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False} | options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but what a command does not know is told by the command, not by the whole program."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = next((each for each in unknown if each.startswith("-")), None)
            if flag is None:
                self.error(f"{unknown[0]!r} is more than can be given here")
            flag = flag.partition("=")[0]
            flags = [option for action in self._actions for option in action.option_strings]
            self.error(f"there is no flag {flag}{_meant(flag, flags)}")
        # The command's own parser comes first; those above it leave its mark.
        vars(namespace).setdefault("parser", self)
        return namespace, unknown

    def format_help(self) -> str:
        """As argparse does; where there are dozens of flags, which it goes on to explain, they are not listed first."""
        everything = self._actions
        listed = [action for action in everything if action.required or not action.option_strings]
        if len(everything) - len(listed) <= MOST_LISTED:
            return super().format_help()
        self._actions = listed
        try:
            return super().format_help().replace(self.prog, f"{self.prog} [options]", 1)
        finally:
            self._actions = everything

    def error(self, message: str) -> NoReturn:
        """Print the error and where the flags are explained, and exit with 2."""
        for pattern, meant in _WORDINGS:
            message = pattern.sub(meant, message)
        self.exit(2, f"error: {message}\nhint: {self.prog} --help explains what can be given\n")

    def told(self, error: TopkapiError) -> str:
        """An error as the lines to print: a field that is a flag here is called as the flag is typed."""
        lines = [f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else [])]
        flags = {
            action.dest: next(option for option in action.option_strings if option.startswith("--"))
            for action in self._actions
            if any(option.startswith("--") for option in action.option_strings)
        }
        if error.field not in flags:
            return "\n".join(lines)
        return "\n".join(_FIELD.sub(lambda found: flags.get(found[0], found[0]), line) for line in lines)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        kinds: dict[Any, str] = {int: "a whole number", float: "a number"}
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if action.type not in kinds:
                raise
            from topkapi.model.wrong_values import shown

            name = next((each for each in action.option_strings if each.startswith("--")), action.dest)
            raise argparse.ArgumentError(
                None, f"{name} must be {kinds[action.type]}, not {shown(arg_string)}"
            ) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        what = "command" if isinstance(action, argparse._SubParsersAction) else "choice"
        meant = _meant(str(value), names) or f": choose from {', '.join(names)}"
        message = f"there is no {what} {value!r}{meant}"
        raise argparse.ArgumentError(None if what == "command" else action, message)


# What argparse says, in the words of everything else here.
_WORDINGS = [
    (re.compile(r"^argument (?:-\w/)?([^\s/:]+)\S*: expected one argument$"), r"\1 needs a value"),
    (re.compile(r"^argument (?:-\w/)?([^\s/:]+)\S*: expected at least one argument$"), r"\1 needs a value, or several"),
    (
        re.compile(r"^argument (?:-\w/)?([^\s/:]+)\S*: ignored explicit argument (.*)$"),
        r"\1 takes no value, and not \2",
    ),
    (re.compile(r"^the following arguments are required: (.*)$"), r"missing: \1"),
    (re.compile(r"^argument (?:-\w/)?([^\s/:]+)\S*: "), r"\1: "),
]

# A name of several words that stands for itself: no part of a path, of a quotation, of a flag or of a file's name.
_FIELD = re.compile(r"(?<![\w/.'\"=-])[a-z0-9]+(?:_[a-z0-9]+)+(?![\w/'\"]|\.\w)")


def _meant(typed: str, known: Sequence[str]) -> str:
    near = nearest(typed, known)
    return f"; did you mean {near}?" if near else ""
