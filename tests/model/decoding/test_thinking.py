"""The block of reasoning as tokens: where it ends, and that it ends in time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.model.decoding.decoding_cases import MARKS, VOCABULARY, Marked
from topkapi.model.decoding.choosing import choose
from topkapi.model.decoding.parameters import resolve
from topkapi.model.decoding.stage import Row
from topkapi.model.decoding.thinking import Budget, forced_token, thought_tokens
from topkapi.model.errors import InvalidRequest


def bound(tokens: int) -> Budget:
    budget = Budget(tokens)
    budget.marks = MARKS
    return budget


def run(prompt: list[int], wanted: list[int], budget: int) -> list[int]:
    """What comes of a network that always wants the next of `wanted`."""
    row = Row(resolve({"temperature": 0, "thinking_budget": budget}, vocabulary=Marked()), list(prompt), len(prompt))
    for token_id in wanted:
        logits = torch.zeros(1, VOCABULARY)
        logits[0, token_id] = 5.0
        row.tokens.append(choose(logits, [row])[0].token_id)
    return row.generated


@pytest.mark.parametrize("prompt", [[1, 7], [1, 7, 2]], ids=["opened", "opened, then a line"])
def test_an_opened_block_is_closed_once_it_is_long_enough(prompt: list[int]) -> None:
    assert run(prompt, [1, 2, 3, 4, 5, 6], 3) == [1, 2, 3, 8, 20, 6]
    assert run(prompt, [1, 2, 3], 0) == [8, 20, 3]
    assert run(prompt, [1, 8, 20, 4, 5, 6], 3) == [1, 8, 20, 4, 5, 6], "it was closed before"
    assert run(prompt, [1, 2, 8, 20, 5, 6], 3) == [1, 2, 8, 8, 20, 6], "half a mark closes nothing"


def test_an_answer_opens_its_block_itself_or_has_none() -> None:
    assert run([1, 2], [7, 1, 2, 3, 4, 5], 2) == [7, 1, 2, 8, 20, 5]
    assert run([1, 2], [1, 7, 2, 3, 4, 5], 2) == [1, 7, 2, 3, 4, 5], "what stands after other text is no block"
    assert run([7, 1, 8, 20], [1, 2, 3, 4], 1) == [1, 2, 3, 4], "the prompt has closed its own"


def test_the_end_comes_whatever_else_is_ruled_out() -> None:
    parameters = {"temperature": 0, "thinking_budget": 1, "banned_token_ids": [8], "allowed_token_ids": [1, 2]}
    row = Row(resolve(parameters, vocabulary=Marked()), [7, 1], 1)
    assert choose(torch.zeros(1, VOCABULARY), [row])[0].token_id == 8


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 12), st.booleans())
def test_never_more_is_thought_than_may_be(wanted: list[int], budget: int, opened: bool) -> None:
    prompt = [1, 7] if opened else [1]
    answer = run(prompt, wanted, budget)
    thought = thought_tokens([*prompt, *answer], len(prompt), MARKS)
    assert thought <= budget + len(MARKS[1]) + (not opened)
    tokens = [*prompt, *answer]
    for length in range(len(prompt), len(tokens)):
        must = forced_token(tokens[:length], len(prompt), bound(budget))
        assert must in (None, tokens[length]), "each token follows from those before it"


def test_a_budget_needs_a_tokenizer_and_no_structure() -> None:
    with pytest.raises(InvalidRequest, match="thinking_budget needs a tokenizer"):
        resolve({"thinking_budget": 5})
    with pytest.raises(InvalidRequest, match="thinking_budget can't be combined with json_object"):
        resolve({"thinking_budget": 5, "json_object": True}, vocabulary=Marked())
    with pytest.raises(InvalidRequest, match="at least 0"):
        resolve({"thinking_budget": -1}, vocabulary=Marked())
