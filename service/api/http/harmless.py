"""Fields of other systems' requests that cannot apply here: taken where they ask for nothing, else refused by name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from topkapi.service.api.http.body import Strict

INAPPLICABLE = "inapplicable"
"""Type of the complaint about such a field."""

NO_SUCH_THING = "there is no such thing on this server"


def asks_for_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Whether a value is null or one of `harmless`; numbers are the same whole or not, booleans are no numbers."""
    return value is None or any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in harmless
    )


class Only:
    """In a field's annotation: it may be null or one of these values, and is refused with the reason otherwise."""

    def __init__(self, *harmless: Any, why: str = NO_SUCH_THING) -> None:
        self._harmless, self._why = harmless, why

    def _check(self, value: Any) -> Any:
        if not asks_for_nothing(value, self._harmless):
            raise PydanticCustomError(INAPPLICABLE, "can't be used: {why}", {"why": self._why})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """How pydantic checks such a field."""
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """How /openapi.json describes it."""
        return {"enum": [None, *self._harmless], "description": "Accepted where it asks for nothing, else refused."}


class CacheControl(Strict):
    """A wish to reuse what has been read. Every prefix is reused here anyway, for as long as there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class CacheBreakpoint(Strict):
    """The same in OpenAI's words."""

    mode: Literal["explicit"]


class CacheOptions(Strict):
    """How prefixes are kept for reuse. Reuse never changes an answer."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None
