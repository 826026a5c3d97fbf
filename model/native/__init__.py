"""The native core: a whole pass of the network over the slot cache as one call of compiled code.

It computes what `model.transformer` and `model.cache` compute with PyTorch, which stay the reference and what runs
where there is no core. A row's sums have one order whatever is computed beside it, on any number of threads and by
whichever instructions: its bits are the same in every batch and on every processor.

The core is C++ without PyTorch's headers behind a C interface (`interface.cpp`): `passes.cpp` is the pass,
`packing.cpp` the forms that weights are held in, `kernels.h` what a pass is made of, `vectors.h` sixteen numbers at a
time for each instruction set, `threads.h` the threads; `scanning.cpp` looks through logits for `model.decoding`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from topkapi.model.core_fields import beyond_core
from topkapi.model.linear import Linear
from topkapi.model.native.core import CACHES, FORMATS, KINDS, Adapter, Core, HeldIn, Slots, in_blocks, let_go
from topkapi.model.native.library import levels, why_not

if TYPE_CHECKING:
    from topkapi.model.transformer import Decoder

__all__ = ["CACHES", "FORMATS", "Adapter", "Core", "HeldIn", "Slots", "can_hold", "hold", "levels", "why_not"]


def can_hold(model: Decoder) -> bool:
    """Whether the core can compute this network: it was built, knows all of the configuration, and the matrices are
    plain and on the CPU."""
    if (
        not levels()
        or beyond_core(model.config)
        or model.core is not None
        or model.device.type not in ("cpu", "meta")
        or model.trained_rows is not None
    ):
        return False
    if any(each.is_meta for each in model.parameters()) and not in_blocks(model):
        return False
    plain = all(
        module.product is None and module.adapter is None for module in model.modules() if isinstance(module, Linear)
    )
    return plain and all(each.ndim < 2 or each.dtype in KINDS for each in model.parameters())


def hold(model: Decoder, held_in: HeldIn, *, level: str | None = None, threads: int | None = None) -> None:
    """Have the core compute `model`, for inference and for good; its matrices are in one place only.

    `level` is one of `levels()` (None: the last), `threads` how many compute (None: as many as PyTorch uses).
    """
    model.core = Core(model, held_in, level=level, threads=threads)
    let_go(model)
