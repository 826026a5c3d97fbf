"""Where else a run's numbers go: trackio, Weights & Biases, TensorBoard. Each is a few lines over its library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topkapi.model.errors import SettingsError
from topkapi.training.run.directory import RunDirectory

Log = Callable[[dict[str, float], int], None]


@contextmanager
def tracked(name: str | None, run: RunDirectory, config: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, hand every number that is recorded in `run` to the tracker `name` (None: to none).

    The run is called as its directory and stands in the project of the folder around it. Raises `SettingsError` where
    the library is missing.
    """
    if name is None:
        yield
        return
    try:
        tracker = _TRACKERS[name](run.path, dict(config))
    except ImportError:
        package = {"tensorboard": "tensorboard"}.get(name, name)
        raise SettingsError(f"{name} is not installed", field="track", hint=f"pip install {package}") from None
    log, finish = tracker

    def listen(file: str, record: Mapping[str, Any]) -> None:
        numbers = {
            key: float(value)
            for key, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
        }
        if "event" not in record and file != "samples.jsonl" and numbers:
            log(numbers, record["step"])

    run.listeners.append(listen)
    try:
        yield
    finally:
        run.listeners.remove(listen)
        finish()


def _trackio(directory: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import trackio

    trackio.init(project=_project(directory), name=directory.name, config=config, resume="allow", embed=False)
    return lambda numbers, step: trackio.log(numbers, step=step), trackio.finish


def _wandb(directory: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import wandb

    run = wandb.init(
        project=_project(directory), name=directory.name, config=config, dir=directory, resume="allow",
        id=f"{_project(directory)}-{directory.name}",
    )  # fmt: skip
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _tensorboard(directory: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _project(directory: Path) -> str:
    return directory.resolve().parent.name or "topkapi"


_TRACKERS: dict[str, Callable[[Path, dict[str, Any]], tuple[Log, Callable[[], None]]]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
