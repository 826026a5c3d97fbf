"""A loaded checkpoint: `topkapi.load` and the methods by which it is asked."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from topkapi.model.errors import InvalidRequest
from topkapi.python import background
from topkapi.python.calls import body_of, check_keywords, done, pairs_of, plain, several, turns
from topkapi.python.declaring import declares, decoding_keywords
from topkapi.python.errors import readable
from topkapi.python.results import Generated, Score, Scores
from topkapi.python.score_fields import ScoreFields, score_keywords

if TYPE_CHECKING:
    from types import TracebackType

    from topkapi.python.answers import AsyncStream, Stream
    from topkapi.python.decoding_fields import DecodingFields
    from topkapi.service.api.native.score_schemas import ScoreRequest
    from topkapi.service.generation import Generation
    from topkapi.service.models import LoadedModel, Models
    from topkapi.service.scoring import Item, Scoring

Ids = Sequence[int]
Texts = list[str] | tuple[str, ...]
Messages = str | Mapping[str, str] | Sequence[Mapping[str, str]]
_SETTINGS = ("dtype", "kv_cache_dtype", "threads", "draft")

LONGEST_QUEUE = 1_000_000
"""Calls that may wait in the engine."""


@declares({})
def load(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4", "w8a8", "w4a8"] | None = None,
    kv_cache_dtype: Literal["auto", "float32", "float16", "int8"] | None = None,
    threads: int | None = None,
    draft: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a checkpoint: a directory, a .gguf file, an adapter, or `owner/name` on the Hugging Face hub.

    Without one it is the first that `topkapi serve` would serve. `dtype` is what matrices are held in ("auto": as
    stored), `kv_cache_dtype` what keys and values are, `threads` how many of the processor's are used, `draft` a
    smaller checkpoint with the same vocabulary that guesses ahead. What is left out is read from TOPKAPI_DTYPE,
    TOPKAPI_KV_CACHE_DTYPE, TOPKAPI_THREADS and TOPKAPI_DRAFT, as the commands do.

        with topkapi.load("checkpoints/topkapi-chat") as model:
            print(model.chat("What is the capital of France?"))

    Raises `topkapi.TopkapiError` for what cannot be loaded.
    """
    # Threads that wait for each other by spinning take the cores from one another; it counts if torch is not there yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from topkapi.service.locations import all_at_hand, check_locations, default_checkpoints
    from topkapi.service.settings import Settings

    with readable(_SETTINGS):
        settings = Settings.read(
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
            draft=draft,
            max_queue=LONGEST_QUEUE,
            # Whoever asks for more than can be computed at once has nobody else to ask.
            max_queue_seconds=0,
        )
        location = default_checkpoints(settings)[0] if checkpoint is None else os.fspath(checkpoint)
        (location,), settings = all_at_hand([location], settings)
        check_locations([location], settings)
        import torch

        from topkapi.service.models import Models

        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        models = Models(settings)
        try:
            return Model(models.load(location), models)
        except BaseException:
            models.close()
            raise


class Model:
    """A checkpoint in memory and the engine that computes it, from `topkapi.load`.

    What calls ask for is computed together, as the server does it: a list of prompts, and calls from several threads or
    tasks, share each step. The same call with the same seed gives the same tokens, whatever else is computed.

    It may be used from any thread and where an event loop is running, as in a notebook. `close()`, or leaving a `with`
    block, ends what is still computed and frees the memory.
    """

    name: str
    """What the checkpoint is called."""
    context_length: int
    """Tokens of prompt and answer together."""
    dtype: str
    """What the matrices are held in."""
    kernels: str
    """What computes the network: the native core, on which instruction set, or PyTorch."""
    can_chat: bool
    """Whether the checkpoint has a chat template, so that it takes conversations."""
    warnings: tuple[str, ...]
    """What is odd about the checkpoint."""

    def __init__(self, loaded: LoadedModel, models: Models) -> None:
        self.name, self.dtype, self.kernels = loaded.name, loaded.dtype, loaded.kernels
        self.context_length, self.warnings = loaded.context_length, loaded.warnings
        self.can_chat = loaded.checkpoint.chat is not None
        self._served: LoadedModel | None = loaded
        # The engine's thread holds the network: a model that nobody has any more is closed, as one in use is at exit.
        self._close = weakref.finalize(self, models.close)

    @property
    def closed(self) -> bool:
        """Whether it can't be asked any more."""
        return not self._close.alive

    @property
    def defaults(self) -> dict[str, Any]:
        """The checkpoint's own decoding parameters for prompts."""
        return self._defaults(chat=False)

    @property
    def chat_defaults(self) -> dict[str, Any]:
        """Those for conversations."""
        return self._defaults(chat=True)

    @overload
    def generate(self, prompt: str | Ids, *, priority: int = 0, **parameters: Unpack[DecodingFields]) -> Generated: ...
    @overload
    def generate(
        self, prompt: Texts | Sequence[Ids], *, priority: int = 0, **parameters: Unpack[DecodingFields]
    ) -> list[Generated]: ...
    @declares(decoding_keywords())
    def generate(self, prompt: Any, *, priority: int = 0, **parameters: Unpack[DecodingFields]) -> Any:
        """Continue a prompt: a text, or token ids. A list of either is computed together, and gives a list.

            answer = model.generate("Once upon a time", max_tokens=40, top_k=50, seed=1)
            print(answer, answer.finish_reason, answer.usage)

        The answer is a str that also knows its tokens, why it ended, its parameters and more (`topkapi.Generated`). Of
        `n` answers it is the first; `answer.choices` has all. `logprobs=5` adds log-probabilities, `trace=True`
        how each token was decided. `help(topkapi.DecodingFields)` says what each parameter means; one left out is the
        checkpoint's own default, then the table's.

        Raises `topkapi.TopkapiError`, whose `field` names the parameter at fault and whose `hint` says what to do.
        """
        return self._whole(self._prepared("prompt", prompt, priority, parameters), several(prompt))

    @overload
    async def agenerate(
        self, prompt: str | Ids, *, priority: int = 0, **parameters: Unpack[DecodingFields]
    ) -> Generated: ...
    @overload
    async def agenerate(
        self, prompt: Texts | Sequence[Ids], *, priority: int = 0, **parameters: Unpack[DecodingFields]
    ) -> list[Generated]: ...
    @declares(decoding_keywords(), brief=True)
    async def agenerate(self, prompt: Any, *, priority: int = 0, **parameters: Unpack[DecodingFields]) -> Any:
        """As `generate`, for a caller on an event loop, which goes on meanwhile."""
        return await self._awhole(partial(self._prepared, "prompt", prompt, priority, parameters), several(prompt))

    @declares(decoding_keywords(), brief=True)
    def stream(self, prompt: Any, *, priority: int = 0, **parameters: Unpack[DecodingFields]) -> Stream:
        """As `generate`, piece by piece as it comes.

            for piece in model.stream("Once upon a time", max_tokens=40):
                print(piece, end="", flush=True)

        Each piece is a str with its token; `stream.result` is the whole answer. What is computed begins with the first
        piece, and ends where the loop is left.
        """
        from topkapi.python.answers import Stream

        return Stream(self, self._prepared("prompt", prompt, priority, parameters), several(prompt))

    @declares(decoding_keywords(), brief=True)
    def astream(self, prompt: Any, *, priority: int = 0, **parameters: Unpack[DecodingFields]) -> AsyncStream:
        """As `stream`, for `async for`."""
        return self._astream("prompt", prompt, priority, parameters, several(prompt))

    @declares(decoding_keywords(), brief=True)
    def chat(
        self, messages: Messages, *, system: str | None = None, priority: int = 0, **parameters: Unpack[DecodingFields]
    ) -> Generated:
        """Answer a conversation: a question, or a list of {"role": "system" | "user" | "assistant", "content": text}.

            print(model.chat("What is the capital of France?", max_tokens=60))

        `system` is a system message before it. Parameters are those of `generate`; what is left out is the checkpoint's
        own default for conversations. Needs a chat checkpoint.
        """
        found: Generated = self._whole(self._prepared("messages", turns(messages, system), priority, parameters), False)
        return found

    @declares(decoding_keywords(), brief=True)
    async def achat(
        self, messages: Messages, *, system: str | None = None, priority: int = 0, **parameters: Unpack[DecodingFields]
    ) -> Generated:
        """As `chat`, for a caller on an event loop, which goes on meanwhile."""
        prepared = partial(self._prepared, "messages", turns(messages, system), priority, parameters)
        found: Generated = await self._awhole(prepared, False)
        return found

    @declares(decoding_keywords(), brief=True)
    def stream_chat(
        self, messages: Messages, *, system: str | None = None, priority: int = 0, **parameters: Unpack[DecodingFields]
    ) -> Stream:
        """As `chat`, piece by piece as it comes; see `stream`."""
        from topkapi.python.answers import Stream

        return Stream(self, self._prepared("messages", turns(messages, system), priority, parameters), False)

    @declares(decoding_keywords(), brief=True)
    def astream_chat(
        self, messages: Messages, *, system: str | None = None, priority: int = 0, **parameters: Unpack[DecodingFields]
    ) -> AsyncStream:
        """As `stream_chat`, for `async for`."""
        return self._astream("messages", turns(messages, system), priority, parameters, False)

    @overload
    def score(self, text: str, **options: Unpack[ScoreFields]) -> Score: ...
    @overload
    def score(self, text: Texts, **options: Unpack[ScoreFields]) -> Scores: ...
    @overload
    def score(self, text: None = None, **options: Unpack[ScoreFields]) -> Any: ...
    @declares(score_keywords())
    def score(self, text: str | Texts | None = None, **options: Unpack[ScoreFields]) -> Any:
        """How probable a text is under the checkpoint: perplexity, bits per byte, and each token.

            score = model.score("The cat sat on the mat.")
            print(score.perplexity, score.bits_per_byte, score.per_token[1].logprob)

        Exactly one of: `text` or `token_ids` (several give several scores), `pairs` of (prompt, completion), or a
        `prompt` with `choices`, of whose scores `ranking` and `choice` say which is the likeliest (by `normalize`: per
        byte, per token, or as they are). Texts longer than the context are read in windows of `window` tokens, `stride`
        apart. `top` adds as many alternatives to each token.
        """
        body, items, work = self._to_score(text, options)
        with readable():
            background.run(done(work))
            return self._scores(body, items, work)

    @declares(score_keywords(), brief=True)
    async def ascore(self, text: str | Texts | None = None, **options: Unpack[ScoreFields]) -> Any:
        """As `score`, for a caller on an event loop, which goes on meanwhile."""
        body, items, work = await asyncio.to_thread(self._to_score, text, options)
        with readable():
            await background.arun(done(work))
            return await asyncio.to_thread(self._scores, body, items, work)

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text."""
        from topkapi.service.prompting import check_size

        with readable():
            loaded = self._loaded()
            check_size(loaded, [text], "text", fits=False)
            return loaded.checkpoint.tokenizer.encode(text)

    def detokenize(self, token_ids: Ids) -> str:
        """The text of token ids: control tokens by their spelling, invalid UTF-8 as U+FFFD."""
        from topkapi.service.prompting import checked_ids

        with readable():
            loaded = self._loaded()
            ids = checked_ids(loaded, plain(token_ids), "token_ids", fits=False)
            return loaded.checkpoint.tokenizer.decode(ids)

    def close(self) -> None:
        """End what is still computed, its answers as cancelled, and free the memory. A second time it does nothing."""
        self._close()
        self._served = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "chat" if self.can_chat else "base"
        state = ", closed" if self.closed else ""
        return f"<topkapi.Model {self.name!r}: {kind}, {self.dtype}, context {self.context_length}{state}>"

    def _loaded(self) -> LoadedModel:
        if self._served is None:
            raise InvalidRequest(f"the model {self.name} is closed", hint="load it again with topkapi.load")
        return self._served

    def _defaults(self, *, chat: bool) -> dict[str, Any]:
        from topkapi.service.generation import defaults_of

        with readable():
            return defaults_of(self._loaded(), chat=chat)

    def _prepared(self, source: str, value: Any, priority: int, parameters: Mapping[str, object]) -> Generation:
        """The checked work of a call: the body of `/generate`, read as the route reads it."""
        from topkapi.service.api.native import schemas
        from topkapi.service.api.native.generate import generation_of

        with readable():
            loaded = self._loaded()
            check_keywords(parameters, source)
            fields = {source: plain(value), "priority": priority, **parameters}
            return generation_of(loaded, body_of(schemas.GenerateRequest, fields))

    def _whole(self, generation: Generation, several: bool) -> Any:
        from topkapi.python.answers import answers, shaped

        with readable():
            background.run(done(generation))
            return shaped(answers(generation), several)

    async def _awhole(self, prepared: Callable[[], Generation], several: bool) -> Any:
        from topkapi.python.answers import answers, shaped

        generation = await asyncio.to_thread(prepared)
        with readable():
            await background.arun(done(generation))
            return shaped(await asyncio.to_thread(answers, generation), several)

    def _astream(
        self, source: str, value: Any, priority: int, parameters: Mapping[str, object], several: bool
    ) -> AsyncStream:
        from topkapi.python.answers import AsyncStream

        prepared = partial(self._prepared, source, value, priority, parameters)
        return AsyncStream(self, partial(asyncio.to_thread, prepared), several)

    def _to_score(self, text: object, options: Mapping[str, object]) -> tuple[ScoreRequest, list[Item], Scoring]:
        """The body of `/score`, read as the route reads it, and the checked work that it asks for."""
        from topkapi.service.api.native import score_schemas
        from topkapi.service.api.native.score import scoring_of

        with readable():
            loaded = self._loaded()
            check_keywords(options, "text")
            fields = {name: plain(value) for name, value in {"text": text, **options}.items() if value is not None}
            if "pairs" in fields:
                fields["pairs"] = pairs_of(fields["pairs"])
            body = body_of(score_schemas.ScoreRequest, fields)
            return (body, *scoring_of(loaded, body))

    def _scores(self, body: ScoreRequest, items: list[Item], work: Scoring) -> Score | Scores:
        from topkapi.service.api.native.score import score_response

        answer = score_response(work.model, body, items, work, "")
        scores = [Score.of(result) for result in answer["results"]]
        given = body.token_ids if body.text is None else body.text
        if given is not None and not several(given):
            return scores[0]
        return Scores.of(scores, answer.get("choice"), answer.get("ranking"))
