"""Making a row's bits independent of the rows beside it, whatever the machine's matrix products do.

A library picks its algorithm by the number of rows, and two algorithms add in different orders. `calibrate` finds by
trial which row counts agree bit for bit on this machine, for every matrix of the network; a pass then uses only
those, padding with rows of zeros. A matrix for which no useful set agrees is computed in tiles of one fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from topkapi.model.attention import KEY_BLOCK
from topkapi.model.cache import LOGIT_ROWS, SlotCache, Work, read, wanted_logits
from topkapi.model.linear import Linear
from topkapi.model.transformer import KEY_STEP, Decoder

ROW_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TILE = 16


@torch.inference_mode()
def calibrate(model: Decoder) -> bool:
    """Choose the row counts `model` is computed with; returns whether its rows are then invariant on this machine.

    The answer comes from running the network: a text read at once, in chunks, token by token and among others must
    give identical logits. Costs about as much as reading a few hundred tokens, and nothing the second time.
    """
    if model.invariant is None:
        # The native core's rows are independent of one another by construction.
        model.invariant = model.core is not None or _calibrate(model)
    return model.invariant


def _calibrate(model: Decoder) -> bool:
    rounding = [module for module in _one_of_each_shape(model) if not (module.product and module.product.exact)]
    if not rounding:
        # Sums of integers: every row count agrees, none needs padding.
        return _attention_agrees(model)
    agreed = set(ROW_SIZES)
    for module in rounding:
        tried = [size for size in ROW_SIZES if module is not model.lm_head or size <= LOGIT_ROWS]
        make_product = module.make_product or plain_product
        sizes = agreeing_sizes(module.weight.shape, module.input_dtype, model.device, tried, make_product)
        if sizes and min(sizes) <= TILE and max(sizes) == tried[-1]:
            agreed &= {*sizes, *ROW_SIZES[len(tried) :]}
        else:
            for other in model.modules():
                if isinstance(other, Linear) and other.weight.shape == module.weight.shape:
                    other.tile = TILE
    if not agreed:
        return False
    model.row_sizes = tuple(sorted(agreed))
    return _attention_agrees(model)


def _attention_agrees(model: Decoder) -> bool:
    for model.key_step, model.query_tile in ((KEY_STEP, None), (KEY_BLOCK, None), (KEY_BLOCK, TILE)):
        if rows_agree(model):
            return True
    return False


def plain_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The product with a matrix that lies in memory as rows."""
    return lambda rows: functional.linear(rows, weight, bias)


def agreeing_sizes(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    tried: Sequence[int] = ROW_SIZES,
    make_product: Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]] = plain_product,
) -> list[int]:
    """The widest set of the row counts `tried` with which a product gives each row the same bits, wherever it stands.

    The product is with a matrix of `shape` (outputs, inputs) in `dtype`, as `make_product` makes it.
    Every exact result of the trial is zero: each term has its opposite elsewhere in the sum. What comes out is the
    error of rounding alone, so two orders of adding can't look alike, not even in bfloat16.
    """
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    half = inputs // 2
    order = torch.cat((torch.randperm(2 * half, generator=generator), torch.arange(2 * half, inputs)))
    values = torch.randn(tried[-1], half, generator=generator).repeat(1, 2)
    factors = torch.randn(outputs, half, generator=generator)
    rows, matrix = torch.zeros(tried[-1], inputs), torch.zeros(outputs, inputs)
    rows[:, : 2 * half], matrix[:, : 2 * half] = values, torch.cat((factors, -factors), dim=1)
    rows, matrix = rows[:, order].to(device, dtype), matrix[:, order].to(device, dtype)
    product = make_product(matrix, None)
    groups: list[tuple[list[int], Tensor]] = []
    for size in reversed(tried):
        result = product(rows[:size])
        if not torch.equal(product(rows[:size].flip(0)).flip(0), result):
            continue
        for sizes, reference in groups:
            if torch.equal(reference[:size], result):
                sizes.append(size)
                break
        else:
            groups.append(([size], result))
    # Small sizes serve decoding and large ones prompts: the widest span is worth most.
    return max((sizes for sizes, _ in groups), key=lambda sizes: max(sizes) / min(sizes), default=[])


@torch.inference_mode()
def rows_agree(model: Decoder) -> bool:
    """Whether a text's states are identical read in one pass, in uneven chunks, token by token, and among others."""
    config = model.config
    length = min(150, config.context_length)
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(config.vocab_size, (4, length), generator=generator).tolist()
    cache = SlotCache(model, slots=4, capacity=length)
    cut, end = length // 3, max(length // 3, length - 5)

    def states(*works: Work) -> Tensor:
        return read(model, cache, works)

    whole = states(Work(0, 0, texts[0], wanted=length))
    together = states(*(Work(slot, 0, text[: length - slot]) for slot, text in enumerate(texts)))
    chunks = [states(Work(1, 0, texts[0][:cut], wanted=cut))] if cut else []
    if end > cut:
        chunks.append(states(Work(2, 0, texts[2][:1]), Work(1, cut, texts[0][cut:end], wanted=end - cut))[1:])
    for position in range(end, length):
        first, last = Work(0, position % 3, texts[3][:1]), Work(2, 1 + position % 2, texts[2][:1])
        chunks.append(states(first, Work(1, position, texts[0][position : position + 1]), last)[1:2])
    # Short chunks are where threads that share the rows of a product are left with very few.
    for count in range(1, min(10, length + 1)):
        if not torch.equal(states(Work(3, 0, texts[0][:count], wanted=count)), whole[:count]):
            return False
    logits = wanted_logits(model, whole[-7:])
    return (
        torch.equal(together[0], whole[-1])
        and torch.equal(torch.cat(chunks), whole)
        and torch.equal(wanted_logits(model, whole[-1:]), logits[-1:])
    )


def _one_of_each_shape(model: Decoder) -> list[Linear]:
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    return list({(module.weight.shape, module.held_in): module for module in linears}.values())
