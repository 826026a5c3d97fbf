"""The content of a `tokenizer.json`: read, made by training, and changed for what `Tokenizer` does with it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from topkapi.model.errors import CheckpointError, DataError
from topkapi.model.reading import read_json, read_text
from topkapi.model.text.added_tokens import added_token, token_content, with_tokens_of
from topkapi.model.text.byte_level import components
from topkapi.model.text.pretokenize import QWEN2_PATTERN, split_by, split_gpt2

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


def parse_merges(text: str) -> list[str]:
    """The merges of a `merges.txt` or `vocab.bpe`, one "left right" each; a first line `#version` is skipped."""
    lines = text.split("\n")
    return [line for line in lines[1 if lines[0].startswith("#version") else 0 :] if line.strip()]


def adds_begin_token(
    definition: Mapping[str, Any], config: Mapping[str, Any], spelling: str | None, token_id: int | None
) -> bool:
    """Whether transformers and llama.cpp put the begin token before a text.

    Said by `add_bos_token` in `tokenizer_config.json`, else by the template that `tokenizer.json` puts around a text.
    """
    return token_id is not None and _adds(definition, config.get("add_bos_token"), 0, spelling)


def adds_end_token(
    definition: Mapping[str, Any], config: Mapping[str, Any], spelling: str | None, token_id: int | None
) -> bool:
    """Whether they put the end token behind a text, said by `add_eos_token` or that template."""
    return token_id is not None and _adds(definition, config.get("add_eos_token"), -1, spelling)


def _adds(definition: Mapping[str, Any], said: object, place: int, spelling: str | None) -> bool:
    if isinstance(said, bool):
        return said
    ends = []
    for step in components(definition.get("post_processor")):
        if step["type"] == "TemplateProcessing":
            ends.append(((step.get("single") or [{}])[place].get("SpecialToken") or {}).get("id"))
        elif step["type"] in ("BertProcessing", "RobertaProcessing"):
            ends.append(step["sep" if place else "cls"][0])
    return spelling in ends


def write_definition(directory: Path, definition: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`. Raises CheckpointError where that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in (("tokenizer.json", definition), ("tokenizer_config.json", config)):
            indent = 2 if name == "tokenizer_config.json" else None
            (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"the tokenizer could not be written to {directory}: {error.strerror}") from error


def read_definition(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of `tokenizer.json` and `tokenizer_config.json`, or of GPT-2's older `vocab.json` and `merges.txt`.

    What `special_tokens_map.json` and `added_tokens.json` say is part of them, as in transformers.
    Raises CheckpointError naming the file that is missing or damaged.
    """
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path)
    further: dict[str, Any] = {}
    if "added_tokens_decoder" not in config:
        # As transformers does: these two files are older than that field and stand back behind it.
        if (directory / "special_tokens_map.json").is_file():
            config = {**config, **read_json(directory / "special_tokens_map.json")}
        if (directory / "added_tokens.json").is_file():
            further = read_json(directory / "added_tokens.json")
    if (directory / "tokenizer.json").is_file():
        definition = read_json(directory / "tokenizer.json")
        if not isinstance(definition.get("model"), dict) or not definition["model"].get("vocab"):
            raise CheckpointError(f"{directory / 'tokenizer.json'} holds no vocabulary")
        _check_config(definition, config)
        return with_tokens_of(definition, config, further), config
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        vocabulary = read_json(directory / "vocab.json")
        merges = parse_merges(read_text(directory / "merges.txt"))
        end = token_content(config.get("eos_token")) or END_OF_TEXT
        added = [added_token(end, vocabulary[end])] if end in vocabulary else []
        if added:
            config = {"bos_token": end, "eos_token": end, **config}
        definition = byte_level_definition(vocabulary, merges, split_gpt2(), added)
        return with_tokens_of(definition, config, further), config
    raise CheckpointError(
        f"{directory} holds no tokenizer.json",
        hint="save the tokenizer with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)",
    )


def _check_config(definition: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse what `tokenizer_config.json` would change in how texts are encoded."""
    if config.get("split_special_tokens"):
        raise CheckpointError(
            "tokenizer_config.json sets split_special_tokens, so that control tokens would be ordinary text",
            field="split_special_tokens",
            hint="take it out",
        )
    asked = config.get("add_prefix_space")
    plain = config.get("tokenizer_class") in (None, "PreTrainedTokenizerFast", "TokenizersBackend")
    if not isinstance(asked, bool) or plain:
        return  # transformers leaves it to the tokenizer's own class, and these do nothing with it
    done = [_is_prepend(step) for step in components(definition.get("normalizer")) if _is_prepend(step)]
    for step in components(definition.get("pre_tokenizer")):
        if step["type"] == "ByteLevel":
            done.append(bool(step.get("add_prefix_space", True)))
        elif step["type"] == "Metaspace":
            done.append(step.get("prepend_scheme", "always") != "never")
    if done and any(done) != asked:
        raise CheckpointError(
            f"tokenizer_config.json says add_prefix_space: {str(asked).lower()}, but tokenizer.json does the opposite",
            field="add_prefix_space",
            hint="save the tokenizer anew with transformers, so that its files agree",
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


def renamed_definition(definition: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    """`definition` with each control token (a key of `names`) under another name, and without what pads or adds.

    A Unigram vocabulary would otherwise match a control token's entry inside ordinary text. Those that keep their names
    are added tokens in the copy, listed or not; those whose name is None are no added tokens there.
    """
    copy = dict(definition)
    copy.update(truncation=None, padding=None, post_processor=None)
    added = definition.get("added_tokens") or []
    listed = {entry["content"] for entry in added}
    copy["added_tokens"] = [
        {**entry, "content": name}
        for entry in added
        if (name := names.get(entry["content"], entry["content"])) is not None
    ]
    kept = {content: name for content, name in names.items() if name is not None}
    model = dict(definition["model"])
    if model.get("dropout"):
        model["dropout"] = None
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        copy["added_tokens"] += [
            added_token(name, vocabulary[content]) for content, name in kept.items() if content not in listed
        ]
        model["vocab"] = {kept.get(entry, entry): token_id for entry, token_id in vocabulary.items()}
    else:
        copy["added_tokens"] += [
            added_token(kept[entry], token_id)
            for token_id, (entry, _) in enumerate(vocabulary)
            if entry in kept and entry not in listed
        ]
        model["vocab"] = [[kept.get(entry, entry), score] for entry, score in vocabulary]
    if model.get("unk_token") in kept:
        model["unk_token"] = kept[model["unk_token"]]
    if "merges" in model:
        joined = (merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in model["merges"])
        renamed = {content for content, name in kept.items() if name != content}
        model["merges"] = [merge for merge, entry in zip(model["merges"], joined, strict=True) if entry not in renamed]
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
