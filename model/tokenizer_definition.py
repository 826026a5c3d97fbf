"""The content of a `tokenizer.json`: read, made by training, and changed for what `Tokenizer` does with it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.errors import CheckpointError, DataError
from model.pretokenize import QWEN2_PATTERN, split_by, split_gpt2
from model.reading import read_json, read_text

END_OF_TEXT = "<|endoftext|>"


def byte_level_definition(
    vocabulary: Mapping[str, int], merges: list[str], pre_tokenizer: dict[str, Any], added: list[dict[str, Any]]
) -> dict[str, Any]:
    """A `tokenizer.json` for a byte-level BPE vocabulary."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": merges,
        },
    }


def added_token(content: str, token_id: int, *, special: bool = True) -> dict[str, Any]:
    """An entry of `added_tokens` in a `tokenizer.json`."""
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def parse_merges(text: str) -> list[str]:
    """The merges of a `merges.txt` or `vocab.bpe`, one "left right" each; a first line `#version` is skipped."""
    lines = text.split("\n")
    return [line for line in lines[1 if lines[0].startswith("#version") else 0 :] if line.strip()]


def token_content(token: object) -> str | None:
    """The spelling of a token as `tokenizer_config.json` names it: a string or an object with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def adds_begin_token(
    definition: Mapping[str, Any], config: Mapping[str, Any], spelling: str | None, token_id: int | None
) -> bool:
    """Whether transformers and llama.cpp put the begin token before a text.

    Said by `add_bos_token` in `tokenizer_config.json`, else by the template that `tokenizer.json` puts around a text.
    """
    if token_id is None:
        return False
    if isinstance(config.get("add_bos_token"), bool):
        return bool(config["add_bos_token"])
    processor = definition.get("post_processor") or {}
    steps = processor.get("processors") if processor.get("type") == "Sequence" else [processor]
    templates = (step.get("single") or [{}] for step in steps or [] if step.get("type") == "TemplateProcessing")
    return any((template[0].get("SpecialToken") or {}).get("id") == spelling for template in templates)


def read_definition(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of `tokenizer.json` and `tokenizer_config.json`, or of GPT-2's older `vocab.json` and `merges.txt`.

    Raises CheckpointError naming the file that is missing or damaged.
    """
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path)
    special_path = directory / "special_tokens_map.json"
    if special_path.is_file():
        config = {**read_json(special_path), **config}
    if (directory / "tokenizer.json").is_file():
        definition = read_json(directory / "tokenizer.json")
        if not isinstance(definition.get("model"), dict) or not definition["model"].get("vocab"):
            raise CheckpointError(f"{directory / 'tokenizer.json'} holds no vocabulary")
        return definition, config
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        vocabulary = read_json(directory / "vocab.json")
        merges = parse_merges(read_text(directory / "merges.txt"))
        end = token_content(config.get("eos_token")) or END_OF_TEXT
        if end not in vocabulary:
            return byte_level_definition(vocabulary, merges, split_gpt2(), []), config
        config = {"bos_token": end, "eos_token": end, **config}
        return byte_level_definition(vocabulary, merges, split_gpt2(), [added_token(end, vocabulary[end])]), config
    raise CheckpointError(
        f"{directory} holds no tokenizer.json",
        hint="save the tokenizer with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)",
    )


def trained_definition(texts: Iterable[str], vocab_size: int, control_tokens: Sequence[str]) -> dict[str, Any]:
    """Byte-level BPE trained on `texts`: exactly `vocab_size` entries, the control tokens last.

    Raises DataError where the texts cannot fill it.
    """
    if vocab_size < 256 + len(control_tokens):
        raise DataError(
            f"a vocabulary of {vocab_size} entries cannot hold the 256 bytes and {len(control_tokens)} control tokens",
            field="vocab_size",
            hint=f"ask for at least {256 + len(control_tokens)} entries",
        )
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(control_tokens),
        min_frequency=2,  # a pair seen once is no pattern
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    size = len(model["vocab"])
    if size + len(control_tokens) < vocab_size:
        raise DataError(
            f"the text yields a vocabulary of only {size + len(control_tokens)} entries, not {vocab_size}",
            field="vocab_size",
            hint=f"give more text, or ask for at most {size + len(control_tokens)} entries",
        )
    added = [added_token(spelling, size + index) for index, spelling in enumerate(control_tokens)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return byte_level_definition(model["vocab"], merges, split_by(QWEN2_PATTERN), added)


def renamed_definition(definition: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`definition` with each control token (a key of `names`) under another name, and without what pads or adds.

    A Unigram vocabulary would otherwise match a control token's entry inside ordinary text.
    """
    copy = dict(definition)
    copy.update(truncation=None, padding=None, post_processor=None)
    copy["added_tokens"] = [
        {**entry, "content": names[entry["content"]], "normalized": False} if entry["content"] in names else entry
        for entry in definition.get("added_tokens") or []
    ]
    model = dict(definition["model"])
    if model.get("dropout"):
        model["dropout"] = None
    vocabulary = model["vocab"]
    listed = {entry["content"] for entry in definition.get("added_tokens") or []}
    if isinstance(vocabulary, dict):
        copy["added_tokens"] += [
            added_token(name, vocabulary[content]) for content, name in names.items() if content not in listed
        ]
        model["vocab"] = {names.get(entry, entry): token_id for entry, token_id in vocabulary.items()}
    else:
        copy["added_tokens"] += [
            added_token(names[entry], token_id)
            for token_id, (entry, _) in enumerate(vocabulary)
            if entry in names and entry not in listed
        ]
        model["vocab"] = [[names.get(entry, entry), score] for entry, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        joined = (merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in model["merges"])
        model["merges"] = [merge for merge, entry in zip(model["merges"], joined, strict=True) if entry not in names]
    copy["model"] = model
    return copy


def without_prefix(part: Any) -> Any:
    """`part` of a tokenizer definition without the steps that put a space before a text."""
    if isinstance(part, list):
        return [without_prefix(member) for member in part if not _is_prepend(member)]
    if not isinstance(part, dict):
        return part
    steps = ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers")
    result = {key: without_prefix(value) if key in steps else value for key, value in part.items()}
    if _is_prepend(result.get("normalizer")):
        result["normalizer"] = None
    if "prepend_scheme" in result:
        result["prepend_scheme"] = "never"
    if "add_prefix_space" in result:
        result["add_prefix_space"] = False
    return result


def _is_prepend(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "Prepend"
