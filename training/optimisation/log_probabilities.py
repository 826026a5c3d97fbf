"""Log-probabilities of whole answers, for preferences: measured, differentiated, kept from before training."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from topkapi.model.errors import DataError
from topkapi.model.files import recover_directory, write_directory
from topkapi.model.transformer import Decoder
from topkapi.training.data.windows import Batch
from topkapi.training.optimisation.loss import chunks, inputs

_PARTS = ("train", "validation")


def of_texts(model: Decoder, flat: Tensor, batch: Batch) -> Tensor:
    """The log-probability of each text's trained targets, `[texts]` float32, from the states `[T, hidden_size]`."""
    losses = torch.zeros(batch.targets.numel(), device=flat.device)
    for rows, targets, _ in chunks(model, batch):
        losses[rows] = functional.cross_entropy(model.logits(flat[rows]), targets, reduction="none")
    return -torch.stack([text.sum() for text in torch.split(losses, list(batch.lengths or ()))])


@torch.no_grad()
def measured(model: Decoder, batches: Iterable[Batch], micro_batch_size: int | None) -> Iterator[tuple[Batch, Tensor]]:
    """Parts of the batches with their texts' log-probabilities `[texts]`, computed without dropout; the model is left
    in the mode it was in."""
    training = model.training
    model.eval()
    for batch in batches:
        for part in batch.split(micro_batch_size or batch.size):
            yield part, of_texts(model, model.hidden(*inputs(model, part)).flatten(0, 1), part)
    model.train(training)


def add_gradients(model: Decoder, state: Tensor, batch: Batch, slopes: Tensor) -> None:
    """Add the gradients of the sum of the texts' log-probabilities, times their `slopes [texts]`, to the parameters.

    `state` is what `model.hidden` gave for the batch. The output layer is differentiated chunk by chunk, so that the
    logits of a whole batch never exist.
    """
    flat = state.detach().flatten(0, 1)
    of_targets = slopes.repeat_interleave(torch.tensor(batch.lengths, device=slopes.device))
    gradient = torch.zeros_like(flat)
    for rows, targets, _ in chunks(model, batch):
        there = flat[rows].requires_grad_()
        losses = functional.cross_entropy(model.logits(there), targets, reduction="none")
        torch.autograd.backward((losses * -of_targets[rows]).sum())
        assert there.grad is not None, "the loss depends on the state"
        gradient[rows] = there.grad
    state.backward(gradient.view_as(state))  # type: ignore[no-untyped-call]


def before_training(place: Path, told: Iterable[str], compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """What `compute` finds for the training and for the validation data, before the first step.

    It is kept in the directory `place`, so that a resumed run goes on with the same numbers; `told` is what they depend
    on. Raises `DataError` where an answer has no finite probability.
    """
    digest = hashlib.sha256("\n".join(told).encode()).hexdigest()
    recover_directory(place)
    file = place / "log-probabilities.safetensors"
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            if opened.metadata() == {"digest": digest}:
                return [opened.get_tensor(name) for name in _PARTS]
    found = [values.cpu().contiguous() for values in compute()]
    for values in found:
        if not bool(values.isfinite().all()):
            raise DataError("the checkpoint gives an answer no finite probability", field="checkpoint")
    shutil.rmtree(place, ignore_errors=True)
    with write_directory(place) as partial_place:
        tensors = dict(zip(_PARTS, found, strict=True))
        save_file(tensors, partial_place / file.name, metadata={"digest": digest})
    return found
