"""The vocabulary and the chat templates of a checkpoint in a GGUF file, so that llama.cpp gives the same ids.

llama.cpp knows a way to split texts by its name and of an added token little more than its spelling. What it would do
otherwise is refused here, by the name of the field, for a model that reads other ids than it was trained on answers
worse and nothing shows why.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import tokenizers

from topkapi.model.errors import CheckpointError
from topkapi.model.storage.checkpoint import Checkpoint
from topkapi.model.storage.gguf_vocabulary import FINDS_WHOLE_WORDS, pre_tokenizer
from topkapi.model.text.byte_level import BYTE_TO_CHARACTER, components
from topkapi.model.text.encoding import merge_pairs
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.text.tokenizer_check import SAMPLE

# Names under which llama.cpp knows the ways to split a text before merging; smaug-bpe splits as llama-bpe does, but
# merges words that the vocabulary holds whole.
_PRE_TOKENIZERS = ("qwen2", "gpt-2", "smollm", "llama-bpe", "smaug-bpe", "default")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_ELSEWHERE = "convert the original model with llama.cpp's convert_hf_to_gguf.py and compare the ids"


def add_vocabulary(writer: Any, checkpoint: Checkpoint) -> None:
    """Write the tokenizer and the chat templates. Raises `CheckpointError` for what changes ids in llama.cpp."""
    tokenizer, size = checkpoint.tokenizer, checkpoint.config.vocab_size
    definition = tokenizer.definition
    for field, problem in _problems(tokenizer):
        raise CheckpointError(f"llama.cpp would read texts otherwise: {problem}", field=field, hint=_ELSEWHERE)
    model = definition["model"]
    name = _split_name(definition)
    entries: list[str] = [f"[PAD{token_id}]" for token_id in range(size)]
    types = [_UNUSED] * size
    for entry, token_id in model["vocab"].items():
        entries[token_id], types[token_id] = entry, _NORMAL
    for added in definition.get("added_tokens") or []:
        token_id = int(added["id"])
        entries[token_id] = str(added["content"])
        types[token_id] = _CONTROL if entries[token_id] in tokenizer.control_tokens else _USER_DEFINED
    twice, times = Counter(entries).most_common(1)[0]
    if times > 1:
        raise CheckpointError(f"llama.cpp takes no vocabulary with the token {twice!r} twice", field="vocab")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(entries)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merge_pairs(model)])
    turn_end = checkpoint.chat.turn_end(tokenizer) if checkpoint.chat else ()
    for token_id, add in (
        (tokenizer.begin_token_id, writer.add_bos_token_id),
        (tokenizer.end_token_id, writer.add_eos_token_id),
        (turn_end[0] if turn_end else None, writer.add_eot_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(tokenizer.adds_begin_token)
    writer.add_add_eos_token(tokenizer.adds_end_token)
    if checkpoint.chat is not None:
        stored = checkpoint.chat.stored
        plain = [{**each, "template": plain_template(each["template"])} for each in stored if isinstance(each, dict)]
        writer.add_chat_template(plain_template(stored) if isinstance(stored, str) else plain)


def plain_template(source: str) -> str:
    """A chat template without `{% generation %}`, which only training needs and other readers of Jinja refuse.

    Its white space stays as it was: what stood in its place is a block that is always taken.
    """
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)


def plain_name(name: str) -> str:
    """A model's name for llama.cpp, which gives tokens other flags where it finds certain names in this one."""
    return re.sub(r"(?i)(phi|modern)-?(?=3|bert)", r"\1 ", name)


def _problems(tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """The fields of a tokenizer that llama.cpp would not follow, and what it would do."""
    definition = tokenizer.definition
    model = definition["model"]
    if model.get("type", "BPE") != "BPE" or "ByteLevel" not in _kinds(definition, "decoder"):
        yield "model", "only byte-level BPE vocabularies can be written"
        return
    if kinds := _kinds(definition, "normalizer"):
        yield "normalizer", f"the tokenizer normalises them ({', '.join(kinds)}), and llama.cpp leaves them as they are"
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(field):
            yield field, f"the vocabulary has a {field}, which it does not know"
    if model.get("unk_token") and any(each not in model["vocab"] for each in BYTE_TO_CHARACTER.values()):
        yield "unk_token", "bytes without an entry become the unknown token, and llama.cpp drops them"
    pairs = merge_pairs(model)
    if any(" " in part for pair in pairs for part in pair):
        yield "merges", "a merge holds a space, at which it would be cut"
    if len(set(pairs)) < len(pairs):
        yield "merges", "a merge is listed twice, and llama.cpp takes the first one, tokenizers the last"
    added = definition.get("added_tokens") or []
    for entry in added:
        for flag in ("lstrip", "rstrip", "single_word"):
            if entry.get(flag):
                yield "added_tokens", f"the token {entry['content']!r} has {flag}, which a GGUF file can't say"
    for one, other in combinations(added, 2):
        if _found_otherwise(one, other):
            both = f"{one['content']!r} and {other['content']!r}"
            yield "added_tokens", f"where the tokens {both} overlap, it takes the longer one first, tokenizers does not"
    for step in components(definition.get("post_processor")):
        if step["type"] != "ByteLevel" and not _begins_and_ends(step, tokenizer):
            yield "post_processor", f"{step['type']} puts more around a text than a begin and an end token"


def _kinds(definition: Mapping[str, Any], part: str) -> list[str]:
    return [step["type"] for step in components(definition.get(part))]


def _begins_and_ends(step: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether a post-processor adds nothing but the begin token before a text and the end token after it."""
    if step["type"] != "TemplateProcessing":
        return False
    parts = [(part.get("SpecialToken") or {}).get("id") for part in step.get("single") or []]
    begin, end = tokenizer.special_tokens.get("bos_token"), tokenizer.special_tokens.get("eos_token")
    before, _, after = "".join("-" if part is None else "b" if part == begin else "e" if part == end else "?"
                               for part in parts).partition("-")  # fmt: skip
    if begin is not None and begin == end:
        after = after.replace("b", "e")
    return before in ("", "b") and after in ("", "e")


def _found_otherwise(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a text exists in which tokenizers and llama.cpp would find different ones of two added tokens."""
    first, second = (one, other) if len(one["content"].encode()) >= len(other["content"].encode()) else (other, one)
    longer, shorter = first["content"], second["content"]
    if len(longer.encode()) == len(shorter.encode()):
        return _overlap(longer, shorter)
    if bool(first.get("normalized")) != bool(second.get("normalized")):
        # tokenizers looks for those that are not normalised first; llama.cpp always for the longer one.
        return bool(first.get("normalized")) and (shorter in longer or _overlap(longer, shorter))
    # Of two in one search tokenizers takes the one that begins first.
    return _ends_begin(shorter, longer)


def _overlap(one: str, other: str) -> bool:
    return _ends_begin(one, other) or _ends_begin(other, one)


def _ends_begin(first: str, second: str) -> bool:
    """Whether `second` can begin inside of `first` and end behind it."""
    return any(second.startswith(first[start:]) for start in range(1, len(first)) if len(first) - start < len(second))


def _split_name(definition: Mapping[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer splits a text, found by comparing the pieces of a multilingual sample."""

    def split(pre: object) -> Sequence[str]:
        plain = tokenizers.Tokenizer.from_str(json.dumps({**definition, "pre_tokenizer": pre, "post_processor": None}))
        return [piece for piece, _ in plain.pre_tokenizer.pre_tokenize_str(SAMPLE)] if plain.pre_tokenizer else [SAMPLE]

    wanted = split(definition.get("pre_tokenizer"))
    found = [name for name in _PRE_TOKENIZERS if split(pre_tokenizer(name)) == wanted]
    whole_words = bool(definition["model"].get("ignore_merges"))
    named = [name for name in found if (name in FINDS_WHOLE_WORDS) == whole_words]
    if found and not named and not whole_words_matter(definition):
        named = found
    if named:
        return named[0]
    if found:
        finds = "finds whole words before it merges" if whole_words else "merges words that it holds whole"
        raise CheckpointError(
            f"llama.cpp would read texts otherwise: the vocabulary {finds}, llama.cpp does not as {found[0]!r}",
            field="ignore_merges",
            hint=_ELSEWHERE,
        )
    raise CheckpointError(
        "llama.cpp has no name for how this tokenizer splits a text",
        field="pre_tokenizer",
        hint=f"known ways: {', '.join(_PRE_TOKENIZERS)}",
    )


def whole_words_matter(definition: Mapping[str, Any]) -> bool:
    """Whether the merges of a word that the vocabulary holds whole ever end in something else than that entry."""
    model = {**definition["model"], "ignore_merges": False, "dropout": None}
    merging = tokenizers.Tokenizer.from_str(json.dumps({**definition, "model": model, "added_tokens": []})).model
    return any(len(merging.tokenize(entry)) > 1 for entry in model["vocab"])
