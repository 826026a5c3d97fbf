"""The fields that OpenAI's bodies have in common: theirs, vLLM's, and every decoding parameter of the table.

A decoding parameter may be sent under its own name or under any alias of the table. What cannot apply here is
declared with the values that ask for nothing, and refused by name with any other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema, create_model

from topkapi.model.decoding.aliases import BY_ALIAS, ELSEWHERE, own_name
from topkapi.model.decoding.gbnf import is_gbnf, lark_of
from topkapi.model.decoding.parameters import PARAMETERS
from topkapi.model.decoding.table import MOST_WORDS
from topkapi.model.errors import InvalidRequest
from topkapi.service.api.http.body import Strict, schema_in
from topkapi.service.api.http.describing import decoding
from topkapi.service.api.http.errors import InapplicableField, inapplicable
from topkapi.service.api.http.harmless import NO_SUCH_THING, CacheOptions, Only, asks_for_nothing
from topkapi.service.api.native.schemas import ModelName, parameter_schema

EXPANDED = ("structured_outputs",)
"""Aliases of the table whose values have a shape of their own here."""

Label = Annotated[str | None, Field(description="A label for the caller's own records; without effect.")]


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: Annotated[bool | None, Field(description="Send token counts in a last chunk.")] = None
    include_obfuscation: Annotated[Any, Only(False)] = None
    continuous_usage_stats: Annotated[Any, Only(False)] = None


class StructuredOutputs(Strict):
    """vLLM's way to ask for a form of the answer: exactly one of these."""

    json_: Annotated[dict[str, Any] | bool | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str] | None, Field(max_length=MOST_WORDS)] = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: Annotated[Any, Only(False)] = None
    disable_additional_properties: Annotated[Any, Only(False)] = None
    disable_fallback: Annotated[Any, Only(False, True)] = None
    whitespace_pattern: Annotated[Any, Only()] = None


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


class Refusing(Strict):
    """A body with fields that are known but cannot apply here."""

    HARMLESS: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Those fields, with the values that ask for nothing."""

    REASONS: ClassVar[Mapping[str, str]] = {}
    """Why, where it can be said better than that there is no such thing here."""

    def refuse_inapplicable(self) -> None:
        """Raise `InapplicableField` for a field that cannot apply here and asks for something."""
        for name, harmless in self.HARMLESS.items():
            if not asks_for_nothing(getattr(self, name, None), harmless):
                raise inapplicable(name, self.REASONS.get(name, NO_SUCH_THING))


class CommonFields(Refusing):
    """What every route that generates takes beside the decoding parameters."""

    HARMLESS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "service_tier": ("auto", "default"),
        # vLLM's, which its clients spell out with their defaults.
        "use_beam_search": (False,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
        "add_special_tokens": (False,), "truncate_prompt_tokens": (), "return_tokens_as_token_ids": (False,),
        "logits_processors": ([],), "cache_salt": (), "kv_transfer_params": (), "vllm_xargs": (),
    }  # fmt: skip

    model: ModelName = None
    stream: Annotated[bool | None, Field(description="Answer by server-sent events as the tokens come.")] = None
    user: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    prompt_cache_retention: Annotated[Literal["in_memory", "24h"] | None, Field(description="Without effect.")] = None
    prompt_cache_options: Annotated[CacheOptions | None, Field(description="Without effect.")] = None
    request_id: Label = None
    metadata: Annotated[dict[str, str] | None, Field(description="Labels; without effect.")] = None
    priority: Annotated[
        int | None, Field(ge=-100, le=100, description="As in vLLM, requests of lower priority numbers go first.")
    ] = None
    structured_outputs: StructuredOutputs | None = None
    stream_options: StreamOptions | None = None

    def refuse_inapplicable(self) -> None:
        """Refuse as others do, and what goes with a stream alone."""
        super().refuse_inapplicable()
        if self.stream_options is not None and not self.stream and self.needs_stream(self.stream_options):
            raise InapplicableField("stream_options go with stream", field="stream_options", hint="set stream to true")

    def needs_stream(self, options: StreamOptions) -> bool:
        """Whether these options make no sense without a stream, as those do that ask for something."""
        return bool(options.include_usage)

    def decoding(self) -> dict[str, Any]:
        """The decoding parameters that the caller set, under the names that were used.

        Raises `InvalidRequest` for structures that contradict each other.
        """
        own = {*CommonFields.model_fields, *EXPANDED, *self.HARMLESS}
        sent = (name for name in type(self).model_fields if name in self.model_fields_set)
        given = {name: getattr(self, name) for name in sent if own_name(name) and name not in own}
        if self.structured_outputs is not None:
            given |= expanded(self.structured_outputs)
        # vLLM and llama.cpp take grammars in GBNF's notation, our own parameter in Lark's.
        gbnf = [name for name, value in given.items() if own_name(name) == "grammar" and is_gbnf(value)]
        return given | {name: lark_of(given[name], name) for name in gbnf}


class ChunkedFields(CommonFields):
    """What chat and completions take beside that."""

    prompt_logprobs: Annotated[
        int | None, decoding("logprobs", description="As in vLLM: report so many most likely tokens at each place.")
    ] = None
    return_token_ids: Annotated[bool | None, Field(description="As in vLLM: tell the token ids too.")] = None

    def needs_stream(self, options: StreamOptions) -> bool:
        """All of them do, as with OpenAI."""
        return True

    def refuse_inapplicable(self) -> None:
        """Refuse as others do, and what goes with a whole answer alone."""
        super().refuse_inapplicable()
        if self.stream and self.prompt_logprobs is not None:
            message, hint = "prompt_logprobs can't be streamed", "leave out stream"
            raise InvalidRequest(message, field="prompt_logprobs", hint=hint)


def expanded(structured: StructuredOutputs) -> dict[str, Any]:
    """`structured_outputs` as parameters of the table."""
    asked = ("json_", "regex", "choice", "grammar", "json_object")
    given = {name: value for name in asked if (value := getattr(structured, name)) is not None}
    if len(given) != 1:
        raise InvalidRequest(
            "structured_outputs must have exactly one of json, regex, choice, grammar and json_object",
            field="structured_outputs",
        )
    if "json_" not in given:
        return given
    schema = given["json_"]
    if isinstance(schema, str):
        schema = schema_in(schema, "structured_outputs.json")
    return {"json_schema": schema}


def body(base: type[CommonFields], name: str, meaning: str, leave_out: Collection[str] = ()) -> Any:
    """The body `name`: `base` with what can't apply, and the decoding parameters that it does not define itself.

    Those in `leave_out` are no fields of it.
    """
    fields: dict[str, Any] = {}
    for parameter in PARAMETERS:
        for each in (parameter.name, *parameter.aliases):
            if each not in {*base.model_fields, *base.HARMLESS, *EXPANDED, *leave_out}:
                schema = parameter_schema(parameter)
                if parameter.name in ELSEWHERE:
                    schema["anyOf"].append({"const": -1, "description": "As vLLM and llama.cpp mean it: no limit."})
                if each != parameter.name:
                    schema = {**schema, "description": f"Another name of `{parameter.name}`."}
                fields[each] = (Annotated[Any, WithJsonSchema(schema)], None)
    for each, harmless in base.HARMLESS.items():
        schema = {"enum": [None, *harmless], "description": "Accepted where it asks for nothing, else refused."}
        fields[each] = (Annotated[Any, WithJsonSchema(schema)], None)
    return create_model(name, __base__=base, __doc__=meaning, **fields)


def with_default(given: dict[str, Any], name: str, default: Any) -> dict[str, Any]:
    """`given` with a default for parameter `name`, unless it is there under one of its names."""
    names = (name, *(alias for alias, own in BY_ALIAS.items() if own == name))
    return given if any(given.get(each) is not None for each in names) else given | {name: default}
