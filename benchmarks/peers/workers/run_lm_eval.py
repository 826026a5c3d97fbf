"""lm-eval's `hf` model on a text: `run_lm_eval.py DIRECTORY DTYPE WINDOW BATCH TEXT`.

Reads a line for each time it is to do so, and answers with the seconds and the sum of negative log-probabilities.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from protocol import say

TASK: dict[str, Any] = {
    "task": "a_text", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling",
    "doc_to_text": "", "doc_to_target": "{{page}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}  # fmt: skip


class Timed(HFLM):  # type: ignore[misc]
    """Notes how long the network was at work; setting up a task doesn't count."""

    seconds = 0.0

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        began = time.perf_counter()
        found = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        self.seconds = time.perf_counter() - began
        return found


def main() -> None:
    """All cores; a window scores as many tokens as it reads, the first of which is the last of the one before."""
    directory, dtype, window, batch, file = sys.argv[1:6]
    sys.stdout = sys.stderr
    torch.set_num_threads(os.cpu_count() or 1)
    text = Path(file).read_text(encoding="utf-8")
    model = Timed(
        pretrained=directory, dtype=dtype, device="cpu", max_length=int(window), batch_size=int(batch),
        add_bos_token=False, attn_implementation="sdpa",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "text.jsonl"
        rows.write_text(json.dumps({"page": text}) + "\n", encoding="utf-8")
        task = TASK | {"dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": scratch}}
        tokens = model.tok_encode(text)
        say(version=f"lm-eval {importlib.metadata.version('lm_eval')}", prefix=model.prefix_token_id, tokens=tokens)
        for _ in sys.stdin:
            found = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
            per_byte = math.log(found["results"]["a_text"]["byte_perplexity,none"])
            say(seconds=model.seconds, nll=per_byte * len(text.encode()))


if __name__ == "__main__":
    main()
