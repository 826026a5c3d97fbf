"""How much a key may ask for: requests and tokens a minute, and requests at once.

A bucket that fills steadily and holds a minute's worth (the token bucket of ATM and of most rate limiters): what was
not used within a minute is not saved up. What a request will read is known when it begins and must be there; what it
writes is known only when it is written and is taken then, so that a bucket may be in debt. The next request waits for
the debt to be paid: nobody has to say beforehand how long an answer will be, and over any time no more is used than
the limit and one answer for each of the requests at once.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal, Protocol
from weakref import WeakSet

from topkapi.model.errors import TopkapiError

SECONDS = 60.0
"""Over which limits are counted."""

LONGEST_WAIT = 3600
"""Seconds that a client is told to wait at most."""

Limited = Literal["requests", "tokens"]


class RateLimited(TopkapiError):
    """The key has used what it may of `limited`, or has as many requests under way as it may."""

    status = 429
    kind = "rate_limit_exceeded"

    def __init__(self, message: str, *, limited: str, retry_after: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.limited = limited
        self.retry_after = max(1, min(LONGEST_WAIT, math.ceil(retry_after)))


@dataclass(frozen=True)
class Limits:
    """Most requests and tokens a minute, and requests at once; None: as many as there are."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


class Bucket:
    """`limit` a minute, of which at most a minute's worth is there at once. Times are `time.monotonic()`'s."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._level, self._at = float(limit), time.monotonic()

    @property
    def left(self) -> float:
        """What may be taken now; below zero, what is owed."""
        now = time.monotonic()
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / SECONDS)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        """Take so much, whether it is there or not."""
        self._level = self.left - amount

    def wait(self, amount: float) -> float:
        """Seconds until so much is there, or all that ever will be."""
        return max(0.0, min(amount, self.limit) - self.left) * SECONDS / self.limit


class Working(Protocol):
    """Work that a key has under way."""

    @property
    def over(self) -> bool:
        """Whether nothing is done for it any more."""
        ...


@dataclass(eq=False)
class UnderWay:
    """Work whose end is told by whoever does it."""

    over: bool = False


class Quota:
    """What one key has used of its limits. Used on one event loop."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.buckets: dict[Limited, Bucket] = {}
        if limits.requests_per_minute is not None:
            self.buckets["requests"] = Bucket(limits.requests_per_minute)
        if limits.tokens_per_minute is not None:
            self.buckets["tokens"] = Bucket(limits.tokens_per_minute)
        self._working: WeakSet[Working] = WeakSet()

    def count_request(self) -> None:
        """Count a request. Raises `RateLimited`, and then counts nothing."""
        self._need("requests", 1)
        self.use("requests", 1)

    def begin(self, tokens: int, work: Working) -> None:
        """Begin work that reads so many tokens. Raises `RateLimited`, and then takes nothing."""
        self._need_room()
        self._need("tokens", tokens)
        self.use("tokens", tokens)
        self._note(work)

    def enter(self, work: Working) -> None:
        """Begin work whose tokens are counted where it is done. Raises `RateLimited`."""
        self._need_room()
        self._note(work)

    def _note(self, work: Working) -> None:
        if self.limits.concurrency is not None:
            self._working.add(work)

    def _need_room(self) -> None:
        most = self.limits.concurrency
        if most is not None:
            under_way = sum(not each.over for each in self._working)
            if under_way >= most:
                requests = "request" if most == 1 else "requests"
                message = f"the key {self.name} may have {most} {requests} under way at once, and has {under_way}"
                raise RateLimited(message, limited="concurrency", retry_after=1, hint="send it when one has ended")

    def use(self, limited: Limited, amount: int) -> None:
        """Take what was used."""
        if limited in self.buckets:
            self.buckets[limited].take(amount)

    def share(self) -> tuple[int, float] | None:
        """Tokens a minute, and what is left of them, for a `Share`; None where there is no such limit."""
        bucket = self.buckets.get("tokens")
        return None if bucket is None else (bucket.limit, bucket.left)

    def _need(self, limited: Limited, amount: int) -> None:
        bucket = self.buckets.get(limited)
        if bucket is not None and (wait := bucket.wait(amount)) > 0:
            per_minute = f"{bucket.limit:,} {limited} a minute"
            needed = f", and this request reads {amount:,}" if limited == "tokens" else ""
            message = f"the key {self.name} may use {per_minute}{needed}"
            hint = f"try again in {math.ceil(wait)} s"
            raise RateLimited(message, limited=limited, retry_after=wait, hint=hint)


class Share(Quota):
    """The quota of one request in another process than that which counts what its key uses: what was left of the key's
    tokens when the request was passed on, and what it has `taken` of them since."""

    def __init__(self, name: str, limit: int, left: float) -> None:
        super().__init__(name, Limits(tokens_per_minute=limit))
        self.buckets["tokens"].take(limit - left)
        self.taken = 0

    def use(self, limited: Limited, amount: int) -> None:
        """As `Quota.use`."""
        super().use(limited, amount)
        if limited == "tokens":
            self.taken += amount
