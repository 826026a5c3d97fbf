"""The curves of a sweep, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from topkapi.model.errors import SettingsError


def check_plot(path: Path) -> None:
    """Raise `SettingsError` before anything is measured for a plot that couldn't be drawn or written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SettingsError(
            "--plot needs matplotlib, which is not installed", field="plot", hint='pip install "topkapi[train]"'
        ) from None
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise SettingsError(f"--plot {path} must end in .png, .svg or .pdf", field="plot")
    if not path.parent.is_dir():
        raise SettingsError(f"--plot {path}: there is no directory {path.parent}", field="plot")


def draw(found: dict[str, Any], path: Path) -> None:
    """Rates, times to the first token and times between tokens by the number of streams, into `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    rates, first, between = figure.subplots(1, 3)
    rows = found["sweep"]
    for name, label in (("decode_tokens_per_s", "decode"), ("end_to_end_tokens_per_s", "end to end")):
        kept = [row for row in rows if row[name] is not None]
        streams, middle = [row["streams"] for row in kept], [row[name]["median"] for row in kept]
        rates.plot(streams, middle, marker="o", label=label)
        rates.fill_between(
            streams, [row[name]["least"] for row in kept], [row[name]["greatest"] for row in kept], alpha=0.2
        )
    for axes, name in ((first, "first_token_ms"), (between, "between_tokens_ms")):
        for percent in rows[0][name]:
            kept = [row for row in rows if row[name][percent] is not None]
            if kept:
                axes.plot(
                    [row["streams"] for row in kept], [row[name][percent] for row in kept], marker="o", label=percent
                )
    for axes, title in ((rates, "tokens/s"), (first, "first token, ms"), (between, "between tokens, ms")):
        axes.set_title(title)
        axes.set_xlabel("streams")
        axes.set_xscale("log", base=2)
        axes.set_xticks([row["streams"] for row in rows], [str(row["streams"]) for row in rows])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{found['model']}, prompts of {found['prompt_tokens']}, {found['tokens']} new tokens")
    figure.savefig(path)
