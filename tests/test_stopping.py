"""Text comes out whole, in order, and never holds a stop string or half a character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.decoding.stopping import Stopper


def pieces(raw: bytes, cuts: list[int]) -> list[bytes]:
    borders = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    return [raw[a:b] for a, b in zip(borders, borders[1:], strict=False)]


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
