"""From what `/score` is asked to the engine's work, and from that to what it answers: how probable texts, or
completions of prompts, are under a checkpoint.

Nothing here knows how a request came in (as in `generate`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from topkapi.model.decoding.parameters import BY_NAME, check
from topkapi.model.errors import InvalidRequest
from topkapi.model.scoring import Scores
from topkapi.service import scoring
from topkapi.service.api.native import schemas, score_schemas
from topkapi.service.api.native.generate import candidate, piece, usage
from topkapi.service.limits import MOST_REPORTED, MOST_TOKENS
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import check_count, checked_ids, require_one, text_tokens, tokens_of
from topkapi.service.scoring import Item, TextScore, finite, most_surprising, stretches


def scoring_of(model: LoadedModel, body: score_schemas.ScoreRequest) -> tuple[list[scoring.Item], scoring.Scoring]:
    """What `body` asks to be scored, checked, and the work of scoring it, not yet begun. Not for an event loop.

    Raises `InvalidRequest` naming the field at fault.
    """
    timeout_s = None if body.timeout_s is None else check(BY_NAME["timeout_s"], body.timeout_s)
    items = _items(model, body)
    return items, scoring.Scoring(model, items, body.window, body.stride, body.top, body.priority, timeout_s)


def score_response(
    model: LoadedModel,
    body: score_schemas.ScoreRequest,
    items: list[scoring.Item],
    work: scoring.Scoring,
    identifier: str,
) -> dict[str, Any]:
    """The whole answer of `/score`, once the work is done. Tokens are made one by one as they are asked for."""
    scores = work.scores
    summaries = [scoring.summarise(model, *pair) for pair in zip(items, scores, strict=True)]
    results = [
        score_result(model, item, own, summary, body.per_token, body.top, body.segments, body.surprising)
        for item, own, summary in zip(items, scores, summaries, strict=True)
    ]
    content: dict[str, Any] = {"id": identifier, "model": model.name, "results": results}
    if body.choices is not None:
        ranking = scoring.ranking(summaries, body.normalize or "byte")
        content |= {"choice": ranking[0], "ranking": ranking}
    read = usage(sum(len(item.token_ids) for item in items), work.cached_tokens)
    return content | {"usage": read, "deterministic": work.deterministic}


def _items(model: LoadedModel, body: score_schemas.ScoreRequest) -> list[scoring.Item]:
    given = schemas.given(body, "text", "token_ids", "pairs", "choices")
    kind = require_one(given, "text, token_ids, pairs, and prompt with choices")
    if (body.prompt is None) == (kind == "choices"):
        message = "choices need a prompt" if kind == "choices" else f"prompt goes with choices, not with {kind}"
        raise InvalidRequest(message, field="prompt", hint="send prompt and choices together, or pairs")
    if body.normalize is not None and kind != "choices":
        raise InvalidRequest(f"normalize ranks choices, and there are none with {kind}", field="normalize")
    if kind == "pairs":
        pairs = [(pair.prompt, f"pairs[{n}].prompt", pair.completion, f"pairs[{n}].completion")
                 for n, pair in enumerate(body.pairs or [])]  # fmt: skip
    elif kind == "choices":
        pairs = [(body.prompt, "prompt", choice, f"choices[{n}]") for n, choice in enumerate(body.choices or [])]
    else:
        items = [scoring.Item(token_ids) for token_ids in _texts(model, body, kind)]
        scoring.check_items(model, items, body.window, body.stride)
        _check_report([len(item.token_ids) for item in items], body)
        return items
    if not pairs:
        raise InvalidRequest(f"{kind} is empty", field=kind, hint="send at least one")
    check_count(pairs, kind)
    items = []
    prompt_tokens: dict[str, list[int]] = {}
    total = 0
    for prompt, prompt_field, completion, completion_field in pairs:
        if prompt_field not in prompt_tokens:
            # The one prompt of many choices is encoded once.
            prompt_tokens = {prompt_field: tokens_of(model, prompt, prompt_field, fits=False)}
        begun = prompt_tokens[prompt_field]
        rest = tokens_of(model, completion, completion_field, fits=False)
        total = _counted(kind, total, len(begun) + len(rest))
        items.append(scoring.item_of_pair(begun, rest))
    scoring.check_items(model, items, body.window, body.stride)
    _check_report([len(item.token_ids) - item.first for item in items], body)
    return items


def _counted(kind: str, before: int, tokens: int) -> int:
    """The tokens of a request so far. Raises `InvalidRequest` where they are more than one may have."""
    if before + tokens > MOST_TOKENS:
        message = f"{kind}: the texts have more than {MOST_TOKENS:,} tokens together"
        raise InvalidRequest(message, field=kind, hint="send several requests")
    return before + tokens


def _check_report(sizes: list[int], body: score_schemas.ScoreRequest) -> None:
    """Raise `InvalidRequest` where the answer would report more than one may, of texts of so many tokens."""
    tokens, each = sum(sizes), f"with {body.top:,} alternatives each "
    if body.per_token and tokens * (1 + body.top) > MOST_REPORTED:
        message = f"per_token: {tokens:,} tokens {each}are more than {MOST_REPORTED:,}"
        hint = "set per_token to false, lower top, or send the text in parts"
        raise InvalidRequest(message, field="per_token", hint=hint)
    for field, wanted, weight in (("segments", body.segments, 1), ("surprising", body.surprising, 1 + body.top)):
        if (told := sum(min(wanted, size) for size in sizes)) * weight > MOST_REPORTED:
            message = f"{field}: {told:,} of all texts {each if weight > 1 else ''}are more than {MOST_REPORTED:,}"
            raise InvalidRequest(message, field=field, hint=f"lower {field}, or send fewer texts at once")


def _texts(model: LoadedModel, body: score_schemas.ScoreRequest, kind: str) -> list[list[int]]:
    source = getattr(body, kind)
    read = text_tokens if kind == "text" else checked_ids
    if not isinstance(source, list) or (kind == "token_ids" and not (source and isinstance(source[0], list))):
        return [read(model, source, kind, fits=False)]
    if not source:
        raise InvalidRequest("text is empty", field=kind, hint="send at least one text")
    check_count(source, kind)
    found: list[list[int]] = []
    total = 0
    for position, each in enumerate(source):
        found.append(read(model, each, f"{kind}[{position}]", fits=False))
        total = _counted(kind, total, len(found[-1]))
    return found


def score_result(
    model: LoadedModel,
    item: Item,
    scores: Scores,
    score: TextScore,
    per_token: bool,
    top: int,
    segments: int = 0,
    surprising: int = 0,
) -> dict[str, Any]:
    """The scores of one text or completion, with its tokens, stretches and surprises if asked for."""
    result: dict[str, Any] = {
        "tokens": score.tokens,
        "scored_tokens": score.scored_tokens,
        "bytes": score.bytes,
        "nll": score.nll,
        "nll_per_token": score.nll_per_token,
        "nll_per_byte": score.nll_per_byte,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    if item.is_completion:
        result["greedy_match"] = score.greedy_match
    begin = item.first if item.is_completion else 0
    if per_token:
        positions = range(begin, score.tokens)
        # One by one as they are written: those of a book would fill the memory.
        result["per_token"] = (_scored(model, item, scores, position, top) for position in positions)
    if segments:
        result["segments"] = [asdict(each) for each in stretches(model, item, scores, segments)]
    if surprising:
        result["surprising"] = [
            _scored(model, item, scores, begin + position, top) | {"position": position, "start_byte": start}
            for position, start in most_surprising(model, item, scores, surprising)
        ]
    return result


def _scored(model: LoadedModel, item: Item, scores: Scores, position: int, top: int) -> dict[str, Any]:
    known, at = position >= item.first, position - item.first
    result = piece(model, item.token_ids[position]) | {
        "logprob": finite(scores.logprobs[at]) if known else None,
        "rank": scores.ranks[at] if known else None,
        "entropy": scores.entropies[at] if known else None,
    }
    if top:
        tops = scores.tops[at] if known else []
        result["top"] = [candidate(model, token_id, logprob) for token_id, logprob in tops]
    return result
