"""Windows of attention, soft caps and positions of their own hold wherever the engine reads tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.test_engine import Receiver, job
from tests.tiny import tiny_model
from topkapi.engine.engine import Engine
from topkapi.model import serving
from topkapi.model.generation import generate
from topkapi.model.scoring import score
from topkapi.model.transformer import Decoder

MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"layer_windows": (7, 7)},
    "qwen2": {"layer_windows": (None, 9)},
    "gemma2": {"layer_windows": (6, None)},
    "gemma3_text": {"layer_windows": (3, 3)},
    "phi3": {"layer_windows": (5, 5)},
    "smollm3": {"unrotated_layers": (1,), "layer_windows": (None, 8)},
}


def model_of(family: str) -> Decoder:
    return tiny_model(family, context_length=400, **MODELS[family])


def at_once(model: Decoder, tokens: list[int]) -> torch.Tensor:
    """The logits of a text that is read in one go, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), torch.arange(len(tokens)).unsqueeze(0))[0]


def continued(model: Decoder, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(at_once(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def text(length: int, seed: int) -> list[int]:
    return torch.randint(120, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", MODELS)
def test_answers_beside_others_after_a_known_beginning_and_with_guesses(family: str) -> None:
    plain, served = model_of(family), model_of(family)
    serving.prepare(served)
    beginning = text(150, 1)
    prompts = [beginning + text(20, 2), beginning + text(40, 3), text(9, 4) * 6]
    expected = [continued(plain, prompt, 12) for prompt in prompts]
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_end_token": True}
    engine = Engine(served, name="tiny", max_running=3, draft=model_of(family))
    engine.start()
    try:
        for guessing in ({}, {"prompt_lookup": 8}, {"draft_tokens": 3}):
            receivers = [Receiver() for _ in prompts]
            for prompt, receiver in zip(prompts, receivers, strict=True):
                engine.submit(job(prompt, **greedy, **guessing), receiver)
            assert [receiver.tokens() for receiver in receivers] == expected, guessing
    finally:
        engine.close()
    assert generate(served, prompts[0], greedy).token_ids == expected[0]


@pytest.mark.parametrize("family", MODELS)
def test_scores_are_those_of_the_text_read_at_once(family: str) -> None:
    model = model_of(family)
    tokens = text(390, 5)
    expected = at_once(model, tokens).double().log_softmax(-1)[:-1].gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1))
    serving.prepare(model)
    assert torch.tensor(score(model, tokens).logprobs) == pytest.approx(expected.squeeze(-1).numpy(), abs=1e-4)
