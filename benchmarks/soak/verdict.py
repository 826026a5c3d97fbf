"""What a soak says of the promises: from what its clients saw, and from the server's own log."""

from __future__ import annotations

import bisect
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

STEP = 0.5
"""Seconds by which a wait may be longer than allowed: it is looked at once in each step."""


@dataclass(frozen=True)
class Record:
    """What came of a request; `attempt` counts how often it had been refused before."""

    identifier: str
    kind: str
    dialect: str
    status: int
    sent_at: float
    seconds: float
    retry_after: int | None
    attempt: int


@dataclass
class Verdict:
    """Figures by their names, and how often what was not kept."""

    figures: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)


def verdict(records: Sequence[Record], memory: Sequence[tuple[float, int]], health: Sequence[float], log: Path,
            queue_seconds: float) -> Verdict:  # fmt: skip
    """The verdict over everything that was asked."""
    found = Verdict()
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["logger"] == "topkapi.access" and "request_id" in line]
    _count(found, records)
    _log(found, records, requests, queue_seconds)
    _retry_after(found, records, requests)
    _flat(found, memory)
    p99 = statistics.quantiles(health, n=100)[98] if len(health) > 1 else math.inf
    times = (round(each, 4) for each in (statistics.median(health), p99, max(health)))
    found.figures["/health: asked, median, p99, most (s)"] = (len(health), *times)
    found.problems["/health took longer than 0.2 s (p99)"] = int(p99 >= 0.2)
    errors = [line for line in lines if line["level"] in ("error", "critical")]
    found.problems["errors in the log"] = len(errors)
    if errors:
        found.figures["first error"] = errors[0]
    return found


def _count(found: Verdict, records: Sequence[Record]) -> None:
    found.figures["requests by kind"] = dict(Counter(record.kind for record in records).most_common())
    found.figures["requests by status"] = dict(sorted(Counter(record.status for record in records).items()))
    found.figures["answered by dialect"] = dict(Counter(r.dialect for r in records if r.status == 200).most_common())


def _log(found: Verdict, records: Sequence[Record], requests: Sequence[dict[str, Any]], most: float) -> None:
    """Each request has one line in the log, and none began later than it may have to wait."""
    seen = Counter(line["request_id"] for line in requests)
    found.problems["more than one end in the log"] = sum(count > 1 for count in seen.values())
    answered = {record.identifier for record in records if record.status}
    found.problems["answered, but not in the log"] = len(answered - seen.keys())
    waits = sorted(line.get("queue_s", 0.0) for line in requests if line["status"] == 200)
    if waits:
        found.figures["waited in the queue: median, p99, most (s)"] = tuple(
            round(waits[min(len(waits) - 1, int(part * len(waits)))], 3) for part in (0.5, 0.99, 1)
        )
    found.problems["waited longer than allowed"] = sum(wait > most + STEP for wait in waits)


def _retry_after(found: Verdict, records: Sequence[Record], requests: Sequence[dict[str, Any]]) -> None:
    """What was refused was told how long what is before it takes: the next one that got in began when that was over."""
    begun = []
    for line in requests:
        if line.get("model") == "soaked" and "queue_s" in line:
            arrived = datetime.fromisoformat(line["time"]).timestamp() - line["seconds"]
            begun.append((arrived, arrived + line["queue_s"]))
    begun.sort()
    ratios, brief, brief_right = [], 0, 0
    for record in records:
        if record.retry_after is None or record.kind == "second":
            continue
        at = record.sent_at + record.seconds
        place = bisect.bisect(begun, (at, math.inf))
        if place == len(begun):
            continue
        took = begun[place][1] - at
        if took < 1:
            # The header has whole seconds, and 1 is the least.
            brief, brief_right = brief + 1, brief_right + (record.retry_after == 1)
        else:
            ratios.append(record.retry_after / took)
    again = [record for record in records if record.attempt == 1]
    refused = [record.retry_after for record in records if record.retry_after is not None]
    found.figures["refused with Retry-After: number, median (s)"] = (
        len(refused), statistics.median(refused) if refused else None)  # fmt: skip
    got_in = sum(record.status == 200 for record in again)
    found.figures["came again when told: number, part that got in"] = len(again), round(got_in / max(1, len(again)), 3)
    if not ratios:
        return
    ratios.sort()
    right = sum(0.5 <= ratio <= 2 for ratio in ratios)
    found.figures["Retry-After, told / true: p1, p10, median, p90, p99"] = tuple(
        round(ratios[int(part * len(ratios))], 2) for part in (0.01, 0.1, 0.5, 0.9, 0.99)
    )
    found.figures["Retry-After within a factor of two"] = f"{right} of {len(ratios)} = {right / len(ratios):.3f}"
    found.figures["waits below 1 s, told 1 s"] = f"{brief_right} of {brief}"
    found.problems["Retry-After off by more than a factor of two (more than 1 % of them)"] = (
        len(ratios) - right if right < 0.99 * len(ratios) else 0)  # fmt: skip


def _flat(found: Verdict, memory: Sequence[tuple[float, int]]) -> None:
    """Minutes of the last two thirds (20 minutes of 30), by their means."""
    began, end = memory[0][0], memory[-1][0]
    minutes: dict[int, list[int]] = {}
    for at, held in memory:
        if at - began >= (end - began) / 3 and end - at < 60 * int((end - began) * 2 / 3 / 60):
            minutes.setdefault(int((end - at) // 60), []).append(held)
    means = [statistics.mean(each) / 2**20 for each in minutes.values()]
    if means:
        spread = (max(means) - min(means)) / statistics.mean(means)
        figure = (round(min(means), 1), round(max(means), 1), f"{spread:.1%}")
        found.figures["memory, minutes of the last two thirds: least, most (MiB)"] = figure
        found.problems["memory not flat within 5 %"] = int(spread > 0.05)
