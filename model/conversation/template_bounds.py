"""What a chat template may cost: templates come with checkpoints from anywhere, and may be made to never end.

Every round of a loop, every call and every operation whose cost grows with its operands asks the budget of the
rendering first. Rounds and the processor's time are counted together; a single operation can neither be long nor make
anything large, so that other threads are never kept waiting.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.runtime
import jinja2.utils

MOST_SECONDS = 2.0
"""Processor time of one rendering."""
MOST_ROUNDS = 1 << 20
MOST_CHARACTERS = 1 << 23
"""Most characters of one text, and of all that a list holds where it is written out or compared."""
_MOST_CHANGED = 1 << 20
"""Most characters of a text that Python goes through one by one, other threads waiting, as for another case."""
_MOST_SEARCHED = 1 << 27
"""Most pairs of a text's and another one's characters, where that is looked for from behind: all may be compared."""
MOST_ITEMS = 1 << 20
MOST_BITS = 1 << 16
_ITEM = 16
"""What an item of a list counts for, beside its characters."""
_MOST_DEPTH = 64
_WIDEST = 100_000
"""Largest whole number that widths, counts and precisions may be."""
_LONGEST_FORMAT = 10_000
_MOST_STRIPPED = 100
_ROUNDS_PER_LOOK_AT_THE_CLOCK = 16

_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?")
_ESCAPED = re.compile(_PERCENT.pattern + "[hlL]?a")
_ENCODINGS = ("utf-8", "utf8", "ascii", "latin-1", "latin1")


class TemplateTooExpensive(jinja2.TemplateRuntimeError):
    """A template asks for more time or memory than any conversation needs."""


class Budget:
    """What is left of the rounds and of the time of one rendering."""

    def __init__(self, seconds: float) -> None:
        self._rounds = self._most = MOST_ROUNDS
        self._until_look = 0
        self._end = time.thread_time() + seconds
        self._seconds = seconds

    def spend(self, rounds: int = 1) -> None:
        """Take `rounds` off. Raises `TemplateTooExpensive` when nothing is left."""
        self._rounds -= rounds
        self._until_look -= rounds
        if self._rounds < 0:
            raise TemplateTooExpensive(f"it goes through more than {self._most:,} rounds of loops and calls")
        if self._until_look < 0:
            self._until_look = _ROUNDS_PER_LOOK_AT_THE_CLOCK
            if time.thread_time() > self._end:
                raise TemplateTooExpensive(f"it takes longer than {self._seconds:g} s")


_BUDGET: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def bounded(seconds: float = MOST_SECONDS) -> Iterator[None]:
    """Let templates render on one budget within the block; within another such block, on that one's."""
    if _BUDGET.get() is not None:
        yield
        return
    token = _BUDGET.set(Budget(seconds))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def spend(rounds: int = 1) -> None:
    """Take `rounds` off the budget of the rendering under way.

    While a template is compiled there is none, and what it computes from constants stays for its rendering.
    """
    budget = _BUDGET.get()
    if budget is None:
        raise jinja2.nodes.Impossible
    budget.spend(rounds)


def size(value: Any, most: int = MOST_CHARACTERS) -> int:
    """Characters of a value with everything in it, each as often as it occurs, an item of a list counting as several.

    Raises `TemplateTooExpensive` above `most`, and where lists lie in lists without end.
    """
    if isinstance(value, str | bytes):
        total, stack = len(value), []
    else:
        total, stack = 0, [iter(_items(value))]
    looked_at = 0
    while stack:
        for item in stack[-1]:
            looked_at += 1
            total += _ITEM + (len(item) if isinstance(item, str | bytes) else 0)
            if not looked_at % 16:
                spend(4)
            if total > most:
                break
            if isinstance(item, list | tuple | dict | set | frozenset):
                if len(stack) >= _MOST_DEPTH:
                    raise TemplateTooExpensive(f"it puts lists into each other more than {_MOST_DEPTH} deep")
                stack.append(iter(_items(item)))
                break
        else:
            stack.pop()
        if total > most:
            break
    if total > most:
        raise TemplateTooExpensive(f"it works on more than {most:,} characters at once")
    return total


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset) or type(value) in _VIEWS:
        return list(value)
    return ()


_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


def rounds(iterable: Any) -> Any:
    """What a loop runs over, its rounds counted: at once where their number is known."""
    if hasattr(iterable, "__len__"):
        spend(len(iterable) + 1)
        return iterable
    return _counted(iter(iterable))


def _counted(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        spend()
        yield item


def small(result: Any) -> Any:
    """The result of an operation, if it is of an ordinary size; of an iterator, the items are counted."""
    if isinstance(result, str | bytes):
        _check_length(len(result))
    elif isinstance(result, list | tuple | dict):
        _check_items(len(result))
    elif isinstance(result, int):
        _check_bits(result.bit_length())
    elif isinstance(result, Iterator) and not isinstance(result, jinja2.runtime.LoopContext | jinja2.utils.Cycler):
        return _counted(result)
    return result


def _check_length(length: int) -> None:
    if length > MOST_CHARACTERS:
        raise TemplateTooExpensive(f"it makes a text of more than {MOST_CHARACTERS:,} characters")


def _check_items(number: int) -> None:
    if number > MOST_ITEMS:
        raise TemplateTooExpensive(f"it makes a list of more than {MOST_ITEMS:,} items")


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise TemplateTooExpensive(f"it computes a whole number of more than {MOST_BITS:,} bits")


def check_widths(values: Iterable[Any]) -> None:
    """Refuse widths and counts that would make something very long."""
    for value in values:
        if isinstance(value, int) and abs(value) > _WIDEST:
            raise TemplateTooExpensive(f"it asks for a width or a number of more than {_WIDEST:,}")


def join(parts: Iterable[str]) -> str:
    """`"".join(parts)` for what comes out of a template or a part of it."""
    total = 0
    kept = []
    for part in parts:
        total += len(part)
        _check_length(total)
        kept.append(part)
    return "".join(kept)


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation of two values whose result would be large, before it is computed."""
    spend()
    if operator == "%" and isinstance(left, str | bytes):
        check_percent(left, right)
    if operator == "+" and isinstance(left, str | bytes | list | tuple) and isinstance(right, type(left)):
        check = _check_length if isinstance(left, str | bytes) else _check_items
        check(len(left) + len(right))
    if operator == "*":
        for sequence, number in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(number, int):
                check = _check_length if isinstance(sequence, str | bytes) else _check_items
                check(len(sequence) * max(number, 0))
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        if operator == "**" and right > 0:
            _check_bits(left.bit_length() * right if abs(left) > 1 else 1)


def check_percent(form: str | bytes, arguments: Any) -> None:
    """Refuse widths that `%` would pad to, and fields without end."""
    if len(form) > _LONGEST_FORMAT:
        raise TemplateTooExpensive(f"it formats with a text of more than {_LONGEST_FORMAT:,} characters")
    text = form if isinstance(form, str) else form.decode("latin-1")
    fields = _PERCENT.findall(text)
    if _ESCAPED.search(text):
        size(arguments, _MOST_CHANGED)
    if re.search(r"%\([^)]*\(", text):
        raise TemplateTooExpensive("it formats by names with brackets in them")
    for numbers in fields:
        if any(number == "*" or len(number) > 3 for number in numbers):
            raise TemplateTooExpensive("it formats to a width of 1,000 or more")
    _check_length((size(arguments) + 1000) * len(fields))


def check_braces(form: str, arguments: Any) -> None:
    """The same for `str.format`."""
    if len(form) > _LONGEST_FORMAT or re.search(r"\d{4}|:[^{}]*\{", form):
        raise TemplateTooExpensive("it formats to a width of 1,000 or more, or with a very long text")
    most = _MOST_CHANGED if "!a" in form else MOST_CHARACTERS
    _check_length((size(arguments, most) + 1000) * form.count("{"))


def check_replacement(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    """Refuse `replace` where the result would be too long."""
    if isinstance(old, type(text)) and isinstance(new, type(text)):
        _check_length(len(text) + text.count(old) * len(new))


def check_stripping(text: Any, characters: Any = None, *_: Any) -> None:
    """Refuse `strip` of many characters, each of which is looked for among all of them."""
    if isinstance(characters, str | bytes) and len(characters) > _MOST_STRIPPED:
        raise TemplateTooExpensive(f"it strips more than {_MOST_STRIPPED} different characters")


def check_joining(separator: str | bytes, items: Sequence[Any]) -> None:
    """Refuse `join` where the result would be too long."""
    _check_length(size(items) + len(separator) * len(items))


def _check_pieces(text: Any, arguments: Sequence[Any]) -> None:
    separator = next((argument for argument in arguments if isinstance(argument, type(text))), None)
    _check_items(text.count(separator) if separator else len(text) // 4)


def _check_search(text: Any, arguments: Sequence[Any]) -> None:
    _check_pieces(text, arguments)
    sought = max((len(argument) for argument in arguments if isinstance(argument, str | bytes)), default=0)
    if len(text) * sought > _MOST_SEARCHED:
        raise TemplateTooExpensive("it looks for a long text from behind")


def checked_method(owner: Any, name: str, arguments: Sequence[Any]) -> Sequence[Any]:
    """The arguments for a method of one of Python's own types. Raises where the result could be large."""
    if name in ("translate", "maketrans", "fromkeys", "to_bytes", "from_bytes", "expandtabs"):
        raise TemplateTooExpensive(f"it calls {name}, which chat templates may not")
    if isinstance(owner, (list, tuple, *_VIEWS)):
        size((owner, *arguments))
    elif isinstance(owner, str | bytes):
        if name in ("ljust", "rjust", "center", "zfill"):
            check_widths(arguments)
        elif name in ("strip", "lstrip", "rstrip"):
            check_stripping(owner, *arguments)
        elif name == "replace":
            check_replacement(owner, *arguments)
        elif name == "join" and arguments:
            items = arguments[0] if isinstance(arguments[0], list | tuple) else list(rounds(arguments[0]))
            check_joining(owner, items)
            return [items, *arguments[1:]]
        elif name in ("split", "splitlines"):
            _check_pieces(owner, arguments)
        elif name in ("rfind", "rindex", "rpartition", "rsplit"):
            _check_search(owner, arguments)
        elif name in ("capitalize", "casefold", "lower", "swapcase", "title", "upper"):
            size(owner, _MOST_CHANGED)
        elif name in ("encode", "decode") and any(argument not in _ENCODINGS for argument in arguments[:1]):
            raise TemplateTooExpensive(f"it calls {name} with {str(arguments[0])[:40]!r}, which chat templates may not")
    return arguments


# Filters: what is checked before each, by name. A filter that is not named has all its operands looked through, and is
# refused those of over a million characters, as many of them work through texts with regular expressions or sort.


def _nothing(*_: Any, **__: Any) -> None: ...


def _check_trim(value: Any, chars: Any = None) -> None:
    _check_text(value)
    check_stripping(value, chars)


def _check_text(value: Any, *_: Any, **__: Any) -> None:
    if not isinstance(value, str):
        size(value)


def _check_case(value: Any, *_: Any, **__: Any) -> None:
    size(value, _MOST_CHANGED)


def _check_list(value: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, str):
        _check_items(len(value))


def _check_number(value: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, str):
        size(value, _LONGEST_FORMAT)


def _check_indent(value: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    size(width, 1000)
    check_widths([width])
    if isinstance(value, str):
        _check_items(value.count("\n"))
        _check_length((value.count("\n") + 1) * (width if isinstance(width, int) else len(width)) + len(value))


def _check_replace(value: Any, *arguments: Any, **_: Any) -> None:
    size(value)
    check_replacement(str(value), *arguments)


def _check_sum(value: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise TemplateTooExpensive("it sums up something other than numbers")


def _check_json(value: Any, *options: Any, **named: Any) -> None:
    size(value, _MOST_CHANGED if any(options[:1]) or named.get("ensure_ascii") else MOST_CHARACTERS)
    for option in (*options, *named.values()):
        size(option, 100)
        if isinstance(option, int) and option > 100:
            raise TemplateTooExpensive("it writes JSON with an indentation of more than 100")


def _check_others(*values: Any, **named: Any) -> None:
    size((values, named), MOST_ITEMS)


FILTER_CHECKS: Mapping[str, Callable[..., None]] = {
    **dict.fromkeys(
        ("abs", "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "map", "reject",
         "rejectattr", "reverse", "round", "safe", "select", "selectattr", "slice"), _nothing,
    ),
    **dict.fromkeys(("capitalize", "lower", "upper"), _check_case),
    "string": _check_text,
    "trim": _check_trim,
    "format": lambda form, *values, **named: check_percent(str(form), (values, named)),
    "indent": _check_indent,
    "float": _check_number,
    "int": _check_number,
    "list": _check_list,
    "replace": _check_replace,
    "sum": _check_sum,
    "tojson": _check_json,
}  # fmt: skip


def check_filter(name: str, values: Sequence[Any], named: Mapping[str, Any]) -> Sequence[Any]:
    """The operands for a filter. Raises where it would take long or make something large."""
    spend()
    if name == "join" and values:
        items = values[0] if isinstance(values[0], str | list | tuple) else list(rounds(values[0]))
        separator = values[1] if len(values) > 1 else named.get("d", "")
        check_joining(separator if isinstance(separator, str) else str(small(separator)), items)
        return [items, *values[1:]]
    check_widths([*values[1:], *named.values()])
    FILTER_CHECKS.get(name, _check_others)(*values, **named)
    return values
