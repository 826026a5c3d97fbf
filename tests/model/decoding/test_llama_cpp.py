"""Stages against what llama.cpp's samplers leave of the same logits, recorded by `record_llama_vectors.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from topkapi.model.decoding.choosing import process
from topkapi.model.decoding.parameters import resolve
from topkapi.model.decoding.stage import Row
from topkapi.model.decoding.truncation import observe_surprise

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("llama_vectors.json").read_text())
LOGITS = torch.tensor([[float("-inf") if x is None else x for x in row] for row in RECORDED["logits"]])


def same_distribution(processed: torch.Tensor, left: dict[str, float]) -> None:
    expected = torch.zeros(processed.shape, dtype=torch.float64)
    expected[[int(token_id) for token_id in left]] = torch.tensor(list(left.values()), dtype=torch.float64)
    torch.testing.assert_close(processed.double().softmax(-1), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"{case['request']}-{case['logits']}")
def test_stage_leaves_what_llama_cpp_leaves(case: dict[str, Any]) -> None:
    row = Row(resolve({"seed": 1, **case["request"]}), list(RECORDED["history"]), 0)
    same_distribution(process(LOGITS[case["logits"]][None], [row])[0], case["left"])


def test_mirostat_moves_its_bound_as_llama_cpp_does() -> None:
    """Twelve steps, each told the token that llama.cpp drew, so that both know the same text."""
    row = Row(resolve({"seed": 1, **RECORDED["mirostat"]["request"]}), [1], 1)
    sizes = set()
    for step in RECORDED["mirostat"]["steps"]:
        processed = process(LOGITS[step["logits"]][None], [row])[0]
        same_distribution(processed, step["left"])
        observe_surprise(row, float(processed.double().log_softmax(-1)[step["chosen"]]))
        row.tokens.append(step["chosen"])
        sizes.add((step["logits"], len(step["left"])))
    assert len(sizes) > 3, "the bound never moved"
