"""A network of which each process holds a part, `--parallel fsdp`: PyTorch's `fully_shard` (Zhao et al. 2023).

Layers are gathered one after another while they compute. What is written is whole, so that a run goes on with any
number of processes and either way of sharing the work. With one process everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Muon

from topkapi.model.transformer import Decoder
from topkapi.training.optimisation import distributed

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# What this is made of takes most of a second to import, so that is left to the runs that need it.


def distribute(model: Decoder, parallel: Literal["ddp", "fsdp"] | None) -> None:
    """Leave each process its part of the parameters, if that is what `parallel` says; before the optimiser is made."""
    if parallel != "fsdp" or distributed.size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(model.device.type, (distributed.size(),))
    # Matrices in 4 bits are no parameters any more, and stay whole.
    others: Any = {parameter for parameter in model.parameters() if parameter.is_meta}
    for block in model.layers:
        fully_shard(block, mesh=mesh, ignored_params=others)
    fully_shard(model, mesh=mesh, ignored_params=others)
    register_fsdp_forward_method(model, "hidden")
    for part in _parts(model):
        # Losses are divided by the weight of the whole batch, so gradients are added up, not averaged.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        # A share without a trained target has no gradient for the output matrix.
        part.set_reduce_scatter_unused_params(True, recurse=False)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Let every process hold the whole network in the block, so that one of them can use it alone."""
    parts = _parts(model)
    outermost = parts[0] if parts else None
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            # The outermost part is needed again at once, to begin the backward pass with.
            part.set_reshard_after_forward(part is not outermost, recurse=False)
            part.reshard()


def _parts(model: nn.Module) -> list[FSDPModule]:
    if distributed.size() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds only a part of `tensor`."""
    if distributed.size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(tensor: Any) -> Tensor:
    """The whole of what may be a part; every process must ask for it."""
    whole_tensor: Tensor = tensor.full_tensor() if is_part(tensor) else tensor
    return whole_tensor


def collected(tensor: Tensor) -> Tensor:
    """The whole of what may be a part, in the first process's main memory; something in the others. All must ask."""
    if not is_part(tensor):
        return tensor
    found = gathered(tensor)
    return found[:0] if distributed.rank() else found.cpu()


def part_of(tensor: Tensor, like: Any) -> Tensor:
    """What this process holds, or would hold, of a whole `tensor` as it does of `like`; on the same device."""
    tensor = tensor.to(like.device)
    if not is_part(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole_step(optimizer: Muon) -> None:
    """A step of Muon, whose update needs the whole of each matrix: gradient and momentum of parts are gathered."""
    matrices: list[Any] = [matrix for group in optimizer.param_groups for matrix in group["params"]]
    if not is_part(matrices[0]):
        optimizer.step()  # type: ignore[no-untyped-call]
        return
    from torch.distributed.tensor import Replicate

    gradients = [matrix.grad for matrix in matrices]
    optimizer.zero_grad(set_to_none=True)
    for matrix, gradient in zip(matrices, gradients, strict=True):
        # One at a time, for Muon passes over matrices without a gradient: no more than one is ever whole.
        everywhere = [Replicate()] * matrix.device_mesh.ndim
        state: dict[str, Any] = optimizer.state[matrix]
        matrix.grad = gradient.redistribute(placements=everywhere)
        if "momentum_buffer" in state:
            state["momentum_buffer"] = state["momentum_buffer"].redistribute(placements=everywhere)
        optimizer.step()  # type: ignore[no-untyped-call]
        state["momentum_buffer"] = state["momentum_buffer"].redistribute(placements=matrix.placements)
        matrix.grad = None


@torch.no_grad()
def clip(parameters: list[nn.Parameter], longest: float) -> float:
    """Scale the gradients down to the norm `longest`, and return the norm that they had."""
    norm: float = gathered(nn.utils.clip_grad_norm_(parameters, longest)).item()
    return norm
