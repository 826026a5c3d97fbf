"""What was measured as Markdown: medians, ratios with their spread, memory, load time, and the bound of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from .figures import Ratio, median, ratio
from .machine import BUSY

SERVED, IN_PROCESS = "Topkapi over HTTP", "Topkapi in process"

Piece = Mapping[str, Any]
Rows = list[list[str]]


def markdown(pieces: Sequence[Piece]) -> str:
    """Every table: for each processor, weights and class of precision one of medians and one of ratios."""
    groups: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in pieces:
        key = (
            piece["machine"]["processor"],
            piece["weights"],
            piece["precision"],
            piece["prompt_tokens"],
            piece["tokens"],
        )
        groups.setdefault(key, []).append(piece)
    return "\n".join(chain.from_iterable(_group(same) for same in groups.values()))


def _group(pieces: Sequence[Piece]) -> Iterator[str]:
    piece, machine = pieces[0], pieces[0]["machine"]
    busy = max(at for each in pieces for at in each["busy"])
    peers = list(dict.fromkeys(name for each in pieces for name in each["engines"]))
    runs = {name for each in pieces for row in each["rounds"] for run in row["figures"].values() for name in run}
    streams = sorted(int(name) for name in runs if name.isdigit())
    yield f"### {piece['weights']}, {piece['precision']}\n"
    yield (
        f"{machine['processor']} ({', '.join(machine['instruction_sets'])}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; prompts of {piece['prompt_tokens']}, {piece['tokens']} new tokens; "
        f"{_rounds(pieces)}; between rounds other programs used {busy:.1f} cores at most. "
        f"{'; '.join(dict.fromkeys(str(facts['version']) for each in pieces for facts in each['engines'].values()))}.\n"
    )
    if busy > BUSY:
        yield (
            f"**The machine was not idle: other programs used {busy:.1f} of {machine['cores']} cores.** Whatever "
            "shares its work among all cores and waits for the slowest suffers most of it: these ratios say little.\n"
        )
    yield from _table(["medians", *_columns(streams, times=True), "prefill of 512 tok/s", "load s",
                       f"MiB at {streams[-1]}", "of it Python's own"], _medians(pieces, peers, streams))  # fmt: skip
    yield from _bound(pieces)
    for ours in (SERVED, IN_PROCESS):
        rows = list(_ratios(pieces, ours, [name for name in peers if name not in (SERVED, IN_PROCESS)], streams))
        if rows:
            yield from _table([f"{ours} / peer", *_columns(streams, times=False), "prefill"], rows)


def _rounds(pieces: Sequence[Piece]) -> str:
    counts = sorted({len(piece["rounds"]) for piece in pieces})
    return " or ".join(map(str, counts)) + " rounds in turn"


def _columns(streams: Sequence[int], times: bool) -> Iterator[str]:
    for count in streams:
        yield f"{count}: decode" + " tok/s" * times
        if count > 1:
            yield f"{count}: end to end" + " tok/s" * times
            if times:
                yield f"{count}: first token p50 s"
            yield f"{count}: first token p99" + " s" * times


def _keys(streams: Sequence[int], times: bool) -> Iterator[tuple[str, str]]:
    for count in streams:
        yield str(count), "decode_tokens_per_s"
        if count > 1:
            yield str(count), "end_to_end_tokens_per_s"
            if times:
                yield str(count), "first_token_p50_s"
            yield str(count), "first_token_p99_s"
    yield "prefill", "prefill_tokens_per_s"


def _of(pieces: Sequence[Piece], engine: str, run: str) -> list[Mapping[str, float]]:
    """An engine's figures of every round of every piece, {} where it has none."""
    return [row["figures"].get(engine, {}).get(run, {}) for piece in pieces for row in piece["rounds"]]


def _medians(pieces: Sequence[Piece], engines: Sequence[str], streams: Sequence[int]) -> Iterator[list[str]]:
    for name in engines:
        cells = [_number(median(_of(pieces, name, run), measure)) for run, measure in _keys(streams, times=True)]
        facts = [piece["engines"][name] for piece in pieces if name in piece["engines"]]
        resident = max((each["resident_mib"].get(str(streams[-1]), 0.0) for each in facts), default=0.0)
        own = max(each["python_mib"] for each in facts)
        load = sorted(each["load_s"] for each in facts)[len(facts) // 2]
        yield [name, *cells, f"{load:.1f}", f"{resident:.0f}" if resident else "", f"{own:.0f}"]


def _ratios(pieces: Sequence[Piece], ours: str, peers: Sequence[str], streams: Sequence[int]) -> Iterator[list[str]]:
    found: list[list[Ratio | None]] = []
    for name in peers:
        row = [ratio(_of(pieces, ours, run), _of(pieces, name, run), measure)
               for run, measure in _keys(streams, times=False)]  # fmt: skip
        if any(row):
            found.append(row)
            yield [name, *(str(each) if each else "" for each in row)]
    if len(found) > 1:
        columns = ([each.median for each in column if each] for column in zip(*found, strict=True))
        yield ["**against the best**", *(f"**{min(column):.2f}**" if column else "" for column in columns)]


def _bound(pieces: Sequence[Piece]) -> Iterator[str]:
    for piece in pieces:
        bound = piece["bound"]
        line = (
            f"Memory is read at {bound['bytes_per_s'] / 1e9:.1f} GB/s, {bound['weights_bytes'] / 1e6:.0f} MB of "
            f"weights, a byte each, {bound['passes_per_s']:.0f} times a second"
        )
        if piece["precision"] in ("int8", "w8a8"):
            shares = []
            for name in piece["engines"]:
                rate = median(_of([piece], name, "1"), "decode_tokens_per_s")
                shares += [f"{name} {100 * rate / bound['passes_per_s']:.0f} %"] if rate else []
            line += ": one stream reaches " + ", ".join(shares)
        yield line + ".\n"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(head: Sequence[str], rows: Iterator[list[str]] | Rows) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""
