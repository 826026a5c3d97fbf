"""Rows, awkward logits and one request per strategy, shared by the decoding tests."""

from __future__ import annotations

from typing import Any

import torch

from topkapi.model.decoding.parameters import resolve
from topkapi.model.decoding.stage import Row

VOCABULARY = 50
MARKS = ((7,), (8, 20))
"""What begins and ends thinking."""
HISTORY = [3, 7, 7, 9, 3, 3, 41, 7, 9, 12, 3, 7, 7, 9, 3]
PROMPT_LENGTH = 3

# One request, or several, for every stage; nearly all of them act on nearly all logits.
STRATEGIES: dict[str, list[dict[str, Any]]] = {
    "min_tokens": [{"min_tokens": 99, "stop_token_ids": [8]}],
    "banned_token_ids": [{"banned_token_ids": [5, 9, 40]}],
    "bad_words": [{"bad_words": [[9, 3, 11], [6], [41, 5]]}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": size} for size in (1, 2, 3)],
    "allowed_token_ids": [{"allowed_token_ids": [2, 5, 5, 11, 30, 31]}],
    "thinking_budget": [{"thinking_budget": len(HISTORY) - PROMPT_LENGTH}],
    "logit_bias": [{"logit_bias": {4: 5.0, 11: -7.5}}],
    "repetition_penalty": [{"repetition_penalty": 1.3}, {"repetition_penalty": 0.7, "repetition_range": 4}],
    "count_penalties": [{"presence_penalty": 0.5, "frequency_penalty": 0.25}],
    "dry": [{"dry_multiplier": 0.8, "dry_breakers": []}, {"dry_multiplier": 1.1, "dry_breakers": [[12]]}],
    "temperature": [{"temperature": 0.7}, {"temperature": 1.2, "dynamic_temperature_range": 0.9},
                    {"dynamic_temperature_range": 0.6, "dynamic_temperature_exponent": 2.5}],
    "top_k": [{"top_k": 1}, {"top_k": 5}, {"top_k": 500}],
    "top_p": [{"top_p": 0.81}, {"top_p": 0.0}, {"top_p": 0.9999999}],
    "min_p": [{"min_p": 0.15}, {"min_p": 1.0}],
    "typical_p": [{"typical_p": 0.5}, {"typical_p": 0.9}, {"typical_p": 0.9999999}],
    "epsilon_cutoff": [{"epsilon_cutoff": 0.02}],
    "eta_cutoff": [{"eta_cutoff": 0.03}],
    "top_n_sigma": [{"top_n_sigma": 1.0}],
    "top_a": [{"top_a": 0.3}],
    "xtc": [{"xtc_probability": 1.0, "xtc_threshold": 0.05}, {"xtc_probability": 0.5, "xtc_threshold": 0.1}],
    "mirostat": [{"mirostat": 2, "mirostat_tau": 1.5}],
}  # fmt: skip
EVERY_STRATEGY = [(name, parameters) for name, requests in STRATEGIES.items() for parameters in requests]


class Marked:
    """A vocabulary of which only the marks of thinking are asked, control tokens each."""

    vocab_size = VOCABULARY

    def encode(self, text: str) -> list[int]:
        raise AssertionError("marks are control tokens where a vocabulary has them")

    def encode_with_control(self, text: str) -> list[int]:
        return list(MARKS[text.startswith("</")])

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def row(seed: int = 1, **parameters: Any) -> Row:
    """A row in the middle of an answer."""
    return Row(
        resolve({"seed": seed, **parameters}, vocabulary=Marked()), list(HISTORY), PROMPT_LENGTH, end_token_ids=(2,)
    )


def awkward_logits() -> torch.Tensor:
    """Random rows, and rows with ties, ruled out tokens, one candidate, nothing but ties, and huge values."""
    random = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    infinite = random[1].clone()
    infinite[::2] = float("-inf")
    single = torch.full((VOCABULARY,), float("-inf"))
    single[5] = 1.0
    return torch.stack([*random, random[0].round(), infinite, single, torch.zeros(VOCABULARY), random[2] * 1e4])


TIED = (6, 9)
