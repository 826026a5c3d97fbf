"""`topkapi dpo`: direct preference optimisation (Rafailov et al. 2023).

The loss of a pair is -log sigmoid(z), z = beta * (how much likelier the chosen answer became since the start, less how
much the rejected one did, in log-probabilities). With label smoothing e (conservative DPO, Mitchell 2023) it is
-(1 - e) log sigmoid(z) - e log sigmoid(-z). Log-probabilities before training are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from topkapi.model.errors import SettingsError
from topkapi.model.transformer import Decoder
from topkapi.training.data.preferences import PairBatch, PairLoader, encode_preferences, read_preferences
from topkapi.training.data.row_files import Names
from topkapi.training.data.weights import sources_and_weights
from topkapi.training.data.windows import Batch
from topkapi.training.optimisation import distributed
from topkapi.training.optimisation.log_probabilities import add_gradients, before_training, measured, of_texts
from topkapi.training.optimisation.loss import Compiled, inputs
from topkapi.training.recipes.recipe import DpoRecipe
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory
from topkapi.training.trainer import Training
from topkapi.training.tuning.finetune import (
    Base,
    Examples,
    assemble_tuning,
    check_enough,
    open_base,
    report_left_out,
    split_data,
)


def dpo(recipe: DpoRecipe, directory: RunDirectory, *, resume: bool, console: Console) -> Training:
    """The run in `directory` that trains a checkpoint on preferences as `recipe` says; with `resume` it continues
    there.

    Raises as `finetune` does.
    """
    if recipe.z_loss:
        raise SettingsError("the loss of preferences has no z-loss", field="z_loss", hint="leave out --z-loss")
    if sources_and_weights(recipe.data)[1] is not None:
        raise SettingsError("preferences are not mixed by weights", field="data", hint="give the files without them")
    base = open_base(recipe, directory, resume=resume, console=console)
    left_out: set[str] = set()
    fields = Names(recipe.map)
    split = split_data(recipe, partial(read_preferences, left_out=left_out, names=fields))
    train, validation = split.train, split.validation
    fields.check("the data")
    loaders, dropped = [], []
    for part in (train, validation):
        pairs, overlong = encode_preferences(
            part, base.tokenizer, base.chat, longest=base.longest, drop_overlong=recipe.on_overlong == "drop"
        )
        dropped += overlong
        loaders.append(PairLoader(pairs, batch_size=recipe.batch_size, seed=recipe.seed))
    report_left_out(base, split.found.left_out, left_out, dropped)
    counts = len(loaders[0].pairs), len(loaders[1].pairs)
    check_enough(recipe, "pairs", *counts)
    with distributed.in_turn():
        reference = _reference(base, loaders)
    for loader, values in zip(loaders, reference, strict=True):
        loader.reference = values
    examples = Examples(
        kind="pairs",
        loaders=(loaders[0], loaders[1]),
        counts=counts,
        conversations=([each.chosen for each in train], [each.chosen for each in validation]),
        objective=Preferred(recipe.beta, recipe.label_smoothing),
        files=split.files,
    )
    return assemble_tuning(base, "dpo", examples)


@dataclass(frozen=True)
class Preferred:
    """DPO's objective over batches of pairs; beside the loss it measures how often the chosen answer is ahead
    (`accuracy`) and by how much (`margin`, the mean of z)."""

    beta: float
    label_smoothing: float

    def backward(
        self,
        model: Decoder,
        batch: Batch,
        *,
        divisor: float,
        micro_batch_size: int | None = None,
        compiled: Compiled | None = None,
        z_loss: float = 0.0,
    ) -> float:
        """Add the gradients of the pairs' mean loss to the parameters and return it; there is no z-loss.

        The loss's gradient is that of a weighted sum of the answers' log-probabilities, so these are computed first,
        without gradients, and then, chunk by chunk, once more.
        """
        total = 0.0
        for part in batch.split(micro_batch_size or batch.size):
            assert isinstance(part, PairBatch), "pairs come from a PairLoader"
            state = (compiled.hidden if compiled else model.hidden)(*inputs(model, part))
            with torch.no_grad():
                answers = of_texts(model, state.detach().flatten(0, 1), part)
            leaf = answers.view(-1, 2).requires_grad_()
            loss = dpo_loss(leaf, part.reference.to(leaf.device), self.beta, self.label_smoothing)[0].sum() / divisor
            (slopes,) = torch.autograd.grad(loss, leaf)
            add_gradients(model, state, part, slopes.flatten())
            total += loss.item()
        return total

    @torch.no_grad()
    def evaluate(self, model: Decoder, batches: list[Batch], micro_batch_size: int | None) -> dict[str, float]:
        """The mean `loss`, `accuracy` and `margin` over all pairs; the model is left in the mode it was in."""
        losses, margins = [], []
        for part, found in measured(model, batches, micro_batch_size):
            assert isinstance(part, PairBatch), "pairs come from a PairLoader"
            loss, margin = dpo_loss(found.view(-1, 2).cpu(), part.reference, self.beta, self.label_smoothing)
            losses.append(loss)
            margins.append(margin)
        if not losses:
            return {}
        loss, margin = torch.cat(losses), torch.cat(margins)
        accuracy = (margin > 0).float().mean().item()
        return {"loss": loss.mean().item(), "accuracy": accuracy, "margin": margin.mean().item()}


def dpo_loss(policy: Tensor, reference: Tensor, beta: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Each pair's loss and z, `[P]`, from log-probabilities `[P, 2]` of the chosen and the rejected answer."""
    chosen, rejected = (policy - reference).unbind(1)
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * functional.logsigmoid(margin) - label_smoothing * functional.logsigmoid(-margin)
    return loss, margin


def _reference(base: Base, loaders: Sequence[PairLoader]) -> list[Tensor]:
    """Log-probabilities `[pairs, 2]` of every loader's answers as the untrained checkpoint gives them."""
    examples = [each for loader in loaders for pair in loader.pairs for each in (pair.chosen, pair.rejected)]

    def compute() -> list[Tensor]:
        micro = base.recipe.micro_batch_size
        each = ([found for _, found in measured(base.model, loader.first(None), micro)] for loader in loaders)
        return [torch.cat([torch.zeros(0, 2), *(found.cpu().view(-1, 2) for found in parts)]) for parts in each]

    told = [base.digest, *(f"{each.token_ids}{each.trained}" for each in examples)]
    return before_training(base.directory.prepared("reference"), told, compute)
