"""The errors a user can cause or meet, raised where the fact is known and mapped once at the edge.

The command line prints `error:` and `hint:` and exits with 2; the HTTP layer answers `{"error": {...}}` with
`status`. Anything else that escapes is a defect of Topkapi, not of its user.
"""

MOST_TOLD = 4000
"""Characters of a message, a field or a hint: what quotes more of a request than that tells nobody anything."""


class TopkapiError(Exception):
    """A fact the user should know, with what to do about it.

    `field` names the request or recipe field at fault; `hint` says what to do. `retry_after` are the seconds after
    which the same request may fare better, where waiting helps.
    """

    status = 500
    kind = "internal_error"
    retry_after: int | None = None

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        self.message = _shortened(message)
        super().__init__(self.message)
        self.field = None if field is None else _shortened(field)
        self.hint = None if hint is None else _shortened(hint)


def _shortened(text: str) -> str:
    """The text, or its beginning and its end."""
    return text if len(text) <= MOST_TOLD else f"{text[: MOST_TOLD - 1000]} … {text[-900:]}"


class InvalidRequest(TopkapiError):
    """What the caller asked for is malformed, contradictory or cannot apply."""

    status = 422
    kind = "invalid_request"


class ContextExceeded(InvalidRequest):
    """A prompt of `tokens` leaves no room for an answer in a context of `context_length` tokens."""

    def __init__(
        self, message: str, *, tokens: int, context_length: int, field: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, field=field, hint=hint)
        self.tokens = tokens
        self.context_length = context_length


class TextTooLong(ContextExceeded):
    """A text of so many bytes that no `context_length` tokens make it; `tokens` is the least number that could."""


class UnknownModel(TopkapiError):
    """The request names a checkpoint that is not loaded."""

    status = 404
    kind = "unknown_model"


class Overloaded(TopkapiError):
    """The queue is full; the request was refused before it cost anything."""

    status = 429
    kind = "overloaded"

    def __init__(self, message: str, *, retry_after: int = 1, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class EngineError(TopkapiError):
    """A step of the engine failed; only the requests in that step are affected."""

    kind = "engine_error"


class EngineStopped(EngineError):
    """The thread that computes has broken down or does not come back; until it is started anew nothing is computed."""

    status = 503
    kind = "engine_stopped"
    retry_after: int

    def __init__(self, message: str, *, retry_after: int = 5, hint: str | None = "send the request again") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class Cancelled(EngineError):
    """The work was ended from outside before it was done: a checkpoint unloaded, a stream ended, a server stopped."""

    status = 503
    kind = "cancelled"


class DeadlineExceeded(EngineError):
    """The work was not done by the time that its caller gave it, and what was done of it is no answer."""

    status = 408
    kind = "deadline"


class CheckpointError(TopkapiError):
    """A checkpoint is missing, truncated, altered or of a kind that is not supported."""

    kind = "checkpoint_error"


class DataError(TopkapiError):
    """Training or evaluation data is missing, empty or malformed."""

    kind = "data_error"


class SettingsError(TopkapiError):
    """A recipe, flag or environment variable has a value that cannot be used."""

    kind = "settings_error"
