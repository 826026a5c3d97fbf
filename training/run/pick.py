"""`topkapi pick`: all kept checkpoints of a run on the same held-out data, and which is best."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from topkapi.model.errors import DataError, SettingsError

# So large a part of a text's runs of tokens may be in other texts of its kind.
_COMMON = 0.01


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
    for finding in overlap_with_training(run.checkpoint(steps[-1]), data, config):
        print(f"warning: {finding}", file=sys.stderr)
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


def overlap_with_training(checkpoint: Path, data: list[str], config: dict[str, Any]) -> list[str]:
    """What of `data` the run was trained on, or that this can't be said any more, a sentence each.

    Files are told by their digests, conversations by their prompts, texts by runs of 32 tokens; what the run itself set
    aside of its data is not known here, so data of its own files count as trained on.
    """
    from topkapi.training.data.finding import EXAMPLES, TEXTS, find_files
    from topkapi.training.data.weights import sources_and_weights

    kind = TEXTS if "text_field" in config else EXAMPLES
    held_out = find_files(data, kind=kind, part="validation")
    own = config.get("validation_data") or []
    if own and set(held_out) <= set(find_files(own, kind=kind, part="validation")):
        # The run itself has looked at these.
        return []
    try:
        trained = find_files(sources_and_weights(config["data"])[0], kind=kind)
    except DataError:
        return ["the run's training data are not there any more: whether it has seen these can't be said"]
    count, total, what = _seen_of(checkpoint, trained, held_out, config)
    # A few turns of phrase are in all texts; a prompt is the same on purpose.
    if count <= (_COMMON * total if kind is TEXTS else 0):
        return []
    return [
        f"{count:,} of {total:,} {what} also occur in the run's training data: the losses look better than they are"
    ]


def _seen_of(
    checkpoint: Path, trained: list[Path], held_out: list[Path], config: dict[str, Any]
) -> tuple[int, int, str]:
    """How many prompts, or runs of tokens, of the files `held_out` are in those that were `trained` on, and of how
    many."""
    if "text_field" not in config:
        from topkapi.training.data.instructions import read_conversations
        from topkapi.training.data.row_files import Names

        def prompts(files: list[Path]) -> list[str]:
            names = Names(config.get("map") or [])
            return [
                str(row.prompt())
                for file in files
                for row in read_conversations(file, input_heading=False, names=names)
            ]

        seen, asked = set(prompts(trained)), prompts(held_out)
        return sum(prompt in seen for prompt in asked), len(asked), "prompts"
    import numpy as np

    from topkapi.model.text.tokenizer import Tokenizer
    from topkapi.training.data.inspection import OVERLAP_TOKENS, overlapping_blocks
    from topkapi.training.data.sources import read_documents

    tokenizer = Tokenizer.from_directory(checkpoint)

    def stream(files: list[Path]) -> Any:
        texts = (text for file in files for text in read_documents(file, config["text_field"]))
        return np.array([token for text in texts for token in tokenizer.encode(text)], dtype=np.uint32)

    blocks, found = overlapping_blocks(stream(trained), stream(held_out))
    return found, blocks, f"runs of {OVERLAP_TOKENS} tokens"
