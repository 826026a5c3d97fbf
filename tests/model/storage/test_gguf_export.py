"""What is written as GGUF is the checkpoint: read back by Topkapi, by transformers, and by llama.cpp where it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import texts
from tests.tiny import tiny_model
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.families import FAMILIES
from topkapi.model.generation import generate
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.model.storage.gguf_vocabulary_export import plain_name, plain_template
from topkapi.model.text.added_tokens import added_token
from topkapi.model.text.pretokenize import LLAMA3_PATTERN, split_by
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.text.tokenizer_definition import byte_level_definition
from topkapi.service.commands.cli import main

pytest.importorskip("gguf", reason="the gguf extra is not installed")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Callable[..., Path]:
    def make(family: str, *, tokenizer: Tokenizer = tiny_tokenizer, **changes: Any) -> Path:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "context_length": 128}
        settings = {"vocab_size": tokenizer.vocab_size + 4, "end_token_ids": (tokenizer.end_token_id,), **sizes}
        model = tiny_model(family, **(settings | changes))
        return save_checkpoint(
            tmp_path_factory.mktemp("exported") / "tiny",  # transformers guesses by a file's name whether it is mistral
            model=model,
            tokenizer=tokenizer,
            chat=ChatTemplate.built_in("chatml"),
            generation={"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.5},
            details={},
        )

    return make


def export(source: Path, out: Path, kind: str = "f16") -> int:
    return main(["export", "gguf", str(source), str(out), "--type", kind])


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found = model(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0))
    return getattr(found, "logits", found)[0]


IDS = list(range(3, 90, 4))
# Of the largest logit: float16 keeps eleven bits, q8_0 seven and q4_0 three of each number.
TOLERANCE = {
    "f32": 1e-5,
    "f16": 4e-3,
    "bf16": 4e-2,
    "q8_0": 4e-2,
    "q6_k": 4e-2,
    "q5_k_m": 0.3,
    "q4_k_m": 0.4,
    "q4_0": 0.5,
}


# llama.cpp has no architecture for the others.
WRITTEN = [family for family, traits in FAMILIES.items() if traits.gguf]


# How weights are held has nothing to do with the family that holds them.
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=[] if family in ("gpt2", "qwen3") or kind == "f32" else pytest.mark.slow)
        for family in WRITTEN
        for kind in TOLERANCE
    ],
)
def test_a_file_reads_back_as_the_checkpoint(
    family: str, kind: str, checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    tied = {"tie_embeddings": family in ("gpt2", "qwen3", "gemma2")}
    source = checkpoint(family, **tied)
    assert export(source, tmp_path / "model.gguf", kind) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert "topkapi serve" in capsys.readouterr().out
    ours, back = load_checkpoint(source, dtype=torch.float32), load_checkpoint(tmp_path / "model.gguf")
    expected, found = logits(ours.model, IDS), logits(back.model, IDS)
    assert (expected - found).abs().max() < TOLERANCE[kind] * expected.abs().max()
    assert back.config.tie_embeddings is tied["tie_embeddings"]
    assert back.config.end_token_ids[0] == ours.config.end_token_ids[0]
    assert set(back.config.end_token_ids) == set(ours.config.end_token_ids)
    sampling = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.5, "repetition_range": 0}
    assert {name: back.generation[name] for name in sampling} == sampling
    for text in texts.ALL:
        assert back.tokenizer.encode(text) == ours.tokenizer.encode(text)
    turns = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b "}]
    assert back.chat is not None and ours.chat is not None
    for prompt in (True, False):
        assert (
            back.chat.encode(turns, back.tokenizer, add_generation_prompt=prompt).token_ids
            == ours.chat.encode(turns, ours.tokenizer, add_generation_prompt=prompt).token_ids
        )


@pytest.mark.parametrize("family", FAMILIES.keys() - set(WRITTEN))
def test_a_family_without_an_architecture_is_refused(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    assert export(checkpoint(family), tmp_path / "model.gguf", "f16") == 2
    assert f"llama.cpp has no architecture for the family {family}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Of the others it reads no files, or not all that is in them: test_gguf_families.py compares these as converted.
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    # Whatever the file says, it takes gpt2's feed-forward layers for four times the width and its context for 1024, and
    # qwen3's heads for 128 wide.
    sizes = {"gpt2": {"intermediate_size": 256, "context_length": 1024}, "qwen3": {"head_dim": 128}}.get(family, {})
    source = checkpoint(family, tie_embeddings=family == "gpt2", **sizes)
    export(source, tmp_path / "model.gguf", "f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found = theirs(torch.tensor([IDS])).logits[0]
    expected = logits(load_checkpoint(source, dtype=torch.float32).model, IDS)
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
# It computes no window in phi3.
@pytest.mark.parametrize("family", [family for family in WRITTEN if family != "phi3"])
def test_llama_cpp_says_the_same(family: str, kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    export(checkpoint(family), tmp_path / "model.gguf", kind)
    ours = load_checkpoint(tmp_path / "model.gguf", dtype=torch.float32)
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=128, n_threads=1, verbose=False)
    for text in ("The value of", "I'm 12,345 steps;  \n\n two"):
        ids = ours.tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ids
        theirs.reset()
        stream = theirs.generate(ids, temp=0, top_k=1, repeat_penalty=1.0)
        parameters = {"temperature": 0, "max_tokens": 16, "ignore_end_token": True}
        assert [next(stream) for _ in range(16)] == generate(ours.model, ids, parameters).token_ids


def test_rotary_scaling_and_biases_are_kept(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for number, changes in enumerate(
        (
            {
                "rope_scaling": LLAMA3_ROPE,
                "rope_theta": 500000.0,
                "qkv_bias": True,
                "output_bias": True,
                "mlp_bias": True,
            },
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        )
    ):
        source, out = checkpoint("llama", **changes), tmp_path / f"{number}.gguf"
        assert export(source, out, "f32") == 0
        expected, back = load_checkpoint(source).model, load_checkpoint(out)
        assert torch.allclose(logits(expected, IDS), logits(back.model, IDS), atol=1e-4)
        assert back.config.rope_scaling is not None
        assert back.config.rope_scaling["rope_type"] == changes["rope_scaling"]["rope_type"]  # type: ignore[index]


@pytest.mark.slow
def test_gpt2s_own_vocabulary_is_known_by_its_name(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    gpt2 = Tokenizer.gpt2()
    export(checkpoint("gpt2", tokenizer=gpt2, hidden_size=32, head_dim=8), tmp_path / "model.gguf", "q8_0")
    back = load_checkpoint(tmp_path / "model.gguf")
    assert all(back.tokenizer.encode(text) == gpt2.encode(text) for text in texts.ALL)
    assert back.tokenizer.definition["pre_tokenizer"]["type"] == "ByteLevel"


def test_rows_that_do_not_fill_a_block_are_float16(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("llama", hidden_size=40, intermediate_size=64, head_dim=10)
    assert export(source, tmp_path / "model.gguf", "q8_0") == 0
    expected, found = load_checkpoint(source).model, load_checkpoint(tmp_path / "model.gguf").model
    assert torch.allclose(logits(expected, IDS), logits(found, IDS), rtol=0.1, atol=1.0)


def test_the_template_loses_what_only_training_needs() -> None:
    source = "{% for m in messages %}x {%- generation -%} {{ m['content'] }} {% endgeneration +%}\n{% endfor %}"
    plain = plain_template(source)
    assert "generation" not in plain
    turns = [{"role": "user", "content": "a"}]
    assert ChatTemplate(plain).render(turns) == ChatTemplate(source).render(turns)


def sentencepiece(tokenizer: Tokenizer) -> Tokenizer:
    definition = dict(tokenizer.definition)
    definition["decoder"] = {"type": "Fuse"}
    return Tokenizer(definition, {"eos_token": "<|endoftext|>"})


def other_split(tokenizer: Tokenizer) -> Tokenizer:
    model = tokenizer.definition["model"]
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition = byte_level_definition(model["vocab"], model["merges"], pre, tokenizer.definition["added_tokens"])
    return Tokenizer(definition, {"eos_token": "<|endoftext|>"})


def changed(tokenizer: Tokenizer, model: dict[str, Any] | None = None, **changes: Any) -> Tokenizer:
    definition = {**tokenizer.definition, **changes}
    definition["model"] = {**tokenizer.definition["model"], **(model or {})}
    return Tokenizer(definition, {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"})


def with_added(tokenizer: Tokenizer, *entries: dict[str, Any]) -> Tokenizer:
    given = [added_token(e["content"], 512 + i, special=False) | e for i, e in enumerate(entries)]
    return changed(tokenizer, added_tokens=[*tokenizer.definition["added_tokens"], *given])


def template(*parts: str | None) -> dict[str, Any]:
    pieces = [{"Sequence": {"id": "A", "type_id": 0}} if part is None else {"SpecialToken": {"id": part, "type_id": 0}}
              for part in parts]  # fmt: skip
    ids = {"<|im_start|>": 510, "<|endoftext|>": 509, "<|im_end|>": 511}
    special = {part: {"id": part, "ids": [ids[part]], "tokens": [part]} for part in parts if part}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}


NFC = {"type": "NFC"}
UNLIKE = {
    "normalises them (NFC)": lambda t: changed(t, normalizer={"type": "Sequence", "normalizers": [NFC]}),
    "'<a>' has lstrip": lambda t: with_added(t, {"content": "<a>", "lstrip": True}),
    "'<a>' has rstrip": lambda t: with_added(t, {"content": "<a>", "rstrip": True}),
    "'<a>' has single_word": lambda t: with_added(t, {"content": "<a>", "single_word": True}),
    "'<a>' and '><b' overlap": lambda t: with_added(t, {"content": "<a>"}, {"content": "><b"}),
    "'ab' and 'bcd' overlap": lambda t: with_added(t, {"content": "ab"}, {"content": "bcd"}),
    "'xaby' and 'ab' overlap": lambda t: with_added(t, {"content": "xaby", "normalized": True}, {"content": "ab"}),
    "has a byte_fallback": lambda t: changed(t, {"byte_fallback": True}),
    "finds whole words": lambda t: changed(t, {"ignore_merges": True, "merges": t.definition["model"]["merges"][:-9]}),
    "TemplateProcessing puts more": lambda t: changed(t, post_processor=template("<|im_start|>", "<|im_end|>", None)),
    "BertProcessing puts more": lambda t: changed(
        t, post_processor={"type": "BertProcessing", "sep": ["<|im_end|>", 511], "cls": ["<|im_start|>", 510]}
    ),
}


@pytest.mark.parametrize("message", UNLIKE)
def test_what_would_change_ids_in_llama_cpp_is_refused(
    message: str, checkpoint: Callable[..., Path], tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: Any
) -> None:
    source = checkpoint("llama", tokenizer=UNLIKE[message](tiny_tokenizer))
    assert export(source, tmp_path / "model.gguf") == 2
    said = capsys.readouterr().err
    assert message in said and "llama.cpp" in said and not any(tmp_path.iterdir())


def test_what_changes_no_ids_is_written(
    checkpoint: Callable[..., Path], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    spellings = ({"content": "<abc>"}, {"content": "c>x"}, {"content": "bc", "normalized": True})
    source = checkpoint("llama", tokenizer=with_added(tiny_tokenizer, *spellings))
    assert export(source, tmp_path / "added.gguf") == 0
    # Merges that reach every entry find whole words too.
    whole = changed(
        tiny_tokenizer, {"ignore_merges": True, "dropout": 0.1}, post_processor=template(None, "<|endoftext|>")
    )
    assert export(checkpoint("llama", tokenizer=whole), tmp_path / "whole.gguf") == 0
    ends = gguf_fields(tmp_path / "whole.gguf")
    assert ends["tokenizer.ggml.add_eos_token"] is True and ends["tokenizer.ggml.add_bos_token"] is False
    definition = {**tiny_tokenizer.definition, "pre_tokenizer": split_by(LLAMA3_PATTERN)}
    for whole_words, name in ((True, "llama-bpe"), (False, "smaug-bpe")):
        definition["model"] = {**definition["model"], "ignore_merges": whole_words}
        source = checkpoint("llama", tokenizer=Tokenizer(definition, {"eos_token": "<|endoftext|>"}))
        assert export(source, tmp_path / f"{name}.gguf") == 0
        assert gguf_fields(tmp_path / f"{name}.gguf")["tokenizer.ggml.pre"] == name


def gguf_fields(path: Path) -> dict[str, Any]:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_named_templates_go_into_the_file_and_come_back(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = ChatTemplate("{% generation %}{{ messages[0].content }}{% endgeneration %}", None, {"tool_use": "tools"})
    model = tiny_model("llama", vocab_size=tiny_tokenizer.vocab_size)
    source = save_checkpoint(
        tmp_path / "several", model=model, tokenizer=tiny_tokenizer, chat=chat, generation={}, details={}
    )
    assert (own := load_checkpoint(source).chat) is not None and own.others == chat.others
    assert export(source, tmp_path / "several.gguf") == 0
    back = load_checkpoint(tmp_path / "several.gguf").chat
    assert back is not None and back.others == {"tool_use": "tools"} and back.source == plain_template(chat.source)


def test_llama_cpp_finds_no_flags_in_a_name() -> None:
    names = ["Phi-3-mini", "my-phi3", "modern-bert-x", "answers", "phi-2"]
    assert [plain_name(name) for name in names] == ["Phi 3-mini", "my-phi 3", "modern bert-x", "answers", "phi-2"]


def test_what_llama_cpp_has_no_form_for_is_refused(
    checkpoint: Callable[..., Path], tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out" / "model.gguf"
    assert export(checkpoint("llama"), out) == 2 and not out.parent.exists()
    assert f"there is no directory {out.parent}" in capsys.readouterr().err
    out.parent.mkdir()
    cases: list[tuple[Path, Path, str]] = [
        (checkpoint("llama", tokenizer=sentencepiece(tiny_tokenizer)), out, "only byte-level BPE"),
        (checkpoint("llama", tokenizer=other_split(tiny_tokenizer)), out, "no name for how this tokenizer splits"),
        (checkpoint("qwen3", qkv_bias=True, output_bias=True), out, "qwen3 has no biases"),
        (checkpoint("qwen2", rope_scaling=LLAMA3_ROPE), out, "qwen2 has no scaling of the type llama3"),
        (checkpoint("llama"), tmp_path / "model.bin", "must end in .gguf"),
        (tmp_path / "none", out, "there is no checkpoint"),
    ]
    model = tiny_model("llama", vocab_size=tiny_tokenizer.vocab_size)
    model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    large = save_checkpoint(
        tmp_path / "large", model=model, tokenizer=tiny_tokenizer, chat=None, generation={}, details={}
    )
    cases.append((large, out, "blk.0.ffn_up.weight holds numbers too large for float16"))
    for source, target, message in cases:
        assert export(source, target) == 2
        assert message in capsys.readouterr().err
        assert not any(out.parent.iterdir()), "nothing is left behind"
    assert export(large, out, "f32") == 0
    before = out.read_bytes()
    assert export(checkpoint("llama"), out) == 2
    assert "is there already" in capsys.readouterr().err and out.read_bytes() == before


def test_a_disk_that_is_full_leaves_nothing(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    source, out = checkpoint("llama"), tmp_path / "model.gguf"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    assert export(source, out, "q8_0") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
