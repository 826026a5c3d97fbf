"""The decoding parameters as keywords, written by `python -m topkapi.python.declaring`: do not edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class DecodingFields(TypedDict, total=False):
    """What `generate` and its like take. Left out, or None: the checkpoint's default, then this one.

    max_tokens: Most tokens to generate; by default what the context has room for.
    timeout_s: Seconds after which the answer ends as it stands, with finish reason `deadline`.
    order: The stages in the order to apply them; constraints always come first. Every stage in force must be
        named.
    prompt_lookup: Guess up to so many tokens at a time from what followed the last ones before; the answer is
        the same, sooner. [0]
    draft_tokens: Let the server's draft checkpoint guess up to so many tokens at a time; the answer is the
        same, sooner. By default 4 where there is one; 0 does without.
    seed: The same request with the same seed gives the same tokens; by default one is drawn and reported.
    n: Number of continuations of each prompt. [1]
    best_of: Generate so many continuations and answer with the `n` that are likeliest per token; by default
        `n`.
    stop: Texts that end the answer; they are not part of it unless `include_stop` is set.
    stop_regex: Regular expressions that end the answer at the first character where one of them matches.
    include_stop: Leave the text that matched `stop` or `stop_regex` at the end of the answer. [False]
    stop_token_ids: Token ids that end the answer, beside the checkpoint's own end tokens.
    ignore_end_token: Go on past the checkpoint's end tokens. [False]
    logprobs: Report each token's log-probabilities and those of this many most likely tokens.
    trace: Report how each token was decided: stages, candidates, entropy, rank, probabilities, runners-up,
        noise. [False]
    num_beams: Keep this many of the likeliest continuations at each token and answer with the best; 1 is off.
        [1]
    num_beam_groups: Split the beams into so many groups that avoid each other's tokens. [1]
    diversity_penalty: Subtracted from a token's score for each beam of an earlier group that has just taken
        it. [0.0]
    length_penalty: Complete beams are ranked by log-probability / length ^ this: above 0 favours long
        answers. [1.0]
    early_stopping: Stop at as many complete answers as there are beams, instead of when no open beam looks
        better than they do. [False]
    penalty_alpha: Contrastive search: of the `top_k` likeliest tokens the one whose probability, less its
        likeness to the text so far, is best; this is the weight of the likeness. 0 is off. [0.0]
    dola_layers: Score tokens by how much more likely the last layer holds them than an earlier one: `low` or
        `high` half of the layers, or their numbers (0 is the embedding); at each token the layer that differs
        most is taken.
    guidance_scale: Moves the answer away from what would follow `negative_prompt`: scores are moved this many
        times the distance between the two; 1 does nothing, below 1 moves towards it. [1.0]
    negative_prompt: What the answer should not be like: a text or token ids, continued beside the prompt; by
        default the prompt's last token alone.
    json_schema: The answer is JSON that fulfils this schema: an object, or true or {} for any JSON.
    json_object: The answer is a JSON object. [False]
    regex: The whole answer matches this regular expression (Rust's syntax: no look-around, no back-
        references).
    choice: The answer is one of these texts.
    grammar: The answer follows this context-free grammar, in Lark's notation with a rule named start.
    min_tokens: End tokens and stop tokens can't be chosen before this many tokens. [0]
    banned_token_ids: These token ids are never chosen.
    bad_words: Texts, or lists of token ids, that are never completed: their last token is not chosen after
        the others.
    no_repeat_ngram_size: No sequence of this many tokens appears twice in prompt and answer; 0 does nothing.
        [0]
    allowed_token_ids: Only these token ids can be chosen.
    thinking_budget: After so many tokens of thinking (`<think>`) before the answer the block is closed, and
        the answer follows. Needs a checkpoint that thinks.
    logit_bias: Added to the logits of these token ids, between -100 and 100 each.
    repetition_penalty: Divides positive and multiplies negative logits of tokens already in prompt or answer;
        1 does nothing. [1.0]
    repetition_range: Only the last so many tokens count for the repetition penalty; 0 counts all. [0]
    presence_penalty: Subtracted once from the logit of every token already generated. [0.0]
    frequency_penalty: Subtracted from a token's logit for each time it was generated. [0.0]
    dry_multiplier: Subtracts multiplier * base ^ (length - allowed length) from the logit of a token that
        would go on with a passage of that length seen before; 0 does nothing. [0.0]
    dry_base: Growth of the DRY penalty with each further repeated token. [1.75]
    dry_allowed_length: Longest passage that may be repeated without a DRY penalty on the token after it. [2]
    dry_range: Only the last so many tokens are searched for repeated passages; 0 searches all. [0]
    dry_breakers: Texts, or lists of token ids, across which no passage is matched. [['\\n', ':', '"', '*']]
    temperature: Divides the logits: below 1 sharper, above 1 flatter; 0 always takes the most likely token
        that is left. [1.0]
    dynamic_temperature_range: Lets the temperature move this far down where the network is certain and up
        where it is not; 0 fixes it. [0.0]
    dynamic_temperature_exponent: Power applied to the normalised entropy (0 to 1) that places the temperature
        within its range. [1.0]
    top_k: Keep only the k most likely tokens (ties with the last are kept); 0 keeps all. [0]
    top_p: Keep the smallest set of most likely tokens whose probability reaches p (ties with the last are
        kept); 1 keeps all. [1.0]
    min_p: Keep tokens at least this fraction as likely as the most likely one; 0 keeps all. [0.0]
    typical_p: Keep the tokens whose information is nearest to the entropy until their probability reaches p
        (ties are kept); 1 keeps all. It can remove the most likely token. [1.0]
    epsilon_cutoff: Keep tokens at least this probable; 0 keeps all. [0.0]
    eta_cutoff: Keep tokens at least as probable as the smaller of eta and sqrt(eta) * exp(-entropy); 0 keeps
        all. [0.0]
    top_n_sigma: Keep tokens whose logit is within n standard deviations of the largest; 0 keeps all. [0.0]
    top_a: Keep tokens at least a times as probable as the square of the largest probability; 0 keeps all.
        [0.0]
    xtc_probability: Chance, at each token, that all but the least likely of the tokens above `xtc_threshold`
        are removed. [0.0]
    xtc_threshold: Probability from which a token counts as a top choice for XTC. [0.1]
    mirostat: 2 holds the surprise of the text near `mirostat_tau` by feedback, in place of other truncations;
        0 is off. [0]
    mirostat_tau: Surprise that mirostat aims for, in bits per token. [5.0]
    mirostat_eta: How fast mirostat corrects its bound after each token. [0.1]
    """

    max_tokens: int | None
    timeout_s: float | None
    order: str | Sequence[str] | None
    prompt_lookup: int | None
    draft_tokens: int | None
    seed: int | None
    n: int | None
    best_of: int | None
    stop: str | Sequence[str] | None
    stop_regex: str | Sequence[str] | None
    include_stop: bool | None
    stop_token_ids: Sequence[int] | None
    ignore_end_token: bool | None
    logprobs: int | None
    trace: bool | None
    num_beams: int | None
    num_beam_groups: int | None
    diversity_penalty: float | None
    length_penalty: float | None
    early_stopping: bool | None
    penalty_alpha: float | None
    dola_layers: Literal["low", "high"] | Sequence[int] | None
    guidance_scale: float | None
    negative_prompt: str | Sequence[int] | None
    json_schema: Mapping[str, Any] | bool | None
    json_object: bool | None
    regex: str | None
    choice: str | Sequence[str] | None
    grammar: str | None
    min_tokens: int | None
    banned_token_ids: Sequence[int] | None
    bad_words: str | Sequence[str | Sequence[int]] | None
    no_repeat_ngram_size: int | None
    allowed_token_ids: Sequence[int] | None
    thinking_budget: int | None
    logit_bias: Mapping[int, float] | None
    repetition_penalty: float | None
    repetition_range: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_range: int | None
    dry_breakers: str | Sequence[str | Sequence[int]] | None
    temperature: float | None
    dynamic_temperature_range: float | None
    dynamic_temperature_exponent: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    top_n_sigma: float | None
    top_a: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
