"""How fast a run goes: tokens a second, what part of the machine's peak that is, and how long it still takes."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, field

import torch

from topkapi.model.config import ModelConfig
from topkapi.training.data.windows import Batch

# Dense bfloat16 peaks in TFLOPS from the makers' data sheets, by a word of the device's name; the first match counts.
GPU_TFLOPS = {
    "GB200": 2500, "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A6000": 155, "4090": 165, "3090": 71,
}  # fmt: skip
# Of its threads' time, the part that a measurement must have had.
_OWN_SHARE = 0.75
# A product of the largest size fills every kind of unit; it is come to by smaller ones, for measuring takes so long, in
# seconds, also where a precision is slow.
_MATRIX, _SMALLEST, _MEASURING = 1024, 128, 0.1


def flops_per_token(config: ModelConfig, trained_share: float, context: int) -> float:
    """Multiplications and additions of one trained token: two per weight forwards, two for what is handed back, two per
    trained weight for its gradient; and attention (Chowdhery et al. 2022, appendix B)."""
    embeddings = config.vocab_size * config.hidden_size * (not config.tie_embeddings)
    embeddings += config.context_length * config.hidden_size * config.learned_positions
    weights = config.parameter_count() - embeddings
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * context
    return weights * (4 + 2 * trained_share) + attention


def longest_text(batch: Batch) -> int:
    """Tokens of a batch that see one another, at most."""
    return max(batch.lengths) if batch.lengths is not None else batch.tokens.shape[1]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Multiplications and additions a second that matrix products in `dtype` reach at most on `device`.

    A known GPU's bfloat16 rate is its data sheet's; anything else is measured, with as many threads as torch has. None
    where other programs took so much of the processor meanwhile that the measurement says nothing.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for words, tflops in GPU_TFLOPS.items():
            # An RTX A1000 is no A100, and a laptop's 4090 another chip than a desktop's.
            if re.search(rf"\b{words}\b", name) and "Laptop" not in name:
                return tflops * 1e12
    largest = _MATRIX * (8 if device.type == "cuda" else 1)
    size = largest if device.type == "cuda" else _SMALLEST
    left, right = (torch.ones(largest, largest, dtype=dtype, device=device) for _ in range(2))
    # The first product of a process wakes the library up, which would count as its time.
    torch.mm(left[:size, :size], right[:size, :size])
    best, began, cpu = 0.0, time.monotonic(), time.process_time()
    while time.monotonic() - began < _MEASURING or not best:
        started = time.perf_counter()
        torch.mm(left[:size, :size], right[:size, :size])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        best = max(best, 2 * size**3 / seconds)
        if size < largest and 8 * seconds < _MEASURING:
            size *= 2
    share = (time.process_time() - cpu) / (time.monotonic() - began) / torch.get_num_threads()
    # Elsewhere a library may compute in ways that are not this process's time.
    measured_whole = device.type != "cpu" or sys.platform != "linux" or share >= _OWN_SHARE
    return best if measured_whole else None


@dataclass
class Throughput:
    """The speed of a run that began at step `first` of `total`.

    `token_flops` are those of one token (see `flops_per_token`), `peak` the machine's (None: unknown).
    """

    total: int
    first: int
    token_flops: float
    peak: float | None
    trained: int = 0
    processed: int = 0
    updating: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def note(self, trained: int, processed: int, seconds: float) -> None:
        """An update took `seconds`; of the `processed` tokens, `trained` were targets."""
        self.trained += trained
        self.processed += processed
        self.updating += seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning, everything included."""
        return time.monotonic() - self.began

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens a second of updating."""
        return self.trained / self.updating

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation: the part of the peak that the updates reach, 0 to 1.

        None where the peak is not known, or is shown to be more than was measured.
        """
        share = self.processed * self.token_flops / self.updating / self.peak if self.peak else None
        return share if share is not None and share <= 1 else None

    def seconds_left(self, step: int) -> float:
        """Until the last step, should it go on like this."""
        # After a return to an earlier step, the steps since then count as work done, not as progress.
        self.first = min(self.first, step - 1)
        return (self.total - step) * self.elapsed / (step - self.first)

    def facts(self) -> str:
        """Speed and utilisation, for a line."""
        utilisation = self.utilisation
        return f"{self.tokens_per_s:,.0f} tokens/s" + ("" if utilisation is None else f"  MFU {utilisation:.0%}")
