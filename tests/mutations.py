"""Files of a checkpoint as nobody should write them: strategies that damage one file in ways that its format knows."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

NESTED = "[" * 100_000 + "]" * 100_000
"""Deeper than the parser of JSON can follow."""

NUMBERS = [0, -1, 1, 2, 3, 7, 511, 512, 513, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**100]
NUMBERS += [0.0, -0.0, 0.5, 1.5, -0.5, 1e-320, 1e30, 1e38, 1e308, -1e308]  # type: ignore[list-item]
NOT_NUMBERS = [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    " ",
    "a",
    "\0",
    "\ud800",
    "é\u0301",
    "x" * 100_000,
    "default",
    "0",
    "nan",
    "../..",
    "{{ 1 }}",
    "<|im_end|>",
]
HOLDERS = [[], {}, [None], [[]], [0], [-1], [2**63], [""], [{}], {"": None}, {"a": {"a": []}}, [0] * 10_000]
WORDS = ["type", "rope_type", "factor", "content", "id", "special", "dtype", "shape", "data_offsets", "String", "Regex"]
"""Names within the parts of files, where a value of the right form hides one of the wrong kind."""

ADDED = {
    "config.json": (
        "attention_bias bos_token_id dtype eos_token_id head_dim hidden_act hidden_size intermediate_size is_causal"
        " layer_types max_position_embeddings mlp_bias num_attention_heads num_hidden_layers num_key_value_heads"
        " partial_rotary_factor quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window"
        " tie_word_embeddings torch_dtype use_sliding_window vocab_size model_type architectures n_embd n_head"
    ),
    "generation_config.json": (
        "bad_words_ids do_sample eos_token_id epsilon_cutoff eta_cutoff max_length max_new_tokens min_length"
        " min_new_tokens min_p no_repeat_ngram_size num_beams pad_token_id penalty_alpha repetition_penalty"
        " sequence_bias stop_strings suppress_tokens temperature top_h top_k top_p typical_p watermarking_config"
    ),
    "tokenizer_config.json": (
        "add_bos_token add_eos_token add_prefix_space added_tokens_decoder additional_special_tokens bos_token"
        " chat_template clean_up_tokenization_spaces eos_token extra_special_tokens model_max_length pad_token"
        " tokenizer_class unk_token"
    ),
    "tokenizer.json": "added_tokens decoder model normalizer padding post_processor pre_tokenizer truncation version",
    "topkapi.json": "format_version sha256 parent base_held_in note tokens",
    "special_tokens_map.json": "bos_token eos_token unk_token pad_token additional_special_tokens",
}
"""Fields that files of this name have somewhere, some of them beside others that contradict them."""

odd = st.one_of(*map(st.sampled_from, (NUMBERS, NOT_NUMBERS, TEXTS, HOLDERS, [None, True, False]))).map(deepcopy)
values = st.one_of(odd, st.dictionaries(st.sampled_from(WORDS), odd, max_size=3), st.lists(odd, max_size=3))


def _place(draw: Draw, content: Any) -> tuple[Any, Any]:
    """Some object or list within `content`, and one of its keys."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = draw(st.sampled_from(keys))
        inner = content[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.integers(0, 2)) == 0:
            return content, key
        content = inner


def _change(draw: Draw, name: str, content: dict[str, Any]) -> None:
    """Leave out, add, exchange or rename something in `content`."""
    if not content or draw(st.integers(0, 2)) == 0:
        content[draw(st.sampled_from(ADDED.get(name, "a").split()))] = draw(values)
        return
    holder, key = _place(draw, content)
    action = draw(st.sampled_from(("set", "set", "delete", "list", "text", "copy", "rename")))
    if action == "set":
        holder[key] = draw(values)
    elif action == "delete":
        del holder[key]
    elif action == "list":
        holder[key] = [holder[key]] * draw(st.sampled_from((1, 2, 1000)))
    elif action == "text":
        holder[key] = str(holder[key])
    else:
        other, at = _place(draw, content)
        if action == "copy":
            # By way of JSON, so that nothing comes to lie in itself.
            holder[key] = json.loads(json.dumps(other[at]))
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(TEXTS)) if other is holder else str(at)] = holder.pop(key)


def _written(draw: Draw, content: dict[str, Any]) -> bytes:
    """`content` as JSON, or nearly so."""
    text = json.dumps(content, ensure_ascii=draw(st.booleans()))
    way = draw(st.sampled_from(["as it is"] * 8 + ["twice", "nested", "cut", "more", "coded", "bytes", "digits"]))
    if way == "twice" and content:
        key = draw(st.sampled_from(list(content)))
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(draw(values))}}}"
    elif way == "nested":
        text = f'{text[:-1]}{", " if content else ""}"a": {NESTED}}}'
    elif way == "digits":
        text = f'{text[:-1]}{", " if content else ""}"vocab_size": {"9" * 5000}}}'
    elif way == "cut":
        text = text[: draw(st.integers(0, len(text)))]
    elif way == "more":
        text += draw(st.sampled_from(("}", "\n\n", "\0", "//", "[]", "\ufeff")))
    coded = text.encode("utf-8", "surrogatepass")
    if way == "coded":
        coded = text.encode(draw(st.sampled_from(("utf-8-sig", "utf-16", "utf-32", "latin-1"))), "replace")
    elif way == "bytes" and coded:
        at = draw(st.integers(0, len(coded) - 1))
        coded = coded[:at] + draw(st.binary(max_size=4)) + coded[at + draw(st.integers(0, 4)) :]
    return coded


@st.composite
def json_files(draw: Draw, name: str, original: bytes) -> bytes:
    """The JSON file `name` with one to three changes."""
    content = json.loads(original or b"{}")
    for _ in range(draw(st.integers(1, 3))):
        _change(draw, name, content)
    return _written(draw, content)


@st.composite
def safetensors_files(draw: Draw, original: bytes) -> bytes:
    """A file of weights whose header, or the length of either part, is changed."""
    (length,) = struct.unpack("<Q", original[:8])
    header, data = json.loads(original[8 : 8 + length]), original[8 + length :]
    for _ in range(draw(st.integers(0, 2))):
        holder, key = _place(draw, header)
        if key == "dtype":
            kinds = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4", 1]
            holder[key] = draw(st.sampled_from(kinds))
        elif holder is header and draw(st.booleans()):
            header[draw(st.sampled_from([*header, "lm_head.weight", "a"]))] = header.pop(key)
        else:
            holder[key] = draw(values)
    written = _written(draw, header)
    announced = len(written) + draw(st.sampled_from([0] * 8 + [-1, 1, 8, -8, 2**20, 2**40, 2**63]))
    data = data[: draw(st.sampled_from([None] * 6 + [0, 1, -1, -4]))] + bytes(
        draw(st.sampled_from([0] * 6 + [1, 4096]))
    )
    damaged = bytearray(struct.pack("<Q", max(0, announced)) + written + data)
    if draw(st.integers(0, 4)) == 0:  # numbers that are none, among the weights
        at = len(damaged) - draw(st.integers(1, max(1, len(data))))
        damaged[at : at + 4] = draw(st.sampled_from((b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\x80\x7f\x80\x7f")))
    return bytes(damaged)


@dataclass
class Entry:
    """One field of a GGUF file's metadata: its key, the number of its kind, and its value as Python has it."""

    key: bytes
    kind: int
    value: Any
    inner: int = 4


_PACKED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


class GGUF:
    """A GGUF file in parts that can be changed and written again, whatever they then say."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 4
        _version, tensors, fields = self._take("<IQQ")
        self.fields = [self._field() for _ in range(fields)]
        self.tensors = [self._tensor() for _ in range(tensors)]
        self.data = content[self._at + -self._at % 32 :]

    def _take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return found

    def _text(self) -> bytes:
        (length,) = self._take("<Q")
        self._at += length
        return self._content[self._at - length : self._at]

    def _value(self, kind: int) -> Any:
        return self._text() if kind == _TEXT else self._take("<" + _PACKED[kind])[0]

    def _field(self) -> Entry:
        key, (kind,) = self._text(), self._take("<I")
        if kind != _LIST:
            return Entry(key, kind, self._value(kind))
        inner, length = self._take("<IQ")
        return Entry(key, kind, [self._value(inner) for _ in range(length)], inner)

    def _tensor(self) -> list[Any]:
        name, (dimensions,) = self._text(), self._take("<I")
        return [name, list(self._take(f"<{dimensions}Q")), *self._take("<IQ")]

    def written(self, version: int = 3, more: int = 0) -> bytes:
        """The file; it announces `more` fields than it has."""
        parts = [b"GGUF", struct.pack("<IQQ", version, len(self.tensors), max(0, len(self.fields) + more))]
        for field in self.fields:
            parts += [_text(field.key), struct.pack("<I", field.kind)]
            if isinstance(field.value, list):
                parts += [struct.pack("<IQ", field.inner, len(field.value))]
                parts += [_packed(field.inner, each) for each in field.value]
            else:
                parts.append(_packed(field.kind, field.value))
        for name, sizes, kind, offset in self.tensors:
            parts += [_text(name), struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)]
        start = b"".join(parts)
        return start + bytes(-len(start) % 32) + self.data


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _packed(kind: int, value: Any) -> bytes:
    """The value in that kind, or as a text where it can't be one of them."""
    if kind not in _PACKED:
        return _text(value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass"))
    form = "<" + _PACKED[kind]
    try:
        return struct.pack(form, value)
    except (struct.error, OverflowError, TypeError):
        return bytes(struct.calcsize(form))


GGUF_KEYS = [
    "general.architecture",
    "general.file_type",
    "split.count",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.chat_template",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.scores",
    "general.sampling.temp",
    "general.sampling.top_k",
    "general.sampling.top_p",
    "qwen3.rope.scaling.type",
    "qwen3.rope.scaling.factor",
    "qwen3.rope.scale_linear",
    "qwen3.rope.freq_base",
    "qwen3.expert_count",
    "qwen3.attention.value_length",
    "qwen3.rope.dimension_count",
    "qwen3.attention.sliding_window",
]


@st.composite
def gguf_files(draw: Draw, original: bytes) -> bytes:
    """A GGUF file with some fields or tensors changed, left out, added or there twice."""
    file = GGUF(original)
    for _ in range(draw(st.integers(1, 3))):
        scalars = st.sampled_from([*NUMBERS, *NOT_NUMBERS, *TEXTS, True])
        field = draw(st.sampled_from(file.fields))
        action = draw(st.sampled_from(("value", "kind", "item", "delete", "twice", "add", "list", "tensor", "rename")))
        if action == "item" and isinstance(field.value, list) and field.value:
            field.value[draw(st.integers(0, len(field.value) - 1))] = draw(scalars)
        elif action == "list":
            field.kind, field.inner = _LIST, draw(st.sampled_from([*_PACKED, _TEXT, _LIST, 13]))
            field.value = [draw(scalars)] * draw(st.sampled_from((0, 1, 2, 512, 513)))
        elif action == "delete" and len(file.fields) > 1:
            file.fields.remove(field)
        elif action == "twice":
            file.fields.append(Entry(field.key, field.kind, draw(scalars) if draw(st.booleans()) else field.value))
        elif action == "add":
            kind = draw(st.sampled_from([*_PACKED, _TEXT]))
            file.fields.append(Entry(draw(st.sampled_from(GGUF_KEYS)).encode(), kind, draw(scalars)))
        elif action == "rename":
            field.key = draw(st.sampled_from([*(key.encode() for key in GGUF_KEYS), b"", b"\xff", b"a" * 70_000]))
        elif action == "tensor":
            tensor = draw(st.sampled_from(file.tensors))
            part = draw(st.integers(0, 3))
            sizes = st.lists(st.sampled_from([0, 1, 2, 16, 32, 64, 512, 2**31, 2**63]), max_size=5)
            names = [each[0] for each in file.tensors] + [b"rope_freqs.weight", b"output.weight", b"\xff", b""]
            kinds = [0, 1, 2, 3, 6, 8, 10, 14, 16, 24, 27, 30, 31, 34, 99, 2**32 - 1]
            offsets = [0, 1, 32, 64, 2**20, 2**40, 2**63]
            tensor[part] = draw((st.sampled_from(names), sizes, st.sampled_from(kinds), st.sampled_from(offsets))[part])
        else:
            field.kind = (
                draw(st.sampled_from([*_PACKED, _TEXT, 13, 99])) if action == "kind" else min(field.kind, _TEXT)
            )
            field.value = draw(scalars)
    written = file.written(
        draw(st.sampled_from([3] * 8 + [0, 1, 2, 4, 2**31])), draw(st.sampled_from([0] * 8 + [-1, 1]))
    )
    return written[: draw(st.sampled_from([None] * 8 + [0, 4, 24, 100, len(written) // 2]))]


def damaged(files: Mapping[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    """One of `files` by its name, and what becomes of it."""

    def of(name: str) -> st.SearchStrategy[bytes]:
        if name.endswith(".gguf"):
            return gguf_files(files[name])
        return safetensors_files(files[name]) if name.endswith(".safetensors") else json_files(name, files[name])

    return st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), of(name)))
