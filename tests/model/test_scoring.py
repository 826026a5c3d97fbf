"""Scores equal transformers', each token is scored exactly once, and generation agrees with scoring."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_config, tiny_model
from topkapi.model.errors import InvalidRequest
from topkapi.model.generation import generate
from topkapi.model.scoring import score, windows
from topkapi.model.storage.tensors import to_hugging_face


def tokens(count: int) -> list[int]:
    return torch.randint(1, 120, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def transformers_model(family: str) -> transformers.PreTrainedModel:
    ours = tiny_model(family)
    config = transformers.AutoConfig.for_model(**ours.config.to_hugging_face())
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = to_hugging_face(ours.config, ours.state_dict())
    missing = theirs.load_state_dict(state, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])
    theirs.tie_weights()
    return theirs


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("window", "stride"), [(None, None), (64, 32), (20, 7), (33, 32), (2, 1)])
def test_perplexity_equals_transformers_with_and_without_windows(family: str, window: int, stride: int) -> None:
    text = tokens(50 if window is None else 150)
    ours = score(tiny_model(family), text, window=window, stride=stride)
    theirs, reference = [], transformers_model(family)
    for part in windows(len(text), tiny_config(family), window, stride):
        with torch.no_grad():
            logits = reference(torch.tensor([text[part.start : part.end]])).logits[0].double().log_softmax(-1)
        theirs += [float(logits[t - 1 - part.start, text[t]]) for t in range(part.first, part.end)]
    assert len(ours.logprobs) == len(theirs) == len(text) - 1
    assert ours.nll / len(theirs) == pytest.approx(-sum(theirs) / len(theirs), rel=1e-5)
    assert math.exp(ours.nll / len(theirs)) == pytest.approx(math.exp(-sum(theirs) / len(theirs)), rel=1e-4)


@given(st.integers(0, 400), st.integers(2, 64), st.data())
def test_windows_score_every_token_once_with_context(length: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size - 1))
    parts = windows(length, tiny_config(), size, stride)
    scored = [token for part in parts for token in range(part.first, part.end)]
    assert scored == list(range(1, length))
    for part in parts:
        assert part.end - part.start <= size
        assert part.first - part.start >= min(part.first, size - stride)


def test_ranks_entropies_and_tops_are_those_of_the_distribution() -> None:
    model, text = tiny_model(), tokens(30)
    scores = score(model, text, top=3)
    with torch.no_grad():
        logprobs = model(torch.tensor([text]), torch.arange(30)[None])[0, :-1].double().log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=logprobs).entropy()
    assert scores.entropies == pytest.approx(entropy.tolist(), rel=1e-4)
    for index, target in enumerate(text[1:]):
        order = logprobs[index].argsort(descending=True).tolist()
        assert order[scores.ranks[index] - 1] == target
        assert [token_id for token_id, _ in scores.tops[index]] == order[:3]


def test_greedy_generation_takes_what_scoring_ranks_first() -> None:
    model, prompt = tiny_model(), tokens(10)
    generated = generate(model, prompt, {"temperature": 0, "max_tokens": 30, "ignore_end_token": True})
    assert generated.finish_reason == "length"
    assert len(generated.token_ids) == 30
    assert score(model, prompt + generated.token_ids).ranks[9:] == [1] * 30


def test_generation_stops_at_the_context() -> None:
    generated = generate(tiny_model(), tokens(60), {"seed": 1, "ignore_end_token": True})
    assert (len(generated.token_ids), generated.finish_reason) == (4, "length")


def test_generation_is_reproducible_and_sequences_differ() -> None:
    model, wanted = tiny_model(), {"seed": 5, "max_tokens": 20, "temperature": 1.2}
    first = generate(model, [1, 2, 3], wanted)
    assert generate(model, [1, 2, 3], wanted) == first
    assert generate(model, [1, 2, 3], wanted, sequence=1) != first
    assert generate(model, [1, 2, 3], wanted | {"seed": 6}) != first


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"token_ids": []}, "text"),
        ({"token_ids": [1, 500]}, "token_ids"),
        ({"token_ids": [1, 2], "window": 65}, "window"),
        ({"token_ids": [1, 2], "window": 1}, "window"),
        ({"token_ids": [1, 2], "window": 8, "stride": 8}, "stride"),
        ({"token_ids": [1, 2], "stride": 0}, "stride"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments: dict, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        score(tiny_model(), **arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(("prompt", "says"), [([], "empty"), ([1] * 64, "context"), ([120], "vocabulary")])
def test_prompts_that_cannot_be_continued_are_refused(prompt: list[int], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        generate(tiny_model(), prompt)
