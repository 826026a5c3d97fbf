"""Text comes out whole, in order, and never holds a stop string or half a character."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topkapi.model.decoding.parameters import resolve
from topkapi.model.decoding.stopping import Stopper
from topkapi.model.errors import InvalidRequest


def pieces(raw: bytes, cuts: list[int]) -> list[bytes]:
    borders = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    return [raw[a:b] for a, b in pairwise(borders)]


def run(parts: list[bytes], stop: list[str]) -> tuple[list[str], Stopper]:
    stopper = Stopper(parts.__getitem__, stop)
    deltas = [stopper.feed(index) for index in range(len(parts))]
    return [*deltas, stopper.flush()], stopper


STOPS = st.lists(st.text("abé日", min_size=1, max_size=4), max_size=3)


@given(st.text("abé日x", max_size=40), st.lists(st.integers(0, 200)), STOPS)
def test_text_equals_the_whole_up_to_the_first_stop(text: str, cuts: list[int], stop: list[str]) -> None:
    deltas, stopper = run(pieces(text.encode(), cuts), stop)
    found = [text.find(s) for s in stop if s in text]
    if not found:
        assert "".join(deltas) == text
        assert stopper.stopped is None
        return
    got = "".join(deltas)
    assert stopper.stopped in stop
    assert not any(s in got for s in stop)
    assert text.startswith(got + stopper.stopped)


@given(st.text("abab日é🙂", max_size=30), st.lists(st.integers(0, 200)))
def test_no_delta_holds_half_a_character(text: str, cuts: list[int]) -> None:
    deltas, _ = run(pieces(text.encode(), cuts), ["日é"])
    assert all("�" not in delta for delta in deltas)


def test_what_could_begin_a_stop_string_waits() -> None:
    stopper = Stopper([b"Hi ", b"EN", b"D of", b"EN", b"D.", b"!"].__getitem__, ["END."])
    assert [stopper.feed(index) for index in range(6)] == ["Hi ", "", "END of", "", "", ""]
    assert stopper.stopped == "END."
    assert stopper.flush() == ""


def test_invalid_bytes_become_replacement_characters_at_the_end() -> None:
    deltas, _ = run([b"ok\xe6\x97"], [])
    assert deltas == ["ok", "�"]


def test_the_longer_of_two_stops_at_one_place_is_named() -> None:
    _, stopper = run([b"xxSTOPNOW"], ["STOP", "STOPNOW"])
    assert stopper.stopped == "STOPNOW"


def run_parameters(parts: list[bytes], **parameters: object) -> tuple[str, Stopper]:
    stopper = Stopper.of(parts.__getitem__, resolve(parameters))
    text = "".join(stopper.feed(index) for index in range(len(parts)))
    return text + stopper.flush(), stopper


@settings(deadline=None)
@given(st.text("ab1é日 ", max_size=25), st.lists(st.integers(0, 200)), st.booleans())
def test_an_expression_stops_at_the_first_character_with_which_it_matches(
    text: str, cuts: list[int], include: bool
) -> None:
    """However the text is cut into tokens; checked against searching every prefix."""
    got, stopper = run_parameters(pieces(text.encode(), cuts), stop_regex=r"\d+b|a[^b]+é", include_stop=include)
    prefixes = (re.search(r"\d+b|a[^b]+é", text[:end]) for end in range(len(text) + 1))
    first = next((match for match in prefixes if match), None)
    if first is None:
        assert got == text
        assert stopper.stopped is None
    else:
        assert got == text[: first.end() if include else first.start()]
        assert stopper.stopped == r"\d+b|a[^b]+é"


@given(st.text("abé日x", max_size=40), st.lists(st.integers(0, 200)), STOPS.filter(bool))
def test_stop_strings_mean_the_same_beside_an_expression(text: str, cuts: list[int], stop: list[str]) -> None:
    """An expression that never matches changes nothing but where, of two stops in one token, the text ends."""
    parts = pieces(text.encode(), [*range(len(text.encode()) + 1), *cuts])
    alone, first = run_parameters(parts, stop=stop)
    beside, second = run_parameters(parts, stop=stop, stop_regex="never")
    assert alone == beside
    assert (first.stopped is None) == (second.stopped is None)


def test_what_an_expression_may_still_match_waits() -> None:
    stopper = Stopper.of([b"So: ", b"ANS", b"WER", b"s", b" ANSWER", b": 4"].__getitem__,
                         resolve({"stop_regex": r"ANSWER:\s"}))  # fmt: skip
    assert [stopper.feed(index) for index in range(6)] == ["So: ", "", "", "ANSWERs", " ", ""]
    assert stopper.stopped == r"ANSWER:\s"
    assert stopper.flush() == ""


def test_a_stop_can_be_left_in_the_text() -> None:
    assert run_parameters([b"one t", b"wo three"], stop="two", include_stop=True)[0] == "one two"
    assert run_parameters([b"one t", b"wo three"], stop="two")[0] == "one "


def test_an_expression_that_explodes_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="too long") as caught:
        run_parameters([b"a" * 60 + b"!"], stop_regex=r"(a|aa|b?a)+$(?<=b)")
    assert caught.value.field == "stop_regex"


@pytest.mark.parametrize("pattern", ["(", "a*", "x|", "[z-a]"])
def test_expressions_that_cannot_work_are_refused_at_once(pattern: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve({"stop_regex": pattern})
    assert caught.value.field == "stop_regex"
