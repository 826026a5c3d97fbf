"""Scoring a text beside lm-eval's `hf` model: same weights, same tokens, same windows, in turn.

    python -m benchmarks.peers.scoring --weights PATH --text FILE [--dtype float32 int8] [--tokens N] [--rounds N]

Prints the seconds of each, how many times faster Topkapi is (median, least, greatest), and the perplexities.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .__main__ import CACHE
from .engines import HERE, ROOT, PeerError, environment
from .environments import python
from .machine import cores_used, described
from .weights import said, source


class Scorer:
    """A script of `workers/` that scores its text whenever it is sent a line."""

    def __init__(self, interpreter: Path | str, script: str, *arguments: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close)
        self._process = subprocess.Popen(
            [str(interpreter), str(HERE / "workers" / script), *arguments], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment() | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.facts = self._answer()

    def score(self) -> dict[str, Any]:
        """`seconds` and `nll`. Raises `PeerError`."""
        assert self._process.stdin is not None, "a pipe"
        print(file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=20)
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "a pipe"
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise PeerError(self._errors.read()[-2000:])
        answer: dict[str, Any] = json.loads(line)
        return answer


def whole_windows(directory: Path, text: str, window: int, windows: int) -> str:
    """The beginning of `text` that is so many windows of tokens, so that the last one is no special case."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    offsets = tokenizer.encode(text[: 20 * window * windows], add_special_tokens=False).offsets
    if len(offsets) <= window * windows:
        raise PeerError(f"the text has only {len(offsets)} tokens, not {window * windows}: give fewer with --windows")
    return text[: offsets[window * windows][0]]


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.peers.scoring", allow_abbrev=False)
    parser.add_argument("--weights", type=Path, required=True, help="a directory or a .gguf file")
    parser.add_argument("--text", type=Path, required=True, help="such as WikiText-2's validation part")
    parser.add_argument("--dtype", nargs="+", default=["float32", "int8"], help="what Topkapi computes in")
    parser.add_argument("--peer-dtype", default="float32", help="what lm-eval's model computes in")
    parser.add_argument("--window", type=int, default=511, help="tokens that a window scores")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="windows that lm-eval computes together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go, beside standard output")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR")
    arguments = parser.parse_args()
    cache = arguments.cache.resolve()
    directory = source(cache, "", arguments.weights)
    text = whole_windows(directory, arguments.text.read_text(encoding="utf-8"), arguments.window, arguments.windows)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        (file := Path(scratch) / "text").write_text(text, encoding="utf-8")
        theirs = Scorer(python(cache, "lm_eval"), "run_lm_eval.py", str(directory), arguments.peer_dtype,
                        str(arguments.window), str(arguments.batch), str(file))  # fmt: skip
        stack.callback(theirs.close)
        (ids := Path(scratch) / "ids").write_text(json.dumps([theirs.facts["prefix"], *theirs.facts["tokens"]]))
        ours = {}
        for dtype in arguments.dtype:
            ours[dtype] = Scorer(sys.executable, "run_score.py", str(directory), dtype, str(arguments.window), str(ids))
            stack.callback(ours[dtype].close)
        before = cores_used()
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("lm-eval", *ours)}
        for turn in range(arguments.rounds):
            said(f"round {turn + 1} of {arguments.rounds}")
            for name, scorer in list({"lm-eval": theirs, **ours}.items())[:: -1 if turn % 2 else 1]:
                found[name].append(scorer.score())
    count = len(theirs.facts["tokens"])
    print(
        f"{described()['processor']}, {theirs.facts['version']} in {arguments.peer_dtype}, batches of "
        f"{arguments.batch}; {directory.name}, {count} tokens in windows of {arguments.window}, {arguments.rounds} "
        f"rounds; other programs used {before:.1f} cores before"
    )
    print("\n| | seconds | tokens/s | times faster | perplexity |\n|---|---:|---:|---:|---:|")
    for name, rounds in found.items():
        ratios = [other["seconds"] / mine["seconds"] for mine, other in zip(rounds, found["lm-eval"], strict=True)]
        seconds = statistics.median(each["seconds"] for each in rounds)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(
            f"| {name} | {seconds:.2f} | {count / seconds:.0f} | {spread} | {math.exp(rounds[0]['nll'] / count):.4f} |"
        )
    if arguments.json:
        whole = {"machine": described(), "busy": before, "tokens": count, "rounds": found}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
