"""Sequences that begin alike are read once, within the windows and soft caps of their network."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from topkapi.training.evaluation.likelihood import Scored, log_likelihoods


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "smollm3"])
def test_sequences_side_by_side_have_the_likelihoods_of_each_alone(family: str) -> None:
    windows = {"mistral": {"layer_windows": (4, 4)}, "smollm3": {"layer_windows": (None, 4), "unrotated_layers": (1,)}}
    model = tiny_model(family, **windows.get(family, {}))
    generator = torch.Generator().manual_seed(1)
    common = torch.randint(120, (11,), generator=generator).tolist()
    ends = [torch.randint(120, (length,), generator=generator).tolist() for length in (9, 14, 3)]
    texts = [common + end for end in ends]
    together = log_likelihoods(model, [[Scored(text, 5) for text in texts], [Scored(texts[0][:6])]])
    for text, found in zip(texts, together[0], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([text]), torch.arange(len(text)).unsqueeze(0))[0]
        expected = logits.log_softmax(-1)[4:-1].gather(-1, torch.tensor(text[5:]).unsqueeze(-1)).squeeze(-1)
        assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
