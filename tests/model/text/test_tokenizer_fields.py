"""What becomes of every field of a tokenizer's files and of what chat templates see, by the formats' own lists.

A field or a type that a new version of tokenizers or transformers brings makes a test here fail until it is decided
what becomes of it: it is honoured, it is refused by name, or it has no effect for the reason given.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import chat_template_utils

from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.conversation.template_environment import template_environment
from topkapi.model.errors import CheckpointError
from topkapi.model.text.added_tokens import FLAGS, NAMED_TOKENS
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.text.tokenizer_check import SAMPLE

WORDS = Tokenizer.train(["he said that she had the hall and all, he said. " * 40], 266, ["<|end|>"])
BYTES: dict[str, Any] = {**WORDS.definition, "pre_tokenizer": None, "decoder": None}
LETTERS = {entry: index for index, entry in enumerate([*"?abcdehlnst H.,▁<>|0123456789", "he"])}

RUN = "honoured: tokenizers itself runs it, tiktoken where it is known to give the same ids"
ENCODING_ONLY = "no effect: about the place of a token in its text, which is not asked for"
START = "no effect: it takes a space from the start of a text, and an answer goes on from its prompt"

TYPES: dict[str, dict[str, tuple[Any, dict[str, str]]]] = {
    "normalizer": {
        "BertNormalizer": (
            normalizers.BertNormalizer(),
            dict.fromkeys(["clean_text", "handle_chinese_chars", "strip_accents", "lowercase"], RUN),
        ),
        "ByteLevel": (normalizers.ByteLevel(), {}),
        "Lowercase": (normalizers.Lowercase(), {}),
        "NFC": (normalizers.NFC(), {}),
        "NFD": (normalizers.NFD(), {}),
        "NFKC": (normalizers.NFKC(), {}),
        "NFKD": (normalizers.NFKD(), {}),
        "Nmt": (normalizers.Nmt(), {}),
        "Precompiled": (None, {"precompiled_charsmap": RUN}),  # made by SentencePiece alone
        "Prepend": (normalizers.Prepend("▁"), {"prepend": "honoured, at the start of a text alone"}),
        "Replace": (normalizers.Replace("a", "e"), {"pattern": RUN, "content": RUN}),
        "Sequence": (normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), {"normalizers": RUN}),
        "Strip": (normalizers.Strip(), {"strip_left": RUN, "strip_right": RUN}),
        "StripAccents": (normalizers.StripAccents(), {}),
    },
    "pre_tokenizer": {
        "BertPreTokenizer": (pre_tokenizers.BertPreTokenizer(), {}),
        "ByteLevel": (
            pre_tokenizers.ByteLevel(),
            {"add_prefix_space": RUN, "trim_offsets": ENCODING_ONLY, "use_regex": RUN},
        ),
        "CharDelimiterSplit": (pre_tokenizers.CharDelimiterSplit("e"), {"delimiter": RUN}),
        "Digits": (pre_tokenizers.Digits(), {"individual_digits": RUN}),
        "FixedLength": (pre_tokenizers.FixedLength(), {"length": RUN}),
        "Metaspace": (
            pre_tokenizers.Metaspace(),
            {"replacement": RUN, "prepend_scheme": "honoured, at the start of a text alone", "split": RUN},
        ),
        "Punctuation": (pre_tokenizers.Punctuation(), {"behavior": RUN}),
        "Sequence": (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]),
            {"pretokenizers": RUN},
        ),
        "Split": (pre_tokenizers.Split("e", "removed"), {"pattern": RUN, "behavior": RUN, "invert": RUN}),
        "UnicodeScripts": (pre_tokenizers.UnicodeScripts(), {}),
        "Whitespace": (pre_tokenizers.Whitespace(), {}),
        "WhitespaceSplit": (pre_tokenizers.WhitespaceSplit(), {}),
    },
    "model": {
        "BPE": (
            models.BPE(LETTERS, [("h", "e")], unk_token="?"),
            {
                **dict.fromkeys(["vocab", "merges", "unk_token", "continuing_subword_prefix", "fuse_unk"], RUN),
                **dict.fromkeys(["end_of_word_suffix", "byte_fallback", "ignore_merges"], RUN),
                "dropout": "no effect: it is for training, and a text has the same ids every time",
            },
        ),
        "Unigram": (
            models.Unigram([(letter, -1.0 - index) for letter, index in LETTERS.items()], 0),
            {"unk_id": RUN, "vocab": RUN, "byte_fallback": RUN},
        ),
        "WordLevel": (models.WordLevel(LETTERS, "?"), {"vocab": RUN, "unk_token": RUN}),
        "WordPiece": (
            models.WordPiece(LETTERS, unk_token="?"),
            dict.fromkeys(["vocab", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word"], RUN),
        ),
    },
    "post_processor": {
        "BertProcessing": (
            processors.BertProcessing(("<|end|>", 265), ("a", 64)),
            dict.fromkeys(["sep", "cls"], "honoured as what begins and ends a text; put there where a dialect does"),
        ),
        "ByteLevel": (
            processors.ByteLevel(),
            dict.fromkeys(["add_prefix_space", "trim_offsets", "use_regex"], ENCODING_ONLY),
        ),
        "RobertaProcessing": (
            processors.RobertaProcessing(("<|end|>", 265), ("a", 64)),
            {
                **dict.fromkeys(["sep", "cls"], "honoured as what begins and ends a text"),
                **dict.fromkeys(["trim_offsets", "add_prefix_space"], ENCODING_ONLY),
            },
        ),
        "Sequence": (processors.Sequence([processors.ByteLevel()]), {"processors": "honoured, each of its own"}),
        "TemplateProcessing": (
            processors.TemplateProcessing("<|end|> $A", None, [("<|end|>", 265)]),
            {
                "single": "honoured: whether it begins with the begin token, put there where a dialect does",
                "pair": "no effect: texts are never encoded in pairs",
                "special_tokens": "no effect: the ids of what single names are those of the vocabulary",
            },
        ),
    },
    "decoder": {
        "BPEDecoder": (decoders.BPEDecoder(), {"suffix": "honoured"}),
        "ByteFallback": (decoders.ByteFallback(), {}),
        "ByteLevel": (
            decoders.ByteLevel(),
            dict.fromkeys(["add_prefix_space", "trim_offsets", "use_regex"], "no effect: decoding does not read it"),
        ),
        "CTC": (decoders.CTC(), dict.fromkeys(["pad_token", "word_delimiter_token", "cleanup"], "refused")),
        "Fuse": (decoders.Fuse(), {}),
        "Metaspace": (decoders.Metaspace(), {"replacement": "honoured", "prepend_scheme": START, "split": START}),
        "Replace": (
            decoders.Replace("▁", " "),
            {"pattern": "honoured, refused where it is a regular expression", "content": "honoured"},
        ),
        "Sequence": (decoders.Sequence([decoders.Fuse()]), {"decoders": "honoured, each of its own"}),
        "Strip": (
            decoders.Strip(" ", 1, 0),
            {"content": "refused unless it is a space", "start": START, "stop": START},
        ),
        "WordPiece": (
            decoders.WordPiece(),
            {"prefix": "honoured", "cleanup": "no effect: a text is what its tokens' bytes are, unchanged"},
        ),
    },
}
MODULES = {
    "normalizer": normalizers,
    "pre_tokenizer": pre_tokenizers,
    "model": models,
    "post_processor": processors,
    "decoder": decoders,
}
NO_TYPES = {"Normalizer", "PreTokenizer", "Model", "PostProcessor", "Decoder", "NORMALIZERS", "DecodeStream"}
"""What these modules hold besides: the types' base classes and helpers."""

TOP = {
    "version": "no effect: there is one",
    "truncation": "no effect: transformers truncates where it is asked to alone, and a text too long is refused here",
    "padding": "no effect: nothing is padded",
    "added_tokens": "honoured, refused where an id is not the token's place",
    **dict.fromkeys(["normalizer", "pre_tokenizer", "post_processor", "decoder", "model"], "see there"),
}
ADDED_TOKEN = {
    "content": "honoured",
    **dict.fromkeys(
        ["single_word", "lstrip", "rstrip", "normalized", "special"], "honoured, as tokenizers matches them"
    ),
}

NO_READER = "no effect: it is for who calls transformers"
CONFIG = {
    **dict.fromkeys(NAMED_TOKENS, "honoured: special, known to chat templates, added where the vocabulary lacks it"),
    "pad_token": "honoured as the others, but never added to the vocabulary: nothing is padded",
    "extra_special_tokens": "honoured: special, and known to chat templates by their names where they have some",
    "additional_special_tokens": "honoured as extra_special_tokens, which stands before it",
    "model_specific_special_tokens": "honoured as extra_special_tokens with names",
    "added_tokens_decoder": "honoured over tokenizer.json; refused where an id is not the token's place",
    "add_bos_token": "honoured over tokenizer.json's post-processor, as by llama.cpp's converter",
    "add_eos_token": "honoured in GGUF files; no effect here: a text that goes on gets no end",
    "add_prefix_space": "refused where tokenizer.json does the opposite",
    "split_special_tokens": "refused where it is true",
    "chat_template": "honoured, also several by name, behind the files of their own",
    "chat_control_tokens": "no effect: no message can place any control token",
    "clean_up_tokenization_spaces": "no effect: a text is what its tokens' bytes are, unchanged",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": "no effect: as above",
    "tokenizer_class": "no effect: tokenizer.json says it all",
    "response_template": "no effect: answers are read by the form that the chat template gives calls",
    "response_schema": "no effect: transformers drops it too",
    "model_max_length": "no effect: the context is what config.json says",
    "max_len": "no effect: an older model_max_length",
    "max_length": "no effect: nothing is truncated in silence",
    "model_input_names": "no effect: there are ids alone",
    "padding_side": "no effect: nothing is padded",
    "pad_to_multiple_of": "no effect: nothing is padded",
    "pad_token_type_id": "no effect: nothing is padded",
    "truncation_side": "no effect: a text too long is refused",
    "truncation_strategy": "no effect: a text too long is refused",
    "stride": "no effect: a text too long is refused",
    "fix_mistral_regex": "no effect: tokenizer.json says how texts are split",
    "auto_map": "no effect: no code of a checkpoint is ever run",
    "init_inputs": NO_READER,
    "name_or_path": NO_READER,
    "processor_class": NO_READER,
    "verbose": NO_READER,
    "backend": NO_READER,
    "files_loaded": NO_READER,
    "is_local": NO_READER,
    "local_files_only": NO_READER,
    **dict.fromkeys(
        ["vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "gguf_file", "tokenizer_object", "unk_id"],
        "no effect: files are read by their own names alone",
    ),
    **dict.fromkeys(
        ["tokenizer_truncation", "tokenizer_padding", "post_processor", "_json_truncation", "_json_padding"],
        "no effect: transformers passes it between its own functions",
    ),
    "_spm_precompiled_charsmap": "no effect: transformers passes it between its own functions",
    "tokenizer": "no effect: transformers passes it between its own functions",
}

APPLIED = {
    "conversation": "honoured",
    "tools": "honoured: the template named tool_use then, where there is one",
    "documents": "honoured: always defined, none unless given",
    "chat_template": "no effect: the checkpoint's own is taken",
    "add_generation_prompt": "honoured",
    "continue_final_message": "honoured by the routes, which put the answer's beginning behind the prompt",
    "kwargs": "honoured: each is a variable of the template",
    "sanitize_control_tokens": "honoured: messages never place control tokens",
    "return_assistant_tokens_mask": "honoured: what is trained",
    **dict.fromkeys(["tokenize", "return_dict", "return_tensors", "tokenizer_kwargs"], NO_READER),
    **dict.fromkeys(["padding", "truncation", "max_length"], "no effect: nothing is padded or cut"),
}


FOR_PAGES = {"pprint", "striptags", "urlize", "wordcount", "wordwrap", "xmlattr"}
"""Jinja's filters for web pages, which no chat template needs: they may be left out, and are then refused by name."""


def parts(source: str) -> set[str]:
    """The names of the fields that transformers' source takes out of a tokenizer's settings."""
    found = re.findall(
        r"""\b(?:init_kwargs|local_kwargs|kwargs)(?:\.(?:pop|get|setdefault)\(|\[)\s*["'](\w+)["']""", source
    )
    found += re.findall(r"""["'](\w+)["'] in (?:init_kwargs|kwargs)\b""", source)
    return set(found)


def test_every_type_and_field_of_tokenizers_is_decided() -> None:
    for section, module in MODULES.items():
        types = {name for name in dir(module) if name[0].isupper()} - NO_TYPES
        assert types == TYPES[section].keys(), f"{section}: a type is new or gone"
        for name, (example, fields) in TYPES[section].items():
            if example is not None:
                assert stored(section, example).keys() - {"type"} == fields.keys(), f"{section} {name}: another field"
    assert json.loads(tokenizers.Tokenizer(models.BPE()).to_str()).keys() == TOP.keys()
    assert {name for name in dir(AddedToken) if name[0] != "_"} == ADDED_TOKEN.keys() == {"content", *FLAGS}


def test_every_field_of_transformers_is_decided() -> None:
    sources = (PreTrainedTokenizerBase.__init__, PreTrainedTokenizerBase._from_pretrained, TokenizersBackend.__init__)
    names = set().union(*(parts(inspect.getsource(source)) for source in sources))
    assert names <= CONFIG.keys(), f"not decided: {sorted(names - CONFIG.keys())}"
    assert set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES) == set(NAMED_TOKENS)
    applied = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self"}
    assert applied == APPLIED.keys()


def test_every_name_that_templates_know_in_transformers_is_known() -> None:
    theirs = chat_template_utils._compile_jinja_template("").environment
    ours = template_environment()
    assert theirs.globals.keys() - ours.globals.keys() <= {"lipsum"}
    assert theirs.filters.keys() - ours.filters.keys() <= FOR_PAGES and theirs.tests.keys() <= ours.tests.keys()
    assert {each.split(".")[-1] for each in theirs.extensions} - {"AssistantTracker"} == {"LoopControlExtension"}
    user = [{"role": "user", "content": "é"}]
    options = {"ensure_ascii": "true", "indent": "2", "separators": "(',', ':')", "sort_keys": "true"}
    assert set(inspect.signature(theirs.filters["tojson"]).parameters) - {"x"} == options.keys()
    for name, value in options.items():
        source = f"{{{{ {{'b': 1, 'a': messages[0].content}} | tojson({name}={value}) }}}}"
        expected, _ = chat_template_utils.render_jinja_template([user], chat_template=source)
        assert ChatTemplate(source).render(user) == expected[0]
    variables = {"documents": [{"title": "a"}], "enable_thinking": False, "messages_before": [1]}
    source = "{{ documents }}{{ enable_thinking }}{{ messages_before }}{{ add_generation_prompt }}{{ tools is none }}"
    expected, _ = chat_template_utils.render_jinja_template(
        [user], chat_template=source, add_generation_prompt=True, **variables
    )
    assert ChatTemplate(source).render(user, **variables) == expected[0]


ENCODING = [
    (section, name) for section in ("normalizer", "pre_tokenizer", "model", "post_processor") for name in TYPES[section]
]


@pytest.mark.parametrize(("section", "name"), ENCODING)
def test_every_type_encodes_as_tokenizers_does(section: str, name: str) -> None:
    example = TYPES[section][name][0]
    if example is None:
        return
    definition = {**BYTES, section: stored(section, example)}
    if section == "normalizer":
        definition["pre_tokenizer"] = WORDS.definition["pre_tokenizer"]
    if section == "model":
        definition |= {"added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(definition))
    for text in (SAMPLE, " he said <|end|> 12", ""):
        text = text.replace("<|end|>", "")
        assert Tokenizer(definition).encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", TYPES["decoder"])
def test_every_decoder_gives_tokenizers_text_or_is_refused(name: str) -> None:
    entries = ["▁he", "said", "##x", "a</w>", "▁hall", "<0x41>", "Ġb"]
    vocabulary = {entry: index for index, entry in enumerate(["?", *entries])}
    model = stored("model", models.WordLevel(vocabulary, "?"))
    example, fields = TYPES["decoder"][name]
    definition = {**BYTES, "added_tokens": [], "model": model, "decoder": stored("decoder", example)}
    if "refused" in fields.values():
        with pytest.raises(CheckpointError, match=rf"'{name}', which is not supported") as caught:
            Tokenizer(definition)
        assert caught.value.field == "decoder"
        return
    ids = {"BPEDecoder": [4, 2], "ByteFallback": [2, 6], "ByteLevel": [2, 7], "WordPiece": [2, 3]}.get(name, [2, 5])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(definition)).decode(ids)
    spaces = name in ("Fuse", "Sequence", "Strip", "ByteFallback")  # without a step that writes spaces as such
    ours = Tokenizer(definition).decode(ids)
    assert (ours.replace(" ", "▁") if spaces else ours.strip()) == theirs.strip()


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"split_special_tokens": True}, "split_special_tokens"),
    ({}, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, "add_prefix_space"),
    ({"decoder": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}}, {}, "decoder"),
    ({"decoder": {"type": "Strip", "content": "_", "start": 1, "stop": 0}}, {}, "decoder"),
]


@pytest.mark.parametrize(("changes", "config", "field"), REFUSED)
def test_what_can_not_be_followed_is_refused(changes, config, field, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({**WORDS.definition, **changes}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_directory(tmp_path)
    assert caught.value.field == field


def test_what_begins_and_ends_a_text_is_known_of_every_post_processor() -> None:
    config = {"bos_token": "a", "eos_token": "<|end|>"}
    for name, (example, _) in TYPES["post_processor"].items():
        ours = Tokenizer({**WORDS.definition, "post_processor": stored("post_processor", example)}, config)
        around = name in ("BertProcessing", "RobertaProcessing")
        assert (ours.adds_begin_token, ours.adds_end_token) == (around, around), name
    template = processors.TemplateProcessing("a $A <|end|>", None, [("a", 64), ("<|end|>", 265)])
    ours = Tokenizer({**WORDS.definition, "post_processor": stored("post_processor", template)}, config)
    assert ours.adds_begin_token and ours.adds_end_token


def test_an_unread_field_survives_being_saved(tmp_path: Path) -> None:
    config = {"model_max_length": 77, "padding_side": "left", "extra_special_tokens": {"image_token": "<|end|>"}}
    Tokenizer(WORDS.definition, config).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.model_max_length, theirs.padding_side, theirs.image_token) == (77, "left", "<|end|>")


def stored(section: str, example: Any) -> dict[str, Any]:
    """A part as `tokenizer.json` holds it."""
    backend = tokenizers.Tokenizer(example if section == "model" else models.BPE())
    if section != "model":
        setattr(backend, section, example)
    part: dict[str, Any] = json.loads(backend.to_str())[section]
    return part
