"""Writes llama_vectors.json: what llama.cpp's samplers leave of some logits, to compare Topkapi's stages with.

Needs `pip install llama-cpp-python`, which compiles llama.cpp and is no dependency of this project; run it where that
is installed: `python tests/model/decoding/record_llama_vectors.py`. The file names the version it was recorded with.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
from pathlib import Path
from typing import Any

import llama_cpp as llama

VOCABULARY = 24
HISTORY = [3, 7, 7, 9, 3, 3, 1, 7, 9, 12, 3, 7, 7, 9, 3]


def array(logits: list[float | None]) -> tuple[Any, Any]:
    """What is ruled out (None) is not in the list, as after any of llama.cpp's own samplers."""
    possible = [(token_id, logit) for token_id, logit in enumerate(logits) if logit is not None]
    data = (llama.llama_token_data * len(possible))()
    for at, (token_id, logit) in enumerate(possible):
        data[at].id, data[at].logit = token_id, logit
    return data, llama.llama_token_data_array(data, len(possible), -1, False)


def left(view: Any) -> dict[int, float]:
    """Token ids and probabilities of what a sampler left."""
    logits = {view.data[at].id: view.data[at].logit for at in range(view.size) if view.data[at].logit > -math.inf}
    best = max(logits.values())
    total = sum(math.exp(logit - best) for logit in logits.values())
    return {token_id: math.exp(logit - best) / total for token_id, logit in sorted(logits.items())}


def applied(sampler: Any, logits: list[float | None], history: list[int]) -> tuple[dict[int, float], int | None]:
    for token_id in history:
        llama.llama_sampler_accept(sampler, token_id)
    _memory, view = array(logits)
    llama.llama_sampler_apply(sampler, ctypes.byref(view))
    return left(view), view.data[view.selected].id if view.selected >= 0 else None


def some_logits() -> list[list[float | None]]:
    generator = random.Random(0)
    rows: list[list[float | None]] = [
        [round(generator.gauss(0, scale), 3) for _ in range(VOCABULARY)] for scale in (1, 2.5, 5)
    ]
    rows.append([None if at % 3 == 0 else value for at, value in enumerate(rows[1])])
    return rows


def main() -> None:
    penalties, dry = llama.llama_sampler_init_penalties, llama.llama_sampler_init_dry
    samplers: list[tuple[dict[str, Any], Any]] = [
        ({"temperature": 0.7}, lambda: llama.llama_sampler_init_temp(0.7)),
        ({"temperature": 1.2, "dynamic_temperature_range": 0.9, "dynamic_temperature_exponent": 1.5},
         lambda: llama.llama_sampler_init_temp_ext(1.2, 0.9, 1.5)),
        ({"dynamic_temperature_range": 0.5}, lambda: llama.llama_sampler_init_temp_ext(1.0, 0.5, 1.0)),
        ({"top_k": 5}, lambda: llama.llama_sampler_init_top_k(5)),
        ({"top_p": 0.8}, lambda: llama.llama_sampler_init_top_p(0.8, 1)),
        ({"min_p": 0.1}, lambda: llama.llama_sampler_init_min_p(0.1, 1)),
        ({"typical_p": 0.6}, lambda: llama.llama_sampler_init_typical(0.6, 1)),
        ({"top_n_sigma": 1.2}, lambda: llama.llama_sampler_init_top_n_sigma(1.2)),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.08}, lambda: llama.llama_sampler_init_xtc(1.0, 0.08, 1, 7)),
        ({"repetition_penalty": 1.3}, lambda: penalties(VOCABULARY, 64, 1.3, 0.0, 0.0)),
        ({"repetition_penalty": 1.3, "repetition_range": 4}, lambda: penalties(VOCABULARY, 4, 1.3, 0.0, 0.0)),
        ({"frequency_penalty": 0.3, "presence_penalty": 0.4}, lambda: penalties(VOCABULARY, 64, 1.0, 0.3, 0.4)),
        ({"dry_multiplier": 0.8, "dry_breakers": []}, lambda: dry(None, 0.8, 1.75, 2, 99, None, 0)),
        ({"dry_multiplier": 0.8, "dry_base": 1.3, "dry_allowed_length": 1, "dry_range": 9, "dry_breakers": []},
         lambda: dry(None, 0.8, 1.3, 1, 9, None, 0)),
    ]  # fmt: skip
    rows = some_logits()
    cases = []
    for request, make in samplers:
        for at, logits in enumerate(rows):
            sampler = make()
            cases.append({"request": request, "logits": at, "left": applied(sampler, logits, HISTORY)[0]})
            llama.llama_sampler_free(sampler)
    mirostat = llama.llama_sampler_init_mirostat_v2(5, 2.0, 0.3)
    steps = []
    for step in range(12):
        kept, chosen = applied(mirostat, rows[step % 3], [])
        steps.append({"logits": step % 3, "left": kept, "chosen": chosen})
    recorded = {
        "recorded_with": f"llama-cpp-python {llama.__version__}",
        "history": HISTORY,
        "logits": rows,
        "cases": cases,
        "mirostat": {"request": {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.3}, "steps": steps},
    }
    path = Path(__file__).with_name("llama_vectors.json")
    path.write_text(json.dumps(json.loads(json.dumps(recorded), parse_float=lambda s: round(float(s), 7))) + "\n")


if __name__ == "__main__":
    main()
