"""What an error says is short, whatever it quotes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from topkapi.model.decoding.gbnf import lark_of
from topkapi.model.decoding.grammar import compile_constraint
from topkapi.model.decoding.parameters import resolve
from topkapi.model.errors import MOST_TOLD, TopkapiError
from topkapi.model.hub.names import hub_name
from topkapi.model.text.tokenizer import Tokenizer

NAME = "a" * 6000


def grammar(text: str, tokenizer: Tokenizer) -> None:
    compile_constraint(resolve({"grammar": text}), tokenizer, tokenizer.vocab_size, [0])


FOUND: dict[str, Callable[[Tokenizer], object]] = {
    "a rule that is not there": lambda tokenizer: grammar(f"start: {NAME}", tokenizer),
    "a rule of GBNF that is not there": lambda tokenizer: grammar(lark_of(f"root ::= {NAME}"), tokenizer),
    "a name of the hub": lambda _: hub_name(f"https://huggingface.co/{NAME}"),
}
"""By `benchmarks.fuzz`."""


@pytest.mark.parametrize("read", FOUND.values(), ids=FOUND)
def test_what_a_stranger_wrote_is_not_quoted_at_length(read, tiny_tokenizer) -> None:
    with pytest.raises(TopkapiError) as caught:
        read(tiny_tokenizer)
    assert len(caught.value.message) <= MOST_TOLD and str(caught.value) == caught.value.message


def test_beginning_and_end_are_told() -> None:
    error = TopkapiError("begin " + NAME + " end", field=NAME, hint=NAME)
    assert error.message.startswith("begin a") and error.message.endswith("a end")
    assert error.field is not None and len(error.field) <= MOST_TOLD
    assert error.hint is not None and len(error.hint) <= MOST_TOLD
    assert TopkapiError("short", field="seed").field == "seed" and TopkapiError("short").hint is None
