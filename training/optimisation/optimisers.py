"""Optimisers over a model's named parameters, their state as plain named tensors, and how the learning rate changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from topkapi.model.errors import SettingsError
from topkapi.training.optimisation import distributed

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """The factor by which every base learning rate is multiplied at each step.

    `cosine` and `linear` fall from 1 to `final` (Loshchilov & Hutter 2017); `wsd` stays at 1 and falls linearly over
    the last `decay_fraction` of the steps (Hu et al. 2024, MiniCPM); `constant` stays at 1. `warmup` steps rise
    linearly first.
    """

    name: ScheduleName
    total_steps: int
    warmup: int = 0
    final: float = 0.1
    decay_fraction: float = 0.4

    def factor(self, step: int) -> float:
        """The factor for the update that follows `step` finished ones (0-based)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        if self.name == "wsd":
            decay = max(1, round(self.decay_fraction * self.total_steps))
            left = (self.total_steps - step) / decay
            return self.final + (1 - self.final) * min(1.0, left)
        progress = min(1.0, (step - self.warmup) / max(1, self.total_steps - self.warmup))
        left = 1 - progress if self.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final + (1 - self.final) * left


@dataclass(frozen=True)
class Rising(Schedule):
    """A schedule that rises from `low` to 1 over all of its steps, each time by the same factor: a trial of rates."""

    low: float = 1e-6

    def factor(self, step: int) -> float:
        """The factor for the update that follows `step` finished ones."""
        return float(self.low ** (1 - step / max(1, self.total_steps - 1)))


def warmup_steps(warmup: float, total_steps: int) -> int:
    """`warmup` below 1 is a fraction of the run, otherwise a number of steps."""
    return round(warmup * total_steps) if warmup < 1 else round(warmup)


OptimizerName = Literal["adamw", "muon", "schedule-free"]
# What the schedule-free optimiser counts beside each parameter's state: steps, and how the average is weighed.
_COUNTS = ("k", "weight_sum", "lr_max")


class _Muon(Muon):
    """PyTorch's Muon, save that updates become orthogonal in float32 on a processor that has no products of bfloat16:
    PyTorch's own are computed there number after number, 25 times as slowly."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, by the parameters' gradients."""
        if multiplies_bfloat16(self.param_groups[0]["params"][0].device):
            return super().step(closure)  # type: ignore[no-untyped-call]
        assert closure is None, "nobody asks for one"
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(state["momentum_buffer"], momentum)
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-rate * 0.2 * math.sqrt(max(parameter.shape)))
        return None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether PyTorch has products of matrices in bfloat16 on `device` that are not slower than those in float32."""
    if device.type != "cpu":
        return True
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def orthogonal(update: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> Tensor:
    """A matrix with the singular vectors of `update` and singular values near 1: the Newton-Schulz iteration that Muon
    takes (Jordan et al. 2024), in the precision of `update`. `epsilon` keeps its first division finite."""
    linear, cubic, quintic = coefficients
    tall = update.size(0) > update.size(1)
    found = update.T if tall else update
    found = found / found.norm().clamp(min=epsilon)
    for _ in range(steps):
        square = found @ found.T
        found = torch.addmm(found, torch.addmm(square, square, square, beta=cubic, alpha=quintic), found, beta=linear)
    return found.T if tall else found


class Optimizers:
    """AdamW for all that trains, or Muon (Jordan et al. 2024) for the hidden matrices and AdamW for the rest, or
    schedule-free AdamW (Defazio et al. 2024), which keeps an average of the weights instead of lowering its steps.

    `decay` "matrices" leaves norms and biases out of the weight decay; "all" decays every parameter, as PyTorch's
    AdamW does when it is handed `model.parameters()`. Muon's updates are scaled to AdamW's size (Liu et al. 2025).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: OptimizerName,
        learning_rate: float,
        muon_learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        decay: Literal["matrices", "all"],
    ) -> None:
        self.names: dict[int, str] = {}
        matrices, decayed, plain = [], [], []
        for parameter_name, parameter in trained_parameters(model):
            self.names[id(parameter)] = parameter_name
            hidden = parameter.ndim == 2 and ".layers." in f".{parameter_name}"
            if name == "muon" and hidden:
                matrices.append(parameter)
            elif decay == "all" or parameter.ndim >= 2:
                decayed.append(parameter)
            else:
                plain.append(parameter)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.all: list[Optimizer] = []
        self._averaging: Any = None
        if name == "schedule-free":
            self._averaging = _schedule_free()(groups, lr=learning_rate, betas=betas)
            self._averaging.train()
            self.all.append(self._averaging)
        elif groups:
            self.all.append(AdamW(groups, lr=learning_rate, betas=betas, fused=True))
        if matrices:
            self.all.append(
                _Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    def step(self, factor: float) -> None:
        """One update with every base learning rate multiplied by `factor`; gradients are dropped afterwards."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            if isinstance(optimizer, Muon):
                distributed.whole_step(optimizer)
            else:
                optimizer.step()
        self.zero_gradients()

    @contextmanager
    def averaged(self) -> Iterator[dict[str, Tensor]]:
        """Let the network's weights be the average that the optimiser keeps, in the block; afterwards they are what
        they were, bit for bit. Yields those, by name; nothing, and nothing changes, without an average."""
        if self._averaging is None:
            yield {}
            return
        raw = {parameter: parameter.detach().clone() for parameter in self.parameters()}
        self._averaging.eval()
        try:
            yield {self.names[id(parameter)]: value for parameter, value in raw.items()}
        finally:
            self._averaging.train()
            with torch.no_grad():
                for parameter, value in raw.items():
                    parameter.copy_(value)

    def zero_gradients(self) -> None:
        """Drop the gradients without a step."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Every trained parameter."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                yield from group["params"]

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as `{"parameter name/entry": tensor}`, for safetensors."""
        tensors: dict[str, Tensor] = {}
        for number, group in enumerate(self._averaging.param_groups if self._averaging else ()):
            tensors |= {f"group {number}/{name}": torch.tensor(group[name], dtype=torch.float64) for name in _COUNTS}
        for optimizer in self.all:
            for parameter, entries in optimizer.state.items():
                for entry, value in entries.items():
                    tensors[f"{self.names[id(parameter)]}/{entry}"] = torch.as_tensor(value).contiguous()
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`."""
        entries: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            entries.setdefault(name, {})[entry] = value
        for number, group in enumerate(self._averaging.param_groups if self._averaging else ()):
            group |= {name: value.item() for name, value in entries[f"group {number}"].items()}
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = entries.get(self.names[id(parameter)], {})
                    optimizer.state[parameter] = {
                        key: distributed.part_of(value, parameter) for key, value in state.items()
                    }


def _schedule_free() -> Any:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise SettingsError(
            "schedulefree is not installed", field="optimizer", hint="pip install 'topkapi[train]'"
        ) from None
    return AdamWScheduleFree


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that change: beside adapters the others are frozen, and come from the parent again."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
