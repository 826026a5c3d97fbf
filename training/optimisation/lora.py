"""Fine-tuning with adapters: LoRA, QLoRA (Dettmers et al. 2023) and DoRA, by `--method`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from topkapi.model.adapter import TARGETS, Adapter, attach, named_linears
from topkapi.model.config import ModelConfig
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import SettingsError
from topkapi.model.linear import Linear
from topkapi.model.nf4 import NF4Product
from topkapi.model.storage.checkpoint import load_checkpoint, save_adapter, save_checkpoint
from topkapi.model.storage.layouts import layout_of
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder
from topkapi.training.recipes.recipe import TuningRecipe

METHODS_WITH_ADAPTERS = ("lora", "qlora", "dora")
_RANK, _ALPHA_PER_RANK = 16, 2.0
_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")


@dataclass(frozen=True)
class AdapterPlan:
    """Which matrices of the checkpoint `base` get adapters, of which size. `quantised`: it is held as NF4 while these
    train."""

    base: Path
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    decomposed: bool
    quantised: bool
    seed: int

    @classmethod
    def of(cls, recipe: TuningRecipe, config: ModelConfig) -> AdapterPlan | None:
        """The recipe's plan for a network of the shape `config`; None where all weights train.

        Raises `SettingsError` for adapter settings without adapters and for matrices that the family does not have.
        """
        if recipe.method not in METHODS_WITH_ADAPTERS:
            for name in _FIELDS:
                if getattr(recipe, name) not in (None, []):
                    raise SettingsError(
                        f"{name} is set, but --method {recipe.method} trains all weights",
                        field=name,
                        hint=f"leave it out, or add --method {'|'.join(METHODS_WITH_ADAPTERS)}",
                    )
            return None
        family = config.family
        known = tuple(name for name in TARGETS if config.gated_mlp or name != "gate_proj")
        targets = tuple(recipe.lora_targets) or known
        for name in targets:
            if name not in known:
                raise SettingsError(
                    f"the {family} family has no matrix {name!r} for an adapter",
                    field="lora_targets",
                    hint=f"choose from {', '.join(known)}",
                )
        for parts in layout_of(config).joined.values():
            joined = [part.rpartition(".")[2] for part in parts]
            chosen = [name for name in joined if name in targets]
            if 0 < len(chosen) < len(joined):
                raise SettingsError(
                    f"in the {family} family {', '.join(joined)} are one matrix, "
                    f"and only {', '.join(chosen)} is to adapt",
                    field="lora_targets",
                    hint=f"name all {len(joined)} of them or none",
                )
        rank = recipe.lora_rank or _RANK
        return cls(
            base=Path(str(recipe.checkpoint)),
            rank=rank,
            alpha=recipe.lora_alpha or _ALPHA_PER_RANK * rank,
            dropout=recipe.lora_dropout or 0.0,
            targets=targets,
            decomposed=recipe.method == "dora",
            quantised=recipe.method == "qlora",
            seed=recipe.seed,
        )

    def attach(self, model: Decoder, token_ids: Sequence[int]) -> None:
        """Freeze `model` and give it adapters; the embedding's rows of the new tokens `token_ids` train whole."""
        generator = torch.Generator().manual_seed(self.seed)

        def make(linear: Linear) -> Adapter:
            return Adapter(
                linear,
                rank=self.rank,
                scale=self.alpha / self.rank,
                dropout=self.dropout,
                decomposed=self.decomposed,
                generator=generator,
            )

        attach(model, self.targets, make, token_ids)

    def hold_base(self, model: Decoder) -> None:
        """Hold the frozen matrices of the layers in the smallest form that computes the same: NF4, or what they are
        multiplied in."""
        for _, linear in list(named_linears(model)):
            if self.quantised:
                linear.hold(partial(NF4Product, dtype=linear.compute_dtype))
            elif linear.compute_dtype is not None:
                linear.weight = nn.Parameter(linear.weight.detach().to(linear.compute_dtype), requires_grad=False)

    def save(
        self,
        directory: Path,
        *,
        model: Decoder,
        tokenizer: Tokenizer,
        chat: ChatTemplate,
        generation: Mapping[str, Any],
        details: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        """Write the adapter, which names its base, to `directory`."""
        save_adapter(
            directory,
            model=model,
            base=self.base,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            tokenizer=tokenizer,
            chat=chat,
            generation=generation,
            details={**details, "base_held_in": "nf4"} if self.quantised else details,
            dtype=dtype,
        )


def merge(base: Path, adapter: Path, out: Path, dtype: str | None) -> None:
    """Write a checkpoint of `base` with `adapter` in it to `out`, matrices as `dtype` (None: as the base's).

    Raises `SettingsError` where something is at `out`, `CheckpointError` where the two do not fit.
    """
    if out.exists():
        raise SettingsError(f"{out} is there already", field="out", hint="choose another --out")
    held = None if dtype is None else getattr(torch, dtype)
    # Merged in float32 and rounded once.
    merged = load_checkpoint(adapter, dtype=None if held is None else torch.float32, base=base)
    details = {name: value for name, value in merged.details.items() if name not in ("sha256", "base_held_in")}
    save_checkpoint(
        out,
        model=merged.model,
        tokenizer=merged.tokenizer,
        chat=merged.chat,
        generation=merged.generation,
        details={**details, "merged_adapter": adapter.resolve().name},
        dtype=held,
    )
