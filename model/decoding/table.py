"""The one table of decoding parameters; schemas, flags, sliders, documentation and messages are made from it.

A parameter is said here and nowhere else: its name, type, range, the value that switches it off, its default, what
it means and whom it follows. Stages come in the order in which the rows first name them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from topkapi.model.decoding.parameter import KINDS, Layers, Parameter, Prompt, Schema, Words, parameter

# Several times what anybody has been seen to send. Each answer is held against these at every token, so they also
# bound what one request can cost the others.
MOST_STOPS, LONGEST_STOP, MOST_STOP_IDS = 128, 1024, 1024
MOST_PATTERNS = 16
MOST_WORDS, LONGEST_WORD = 4096, 256
MOST_BREAKERS, LONGEST_BREAKER = 128, 64
MOST_IDS = 65_536
MOST_BIASES = 16_384
# llguidance follows no more than 2,000 alternatives at once.
MOST_CHOICES = 1_900
LONGEST_STRUCTURE = 65_536

SCORES, CHOICE = "Scores against other scores", "What may be chosen"
SHAPE = "The shape of the distribution: temperature and truncation"
for_answer = partial(parameter, group="The answer as a whole")
for_search = partial(parameter, group="Searching instead of drawing")
for_scores = partial(parameter, group=SCORES)
for_choice = partial(parameter, group=CHOICE)
for_tokens = partial(parameter, group="Single tokens: bias and penalties")
for_shape = partial(parameter, group=SHAPE)


# A row is a call that makes a dataclass field, which the linter can't know.
# ruff: noqa: RUF009
# fmt: off
@dataclass(slots=True, kw_only=True)
class DecodingParameters:
    """The effective value of every decoding parameter, as `resolve` settles it.

    Rows, jobs and answers share one object and never change it: `dataclasses.replace` makes another.
    """

    max_tokens: int | None = for_answer(
        None, "Most tokens to generate; by default what the context has room for.",
        "OpenAI API", minimum=0, aliases=("max_new_tokens", "n_predict", "max_completion_tokens"),
        stored="max_new_tokens", label="Maximum tokens",
    )
    timeout_s: float | None = for_answer(
        None, "Seconds after which the answer ends as it stands, with finish reason `deadline`.",
        "Topkapi", above=0, aliases=("timeout", "max_time"),
    )
    order: list[str] = for_answer(
        None,
        "The stages in the order to apply them; constraints always come first. Every stage in force must be named.",
        "llama.cpp (samplers)", aliases=("samplers", "sampler_order", "sampler_priority"),
        most=MOST_STOPS, longest=LONGEST_WORD,
    )
    prompt_lookup: int = for_answer(
        0,
        "Guess up to so many tokens at a time from what followed the last ones before; the answer is the same, sooner.",
        "Saxena 2023; Leviathan et al. 2022", minimum=0, maximum=32, slider=(0, 32, 1),
    )
    draft_tokens: int | None = for_answer(
        None,
        "Let the server's draft checkpoint guess up to so many tokens at a time; the answer is the same, sooner. By "
        "default 4 where there is one; 0 does without.",
        "Leviathan et al. 2022", minimum=0, maximum=32, aliases=("num_assistant_tokens", "speculative.n_max"), off=0,
    )
    seed: int = for_answer(
        None, "The same request with the same seed gives the same tokens; by default one is drawn and reported.",
        "Topkapi", minimum=0, maximum=2**53 - 1,
    )
    n: int = for_answer(1, "Number of continuations of each prompt.", "OpenAI API", minimum=1, maximum=128)
    best_of: int | None = for_answer(
        None, "Generate so many continuations and answer with the `n` that are likeliest per token; by default `n`.",
        "OpenAI API", minimum=1, maximum=128,
    )
    stop: list[str] = for_answer(
        [], "Texts that end the answer; they are not part of it unless `include_stop` is set.",
        "OpenAI API", aliases=("stop_sequences",), most=MOST_STOPS, longest=LONGEST_STOP, label="Stop texts",
    )
    stop_regex: list[str] = for_answer(
        [], "Regular expressions that end the answer at the first character where one of them matches.",
        "SGLang (stop_regex)", most=MOST_PATTERNS, longest=LONGEST_STOP, label="Stop expressions",
    )
    include_stop: bool = for_answer(
        False, "Leave the text that matched `stop` or `stop_regex` at the end of the answer.",
        "vLLM", aliases=("include_stop_str_in_output",),
    )
    stop_token_ids: list[int] = for_answer(
        [], "Token ids that end the answer, beside the checkpoint's own end tokens.",
        "vLLM", most=MOST_STOP_IDS,
    )
    ignore_end_token: bool = for_answer(
        False, "Go on past the checkpoint's end tokens.",
        "vLLM", aliases=("ignore_eos",),
    )
    logprobs: int | None = for_answer(
        None, "Report each token's log-probabilities and those of this many most likely tokens.",
        "OpenAI API", minimum=0, maximum=1000,
    )
    trace: bool = for_answer(
        False,
        "Report how each token was decided: stages, candidates, entropy, rank, probabilities, runners-up, noise.",
        "Topkapi",
    )

    num_beams: int = for_search(
        1, "Keep this many of the likeliest continuations at each token and answer with the best; 1 is off.",
        "beam search as in transformers", minimum=1, maximum=64, slider=(1, 16, 1), aliases=("beam_width",),
        label="Beams",
    )
    num_beam_groups: int = for_search(
        1, "Split the beams into so many groups that avoid each other's tokens.",
        "Vijayakumar et al. 2016, algorithm 1", minimum=1, maximum=64, needs="num_beams",
    )
    diversity_penalty: float = for_search(
        0.0, "Subtracted from a token's score for each beam of an earlier group that has just taken it.",
        "Vijayakumar et al. 2016 (Hamming diversity)", minimum=0, needs="num_beam_groups",
    )
    length_penalty: float = for_search(
        1.0, "Complete beams are ranked by log-probability / length ^ this: above 0 favours long answers.",
        "transformers, after Wu et al. 2016", minimum=-10, maximum=10, slider=(-2.0, 2.0, 0.1),
        needs="num_beams", off=None,
    )
    early_stopping: bool = for_search(
        False,
        "Stop at as many complete answers as there are beams, instead of when no open beam looks better than they do.",
        "transformers", needs="num_beams",
    )
    penalty_alpha: float = for_search(
        0.0,
        "Contrastive search: of the `top_k` likeliest tokens the one whose probability, less its likeness to the text "
        "so far, is best; this is the weight of the likeness. 0 is off.",
        "Su et al. 2022, section 4", minimum=0, maximum=1, slider=(0.0, 1.0, 0.05),
    )

    dola_layers: Layers | None = for_scores(
        None,
        "Score tokens by how much more likely the last layer holds them than an earlier one: `low` or `high` half of "
        "the layers, or their numbers (0 is the embedding); at each token the layer that differs most is taken.",
        "DoLa, Chuang et al. 2023, section 2", stage="dola", most=MOST_STOPS,
    )
    guidance_scale: float = for_scores(
        1.0,
        "Moves the answer away from what would follow `negative_prompt`: scores are moved this many times the distance "
        "between the two; 1 does nothing, below 1 moves towards it.",
        "Sanchez et al. 2023, section 2.2 (classifier-free guidance)", minimum=0, maximum=100, slider=(0.0, 5.0, 0.1),
        aliases=("cfg_scale",), stage="guidance",
    )
    negative_prompt: Prompt | None = for_scores(
        None,
        "What the answer should not be like: a text or token ids, continued beside the prompt; by default the prompt's "
        "last token alone.",
        "Sanchez et al. 2023", stage="guidance", needs="guidance_scale",
    )

    json_schema: Schema | None = for_choice(
        None, "The answer is JSON that fulfils this schema: an object, or true or {} for any JSON.",
        "llguidance (JSON Schema 2020-12)", aliases=("guided_json",), stage="grammar", longest=LONGEST_STRUCTURE,
    )
    json_object: bool = for_choice(
        False, "The answer is a JSON object.",
        "llguidance, OpenAI API (JSON mode)", stage="grammar", label="JSON object",
    )
    regex: str | None = for_choice(
        None, "The whole answer matches this regular expression (Rust's syntax: no look-around, no back-references).",
        "llguidance", aliases=("guided_regex",), stage="grammar", longest=LONGEST_STRUCTURE,
    )
    choice: list[str] | None = for_choice(
        None, "The answer is one of these texts.",
        "llguidance, vLLM", aliases=("guided_choice",), stage="grammar", most=MOST_CHOICES, longest=LONGEST_STRUCTURE,
        label="Choices",
    )
    grammar: str | None = for_choice(
        None, "The answer follows this context-free grammar, in Lark's notation with a rule named start.",
        "llguidance (Lark syntax)", aliases=("guided_grammar",), stage="grammar", longest=LONGEST_STRUCTURE,
    )
    min_tokens: int = for_choice(
        0, "End tokens and stop tokens can't be chosen before this many tokens.",
        "vLLM", minimum=0, aliases=("min_new_tokens",), stage="min_tokens", stored="min_new_tokens",
    )
    banned_token_ids: list[int] = for_choice(
        [], "These token ids are never chosen.",
        "transformers (suppress_tokens)", aliases=("suppress_tokens", "custom_token_bans"), stage="banned_token_ids",
        most=MOST_IDS, stored="suppress_tokens",
    )
    bad_words: Words = for_choice(
        Words(),
        "Texts, or lists of token ids, that are never completed: their last token is not chosen after the others.",
        "vLLM, transformers", aliases=("bad_words_ids",), stage="bad_words", most=MOST_WORDS, longest=LONGEST_WORD,
        stored="bad_words_ids",
    )
    no_repeat_ngram_size: int = for_choice(
        0, "No sequence of this many tokens appears twice in prompt and answer; 0 does nothing.",
        "Paulus et al. 2017, section 2.5", minimum=0, slider=(0, 10, 1), stage="no_repeat_ngram_size",
        stored="no_repeat_ngram_size",
    )
    allowed_token_ids: list[int] | None = for_choice(
        None, "Only these token ids can be chosen.",
        "vLLM", stage="allowed_token_ids", most=MOST_IDS,
    )
    thinking_budget: int | None = for_choice(
        None,
        "After so many tokens of thinking (`<think>`) before the answer the block is closed, and the answer follows. "
        "Needs a checkpoint that thinks.",
        "vLLM (thinking_token_budget), llama.cpp (reasoning-budget)", minimum=0,
        aliases=("thinking_token_budget", "thinking_budget_tokens", "reasoning_budget_tokens"), stage="thinking_budget",
    )

    logit_bias: dict[int, float] = for_tokens(
        {}, "Added to the logits of these token ids, between -100 and 100 each.",
        "OpenAI API", minimum=-100, maximum=100, stage="logit_bias", most=MOST_BIASES,
    )
    repetition_penalty: float = for_tokens(
        1.0, "Divides positive and multiplies negative logits of tokens already in prompt or answer; 1 does nothing.",
        "Keskar et al. 2019, section 4.1", above=0, slider=(0.5, 2.0, 0.01), aliases=("repeat_penalty",),
        stage="repetition_penalty", stored="repetition_penalty", gguf="penalty_repeat",
    )
    repetition_range: int = for_tokens(
        0, "Only the last so many tokens count for the repetition penalty; 0 counts all.",
        "llama.cpp (repeat_last_n)", minimum=0, slider=(0, 2048, 16), aliases=("repeat_last_n",),
        stage="repetition_penalty", needs="repetition_penalty", gguf="penalty_last_n",
    )
    presence_penalty: float = for_tokens(
        0.0, "Subtracted once from the logit of every token already generated.",
        "OpenAI API", minimum=-2, maximum=2, slider=(-2.0, 2.0, 0.05), stage="count_penalties",
    )
    frequency_penalty: float = for_tokens(
        0.0, "Subtracted from a token's logit for each time it was generated.",
        "OpenAI API", minimum=-2, maximum=2, slider=(-2.0, 2.0, 0.05), stage="count_penalties",
    )
    dry_multiplier: float = for_tokens(
        0.0,
        "Subtracts multiplier * base ^ (length - allowed length) from the logit of a token that would go on with a "
        "passage of that length seen before; 0 does nothing.",
        "DRY, p-e-w 2024 (text-generation-webui), as in llama.cpp", minimum=0, slider=(0.0, 5.0, 0.05), stage="dry",
    )
    dry_base: float = for_tokens(
        1.75, "Growth of the DRY penalty with each further repeated token.",
        "DRY, p-e-w 2024", minimum=1, maximum=16, slider=(1.0, 4.0, 0.05), stage="dry",
        needs="dry_multiplier", off=None,
    )
    dry_allowed_length: int = for_tokens(
        2, "Longest passage that may be repeated without a DRY penalty on the token after it.",
        "DRY, p-e-w 2024", minimum=1, slider=(1, 20, 1), stage="dry", needs="dry_multiplier", off=None,
    )
    dry_range: int = for_tokens(
        0, "Only the last so many tokens are searched for repeated passages; 0 searches all.",
        "llama.cpp (dry_penalty_last_n)", minimum=0, slider=(0, 4096, 32), aliases=("dry_penalty_last_n",),
        stage="dry", needs="dry_multiplier",
    )
    dry_breakers: Words = for_tokens(
        Words(["\n", ":", '"', "*"]), "Texts, or lists of token ids, across which no passage is matched.",
        "DRY, p-e-w 2024", aliases=("dry_sequence_breakers",), stage="dry", needs="dry_multiplier",
        most=MOST_BREAKERS, longest=LONGEST_BREAKER, off=[],
    )

    temperature: float = for_shape(
        1.0, "Divides the logits: below 1 sharper, above 1 flatter; 0 always takes the most likely token that is left.",
        "Ackley et al. 1985", minimum=0, slider=(0.0, 2.0, 0.05), stage="temperature", stored="temperature",
        gguf="temp",
    )
    dynamic_temperature_range: float = for_shape(
        0.0, "Lets the temperature move this far down where the network is certain and up where it is not; 0 fixes it.",
        "llama.cpp (dynatemp), after kalomaze 2023", minimum=0, slider=(0.0, 2.0, 0.05),
        aliases=("dynatemp_range",), stage="temperature",
    )
    dynamic_temperature_exponent: float = for_shape(
        1.0, "Power applied to the normalised entropy (0 to 1) that places the temperature within its range.",
        "llama.cpp (dynatemp), after kalomaze 2023", above=0, slider=(0.1, 4.0, 0.1),
        aliases=("dynatemp_exponent",), stage="temperature", needs="dynamic_temperature_range",
    )
    top_k: int = for_shape(
        0, "Keep only the k most likely tokens (ties with the last are kept); 0 keeps all.",
        "Fan et al. 2018, section 5.4", minimum=0, slider=(0, 200, 1), stage="top_k", stored="top_k", gguf="top_k",
        label="Top-k",
    )
    top_p: float = for_shape(
        1.0, "Keep the smallest set of most likely tokens whose probability reaches p (ties with the last are kept); "
        "1 keeps all.",
        "Holtzman et al. 2019, section 3.1", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01), stage="top_p",
        stored="top_p", gguf="top_p", label="Top-p",
    )
    min_p: float = for_shape(
        0.0, "Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.",
        "Nguyen et al. 2024, section 3", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01), stage="min_p", stored="min_p",
        gguf="min_p", label="Min-p",
    )
    typical_p: float = for_shape(
        1.0, "Keep the tokens whose information is nearest to the entropy until their probability reaches p (ties are "
        "kept); 1 keeps all. It can remove the most likely token.",
        "Meister et al. 2022, section 4", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01),
        aliases=("typical", "typ_p"), stage="typical_p", stored="typical_p",
    )
    epsilon_cutoff: float = for_shape(
        0.0, "Keep tokens at least this probable; 0 keeps all.",
        "Hewitt et al. 2022, section 4", minimum=0, maximum=1, slider=(0.0, 0.1, 0.0005), stage="epsilon_cutoff",
        stored="epsilon_cutoff",
    )
    eta_cutoff: float = for_shape(
        0.0, "Keep tokens at least as probable as the smaller of eta and sqrt(eta) * exp(-entropy); 0 keeps all.",
        "Hewitt et al. 2022, section 4", minimum=0, maximum=1, slider=(0.0, 0.1, 0.0005), stage="eta_cutoff",
        stored="eta_cutoff",
    )
    top_n_sigma: float = for_shape(
        0.0, "Keep tokens whose logit is within n standard deviations of the largest; 0 keeps all.",
        "Tang et al. 2024, algorithm 1", minimum=0, slider=(0.0, 5.0, 0.1), aliases=("nsigma",), stage="top_n_sigma",
    )
    top_a: float = for_shape(
        0.0, "Keep tokens at least a times as probable as the square of the largest probability; 0 keeps all.",
        "RWKV-LM (Bo Peng 2021), KoboldAI", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01), stage="top_a",
    )
    xtc_probability: float = for_shape(
        0.0, "Chance, at each token, that all but the least likely of the tokens above `xtc_threshold` are removed.",
        "XTC, p-e-w 2024 (text-generation-webui)", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01), stage="xtc",
        gguf="xtc_probability",
    )
    xtc_threshold: float = for_shape(
        0.1, "Probability from which a token counts as a top choice for XTC.",
        "XTC, p-e-w 2024 (text-generation-webui)", minimum=0, maximum=0.5, slider=(0.0, 0.5, 0.01),
        stage="xtc", needs="xtc_probability", off=None, gguf="xtc_threshold",
    )
    mirostat: int = for_shape(
        0, "2 holds the surprise of the text near `mirostat_tau` by feedback, in place of other truncations; 0 is off.",
        "Basu et al. 2020, version 2 as in llama.cpp", minimum=0, maximum=2, slider=(0, 2, 2), stage="mirostat",
        gguf="mirostat",
    )
    mirostat_tau: float = for_shape(
        5.0, "Surprise that mirostat aims for, in bits per token.",
        "Basu et al. 2020", above=0, slider=(0.1, 10.0, 0.1), stage="mirostat", needs="mirostat", off=None,
        gguf="mirostat_tau",
    )
    mirostat_eta: float = for_shape(
        0.1, "How fast mirostat corrects its bound after each token.",
        "Basu et al. 2020", minimum=0, maximum=1, slider=(0.0, 1.0, 0.01), stage="mirostat", needs="mirostat", off=None,
        gguf="mirostat_eta",
    )

    def as_dict(self) -> dict[str, Any]:
        """The values by name, as answers echo them."""
        return {name: getattr(self, name) for name in BY_NAME}

    def asks_for(self, name: str) -> bool:
        """Whether the parameter `name` has another value than the one that switches it off."""
        return bool(getattr(self, name) != BY_NAME[name].off)
# fmt: on


PARAMETERS: tuple[Parameter, ...] = tuple(
    Parameter(row.name, KINDS[str(row.type).removesuffix(" | None")], **row.metadata)
    for row in fields(DecodingParameters)
)
BY_NAME: dict[str, Parameter] = {parameter.name: parameter for parameter in PARAMETERS}

# What changes single logits, then temperature, then what cuts the tail, as in transformers.
DEFAULT_ORDER: tuple[str, ...] = tuple(dict.fromkeys(row.stage for row in PARAMETERS if row.stage))

# What the scores are at all, and what may be chosen, is settled first in every order: after a truncation it could
# leave nothing.
CONSTRAINTS: tuple[str, ...] = tuple(
    dict.fromkeys(row.stage for row in PARAMETERS if row.stage and row.group in (SCORES, CHOICE))
)

# What cuts the tail or the head of the distribution. Mirostat takes its place: it decides itself where to cut.
TRUNCATIONS: tuple[str, ...] = tuple(
    row.name for row in PARAMETERS
    if row.group == SHAPE and row.needs is None and row.stage not in ("temperature", "mirostat")
)  # fmt: skip
