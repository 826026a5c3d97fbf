"""Tokens per second and memory of a training step here, in a textbook's loop, in nanoGPT and in transformers' Trainer.

    python benchmarks/training_step.py [--shape 124m] [--against textbook trainer nanogpt:/path/to/nanoGPT]

Each runs in a process of its own, in turn, round after round, on the same batches of text; what is compared is each
round's pair. The shapes are GPT-2's with the output matrix tied, but for the textbook's. nanoGPT's `train.py` trains in
float32 on a CPU; in bfloat16 it runs under autocast, as it would on a GPU. The first step of a process is not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pydoc_data.topics
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.textbook import TextbookGPT, update
from topkapi.model.config import ModelConfig
from topkapi.model.linear import set_compute_dtype
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder, initialise
from topkapi.training.data.windows import Batch, WindowLoader
from topkapi.training.optimisation.device import keep_freed_memory
from topkapi.training.optimisation.loss import Compiled, backward
from topkapi.training.optimisation.optimisers import Optimizers

SHAPES = {
    "tiny": {"layers": 2, "width": 128, "heads": 4},
    "124m": {"layers": 12, "width": 768, "heads": 12},
    "355m": {"layers": 24, "width": 1024, "heads": 16},
}
VOCABULARY = 50_257
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 1e-4, 0.1, (0.9, 0.95), 1.0

Step = Callable[[Tensor, Tensor], float]


def ours(arguments: argparse.Namespace) -> Step:
    """Topkapi's update, as `training.trainer` makes it."""
    shape = SHAPES[arguments.shape]
    config = ModelConfig(
        family="gpt2", vocab_size=VOCABULARY, hidden_size=shape["width"], intermediate_size=4 * shape["width"],
        num_layers=shape["layers"], num_heads=shape["heads"], num_kv_heads=shape["heads"],
        head_dim=shape["width"] // shape["heads"], context_length=arguments.context, qkv_bias=True, output_bias=True,
        mlp_bias=True,
    )  # fmt: skip
    keep_freed_memory()
    model = Decoder(config)
    initialise(model, torch.Generator().manual_seed(0))
    set_compute_dtype(model, torch.bfloat16 if arguments.precision == "bf16" else None)
    optimizers = Optimizers(
        model, name="adamw", learning_rate=LEARNING_RATE, muon_learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
        betas=BETAS, decay="matrices",
    )  # fmt: skip
    compiled = Compiled.of(model) if arguments.compile else None

    def step(tokens: Tensor, targets: Tensor) -> float:
        batch = Batch(tokens, targets)
        loss = backward(model, batch, divisor=batch.weight(), compiled=compiled)
        torch.nn.utils.clip_grad_norm_(optimizers.parameters(), CLIP)
        optimizers.step(1.0)
        return loss

    return step


def textbook(arguments: argparse.Namespace) -> Step:
    """The textbook's loop, always in float32."""
    model = TextbookGPT(vocabulary=VOCABULARY, context=arguments.context, **SHAPES[arguments.shape])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return lambda tokens, targets: update(model, optimizer, tokens, targets)


def nanogpt(arguments: argparse.Namespace, checkout: str) -> Step:
    """The step of nanoGPT's `train.py`, with its own model and optimiser."""
    # Its file is called as our package is.
    found = importlib.util.spec_from_file_location("nanogpt", Path(checkout) / "model.py")
    if found is None or found.loader is None:
        raise SystemExit(f"{checkout} has no model.py")
    theirs = importlib.util.module_from_spec(found)
    found.loader.exec_module(theirs)
    shape = SHAPES[arguments.shape]
    model = theirs.GPT(theirs.GPTConfig(
        block_size=arguments.context, vocab_size=VOCABULARY, n_layer=shape["layers"], n_head=shape["heads"],
        n_embd=shape["width"], dropout=0.0, bias=True,
    ))  # fmt: skip
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, "cpu")
    compiled = torch.compile(model) if arguments.compile else model

    def step(tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16) if arguments.precision == "bf16" else nullcontext():
            _, loss = compiled(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


class Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = time.perf_counter()

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def trainer(arguments: argparse.Namespace, batches: list[Batch], clock: Clock) -> float:
    """transformers' Trainer on the same batches; its last loss."""
    import tempfile

    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    shape = SHAPES[arguments.shape]
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=arguments.context, n_embd=shape["width"], n_layer=shape["layers"],
        n_head=shape["heads"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    # The model moves the labels by one itself, so each row is the inputs and the last target.
    whole = [torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)[:, : arguments.context] for batch in batches]
    rows = [{"input_ids": row, "labels": row} for tokens in whole for row in tokens]
    with tempfile.TemporaryDirectory() as directory:
        work = Trainer(
            GPT2LMHeadModel(config),
            TrainingArguments(
                directory, per_device_train_batch_size=arguments.batch, max_steps=len(batches), use_cpu=True,
                bf16=arguments.precision == "bf16", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
                adam_beta2=BETAS[1], max_grad_norm=CLIP, lr_scheduler_type="constant", logging_steps=1, report_to=[],
                save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
                torch_compile=arguments.compile, optim="adamw_torch_fused",
            ),
            train_dataset=rows, callbacks=[Ticks()],
        )  # fmt: skip
        work.train()
    return next(entry["loss"] for entry in reversed(work.state.log_history) if "loss" in entry)


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant in this process."""
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    text = "\n\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    stream = np.array(Tokenizer.gpt2().encode(text), dtype=np.uint16)
    loader = WindowLoader(
        stream, context=arguments.context, stride=arguments.context, batch_size=arguments.batch, seed=0
    )
    batches = [loader.batch(step) for step in range(arguments.steps + 1)]
    clock = Clock()
    name, _, where = arguments.worker.partition(":")
    if name == "trainer":
        loss = trainer(arguments, batches, clock)
    else:
        step = nanogpt(arguments, where) if name == "nanogpt" else {"ours": ours, "textbook": textbook}[name](arguments)
        for batch in batches:
            clock.begin()
            loss = step(batch.tokens, batch.targets.contiguous())
            clock.end()
    tokens = arguments.batch * arguments.context
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"speed": tokens / statistics.median(clock.seconds[1:]), "memory": peak, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--against", nargs="+", default=["textbook", "trainer"], help="textbook, trainer, nanogpt:PATH")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--textbook-batch", type=int, help="the textbook's own batch (default: the same)")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="compile all but the textbook's")
    parser.add_argument("--steps", type=int, default=4, help="steps counted of each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments)))
        return
    print(
        f"{arguments.shape}, batch {arguments.batch} x {arguments.context}, {arguments.precision}"
        f"{', compiled' if arguments.compile else ''}: median of {arguments.steps} steps, {arguments.rounds} rounds"
    )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ["ours", *arguments.against]}
    for _ in range(arguments.rounds):
        for name, results in found.items():
            batch = arguments.textbook_batch if name == "textbook" and arguments.textbook_batch else arguments.batch
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--batch", str(batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'':16s} tokens/s   peak memory   last loss   ours is faster by")
    for name, results in found.items():
        speed = statistics.median(result["speed"] for result in results)
        memory = max(result["memory"] for result in results) / 2**30
        pairs = [mine["speed"] / theirs["speed"] for mine, theirs in zip(found["ours"], results, strict=True)]
        ratio = "" if name == "ours" else f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
        print(f"{name.partition(':')[0]:16s} {speed:8.1f} {memory:9.2f} GiB {results[-1]['loss']:11.4f}   {ratio}")


if __name__ == "__main__":
    main()
