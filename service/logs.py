"""The server's logs: lines for people or JSON for machines, each with the request that it is about.

No secret and no text of a request is logged. What an unexpected error says may quote one, so its words are left out
unless they are asked for; where it arose is always told.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import traceback
from types import TracebackType
from typing import Any

from topkapi.model.errors import TopkapiError
from topkapi.service.calls import current_call

ACCESS = logging.getLogger("topkapi.access")
"""One line for each request, once it is over."""

_SAYING = logging.getLogger("topkapi")

LEFT_OUT = "(its words are left out, as they may quote a request; --log-texts shows them)"

ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def set_up(log_format: str, *, access: bool, texts: bool) -> None:
    """Have everything that is logged in this process written to standard error in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(texts) if log_format == "json" else _Text(texts))
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers[:] = []
        logging.getLogger(name).propagate = True
    ACCESS.setLevel(logging.INFO if access else logging.WARNING)
    _SAYING.setLevel(logging.INFO if log_format == "json" else logging.WARNING)


def say(text: str) -> None:
    """Tell whoever started the server something: as a line of its output, or among its JSON lines."""
    if _SAYING.isEnabledFor(logging.INFO):
        _SAYING.info(text.strip())
    else:
        print(text, flush=True)


def complain(text: str) -> None:
    """Tell whoever started the server why it ends."""
    if _SAYING.isEnabledFor(logging.INFO):
        _SAYING.critical(text)
    else:
        print(f"error: {text}", file=sys.stderr)


class _Formatter(logging.Formatter):
    def __init__(self, texts: bool) -> None:
        super().__init__()
        self._texts = texts

    def formatException(self, ei: ExceptionInfo) -> str:
        """A trace, without the words of errors that nobody foresaw."""
        error = ei[1]
        told = [] if error is None else list(self._told(error, set()))
        return "".join(told).rstrip("\n")

    def _told(self, error: BaseException, seen: set[int]) -> list[str]:
        seen.add(id(error))
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        lines = []
        if before is not None and id(before) not in seen:
            lines += [*self._told(before, seen), "\nThen, because of it or meanwhile:\n\n"]
        lines += ["Traceback (most recent call last):\n", *traceback.format_tb(error.__traceback__)]
        words = str(error) if self._texts or isinstance(error, TopkapiError) else LEFT_OUT if str(error) else ""
        name = type(error).__qualname__
        return [*lines, f"{name}: {words}\n" if words else f"{name}\n"]


class _Text(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """`LEVEL: message`, the request's name, and a trace if there is one."""
        call = current_call()
        about = "" if call is None or record.name == ACCESS.name else f" ({call.identifier})"
        line = f"{record.levelname}: {record.getMessage()}{about}"
        return line if not record.exc_info else f"{line}\n{self.formatException(record.exc_info)}"


class _Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON. What was logged with `extra={"about": {…}}` stands beside the message."""
        call = current_call()
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if call is not None:
            entry["request_id"] = call.identifier
            if call.key is not None:
                entry["key"] = call.key.name
        entry |= getattr(record, "about", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)
