"""The tokenizer inside a GGUF file as a `tokenizer.json`.

GGUF names a pre-tokenizer instead of storing its pattern. The names and what they stand for follow llama.cpp, so that
a file encodes as it does there.
"""

from collections.abc import Mapping
from typing import Any

from topkapi.model.errors import CheckpointError
from topkapi.model.text.added_tokens import added_token
from topkapi.model.text.pretokenize import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    split_by,
    split_digits_gpt2,
    split_gpt2,
)
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.text.tokenizer_definition import byte_level_definition

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type`."""

_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""The tokens at which llama.cpp ends an answer."""

_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
FINDS_WHOLE_WORDS = _LLAMA3_NAMES
"""Names with which llama.cpp looks a word up before it merges it, as tiktoken does."""

_GPT2_NAMES = ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "jina-es", "jina-de", "exaone4")
_DIGITS_NAMES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open")
_CHATGLM_NAMES = ("chatglm-bpe", "glm4", "dbrx", "smaug-bpe")


def pre_tokenizer(name: str) -> dict[str, Any]:
    """How llama.cpp splits a text under this name, as `tokenizer.json` says it. Raises CheckpointError for others."""
    if name in _GPT2_NAMES:
        return split_gpt2()
    if name in _DIGITS_NAMES:
        return split_digits_gpt2()
    if name in _QWEN2_NAMES:
        return split_by(QWEN2_PATTERN)
    if name in (*_LLAMA3_NAMES, *_CHATGLM_NAMES):
        return split_by(LLAMA3_PATTERN)
    if name == "default":
        return split_by(r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]")
    known = ("default", *_GPT2_NAMES, *_DIGITS_NAMES, *_QWEN2_NAMES, *_LLAMA3_NAMES, *_CHATGLM_NAMES)
    raise CheckpointError(
        f"the GGUF file's pre-tokenizer {name!r} is not supported",
        field="tokenizer.ggml.pre",
        hint=f"supported: {', '.join(known)}; or load the original Hugging Face directory",
    )


def read_vocabulary(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the begin and end ids (as in `generation_config.json`) of a GGUF file's metadata.

    Raises CheckpointError for a kind of vocabulary or a pre-tokenizer that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"the GGUF file's vocabulary is of kind {kind!r}, which is not supported",
            field="tokenizer.ggml.model",
            hint="supported: gpt2 (byte-level BPE) and llama (SentencePiece BPE)",
        )
    entries: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(entries)

    # What llama.cpp takes where a SentencePiece vocabulary does not say.
    usual = {"bos": 1, "eos": 2} if kind == "llama" else {}

    def named(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = metadata.get(key, usual.get(name))
        if token_id is not None and (isinstance(token_id, bool) or not isinstance(token_id, int)):
            raise CheckpointError(f"the GGUF file's {key} must be a token id, not {token_id!r:.100}", field=key)
        return token_id if token_id is not None and 0 <= token_id < len(entries) else None

    ends = list(dict.fromkeys(i for i in map(named, _ENDS) if i is not None))
    added = [
        added_token(entry, token_id, special=entry_type == _CONTROL or token_id in ends)
        for token_id, (entry, entry_type) in enumerate(zip(entries, types, strict=True))
        if entry and (entry_type in (_CONTROL, _USER_DEFINED) or token_id in ends)
    ]
    vocabulary = {entry: token_id for token_id, entry in enumerate(entries)}
    if kind == "gpt2":
        name = metadata.get("tokenizer.ggml.pre", "default")
        definition = byte_level_definition(vocabulary, metadata["tokenizer.ggml.merges"], pre_tokenizer(name), added)
        # Vocabularies that tiktoken made find whole words first, as llama.cpp does for them.
        definition["model"]["ignore_merges"] = name in FINDS_WHOLE_WORDS
    else:
        definition = _sentencepiece(metadata, entries, types, added)
    ids = {"bos": named("bos"), "eos": named("eos"), "pad": named("padding")}
    config: dict[str, Any] = {f"{name}_token": entries[i] for name, i in ids.items() if i is not None}
    # SentencePiece vocabularies have it even where the file does not say so.
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    generation: dict[str, Any] = {}
    if ids["bos"] is not None:
        generation["bos_token_id"] = ids["bos"]
    if ends:
        generation["eos_token_id"] = ends
    return Tokenizer(definition, config), generation


def _sentencepiece(
    metadata: Mapping[str, Any], entries: list[str], types: list[int], added: list[dict[str, Any]]
) -> dict[str, Any]:
    """SentencePiece BPE: any two neighbours that make up an entry are merged, the entry of the best score first."""
    scores: list[float] = metadata["tokenizer.ggml.scores"]
    unknown = next((entry for entry, kind in zip(entries, types, strict=True) if kind == _UNKNOWN), None)
    left_out = (_CONTROL, _UNKNOWN, _UNUSED, _BYTE)
    ordinary = {
        entry: token_id
        for token_id, (entry, kind) in enumerate(zip(entries, types, strict=True))
        if kind not in left_out
    }
    merges = [
        [entry[:cut], entry[cut:]]
        for entry, token_id in sorted(ordinary.items(), key=lambda item: (-scores[item[1]], item[1]))
        for cut in range(1, len(entry))
        if entry[:cut] in ordinary and entry[cut:] in ordinary
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prefix = [{"type": "Prepend", "prepend": "\u2581"}] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    definition = byte_level_definition({entry: i for i, entry in enumerate(entries)}, [], {}, added)
    definition.update(
        normalizer={"type": "Sequence", "normalizers": [*prefix, space]},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
    )
    byte_fallback = _BYTE in types
    definition["model"].update(merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    return definition
