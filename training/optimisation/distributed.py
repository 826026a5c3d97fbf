"""Several processes that train one network together, started by torchrun: each computes its share of every update.

The first process decides, writes and prints; the others are told. With one process everything here does nothing.
Weights and optimiser are whole in every process (`--parallel ddp`: gradients are added up, Li et al. 2020), or each
process holds a part of them (`fsdp`: PyTorch's `fully_shard`, Zhao et al. 2023). Then layers are gathered one after
another while they compute. What is written is whole, so that a run goes on with any number of processes and either way
of sharing the work.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Muon

from topkapi.model.errors import SettingsError, TopkapiError
from topkapi.model.transformer import Decoder
from topkapi.training.data.windows import Batch
from topkapi.training.recipes.recipe import TrainingRecipe

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


Told = TypeVar("Told")
# What torchrun tells the processes that it starts.
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The others wait so long, at most, for the first one to tokenize the data or to write a checkpoint.
_PATIENCE = timedelta(hours=12)
# Errors that all processes come to at once: the first one's message is enough.
_COMMON = ("diverged", "interrupted")
# Gradients are added up so many numbers at a time.
_BUCKET = 1 << 24


class Lost(TopkapiError):
    """Another process of the run has ended, so that this one can't go on."""

    kind = "process_lost"


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine: which of its GPUs is this process's own."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


@contextmanager
def joined(recipe: TrainingRecipe) -> Iterator[None]:
    """Meet the other processes, where torchrun started several; nothing but the first prints to standard output, and
    when all is well the others end with the block.

    CUDA devices talk by NCCL, everything else by gloo. Raises `SettingsError` for what several processes can't do and
    `Lost` when another one fails; all others' errors name the process.
    """
    if not all(name in os.environ for name in _VARIABLES) or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    cuda = recipe.device != "cpu" and torch.cuda.is_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise SettingsError(f"the processes of torchrun could not meet: {error}", field="parallel") from None
    quiet = open(os.devnull, "w", encoding="utf-8") if rank() else sys.stdout  # noqa: SIM115  # for the process's life
    try:
        with redirect_stdout(quiet):
            _check(recipe)
            yield
            if rank():
                # Without what Python does when it ends, in which gloo's threads now and then abort the process.
                os._exit(0)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "NCCL", "onnection", "ProcessGroup")):
            raise
        raise Lost(
            f"process {rank()} of {size()} lost the others",
            hint="one of them has ended, see its message; then continue with --resume",
        ) from None
    except TopkapiError as error:
        if rank() and error.kind in _COMMON:
            raise SystemExit(2) from None
        if rank():
            error.message = f"process {rank()} of {size()}: {error.message}"
        raise
    finally:
        dist.destroy_process_group()


def _check(recipe: TrainingRecipe) -> None:
    if recipe.batch_size % size():
        raise SettingsError(
            f"a batch of {recipe.batch_size} cannot be shared evenly by {size()} processes",
            field="batch_size",
            hint=f"choose a multiple of {size()}",
        )
    if recipe.parallel != "fsdp":
        return
    for name, why in (
        ("compile", "layers that are gathered one by one are not compiled"),
        ("asynchronous_saves", "a network in parts is not copied"),
    ):
        if getattr(recipe, name):
            flag = f"--{name.replace('_', '-')}"
            raise SettingsError(f"with --parallel fsdp, {why}", field=name, hint=f"leave out {flag}, or use ddp")


@contextmanager
def in_turn() -> Iterator[None]:
    """The first process goes through the block alone; the others then find what it has left on the disk, and all of
    them leave it together."""
    if rank():
        told(None)
    yield
    if not rank():
        told(None)
    added(0)


def told(value: Told) -> Told:
    """The first process's `value`, which JSON must be able to say, in every process."""
    if size() == 1:
        return value
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor(len(content))
    dist.broadcast(length, 0)
    if rank():
        content = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return cast(Told, json.loads(bytes(content.tolist())))


def added(*values: float) -> list[float]:
    """The sum of each value over all processes, the same in all of them."""
    if size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return cast(list[float], total.tolist())


def share(batch: Batch) -> Batch | None:
    """The rows that this process computes: with the others' they are the batch. None where there are too few."""
    if size() == 1:
        return batch
    parts = list(batch.split(-(-batch.size // size())))
    return parts[rank()] if rank() < len(parts) else None


def averaged(measure: Callable[[list[Batch]], Mapping[str, float]], batches: Iterable[Batch]) -> dict[str, float]:
    """What `measure` finds, as means over `batches` by their weights, each process having measured its share."""
    own = [part for batch in batches if (part := share(batch)) is not None]
    if size() == 1:
        return dict(measure(own))
    weight = sum(part.weight() for part in own)
    # Asked of all of them, also of one that has no share: what is measured may be a matter of all together.
    measured = measure(own)
    names = told(sorted(measured))
    total, *sums = added(weight, *(weight * measured.get(name, 0.0) for name in names))
    return {name: value / total for name, value in zip(names, sums, strict=True)}


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the sum of all their gradients."""
    if size() == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            # This share had no trained target.
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    while gradients:
        bucket = [gradients.pop()]
        while gradients and sum(each.numel() for each in bucket) + gradients[-1].numel() <= _BUCKET:
            bucket.append(gradients.pop())
        flat = torch.cat([each.flatten() for each in bucket])
        dist.all_reduce(flat)
        for gradient, total in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


# What parts are made of takes most of a second to import, so that is left to the runs that need them.
def distribute(model: Decoder, parallel: Literal["ddp", "fsdp"] | None) -> None:
    """Leave each process its part of the parameters, if that is what `parallel` says; before the optimiser is made."""
    if parallel != "fsdp" or size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(model.device.type, (size(),))
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
    if size() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds only a part of `tensor`."""
    if size() == 1:
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
    return found[:0] if rank() else found.cpu()


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
