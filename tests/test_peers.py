"""The comparison with peers: its figures, its tables, and that it drives a program and a server to the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers.engines import LlamaCpp, Load, PeerError, _seconds_said, check_times
from benchmarks.peers.figures import Ratio, of_times, ratio
from benchmarks.peers.report import IN_PROCESS, SERVED, markdown
from benchmarks.peers.weights import int8_bytes

LLAMA_CPP = """#!{python}
import json, sys
if "--help" in sys.argv:
    print("-fa, --flash-attn [on|off|auto]")
elif "--version" in sys.argv:
    print("version: 1 (abc)", file=sys.stderr)
elif "broken" in sys.argv[0]:
    sys.exit("illegal instruction")
else:
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    assert given["-fa"] == "on", given
    streams, prompt, tokens = int(given["-npl"]), int(given["-npp"]), int(given["-ntg"])
    print("something else")
    print(json.dumps({{"t_pp": streams * prompt / 1000, "t_tg": tokens / 10}}))
"""


def llama_cpp(build: Path) -> Path:
    """A build directory whose program reads 1,000 tokens a second and makes 10 steps."""
    program = build / "bin" / "llama-batched-bench"
    program.parent.mkdir(parents=True)
    program.write_text(LLAMA_CPP.format(python=sys.executable))
    program.chmod(0o755)
    return build


def test_ratios_pair_figures_of_the_same_round() -> None:
    ours, theirs = [{"decode_tokens_per_s": rate} for rate in (10.0, 40.0, 30.0)], [{"decode_tokens_per_s": 10.0}] * 3
    assert ratio(ours, theirs, "decode_tokens_per_s") == Ratio(3.0, 1.0, 4.0, 3)
    assert ratio([*ours, {}], [*theirs, theirs[0]], "decode_tokens_per_s") == Ratio(3.0, 1.0, 4.0, 3)
    assert ratio([{}], theirs[:1], "decode_tokens_per_s") is None
    times = ratio([{"first_token_p99_s": 2.0}], [{"first_token_p99_s": 1.0}], "first_token_p99_s")
    assert times is not None and times.median == 0.5, "more than 1 is better, for times as well"


def test_figures_of_streams() -> None:
    figures = of_times([[1.0 + at for at in range(10)], [2.0 + at for at in range(10)]])
    assert figures == {
        "end_to_end_tokens_per_s": 20 / 11, "first_token_p50_s": 1.0, "first_token_p99_s": 2.0,
        "decode_tokens_per_s": 2.0,
    }  # fmt: skip
    assert "decode_tokens_per_s" not in of_times([[1.0, 2.0], [3.0, 4.0]]), "never at work together"


def test_each_stream_has_what_was_asked_for() -> None:
    load = Load([[1], [2]], 3)
    check_times("a", [[1.0, 2.0, 3.0]] * 2, load)
    for wrong in ([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0], [1.0]]):
        with pytest.raises(PeerError, match="a generated"):
            check_times("a", wrong, load)


def test_llama_cpps_figures_are_those_it_says(tmp_path: Path) -> None:
    engine = LlamaCpp("llama.cpp", llama_cpp(tmp_path / "build"), tmp_path / "weights.gguf")
    engine.start()
    assert engine.facts.version == "llama.cpp 1 (abc)"
    assert engine.run(Load([[1] * 100] * 8, 20)) == {
        "decode_tokens_per_s": 80.0, "end_to_end_tokens_per_s": 160 / 2.8, "first_token_p50_s": 0.8,
        "first_token_p99_s": 0.8,
    }  # fmt: skip
    assert engine.facts.resident_mib["8"] > 0
    broken = LlamaCpp("llama.cpp", llama_cpp(tmp_path / "broken"), tmp_path / "weights.gguf")
    broken.start()
    with pytest.raises(PeerError, match="illegal instruction"):
        broken.run(Load([[1]], 2))


def test_tables_of_forks_are_read() -> None:
    table = """
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|     8 |      4 |    2 |     24 |    0.523 |    30.59 |    1.250 |     6.40 |    1.773 |    13.54 |

"""
    assert _seconds_said(table) == (0.523, 1.25)
    assert _seconds_said("loading\n") is None


def piece(rates: dict[str, list[float]]) -> dict[str, Any]:
    def run(rate: float) -> dict[str, Any]:
        many = {"decode_tokens_per_s": 4 * rate, "end_to_end_tokens_per_s": 2 * rate, "first_token_p50_s": 1 / rate,
                "first_token_p99_s": 1 / rate}  # fmt: skip
        one = {"decode_tokens_per_s": rate}
        return {"1": one, "8": many, "prefill": {"prefill_tokens_per_s": 10 * rate}}

    facts = {"load_s": 1.0, "python_mib": 30.0, "resident_mib": {"8": 300.0}}
    return {
        "weights": "gpt2's shape", "precision": "int8", "prompt_tokens": 128, "tokens": 64, "busy": [0.1, 0.2],
        "machine": {"processor": "A processor", "instruction_sets": ["avx2"], "cores": 2, "memory_gib": 4},
        "bound": {"bytes_per_s": 1e10, "weights_bytes": 1e8, "passes_per_s": 100.0},
        "engines": {name: facts | {"version": f"{name} 1"} for name in rates}, "failed": {},
        "rounds": [
            {"figures": {name: run(each[turn]) for name, each in rates.items()}, "took_s": 1.0} for turn in range(3)
        ],
    }  # fmt: skip


def test_pieces_of_one_comparison_become_one_table() -> None:
    pieces = [
        piece({SERVED: [60.0, 66.0, 70.0], "llama.cpp": [50.0, 50.0, 50.0]}),
        piece({SERVED: [60.0, 66.0, 70.0], "OpenVINO": [33.0, 33.0, 33.0]}),
    ]
    lines = markdown(pieces).splitlines()
    assert sum(line.startswith("### ") for line in lines) == 1
    assert "A processor" in lines[2] and "llama.cpp 1" in lines[2] and "3 rounds" in lines[2]
    (llama,) = (line for line in lines if line.startswith("| llama.cpp | 1.32 (1.20-1.40)"))
    (openvino,) = (line for line in lines if line.startswith("| OpenVINO | 2.00 (1.82-2.12)"))
    assert llama.count("|") == openvino.count("|")
    (best,) = (line for line in lines if line.startswith("| **against the best**"))
    assert best.startswith("| **against the best** | **1.32** |")
    assert not any("not idle" in line for line in lines)
    busy = piece({SERVED: [60.0, 66.0, 70.0], "llama.cpp": [50.0] * 3}) | {"busy": [0.1, 1.5]}
    assert "**The machine was not idle: other programs used 1.5 of 2 cores.**" in markdown([busy])
    assert any("100 times a second" in line and f"{SERVED} 66 %" in line for line in lines)


def test_bytes_of_a_pass(tiny_checkpoint: Callable[..., Path]) -> None:
    """Every matrix once, of tied embeddings the output's use of it."""
    directory = tiny_checkpoint("counted")
    config = json.loads((directory / "config.json").read_text())
    counted = int8_bytes(directory)
    assert counted % config["hidden_size"] == 0
    assert counted >= config["vocab_size"] * config["hidden_size"]


@pytest.mark.slow
def test_a_whole_comparison(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, build = tiny_checkpoint("compared", context=1024), llama_cpp(tmp_path / "build")
    cache, results, tables = tmp_path / "cache", tmp_path / "results.json", tmp_path / "tables.md"
    (cache / "weights").mkdir(parents=True)
    (cache / "weights" / "compared.Q8_0.gguf").touch()
    arguments = [
        "--weights", directory, "--precision", "int8", "--llama-cpp", f"{build}=fake", "--only", "fake",
        "--rounds", "2",
        "--streams", "1,4", "--prompt-tokens", "20", "--tokens", "40", "--append", results, "--markdown", tables,
        "--cache", cache,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["peers", "run", *map(str, arguments)])
    assert command.main() == 0
    (found,) = json.loads(results.read_text())["pieces"]
    assert set(found["engines"]) == {SERVED, IN_PROCESS, "fake"} and not found["failed"]
    for row in found["rounds"]:
        for name in found["engines"]:
            assert row["figures"][name]["prefill"]["prefill_tokens_per_s"] > 0
            assert row["figures"][name]["4"]["end_to_end_tokens_per_s"] > 0
    assert found["engines"][SERVED]["resident_mib"]["4"] > 50
    assert "| fake |" in tables.read_text()
