"""Rule scorers for answers of a checkable kind: a row says `"checks": [{"kind": "number", "value": 18}, …]`.

Rows of the IFEval benchmark (Zhou et al. 2023) name their rules by `instruction_id_list` and `kwargs`; those that can
be told from the answer alone, without guessing, are translated.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topkapi.model.errors import DataError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Check:
    """One rule; `passes` tells whether an answer keeps it."""

    kind: str
    settings: Mapping[str, Any]

    def passes(self, answer: str) -> bool:
        return CHECKS[self.kind](answer.strip(), **self.settings)


def parse_checks(value: object, origin: str) -> list[Check]:
    """The `checks` of a row. Raises `DataError` naming an unknown kind or setting, or a missing one."""
    if not isinstance(value, list):
        raise DataError(f"{origin}: checks must be a list", field="checks", hint=_HINT)
    return [_parse(check, origin) for check in value]


def _parse(check: object, origin: str) -> Check:
    settings = dict(check) if isinstance(check, dict) else {}
    kind = settings.pop("kind", None)
    if kind not in CHECKS:
        raise DataError(f"{origin}: unknown kind of check {kind!r}", field="checks", hint=_HINT)
    known = inspect.signature(CHECKS[kind]).parameters
    for name in settings:
        if name not in list(known)[1:]:
            raise DataError(f"{origin}: the check {kind!r} has no setting {name!r}", field="checks", hint=_usage(kind))
    for name, parameter in list(known.items())[1:]:
        if parameter.default is inspect.Parameter.empty and name not in settings:
            raise DataError(f"{origin}: the check {kind!r} lacks {name!r}", field="checks", hint=_usage(kind))
    found = Check(kind, settings)
    try:
        found.passes("a probe")
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise DataError(
            f"{origin}: the check {kind!r} cannot be made: {error}", field="checks", hint=_usage(kind)
        ) from None
    if "most" in known and settings.get("least", 0) <= 0 and settings.get("most") is None:
        raise DataError(
            f"{origin}: every answer passes the check {kind!r} without least or most", field="checks", hint=_usage(kind)
        )
    return found


def last_number(text: str) -> float | None:
    """The last number in a text, thousands' commas left out."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _number(answer: str, *, value: float, tolerance: float = 1e-6) -> bool:
    found, wanted = last_number(answer), float(value)
    return found is not None and abs(found - wanted) <= tolerance


def _one_of(answer: str, *, values: Sequence[str]) -> bool:
    return answer.rstrip(".!").casefold() in [value.rstrip(".!").casefold() for value in values]


def _contains(answer: str, *, values: Sequence[str]) -> bool:
    return all(value.casefold() in answer.casefold() for value in values)


def _excludes(answer: str, *, values: Sequence[str]) -> bool:
    return not any(_occurrences(answer, value) for value in values)


def _frequency(answer: str, *, text: str, least: int = 0, most: int | None = None) -> bool:
    return _within(_occurrences(answer, text), least, most)


def _matches(answer: str, *, pattern: str) -> bool:
    return re.search(pattern, answer) is not None


def _items(answer: str, *, of: Sequence[str], count: int) -> bool:
    marked = re.split(r"\n|,| and ", answer.rstrip("."))
    found = [
        re.sub(r"^\s*(?:[-+*]|\d+[.)])?\s*(?:an? |the )?", "", item, flags=re.I).strip(" .").casefold()
        for item in marked
    ]
    found = [item for item in found if item]
    return len(found) == len(set(found)) == count and set(found) <= {each.casefold() for each in of}


def _json(answer: str, *, keys: Sequence[str] = (), value: object = None) -> bool:
    unfenced = re.sub(r"^```(?:json)?\s*|\s*```$", "", answer, flags=re.IGNORECASE)
    try:
        found = json.loads(unfenced)
    except ValueError:
        return False
    if value is not None and found != value:
        return False
    return not keys or (isinstance(found, dict) and all(key in found for key in keys))


def _words(answer: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(re.findall(r"\w+", answer)), least, most)


def _sentences(answer: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(re.findall(r"[^.!?\s][^.!?]*(?:[.!?]+(?=\s|$)|$)", answer)), least, most)


def _paragraphs(answer: str, *, least: int = 0, most: int | None = None, separator: str = r"\n\s*\n") -> bool:
    return _within(sum(bool(part.strip()) for part in re.split(separator, answer)), least, most)


def _bullets(answer: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(re.findall(r"^\s*(?:[-+]|\*(?!\*))\s+\S", answer, flags=re.MULTILINE)), least, most)


def _highlights(answer: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(re.findall(r"\*\*[^*\n]*[^*\s][^*\n]*\*\*|\*[^*\n]*[^*\s][^*\n]*\*", answer)), least, most)


def _lowercase(answer: str) -> bool:
    return answer.islower()


def _uppercase(answer: str) -> bool:
    return answer.isupper()


def _starts_with(answer: str, *, value: str) -> bool:
    return answer.casefold().startswith(value.casefold())


def _ends_with(answer: str, *, value: str) -> bool:
    return answer.casefold().endswith(value.strip().casefold())


def _occurrences(answer: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(text)}(?!\w)", answer, flags=re.IGNORECASE))


def _within(count: int, least: int, most: int | None) -> bool:
    return least <= count and (most is None or count <= most)


CHECKS: dict[str, Callable[..., bool]] = {
    "number": _number,
    "one_of": _one_of,
    "contains": _contains,
    "excludes": _excludes,
    "frequency": _frequency,
    "matches": _matches,
    "items": _items,
    "json": _json,
    "words": _words,
    "sentences": _sentences,
    "paragraphs": _paragraphs,
    "bullets": _bullets,
    "highlights": _highlights,
    "lowercase": _lowercase,
    "uppercase": _uppercase,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
}
_HINT = 'checks are {"kind": …} with a kind of: ' + ", ".join(CHECKS)


def _usage(kind: str) -> str:
    names = list(inspect.signature(CHECKS[kind]).parameters.values())[1:]
    shown = [name.name + ("" if name.default is inspect.Parameter.empty else "?") for name in names]
    return f"settings of {kind}: {', '.join(shown) or 'none'}"


def ifeval_checks(row: Mapping[str, Any], origin: str) -> tuple[list[Check], list[str]]:
    """The checks of an IFEval row, and the ids of those that are not translated."""
    ids, settings = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(ids, list) or not isinstance(settings, list) or len(ids) != len(settings):
        raise DataError(f"{origin}: instruction_id_list and kwargs must be lists of the same length", field="checks")
    checks, left_out = [], []
    for name, given in zip(ids, settings, strict=True):
        rule = ":".join(str(name).split(":")[-2:])
        try:
            made = _IFEVAL[rule](given) if rule in _IFEVAL else None
        except (KeyError, TypeError) as error:
            raise DataError(f"{origin}: {name} lacks or misstates {error}", field="checks") from None
        if made is None:
            left_out.append(rule)
        else:
            checks.append(_parse(made, origin))
    return checks, left_out


def _relation(given: Mapping[str, Any], relation: str, number: str) -> dict[str, int]:
    count = int(given[number])
    return {"least": count} if given[relation] == "at least" else {"most": count - 1}


_IFEVAL: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "punctuation:no_comma": lambda given: {"kind": "matches", "pattern": r"\A[^,]*\Z"},
    "length_constraints:number_words": lambda given: {"kind": "words", **_relation(given, "relation", "num_words")},
    "length_constraints:number_sentences": lambda given: {
        "kind": "sentences",
        **_relation(given, "relation", "num_sentences"),
    },
    "length_constraints:number_paragraphs": lambda given: {
        "kind": "paragraphs",
        "least": given["num_paragraphs"],
        "most": given["num_paragraphs"],
        "separator": r"\s?\*\*\*\s?",
    },
    "keywords:existence": lambda given: {"kind": "contains", "values": given["keywords"]},
    "keywords:forbidden_words": lambda given: {"kind": "excludes", "values": given["forbidden_words"]},
    "keywords:frequency": lambda given: {
        "kind": "frequency",
        "text": given["keyword"],
        **_relation(given, "relation", "frequency"),
    },
    "detectable_format:json_format": lambda given: {"kind": "json"},
    "detectable_format:title": lambda given: {"kind": "matches", "pattern": r"<<[^\n]*\S[^\n]*>>"},
    "detectable_format:number_bullet_lists": lambda given: {
        "kind": "bullets",
        "least": given["num_bullets"],
        "most": given["num_bullets"],
    },
    "detectable_format:number_highlighted_sections": lambda given: {
        "kind": "highlights",
        "least": given["num_highlights"],
    },
    "detectable_content:number_placeholders": lambda given: {
        "kind": "matches",
        "pattern": rf"(?s)(?:\[.*?\].*?){{{int(given['num_placeholders'])}}}",
    },
    "change_case:english_lowercase": lambda given: {"kind": "lowercase"},
    "change_case:english_capital": lambda given: {"kind": "uppercase"},
    "startend:end_checker": lambda given: {"kind": "ends_with", "value": given["end_phrase"]},
    "startend:quotation": lambda given: {"kind": "matches", "pattern": r'(?s)\A".*"\Z'},
}
