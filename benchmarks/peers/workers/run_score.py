"""Topkapi's scoring of a text, as `/score` does: `run_score.py CHECKPOINT DTYPE WINDOW TOKENS`.

TOKENS is a JSON file of ids, the first of which is context only. Windows lie as lm-eval's do.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from protocol import say

from topkapi.service.models import Models
from topkapi.service.scoring import Item, score_items
from topkapi.service.settings import Settings
from topkapi.service.version import VERSION


def main() -> None:
    """Reads a line for each time it is to do so."""
    checkpoint, dtype, window, file = sys.argv[1:5]
    model = Models(Settings.read(dtype=dtype)).load(checkpoint)
    items = [Item(json.loads(Path(file).read_text()))]
    say(version=f"Topkapi {VERSION}")
    for _ in sys.stdin:
        began = time.perf_counter()
        (scores,) = asyncio.run(score_items(model, items, int(window) + 1, int(window), 0, lambda done, of: None))
        say(seconds=time.perf_counter() - began, nll=scores.nll)


if __name__ == "__main__":
    main()
