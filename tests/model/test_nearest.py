"""What is taken for a slip of what, and what would be far-fetched."""

import time

import pytest

from topkapi.model.decoding.parameters import BY_NAME
from topkapi.model.nearest import nearest

KNOWN = [*BY_NAME, "model", "prompt", "messages", "stream"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("temprature", "temperature"),
        ("max_new_tokens", "max_tokens"),
        ("tokens_max", "max_tokens"),
        ("TOP-K", "top_k"),
        ("tpo_k", "top_k"),
        ("seeds", "seed"),
        ("frequency", "frequency_penalty"),
        ("repeat_penalty", "repetition_penalty"),
        # These the usual ratio of common letters would have taken for early_stopping, stream, choice, min_p …
        ("reasoning", None),
        ("store", None),
        ("echo", None),
        ("input", None),
        ("n_probs", None),
        ("stream_options", None),
        ("stop_word", None),
        ("x", None),
        ("", None),
        ("_", None),
    ],
)
def test_a_slip_is_found_and_nothing_far_fetched(typed: str, meant: str | None) -> None:
    assert nearest(typed, KNOWN) == meant


def test_a_beginning_of_two_is_of_neither() -> None:
    assert nearest("freq", ["frequency_penalty", "frequencies"]) is None
    assert nearest("--dtyp", ["--dtype", "--data"]) == "--dtype"
    assert nearest("guff", ["gguf"]) == "gguf"
    assert nearest("k", ["n", "K"]) == "K"


def test_words_may_be_shortened() -> None:
    known = ["--save-every", "--evaluate-every", "--sample-every", "--log-every"]
    assert nearest("--eval-every", known) == nearest("eval_every", known) == "--evaluate-every"


def test_a_name_without_end_costs_nothing() -> None:
    began = time.process_time()
    assert nearest("max_tokens" * 1_000_000, KNOWN) is None
    assert nearest("x" * 50, [f"{number:050}" for number in range(3_000)]) is None
    assert time.process_time() - began < 5
