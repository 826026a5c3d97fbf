"""Tokens that a checkpoint adds to its vocabulary, or matches as a whole, wherever its files say so.

`tokenizer.json` lists them; `tokenizer_config.json`, and the older `special_tokens_map.json` and `added_tokens.json`,
may list more, or the same ones with other flags. What comes of that follows transformers, whose files they are.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from topkapi.model.errors import CheckpointError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Fields of `tokenizer_config.json` that name special tokens, in transformers' order."""

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


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


def token_content(token: object) -> str | None:
    """The spelling of a token as `tokenizer_config.json` names it: a string or an object with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def typed(value: Any) -> Any:
    """A field of a `tokenizer_config.json` whose tokens say that they are ones, which transformers asks for."""
    if isinstance(value, list):
        return [typed(each) for each in value]
    is_token = isinstance(value, Mapping) and isinstance(value.get("content"), str) and "__type" not in value
    return {"__type": "AddedToken", **value} if is_token else value


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a `tokenizer_config.json` names, by those names: those of one model alone come last."""
    found = {name: config.get(name) for name in NAMED_TOKENS}
    found |= {name: token for name, token in config.items() if name.endswith("_token")}
    for field in ("model_specific_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(field), Mapping):
            found |= config[field]
    spellings = {name: token_content(token) for name, token in found.items()}
    return {name: spelling for name, spelling in spellings.items() if spelling}


def further_special_tokens(config: Mapping[str, Any]) -> list[Any]:
    """The special tokens that a `tokenizer_config.json` lists without names, each a text or an object."""
    listed = config.get("extra_special_tokens")
    if not isinstance(listed, list) or not listed:
        listed = config.get("additional_special_tokens")
    return listed if isinstance(listed, list) else []


def with_tokens_of(
    definition: dict[str, Any], config: Mapping[str, Any], added_tokens_file: Mapping[str, Any]
) -> dict[str, Any]:
    """`definition` with the tokens that `config` adds or gives other flags, and with those of `added_tokens.json`.

    A special token that is named but nowhere in the vocabulary comes after its last entry; a padding token does not,
    for nothing is padded. Raises CheckpointError for a token whose id is said to be another than its place.
    """
    try:
        listed = {entry["content"]: entry for entry in definition.get("added_tokens") or []}
        return _with_tokens(definition, config, added_tokens_file, listed)
    except CheckpointError:
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and panics are none
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(
            f"the tokenizer definition cannot be used: {type(error).__name__}: {error}",
            hint="tokenizer.json must be a file written by the tokenizers library",
        ) from error


def _with_tokens(
    definition: dict[str, Any],
    config: Mapping[str, Any],
    added_tokens_file: Mapping[str, Any],
    listed: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    wanted = _declared(config, added_tokens_file, listed)
    known = {**listed, **{entry["content"]: entry for entry in wanted}}
    objects = {name: config.get(name) for name in named_tokens(config)}
    vocabulary = definition["model"]["vocab"]
    entries = vocabulary if isinstance(vocabulary, Mapping) else {entry[0] for entry in vocabulary}
    for name, spelling in named_tokens(config).items():
        if spelling not in known and (name != "pad_token" or spelling in entries):
            wanted.append(_entry(objects.get(name) or spelling, spelling))
            known[spelling] = wanted[-1]
    for token in further_special_tokens(config):
        content = token_content(token)
        if content and content not in known:
            wanted.append(_entry(token, content))
            known[content] = wanted[-1]
    special = set(named_tokens(config).values())
    wanted = [{**entry, "special": entry["special"] or entry["content"] in special} for entry in wanted]
    if all(entry["content"] in listed and _same(entry, listed[entry["content"]]) for entry in wanted):
        return definition
    return {**definition, "added_tokens": _as_added(definition, wanted)}


def _declared(
    config: Mapping[str, Any], added_tokens_file: Mapping[str, Any], listed: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The tokens that the files give with their ids, in the order of these."""
    declared = config.get("added_tokens_decoder")
    try:
        if isinstance(declared, Mapping):
            entries = [_entry(token, token["content"]) | {"id": int(index)} for index, token in declared.items()]
            return sorted(entries, key=lambda entry: int(entry["id"]))
        special = set(named_tokens(config).values()) | set(map(token_content, further_special_tokens(config)))
        return [
            added_token(content, int(index), special=content in special) | {"normalized": content not in special}
            for content, index in sorted(added_tokens_file.items(), key=lambda item: int(item[1]))
            if content not in listed
        ]
    except (KeyError, TypeError, ValueError) as error:
        name = "added_tokens.json" if declared is None else "tokenizer_config.json's added_tokens_decoder"
        hint = "save the tokenizer anew with transformers"
        raise CheckpointError(f"{name} is damaged: {type(error).__name__}: {error}", hint=hint) from error


def _entry(token: Any, content: str) -> dict[str, Any]:
    """An entry without an id; a token given as an object may leave flags out, one given as a text is special."""
    given = token if isinstance(token, Mapping) else {"special": True}
    special = bool(given.get("special", "__type" in given))
    flags = {name: bool(given.get(name, False)) for name in FLAGS}
    return {"content": content, **flags, "special": special, "normalized": bool(given.get("normalized", not special))}


def _same(entry: Mapping[str, Any], listed: Mapping[str, Any]) -> bool:
    return entry.get("id", listed["id"]) == listed["id"] and all(entry[name] == listed.get(name) for name in FLAGS)


def _as_added(definition: Mapping[str, Any], wanted: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The added tokens of `definition` after tokenizers' own library has added `wanted` to them."""
    plain = {**definition, "truncation": None, "padding": None}
    backend = tokenizers.Tokenizer.from_str(json.dumps(plain))
    backend.add_tokens(
        [tokenizers.AddedToken(each["content"], **{name: each[name] for name in FLAGS}) for each in wanted]
    )
    added = {
        token.content: {"id": index, "content": token.content, **{name: getattr(token, name) for name in FLAGS}}
        for index, token in backend.get_added_tokens_decoder().items()
    }
    for each in wanted:
        place = added[each["content"]]["id"] if each["content"] in added else None
        if "id" in each and each["id"] != place:
            raise CheckpointError(
                f"the added token {each['content']!r} is said to have the id {each['id']}, "
                f"but its place in the vocabulary is {place}",
                field="added_tokens_decoder",
                hint="save the tokenizer anew with transformers, so that its files agree",
            )
    return sorted(added.values(), key=lambda entry: int(entry["id"]))


def any_of(spellings: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for any of `spellings`, the longest first."""
    longest_first = sorted(filter(None, spellings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def are_plain(entries: Sequence[Mapping[str, Any]], normalised: bool) -> bool:
    """Whether added tokens are found by their spelling alone, the first and then longest one before all others."""
    if any(entry.get(flag) for entry in entries for flag in ("single_word", "lstrip", "rstrip")):
        return False
    # Those that are looked for in the normalised text are looked for after all others.
    kinds = {bool(entry.get("normalized")) for entry in entries}
    return kinds <= {False} if normalised else len(kinds) <= 1
