"""Documents that repeat an earlier one: word for word, or nearly (MinHash, Broder 1997; by `datasketch`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from topkapi.training.data.finding import extra_package

Deduplicate = Literal["none", "exact", "near"]

# Documents are near duplicates where so large a part of their runs of five words is the same.
NEAR = 0.8
_RUN_OF_WORDS = 5
_PERMUTATIONS = 128
_WORD = re.compile(r"\w+")

Signature = NDArray[np.uint64]


def signature(text: str) -> Signature:
    """The MinHash of a document's runs of words: `[128]`. Case and punctuation do not count."""
    words = _WORD.findall(text.casefold()) or [text]
    runs = {" ".join(words[at : at + _RUN_OF_WORDS]).encode() for at in range(max(1, len(words) - _RUN_OF_WORDS + 1))}
    found = _datasketch().MinHash(num_perm=_PERMUTATIONS)
    found.update_batch(runs)
    values: Signature = found.hashvalues
    return values


def repeated(digests: Sequence[int], signatures: Sequence[Signature] | None) -> NDArray[np.bool_]:
    """Which documents repeat an earlier one: by their digests, and with `signatures` also nearly: `[N]`."""
    seen: set[int] = set()
    marks = np.zeros(len(digests), dtype=np.bool_)
    index: Any = None
    if signatures is not None:
        index = _datasketch().MinHashLSH(threshold=NEAR, num_perm=_PERMUTATIONS)
    for number, digest in enumerate(digests):
        if digest in seen:
            marks[number] = True
            continue
        seen.add(digest)
        if signatures is None:
            continue
        own = signatures[number]
        sketch = _datasketch().MinHash(num_perm=_PERMUTATIONS)
        sketch.hashvalues = own
        # The index names candidates; how alike they are is the part of equal minima.
        if any(float(np.mean(signatures[other] == own)) >= NEAR for other in index.query(sketch)):
            marks[number] = True
        else:
            index.insert(number, sketch)
    return marks


def _datasketch() -> Any:
    return extra_package("datasketch", "deduplicate", "finding near duplicates")
