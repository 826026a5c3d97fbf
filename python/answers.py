"""A generation of the service as the texts that the Python API returns, whole or piece by piece."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from topkapi.python import background
from topkapi.python.calls import running
from topkapi.python.errors import readable
from topkapi.python.results import Generated, Piece, Timings, Token, TokenTrace, Trace, Usage
from topkapi.service.api.native.generate import piece, token_logprobs, token_trace

if TYPE_CHECKING:
    from types import TracebackType

    from topkapi.engine import request
    from topkapi.service.generation import CompletionOutput, Delta, Generation
    from topkapi.service.models import LoadedModel


def answers(generation: Generation) -> list[Generated]:
    """The first answer to each prompt, as far as they have come."""
    found = []
    for number in range(len(generation.plan.prompts)):
        facts = _facts(generation, number)
        own = [output for output in generation.outputs if output.prompt_index == number]
        choices: list[Generated] = []
        choices += (_answer(generation, output, facts, choices) for output in own)
        found.append(choices[0])
    return found


def _facts(generation: Generation, number: int) -> dict[str, Any]:
    """What all answers to one prompt share."""
    parameters = generation.plan.parameters[number].as_dict()
    done = generation.completed.get(number)
    prompt = len(generation.plan.prompts[number])
    tokens = sum(len(output.tokens) for output in generation.outputs if output.prompt_index == number)
    counts = {} if done is None else {name: getattr(done, name) for name in _COUNTS}
    timings, rate = generation.timings, generation.tokens_per_s
    return {
        "parameters": parameters,
        "usage": Usage(prompt, tokens, prompt + tokens, **counts),
        "timings": Timings(timings.queue_s, timings.prefill_s, timings.decode_s, generation.first_token_s, rate),
        "order": generation.order,
        "deterministic": generation.deterministic,
        "model": generation.plan.model.name,
    }


_COUNTS = ("cached_tokens", "guessed_tokens", "accepted_tokens")


def _answer(
    generation: Generation, output: CompletionOutput, facts: dict[str, Any], choices: list[Generated]
) -> Generated:
    return Generated.of(
        output.text,
        tokens=[_token(generation, token) for token in output.tokens],
        trace=_trace(generation, output.tokens),
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        score=output.score,
        prompt_index=output.prompt_index,
        output_index=output.index,
        choices=choices,
        **facts,
    )


def _token(generation: Generation, token: request.Token) -> Token:
    model: LoadedModel = generation.plan.model
    if generation.parameters.logprobs is not None:
        told = token_logprobs(model, token)
    else:
        told = piece(model, token.token_id)
    return Token.of(told)


def _trace(generation: Generation, tokens: list[request.Token]) -> Trace | None:
    if not generation.parameters.trace:
        return None
    return Trace(TokenTrace.of(token_trace(generation.plan.model, token)) for token in tokens)


def _piece(generation: Generation, delta: Delta) -> Piece:
    tokens = [] if delta.token is None else [delta.token]
    return Piece.of(
        delta.text,
        tokens=[_token(generation, token) for token in tokens],
        trace=_trace(generation, tokens),
        output_index=delta.output.index,
        prompt_index=delta.output.prompt_index,
    )


class _Told:
    """A generation as it goes on, on the loop in the background. It begins with the first piece that is asked for."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._pieces = self._told()

    async def _told(self) -> AsyncGenerator[Piece, None]:
        async with running(self.generation):
            async for delta in self.generation.steps():
                yield _piece(self.generation, delta)

    async def next(self) -> Piece | None:
        """The next piece, None after the last."""
        return await anext(self._pieces, None)

    async def close(self) -> None:
        """End it: what is still computed is cancelled."""
        self.generation.cancel()
        # Where another thread waits for a piece, that one ends it: there is one within a step.
        with suppress(RuntimeError):
            await self._pieces.aclose()


class Stream:
    """The pieces of an answer as they come: `for piece in model.stream("Once"): print(piece, end="")`.

    Each is a `Piece`, a str with its token. `result` is the whole answer. Left early, by `break`, `close()` or at the
    end of a `with` block, what is still computed is cancelled.
    """

    def __init__(self, model: object, generation: Generation, several: bool) -> None:
        # The model would be closed if nobody had it any more.
        self._model, self._told, self._several = model, _Told(generation), several
        _end_with(self, self._told)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        with readable():
            piece = background.run(self._told.next())
        if piece is None:
            raise StopIteration
        return piece

    @property
    def result(self) -> Any:
        """The whole answer (a list of them for a list of prompts), after reading what is left of the stream."""
        for _ in self:
            pass
        return shaped(answers(self._told.generation), self._several)

    def close(self) -> None:
        """Stop here: what is still computed is cancelled."""
        background.run(self._told.close())

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream:
    """The pieces of an answer as they come: `async for piece in model.astream("Once"): print(piece, end="")`.

    As `Stream`; `await stream.result()` is the whole answer, `await stream.aclose()` stops.
    """

    def __init__(self, model: object, prepared: Callable[[], Awaitable[Generation]], several: bool) -> None:
        self._model, self._prepared, self._several = model, prepared, several
        self._told: _Told | None = None

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Piece:
        with readable():
            if self._told is None:
                self._told = _Told(await self._prepared())
                _end_with(self, self._told)
            piece = await background.arun(self._told.next())
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def result(self) -> Any:
        """The whole answer (a list of them for a list of prompts), after reading what is left of the stream."""
        async for _ in self:
            pass
        assert self._told is not None, "the loop has made it"
        return shaped(answers(self._told.generation), self._several)

    async def aclose(self) -> None:
        """Stop here: what is still computed is cancelled."""
        if self._told is not None:
            await background.arun(self._told.close())

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


def _end_with(stream: object, told: _Told) -> None:
    """Let what is told end with the stream that nobody has any more. Not at exit, when everything ends."""
    weakref.finalize(stream, lambda: background.soon(told.close())).atexit = False


def shaped(found: list[Generated], several: bool) -> Any:
    """What a call returns: the one answer, or the list of them for a list of prompts."""
    return found if several else found[0]
