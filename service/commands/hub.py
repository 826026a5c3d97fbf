"""`topkapi pull`, `list` and `rm`: the models of the Hugging Face hub that are on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from topkapi.model.errors import SettingsError, TopkapiError
from topkapi.model.hub.names import EXAMPLE


def add_hub(commands: Any) -> None:
    """Add the three commands; each `handler` takes the parsed namespace and returns an exit code."""
    pull = commands.add_parser(
        "pull",
        help="download a model from the Hugging Face hub, or its newest commit",
        description="Download what is needed to load a model of the Hugging Face hub, or what its newest commit has "
        "more. A download that was stopped goes on where it was. Whatever takes a checkpoint takes the same names, and "
        "downloads what is not here yet.",
        epilog=f"examples: topkapi pull {EXAMPLE}; topkapi pull owner/name@revision; topkapi pull owner/name:Q4_K_M",
    )
    pull.add_argument("name", nargs="+", help="owner/name, owner/name@revision, or owner/name:Q4_K_M of GGUF files")
    pull.set_defaults(handler=_pull)
    listed = commands.add_parser(
        "list",
        help="what models are on this machine",
        description="The models in the cache of the Hugging Face hub and the checkpoints that are served by default: "
        "how large they are, of which family, in which precision, and where.",
    )
    listed.add_argument("--json", action="store_true", help="print them as JSON, sizes in bytes")
    listed.set_defaults(handler=_list)
    remove = commands.add_parser(
        "rm",
        help="delete a downloaded model",
        description="Delete a model from the cache of the Hugging Face hub, or one revision or one GGUF file of it. "
        "Other programs that use this cache lose it, too.",
    )
    remove.add_argument("name", help="as topkapi list shows it")
    remove.add_argument("--yes", action="store_true", help="do not ask")
    remove.set_defaults(handler=_remove)


def _pull(arguments: argparse.Namespace) -> int:
    from topkapi.model.hub.resolve import name_given, pull

    names = [name_given(text) for text in arguments.name]
    for name in names:
        path = pull(name)
        print(f"{path}\nserve it with: topkapi serve {name}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from topkapi.model.hub.cache import entries
    from topkapi.model.hub.download import amount
    from topkapi.model.storage.inspection import inspect

    rows: list[dict[str, Any]] = []
    for entry in entries():
        row: dict[str, Any] = {"name": str(entry.name), "size": entry.size}
        if entry.path is None:
            rows.append(row | {"family": None, "precision": None, "where": None})
            continue
        found = inspect(entry.path)
        rows.append(row | {"family": found.family, "precision": found.precision, "where": str(entry.path)})
    for path in _own():
        found = inspect(path)
        rows.append({
            "name": str(path), "size": found.size, "family": found.family, "precision": found.precision,
            "where": str(path.resolve()),
        })  # fmt: skip
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"there are no models here yet; try: topkapi pull {EXAMPLE}")
        return 0
    table = [("NAME", "SIZE", "FAMILY", "PRECISION", "WHERE")]
    for row in rows:
        where = row["where"] or f"not whole; topkapi pull {row['name']} goes on, topkapi rm {row['name']} deletes it"
        table.append((row["name"], amount(row["size"]), row["family"] or "?", row["precision"] or "?", where))
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    for line in table:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line[:4], widths, strict=True)), line[4]]).rstrip())
    return 0


def _own() -> list[Path]:
    """The checkpoints that `topkapi serve` takes when none is named."""
    from topkapi.service.locations import default_checkpoints
    from topkapi.service.settings import Settings

    try:
        return [Path(place) for place in default_checkpoints(Settings.read())]
    except SettingsError:
        return []


def _remove(arguments: argparse.Namespace) -> int:
    from topkapi.model.hub.cache import hub_name_of, remove
    from topkapi.model.hub.download import amount
    from topkapi.model.hub.resolve import name_given

    path = Path(arguments.name)
    if path.exists() and hub_name_of(path) is None:
        raise SettingsError(
            f"{path} is not of the hub's cache: it is yours, and perhaps the only one",
            field="name",
            hint=f"delete it with your own hands: rm -r {path}",
        )
    name = name_given(arguments.name)
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise SettingsError(f"nobody is there to ask whether {name} may be deleted", hint="add --yes")
        if input(f"delete {name} from the cache? [y/N] ").strip().lower() not in ("y", "yes"):
            raise TopkapiError("nothing was deleted")
    print(f"{name}: deleted, {amount(remove(name))} are free again")
    return 0
