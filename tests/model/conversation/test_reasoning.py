"""What is thought and what is said, read alike however an answer is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topkapi.model.conversation.reasoning import ReasoningReader, Thought, opened_by, reasons


def read(pieces: list[str], *, opened: bool) -> tuple[str, str]:
    reader = ReasoningReader(opened=opened)
    events = [event for piece in pieces for event in reader.feed(piece)] + list(reader.flush())
    assert all(event.text for event in events)
    thought = "".join(event.text for event in events if isinstance(event, Thought))
    return thought, "".join(event.text for event in events if not isinstance(event, Thought))


CASES = [
    ("Hello.", False, ("", "Hello.")),
    ("<think>\nHm.\n\nYes.\n</think>\n\nHello.\n", False, ("Hm.\n\nYes.", "Hello.\n")),
    ("\n<think>\n\n</think>\n\nHello.", False, ("", "Hello.")),
    ("Hm. </think>\n\nHello.", True, ("Hm.", "Hello.")),
    ("</think>Hello.", True, ("", "Hello.")),
    # Cut off: what was not closed is thought, and what only begins like a block is said.
    ("<think>\nHm, is it </thi", False, ("Hm, is it </thi", "")),
    ("Hm ", True, ("Hm", "")),
    (" <thin", False, ("", " <thin")),
    ("<thinking> is hard", False, ("", "<thinking> is hard")),
    ("Well: <think>no</think>", False, ("", "Well: <think>no</think>")),
    ("<think>a<think>b</think>c</think>", False, ("a<think>b", "c</think>")),
    ("", False, ("", "")),
    ("  ", True, ("", "")),
]


@pytest.mark.parametrize(("text", "opened", "expected"), CASES)
def test_an_answer_is_read_alike_whole_and_in_any_pieces(text: str, opened: bool, expected: tuple[str, str]) -> None:
    assert read([text], opened=opened) == expected
    assert read(list(text), opened=opened) == expected
    for cut in range(len(text)):
        assert read([text[:cut], text[cut:]], opened=opened) == expected


PARTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "think", "/", ">", " ", "\n", "a", "é"]), max_size=9)


@given(pieces=PARTS, opened=st.booleans())
def test_any_cut_gives_the_same(pieces: list[str], opened: bool) -> None:
    assert read(pieces, opened=opened) == read(["".join(pieces)], opened=opened)


def test_what_a_template_says_of_reasoning() -> None:
    assert reasons("{{ content.split('</think>')[-1] }}") and not reasons("{{ content }}")
    assert opened_by("<|im_start|>assistant\n<think>\n") and not opened_by("<think>\n\n</think>\n\n")
