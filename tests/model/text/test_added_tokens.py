"""Added tokens are found as tokenizers finds them, whatever their flags; every file is read as transformers does."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from topkapi.model.errors import CheckpointError
from topkapi.model.text.added_tokens import FLAGS, added_token
from topkapi.model.text.tokenizer import Tokenizer

WORDS = ["he", "said", "a", "be", "<e", "hall", " ", "\n", "é"]
VOCABULARY = Tokenizer.train(["he said that she had the hall and all, he said. " * 40], 266, ["<|end|>"])
SIZE = VOCABULARY.vocab_size
SPELLINGS = ["<e>", "e><", "<e><e>", "he", "ab", "bc", "é", " x", "|end|", "the"]


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {name: value for name, value in added_token(content, 0).items() if name != "id"} | flags


def with_added(entries: list[dict[str, Any]], normalizer: dict[str, Any] | None = None) -> dict[str, Any]:
    """The vocabulary with `entries` as tokenizers' own library adds them."""
    backend = tokenizers.Tokenizer.from_str(json.dumps({**VOCABULARY.definition, "normalizer": normalizer}))
    flags = [{name: entry[name] for name in FLAGS} for entry in entries]
    backend.add_tokens([tokenizers.AddedToken(e["content"], **f) for e, f in zip(entries, flags, strict=True)])
    definition: dict[str, Any] = json.loads(backend.to_str())
    return definition


NORMALIZERS = [
    None,
    {"type": "NFC"},
    {"type": "Lowercase"},
    {"type": "Replace", "pattern": {"String": "c"}, "content": "e"},
]
ENTRIES = st.lists(
    st.builds(
        lambda content, flags: token(content, **dict(zip(FLAGS, flags, strict=True))),
        st.sampled_from(SPELLINGS),
        st.tuples(*[st.booleans()] * len(FLAGS)),
    ),
    max_size=4,
    unique_by=lambda entry: str(entry["content"]),
)
TEXTS = st.lists(st.sampled_from([*SPELLINGS, *WORDS, "<|end|>", "c", "X", "  "]), max_size=9).map("".join)


@settings(max_examples=60)
@given(ENTRIES, st.sampled_from(NORMALIZERS), TEXTS)
def test_tokens_of_all_flags_are_found_as_tokenizers_finds_them(entries, normalizer, text) -> None:
    definition = with_added(entries, normalizer)
    ours = Tokenizer(definition)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert ours.encode_with_control(text) == theirs.encode(text, add_special_tokens=False).ids


@settings(max_examples=60)
@given(ENTRIES, st.sampled_from(NORMALIZERS), TEXTS)
def test_in_ordinary_text_special_tokens_are_none(entries, normalizer, text) -> None:
    definition = with_added(entries, normalizer)
    special = {entry["content"]: entry["id"] for entry in definition["added_tokens"] if entry["special"]}
    names = {content: f"\ue000{token_id}" for content, token_id in special.items()}
    known = set(definition["model"]["vocab"])
    for entry in definition["added_tokens"]:
        entry["content"] = names.get(entry["content"], entry["content"])
    if known & set(special):
        return  # their entries of the vocabulary are taken out of ordinary text too, which tokenizers has no word for
    theirs = tokenizers.Tokenizer.from_str(json.dumps(definition))
    definition = with_added(entries, normalizer)
    assert Tokenizer(definition).encode(text) == theirs.encode(text, add_special_tokens=False).ids


@settings(max_examples=60)
@given(ENTRIES, TEXTS, st.booleans())
def test_texts_between_control_tokens_are_encoded_as_in_the_whole(entries, text, normalized) -> None:
    plain = [{**entry, "single_word": False, "normalized": normalized} for entry in entries]
    ours = Tokenizer(with_added(plain))
    ids = [token_id for part in ours.encode_parts([ours.split_control(text)]) for token_id in part]
    assert ids == ours.encode_with_control(text)


# The files


def directory(path: Path, config: dict[str, Any], **files: dict[str, Any]) -> Path:
    contents = {"tokenizer": VOCABULARY.definition, "tokenizer_config": config, **files}
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


NEW, MORE = str(SIZE), str(SIZE + 1)
OLD = str(SIZE - 1)
FILES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "other flags": ({"eos_token": "<|end|>", "added_tokens_decoder": {OLD: token("<|end|>", rstrip=True)}}, {}),
    "further tokens": (
        {
            "eos_token": "<e>",
            "added_tokens_decoder": {
                OLD: token("<|end|>"),
                NEW: token("<e>"),
                MORE: token("<o>", special=False, normalized=True, lstrip=True),
            },
        },
        {},
    ),
    "some of them": ({"eos_token": "<e>", "added_tokens_decoder": {NEW: token("<e>", single_word=True)}}, {}),
    "an end token nowhere else": ({"eos_token": "<e>"}, {}),
    "an end token with flags": ({"eos_token": {**token("<e>", rstrip=True), "__type": "AddedToken"}}, {}),
    "an end token in the vocabulary": ({"eos_token": "he"}, {}),
    "an end token that merges are built on": ({"eos_token": "a"}, {}),
    "an older list": ({"eos_token": "<e>"}, {"added_tokens": {"<e>": SIZE, "<o>": SIZE + 1}}),
    "an older map": (
        {"eos_token": "<e>"},
        {"special_tokens_map": {"eos_token": "<|end|>", "unk_token": token("he", rstrip=True)}},
    ),
    "an older map behind newer fields": (
        {"eos_token": "<e>", "added_tokens_decoder": {NEW: token("<e>")}},
        {"special_tokens_map": {"eos_token": "<|end|>"}, "added_tokens": {"<o>": SIZE + 1}},
    ),
    "without names": (
        {"additional_special_tokens": ["<e>", {**token("<o>", lstrip=True), "__type": "AddedToken"}]},
        {},
    ),
    "with names of one model": ({"extra_special_tokens": {"image_token": "<e>"}, "boi_token": "<o>"}, {}),
}
TEXT = "he <|end|>  said<e> \n the<o>hall <o> the he<e>"


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    config, files = FILES[name]
    path = directory(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast", **config}, **files)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ours = Tokenizer.from_directory(path)
    assert ours.encode_with_control(TEXT) == theirs(TEXT, add_special_tokens=False).input_ids
    assert ours.end_token_id == theirs.eos_token_id and ours.vocab_size == len(theirs)
    assert dict(ours.special_tokens) == theirs.special_tokens_map
    ours.save(tmp_path / "again")
    again = Tokenizer.from_directory(tmp_path / "again")
    assert again.encode_with_control(TEXT) == ours.encode_with_control(TEXT)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert saved(TEXT, add_special_tokens=False).input_ids == ours.encode_with_control(TEXT)


def test_ids_that_can_not_be_had_are_refused(tmp_path: Path) -> None:
    beyond = {str(SIZE + 5): token("<e>")}
    with pytest.raises(CheckpointError, match=f"'<e>' is said to have the id {SIZE + 5}, but its place .* is {SIZE}"):
        Tokenizer.from_directory(directory(tmp_path, {"added_tokens_decoder": beyond}))
    with pytest.raises(CheckpointError, match=r"added_tokens_decoder is damaged"):
        Tokenizer.from_directory(directory(tmp_path, {"added_tokens_decoder": {"1": "<e>"}}))
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is damaged"):
        Tokenizer.from_directory(directory(tmp_path, {}, added_tokens={"<e>": "one"}))
    added = [*VOCABULARY.definition["added_tokens"], added_token("<e>", SIZE + 5)]
    with pytest.raises(CheckpointError, match=f"the id {SIZE + 5}, but its place in the vocabulary is {SIZE}"):
        Tokenizer({**VOCABULARY.definition, "added_tokens": added})


@pytest.mark.parametrize("added", [5, ["<e>"], [{"content": 5}], [{}], [{**added_token("<e>", SIZE), "id": None}]])
def test_damaged_lists_of_added_tokens_are_refused(added: Any, tmp_path: Path) -> None:
    path = directory(tmp_path, {"eos_token": "<e>"})
    (path / "tokenizer.json").write_text(json.dumps({**VOCABULARY.definition, "added_tokens": added}))
    with pytest.raises(CheckpointError, match="tokenizer definition cannot be used"):
        Tokenizer.from_directory(path)
