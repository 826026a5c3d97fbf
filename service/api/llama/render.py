"""llama.cpp's answers: completions, their chunks, probabilities and timings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from topkapi.engine.request import Token
from topkapi.service.api.http.timings import Stopwatch
from topkapi.service.api.llama.parameters import generation_settings
from topkapi.service.generation import Delta, Generation, Output, no_answer
from topkapi.service.models import LoadedModel
from topkapi.service.scoring import finite


class Renderer:
    """The answers of one generation. `settings` are llama.cpp's parameters in force, `slot` what `id_slot` asked."""

    def __init__(self, generation: Generation, settings: Mapping[str, Any], slot: int, fields: Sequence[str]) -> None:
        self._generation = generation
        self._model = generation.plan.model
        self._settings = settings
        self._slot = slot
        self._fields = fields
        self._stopwatch = Stopwatch(generation)

    def completion(self, output: Output, streamed: str | None = None) -> dict[str, Any]:
        """The whole answer of one output; at the end of a stream, with `streamed` as the text not sent yet."""
        model, generation = self._model, self._generation
        stop_type = _stop_type(output)
        prompt = generation.plan.prompts[output.prompt_index]
        effective = generation.plan.parameters[output.prompt_index]
        total = len(prompt) + len(output.tokens)
        keep = self._settings["return_tokens"] and streamed is None
        content = {
            "index": output.index,
            "content": output.text if streamed is None else streamed,
            "tokens": [token.token_id for token in output.tokens] if keep else [],
            "id_slot": self._slot,
            "stop": True,
            "model": model.name,
            "tokens_predicted": len(output.tokens),
            "tokens_evaluated": len(prompt),
            "generation_settings": generation_settings(model, self._settings, effective),
            "prompt": model.checkpoint.tokenizer.decode(prompt),
            "has_new_line": "\n" in output.text,
            "truncated": output.finish_reason == "length" and total >= model.context_length,
            "stop_type": stop_type,
            "stopping_word": output.stop_reason if stop_type == "word" else "",
            "tokens_cached": total,
            "timings": self._stopwatch.of(output),
        }
        if self._settings["n_probs"] and streamed is None:
            content["completion_probabilities"] = [self._probabilities(token) for token in output.tokens]
        return _selected(content, self._fields)

    def chunk(self, delta: Delta, token: Token) -> dict[str, Any]:
        """What a stream says of one token."""
        output = delta.output
        self._stopwatch.token(output)
        content: dict[str, Any] = {
            "index": output.index,
            "content": delta.text,
            "tokens": [token.token_id],
            "stop": False,
            "id_slot": self._slot,
            "tokens_predicted": len(output.tokens),
            "tokens_evaluated": len(self._generation.plan.prompts[output.prompt_index]),
        }
        if self._settings["n_probs"]:
            content["completion_probabilities"] = [self._probabilities(token)]
        if self._settings["timings_per_token"]:
            content["timings"] = self._stopwatch.of(output)
        return content

    def _probabilities(self, token: Token) -> dict[str, Any]:
        if self._settings["post_sampling_probs"]:
            return self._after_sampling(token)
        assert token.raw_logprob is not None
        return self._token(token.token_id) | {
            "logprob": finite(token.raw_logprob),
            "top_logprobs": [self._token(each.token_id) | {"logprob": finite(each.logprob)} for each in token.top],
        }

    def _after_sampling(self, token: Token) -> dict[str, Any]:
        assert token.trace is not None
        chosen = (token.token_id, token.trace.probability)
        others = [(each.token_id, each.probability) for each in token.trace.runners_up if token.trace.how != "greedy"]
        likeliest = sorted([chosen, *others], key=lambda pair: -pair[1])[: self._settings["n_probs"]]
        return self._token(token.token_id) | {
            "prob": token.trace.probability,
            "top_probs": [self._token(token_id) | {"prob": probability} for token_id, probability in likeliest],
        }

    def _token(self, token_id: int) -> dict[str, Any]:
        raw = self._model.checkpoint.tokenizer.token_bytes(token_id)
        return {"id": token_id, "token": raw.decode("utf-8", "replace"), "bytes": list(raw)}


def token_piece(model: LoadedModel, token_id: int) -> dict[str, Any]:
    """A token as `/tokenize` shows it: text, or bytes where they are no whole characters."""
    raw = model.checkpoint.tokenizer.token_bytes(token_id)
    try:
        return {"id": token_id, "piece": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"id": token_id, "piece": list(raw)}


def _stop_type(output: Output) -> str:
    if output.finish_reason in ("length", "deadline"):
        return "limit"
    if output.finish_reason == "stop":
        return "word" if isinstance(output.stop_reason, str) else "eos"
    raise no_answer(output)


def _selected(content: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Only the named fields; `a/b` is field b of a, under that whole name. A name that is none is left out."""
    if not fields:
        return content
    chosen: dict[str, Any] = {}
    for name in fields:
        value: Any = content
        for part in name.split("/"):
            value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
        if value is not _MISSING:
            chosen[name] = value
    return chosen


_MISSING = object()
