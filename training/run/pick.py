"""`topkapi pick`: all kept checkpoints of a run on the same held-out data, and which is best."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from topkapi.model.errors import DataError, SettingsError


def add_pick(subparsers: Any) -> None:
    """Add the command; its `handler` takes the parsed namespace and returns an exit code."""
    command = subparsers.add_parser(
        "pick",
        help="find the best of a run's checkpoints on held-out data",
        description="Measure the loss of every checkpoint that a run kept on the same held-out data and name the best.",
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    command.add_argument(
        "--data", nargs="+", metavar="FILE", help="texts, or instructions for a fine-tune [the run's validation_data]"
    )
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences at once [8]")
    command.add_argument("--set", action="store_true", help="let the run's `best` point at it")
    command.add_argument("--json", action="store_true", help="print as JSON")
    command.set_defaults(handler=_pick)


def _pick(arguments: argparse.Namespace) -> int:
    # torch comes with it, and `topkapi --help` is to answer at once.
    from topkapi.training.run.directory import RunDirectory

    if arguments.batch_size < 1:
        raise SettingsError("--batch-size must be at least 1", field="batch_size")
    run = RunDirectory(arguments.run)
    if not (run.path / "config.yaml").is_file():
        raise SettingsError(f"there is no training run in {run.path}", field="run", hint="topkapi runs lists them")
    steps = run.steps("checkpoints")
    if not steps:
        raise SettingsError(f"{run.path} has kept no checkpoints yet", field="run", hint="wait for its first save")
    config = run.config()
    data = arguments.data or config.get("validation_data")
    if not data:
        raise DataError(
            "no held-out data", field="data", hint="give texts, or instructions for a fine-tune, with --data"
        )
    losses = {step: held_out_loss(run.checkpoint(step), data, config, arguments.batch_size) for step in steps}
    best = min(losses, key=lambda step: (losses[step], step))
    if arguments.set:
        run.point("best", best)
    if arguments.json:
        print(json.dumps({"losses": losses, "best": best}, indent=2))
        return 0
    for step, loss in losses.items():
        print(f"step-{step:<8} loss {loss:.4f}  perplexity {math.exp(loss):.2f}{'  *' if step == best else ''}")
    print(f"best: {run.checkpoint(best)}")
    print(f"{run.path / 'best'} points at it" if arguments.set else "point best at it with: --set")
    return 0


def held_out_loss(checkpoint: Path, data: list[str], config: dict[str, Any], batch_size: int) -> float:
    """Nats per token (of a fine-tune: per token of the answers) of a checkpoint, in fp32.

    `config` is the run's recipe, which tells how its data are read. Raises `DataError` for data that cannot be.
    """
    import torch

    from topkapi.model.storage.checkpoint import load_checkpoint
    from topkapi.training.optimisation.loss import evaluate

    loaded = load_checkpoint(checkpoint, dtype=torch.float32)
    context = min(config.get("context_length") or loaded.config.context_length, loaded.config.context_length)
    batches: Any
    if "text_field" not in config:
        from topkapi.training.data.finding import EXAMPLES, find_files
        from topkapi.training.data.instructions import ExampleLoader, encode_conversations, read_conversations
        from topkapi.training.data.row_files import Names

        if loaded.chat is None:
            raise SettingsError(f"{checkpoint} has no chat template", field="run")
        heading = loaded.chat.name == "alpaca"
        fields = Names(config.get("map") or [])
        files = find_files(data, kind=EXAMPLES, part="validation")
        rows = [row for file in files for row in read_conversations(file, input_heading=heading, names=fields)]
        examples, _ = encode_conversations(rows, loaded.tokenizer, loaded.chat, longest=context)
        batches = ExampleLoader(examples, batch_size=batch_size, seed=0).first(None)
    else:
        import numpy as np

        from topkapi.training.data.finding import find_files
        from topkapi.training.data.sources import read_documents
        from topkapi.training.data.windows import WindowLoader

        field, end = config.get("text_field", "text"), loaded.tokenizer.end_token_id
        texts = [
            loaded.tokenizer.encode(text)
            for file in find_files(data, part="validation")
            for text in read_documents(file, field)
        ]
        stream = np.array([token for text in texts for token in (*text, end)], dtype=np.uint32)
        sizes: Any = {"context": context, "stride": context, "batch_size": batch_size, "seed": 0}
        batches = WindowLoader(stream, sources=", ".join(data), validation=True, **sizes).first(None)
    return evaluate(loaded.model, batches)
