"""GGUF's blocks in the native core: the same weights as dequantised, the same bits on every instruction set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import texts
from tests.model.storage.test_gguf import SPECIAL, VOCABULARY, Q, gguf, reference_model, write
from tests.tiny import tiny_model
from topkapi.model import native
from topkapi.model.cache import SlotCache, Work, outputs, read, wanted_logits
from topkapi.model.linear import Linear
from topkapi.model.serving import prepare, reading
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.storage.gguf_blocks import KINDS, Blocks
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native core was not built: there was no compiler")

SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 101, "tie_embeddings": True,
}  # fmt: skip
# Where the halves lie that are multiplied with everything in a block.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2],
          "Q6_K": [208]}  # fmt: skip


def random_blocks(kind: str, outputs: int, inputs: int, generator: np.random.Generator) -> Blocks:
    """Blocks of random bytes, whose scales make weights of about the usual size."""
    block, width = gguf.GGML_QUANT_SIZES[Q[kind]]
    rows = generator.integers(0, 256, (outputs, inputs // block, width), dtype=np.uint8)
    if kind == "Q8_0":
        rows[rows == 128] = 129  # which no quantiser writes
    for index, at in enumerate(HALVES[kind]):
        large = 16 * 16 if kind == "Q6_K" else 40 if kind in ("Q4_K", "Q5_K") else 1
        halves = generator.normal(0, 0.3 / large, (outputs, inputs // block)).astype(np.float16)
        halves = halves / (127 if kind == "Q8_0" else 1 if index and large == 1 else 15)
        rows[:, :, at : at + 2] = halves.astype(np.float16)[..., None].view(np.uint8)
    return Blocks(kind, inputs, rows.reshape(outputs, -1))


def models(kind: str) -> tuple[Decoder, Decoder]:
    """A network with dequantised matrices, and the same with blocks in their place."""
    plain, held = tiny_model("llama", **SHAPE), tiny_model("llama", **SHAPE)
    generator = np.random.default_rng(5)
    for name, module in plain.named_modules():
        if not isinstance(module, Linear | nn.Embedding) or name == "lm_head":
            continue
        blocks = random_blocks(kind, *module.weight.shape, generator)
        values = gguf.dequantize(blocks.rows, Q[kind])
        module.weight.data.copy_(torch.from_numpy(values).reshape(module.weight.shape))
        for own in (name, *(["lm_head"] if name == "embed_tokens" else [])):
            held.get_submodule(own).blocks = blocks  # type: ignore[assignment]
    return plain, held


def logits(model: Decoder, token_ids: list[int]) -> Tensor:
    works = [Work(0, 0, token_ids, wanted=len(token_ids))]
    return wanted_logits(model, read(model, SlotCache(model), works))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([texts.JOINED] * 2, VOCABULARY, SPECIAL)


def text(length: int = 33) -> list[int]:
    return torch.randint(101, (length,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_weights_that_they_stand_for(kind: str) -> None:
    plain, held = models(kind)
    expected = logits(plain, text())
    native.hold(held, "float32")
    assert held.held_in == kind
    # K-quants' own scales are rounded to half precision.
    assert (logits(held, text()) - expected).norm() / expected.norm() < (1e-2 if kind.endswith("K") else 2e-3)
    # Below the first layer stand the embedding's rows, which are not rounded.
    (found,) = outputs(held, SlotCache(held), [Work(0, 0, text(), wanted=33, layers=(0,))])
    core = held.core
    assert core is not None
    _, states = core.run(SlotCache(held).native, [(0, 0, text())], [0])  # type: ignore[arg-type]
    rows = plain.embed_tokens.weight[text()]
    exact = kind not in ("Q4_K", "Q5_K", "Q6_K")
    torch.testing.assert_close(states, rows, rtol=1e-6 if exact else 1e-3, atol=0 if exact else 1e-3)
    assert found.early.shape == (1, 33, 101)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_are_the_same_on_every_processor_and_in_every_chunk(kind: str) -> None:
    _, reference = models(kind)
    native.hold(reference, "float32", level="scalar", threads=1)
    expected = logits(reference, text())
    for level in native.levels():
        _, held = models(kind)
        native.hold(held, "float32", level=level, threads=2)
        assert torch.equal(logits(held, text()), expected), level
        cache = SlotCache(held, 2)
        parts = [read(held, cache, [Work(1, 0, text()[:20], wanted=20)])]
        parts += [read(held, cache, [Work(0, 0, [3]), Work(1, at, text()[at : at + 1])])[1:] for at in range(20, 33)]
        assert torch.equal(wanted_logits(held, torch.cat(parts)), expected), level


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "F32"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gpt2"])
def test_a_file_is_computed_in_its_blocks(name: str, kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    write(tmp_path / "tiny.gguf", reference_model(name), definition, Q[kind])
    plain = load_checkpoint(tmp_path / "tiny.gguf", dtype=torch.float32).model
    served = load_checkpoint(tmp_path / "tiny.gguf", **reading("auto")).model
    prepare(served)
    assert served.held_in == ("float32" if kind.startswith("F") else kind)
    matrices = [module.weight for module in served.modules() if isinstance(module, Linear | nn.Embedding)]
    assert all(weight.is_meta for weight in matrices)
    expected = logits(plain, text())
    assert (logits(served, text()) - expected).norm() / expected.norm() < (1e-5 if kind.startswith("F") else 2e-3)
