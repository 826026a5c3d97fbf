"""Checkpoints of strangers: whatever they hold, a load ends soon, stays in its directory, and says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from topkapi.model.errors import CheckpointError, InvalidRequest
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.text.tokenizer_definition import byte_level_definition

Change = Callable[[Path], Any]


@pytest.fixture
def room(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A model directory with the checkpoint `tiny` in it, and `outside` beside the directory."""
    source = tiny_checkpoint("tiny")
    (tmp_path / "room").mkdir()
    for copy in ("room/tiny", "outside"):
        shutil.copytree(source, tmp_path / copy)
        (tmp_path / copy / "topkapi.json").unlink()
    return tmp_path / "room"


def write(name: str, content: Any) -> Change:
    return lambda path: (path / name).write_text(content if isinstance(content, str) else json.dumps(content))


def edit(name: str, **changes: Any) -> Change:
    return lambda path: (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | changes))


def index_of(content: Any) -> Change:
    """An index in place of the one file of weights, beside which it would not be read."""

    def change(path: Path) -> None:
        (path / "model.safetensors").unlink(missing_ok=True)
        write("model.safetensors.index.json", content)(path)

    return change


def index(*names: Any) -> Change:
    return index_of({"weight_map": {f"t{i}": name for i, name in enumerate(names)}})


def link(name: str, target: str) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)

    return change


def pipe(name: str) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return change


def sparse(name: str, start: bytes = b"") -> Change:
    def change(path: Path) -> None:
        with (path / name).open("wb") as file:
            file.write(start)
            file.truncate(1 << 40)

    return change


def adapter(**settings: Any) -> Change:
    def change(path: Path) -> None:
        for file in path.iterdir():
            file.unlink()
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
        save_file({"base_model.model.model.norm.weight": torch.ones(32)}, path / "adapter_model.safetensors")

    return change


def tokenizer(**parts: Any) -> Change:
    return edit("tokenizer.json", **parts)


def split_at(pattern: str) -> Change:
    return tokenizer(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    )


def spoil(path: Path, number: float) -> None:
    """One weight, of a token that no prompt has to hold."""
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1, -1] = number
    save_file(tensors, path / "model.safetensors")


def header(length: int, content: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + content


HUGE = b'{"a":{"dtype":"F32","shape":[274877906000],"data_offsets":[0,1099511624000]}}'
NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000
GROWING = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 12,
}

OUTSIDE: dict[str, Change] = {
    "weights by .. in the index": index("../../outside/model.safetensors"),
    "weights by an absolute path": index(os.path.abspath("/etc/passwd")),
    "weights in a directory beside": index("sub/../../../outside/model.safetensors"),
    "weights through a link": link("model.safetensors", "../../outside/model.safetensors"),
    "settings through a link": link("config.json", "../../outside/config.json"),
    "a tokenizer through a link": link("tokenizer.json", "../../outside/tokenizer.json"),
    "a template through a link": link("chat_template.jinja", "/etc/passwd"),
    "a device through a link": link("special_tokens_map.json", "/dev/zero"),
    "a file to digest by ..": write("topkapi.json", {"sha256": {"../../outside/config.json": "0"}}),
    "a file to digest by an absolute path": write("topkapi.json", {"sha256": {"/dev/zero": "0"}}),
    "a base by ..": adapter(base_model_name_or_path="../../outside"),
    "a base by an absolute path": adapter(base_model_name_or_path="/etc"),
    "a base that does not exist": adapter(base_model_name_or_path="/no/such/place"),
}

DAMAGED: dict[str, Change] = {
    "weight_map is a list": index_of({"weight_map": ["model.safetensors"]}),
    "weight_map holds numbers": index(1),
    "weight_map is empty": index(),
    "an index without weight_map": index_of({}),
    "an index that is no object": index_of("[]"),
    "an index of other files": index("other.safetensors"),
    "a deeply nested tokenizer": write("tokenizer.json", NESTED),
    "deeply nested settings": write("config.json", NESTED),
    "deeply nested defaults": write("generation_config.json", NESTED),
    "a deeply nested index": index_of(NESTED),
    "settings that are no text": lambda path: (path / "config.json").write_bytes(b"\xff\xfe"),
    "settings that are a list": write("config.json", "[1]"),
    "settings without end": sparse("config.json"),
    "a tokenizer without end": sparse("tokenizer.json"),
    "a template without end": sparse("chat_template.jinja"),
    "settings through a pipe": pipe("generation_config.json"),
    "weights through a pipe": pipe("model.safetensors"),
    "a pattern that backtracks": split_at(r"(x+x+)+y"),
    "a pattern that is none": split_at("("),
    "steps that grow": tokenizer(normalizer=GROWING),
    "no model": tokenizer(model=None),
    "a vocabulary of numbers": tokenizer(model={"type": "BPE", "vocab": {"a": "b"}, "merges": []}),
    "an id beyond": tokenizer(model={"type": "BPE", "vocab": {"a": 1 << 40}, "merges": []}),
    "added tokens that are none": tokenizer(added_tokens=[1]),
    "a tokenizer's settings that are a list": write("tokenizer_config.json", "[]"),
    "a template that does not end": edit("tokenizer_config.json", chat_template="{{ 'a' * 10 ** 10 }}"),
    "a template of 10^10 rounds": edit(
        "tokenizer_config.json",
        chat_template="{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    ),
    "a million layers": edit("config.json", num_hidden_layers=1_000_000_000),
    "a wide network": edit("config.json", hidden_size=10**9, head_dim=16),
    "a large vocabulary": edit("config.json", vocab_size=10**12),
    "a size that is a text": edit("config.json", hidden_size="32"),
    "a size that is a list": edit("config.json", num_hidden_layers=[2]),
    "a size that is none": edit("config.json", num_attention_heads=0),
    "rope that is a text": edit("config.json", rope_parameters="default"),
    "a hot temperature": write("generation_config.json", {"temperature": "hot"}),
    "a header without end": lambda path: (path / "model.safetensors").write_bytes(header(1 << 62)),
    "a header longer than the file": lambda path: (path / "model.safetensors").write_bytes(header(1 << 20, b"{}")),
    "a header that is none": lambda path: (path / "model.safetensors").write_bytes(header(2, b"[]")),
    "a header nested deeply": lambda path: (path / "model.safetensors").write_bytes(
        header(len(NESTED), NESTED.encode())
    ),
    "an empty file of weights": lambda path: (path / "model.safetensors").write_bytes(b""),
    "a header with a long name": lambda path: (path / "model.safetensors").write_bytes(
        header(100_010, json.dumps({"a": "x" * 100_002}).encode())
    ),
    "a number that is none": lambda path: spoil(path, torch.nan),
    "an infinite number": lambda path: spoil(path, -torch.inf),
    "a terabyte of nothing": sparse("model.safetensors"),
    "a terabyte of one tensor": lambda path: (
        sparse("model.safetensors", header(len(HUGE) + 3, HUGE + b"   "))(path),
        os.truncate(path / "model.safetensors", 8 + len(HUGE) + 3 + 1099511624000),
    ),
    "digests that are a list": write("topkapi.json", {"sha256": ["config.json"]}),
    "a version that is a text": write("topkapi.json", {"format_version": "new"}),
    "an adapter of itself": adapter(base_model_name_or_path="."),
    "an adapter's base that is a number": adapter(base_model_name_or_path=1),
    "an adapter's pattern that backtracks": lambda path: (
        adapter(base_model_name_or_path="../tiny2", alpha_pattern={"(a+)+b": 1, r"(\w+\s?)+$!": 2})(path),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", OUTSIDE.values(), ids=OUTSIDE)
def test_nothing_outside_the_directory_is_read(change: Change, room: Path) -> None:
    change(room / "tiny")
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(room / "tiny", within=room)
    message = refused.value.message
    assert "leads out of the directory" in message or "not the plain name of a file" in message
    assert str(room / "tiny") in message


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_what_cannot_be_loaded_is_refused_and_named(change: Change, room: Path) -> None:
    change(room / "tiny")
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(room / "tiny", within=room)
    assert str(room / "tiny") in refused.value.message
    assert len(refused.value.message) < 1000


def test_what_lies_within_may_be_links_and_adapters(room: Path) -> None:
    tiny, linked, adapted = room / "tiny", room / "linked", room / "adapted"
    linked.mkdir()
    for file in tiny.iterdir():
        (linked / file.name).symlink_to(os.path.relpath(file, linked))
    assert load_checkpoint(linked, within=room).tokenizer.vocab_size == 512
    adapted.mkdir()
    adapter(base_model_name_or_path="../tiny")(adapted)
    with pytest.raises(CheckpointError, match="which is not there"):
        load_checkpoint(adapted)  # from the command line a base is found from the working directory
    assert load_checkpoint(adapted, within=room).config.num_layers == 2
    adapter(base_model_name_or_path=str(room.parent / "outside"))(adapted)
    assert load_checkpoint(adapted).config.num_layers == 2
    with pytest.raises(CheckpointError, match="leads out"):
        load_checkpoint(adapted, within=room)


def test_weights_of_several_files_are_found_by_their_index(room: Path) -> None:
    tensors = load_file(room / "tiny" / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, room / "tiny" / f"part-{number}.safetensors")
    (room / "tiny" / "model.safetensors").unlink()
    index("part-0.safetensors", "part-1.safetensors")(room / "tiny")
    assert load_checkpoint(room / "tiny", within=room).config.num_layers == 2


def test_memory_that_is_not_there_is_not_asked_for(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topkapi.model.reading._free_memory", lambda: 1000)
    with pytest.raises(CheckpointError, match="GiB of memory"):
        load_checkpoint(room / "tiny", within=room)
    assert load_checkpoint(room / "tiny")


def test_a_pattern_that_fails_on_a_text_is_an_error_of_that_request() -> None:
    """The library panics there, which is no `Exception`."""
    vocabulary = {chr(code): code - 32 for code in range(32, 127)}
    pattern = {"type": "Split", "pattern": {"Regex": r"(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer(byte_level_definition(vocabulary, [], pattern, []))
    assert tokenizer.encode("fine")
    with pytest.raises(InvalidRequest, match="the checkpoint's tokenizer fails on this text"):
        tokenizer.encode("x" * 40)
    assert tokenizer.encode("fine")


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


ARCHITECTURE = gguf_string("general.architecture") + struct.pack("<I", 8) + gguf_string("llama")


def gguf(tensors: int, fields: int, *content: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(content)


def gguf_list(kind: int, length: int) -> bytes:
    return gguf_string("a") + struct.pack("<IIQ", 9, kind, length)


def gguf_tensor(*sizes: int, offset: int = 0, dimensions: int | None = None) -> bytes:
    shape = struct.pack("<I", len(sizes) if dimensions is None else dimensions) + struct.pack(f"<{len(sizes)}Q", *sizes)
    return gguf_string("token_embd.weight") + shape + struct.pack("<IQ", 0, offset)


@pytest.mark.parametrize(
    "content",
    {
        "fields": gguf(0, 1 << 60, ARCHITECTURE),
        "tensors": gguf(1 << 60, 1, ARCHITECTURE),
        "a long name": gguf(0, 1, struct.pack("<Q", 1 << 62)),
        "a long text": gguf(0, 1, gguf_string("a"), struct.pack("<IQ", 8, 1 << 60)),
        "a long list": gguf(0, 1, gguf_list(4, 1 << 60)),
        "lists of lists": gguf(0, 1, gguf_string("a"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 50_000),
        "a wide tensor": gguf(1, 1, ARCHITECTURE, gguf_tensor(1 << 33, 1 << 33)),
        "sizes that run over": gguf(1, 1, ARCHITECTURE, gguf_tensor(1 << 63, 2)),
        "dimensions": gguf(1, 1, ARCHITECTURE, gguf_tensor(4, 4, dimensions=1 << 31)),
        "a place beyond the end": gguf(1, 1, ARCHITECTURE, gguf_tensor(4, offset=1 << 60)),
        "an unknown kind": gguf(0, 1, gguf_string("a"), struct.pack("<I", 99)),
        "a list for a name": gguf(0, 1, gguf_string("general.architecture"), struct.pack("<IIQ", 9, 4, 2), bytes(8)),
        "a text for a number": gguf(
            0, 2, ARCHITECTURE, gguf_string("split.count"), struct.pack("<I", 8), gguf_string("x")
        ),
        "a name without letters": gguf(0, 1, gguf_string(""), struct.pack("<II", 4, 1)),
        "a name that is no text": gguf(0, 1, struct.pack("<Q", 2), b"\xff\xfe", struct.pack("<II", 4, 1)),
        "nothing": b"",
        "its first word": b"GGUF",
    }.items(),
    ids=lambda named: named[0],
)  # fmt: skip
@pytest.mark.parametrize("large", [False, True], ids=["as it is", "with a terabyte of nothing"])
def test_a_gguf_file_may_announce_what_it_likes(content: tuple[str, bytes], large: bool, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content[1])
    if large:
        os.truncate(file, 1 << 40)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(file)
    assert str(file) in refused.value.message
