"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from topkapi.model.errors import ContextExceeded, TopkapiError
from topkapi.service.api.http.describing import errors_of
from topkapi.service.api.http.dialect import Dialect, with_hint

CODES = {"unknown_model": "model_not_found"}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class OpenAIErrorContent(BaseModel):
    """What went wrong; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """Every error's body on OpenAI's routes."""

    error: OpenAIErrorContent


def render(error: TopkapiError) -> tuple[int, dict[str, Any]]:
    """Status and body for `error`. What is wrong with a request is a 400, as their clients expect."""
    status = 400 if error.status == 422 else error.status
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    code = None if error.kind == "invalid_request" else CODES.get(error.kind, error.kind)
    message = with_hint(error)
    if isinstance(error, ContextExceeded):
        # Clients that shorten a conversation by themselves look for this code or for these words.
        code = "context_length_exceeded"
        message = f"This model's maximum context length is {error.context_length} tokens: {message}"
    return status, {"error": {"message": message, "type": kind, "param": error.field, "code": code}}


DIALECT = Dialect("openai", render, prefixes=("/v1/",))

ERRORS = errors_of(OpenAIError, 404, 408, 413, 415, 429, 500, more={
    400: "The body is not JSON, or a field is wrong; `param` names it",
    503: "The server is stopping, the checkpoint was unloaded, or the engine begins anew",
})  # fmt: skip
