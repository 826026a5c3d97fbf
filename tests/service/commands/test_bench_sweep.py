"""`topkapi bench` over several numbers of streams: here, against a running server, as a plot, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from topkapi.model.errors import SettingsError
from topkapi.service.commands import bench_times
from topkapi.service.commands.bench_client import Server
from topkapi.service.commands.bench_shape import Shape
from topkapi.service.commands.bench_sweep import Measured, figures, sweep, table
from topkapi.service.commands.bench_times import Figure, busy, decode_rate, end_to_end_rate, percentiles, unsteady
from topkapi.service.commands.cli import main

SMALL = ["--tokens", "48", "--prompt-tokens", "5", "--repeats", "2"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("swept")


def check_sweep(found: dict[str, Any], streams: list[int]) -> None:
    """Of a few tokens of a tiny network a client may get all at once, which tells no rate of decoding."""
    assert [row["streams"] for row in found["sweep"]] == streams
    for row in found["sweep"]:
        assert row["end_to_end_tokens_per_s"] is not None
        for name in ("decode_tokens_per_s", "end_to_end_tokens_per_s"):
            if row[name] is None:
                continue
            assert 0 < row[name]["least"] <= row[name]["median"] <= row[name]["greatest"]
        assert row["first_token_ms"]["p50"] > 0
        assert 0 <= row["between_tokens_ms"]["p50"] <= row["between_tokens_ms"]["p90"]


def test_several_numbers_of_streams(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "bench.png"
    assert main(["bench", str(checkpoint), "--streams", "1,3", "--json", "--plot", str(plot), *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["tokens"], found["repeats"]) == ("swept", 48, 2)
    check_sweep(found, [1, 3])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_running_server(served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "bench.svg"
    assert main(["bench", "base", "--url", served.url, "--streams", "3,1", "--json", "--plot", str(plot), *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["url"]) == ("base", served.url)
    check_sweep(found, [3, 1])
    assert "<svg" in plot.read_text()
    assert main(["bench", "--url", served.url, "--streams", "2", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("chat (") and served.url in lines[0]
    assert lines[4].startswith("2 ")


@pytest.mark.parametrize(
    "flags,message",
    [
        (["nobody"], "serves chat, base, not nobody"),
        (["--tokens", "500"], "do not fit the context of 128 tokens"),
        (["--dtype", "int8"], "--dtype is for what is computed here"),
        (["--threads", "1"], "--threads is for what is computed here"),
        (["--streams", "1,0"], "--streams must be at least 1, not 0"),
        (["--plot", "bench.txt"], "must end in .png, .svg or .pdf"),
        (["--plot", "no-such-directory/bench.png"], "there is no directory no-such-directory"),
        (["--url", "127.0.0.1:8000"], "is not the address of a server"),
        (["--url", "http://127.0.0.1:1"], "nothing answers at http://127.0.0.1:1"),
        (["--url", "http://127.0.0.1:99999"], "is not the address of a server"),
    ],
)
def test_what_a_server_cannot_be_asked_is_refused(
    served: Any, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--url", served.url, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_what_refuses_to_answer_is_quoted(served: Any) -> None:
    server = Server.at(served.url)
    with pytest.raises(SettingsError, match="did not answer to the end.*max_tokens"):
        asyncio.run(server.generate([{"prompt": [5], "max_tokens": -1}]))
    with pytest.raises(SettingsError, match="is no Topkapi server: GET /models answered"):
        asyncio.run(Server.at(f"{served.url}/nowhere").models())


def test_a_stream_that_ends_early_is_no_measurement() -> None:
    async def generate(prompts: list[list[int]], tokens: int) -> list[list[float]]:
        return [[0.1 * at for at in range(1, tokens)] for _ in prompts]

    with pytest.raises(SettingsError, match="streams of 8 tokens had 7"):
        asyncio.run(sweep(Measured("short", 10, generate, {}), [2], Shape(tokens=8)))


def test_figures_of_known_times() -> None:
    """Two streams, the second of which begins when the first is halfway."""
    times = [
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0],
        [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0],
    ]
    assert decode_rate(times) == 2.0
    assert end_to_end_rate(times) == 20 / 14
    row = figures(2, [times] * 5)
    assert row["first_token_ms"] == {"p50": 1000.0, "p90": 5000.0, "p99": None}
    assert row["between_tokens_ms"] == {"p50": 1000.0, "p90": 1000.0, "p99": None}


def test_what_was_not_measured_is_not_printed() -> None:
    """The first stream has ended before the second has begun: a rate of both together would be nonsense."""
    apart = [[1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]]
    assert decode_rate(apart) is None
    row = figures(2, [apart])
    assert row["decode_tokens_per_s"] is None
    assert row["first_token_ms"] == {"p50": 1000.0, "p90": None, "p99": None}
    lines = table({"model": "m", "prompt_tokens": 4, "tokens": 4, "repeats": 1, "sweep": [row]}).splitlines()
    assert lines[4].split()[:5] == ["2", "-", "-", "-", "3.5"]
    assert lines[-1].startswith("-: too little to tell")
    assert not any("-" in cell and any(map(str.isdigit, cell)) for cell in lines[4].split()), "nothing is negative"


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentiles(list(range(1, 1001))) == {"p50": 500, "p90": 900, "p99": 990}
    assert percentiles([3.0, 1.0]) == {"p50": 1.0, "p90": None, "p99": None}
    assert percentiles([7.0]) == {"p50": None, "p90": None, "p99": None}


def test_a_busy_machine_is_warned_of(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_times.os, "getloadavg", lambda: (3.2, 1.0, 1.0))
    assert main(["bench", str(checkpoint), "--streams", "1,2", *SMALL]) == 0
    assert "warning: the machine is busy: 3.2 programs" in capsys.readouterr().err
    assert main(["bench", str(checkpoint), "--streams", "2", "--json", *SMALL]) == 0
    told = capsys.readouterr()
    assert told.err == "", "where both are for programs"
    assert json.loads(told.out)["warnings"][0].startswith("the machine is busy: 3.2 programs")
    assert busy(0.2) == [] and busy(None) == []


def test_repeats_that_differ_are_warned_of() -> None:
    steady, wild = Figure(10.0, 9.5, 10.5), Figure(10.0, 6.0, 11.0)
    assert unsteady({"a": steady, "b": None}) == []
    (warning,) = unsteady({"a": steady, "b": wild})
    assert "50 %" in warning and "(b)" in warning


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", str(checkpoint), "--plot", str(tmp_path / "bench.png")]) == 2
    assert "matplotlib" in capsys.readouterr().err


def test_tokens_are_counted_not_events() -> None:
    """An event may come in parts, hold several tokens, or none: text that was held back to the end."""
    parts = [
        b"HTTP/1.1 200 OK\r\n\r\nid: s:1\nevent: tok",
        b'en\ndata: {"token_ids": [5, 6]}\n\nid: s:2\nevent: token\n',
        b'data: {"token_ids": [7]}\n\nid: s:3\n',
        b'event: token\ndata: {"token_ids": []}\n\nid: s:4\nevent: done\ndata: {}\n\n',
    ]

    class Parts:
        async def read(self, size: int) -> bytes:
            return parts.pop(0) if parts else b""

    class Nowhere:
        write = close = staticmethod(lambda *data: None)

    class Told(Server):
        async def connect(self) -> Any:
            return Parts(), Nowhere()

    (times,) = asyncio.run(Told("here", 1).generate([{}]))
    assert len(times) == 3 and len(set(times)) == 1, "5, 6 and the head of 7 came together"
