"""What Anthropic's routes read and answer, for validation and for /openapi.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from topkapi.service.api.http.body import Strict
from topkapi.service.api.http.describing import decoding
from topkapi.service.api.http.harmless import CacheControl as AnthropicCacheControl
from topkapi.service.api.http.harmless import Only
from topkapi.service.api.openai.fields import Refusing
from topkapi.service.limits import MOST_MESSAGES, MOST_PARTS, MOST_TOOLS

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


CacheControl = AnthropicCacheControl | None
Caller = Annotated[Any, Only({"type": "direct"}, why="nothing runs here that could call a tool")]


class AnthropicText(Strict):
    """A text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl = None
    citations: Annotated[Any, Only([], why="the documents that it cites can't be read")] = None


class AnthropicThinking(Strict):
    """What the assistant thought before it answered, for a template that shows it. The signature is not looked at."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class AnthropicToolUse(Strict):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl = None
    caller: Caller = None
    toolset_name: Annotated[Any, Only()] = None


class AnthropicToolResult(Strict):
    """What a tool answered. An error is told to the checkpoint by the word `Error:` before it."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[AnthropicText], Field(max_length=MOST_PARTS)] | None = None
    is_error: bool | None = None
    cache_control: CacheControl = None
    toolset_name: Annotated[Any, Only()] = None


AnthropicBlock = Annotated[
    AnthropicText | AnthropicThinking | AnthropicToolUse | AnthropicToolResult, Field(discriminator="type")
]


class AnthropicTurn(Strict):
    """One turn. Turns of one role in a row are one; a last turn of the assistant is how its answer begins."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[AnthropicBlock], Field(max_length=MOST_PARTS)]


class AnthropicTool(Strict):
    """A tool that may be called, with the JSON schema of its input. A call that must be made is kept to the schema."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: CacheControl = None
    strict: bool | None = None
    eager_input_streaming: Annotated[bool | None, Field(description="Inputs are streamed as they are written.")] = None
    defer_loading: Annotated[Any, Only(False, why="every tool is shown at once")] = None
    input_examples: Annotated[Any, Only([], why="templates have no place for them; write them in description")] = None
    allowed_callers: Annotated[Any, Only([], ["direct"], why="nothing runs here that could call a tool")] = None


class AnthropicToolChoice(Strict):
    """Whether tools may be called (`auto`), one must be (`any`), which one (`tool` with its `name`), or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicFormat(Strict):
    """The JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class AnthropicOutput(Strict):
    """The form of the answer."""

    format: AnthropicFormat | None = None
    effort: str | None = None


class AnthropicMetadata(Strict):
    """Who asks. Nothing is done with it."""

    user_id: str | None = None


class AnthropicThinkingOff(Strict):
    """No thinking, where the template has a switch for it."""

    type: Literal["disabled"]


class AnthropicThinkingOn(Strict):
    """Thinking before the answer, of a checkpoint that can; `budget_tokens` is the most tokens of it."""

    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=1)]
    display: Literal["summarized", "omitted"] | None = None


class AnthropicThinkingAsWanted(Strict):
    """Thinking for as long as the checkpoint wants."""

    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class AnthropicCountRequest(Refusing):
    """The body of `POST /v1/messages/count_tokens`."""

    HARMLESS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"speed": ("standard",)}
    REASONS: ClassVar[Mapping[str, str]] = {
        "speed": "there is one",
        "inference_geo": "the answer is computed here", "container": "nothing is run here",
    }  # fmt: skip

    model: Annotated[str, Field(description="A loaded checkpoint's name.")]
    messages: Annotated[list[AnthropicTurn], Field(min_length=1, max_length=MOST_MESSAGES)]
    system: str | Annotated[list[AnthropicText], Field(max_length=MOST_PARTS)] | None = None
    tools: Annotated[list[AnthropicTool] | None, Field(max_length=MOST_TOOLS)] = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Annotated[
        AnthropicThinkingOff | AnthropicThinkingOn | AnthropicThinkingAsWanted | None,
        Field(discriminator="type", description="Whether to think before the answer."),
    ] = None
    cache_control: CacheControl = None
    output_config: AnthropicOutput | None = None
    speed: Annotated[Any, WithJsonSchema({"enum": ["standard", None]})] = None
    user_profile_id: Annotated[str | None, Field(description="A label; without effect.")] = None
    workspace_id: Annotated[str | None, Field(description="A label; without effect.")] = None


class AnthropicRequest(AnthropicCountRequest):
    """The body of `POST /v1/messages`."""

    HARMLESS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **AnthropicCountRequest.HARMLESS, "container": (), "diagnostics": (), "inference_geo": (),
    }  # fmt: skip

    max_tokens: Annotated[int, decoding("max_tokens", description="Most tokens to generate.")]
    stop_sequences: Annotated[
        list[str] | None, decoding("stop_sequences", description="Texts that end the answer; they are not part of it.")
    ] = None
    stream: bool | None = None
    temperature: Annotated[float | None, decoding("temperature")] = None
    top_k: Annotated[int | None, decoding("top_k")] = None
    top_p: Annotated[float | None, decoding("top_p")] = None
    metadata: AnthropicMetadata | None = None
    service_tier: Annotated[Literal["auto", "standard_only"] | None, Field(description="There is one.")] = None
    container: Annotated[Any, WithJsonSchema({"type": "null"})] = None
    diagnostics: Annotated[Any, WithJsonSchema({"type": "null"})] = None
    inference_geo: Annotated[Any, WithJsonSchema({"type": "null"})] = None


class AnthropicTextAnswer(BaseModel):
    """A text."""

    type: Literal["text"]
    text: str


class AnthropicThoughts(BaseModel):
    """What was thought before the answer. Nothing is signed here."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class AnthropicCall(BaseModel):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnthropicUsage(BaseModel):
    """Tokens. What was read from the cache is not among `input_tokens`."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(BaseModel):
    """The answer of `POST /v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnthropicTextAnswer | AnthropicThoughts | AnthropicCall]
    stop_reason: StopReason
    stop_sequence: str | None
    usage: AnthropicUsage


class AnthropicCount(BaseModel):
    """The answer of `POST /v1/messages/count_tokens`."""

    input_tokens: int


class AnthropicErrorContent(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """Every error's body."""

    type: Literal["error"]
    error: AnthropicErrorContent
