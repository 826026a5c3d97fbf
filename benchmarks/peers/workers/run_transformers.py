"""transformers' generate with one batch of all: `run_transformers.py DIRECTORY DTYPE`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import transformers
from protocol import Generate, drive


class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Notes when each step is done, and never stops."""

    def __init__(self) -> None:
        self.began, self.times = time.perf_counter(), list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.times.append(time.perf_counter() - self.began)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load() -> Generate:
    """Fused attention, all cores."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=getattr(torch, sys.argv[2]), attn_implementation="sdpa", local_files_only=True
    ).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> list[list[float]]:
        ids, clock = torch.tensor(prompts), Clock()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
            pad_token_id=0, stopping_criteria=[clock],
        )  # fmt: skip
        return [clock.times] * len(prompts)

    return generate


if __name__ == "__main__":
    drive(f"transformers {transformers.__version__}, torch {torch.__version__}", load)
