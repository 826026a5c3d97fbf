"""Weights as they lie on disk: which of several files and forms is loaded, and what each stored type is held in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model
from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES
from topkapi.model.quantize import int8_product
from topkapi.model.serving import prepare
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.model.text.tokenizer import Tokenizer

IDS = torch.tensor([[5, 17, 3, 250, 99, 4, 4, 130]])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a few words, a few words"], 258, ["<|endoftext|>"])


def make(folder: Path, tokenizer: Tokenizer, family: Any = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint as others write it: without our digests."""
    model = tiny_model(family, seed=seed, vocab_size=260, **changes)
    save_checkpoint(folder, model=model, tokenizer=tokenizer, chat=None, generation={}, details={})
    (folder / "topkapi.json").unlink()
    return folder


def ours(path: Path, **options: Any) -> torch.Tensor:
    model = load_checkpoint(path, **options).model
    with torch.no_grad():
        return model(IDS, torch.arange(IDS.shape[1]).unsqueeze(0))


def theirs(path: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


def assert_the_same(path: Path) -> None:
    expected = theirs(path)
    assert (ours(path) - expected).abs().max() <= 1e-4 * expected.abs().max()


def configure(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_a_file_that_is_overwritten_in_place_changes_no_network_that_is_served(
    tmp_path, tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr("topkapi.model.serving.native.can_hold", lambda model: False)
    path = make(tmp_path / "checkpoint", tokenizer)
    model = load_checkpoint(path).model
    prepare(model)
    positions = torch.arange(IDS.shape[1]).unsqueeze(0)
    with torch.no_grad():
        before = model(IDS, positions)
        with (path / "model.safetensors").open("r+b") as file:
            file.write(b"\xff" * (path / "model.safetensors").stat().st_size)
        assert torch.equal(model(IDS, positions), before)


# The output matrix


@pytest.mark.parametrize("family", FAMILIES)
def test_another_output_matrix_is_used_though_the_file_says_tied(
    family: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = make(tmp_path / "checkpoint", tokenizer, family, tie_embeddings=False)
    untied = ours(path)
    configure(path, tie_word_embeddings=True)
    assert_the_same(path)
    loaded = load_checkpoint(path)
    assert torch.equal(ours(path), untied)
    assert not loaded.config.tie_embeddings and not loaded.model.config.tie_embeddings
    save_checkpoint(tmp_path / "again", model=loaded.model, tokenizer=tokenizer, chat=None, generation={}, details={})
    assert torch.equal(ours(tmp_path / "again"), untied)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_matrix_stored_twice_is_one(family: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = make(tmp_path / "checkpoint", tokenizer, family)
    expected = ours(path)
    tensors = load_file(path / "model.safetensors")
    embedding = next(
        name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))
    )
    save_file(tensors | {"lm_head.weight": tensors[embedding].clone()}, path / "model.safetensors", {"format": "pt"})
    assert load_checkpoint(path).config.tie_embeddings
    assert torch.equal(ours(path), expected)
    # The embedding alone under the output matrix's name.
    tensors["lm_head.weight"] = tensors.pop(embedding)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert_the_same(path)
    assert torch.equal(ours(path), expected)


def test_an_adapter_on_a_matrix_that_is_stored_twice_changes_both(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import peft

    path = make(tmp_path / "base", tokenizer)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5], init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(IDS).logits
    found = ours(tmp_path / "adapter", base=path)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_missing_output_matrix_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = make(tmp_path / "checkpoint", tokenizer)
    configure(path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        load_checkpoint(path)


# Several files, several names


def shard(path: Path, sizes: tuple[int, ...] = (5,)) -> dict[str, torch.Tensor]:
    """Move the weights of `model.safetensors` to two files with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [names[: sizes[0]], names[sizes[0] :]]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, path / file, {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_one_file_is_read_rather_than_parts_as_in_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = make(tmp_path / "parts", tokenizer, seed=1)
    shard(path)
    parts = ours(path)
    assert_the_same(path)
    whole = make(tmp_path / "whole", tokenizer, seed=2)
    (path / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    assert_the_same(path)
    assert torch.equal(ours(path), ours(whole)) and not torch.equal(ours(path), parts)


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "original/model.safetensors"]
)
def test_other_files_beside_are_not_read(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = make(tmp_path / "checkpoint", tokenizer)
    expected = ours(path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(b"something else")
    assert_the_same(path)
    assert torch.equal(ours(path), expected)


def test_names_without_their_prefix_are_the_same_tensors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for family, prefix in (("llama", "model."), ("gpt2", "transformer.")):
        path = make(tmp_path / family, tokenizer, family)
        expected = ours(path)
        tensors = load_file(path / "model.safetensors")
        bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        save_file(bare, path / "model.safetensors", {"format": "pt"})
        assert_the_same(path)
        assert torch.equal(ours(path), expected)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = make(tmp_path / "prefixes", tokenizer)
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"norm.weight": torch.ones(32)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"norm\.weight twice"):
        load_checkpoint(path)
    path = make(tmp_path / "shards", tokenizer)
    tensors = shard(path)
    again = load_file(path / "model-00002-of-00002.safetensors")
    first = sorted(tensors)[0]
    save_file(again | {first: tensors[first]}, path / "model-00002-of-00002.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="twice"):
        load_checkpoint(path)
    path = make(tmp_path / "head", tokenizer)
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"model.lm_head.weight": torch.ones(260, 32)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unknown model\.lm_head\.weight"):
        load_checkpoint(path)


def test_an_adapter_beside_whole_weights_is_ambiguous(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """transformers would load the adapter's base and merge it, and leave the whole weights unread."""
    path = make(tmp_path / "checkpoint", tokenizer)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(path)}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="an adapter beside whole weights"):
        load_checkpoint(path)


def test_an_adapter_may_lie_beside_its_bases_config(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import peft

    base = make(tmp_path / "base", tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").write_bytes((base / "config.json").read_bytes())
    with torch.no_grad():
        expected = adapted(IDS).logits
    found = ours(tmp_path / "adapter", base=base)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_bias_that_config_json_denies_is_not_dropped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = make(tmp_path / "checkpoint", tokenizer, "gpt2")
    configure(path, qkv_bias=False)
    tensors = load_file(path / "model.safetensors")
    load_checkpoint(path)
    tensors["transformer.h.1.attn.c_attn.bias"][3] = 0.5
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"h\.1\.attn\.c_attn\.bias is not zero"):
        load_checkpoint(path)


def has_int8() -> bool:
    """Whether this processor has an exact product of int8 matrices."""
    try:
        int8_product("cpu")
    except CheckpointError:
        return False
    return True


# What a type is held in

HELD = {
    # stored: without --dtype on a CPU, and with --dtype float32, bfloat16
    "float64": ("float32", "float32", "bfloat16"),
    "float32": ("float32", "float32", "bfloat16"),
    "bfloat16": ("bfloat16", "float32", "bfloat16"),
    "float16": ("float32", "float32", "bfloat16"),
}


@pytest.mark.parametrize("called", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", HELD)
def test_what_is_stored_decides_what_matrices_are_held_in(
    stored: str, called: str | None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = make(tmp_path / "checkpoint", tokenizer)
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor.to(getattr(torch, stored)) for name, tensor in tensors.items()}
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("dtype")
    for spelling in ("dtype", "torch_dtype"):
        (path / "config.json").write_text(json.dumps(config | ({spelling: called} if called else {})))
        for dtype, held in zip((None, torch.float32, torch.bfloat16), HELD[stored], strict=True):
            model = load_checkpoint(path, dtype=dtype).model
            assert {p.dtype for p in model.parameters() if p.ndim == 2} == {getattr(torch, held)}
            assert {p.dtype for p in model.parameters() if p.ndim == 1} == {torch.float32}
            assert model.held_in == held
    if has_int8():
        assert load_checkpoint(path, dtype=torch.int8).model.held_in == "int8"


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32", "bool"])
def test_types_that_are_not_computed_with_are_refused_by_name(
    stored: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = make(tmp_path / "checkpoint", tokenizer)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(getattr(torch, stored))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for dtype in (None, torch.float32, *([torch.int8] if has_int8() else [])):
        with pytest.raises(CheckpointError, match=rf"layers\.1\.mlp\.up_proj\.weight is stored as {stored}"):
            load_checkpoint(path, dtype=dtype)


def test_end_tokens_that_no_token_has_are_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = make(tmp_path / "checkpoint", tokenizer)
    configure(path, eos_token_id=[-1, 7, 9999])
    assert load_checkpoint(path).config.end_token_ids == (7, tokenizer.end_token_id)
