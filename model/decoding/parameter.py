"""What one decoding parameter is, what its value may be, and which token sequences the texts in it stand for.

A stage knows token ids only. `bad_words` and `dry_breakers` may be given as texts, so they are bound to a tokenizer
once, when a request is checked; what is echoed to the caller stays what the caller wrote.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal, Protocol, SupportsIndex

from topkapi.model.errors import InvalidRequest

Kind = Literal[
    "integer", "number", "boolean", "strings", "integers", "integer_to_number", "words", "text", "schema", "prompt",
    "layers",
]  # fmt: skip

Prompt = str | list[int]
Layers = str | list[int]
Schema = dict[str, Any] | bool

KINDS: Mapping[str, Kind] = {
    "int": "integer", "float": "number", "bool": "boolean", "list[str]": "strings", "list[int]": "integers",
    "dict[int, float]": "integer_to_number", "Words": "words", "str": "text", "Schema": "schema", "Prompt": "prompt",
    "Layers": "layers",
}  # fmt: skip
"""What a row's annotation says of the values that it takes."""


@dataclass(frozen=True)
class Parameter:
    """One decoding parameter. `off` makes it do nothing; a default of None means that each request decides.

    `group` is what it is about, `stage` the decoding stage it belongs to, and `needs` the parameter without which it
    has nothing to act on. `aliases` are its names in other systems' requests, `stored` its name in
    `generation_config.json`, `gguf` that after `general.sampling.` in a GGUF file. Integers and numbers lie between
    `minimum` and `maximum` or strictly above `above`; `slider` is (low, high, step), `label` what a control is called
    if not by the name. A list or an object has at most `most` entries, and each text at most `longest` characters, each
    list of token ids within it as many ids, a schema as many characters of JSON.
    """

    name: str
    kind: Kind
    default: Any
    off: Any
    meaning: str
    source: str
    group: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    slider: tuple[float, float, float] | None = None
    label: str | None = None
    aliases: tuple[str, ...] = ()
    stored: str | None = None
    gguf: str | None = None
    stage: str | None = None
    needs: str | None = None
    most: int | None = None
    longest: int | None = None


def parameter(default: Any, meaning: str, source: str, **more: Any) -> Any:
    """A row of the table: a dataclass field whose name and annotation are the parameter's name and kind.

    `more` are further fields of `Parameter`; unless it has `off`, the default switches the parameter off.
    """
    about = {"default": default, "off": default, "meaning": meaning, "source": source, **more}
    return field(default_factory=partial(copy, default), metadata=about)


def check(parameter: Parameter, value: Any) -> Any:
    """`value` in the parameter's own type. Raises `InvalidRequest` naming the parameter."""
    name, kind = parameter.name, parameter.kind
    if kind == "integer":
        whole = _integer(name, value)
        # Stages compute with float64.
        _number(name, whole)
        return int(_in_range(parameter, whole))
    if kind == "number":
        return float(_in_range(parameter, _number(name, value)))
    if kind == "boolean":
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be true or false, not {_shown(value)}", field=name)
        return value
    if kind == "strings":
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise InvalidRequest(f"{name} must be a text or a list of texts, none of them empty", field=name)
        _limit(name, items, parameter.most, "entries")
        if not all(isinstance(item, str) and item for item in items):
            raise InvalidRequest(f"{name} must be a text or a list of texts, none of them empty", field=name)
        for position, item in enumerate(items):
            _limit(name if isinstance(value, str) else f"{name}[{position}]", item, parameter.longest, "characters")
        return list(items)
    if kind == "integers":
        if not isinstance(value, list | tuple):
            raise InvalidRequest(f"{name} must be a list of token ids", field=name)
        _limit(name, value, parameter.most, "entries")
        return [_integer(name, item) for item in value]
    if kind == "words":
        return _words(parameter, value)
    if kind == "text":
        text = _text(name, value)
        _limit(name, text, parameter.longest, "characters")
        return text
    if kind == "prompt":
        if not isinstance(value, list | tuple):
            return _text(name, value)
        if any(isinstance(item, str | list | tuple) for item in value):
            raise InvalidRequest(f"{name} must be one text, or one list of token ids", field=name)
        return [_integer(name, item) for item in value]
    if kind == "layers":
        return _layers(parameter, value)
    if kind == "schema":
        if not isinstance(value, Mapping | bool):
            raise InvalidRequest(f"{name} must be a JSON schema: an object, or true for any JSON", field=name)
        _limit_json(name, value, parameter.longest)
        return dict(value) if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must map token ids to numbers", field=name)
    _limit(name, value, parameter.most, "entries")
    return {_id_key(name, key): float(_in_range(parameter, _number(name, number))) for key, number in value.items()}


def _id_key(name: str, key: Any) -> int:
    """A token id as JSON's objects have it: as a text, in the one way in which it is written there."""
    if isinstance(key, str) and _WHOLE.fullmatch(key):
        return int(key)
    if isinstance(key, bool) or not isinstance(key, int):
        raise InvalidRequest(f"{name} must map token ids to numbers, and {_shown(key)[:60]} is no id", field=name)
    return key


_WHOLE = re.compile("0|-?[1-9][0-9]{0,17}")


def _shown(value: Any) -> str:
    """A value as a request would spell it."""
    if isinstance(value, float) and abs(value) < 1e6:
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _integer(name: str, value: Any) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise InvalidRequest(f"{name} must be a whole number, not {_shown(value)}", field=name)
    return int(value)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequest(f"{name} must be a finite number, not {_shown(value)}", field=name)
    return number


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{name} must be a text, and not an empty one", field=name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} holds a lone surrogate, which is not valid Unicode", field=name) from None
    return value


def _limit(place: str, value: Sized, most: int | None, unit: str) -> None:
    """Refuse what is longer than any request needs, before anything is done with it."""
    if most is not None and len(value) > most:
        raise InvalidRequest(f"{place} has {len(value):,} {unit}, and {most:,} is the most", field=place)


def _limit_json(name: str, value: Any, most: int | None) -> None:
    """The same for a value's JSON, of which no more is written than may be there."""
    size = 0
    try:
        for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
            size += len(part)
            if most is not None and size > most:
                raise InvalidRequest(f"{name} has more than {most:,} characters of JSON", field=name)
    except RecursionError:
        raise InvalidRequest(f"{name} is nested too deeply", field=name) from None
    except (TypeError, ValueError):
        raise InvalidRequest(f"{name} must be JSON", field=name) from None


def _layers(parameter: Parameter, value: Any) -> str | list[int]:
    name = parameter.name
    if value in ("low", "high"):
        return str(value)
    if not isinstance(value, list | tuple) or not value:
        raise InvalidRequest(f'{name} must be "low", "high" or a list of layer numbers', field=name)
    _limit(name, value, parameter.most, "entries")
    return sorted({_integer(name, item) for item in value})


def _words(parameter: Parameter, value: Any) -> Words:
    name = parameter.name
    if isinstance(value, Words):
        return value
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise InvalidRequest(f"{name} must be a list of texts or of lists of token ids", field=name)
    _limit(name, items, parameter.most, "entries")
    for position, item in enumerate(items):
        if not item or not isinstance(item, str | list | tuple):
            raise InvalidRequest(f"{name} must hold texts or lists of token ids, none of them empty", field=name)
        place = name if isinstance(value, str) else f"{name}[{position}]"
        _limit(place, item, parameter.longest, "characters" if isinstance(item, str) else "token ids")
    return Words(item if isinstance(item, str) else [_integer(name, token_id) for token_id in item] for item in items)


def _in_range(parameter: Parameter, value: float) -> float:
    name = parameter.name
    shown = _shown(value)

    def refused(relation: str, bound: float) -> InvalidRequest:
        # Worth a word only where the bound itself switches a stage off; temperature 1 or one answer does no such thing.
        off = f" ({bound:g} means off)" if parameter.stage is not None and parameter.off == bound else ""
        return InvalidRequest(f"{name} must be {relation} {_shown(bound)}{off}, not {shown}", field=name)

    if parameter.minimum is not None and value < parameter.minimum:
        raise refused("at least", parameter.minimum)
    if parameter.maximum is not None and value > parameter.maximum:
        raise refused("at most", parameter.maximum)
    if parameter.above is not None and value <= parameter.above:
        raise refused("above", parameter.above)
    return value


class Vocabulary(Hashable, Protocol):
    """The part of a tokenizer that is needed here."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_with_control(self, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Words(list[Any]):
    """Texts and token-id lists as given, with `sequences`, the token sequences they stand for, once bound.

    A list in every other respect: it compares, copies and serialises as what was given.
    """

    def __init__(self, items: Iterable[Any] = (), sequences: Sequence[tuple[int, ...]] | None = None) -> None:
        super().__init__(items)
        if sequences is None and not any(isinstance(item, str) for item in self):
            sequences = [tuple(item) for item in self]
        self.sequences: tuple[tuple[int, ...], ...] | None = None
        # By their last token: what a sequence is about to end with.
        self.by_last: dict[int, list[tuple[int, ...]]] = {}
        # By the token before the last, None for those of one token: what a sequence may be about to be completed by.
        self.by_last_but_one: dict[int | None, list[tuple[int, ...]]] = {}
        if sequences is not None:
            self.sequences = tuple(dict.fromkeys(sequences))
            for sequence in self.sequences:
                self.by_last.setdefault(sequence[-1], []).append(sequence)
                before = sequence[-2] if len(sequence) > 1 else None
                self.by_last_but_one.setdefault(before, []).append(sequence)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return Words, (list(self), self.sequences)


def bind_words(name: str, words: Words, vocabulary: Vocabulary | None) -> Words:
    """`words` with the ways in which each text can be tokenised: at the start of a line and after a space.

    Raises `InvalidRequest` naming `name` where a text is given and there is no tokenizer to read it.
    """
    if words.sequences is not None:
        return words
    _require(name, vocabulary)
    assert vocabulary is not None
    sequences = []
    for item in words:
        if isinstance(item, str):
            bare = item.lstrip(" ")
            sequences += [tuple(vocabulary.encode(text)) for text in (item, bare, f" {bare}") if text]
        else:
            sequences.append(tuple(item))
    return Words(words, [sequence for sequence in sequences if sequence])


def bind_breakers(name: str, words: Words, vocabulary: Vocabulary | None) -> Words:
    """`words` with every token that holds one of the texts, and the sequences that hold it across tokens.

    Raises `InvalidRequest` naming `name` where a text is given and there is no tokenizer to read it.
    """
    if words.sequences is not None:
        return words
    _require(name, vocabulary)
    assert vocabulary is not None
    sequences: list[tuple[int, ...]] = []
    for item in words:
        sequences += _holding(vocabulary, item) if isinstance(item, str) else [tuple(item)]
    return Words(words, sequences)


@lru_cache(maxsize=256)
def _holding(vocabulary: Vocabulary, text: str) -> tuple[tuple[int, ...], ...]:
    """Token sequences in which `text` appears: inside one token, or begun by the end of one and finished by others."""
    raw = text.encode("utf-8")
    found: list[tuple[int, ...]] = []
    tails = {size: tuple(vocabulary.encode(text[size:])) for size in range(1, len(text))}
    begun: dict[int, list[tuple[bytes, tuple[int, ...]]]] = {}
    for size, tail in tails.items():
        beginning = text[:size].encode("utf-8")
        begun.setdefault(beginning[-1], []).append((beginning, tail))
    for token_id in range(vocabulary.vocab_size):
        piece = vocabulary.token_bytes(token_id)
        if raw in piece:
            found.append((token_id,))
            continue
        ends = begun.get(piece[-1], ()) if piece else ()
        found += [(token_id, *tail) for beginning, tail in ends if piece.endswith(beginning)]
    return tuple(found)


def _require(name: str, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        raise InvalidRequest(
            f"{name} holds texts, and there is no tokenizer at hand to read them",
            field=name,
            hint=f"give {name} as lists of token ids",
        )
