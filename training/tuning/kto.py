"""`topkapi kto`: Kahneman-Tversky optimisation (Ethayarajh et al. 2024), on answers that are labelled good or bad.

The gain of an answer is how much likelier it became since the start, in log-probability; z is the mean gain of answers
to other prompts, never below 0, an estimate of how far the network has moved from the starting checkpoint. The loss of
an answer is w * (1 - sigmoid(m)), with m = beta * (gain - z) for a good one and beta * (z - gain) for a bad one, and a
weight w for each kind. z has no gradient. Log-probabilities before training are computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from topkapi.model.errors import SettingsError
from topkapi.model.transformer import Decoder
from topkapi.training.data.row_files import Names
from topkapi.training.data.verdicts import VerdictBatch, VerdictLoader, encode_verdicts, read_verdicts
from topkapi.training.data.weights import sources_and_weights
from topkapi.training.data.windows import Batch
from topkapi.training.optimisation import distributed
from topkapi.training.optimisation.log_probabilities import add_gradients, before_training, measured, of_texts
from topkapi.training.optimisation.loss import Compiled, inputs
from topkapi.training.recipes.recipe import KtoRecipe
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

# How much more than the bad answers the good ones should weigh altogether: the paper's equation 8, with its digits.
_BALANCE = (0.99, 1.34)


def kto(recipe: KtoRecipe, directory: RunDirectory, *, resume: bool, console: Console) -> Training:
    """The run in `directory` that trains a checkpoint on labelled answers as `recipe` says; with `resume` it continues
    there.

    Raises as `finetune` does.
    """
    if recipe.z_loss:
        raise SettingsError("the loss of labelled answers has no z-loss", field="z_loss", hint="leave out --z-loss")
    if sources_and_weights(recipe.data)[1] is not None:
        raise SettingsError(
            "labelled answers are not mixed by weights", field="data", hint="give the files without them"
        )
    base = open_base(recipe, directory, resume=resume, console=console)
    left_out: set[str] = set()
    fields = Names(recipe.map)
    read = partial(read_verdicts, input_heading=base.chat.name == "alpaca", left_out=left_out, names=fields)
    split = split_data(recipe, read)
    fields.check("the data")
    loaders, dropped = [], []
    for part in (split.train, split.validation):
        answers, overlong = encode_verdicts(
            part, base.tokenizer, base.chat, longest=base.longest, drop_overlong=recipe.on_overlong == "drop"
        )
        dropped += overlong
        loaders.append(VerdictLoader(answers, batch_size=recipe.batch_size, seed=recipe.seed, longest=base.longest))
    report_left_out(base, split.found.left_out, left_out, dropped)
    counts = len(loaders[0].examples), len(loaders[1].examples)
    check_enough(recipe, "answers", *counts)
    with distributed.in_turn():
        reference = _reference(base, loaders)
    for loader, values in zip(loaders, reference, strict=True):
        loader.reference = values
    # Good answers first: samples are shown beside them.
    train, validation = (sorted(part, key=lambda each: not each.desirable) for part in (split.train, split.validation))
    examples = Examples(
        kind="answers",
        loaders=(loaders[0], loaders[1]),
        counts=counts,
        conversations=([each.conversation for each in train], [each.conversation for each in validation]),
        objective=Judged(recipe.beta, recipe.desirable_weight, recipe.undesirable_weight),
        files=split.files,
        findings=_balance(recipe, loaders[0].desirable),
    )
    return assemble_tuning(base, "kto", examples)


@dataclass(frozen=True)
class Judged:
    """KTO's objective over batches of labelled answers; beside the loss it measures how many answers are on their side
    of z (`accuracy`), how far in the mean (`margin`, the mean of m), and z (`kl`)."""

    beta: float
    desirable_weight: float
    undesirable_weight: float

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
        """Add the gradients of the answers' mean loss to the parameters and return it; there is no z-loss.

        z is that of the whole batch, also where several processes have a part each.
        """
        total = 0.0
        z = self._z(model, [batch], micro_batch_size)
        for part in batch.split(micro_batch_size or batch.size):
            assert isinstance(part, VerdictBatch), "labelled answers come from a VerdictLoader"
            state = (compiled.hidden if compiled else model.hidden)(*inputs(model, part))
            with torch.no_grad():
                leaf = of_texts(model, state.detach().flatten(0, 1), part)
            loss = self.loss(leaf.requires_grad_(), part, z)[0].sum() / divisor
            (slopes,) = torch.autograd.grad(loss, leaf)
            add_gradients(model, state, part, slopes)
            total += loss.item()
        return total

    @torch.no_grad()
    def evaluate(self, model: Decoder, batches: list[Batch], micro_batch_size: int | None) -> dict[str, float]:
        """The mean `loss`, `accuracy` and `margin` over all answers, and `kl`, z over all of them; the model is left in
        the mode it was in."""
        z = self._z(model, batches, micro_batch_size)
        losses, margins = [], []
        for part, found in measured(model, batches, micro_batch_size):
            assert isinstance(part, VerdictBatch), "labelled answers come from a VerdictLoader"
            loss, margin = self.loss(found.cpu(), part, z)
            losses.append(loss)
            margins.append(margin)
        if not losses:
            return {}
        loss, margin = torch.cat(losses), torch.cat(margins)
        accuracy = (margin > 0).float().mean().item()
        return {"loss": loss.mean().item(), "accuracy": accuracy, "margin": margin.mean().item(), "kl": z}

    def loss(self, policy: Tensor, batch: VerdictBatch, z: float) -> tuple[Tensor, Tensor]:
        """Each answer's loss and m, `[answers]`, from their log-probabilities."""
        good = batch.desirable.to(policy.device)
        gain = policy - batch.reference[:, 0].to(policy.device)
        margin = self.beta * torch.where(good, gain - z, z - gain)
        weights = torch.where(good, self.desirable_weight, self.undesirable_weight)
        return weights * (1 - margin.sigmoid()), margin

    def _z(self, model: Decoder, batches: Iterable[Batch], micro_batch_size: int | None) -> float:
        """The mean gain of the answers to other prompts in the batches of all processes, or 0 if that is more."""
        gains, count = 0.0, 0
        for batch in batches:
            assert isinstance(batch, VerdictBatch), "labelled answers come from a VerdictLoader"
            after = torch.cat([found for _, found in measured(model, [batch.mismatched], micro_batch_size)])
            gains += (after.cpu().double() - batch.reference[:, 1]).sum().item()
            count += batch.size
        gains, counted = distributed.added(gains, count)
        return max(0.0, gains / max(1.0, counted))


def _balance(recipe: KtoRecipe, desirable: Tensor) -> list[str]:
    """What is wrong with how much the two kinds of answers weigh altogether."""
    good = int(desirable.sum())
    bad = len(desirable) - good
    if not good or not bad:
        return [f"all {len(desirable):,} answers are {'good' if good else 'bad'}: there is nothing to tell them from"]
    ratio = good * recipe.desirable_weight / (bad * recipe.undesirable_weight)
    if _BALANCE[0] <= ratio <= _BALANCE[1]:
        return []
    flag, weight = "--undesirable-weight", good * recipe.desirable_weight / bad
    if ratio < 1:
        flag, weight = "--desirable-weight", bad * recipe.undesirable_weight / good
    return [
        f"{good:,} good and {bad:,} bad answers: the good ones weigh {ratio:.3g} times as much, and 1 to 1.33 times is "
        f"recommended: {flag} {weight:.3g}"
    ]


def _reference(base: Base, loaders: Sequence[VerdictLoader]) -> list[Tensor]:
    """Log-probabilities `[answers, 2]` of every loader's answers, and of those to other prompts, as the untrained
    checkpoint gives them."""

    def of(batches: Iterable[Batch]) -> Tensor:
        found = measured(base.model, batches, base.recipe.micro_batch_size)
        return torch.cat([torch.zeros(0), *(values.cpu() for _, values in found)])

    def compute() -> list[Tensor]:
        whole = [[batch for batch in loader.first(None) if isinstance(batch, VerdictBatch)] for loader in loaders]
        return [torch.stack([of(each), of(batch.mismatched for batch in each)], dim=1) for each in whole]

    texts = [each for loader in loaders for each in (*loader.examples, *loader.mismatched)]
    told = [base.digest, *(f"{each.token_ids}{each.trained}" for each in texts)]
    return before_training(base.directory.prepared("reference"), told, compute)
