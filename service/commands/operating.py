"""`topkapi key` and `topkapi config`: what whoever runs a server needs before it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from topkapi.model.nearest import nearest
from topkapi.service.commands.flags import add_setting_flags
from topkapi.service.keys import Key, KeyRing, digest_of, line_of, new_key, read_line
from topkapi.service.quotas import Limits
from topkapi.service.settings import Settings


def add_key(commands: Any) -> None:
    """Add `topkapi key`."""
    key = commands.add_parser(
        "key",
        help="make an API key, or the hash of one",
        description="API keys. The server is told their hashes alone, in a file with one line each (--keys FILE): "
        "NAME ROLE sha256:HASH, then limits such as requests_per_minute=60. With the role use a key asks for texts and "
        "numbers, with admin it also loads and unloads checkpoints and reads /metrics. A line that is taken out of the "
        "file, or added, counts within a second.",
    )
    actions = key.add_subparsers(title="actions", metavar="ACTION", required=True)
    new = actions.add_parser(
        "new",
        help="print a new key and its line",
        description="Print a new key, which nothing else knows or keeps, on standard output, and its line for the file "
        "of keys. With --append the line goes there itself.",
    )
    _add_options(new)
    new.add_argument("--append", metavar="FILE", help="add the line to this file of keys")
    new.set_defaults(handler=_new)
    hashed = actions.add_parser(
        "hash",
        help="print the line of a key that is given",
        description="Read a key from standard input and print its line for the file of keys.",
    )
    _add_options(hashed)
    hashed.set_defaults(handler=_hash)


def add_config(commands: Any) -> None:
    """Add `topkapi config`."""
    config = commands.add_parser(
        "config",
        help="print the settings that topkapi serve would have, and where each comes from",
        description="Print every setting of topkapi serve with these flags, in this environment and by this file, as a "
        "YAML file, and behind each where it comes from. Nothing is served.",
    )
    config.add_argument("--json", action="store_true", help="print them as JSON: value and source of each")
    add_setting_flags(config)
    config.set_defaults(handler=_config)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="whose key it is: letters, digits and . _ @ -")
    parser.add_argument("--role", choices=["use", "admin"], default="use", help="what it may do [use]")
    parser.add_argument("--requests-per-minute", type=int, metavar="N", help="most requests a minute [no limit]")
    parser.add_argument("--tokens-per-minute", type=int, metavar="N", help="most tokens a minute, read and written "
                        "[no limit]")  # fmt: skip
    parser.add_argument("--concurrency", type=int, metavar="N", help="most requests at once [no limit]")
    parser.add_argument("--priority", type=int, default=0, metavar="N", help="its requests go before those of keys "
                        "with less, -100 to 100 [0]")  # fmt: skip


def _line(arguments: argparse.Namespace, key: str) -> str:
    limits = Limits(arguments.requests_per_minute, arguments.tokens_per_minute, arguments.concurrency)
    line = line_of(Key(arguments.name, arguments.role, digest_of(key), limits, arguments.priority))
    try:
        read_line(line)
    except ValueError as error:
        arguments.parser.error(str(error))
    return line


def _new(arguments: argparse.Namespace) -> int:
    key = new_key()
    line = _line(arguments, key)
    if arguments.append is not None:
        # Nobody else needs to read it, though hashes tell nothing.
        descriptor = os.open(arguments.append, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        print(key)
        print(f"Its line is in {arguments.append}. The key is kept nowhere: copy it now.", file=sys.stderr)
    else:
        print(f"{key}\n{line}")
        hint = "The first line is the key, which is kept nowhere; the second one goes into the file of --keys."
        print(hint, file=sys.stderr)
    return 0


def _hash(arguments: argparse.Namespace) -> int:
    key = sys.stdin.readline().strip()
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        arguments.parser.error("a key has at least 16 letters, digits and signs, without spaces")
    print(_line(arguments, key))
    return 0


def _config(arguments: argparse.Namespace) -> int:
    import yaml

    flags = {name: getattr(arguments, name, None) for name in Settings.model_fields}
    settings, sources = Settings.with_sources(**flags)
    secret = settings.api_key
    ring = KeyRing.of(settings)
    values = json.loads(settings.model_dump_json(exclude={"config", "api_key"}))
    if arguments.json:
        shown: dict[str, Any] = {name: {"value": value, "source": sources[name]} for name, value in values.items()}
        shown["api_key"] = {"value": None if secret is None else "not shown", "source": sources["api_key"]}
        print(json.dumps(shown, indent=2))
    else:
        for name, value in values.items():
            written = yaml.safe_dump({name: value}, default_flow_style=True, width=10_000).strip()[1:-1]
            print(f"{written}  # {sources[name]}")
        if secret is not None:
            print(f"# api_key is given by {sources['api_key']} and not shown")
        for key in ring.keys:
            print(f"# key {key.name}: {key.role}")
    for variable in sorted(os.environ):
        name = variable.lower().removeprefix("topkapi_")
        if variable.upper().startswith("TOPKAPI_") and name not in Settings.model_fields:
            near = nearest(name, Settings.model_fields)
            if near:
                print(f"warning: {variable} is no setting; did you mean TOPKAPI_{near.upper()}?", file=sys.stderr)
    return 0
