"""NF4: the paper's values, blocks scaled by their largest number, and a product that keeps only the small form."""

import math

import pytest
import torch

from topkapi.model.linear import Linear
from topkapi.model.nf4 import NF4, VALUES, NF4Product


def test_the_values_are_the_papers_quantiles() -> None:
    """Section 3: 8 steps above zero and 7 below, of quantiles from 1/2 to the mean of 1 - 1/30 and 1 - 1/32."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64))
    expected = torch.unique(torch.cat((above, below))) / above.max()
    assert torch.tensor(VALUES, dtype=torch.float64).sub(expected).abs().max() < 1e-6


def test_bytes_are_those_of_bitsandbytes() -> None:
    """As `quantize_4bit(x, blocksize=64, quant_type="nf4")` of version 0.50 makes them: the first number lies high."""
    numbers = torch.linspace(-1, 1, 64).view(1, 64) ** 3
    expected = "001112223344455566666777777777777777777777788888999aabbccddeeeff"
    assert bytes(NF4(numbers).pairs.tolist()).hex() == expected


@pytest.mark.parametrize("shape", [(48, 64), (5, 77), (1, 3)])
def test_every_number_becomes_the_nearest_and_the_largest_of_a_block_stays(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = NF4(weight).matrix()
    for start in range(0, weight.numel(), 64):
        block, held = weight.flatten()[start : start + 64], found.flatten()[start : start + 64]
        scale = block.abs().max()
        nearest = (block.unsqueeze(1) - scale * torch.tensor(VALUES)).abs().min(dim=1).values
        assert torch.allclose((block - held).abs(), nearest, atol=1e-6)
        assert held.abs().max() == scale


def test_zeros_stay_and_what_is_held_is_held_again_unchanged() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[3:9] = 0
    once = NF4(weight).matrix()
    assert not once[3:9].any()
    assert torch.equal(NF4(once).matrix(), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_and_its_gradient_are_those_of_the_matrix(dtype: torch.dtype) -> None:
    linear = Linear(96, 40, bias=True)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    linear.requires_grad_(False)
    matrix, rows = NF4(linear.weight).matrix(dtype), torch.randn(7, 96).to(dtype).requires_grad_()
    linear.hold(lambda weight, bias: NF4Product(weight, bias, dtype=dtype))
    assert (linear.held_in, linear.weight.device.type) == ("nf4", "meta")
    result = linear(rows)
    assert torch.equal(result, torch.nn.functional.linear(rows, matrix) + linear.bias.to(dtype))
    (gradient,) = torch.autograd.grad(result.float().square().sum(), rows)
    assert torch.allclose(
        gradient.float(),
        (2 * result.float() @ matrix.float()),
        rtol=0.02,
        atol=1.0 if dtype == torch.bfloat16 else 1e-3,
    )


def test_it_takes_four_and_a_half_bits_and_nothing_more_for_the_backward_pass() -> None:
    weight = torch.randn(512, 512)
    product = NF4Product(weight, None)
    assert product.nbytes * 8 == 4.5 * weight.numel()
    kept: list[int] = []
    rows = torch.randn(2, 512, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        product(rows)
    assert sum(kept) <= rows.nbytes
    assert math.isfinite(float(product(rows).sum()))
