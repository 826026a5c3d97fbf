"""docs/decoding.md, made from the parameter table: `python -m topkapi.model.decoding.documentation` writes it."""

from __future__ import annotations

import inspect
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from topkapi.model.decoding.parameters import CHAT_DEFAULTS, DEFAULT_ORDER, PARAMETERS, Parameter
from topkapi.model.decoding.stage import STAGES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "decoding.md"

INTRODUCTION = """\
# Decoding

Every parameter of `POST /generate`, of the command line and of the studio, made from the table in
`model/decoding/table.py` by `python -m topkapi.model.decoding.documentation`. A value left out is the checkpoint's own
(`generation_config.json`), else the default below; every answer says which were in force.

No parameter is ever silently ignored. A name that does not exist, a value out of range, a parameter that could not act
and a combination that contradicts itself are refused with an error that names the field. *Other names* are those of
other systems; `/generate` refuses them and says what they are called here.

## What a request leaves out

A value that is sent counts. One that is not is the checkpoint's own, from its `generation_config.json` or a GGUF file's
`general.sampling` keys; then, in an answer to messages, the tame one below; then the default of the tables.

- **Stored defaults give way.** Where one contradicts what was sent, or another stored one, it is left out, and the
  effective parameters show it: `max_tokens: 5` is served by a checkpoint that would have `min_new_tokens: 10`.
- **A stored default that no request could be answered with** (`temperature: "hot"`, `top_p: 2`, a token id that the
  vocabulary does not have) is refused when the checkpoint is loaded, by its name. `top_k: -1` keeps all, as in vLLM,
  and `do_sample: false` is greedy decoding, as in transformers.
- **Conversations** of a checkpoint that says nothing of how tokens are drawn (no temperature, no truncation, no
  `do_sample: false`) are sampled with {chat}: small models, sampled from all of their
  distribution, answer what nobody would. That holds for messages in every dialect, `topkapi chat`,
  `generate --chat` and the studio, and also where a dialect's own documentation names another default, as OpenAI's and
  Anthropic's do (temperature 1): vLLM, too, puts a checkpoint's defaults over those. What continues a prompt
  (`prompt`, `/v1/completions`), `/score` and `topkapi evaluate` stay as they are, and llama.cpp's `/completion` and
  TGI's `/generate` have [their systems' defaults](api.md). `/models` shows both as `defaults` and `chat_defaults`.
"""

ORDER = """\
## Stages and their order

The network's logits pass the stages in this order, each only if one of its parameters is in force. `order` names
another one. The constraints always come first, for after a truncation they could leave nothing to choose; a stage that
is in force but missing from `order`, an unknown name and a name given twice are refused. Answers repeat the order.

| | stage | what it keeps or does |
|---|---|---|
"""

RULES = """\
## What goes with what

- **Temperature 0** takes the most likely token that is left, the first of equal ones, and needs no seed. Truncations
  that never remove the most likely token (all but `typical_p`) are accepted and cannot change the outcome, unless an
  `order` puts what changes single scores after them. What is made of chance (`mirostat`, `dynamic_temperature_range`,
  `xtc_probability`) is refused.
- **Mirostat** decides itself where to cut: any other truncation in the same request is refused, and one that is only
  the checkpoint's default is switched off. Its bound starts at twice `mirostat_tau` bits.
- **Ties.** Tokens with equal logits are treated alike: where a cut falls among them, all of them stay.
- **Probabilities** that a stage looks at are those of what the stages before it left.
- **Penalties.** `repetition_penalty`, `no_repeat_ngram_size`, `bad_words` and DRY look at prompt and answer,
  `presence_penalty` and `frequency_penalty` at the answer alone.
- **`bad_words` and `dry_breakers`** are texts or lists of token ids. A bad word is banned as it is spelt at the start
  of a text and after a space. A breaker breaks a passage in every token that holds it.
- **Searches** (`num_beams`, `penalty_alpha`) leave nothing to chance: they are at temperature 0, and what belongs to
  sampling is refused beside them, as are `prompt_lookup`, `best_of` and guidance. They run among the other requests.
- **Beam search** takes as many places as it has beams. It answers with the `n` best complete beams, best first, each
  with its `score`; a stream gets the tokens that all possible answers share as soon as they do.
- **Contrastive search** (`penalty_alpha` with `top_k` of 2 or more) reads `top_k` tokens for each one it writes; its
  `n` answers are the same.
- **Guidance** reads the negative prompt beside the prompt, in a place of its own, and scores tokens by
  log p(negative) + scale * (log p(prompt) - log p(negative)) before any other stage.
- **DoLa** scores tokens by the last layer against the earlier one that differs most, among tokens at least a tenth as
  likely as the likeliest, before any other stage. All families can; it was made for networks of many layers.
- **`best_of`** ranks by the network's own log-probability per token. Nothing can be streamed before all are complete.
- **Stops.** `stop` and `stop_regex` look at the text, `stop_token_ids` and the end tokens at the ids; the answer's
  `finish_reason` and `stop_reason` say which it was. `min_tokens` holds back the end and stop tokens, not stop texts.

## Determinism

The token is `argmax(logit + noise)` in float64 over what the stages left. The noise is standard Gumbel noise made from
a hash of the seed, the sequence's index within the request, the position in the answer and the token id. So it draws
from exactly the distribution that the stages leave, and a sample depends on nothing else: not on what else the server
does, on the order of arrival, on a restart or on tokens guessed ahead. A request without a seed gets one, and its
answer reports it. The stages compute each row's numbers by operations whose result does not depend on the rows beside
it; that is tested bit for bit, for every stage, alone and among others.

`logprobs` reports the network's own log-probability (`raw_logprob`) and that in the distribution the token was drawn
from (`logprob`, 0 for temperature 0). `trace` reports for each token what every stage left and cut, the entropy, the
rank, the runners-up and the noise that decided.
"""


def page() -> str:
    """The whole page."""
    tame = ", ".join(f"`{name}` {value:g}" for name, value in CHAT_DEFAULTS.items())
    lines = [INTRODUCTION.replace("{chat}", tame)]
    for title, rows in groupby(PARAMETERS, attrgetter("group")):
        lines += [f"## {title}\n", "| parameter | value | default | meaning | follows | other names |"]
        lines += ["|---|---|---|---|---|---|", *map(_row, rows), ""]
    stages = [
        f"| {number} | `{name}` | {inspect.getdoc(STAGES[name].apply)} |"
        for number, name in enumerate(DEFAULT_ORDER, start=1)
    ]
    return "\n".join([*lines, ORDER + "\n".join(stages), "", RULES])


def _row(parameter: Parameter) -> str:
    meaning = parameter.meaning + (f" Needs `{parameter.needs}`." if parameter.needs else "")
    aliases = ", ".join(f"`{alias}`" for alias in parameter.aliases)
    cells = (f"`{parameter.name}`", _value(parameter), _shown(parameter.default), meaning, parameter.source, aliases)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(parameter: Parameter) -> str:
    kind = {
        "integer": "whole number", "number": "number", "boolean": "true or false", "strings": "text or texts",
        "integers": "token ids", "integer_to_number": "token id to number", "words": "texts or lists of token ids",
        "text": "text", "schema": "JSON schema or true", "prompt": "text or token ids",
        "layers": "`low`, `high` or layer numbers",
    }[parameter.kind]  # fmt: skip
    low = parameter.minimum if parameter.above is None else parameter.above
    if low is not None:
        start = "above" if parameter.above is not None else "from"
        kind += f", {start} {low:g}" + ("" if parameter.maximum is None else f" to {_number(parameter.maximum)}")
    if parameter.most is not None:
        kind += f", at most {parameter.most:,}"
    if parameter.longest is not None:
        kind += f"{' of' if parameter.most is not None else ', at most'} {parameter.longest:,} characters"
        kind += " each" if parameter.most is not None else ""
    if isinstance(parameter.off, int | float) and not isinstance(parameter.off, bool):
        kind += f"; {parameter.off:g} is off"
    return kind


def _number(value: float) -> str:
    return "2^53 - 1" if value == 2**53 - 1 else f"{value:g}"


def _shown(value: object) -> str:
    if value in (None, [], {}):
        return ""
    if isinstance(value, list):
        return " ".join(f"`{item!r}`" for item in value)
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
