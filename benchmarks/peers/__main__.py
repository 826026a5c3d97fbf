"""Topkapi beside its peers on this machine: `python -m benchmarks.peers --help`, and README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .engines import ROOT, Engine, LlamaCpp, Load, PeerError, Worker, environment
from .environments import python
from .figures import Figures
from .machine import BUSY, cores_used, described
from .report import IN_PROCESS, SERVED, markdown
from .served import Served
from .weights import SHAPES, converted, gguf, int8_bytes, said, source

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "topkapi-peers"
PRECISIONS = ("int8", "w8a8", "int4", "w4a8", "float", "stored")
PREFILL = 512

Made = dict[str, Callable[[], Engine]]
"""How each program is made by its name; what it needs is fetched and converted only then."""


def engines(arguments: argparse.Namespace, directory: Path, kind: str) -> Made:
    """Every program that has weights of this class, ours first."""
    dtype = {"float": "float32"}.get(kind, kind)
    # As the peers round rows where weights have eight bits, and llama.cpp where they have four.
    kind = {"w8a8": "int8", "w4a8": "int4"}.get(kind, kind)
    checkpoint = arguments.weights if kind == "stored" else directory
    made: Made = {
        SERVED: lambda: Served(SERVED, checkpoint, dtype),
        IN_PROCESS: lambda: Worker(IN_PROCESS, sys.executable, "run_topkapi.py", str(checkpoint), dtype, ours=True),
    }

    def worker(peer: str, *more: str, label: str) -> Callable[[], Engine]:
        def make() -> Engine:
            interpreter = python(arguments.cache, peer)
            given = (
                directory if peer == "transformers" else converted(arguments.cache, directory, peer, kind, interpreter)
            )
            return Worker(label, interpreter, f"run_{peer}.py", str(given), *more)

        return make

    for name, build in arguments.llama_cpp:

        def make(name: str = name, build: Path = build) -> Engine:
            file = (
                arguments.weights
                if kind == "stored"
                else gguf(arguments.cache, directory, kind, arguments.llama_cpp[0][1])
            )
            return LlamaCpp(name, build, file)

        made[name] = make
    if kind != "stored":
        made["OpenVINO"] = worker("openvino", label="OpenVINO")
    if kind == "int8":
        made["CTranslate2"] = worker("ctranslate2", "int8", label="CTranslate2")
    if kind == "float":
        for held in ("float32", "bfloat16"):
            made[f"transformers {held}"] = worker("transformers", held, label=f"transformers {held}")
    wanted = [name.lower() for name in arguments.only or made]
    return {name: make for name, make in made.items()
            if name in (SERVED, IN_PROCESS) or any(name.lower().startswith(each) for each in wanted)}  # fmt: skip


def loads(arguments: argparse.Namespace, vocabulary: int, turn: int) -> Iterator[tuple[str, Load]]:
    """What a round asks of everybody, the same of each, and of no other round."""
    chance = random.Random(turn)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[chance.randrange(10, vocabulary - 10) for _ in range(length)] for _ in range(count)]

    for count in arguments.streams:
        yield str(count), Load(prompts(count, arguments.prompt_tokens), arguments.tokens)
    if not arguments.no_prefill:
        yield "prefill", Load(prompts(1, PREFILL), 1)


def once(engine: Engine, name: str, load: Load) -> Figures:
    """One run's figures; of a prompt alone, how fast it is read."""
    figures = engine.run(load)
    return {"prefill_tokens_per_s": PREFILL / figures["first_token_p99_s"]} if name == "prefill" else figures


def piece(
    arguments: argparse.Namespace, directory: Path, kind: str, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Everything that is asked for of one class of precision, in rounds, each of which has every program once.

    `keep` is given what there is after each round, so that a run that is broken off leaves what it has.
    """
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    found: dict[str, Any] = {
        "weights": directory.name if arguments.weights else f"{directory.name}'s shape, random weights",
        "precision": kind, "prompt_tokens": arguments.prompt_tokens, "tokens": arguments.tokens,
        "machine": described(), "busy": [], "bound": {}, "engines": {}, "failed": {}, "rounds": [],
    }  # fmt: skip
    began = time.monotonic()
    if arguments.if_idle and (used := cores_used()) > BUSY:
        raise PeerError(f"the machine is not idle: other programs use {used:.1f} cores; nothing was measured")
    with ExitStack() as stack:
        running: list[Engine] = []
        for name, make in engines(arguments, directory, kind).items():
            said(f"loading {name}, {kind}")
            try:
                engine = make()
                stack.callback(engine.close)
                engine.start()
                warm = [[token % vocabulary for token in range(10, 42)]] * max(arguments.streams)
                engine.run(Load(warm, 2))
                running.append(engine)
            except PeerError as error:
                if name in (SERVED, IN_PROCESS):
                    raise
                found["failed"][name] = str(error)
                said(f"{name} is left out: {error}")
        # The server imports what the other one does.
        running[0].facts.python_mib = running[1].facts.python_mib
        found["busy"] = [cores_used()]
        found["bound"] = memory_bound(int8_bytes(directory))
        for turn in range(arguments.rounds):
            longest = max((each["took_s"] for each in found["rounds"]), default=0.0)
            if arguments.seconds is not None and time.monotonic() - began + longest > arguments.seconds:
                said(f"no more than {turn} rounds fit into {arguments.seconds} s")
                break
            row: dict[str, Any] = {}
            started = time.monotonic()
            # Every second round goes backwards, so that what grows or cools down falls on all alike.
            for engine in running[:: -1 if turn % 2 else 1]:
                said(f"{kind}, round {turn + 1} of {arguments.rounds}: {engine.name}")
                row[engine.name] = {name: once(engine, name, load) for name, load in loads(arguments, vocabulary, turn)}
            found["rounds"].append({"figures": row, "took_s": time.monotonic() - started})
            found["engines"] = {engine.name: asdict(engine.facts) for engine in running}
            found["busy"].append(cores_used(0.5))
            keep(found)
    return found


def memory_bound(size: int) -> dict[str, float]:
    """How often a second weights of `size` bytes can be read; measured in a process whose BLAS has one thread."""
    command = [sys.executable, "-m", "benchmarks.peers.machine", str(size)]
    single = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment() | single, check=True)
    rate = float(done.stdout)
    return {"bytes_per_s": rate, "weights_bytes": size, "passes_per_s": rate / size}


def build_directory(given: str) -> tuple[str, Path]:
    """`DIRECTORY` or `DIRECTORY=NAME`."""
    directory, _, name = given.partition("=")
    path = Path(directory).resolve()
    if not (path / "bin" / "llama-batched-bench").exists():
        raise argparse.ArgumentTypeError(f"{path} has no bin/llama-batched-bench")
    return name or "llama.cpp", path


def counts(given: str) -> list[int]:
    """Numbers with commas between them."""
    return [int(part) for part in given.split(",")]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.peers", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(__doc__ or "").split("\n")[0],
    )  # fmt: skip
    made.add_argument(
        "task", nargs="?", default="run", choices=("run", "prepare", "report"),
        help="measure; only make environments and weights; or only print the tables of --append",
    )  # fmt: skip
    made.add_argument("--shape", choices=SHAPES, default="gpt2", help="random weights of this shape [gpt2]")
    made.add_argument("--weights", type=Path, metavar="PATH", help="these instead: a directory or a .gguf file")
    made.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["int8", "int4"],
                      help="classes to compare; stored: the GGUF file as it is [int8 int4]")  # fmt: skip
    made.add_argument("--llama-cpp", action="append", type=build_directory, default=[], metavar="DIR[=NAME]",
                      help="a build of llama.cpp or of a fork; its llama-quantize makes the files")  # fmt: skip
    made.add_argument("--only", nargs="+", metavar="NAME", help="only peers whose names begin so, beside Topkapi")
    made.add_argument("--streams", type=counts, default=[1, 8, 32], metavar="N,N,…", help="[1,8,32]")
    made.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="[128]")
    made.add_argument("--tokens", type=int, default=64, metavar="N", help="new tokens of each stream [64]")
    made.add_argument("--rounds", type=int, default=5, metavar="N", help="[5]")
    made.add_argument("--seconds", type=float, metavar="N", help="begin no round that would not end by then")
    made.add_argument("--if-idle", action="store_true", help="measure nothing where other programs are at work")
    made.add_argument("--no-prefill", action="store_true", help=f"leave out the prompt of {PREFILL}")
    made.add_argument("--append", type=Path, metavar="FILE", help="JSON file that the results are added to")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="where the tables go, beside standard output")
    made.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help=f"environments and weights [{CACHE}]")
    return made


def main() -> int:
    """Returns the exit code."""
    arguments = parser().parse_args()
    # Whoever ends this, as `timeout` does, ends the server and the workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments.cache = arguments.cache.resolve()
    before = (
        json.loads(arguments.append.read_text())["pieces"] if arguments.append and arguments.append.exists() else []
    )
    new: list[dict[str, Any]] = []
    try:
        if arguments.task != "report":
            directory = source(arguments.cache, arguments.shape, arguments.weights)
        for kind in arguments.precision if arguments.task != "report" else []:
            if arguments.task == "prepare":
                for name, make in engines(arguments, directory, kind).items():
                    try:
                        make().close()
                    except PeerError as error:
                        said(f"{name} can't be measured here: {error}")
                continue

            def keep(found: dict[str, Any]) -> None:
                if arguments.append:
                    arguments.append.write_text(json.dumps({"pieces": [*before, *new, found]}, indent=1) + "\n")

            new.append(piece(arguments, directory, kind, keep))
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.task != "prepare":
        # Of what is asked for now, or of the whole file.
        tables = markdown(before + new if arguments.task == "report" or arguments.append else new)
        print(tables)
        if arguments.markdown:
            arguments.markdown.write_text(tables + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
