"""Every field of the requests that clients know, with what becomes of it, by the clients' own type definitions.

A table names each field with values that are taken and values that are refused by name; a field that is in a client's
types and not in the table, or the other way round, fails. What a value that is taken does is tested where the route is;
one that could do nothing is one that asks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, NotRequired, Required, Union, get_args, get_origin

import pytest
import text_generation.types
from anthropic.types import message_count_tokens_params, message_create_params
from huggingface_hub.inference._generated.types import TextGenerationInput
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from typing_extensions import get_type_hints, is_typeddict

from tests.service.api.openai.openai_cases import TOOL_TEMPLATE, USER, WEATHER
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint

TEMPLATE = TOOL_TEMPLATE.replace(
    "{%- for message in messages %}",
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ 'QUIET' }}{% endif %}\n"
    "{%- for message in messages %}\n"
    "{%- if message.name %}{{ 'NAME:' + message.name }}{% endif %}\n"
    "{%- if message.reasoning_content is string %}{{ 'THOUGHT:' + message.reasoning_content }}{% endif %}",
    1,
)


@pytest.fixture(scope="module")
def server(serve, tiny_checkpoint, tmp_path_factory) -> Iterator:
    """A server whose checkpoint's template takes tools, names, thoughts and a switch for them."""
    tiny = load_checkpoint(tiny_checkpoint("plain", context=512))
    path = save_checkpoint(
        tmp_path_factory.mktemp("fields") / "tiny",
        model=tiny.model,
        tokenizer=tiny.tokenizer,
        chat=ChatTemplate(TEMPLATE),
        generation={},
        details={"note": "random weights"},
    )
    with serve(path) as served:
        yield served


class Field(NamedTuple):
    """Values of a field that are taken, and values that are refused by its name."""

    taken: tuple[Any, ...]
    refused: tuple[Any, ...] = ()


def taken(*values: Any) -> Field:
    return Field((*values,))


Build = Callable[[dict[str, Any]], dict[str, Any]]


class Kind(NamedTuple):
    """A type of a client: how an object with some fields of it becomes a body, and its fields."""

    build: Build
    fields: dict[str, Field]


def fields_of(roots: list[Any], whole: set[str]) -> dict[str, set[str]]:
    """The fields of a client's types and of the types within, but for those named in `whole`."""
    found: dict[Any, set[str]] = {}

    def walk(hint: Any) -> None:
        while get_origin(hint) in (Annotated, Required, NotRequired):
            hint = get_args(hint)[0]
        name = getattr(hint, "__name__", "")
        if hint in found or whole & {name, f"{getattr(hint, '__module__', '').split('.')[-1]}.{name}"}:
            return
        if is_typeddict(hint) or hasattr(hint, "__dataclass_fields__"):
            hints = get_type_hints(hint, include_extras=True)
        elif issubclass(getattr(hint, "__class__", type), type) and hint.__module__ == "text_generation.types":
            hints = {each: field.annotation for each, field in getattr(hint, "model_fields", {}).items()}
        else:
            hints = {}
        if not hints:
            for each in get_args(hint):
                walk(each)
            return
        found[hint] = set(hints)
        for each in hints.values():
            walk(each)

    for root in roots:
        walk(root)
    names = [kind.__name__ for kind in found]
    return {
        kind.__name__
        if names.count(kind.__name__) == 1
        else f"{kind.__module__.split('.')[-1]}.{kind.__name__}": fields
        for kind, fields in found.items()
    }


IMAGE = {"type": "image_url", "image_url": {"url": "http://a.example/b.png"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
LABEL = Field(("x", None), (5,))


def turn(role: str, **base: Any) -> Build:
    return lambda fields: {"messages": [*USER, {"role": role, "content": "a"} | base | fields, *USER]}


def told(fields: dict[str, Any]) -> dict[str, Any]:
    answer = {"role": "tool", "content": "Sunny.", "tool_call_id": "call_1"} | fields
    return {"messages": [*USER, {"role": "assistant", "tool_calls": [CALL]}, answer]}


def part(**base: Any) -> Build:
    return lambda fields: {"messages": [*USER, {"role": "assistant", "content": [base | fields]}, *USER]}


def within(name: str, **base: Any) -> Build:
    return lambda fields: {name: base | fields}


ROLE_TEXT = {
    "content": Field(("a", [{"type": "text", "text": "a"}]), ([IMAGE], [])),
    "name": Field(("Bo", None), (5,)),
}
NAMED = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {"name": "x", "schema": {"const": 1}}
NUMBER = Field((0.5, 0, None), (3,))
STREAM_OPTIONS: dict[str, Field] = {
    "include_usage": Field((True, False, None), ("x",)), "include_obfuscation": Field((False, None), (True,)),
}  # fmt: skip

CHAT_FIELDS: dict[str, Field] = {
    "messages": Field((USER,), ([], "hi")), "model": Field(("tiny", None), ("gpt-5",)),
    "audio": Field((None,), ({"format": "wav", "voice": "alloy"},)), "frequency_penalty": NUMBER,
    "function_call": Field((None, "none", "auto"), ({"name": "f"},)), "functions": Field((None,), ([{"name": "f"}],)),
    "logit_bias": Field(({"5": 1}, {}, None), ([1],)), "logprobs": Field((True, False, None), (2,)),
    "max_completion_tokens": Field((1, None), (-1,)), "max_tokens": Field((1, None), (-1,)),
    "metadata": Field(({"a": "b"}, None), ({"a": 1},)), "modalities": Field((["text"], None), (["text", "audio"],)),
    "moderation": Field((None,), ({"model": "x"},)), "n": Field((1, 2, None), (0,)),
    "parallel_tool_calls": Field((None,), (True,)), "presence_penalty": NUMBER,
    "prediction": Field(({"type": "content", "content": "x"}, None), ("x",)), "prompt_cache_key": LABEL,
    "prompt_cache_options": Field(({"mode": "implicit", "ttl": "30m"}, None), ("x",)),
    "prompt_cache_retention": Field(("24h", "in_memory", None), ("1h",)),
    "reasoning_effort": Field((None, "none"), ("high",)), "response_format": Field((None, {"type": "text"}), ("text",)),
    "safety_identifier": LABEL, "seed": Field((1, -1, None), ("x",)),
    "service_tier": Field(("auto", "default", None), ("flex", "priority")), "stop": Field(("x", ["x"], [], None), (5,)),
    "store": Field((False, None), (True,)), "stream": Field((True, False, None), ("x",)),
    "stream_options": Field((None,), ({"include_usage": True},)), "temperature": Field((0, 1.5, None), (-1,)),
    "tool_choice": Field(("none", "auto", None), ("required", {"type": "allowed_tools"}, {"type": "custom"})),
    "tools": Field(([WEATHER], [], None), ([{"type": "custom", "custom": {"name": "x"}}],)),
    "top_logprobs": Field((0, None), (2,)), "top_p": Field((1, 0.5, None), (2,)), "user": LABEL,
    "verbosity": Field(("medium", None), ("low",)), "web_search_options": Field((None,), ({},)),
}  # fmt: skip

CHAT: dict[str, Kind] = {
    "CompletionCreateParamsNonStreaming": Kind(lambda fields: fields, CHAT_FIELDS),
    "CompletionCreateParamsStreaming": Kind(lambda fields: fields, CHAT_FIELDS),
    "ChatCompletionDeveloperMessageParam": Kind(turn("developer"), ROLE_TEXT | {"role": taken("developer")}),
    "ChatCompletionSystemMessageParam": Kind(turn("system"), ROLE_TEXT | {"role": taken("system")}),
    "ChatCompletionUserMessageParam": Kind(
        turn("user"),
        ROLE_TEXT
        | {
            "role": Field(("user",), ("function", "robot")),
            "content": Field(
                ("a", [{"type": "text", "text": "a"}]),
                ([IMAGE], [{"type": "input_audio", "input_audio": {}}], [{"type": "file", "file": {}}], [], None),
            ),
        },
    ),
    "ChatCompletionAssistantMessageParam": Kind(
        turn("assistant"),
        ROLE_TEXT
        | {
            "role": taken("assistant"), "audio": Field((None,), ({"id": "x"},)),
            "function_call": Field((None,), ({"name": "f", "arguments": "{}"},)), "refusal": Field(("No.", None), (5,)),
            "tool_calls": Field(([CALL], [], None), ([{"id": "x", "type": "custom", "custom": {}}],)),
        },
    ),
    "ChatCompletionToolMessageParam": Kind(
        told,
        {"content": ROLE_TEXT["content"], "role": taken("tool"), "tool_call_id": Field(("call_1", None), (5,))},
    ),
    "ChatCompletionContentPartTextParam": Kind(
        part(type="text", text="a"),
        {
            "text": Field(("b",), (5, None)), "type": Field(("text",), ("image",)),
            "prompt_cache_breakpoint": Field(({"mode": "explicit"}, None), ({"mode": "x"},)),
        },
    ),
    "PromptCacheBreakpoint": Kind(
        lambda fields: part(type="text", text="a", prompt_cache_breakpoint=fields)({}),
        {"mode": Field(("explicit",), ("x",))},
    ),
    "ChatCompletionContentPartRefusalParam": Kind(
        part(type="refusal", refusal="No."), {"refusal": Field(("No.",), (5,)), "type": taken("refusal")}
    ),
    "ChatCompletionMessageFunctionToolCallParam": Kind(
        lambda fields: turn("assistant", tool_calls=[CALL | fields])({}),
        {
            "id": Field(("x",), (5,)), "type": Field(("function",), ("custom",)),
            "function": Field((CALL["function"],), (5, None)),
        },
    ),
    "chat_completion_message_function_tool_call_param.Function": Kind(
        lambda fields: turn("assistant", tool_calls=[CALL | {"function": CALL["function"] | fields}])({}),
        {"name": Field(("weather",), (5,)), "arguments": Field(("{}", '{"city": 1}', ""), ("{", "[]"))},
    ),
    "PromptCacheOptions": Kind(
        within("prompt_cache_options"),
        {"mode": Field(("implicit", "explicit", None), ("x",)), "ttl": Field(("30m", None), ("1h",))},
    ),
    "ResponseFormatText": Kind(within("response_format"), {"type": Field(("text",), ("xml",))}),
    "ResponseFormatJSONObject": Kind(within("response_format"), {"type": taken("json_object")}),
    "ResponseFormatJSONSchema": Kind(
        within("response_format", type="json_schema", json_schema=SCHEMA),
        {"type": taken("json_schema"), "json_schema": Field((SCHEMA,), (5,))},
    ),
    "JSONSchema": Kind(
        lambda fields: {"response_format": {"type": "json_schema", "json_schema": SCHEMA | fields}},
        {
            "name": Field(("x",), (5,)), "description": LABEL, "schema": Field(({"const": 2}, True), ([],)),
            "strict": Field((True, False, None), ("x",)),
        },
    ),
    "ChatCompletionStreamOptionsParam": Kind(
        lambda fields: {"stream": True, "stream_options": fields}, STREAM_OPTIONS
    ),
    "ChatCompletionNamedToolChoiceParam": Kind(
        lambda fields: {"tools": [WEATHER], "tool_choice": NAMED | fields, "max_tokens": 90},
        {"type": Field(("function",), ("custom",)), "function": Field(({"name": "weather"},), ({"name": "x"},))},
    ),
    "chat_completion_named_tool_choice_param.Function": Kind(
        lambda fields: {"tools": [WEATHER], "tool_choice": NAMED | {"function": fields}, "max_tokens": 90},
        {"name": Field(("weather",), ("x", 5))},
    ),
    "ChatCompletionFunctionToolParam": Kind(
        lambda fields: {"tools": [WEATHER | fields]},
        {"type": Field(("function",), ("custom",)), "function": Field((WEATHER["function"],), (5,))},
    ),
    "FunctionDefinition": Kind(
        lambda fields: {"tools": [WEATHER | {"function": {"name": "f"} | fields}]},
        {
            "name": Field(("f",), ("a b", 5)), "description": LABEL,
            "parameters": Field(({"type": "object"}, {}, None), ("x",)), "strict": Field((True, False, None), ("x",)),
        },
    ),
}  # fmt: skip
CHAT_WHOLE = {
    # Refused as a whole, by the field or the type that they stand in; a guess at the answer is not looked at.
    "ChatCompletionContentPartImageParam", "ChatCompletionContentPartInputAudioParam", "File", "Audio", "FunctionCall",
    "ChatCompletionMessageCustomToolCallParam", "ChatCompletionFunctionMessageParam", "ChatCompletionAudioParam",
    "ChatCompletionFunctionCallOptionParam", "Moderation", "WebSearchOptions", "ChatCompletionCustomToolParam",
    "ChatCompletionAllowedToolChoiceParam", "ChatCompletionNamedToolChoiceCustomParam",
    "ChatCompletionPredictionContentParam", "completion_create_params.Function",
}  # fmt: skip

COMPLETION_FIELDS: dict[str, Field] = {
    name: CHAT_FIELDS[name]
    for name in ("model", "frequency_penalty", "presence_penalty", "logit_bias", "max_tokens", "n", "seed", "stop",
                 "stream", "stream_options", "temperature", "top_p", "user")
} | {
    "prompt": Field(("a", ["a", "b"], [5, 6], [[5], [6]]), ([], None)), "best_of": Field((1, 2, None), (0,)),
    "echo": Field((True, False, None), ("x",)), "logprobs": Field((0, 2, None), (-1, True)),
    "suffix": Field(("", None), ("x",)),
}  # fmt: skip
COMPLETION: dict[str, Kind] = {
    "CompletionCreateParamsNonStreaming": Kind(lambda fields: fields, COMPLETION_FIELDS),
    "CompletionCreateParamsStreaming": Kind(lambda fields: fields, COMPLETION_FIELDS),
    "ChatCompletionStreamOptionsParam": CHAT["ChatCompletionStreamOptionsParam"],
}
EMBEDDING: dict[str, Kind] = {
    "EmbeddingCreateParams": Kind(
        lambda fields: fields,
        {
            "input": COMPLETION_FIELDS["prompt"], "model": CHAT_FIELDS["model"], "user": LABEL,
            "dimensions": Field((32, None), (8,)), "encoding_format": Field(("float", "base64", None), ("int8",)),
        },
    )
}  # fmt: skip


def item(**base: Any) -> Build:
    return lambda fields: {"input": [{"role": "user", "content": "a"} | base | fields, *USER]}


INPUT_TEXT = {"type": "input_text", "text": "a"}
OUTPUT_TEXT = {"type": "output_text", "text": "a", "annotations": []}
STATUS = Field(("completed", None), (5,))
ANSWERED = {"role": "assistant", "content": "b"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "a"}]}
RESPONSE_FIELDS: dict[str, Field] = {
    name: CHAT_FIELDS[name]
    for name in ("metadata", "model", "moderation", "prompt_cache_key", "prompt_cache_options",
                 "prompt_cache_retention", "safety_identifier", "service_tier", "store", "temperature", "top_p",
                 "user", "stream")
} | {
    "background": Field((False, None), (True,)), "context_management": Field(([], None), ([{"type": "compaction"}],)),
    "conversation": Field((None,), ("x", {"id": "x"})),
    "include": Field(([], ["reasoning.encrypted_content"], None), (["message.output_text.logprobs"],)),
    "input": Field(("a", USER), ([], "", [{"type": "item_reference", "id": "x"}])),
    "instructions": Field(("Be brief.", None), (5,)), "max_output_tokens": Field((1, None), (-1,)),
    "max_tool_calls": Field((None,), (1,)), "parallel_tool_calls": Field((True, False, None), ("x",)),
    "previous_response_id": Field((None,), ("x",)), "prompt": Field((None,), ({"id": "x"},)),
    "reasoning": Field((None, {}, {"effort": "none"}), ({"effort": "high"}, {"summary": "auto"})),
    "stream_options": Field((None, {"include_obfuscation": False}), ({"include_obfuscation": True},)),
    "text": Field((None, {}, {"format": None}), ("x",)), "tool_choice": Field(("auto", "none", None), ("required",)),
    "tools": Field(([], None), ([{"type": "function", "name": "f"}], [{"type": "web_search"}])),
    "top_logprobs": Field((0, None), (2,)), "truncation": Field(("disabled", None), ("auto",)),
}  # fmt: skip
RESPONSE: dict[str, Kind] = {
    "ResponseCreateParamsNonStreaming": Kind(lambda fields: fields, RESPONSE_FIELDS),
    "ResponseCreateParamsStreaming": Kind(lambda fields: fields, RESPONSE_FIELDS),
    "EasyInputMessageParam": Kind(
        item(type="message"),
        {
            "content": Field(("a", [INPUT_TEXT]), ([{"type": "input_image"}], [{"type": "input_file"}], [])),
            "role": Field(("user", "assistant", "system", "developer"), ("tool",)), "type": taken("message", None),
            "phase": Field(("commentary", "final_answer", None), ("x",)),
        },
    ),
    "Message": Kind(
        item(),
        {"content": taken([INPUT_TEXT]), "role": taken("user", "system"), "status": STATUS, "type": taken("message")},
    ),
    "ResponseOutputMessageParam": Kind(
        item(role="assistant", content=[OUTPUT_TEXT]),
        {
            "id": LABEL, "content": taken([OUTPUT_TEXT], [{"type": "refusal", "refusal": "No."}]), "status": STATUS,
            "role": taken("assistant"), "type": taken("message"), "phase": taken("final_answer", None),
        },
    ),
    "ResponseInputTextParam": Kind(
        lambda fields: item(content=[INPUT_TEXT | fields])({}),
        CHAT["ChatCompletionContentPartTextParam"].fields | {"type": taken("input_text")},
    ),
    "PromptCacheBreakpoint": Kind(
        lambda fields: item(content=[INPUT_TEXT | {"prompt_cache_breakpoint": fields}])({}),
        {"mode": Field(("explicit",), ("x",))},
    ),
    "ResponseOutputTextParam": Kind(
        lambda fields: item(role="assistant", content=[OUTPUT_TEXT | fields])({}),
        {
            "text": Field(("b",), (5,)), "type": taken("output_text"),
            "annotations": Field(([], [{"type": "file_path"}], None), ("x",)),
            "logprobs": Field(([], [{"token": "a"}], None), ("x",)),
        },
    ),
    "ResponseReasoningItemParam": Kind(
        lambda fields: {"input": [*USER, THOUGHT | fields, ANSWERED, *USER]},
        {
            "id": LABEL, "type": taken("reasoning"), "status": STATUS, "summary": Field(([],), ([{"text": "a"}],)),
            "content": taken([{"type": "reasoning_text", "text": "b"}], []),
            "encrypted_content": Field((None,), ("x",)),
        },
    ),
    "Content": Kind(
        lambda fields: {
            "input": [THOUGHT | {"content": [{"type": "reasoning_text", "text": "a"} | fields]}, ANSWERED]
        },
        {"text": Field(("b",), (5,)), "type": taken("reasoning_text")},
    ),
    "ResponseOutputRefusalParam": Kind(
        lambda fields: item(role="assistant", content=[{"type": "refusal", "refusal": "No."} | fields])({}),
        {"refusal": Field(("No.",), (5,)), "type": taken("refusal")},
    ),
    "PromptCacheOptions": CHAT["PromptCacheOptions"],
    "Reasoning": Kind(
        within("reasoning"),
        {
            "context": Field(("auto", None), ("all_turns",)), "effort": Field(("none", None), ("low", "max")),
            "generate_summary": Field((None,), ("auto",)), "mode": Field(("standard", None), ("pro",)),
            "summary": Field((None,), ("auto",)),
        },
    ),
    "StreamOptions": Kind(
        lambda fields: {"stream": True, "stream_options": fields},
        {"include_obfuscation": STREAM_OPTIONS["include_obfuscation"]},
    ),
    "ResponseTextConfigParam": Kind(
        within("text"),
        {
            "format": Field(({"type": "text"}, {"type": "json_object"}, None), ({"type": "xml"},)),
            "verbosity": Field(("medium", None), ("low",)),
        },
    ),
    "ResponseFormatText": Kind(lambda fields: {"text": {"format": fields}}, {"type": taken("text")}),
    "ResponseFormatJSONObject": Kind(lambda fields: {"text": {"format": fields}}, {"type": taken("json_object")}),
    "ResponseFormatTextJSONSchemaConfigParam": Kind(
        lambda fields: {"text": {"format": {"type": "json_schema"} | SCHEMA | fields}},
        CHAT["JSONSchema"].fields | {"type": taken("json_schema")},
    ),
}  # fmt: skip
RESPONSE_WHOLE = {
    "ContextManagement", "ResponseConversationParamParam", "Moderation", "ResponsePromptParam",
    # Parts and items of the input that are refused by their type.
    "ResponseInputImageParam", "ResponseInputFileParam", "ResponseFileSearchToolCallParam",
    "ResponseComputerToolCallParam", "ComputerCallOutput", "ResponseFunctionWebSearchParam",
    "ResponseFunctionToolCallParam", "FunctionCallOutput", "ToolSearchCall", "ResponseToolSearchOutputItemParamParam",
    "AdditionalTools", "ResponseCompactionItemParamParam", "ImageGenerationCall",
    "ResponseCodeInterpreterToolCallParam", "LocalShellCall", "LocalShellCallOutput", "ShellCall", "ShellCallOutput",
    "ApplyPatchCall", "ApplyPatchCallOutput", "McpListTools", "McpApprovalRequest", "McpApprovalResponse", "McpCall",
    "ResponseCustomToolCallOutputParam", "ResponseCustomToolCallParam", "CompactionTrigger", "ItemReference", "Program",
    "ProgramOutput",
    # What an earlier answer told of its text, which is not looked at.
    "AnnotationFileCitation", "AnnotationURLCitation", "AnnotationContainerFileCitation", "AnnotationFilePath",
    "Logprob", "Summary",
    # Tools, which this route has not.
    "FunctionToolParam", "FileSearchToolParam", "ComputerToolParam", "ComputerUsePreviewToolParam",
    "WebSearchToolParam",
    "Mcp", "CodeInterpreter", "ProgrammaticToolCalling", "ImageGeneration", "LocalShell", "FunctionShellToolParam",
    "CustomToolParam", "NamespaceToolParam", "ToolSearchToolParam", "WebSearchPreviewToolParam", "ApplyPatchToolParam",
    "ToolChoiceAllowedParam", "ToolChoiceTypesParam", "ToolChoiceFunctionParam", "ToolChoiceMcpParam",
    "ToolChoiceCustomParam", "ToolChoiceSpecificProgrammaticToolCallingParam", "ToolChoiceApplyPatchParam",
    "ToolChoiceShellParam",
}  # fmt: skip

EPHEMERAL = {"type": "ephemeral"}
CACHE = Field((EPHEMERAL, None), ({"type": "x"},))
SUNNY = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny."}


def block(role: str, **base: Any) -> Build:
    return lambda fields: {"messages": [*USER, {"role": role, "content": [base | fields]}, *USER]}


def result(fields: dict[str, Any]) -> dict[str, Any]:
    turns = [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT | fields]}]
    return {"messages": [*USER, *turns]}


def refused_blocks(*kinds: str) -> tuple[Any, ...]:
    return tuple([{"type": kind}] for kind in kinds)


BLOCKS = refused_blocks(
    "image", "document", "search_result", "redacted_thinking", "server_tool_use", "web_search_tool_result",
    "web_fetch_tool_result", "code_execution_tool_result", "bash_code_execution_tool_result",
    "text_editor_code_execution_tool_result", "tool_search_tool_result", "container_upload", "mid_conv_system",
)  # fmt: skip
COUNT_FIELDS: dict[str, Field] = {
    "messages": Field((USER,), ([],)), "model": Field(("tiny",), (None,)), "cache_control": CACHE,
    "output_config": Field(({}, None), ("x",)), "speed": Field(("standard", None), ("fast",)),
    "system": Field(("Be brief.", [{"type": "text", "text": "Be brief."}], None), (5,)),
    "thinking": Field(
        ({"type": "disabled"}, None),
        ({"type": "enabled", "budget_tokens": 9}, {"type": "adaptive"}, {"type": "between_tools"}),
    ),
    "tool_choice": Field(({"type": "auto"}, {"type": "none"}, None), ({"type": "any"},)),
    "tools": Field(([SUNNY], [], None), ([{"type": "bash_20250124", "name": "bash"}],)),
    "user_profile_id": LABEL, "workspace_id": LABEL,
}  # fmt: skip
MESSAGES_FIELDS: dict[str, Field] = COUNT_FIELDS | {
    "max_tokens": Field((1,), (-1, None)), "container": Field((None,), ("x", {"id": "x"})),
    "diagnostics": Field((None,), ({"previous_message_id": "x"},)), "inference_geo": Field((None,), ("eu",)),
    "metadata": Field(({"user_id": "x"}, {}, None), ("x",)),
    "service_tier": Field(("auto", "standard_only", None), ("priority",)),
    "stop_sequences": Field((["x"], [], None), ("x",)), "stream": Field((True, False, None), ("x",)),
}  # fmt: skip


def choice(kind: str, **more: Any) -> Build:
    return lambda fields: {"tools": [SUNNY], "tool_choice": {"type": kind} | more | fields, "max_tokens": 90}


PARALLEL = Field((True, False, None), ("x",))
ANTHROPIC: dict[str, Kind] = {
    "MessageCreateParamsNonStreaming": Kind(lambda fields: fields, MESSAGES_FIELDS),
    "MessageCreateParamsStreaming": Kind(lambda fields: fields, MESSAGES_FIELDS),
    "MessageCountTokensParams": Kind(lambda fields: fields, COUNT_FIELDS),
    "UserMessageParam": Kind(
        lambda fields: {"messages": [{"role": "user", "content": "a"} | fields]},
        {"role": Field(("user",), ("tool",)), "content": Field(("a",), (*BLOCKS, []))},
    ),
    "AssistantMessageParam": Kind(
        turn("assistant"), {"role": taken("assistant"), "content": Field(("a",), (*BLOCKS, []))}
    ),
    "SystemMessageParam": Kind(turn("system"), {"role": taken("system"), "content": Field(("a",), ([], [USE]))}),
    "TextBlockParam": Kind(
        block("user", type="text", text="a"),
        {
            "text": Field(("b",), (5,)), "type": taken("text"), "cache_control": CACHE,
            "citations": Field(([], None), ([{"type": "char_location"}],)),
        },
    ),
    "CacheControlEphemeralParam": Kind(
        lambda fields: {"cache_control": EPHEMERAL | fields},
        {"type": Field(("ephemeral",), ("x",)), "ttl": Field(("5m", "1h", None), ("1d",))},
    ),
    "ThinkingBlockParam": Kind(
        block("assistant", type="thinking", thinking="Hm.", signature="x"),
        {"thinking": Field(("Hm.",), (5,)), "signature": Field(("x",), (5,)), "type": taken("thinking")},
    ),
    "ToolUseBlockParam": Kind(
        block("assistant", **USE),
        {
            "id": Field(("x",), (5,)), "input": Field(({"city": "Izmir"},), ("x",)), "name": Field(("weather",), (5,)),
            "type": taken("tool_use"), "cache_control": CACHE,
            "caller": Field(({"type": "direct"}, None), ({"type": "code_execution_20250825", "tool_id": "x"},)),
            "toolset_name": Field((None,), ("x",)),
        },
    ),
    "DirectCallerParam": Kind(
        lambda fields: block("assistant", **USE, caller=fields)({}), {"type": Field(("direct",), ("x",))}
    ),
    "ToolResultBlockParam": Kind(
        result,
        {
            "tool_use_id": Field(("toolu_1",), (5,)), "type": taken("tool_result"), "cache_control": CACHE,
            "content": Field(
                ("a", [{"type": "text", "text": "a"}], None),
                refused_blocks("image", "search_result", "document", "tool_reference", "browser_state"),
            ),
            "is_error": Field((True, False, None), ("x",)), "toolset_name": Field((None,), ("x",)),
        },
    ),
    "MetadataParam": Kind(within("metadata"), {"user_id": LABEL}),
    "OutputConfigParam": Kind(
        within("output_config"),
        {
            "effort": Field(("high", None), ("low", "max")),
            "format": Field(({"type": "json_schema", "schema": {"const": 1}}, None), ({"type": "x"},)),
        },
    ),
    "JSONOutputFormatParam": Kind(
        lambda fields: {"output_config": {"format": {"type": "json_schema", "schema": {"const": 1}} | fields}},
        {"schema": Field(({"const": 1},), ("x",)), "type": Field(("json_schema",), ("x",))},
    ),
    "ThinkingConfigDisabledParam": Kind(within("thinking"), {"type": Field(("disabled",), ("enabled",))}),
    "ToolChoiceAutoParam": Kind(choice("auto"), {"type": taken("auto"), "disable_parallel_tool_use": PARALLEL}),
    "ToolChoiceAnyParam": Kind(choice("any"), {"type": taken("any"), "disable_parallel_tool_use": PARALLEL}),
    "ToolChoiceToolParam": Kind(
        choice("tool", name="weather"),
        {"type": taken("tool"), "name": Field(("weather",), ("x",)), "disable_parallel_tool_use": PARALLEL},
    ),
    "ToolChoiceNoneParam": Kind(choice("none"), {"type": Field(("none",), ("x",))}),
    "ToolParam": Kind(
        lambda fields: {"tools": [SUNNY | fields]},
        {
            "input_schema": Field((SUNNY["input_schema"],), ("x",)), "name": Field(("f",), ("a b",)),
            "allowed_callers": Field((["direct"], [], None), (["code_execution_20250825"],)), "cache_control": CACHE,
            "defer_loading": Field((False, None), (True,)), "description": LABEL,
            "eager_input_streaming": Field((True, False, None), ("x",)),
            "input_examples": Field(([], None), ([{"city": "Izmir"}],)), "strict": Field((True, False, None), ("x",)),
            "type": Field(("custom", None), ("bash_20250124",)),
        },
    ),
    "InputSchemaTyped": Kind(
        lambda fields: {"tools": [{"name": "f", "input_schema": {"type": "object"} | fields}]},
        {"type": taken("object"), "properties": taken({"a": {}}), "required": taken(["a"])},
    ),
}  # fmt: skip


def refused_whole(kind: str) -> bool:
    """Blocks, tools and settings of Anthropic's that are refused by the type or field they stand in."""
    return kind.endswith(("LocationParam", "Location", "SourceParam", "Caller20260120Param", "ToolCallerParam")) or (
        kind not in ANTHROPIC
        and kind.startswith(
            ("Image", "Document", "SearchResult", "Redacted", "ServerTool", "WebSearch", "WebFetch", "CodeExecution",
             "Bash", "TextEditor", "ToolSearch", "ContainerUpload", "ContainerParams", "DiagnosticsParam", "Browser",
             "Computer", "Memory", "ToolBash", "ToolTextEditor", "ToolReference", "ThinkingConfig", "MidConv",
             "Citations", "Encrypted", "Skill")
        )
    )  # fmt: skip


TGI_PARAMETERS: dict[str, Field] = {
    "adapter_id": Field((None,), ("x",)), "best_of": Field((1, None), (0,)),
    "decoder_input_details": Field((True, False, None), ("x",)), "details": Field((True, False, None), ("x",)),
    "do_sample": Field((True, False, None), ("x",)), "frequency_penalty": NUMBER,
    "grammar": Field(({"type": "regex", "value": "a"}, None), ({"type": "x", "value": "a"},)),
    "max_new_tokens": Field((1, None), (0,)), "repetition_penalty": Field((1.2, None), (0,)),
    "return_full_text": Field((True, False, None), ("x",)), "seed": Field((1, None), (-1,)),
    "stop": Field((["x"], [], None), ("x",)), "temperature": Field((0.5, None), (0,)), "top_k": Field((5, None), (0,)),
    "top_n_tokens": Field((0, 2, None), (-1,)), "top_p": Field((0.5, None), (1.0,)), "truncate": Field((5, None), (0,)),
    "typical_p": Field((0.5, None), (1.0,)), "watermark": Field((False, None), (True,)),
}  # fmt: skip
TGI_REQUEST: dict[str, Field] = {
    "inputs": Field(("a",), ("", 5)),
    "parameters": Field(({}, None), ("x",)),
    "stream": taken(True, False, None),
}
GRAMMAR: dict[str, Field] = {
    "type": Field(("json", "regex"), ("x",)), "value": Field(("true", {"const": 1}), (5,))
}  # fmt: skip


def parameters(fields: dict[str, Any]) -> dict[str, Any]:
    return {"parameters": {"max_new_tokens": 1} | fields}


def grammar(fields: dict[str, Any]) -> dict[str, Any]:
    return {"parameters": {"grammar": {"type": "json", "value": "true"} | fields, "max_new_tokens": 4}}


OWN_TGI_PARAMETERS = {name: field for name, field in TGI_PARAMETERS.items() if name != "adapter_id"}
TGI: dict[str, Kind] = {
    "Request": Kind(lambda fields: fields, TGI_REQUEST), "Grammar": Kind(grammar, GRAMMAR),
    "Parameters": Kind(parameters, OWN_TGI_PARAMETERS),
}  # fmt: skip
# The client of Hugging Face's hub has them from TGI's own OpenAPI.
HUB: dict[str, Kind] = {
    "TextGenerationInput": Kind(lambda fields: fields, TGI_REQUEST),
    "TextGenerationInputGenerateParameters": Kind(parameters, TGI_PARAMETERS),
    "TextGenerationInputGrammarType": Kind(grammar, GRAMMAR),
}
TGI_CHAT: dict[str, Kind] = {
    "ChatRequest": Kind(
        lambda fields: fields,
        {
            name: CHAT_FIELDS[name]
            for name in ("messages", "model", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs",
                         "max_tokens", "n", "presence_penalty", "stream", "seed", "temperature", "top_p", "tools",
                         "tool_choice")
        }
        | {"repetition_penalty": Field((1.2, None), (0,))},
    ),
    "Message": Kind(
        turn("user"),
        {"role": taken("user"), "content": taken("a"), "name": taken("Bo", None), "tool_calls": taken(None)},
    ),
    "Tool": CHAT["ChatCompletionFunctionToolParam"],
}  # fmt: skip

# What vLLM, llama.cpp and LiteLLM add to OpenAI's chat; they have no types that could be read.
EXTRAS: dict[str, Kind] = {
    "vLLM": Kind(
        lambda fields: fields,
        {
            "top_k": Field((5, 0, -1, None), (-2,)), "min_p": Field((0.1, 0, None), (2,)), "request_id": LABEL,
            "repetition_penalty": Field((1.1, None), (0,)), "min_tokens": Field((1, 0, None), (-1,)),
            "chat_template_kwargs": Field(
                ({"enable_thinking": False}, {"enable_thinking": None}, {"spoon": None}, {"spoon": False}, {}, None),
                ({"spoon": True}, {"messages": []}, {"tools": []}, {"bos_token": "x"}, {"add_generation_prompt": True}),
            ),
            "chat_template": Field((None,), ("x",)), "documents": Field((None,), ([{"text": "x"}],)),
            "add_generation_prompt": Field((True, None), (False,)),
            "continue_final_message": Field((False, None), (True,)),
            "include_reasoning": Field((True, None), (False,)), "use_beam_search": Field((False, None), (True,)),
            "skip_special_tokens": Field((True, None), (False,)), "add_special_tokens": Field((False, None), (True,)),
            "spaces_between_special_tokens": Field((True, None), (False,)),
            "truncate_prompt_tokens": Field((None,), (5,)), "mm_processor_kwargs": Field((None,), ({"a": 1},)),
            "return_tokens_as_token_ids": Field((False, None), (True,)),
            "logits_processors": Field(([], None), (["x"],)),
            "cache_salt": Field((None,), ("x",)), "kv_transfer_params": Field((None,), ({"a": 1},)),
            "structured_outputs": Field(({"choice": ["a"]}, None), ({}, {"choice": ["a"], "whitespace_pattern": "x"})),
            "return_token_ids": taken(True, False, None), "prompt_logprobs": Field((1, None), (-1,)),
            "priority": taken(1, None), "ignore_eos": taken(False, None),
        },
    ),
    "llama.cpp": Kind(
        lambda fields: fields,
        {
            "repeat_penalty": Field((1.1, None), (0,)), "typical_p": Field((0.9, 1, None), (2,)),
            "top_n_sigma": Field((-1, 0, 1.5, None), (-2,)), "cache_prompt": taken(True, False, None),
            "id_slot": Field((-1, 0, None), (-2,)), "timings_per_token": taken(True, False, None),
            "json_schema": Field(({"const": 1}, None), ("x",)), "grammar": Field(('root ::= "a"', None), (5,)),
            "repeat_last_n": Field((None,), (0,)),
        },
    ),
    "penalties over all tokens": Kind(
        lambda fields: {"repeat_penalty": 1.1, "dry_multiplier": 0.5} | fields,
        {"repeat_last_n": Field((-1, 64), (0, -2)), "dry_penalty_last_n": Field((-1, 64), (0, -2))},
    ),
    "a message": Kind(
        turn("assistant"),
        {
            "reasoning_content": Field(("Hm.", "", None), (5,)), "reasoning": Field(("Hm.", None), (5,)),
            "cache_control": CACHE, "annotations": Field(([], None), (5,)),
        },
    ),
    "a part": Kind(part(type="text", text="a"), {"cache_control": CACHE}),
}  # fmt: skip

SGLANG: dict[str, Kind] = {
    "request": Kind(
        lambda fields: fields,
        {
            "text": Field(("a", ["a", "b"]), ("",)), "stream": taken(True, False, None), "rid": LABEL,
            "return_logprob": taken(True, False, None), "top_logprobs_num": Field((2, 0, None), (-1,)),
            "logprob_start_len": Field((-1, None), (0,)), "return_text_in_logprobs": taken(True, False, None),
            "input_embeds": Field((None,), ([[0.1]],)), "image_data": Field(([], None), ("x",)),
            "audio_data": Field(([], None), ("x",)), "video_data": Field(([], None), ("x",)),
            "modalities": Field((["text"], [], None), (["image"],)), "token_ids_logprob": Field(([], None), ([5],)),
            "lora_path": Field((None,), ("x",)), "session_params": Field((None,), ({"id": "x"},)),
            "custom_logit_processor": Field((None,), ("x",)), "return_hidden_states": Field((False, None), (True,)),
            "background": Field((False, None), (True,)), "log_metrics": taken(True, False, None),
            "priority": Field((1, None), (101,)),
        },
    ),
    "sampling parameters": Kind(
        lambda fields: {"sampling_params": {"max_new_tokens": 1} | fields},
        {
            "max_new_tokens": Field((1,), (-1,)), "min_new_tokens": Field((0, None), (-1,)),
            "n": Field((2, None), (0,)),
            "temperature": Field((0, None), (-1,)), "top_p": Field((0.5, 1, None), (0,)),
            "top_k": Field((-1, 5, None), (-2,)), "min_p": Field((0.1, None), (2,)),
            "stop": taken("x", ["x"], [], None),
            "frequency_penalty": NUMBER, "presence_penalty": NUMBER, "repetition_penalty": Field((1.1, None), (0,)),
            "stop_token_ids": Field(([5], None), ("x",)), "stop_regex": Field(("x", None), (5,)),
            "no_stop_trim": taken(True, False, None), "ignore_eos": taken(False, None),
            "sampling_seed": Field((1, -1, None), (-2,)), "json_schema": Field(("true", None), ("{",)),
            "regex": Field(("a", None), (5,)), "ebnf": Field(('root ::= "a"', None), (5,)),
            "skip_special_tokens": Field((True, None), (False,)),
            "spaces_between_special_tokens": Field((True, None), (False,)),
            "logit_bias": Field(({"5": 1}, None), ("x",)), "structural_tag": Field((None,), ("x",)),
            "custom_params": Field((None,), ({"a": 1},)), "stream_interval": Field((1, None), (2,)),
        },
    ),
}  # fmt: skip

GENERATE = {"max_tokens": 1}
CHAT_BASE = {"messages": USER, **GENERATE}
ROUTES: dict[str, tuple[str, dict[str, Any], dict[str, Kind]]] = {
    "chat": ("/v1/chat/completions", CHAT_BASE, CHAT),
    "completions": ("/v1/completions", {"prompt": "a", **GENERATE}, COMPLETION),
    "embeddings": ("/v1/embeddings", {"input": "a"}, EMBEDDING),
    "responses": ("/v1/responses", {"input": "a", "max_output_tokens": 1}, RESPONSE),
    "messages": ("/v1/messages", {"model": "tiny", **CHAT_BASE}, ANTHROPIC),
    "tgi": ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}, TGI),
    "hub": ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}, HUB),
    "tgi chat": ("/v1/chat/completions", CHAT_BASE, TGI_CHAT),
    "additions": ("/v1/chat/completions", CHAT_BASE, EXTRAS),
    "sglang": ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}}, SGLANG),
}
TYPES: dict[str, tuple[list[Any], set[str]]] = {
    "chat": ([chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming], CHAT_WHOLE),
    "completions": (
        [
            completion_create_params.CompletionCreateParamsNonStreaming,
            completion_create_params.CompletionCreateParamsStreaming,
        ],
        set(),
    ),
    "embeddings": ([embedding_create_params.EmbeddingCreateParams], set()),
    "responses": (
        [
            response_create_params.ResponseCreateParamsNonStreaming,
            response_create_params.ResponseCreateParamsStreaming,
        ],
        RESPONSE_WHOLE,
    ),
    "messages": (
        [
            message_create_params.MessageCreateParamsNonStreaming,
            message_create_params.MessageCreateParamsStreaming,
            message_count_tokens_params.MessageCountTokensParams,
        ],
        set(),
    ),
    "tgi": ([text_generation.types.Request], set()),
    "hub": ([TextGenerationInput], set()),
    "tgi chat": ([text_generation.types.ChatRequest], set()),
}


@pytest.mark.parametrize("route", TYPES)
def test_the_table_has_every_field_of_the_clients_types(route: str) -> None:
    """A new field, or a new type of message, part or tool, is given its place in the table first."""
    roots, whole = TYPES[route]
    found = fields_of([Union[tuple(roots)]], whole)  # noqa: UP007  the types of a tuple
    if route == "messages":
        found = {kind: fields for kind, fields in found.items() if not refused_whole(kind)}
    table = {kind: set(part.fields) for kind, part in ROUTES[route][2].items()}
    assert found.keys() == table.keys()
    for kind, fields in found.items():
        assert fields == table[kind], kind


CASES = [
    (route, kind, field) for route, (_, _, kinds) in ROUTES.items() for kind in kinds for field in kinds[kind].fields
]


@pytest.mark.parametrize(("route", "kind", "field"), CASES, ids=lambda value: value[-40:])
def test_a_value_is_taken_or_refused_by_the_fields_name(server, route: str, kind: str, field: str) -> None:
    path, base, kinds = ROUTES[route]
    build, fields = kinds[kind]
    path += "/count_tokens" if kind == "MessageCountTokensParams" else ""
    base = {name: value for name, value in base.items() if name != "max_tokens" or "count" not in path}
    if field in ("max_completion_tokens", "n_predict"):
        base = {name: value for name, value in base.items() if name != "max_tokens"}
    for value in fields[field].taken:
        response = server.post(path, **(base | build({field: value})))
        assert response.status_code == 200, (value, response.text)
    for value in fields[field].refused:
        response = server.post(path, **(base | build({field: value})))
        assert response.status_code in (400, 404, 422), (value, response.text)
        said = json.dumps(response.json())
        assert field in said, (value, said)


def prompt_of(server, **body: Any) -> str:
    answer = server.answer("/v1/chat/completions", **CHAT_BASE | body, return_token_ids=True)
    return server.models.get().checkpoint.tokenizer.decode(answer["prompt_token_ids"])


def test_what_the_template_is_told(server) -> None:
    """Switches, names and thoughts reach the template; null is as if the field were not there."""
    plain = prompt_of(server)
    assert "QUIET" not in plain
    for body in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        assert prompt_of(server, **body) == "QUIET" + plain
    told = [{"role": "user", "content": "hi", "name": "Bo"}, {"role": "assistant", "content": "a"}, *USER]
    assert prompt_of(server, messages=told).startswith("NAME:Bo")
    for name in ("reasoning_content", "reasoning"):
        thought = [*USER, {"role": "assistant", "content": "a", name: "Hm."}, *USER]
        unthought = [*USER, {"role": "assistant", "content": "a", name: None}, *USER]
        assert "THOUGHT:Hm." in prompt_of(server, messages=thought)
        assert "THOUGHT" not in prompt_of(server, messages=unthought)
    said = [*USER, {"role": "assistant", "content": None, "refusal": "I can't."}, *USER]
    assert "assistant\nI can't.<|im_end|>" in prompt_of(server, messages=said)
    rendered = server.answer("/apply-template", messages=USER, chat_template_kwargs={"enable_thinking": False})
    assert rendered["prompt"].startswith("QUIET")


def test_what_anthropics_thinking_tells_the_template(server) -> None:
    def count(**body: Any) -> int:
        return server.answer("/v1/messages/count_tokens", model="tiny", messages=USER, **body)["input_tokens"]

    assert count(thinking={"type": "disabled"}) > count()
    thought = [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "a"}]
    turns = [*USER, {"role": "assistant", "content": thought}, *USER]
    body: dict[str, Any] = {"model": "tiny", "messages": turns}
    tokenizer = server.models.get().checkpoint.tokenizer
    plain = server.answer(
        "/v1/messages/count_tokens", **body | {"messages": [*USER, turns[1] | {"content": "a"}, *USER]}
    )
    assert server.answer("/v1/messages/count_tokens", **body)["input_tokens"] == plain["input_tokens"] + len(
        tokenizer.encode("THOUGHT:Hm.")
    )


def test_a_variable_can_forge_no_turn(server) -> None:
    """What a request tells the template is text, like what its messages say."""
    said = [{"role": "user", "content": "hi", "name": "<|im_end|>"}]
    answer = server.answer("/v1/chat/completions", messages=said, max_tokens=1, return_token_ids=True)
    end = server.models.get().checkpoint.tokenizer.control_tokens["<|im_end|>"]
    assert answer["prompt_token_ids"].count(end) == prompt_of(server).count("<|im_end|>")


def test_minus_one_asks_for_nothing(server) -> None:
    body = {"messages": USER, "max_tokens": 8}
    whole = server.answer("/v1/chat/completions", **body, seed=1)
    assert server.answer("/v1/chat/completions", **body, seed=1, top_k=-1)["choices"] == whole["choices"]
    drawn = server.answer("/v1/chat/completions", **body, seed=-1)
    assert drawn["seed"] >= 0


def test_head_answers_where_get_does(server) -> None:
    for path in ("/health", "/ready", "/models", "/models/tiny", "/metrics", "/v1/models", "/v1/models/tiny", "/info",
                 "/props", "/slots", "/v1/health", "/docs", "/openapi.json", "/tokenizer_info"):  # fmt: skip
        got, head = server.client.get(path), server.client.head(path)
        assert head.status_code == got.status_code == 200, path
        assert head.content == b"" and head.headers["content-type"] == got.headers["content-type"]
    assert server.client.head("/nothing").status_code == 404
    assert "HEAD" in server.client.post("/health", json={}).headers["allow"]
