"""`response_format` of chat and `text.format` of responses: the form of an answer as decoding parameters."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from topkapi.service.api.http.body import Strict


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JSONObjectFormat(Strict):
    """A JSON object; with llama.cpp's `schema`, JSON that fulfils it."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class JSONSchema(Strict):
    """A schema. It is kept to whether `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class JSONSchemaFormat(Strict):
    """JSON that fulfils a schema."""

    type: Literal["json_schema"]
    json_schema: JSONSchema


class FlatJSONSchemaFormat(JSONSchema):
    """JSON that fulfils a schema, as the responses route writes it."""

    type: Literal["json_schema"]


ResponseFormat = TextFormat | JSONObjectFormat | JSONSchemaFormat
FlatFormat = TextFormat | JSONObjectFormat | FlatJSONSchemaFormat


def as_parameters(form: ResponseFormat | FlatFormat | None) -> dict[str, Any]:
    """The decoding parameters that make an answer take this form. Without a schema, any JSON object will do."""
    if form is None or isinstance(form, TextFormat):
        return {}
    schema = (form.json_schema if isinstance(form, JSONSchemaFormat) else form).schema_
    return {"json_object": True} if schema is None else {"json_schema": schema}
