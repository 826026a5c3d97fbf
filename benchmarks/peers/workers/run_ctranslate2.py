"""CTranslate2's batches: `run_ctranslate2.py DIRECTORY COMPUTE_TYPE`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import ctranslate2
from protocol import Generate, drive


def load() -> Generate:
    """All cores work on one batch; that of a call is never split."""
    directory, kind = sys.argv[1:3]
    generator = ctranslate2.Generator(
        directory, device="cpu", compute_type=kind, inter_threads=1, intra_threads=os.cpu_count() or 1
    )
    vocabulary = json.loads((Path(directory) / "vocabulary.json").read_text())

    def generate(prompts: list[list[int]], tokens: int) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in prompts]
        began = time.perf_counter()

        def came(step: ctranslate2.GenerationStepResult) -> bool:
            times[step.batch_id].append(time.perf_counter() - began)
            return False

        generator.generate_batch(
            [[vocabulary[token] for token in prompt] for prompt in prompts], max_length=tokens, min_length=tokens,
            sampling_topk=1, include_prompt_in_result=False, max_batch_size=0, callback=came,
        )  # fmt: skip
        return times

    return generate


if __name__ == "__main__":
    drive(f"CTranslate2 {ctranslate2.__version__}", load)
