"""`POST /score`: how probable texts, or completions of prompts, are under a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from topkapi.service.api.http.answering import Event
from topkapi.service.api.native import render, score_schemas
from topkapi.service.api.native.asking import score_response, scoring_of
from topkapi.service.api.native.streams import KeptAnswer, Streams
from topkapi.service.models import LoadedModel

SECONDS_BETWEEN_PROGRESS = 0.1


class ScoreAnswer(KeptAnswer[tuple[int, int]]):
    """The scores of texts, and what is best of choices."""

    def __init__(self, model: LoadedModel, body: score_schemas.ScoreRequest, streams: Streams) -> None:
        self._model, self._body = model, body
        self._items, self._scoring = scoring_of(model, body)
        self._last_told = 0.0
        super().__init__(
            self._scoring,
            stream=body.stream,
            streams=streams,
            identifier=render.new_id("score"),
            resumable=body.resumable,
        )

    def whole(self) -> dict[str, Any]:
        return score_response(self._model, self._body, self._items, self._scoring, self.identifier)

    def told(self, step: tuple[int, int]) -> Iterator[Event]:
        scored, total = step
        if scored == total or time.monotonic() - self._last_told > SECONDS_BETWEEN_PROGRESS:
            self._last_told = time.monotonic()
            yield "progress", {"scored": scored, "total": total}

    def ending(self) -> Iterator[Event]:
        yield "done", self.whole()
