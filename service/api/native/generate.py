"""`POST /generate`: prompts or a conversation continued, whole or as a stream."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from topkapi.service.api.http.answering import answered
from topkapi.service.api.http.apart import apart, on_thread, unless_disconnected
from topkapi.service.api.http.describing import stream_of
from topkapi.service.api.native import render, schemas
from topkapi.service.api.native.streams import Events, Streams, fingerprint, resumed
from topkapi.service.generation import Generation, Plan, plan
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import conversation_tokens, prompt_tokens
from topkapi.service.scoring import require_one


def add_generate(routes: APIRouter, models: Models, streams: Streams) -> None:
    """The route, over the loaded checkpoints."""

    @routes.post(
        "/generate",
        tags=["text"],
        summary="Continue a prompt, or answer a conversation",
        responses={
            **schemas.ERRORS,
            200: {
                "model": schemas.GenerateResponse,
                "content": stream_of(**schemas.GENERATE_EVENTS),
                "description": "The answer",
            },
        },
        response_model=None,
    )
    async def generate(
        request: Request, body: schemas.GenerateRequest, last_event_id: schemas.LastEventId = None
    ) -> Response:
        if last_event_id is not None:
            return await resumed(streams, request, body.stream, last_event_id)
        model = models.get(body.model)
        generation = Generation(await apart(request, _plan, model, body), body.priority)
        identifier, created = render.new_id("gen"), render.timestamp()
        if body.stream:
            same = await fingerprint(request)
            generation.start()
            return streams.begin(identifier, same, _events(generation, identifier, created), generation.cancel)
        async with generation:
            await unless_disconnected(request, generation.finish())
        return await answered(lambda: render.generate_response(generation, identifier, created))


def _plan(model: LoadedModel, body: schemas.GenerateRequest) -> Plan:
    kind = require_one(schemas.given(body, "prompt", "messages"), "prompt and messages")
    if kind == "messages":
        prompts = [conversation_tokens(model, [message.model_dump() for message in body.messages or []])]
    else:
        prompts = prompt_tokens(model, body.prompt)
    return plan(model, prompts, body.parameters(), chat=kind == "messages")


async def _events(generation: Generation, identifier: str, created: int) -> Events:
    async for delta in generation.deltas():
        yield "token", render.token_event(generation, delta)
    yield "done", await on_thread(lambda: render.generate_response(generation, identifier, created))
