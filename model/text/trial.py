"""A stranger's tokenizer is tried in a process of its own before it is used.

Its patterns may backtrack for hours, its steps make gigabytes of one letter, and it may bring the library down: none of
that can be stopped from within a process. What happens in the other one: `model.text.trial_process`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topkapi.model.errors import CheckpointError

SECONDS = 20
BYTES = 1 << 33
_MOST_GROWTH = 256
"""How many times longer the steps of a normalizer may make a text."""


def try_tokenizer(definition: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Use a tokenizer in another process. Raises `CheckpointError` where that fails or does not end."""
    if growth(definition.get("normalizer")) > _MOST_GROWTH:
        raise refused(f"its normalizer makes texts more than {_MOST_GROWTH} times longer")
    environment = os.environ | {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parents[3]), environment.get("PYTHONPATH")))
    )
    told = json.dumps({"definition": definition, "config": config}).encode()
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "topkapi.model.text.trial_process"],
            input=told,
            capture_output=True,
            timeout=2 * SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise refused(f"it takes longer than {SECONDS} s on a short text") from None
    if ended.returncode:
        reason = f"it takes longer than {SECONDS} s, or more than {BYTES >> 30} GiB, on a short text"
        raise refused(reason if ended.returncode < 0 else "the process that tried it failed")
    problem = json.loads(ended.stdout)
    if problem is not None:
        raise CheckpointError(str(problem["message"]), field=problem["field"], hint=problem["hint"])


def refused(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer definition cannot be used: {reason}",
        hint="tokenizer.json must be a file written by the tokenizers library",
    )


def growth(step: Any) -> float:
    """How many times longer a text may become by a step of a normalizer, or by all steps of a sequence."""
    if isinstance(step, list):
        return math.prod(map(growth, step))
    if not isinstance(step, Mapping):
        return 1
    if step.get("type") == "Sequence":
        return growth(step.get("normalizers"))
    if step.get("type") == "Replace":
        content, pattern = step.get("content"), step.get("pattern")
        added = len(content) if isinstance(content, str) else 1
        replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
        # An expression may match nothing at all, between any two characters.
        return max(1, added / len(replaced)) if isinstance(replaced, str) and replaced else 1 + added
    return _EXPANSIONS.get(str(step.get("type")), 1)


_EXPANSIONS = {"ByteLevel": 2, "NFKC": 1, "NFKD": 1, "Precompiled": 3}
"""For a few characters more; those of composed forms do not expand again."""
