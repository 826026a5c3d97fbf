"""Log-probabilities as OpenAI's two routes and vLLM's `prompt_logprobs` tell them: the network's own, in nats.

A token is named by its text; one whose bytes are no text is named `bytes:\\xf0\\x9f`, as OpenAI does. What stands for
minus infinity is `service.scoring.IMPOSSIBLE`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from topkapi.engine.request import Token
from topkapi.model.scoring import Scores
from topkapi.service.models import LoadedModel
from topkapi.service.scoring import finite


class CompletionLogprobs(BaseModel):
    """Of each token of a text: its name, log-probability, most likely alternatives, and where it begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TopLogprob(BaseModel):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of an answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of each token of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None


@dataclass(frozen=True)
class Scored:
    """A token of a prompt or an answer with the log-probability and the most likely tokens at its place.

    Both are None for a prompt's first token, which nothing precedes.
    """

    token_id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] | None


def of_prompt(token_ids: Sequence[int], scores: Scores) -> list[Scored]:
    """Every token of a scored prompt."""
    tops = scores.tops or [[] for _ in scores.logprobs]
    rest = zip(token_ids[1:], scores.logprobs, tops, strict=True)
    return [Scored(token_ids[0], None, None), *(Scored(*each) for each in rest)]


def of_answer(tokens: Sequence[Token]) -> list[Scored]:
    """Every token of an answer."""
    return [
        Scored(token.token_id, token.raw_logprob, [(each.token_id, each.logprob) for each in token.top])
        for token in tokens
    ]


def token_name(model: LoadedModel, token_id: int) -> str:
    """A token by its text, or by its bytes where they are no text."""
    raw = model.checkpoint.tokenizer.token_bytes(token_id)
    text = _text(raw)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if text is None else text


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


@dataclass
class CompletionLogprobsWriter:
    """Writes the log-probabilities of one text piece by piece, keeping count of its characters.

    `top` is the number of alternatives asked for; with 0 there are none.
    """

    model: LoadedModel
    top: int
    _offset: int = 0
    _echoing: bool = False
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def write(self, tokens: Sequence[Scored], *, spelled: bool = False) -> dict[str, Any]:
        """The next tokens of the text; control tokens are part of it only if `spelled` (in an echoed prompt)."""
        offsets = []
        if not spelled:
            # A character that the prompt leaves unfinished is shown as one that is broken.
            self._offset += len(self._decoder.decode(b"", final=self._echoing))
        self._echoing = spelled
        for token in tokens:
            tokenizer = self.model.checkpoint.tokenizer
            raw = tokenizer.token_bytes(token.token_id) if spelled else self.model.answer_bytes(token.token_id)
            begin, self._offset = self._offset, self._offset + len(self._decoder.decode(raw))
            own = _text(raw)
            # What is text by itself also ends a character that was left unfinished before it.
            offsets.append(begin if own is None else self._offset - len(own))
        return {
            "tokens": [token_name(self.model, token.token_id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
            "top_logprobs": [self._tops(token) for token in tokens] if self.top else None,
            "text_offset": offsets,
        }

    def _tops(self, token: Scored) -> dict[str, float] | None:
        """The most likely tokens and the actual one. Of two by one name the more likely stays."""
        if token.logprob is None or token.top is None:
            return None
        tops: dict[str, float] = {}
        for token_id, logprob in (*token.top[: self.top], (token.token_id, token.logprob)):
            tops.setdefault(token_name(self.model, token_id), finite(logprob))
        return tops


def chat_logprobs(model: LoadedModel, tokens: Sequence[Token]) -> dict[str, Any]:
    """Of the tokens of a chat answer, control tokens left out: they are no part of it."""
    content = []
    for token in tokens:
        if token.token_id not in model.control_ids:
            assert token.raw_logprob is not None, "log-probabilities were asked for"
            top = [_named(model, each.token_id, each.logprob) for each in token.top]
            content.append(_named(model, token.token_id, token.raw_logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def prompt_logprobs(model: LoadedModel, token_ids: Sequence[int], scores: Scores) -> list[dict[str, Any] | None]:
    """As in vLLM: for each token of the prompt those at its place by id, the most likely and the actual one."""
    places: list[dict[str, Any] | None] = []
    for token, rank in zip(of_prompt(token_ids, scores), [None, *scores.ranks], strict=True):
        if token.logprob is None or token.top is None or rank is None:
            places.append(None)
            continue
        ranked = [*((*each, position) for position, each in enumerate(token.top, start=1)),
                  (token.token_id, token.logprob, rank)]  # fmt: skip
        places.append(
            {
                str(token_id): {
                    "logprob": finite(logprob),
                    "rank": place,
                    "decoded_token": model.token_text(token_id),
                }
                for token_id, logprob, place in ranked
            }
        )
    return places


def _named(model: LoadedModel, token_id: int, logprob: float) -> dict[str, Any]:
    raw = model.checkpoint.tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}
