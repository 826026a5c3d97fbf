"""The card of a checkpoint on the hub: what it is, how it was made, its figures in the hub's form (`model-index`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from topkapi.model.errors import DataError, SettingsError

_TYPES = {
    "perplexity": "perplexity", "bits per byte": "bits_per_byte", "accuracy": "accuracy", "loss": "loss",
}  # fmt: skip


def card(checkpoint: Path, name: str, evaluations: Iterable[Path] = (), licence: str | None = None) -> str:
    """The README.md of the checkpoint called `name`: YAML that the hub reads, then what there is to tell.

    `evaluations` are files that `topkapi evaluate --out` wrote (evaluation.json). Raises `SettingsError` where
    huggingface_hub is not installed, and `DataError` for a file that is no such one.
    """
    hub = hub_library("a card", "checkpoint")

    # An adapter's directory has the configuration of its base somewhere else.
    adapter = (checkpoint / "adapter_config.json").is_file()
    config, made = {} if adapter else _read(checkpoint / "config.json"), _details(checkpoint)
    figures = [*_own(made), *(figure for path in evaluations for figure in _evaluated(path, checkpoint))]
    results = [
        hub.EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=_slug(data),
            dataset_name=data,
            metric_type=_TYPES.get(measure, _slug(measure)),
            metric_name=measure,
            metric_value=value,
        )
        for data, measure, value in figures
    ]
    chat = "chat_template" in _read(checkpoint / "tokenizer_config.json")
    metadata = hub.ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["topkapi", *filter(None, [config.get("model_type")]), *(["conversational"] if chat else [])],
        license=licence,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{_text(name, config, made, figures, chat)}"


def _text(
    name: str, config: Mapping[str, Any], made: Mapping[str, Any], figures: list[tuple[str, str, float]], chat: bool
) -> str:
    kind = "chat" if chat else "base"
    family = config.get("model_type")
    what = f"A {kind} checkpoint of the {family} family." if family else f"An adapter for a {kind} checkpoint."
    lines = [f"# {name}", "", what]
    context = config.get("max_position_embeddings", config.get("n_positions"))
    facts = [
        ("parameters", f"{made['parameters']:,}" if isinstance(made.get("parameters"), int) else None),
        ("context", None if context is None else f"{context:,} tokens"),
        ("made by", made.get("made_by")),
        ("steps", made.get("step")),
    ]
    rows = [f"| {what} | {value} |" for what, value in facts if value is not None]
    if rows:
        lines += ["", "| | |", "|---|---|", *rows]
    if figures:
        lines += ["", "| data | measure | value |", "|---|---|---:|"]
        lines += [f"| {data} | {measure} | {value:.4g} |" for data, measure, value in figures]
    return "\n".join([*lines, "", "Serve it with `topkapi serve`, or load it with transformers, vLLM or others.", ""])


def _own(made: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """What the run itself measured on its validation data."""
    loss = made.get("validation_loss")
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        return []
    return [("the run's validation data", "loss", round(loss, 4)),
            ("the run's validation data", "perplexity", round(math.exp(min(loss, 700)), 3))]  # fmt: skip


def _evaluated(path: Path, checkpoint: Path) -> list[tuple[str, str, float]]:
    """(data, measure, value) of an evaluation.json, of this checkpoint where several were compared."""
    try:
        content = json.loads(path.read_text("utf-8"))
        names = content["checkpoints"]
        own = next((name for name in names if Path(name).resolve() == checkpoint.resolve()), None)
        if own is None and len(names) > 1:
            raise DataError(
                f"{path} compares {', '.join(names)}, and none of them is {checkpoint}",
                field="evaluation",
                hint="evaluate this checkpoint: topkapi evaluate CHECKPOINT --out DIR",
            )
        found = []
        for task in content["tasks"]:
            for measure in task["measures"]:
                value = measure["values"][own or names[0]]["value"]
                if value is not None:
                    found.append((str(task["name"]), str(measure["measure"]), round(float(value), 4)))
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not what topkapi evaluate --out writes: {type(error).__name__}: {error}",
            field="evaluation",
            hint="give an evaluation.json",
        ) from None


def _details(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "topkapi.json"
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}", field="checkpoint") from None
    return content if isinstance(content, dict) else {}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "data"


def hub_library(what: str, field: str) -> Any:
    """huggingface_hub. Raises `SettingsError`, about `what` and `field`, where it is not installed."""
    try:
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError:
        raise SettingsError(f"{what} needs huggingface_hub", field=field, hint="pip install 'topkapi[train]'") from None
    return huggingface_hub
