"""Incremental detokenising and stop strings, on bytes.

Text is released only when it can no longer change: a multi-byte character or a stop string never leaks in halves.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class Stopper:
    """Turns the tokens of one sequence into text and watches for stop strings.

    `token_bytes(token_id)` gives a token's bytes (empty for control tokens). Call `feed` for each token in order and
    `flush` once at the end. `stopped` is the stop string that was found, or None; the text ends before it.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._stops = [(text, text.encode("utf-8")) for text in stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""
        self.stopped: str | None = None

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain; empty once a stop string was found."""
        if self.stopped is not None:
            return ""
        self._held += self._token_bytes(token_id)
        found = [(at, text) for text, raw in self._stops if (at := self._held.find(raw)) >= 0]
        if found:
            at, self.stopped = min(found, key=lambda match: (match[0], -len(match[1])))
            released, self._held = self._held[:at], b""
            return self._decoder.decode(released, final=True)
        keep = self._held_back()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._decoder.decode(released)

    def flush(self) -> str:
        """What was held back, once nothing more will come; invalid UTF-8 becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        released, self._held = self._held, b""
        return self._decoder.decode(released, final=True)

    def _held_back(self) -> int:
        """Length of the longest tail that a stop string could begin with."""
        longest = max((len(raw) - 1 for _, raw in self._stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(raw.startswith(tail) for _, raw in self._stops):
                return size
        return 0
