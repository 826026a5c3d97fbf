"""int8 and packed matrices: what they compute, what they hold, and what they cost in quality."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import skip_without_int8, tiny_model
from topkapi.model import quantize as quantize_module
from topkapi.model.errors import CheckpointError
from topkapi.model.invariance import calibrate
from topkapi.model.linear import Linear
from topkapi.model.packing import can_pack, pack
from topkapi.model.quantize import BlockedInt8, Int8Product, PlainInt8, int8_product, quantize, quantized
from topkapi.model.scoring import score
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.service.commands.cli import main

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "topkapi-base"
SIZES = [(64, 64), (33, 70), (512, 96), (40, 3072)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def is_exact(make_product: type[Int8Product]) -> bool:
    """What the machine's own trial says; sums in 16 bits saturate on processors without VNNI."""
    try:
        return quantize_module._is_exact(make_product, torch.device("cpu"))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def test_a_quantized_row_is_within_half_a_step() -> None:
    rows = normal(20, 50) * torch.logspace(-20, 20, 20).unsqueeze(-1)
    integers, scales = quantized(rows)
    assert integers.dtype == torch.int8
    assert integers.abs().amax(dim=-1).tolist() == [127] * 20
    assert bool(((integers * scales - rows).abs() <= scales * 0.501).all())


def test_rows_of_zeros_stay_zeros_and_damage_shows() -> None:
    skip_without_int8()
    product = int8_product("cpu")(normal(8, 16), torch.ones(8))
    rows = torch.zeros(4, 16)
    rows[1, 3], rows[2, 3], rows[3, 3] = torch.nan, torch.inf, 1e-42
    result = product(rows)
    assert torch.equal(result[0], torch.ones(8))
    assert bool(result[1].isnan().all())
    assert not bool(result[2].isfinite().any())
    assert bool(result[3].isfinite().all())


@pytest.mark.parametrize("make_product", [BlockedInt8, PlainInt8])
@pytest.mark.parametrize("inputs,outputs", SIZES)
def test_the_product_is_that_of_the_integers(make_product: type[Int8Product], inputs: int, outputs: int) -> None:
    """Exact in every row count, so both ways of multiplying give the same bits."""
    if not is_exact(make_product):
        pytest.skip(f"{make_product.__name__} is not exact on this processor, which uses it for nothing")
    weight, bias, rows = normal(outputs, inputs), normal(outputs, seed=1), normal(70, inputs, seed=2)
    (matrix, matrix_scales), (integers, scales) = quantized(weight), quantized(rows)
    exact = (integers.double() @ matrix.double().t()).float()
    expected = (exact * matrix_scales.view(-1)).mul_(scales).add_(bias)
    product = make_product(weight, bias)
    for count in (1, 2, 3, 17, 70):
        assert torch.equal(product(rows[:count]), expected[:count]), count
    relative = (expected - (rows @ weight.t() + bias)).norm() / (rows @ weight.t()).norm()
    assert relative < 0.02


def test_two_bytes_keep_what_an_outlier_drowns() -> None:
    skip_without_int8()
    weight, rows = normal(30, 64), normal(9, 64, seed=3)
    rows[:, 5] = 500.0
    exact = rows @ weight.t()
    make_product = int8_product("cpu")
    errors = [(make_product(weight, None, two_bytes=two)(rows) - exact).norm() for two in (False, True)]
    # What is left with two bytes is the matrix's own rounding.
    integers, scales = quantized(weight)
    own = (rows @ (integers * scales).t() - exact).norm()
    assert errors[1] < 1.05 * own < errors[0]


def test_a_product_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(self: Int8Product, integers: Tensor) -> Tensor:
        return multiply(self, integers).clamp_(-1e6, 1e6)

    multiply = BlockedInt8._multiply
    monkeypatch.setattr(BlockedInt8, "_multiply", saturating)
    with pytest.raises(CheckpointError, match="int8 needs a processor that .*VNNI") as refused:
        int8_product.__wrapped__("cpu")
    assert "float32" in str(refused.value.hint)


def test_this_processor_has_an_exact_product_or_says_why_not() -> None:
    """Run again by `make test-processor` on kernels of older processors, where the answer is the refusal."""
    if is_exact(BlockedInt8):
        assert int8_product("cpu") is BlockedInt8
    else:
        with pytest.raises(CheckpointError, match="int8 needs a processor that .*VNNI"):
            int8_product("cpu")


def test_int8_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(device: str) -> None:
        raise CheckpointError(f"int8 is not for this {device}")

    checkpoint = tiny_checkpoint()
    monkeypatch.setattr("topkapi.model.native.levels", lambda: ())  # the core has int8 everywhere
    monkeypatch.setattr("topkapi.model.storage.checkpoint.int8_product", refuse)
    monkeypatch.setattr("topkapi.model.storage.checkpoint._read", lambda *_: pytest.fail("the checkpoint was read"))
    assert main(["generate", "The cat", "-c", str(checkpoint), "--dtype", "int8"]) == 2
    assert "int8 is not for this cpu" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_and_quantized_networks_compute_the_same(family: str, tied: bool) -> None:
    skip_without_int8()
    tokens = torch.arange(1, 41).unsqueeze(0)
    arguments = tokens, torch.arange(40).unsqueeze(0)
    plain, packed, small = (tiny_model(family, tie_embeddings=tied, scale=2.0) for _ in range(3))
    pack(packed)
    quantize(small)
    expected = plain(*arguments)
    torch.testing.assert_close(packed(*arguments), expected, atol=1e-4, rtol=1e-4)
    assert (small(*arguments) - expected).norm() / expected.norm() < 0.05
    assert (plain.held_in, packed.held_in, small.held_in) == ("float32", "float32", "int8")


def test_the_matrices_are_in_one_place_only() -> None:
    skip_without_int8()
    model = tiny_model("qwen3")
    quantize(model)
    pack(model)
    held = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(held) == 4 * model.config.num_layers + 1, "stacked: query, key and value; gate and up"
    assert all(linear.weight.is_meta and isinstance(linear.product, Int8Product) for linear in held)
    floats = [name for name, each in model.named_parameters() if each.ndim == 2 and not each.is_meta]
    assert floats == ["embed_tokens.weight"]


def test_int8_needs_no_padding_to_be_invariant() -> None:
    skip_without_int8()
    model = tiny_model("gpt2")
    quantize(model)
    assert calibrate(model)
    assert [model.padded_rows(rows) for rows in (1, 2, 3, 33, 257)] == [1, 2, 3, 33, 257]


def test_packed_matrices_are_tried_as_they_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that computes is the one whose row counts are compared."""
    model = tiny_model("gpt2")
    if not can_pack(model.lm_head.weight):
        pytest.skip("this machine has no packed matrices")
    pack(model)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: pytest.fail("the plain product was tried"))
    assert calibrate(model)


def test_the_shipped_checkpoint_loses_little(english: str) -> None:
    skip_without_int8()
    loaded = [load_checkpoint(CHECKPOINT, dtype=dtype) for dtype in (torch.float32, torch.int8)]
    token_ids = loaded[0].tokenizer.encode(english[:3000])
    full, small = (sum(score(each.model, token_ids, window=256).logprobs) / len(token_ids) for each in loaded)
    assert abs(small - full) < 0.02, f"{full:.4f} nats per token in float32, {small:.4f} in int8"


def test_every_command_takes_int8(
    tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    skip_without_int8()
    checkpoint = str(tiny_checkpoint())
    text = tmp_path / "text"
    text.write_text("The cat sat on the mat.")
    assert main(["generate", "The cat", "-c", checkpoint, "--dtype", "int8", "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deterministic"] is True
    assert main(["score", str(text), "-c", checkpoint, "--dtype", "int8"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_models_says_int8(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> None:
    skip_without_int8()
    with serve(tiny_checkpoint(), dtype="int8") as served:
        (model,) = served.client.get("/models").json()["models"]
        assert model["dtype"] == "int8"
