"""`POST /generate`: prompts or a conversation continued, whole or as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from topkapi.service.api.http.answering import Event
from topkapi.service.api.native import render, schemas
from topkapi.service.api.native.streams import KeptAnswer, Streams
from topkapi.service.generation import Delta, Generation, Plan, plan
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import conversation_tokens, prompt_tokens
from topkapi.service.scoring import require_one


class GenerateAnswer(KeptAnswer[Delta]):
    """The continuations of prompts, or of a conversation."""

    def __init__(self, model: LoadedModel, body: schemas.GenerateRequest, streams: Streams) -> None:
        self.generation = Generation(_plan(model, body), body.priority)
        self._created = render.timestamp()
        super().__init__(self.generation, stream=body.stream, streams=streams, identifier=render.new_id("gen"))

    def whole(self) -> dict[str, Any]:
        return render.generate_response(self.generation, self.identifier, self._created)

    def told(self, step: Delta) -> Iterator[Event]:
        yield "token", render.token_event(self.generation, step)

    def ending(self) -> Iterator[Event]:
        yield "done", self.whole()


def _plan(model: LoadedModel, body: schemas.GenerateRequest) -> Plan:
    kind = require_one(schemas.given(body, "prompt", "messages"), "prompt and messages")
    if kind == "messages":
        prompts = [conversation_tokens(model, [message.model_dump() for message in body.messages or []])]
    else:
        prompts = prompt_tokens(model, body.prompt)
    return plan(model, prompts, body.parameters(), chat=kind == "messages")
