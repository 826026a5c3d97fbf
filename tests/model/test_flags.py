"""Flags that are made from declared options."""

from __future__ import annotations

import argparse
from typing import Any, Literal

import pytest

from topkapi.model.flags import Option, add_flags


def parser(*options: Option) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_flags(made, options)
    return made


@pytest.mark.parametrize(
    ("kind", "given", "found"),
    [
        (bool, "--field", True),
        (bool, "--no-field", False),
        (bool | None, "--field", True),
        (int | None, "--field 1", "1"),
        (list[str], "--field a b", ["a", "b"]),
        (Literal["a", "b"], "--field c", "c"),
    ],
)
def test_only_flags_that_are_given_are_there_for_the_reader_to_check(kind: Any, given: str, found: object) -> None:
    made = parser(Option("field", kind, "a meaning"))
    assert vars(made.parse_args(given.split())) == {"field": found}
    assert vars(made.parse_args([])) == {}


def test_the_help_says_what_the_option_does() -> None:
    options = (
        Option("date", str, "80 % of it", default="%Y-%m", group="when"),
        Option("both", Literal["a", "b"], "either", default="a"),
        Option("quick", bool, "at once", default=False),
    )
    told = " ".join(parser(*options).format_help().split())
    assert "when: --date TEXT 80 % of it [%Y-%m]" in told
    assert "--both a|b either [a]" in told
    assert "--quick, --no-quick at once [no]" in told
