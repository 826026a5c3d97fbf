"""K-quants: read back by the gguf package, as near as their bits allow, and chosen per tensor as llama.cpp chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tiny import tiny_config
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.storage.gguf_export import GGUF_TYPES, kind_of
from topkapi.model.storage.gguf_quantise import K_QUANTS, quantise
from topkapi.service.commands.cli import main
from topkapi.training import export

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

# Of normally distributed numbers, the root mean square of the error in standard deviations; llama.cpp's own is the same
# to three digits.
ERROR = {"Q4_K": 0.0725, "Q5_K": 0.0365, "Q6_K": 0.0180}
BITS = {"Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}


def back(data: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    found: NDArray[np.float32] = gguf.dequantize(quantise(data, kind), gguf.GGMLQuantizationType[kind])
    assert found.shape == data.shape
    return found


@pytest.mark.parametrize("kind", K_QUANTS)
def test_numbers_come_back_as_near_as_their_bits_allow(kind: str) -> None:
    data = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    assert quantise(data, kind).size * 8 == data.size * BITS[kind]
    # Much smaller ones have scales below what half precision holds in full.
    for scale in (1, 0.03, 300):
        error = back(scale * data, kind) - scale * data
        assert np.sqrt(np.square(error).mean()) < ERROR[kind] * scale
    # No number is further off than a step of its part, which spans what its largest numbers do.
    parts = data.reshape(-1, 16 if kind == "Q6_K" else 32)
    levels = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63}[kind]
    span = 2 * np.abs(parts).max(-1) if kind == "Q6_K" else parts.max(-1) - np.minimum(parts.min(-1), 0)
    furthest = np.abs(back(data, kind).reshape(parts.shape) - parts).max(-1)
    assert (furthest <= 1.2 * span / levels).all()


@pytest.mark.parametrize("kind", K_QUANTS)
def test_odd_blocks_come_back(kind: str) -> None:
    draw = np.random.default_rng(1).random((1, 256)).astype(np.float32)
    rows = {
        "zeros": 0 * draw, "one number": 0 * draw + 0.25, "one negative number": 0 * draw - 0.25,
        "positive": draw, "negative": -draw, "tiny": 1e-30 * draw, "a spike": np.eye(1, 256, 7, dtype=np.float32) * 9,
    }  # fmt: skip
    for name, row in rows.items():
        found = back(row, kind)
        assert np.isfinite(found).all(), name
        assert np.abs(found - row).max() <= max(0.08 * np.abs(row).max(), 1e-7), name


def test_a_row_does_not_depend_on_the_others() -> None:
    data = np.random.default_rng(2).standard_normal((40, 512)).astype(np.float32)
    for kind in K_QUANTS:
        together = quantise(data, kind)
        assert all((quantise(row[None], kind) == together[at]).all() for at, row in enumerate(data))


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_types_are_llama_cpps(kind: str) -> None:
    """What `llama-quantize` makes of networks of 8 and 30 layers, written down from its output."""

    def chosen(name: str, columns: int, layers: int, *, tied: bool) -> str:
        config = tiny_config(num_layers=layers, tie_embeddings=tied)
        return kind_of(config, name, np.broadcast_to(np.float32(0), (4, columns)), kind)  # type: ignore[arg-type]

    more = {"q4_k_m": "Q6_K", "q5_k_m": "Q6_K"}.get(kind)
    usual = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"}.get(kind, kind.upper())
    sensitive = {8: {0, 3, 6, 7}, 30: {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}}
    for layers, with_more in sensitive.items():
        for layer in range(layers):
            for part in ("attn_v", "ffn_down", "attn_qkv"):
                found = chosen(f"blk.{layer}.{part}.weight", 512, layers, tied=True)
                assert found == (more if more and layer in with_more else usual), (layer, part)
            for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
                assert chosen(f"blk.{layer}.{part}.weight", 512, layers, tied=True) == usual
    large = {"q4_0": "Q8_0", "q4_k_m": "Q6_K", "q5_k_m": "Q6_K"}.get(kind, usual)
    assert chosen("output.weight", 512, 8, tied=False) == chosen("token_embd.weight", 512, 8, tied=True) == large
    assert chosen("token_embd.weight", 512, 8, tied=False) == ("Q8_0" if kind == "q4_0" else usual)
    # 576 columns, as SmolLM2 has them, are no multiple of 256; 40 not even of 32.
    smaller = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    assert chosen("blk.1.attn_q.weight", 576, 8, tied=True) == smaller.get(usual, usual)
    assert chosen("blk.1.attn_q.weight", 40, 8, tied=True) == ("F16" if usual.startswith("Q") else usual)
    config = tiny_config()
    assert kind_of(config, "blk.0.attn_norm.weight", np.zeros(4, np.float32), kind) == "F32"  # type: ignore[arg-type]
    assert kind_of(config, "position_embd.weight", np.zeros((4, 256), np.float32), kind) == "F32"  # type: ignore[arg-type]


def test_the_flags_are_the_types() -> None:
    assert export.GGUF_TYPES == GGUF_TYPES


def test_a_file_of_k_quants_is_served_from_its_blocks(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Rows of 256 numbers keep their blocks; what is read back is what they say."""
    import torch

    from tests.tiny import tiny_model
    from topkapi.model.storage.checkpoint import save_checkpoint

    tokenizer = load_checkpoint(tiny_checkpoint("wide")).tokenizer
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_layers": 8}
    model = tiny_model("qwen3", vocab_size=tokenizer.vocab_size, scale=1.0, **sizes)
    source = save_checkpoint(tmp_path / "wide", model=model, tokenizer=tokenizer, chat=None, generation={}, details={})
    assert main(["export", "gguf", str(source), str(tmp_path / "wide.gguf"), "--type", "q4_k_m"]) == 0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "wide.gguf").tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.ffn_down.weight"], kinds["blk.1.ffn_down.weight"]) == (
        "Q6_K", "Q6_K", "Q4_K",
    )  # fmt: skip
    found = load_checkpoint(tmp_path / "wide.gguf", dtype=torch.float32).model
    weight, stored = model.layers[1].mlp.down_proj.weight, found.layers[1].mlp.down_proj.weight
    expected = back(weight.numpy(), "Q4_K")
    assert np.abs(stored.numpy() - expected).max() < 1e-6
    assert float((stored - weight).norm() / weight.norm()) < 0.08


def test_numbers_that_no_scale_holds_are_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from tests.tiny import tiny_model
    from topkapi.model.errors import CheckpointError
    from topkapi.model.storage.checkpoint import Checkpoint
    from topkapi.model.storage.gguf_export import export_gguf

    tokenizer = load_checkpoint(tiny_checkpoint("huge")).tokenizer
    model = tiny_model("qwen3", vocab_size=tokenizer.vocab_size)
    model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    checkpoint = Checkpoint("huge", tmp_path, model.config, model, tokenizer)
    for kind in ("f16", "q8_0", "q4_k_m"):
        with pytest.raises(CheckpointError, match="too large for float16"):
            export_gguf(checkpoint, tmp_path / "huge.gguf", kind)  # type: ignore[arg-type]
    export_gguf(checkpoint, tmp_path / "huge.gguf", "bf16")


def test_what_narrow_matrices_became_is_said(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_checkpoint("narrow")
    assert main(["export", "gguf", str(path), str(tmp_path / "narrow.gguf"), "--type", "q4_k_m"]) == 0
    said = capsys.readouterr().out
    reader = gguf.GGUFReader(tmp_path / "narrow.gguf")
    kinds = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1]
    assert f"{kinds.count('Q5_0')} Q5_0" in said and "where rows are no multiple of 256" in said
    assert main(["export", "gguf", str(path), str(tmp_path / "plain.gguf"), "--type", "f32"]) == 0
    assert f"matrices: {len(kinds)} F32\n" in capsys.readouterr().out
