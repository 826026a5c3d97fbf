"""API keys: who may use the server, who may change it, and how much of it each may have.

A key is 256 random bits, so that its SHA-256 tells nothing about it: what slow hashes are for, passwords that can be
guessed, are never keys here. Files and memory hold the hash alone.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from topkapi.model.errors import SettingsError
from topkapi.model.nearest import nearest
from topkapi.model.user_files import LONGEST_SETTINGS, read_file
from topkapi.service.quotas import Limits, Quota
from topkapi.service.settings import Settings

logger = logging.getLogger(__name__)

Role = Literal["use", "admin"]
"""`use` asks for texts and numbers; `admin` may also change what is loaded, and read the metrics."""

PREFIX = "tk-"
HASH = "sha256:"
SHORTEST = 16
"""Characters of a key that somebody chose."""

LONGEST = 512
LOOK_SECONDS = 1.0
"""Between two looks at whether the file of keys has changed."""

FROM_ENVIRONMENT = "environment"
"""The name of the key that the environment holds."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LEAST = {"requests_per_minute": 1, "tokens_per_minute": 1, "concurrency": 1, "priority": -100}
_MOST = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "concurrency": 10**6, "priority": 100}


@dataclass(frozen=True)
class Key:
    """One caller. Its requests go before all of keys with a lower `priority`."""

    name: str
    role: Role
    digest: str = field(repr=False)
    limits: Limits = field(default_factory=Limits)
    priority: int = 0


def new_key() -> str:
    """A key that nobody has."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return HASH + hashlib.sha256(key.encode()).hexdigest()


def line_of(key: Key) -> str:
    """The line of a file of keys that says who has which key."""
    given = {**vars(key.limits), "priority": key.priority or None}
    rest = [f"{name}={value}" for name, value in given.items() if value is not None]
    return " ".join([key.name, key.role, key.digest, *rest])


def read_line(line: str) -> Key:
    """The key of a line: `NAME ROLE sha256:… [requests_per_minute=N] [tokens_per_minute=N] [concurrency=N]
    [priority=N]`. Raises `ValueError` saying what is wrong, without the digest."""
    words = line.split()
    if len(words) < 3:
        raise ValueError("a line is NAME ROLE sha256:HASH, then limits such as requests_per_minute=60")
    name, role, digest, *rest = words
    if not _NAME.fullmatch(name):
        raise ValueError("a name has letters, digits and . _ @ -, at most 64")
    if role not in get_args(Role):
        raise ValueError(f"the role of {name} must be use or admin")
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"the hash of {name} must be sha256: and 64 digits, as topkapi key new prints it")
    given: dict[str, int] = {}
    for word in rest:
        option, equals, text = word.partition("=")
        if option not in _LEAST or not equals:
            near = nearest(option, list(_LEAST))
            meant = f"did you mean {near}?" if near else f"known are {', '.join(_LEAST)}"
            raise ValueError(f"{name} has an unknown limit {option[:40]!r}; {meant}")
        if option in given:
            raise ValueError(f"{name} has {option} twice")
        if not re.fullmatch(r"-?\d{1,15}", text) or not _LEAST[option] <= int(text) <= _MOST[option]:
            raise ValueError(f"{option} of {name} must be a whole number from {_LEAST[option]} to {_MOST[option]}")
        given[option] = int(text)
    priority = given.pop("priority", 0)
    return Key(name, "admin" if role == "admin" else "use", digest, Limits(**given), priority)


def read_keys(text: str, source: str) -> list[Key]:
    """The keys of a file's text. Raises `SettingsError` naming the line at fault."""
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            key = read_line(line)
            if any(key.name == other.name for other in keys):
                raise ValueError(f"there is another key named {key.name}")
            if any(key.digest == other.digest for other in keys):
                raise ValueError(f"{key.name} has the same key as another one")
        except ValueError as error:
            hint = "topkapi key new NAME prints a key and its line"
            raise SettingsError(f"{source}, line {number}: {error}", field="keys", hint=hint) from None
        keys.append(key)
    return keys


def key_of_environment(secret: str) -> Key:
    """The one key, with every right, that is given as it is or as its hash (the settings have looked at its form)."""
    return Key(FROM_ENVIRONMENT, "admin", secret if secret.startswith(HASH) else digest_of(secret))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name may stand for any address, and for another one tomorrow.
        return False


class KeyRing:
    """The keys in force: those of a file, read again when it changes, and the environment's.

    With neither, `required` is false and everybody may do everything. A changed file that can't be read leaves the
    keys as they were, and the log says why. Safe from any thread.
    """

    def __init__(
        self, path: Path | None = None, secret: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._clock = path, clock
        self._fixed = [] if not secret else [key_of_environment(secret)]
        self._quotas: dict[str, Quota] = {}
        self._reading = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._keys: list[Key] = list(self._fixed)
        self.required = path is not None or bool(self._fixed)
        if path is not None:
            self._seen = _state(path)
            self._keys = self._read(path)
        self._looked = clock()

    @classmethod
    def of(cls, settings: Settings) -> KeyRing:
        """The keys that the settings name."""
        return cls(settings.keys, None if settings.api_key is None else settings.api_key.get_secret_value())

    @property
    def keys(self) -> list[Key]:
        """The keys in force at this moment."""
        self._look()
        return self._keys

    def find(self, given: str) -> Key | None:
        """Whose key this is. It takes as long for a wrong one as for any right one."""
        digest = digest_of(given[: LONGEST + 1])
        found: Key | None = None
        for key in self.keys:
            # No way out of the loop: where it ended would tell.
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def quota(self, key: Key) -> Quota:
        """What a key has used. It starts anew where its limits have changed."""
        quota = self._quotas.get(key.name)
        if quota is None or quota.limits != key.limits:
            quota = self._quotas[key.name] = Quota(key.name, key.limits)
        return quota

    def _look(self) -> None:
        now = self._clock()
        if self._path is None or now - self._looked < LOOK_SECONDS or not self._reading.acquire(blocking=False):
            return
        try:
            self._looked = now
            state = _state(self._path)
            if state != self._seen:
                self._seen = state
                self._keys = self._read(self._path)
                self._quotas = {key.name: self.quota(key) for key in self._keys}
                logger.warning("the keys were read again: %d", len(self._keys))
        except SettingsError as error:
            logger.error("the keys stay as they were: %s", error.message)
        finally:
            self._reading.release()

    def _read(self, path: Path) -> list[Key]:
        raw = read_file(path, LONGEST_SETTINGS, field="keys", kind=SettingsError)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise SettingsError(f"{path} is not UTF-8 text", field="keys") from None
        keys = [*self._fixed, *read_keys(text, str(path))]
        if any(key.name == FROM_ENVIRONMENT for key in keys[len(self._fixed) :]):
            raise SettingsError(f"{path}: the name {FROM_ENVIRONMENT} is that of TOPKAPI_API_KEY", field="keys")
        if not keys:
            hint = "topkapi key new NAME prints one and the line for it"
            raise SettingsError(f"{path} has no key, so nobody could ask anything", field="keys", hint=hint)
        return keys


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino
