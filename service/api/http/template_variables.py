"""What a request says to the checkpoint's chat template beside the conversation, such as whether to think first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.models import LoadedModel

TemplateVariables = Annotated[
    dict[str, Any] | None,
    Field(description="Variables for the chat template, such as `enable_thinking`. One it does not have is refused."),
]

SWITCHES = ("enable_thinking", "thinking")
"""What templates call the switch for thinking first."""

EFFORT = "reasoning_effort"


def template_variables(
    model: LoadedModel, given: Mapping[str, Any] | None, effort: str | None = None, field: str = EFFORT
) -> dict[str, Any]:
    """The variables for the template of `model`: those `given`, and how much to think before an answer.

    An effort of "none" switches thinking off where the template has a switch; any other needs a template that asks for
    an effort. Raises `InapplicableField` naming what the template does not look at, unless that asks for nothing.
    """
    chat = model.checkpoint.chat
    if chat is None:
        # The conversation itself will be refused.
        return {}
    said: dict[str, Any] = {}
    for name, value in (given or {}).items():
        if name in chat.variables:
            said |= {} if value is None else {name: value}
        elif value is not None and value is not False:
            place = f"chat_template_kwargs.{name}"
            known = ", ".join(sorted(chat.variables - {"documents"})) or "none"
            raise InapplicableField(
                f"{place} can't be used: the checkpoint's chat template has no such variable",
                field=place,
                hint=f"it has: {known}",
            )
    if effort is None:
        return said
    if EFFORT in chat.variables:
        return {EFFORT: effort, **said}
    if effort == "none":
        return {name: False for name in SWITCHES if name in chat.variables} | said
    raise InapplicableField(
        f"{field} can't be used: the checkpoint's chat template does not ask how much to think",
        field=field,
        hint=f"leave {field} out",
    )
