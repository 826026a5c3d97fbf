"""How a template writes calls of tools, found by asking it; calls read out of text however it is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.api.openai.openai_cases import LLAMA_TEMPLATE, TIME, TOOL_TEMPLATE, WEATHER
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.conversation.tool_call_reader import Call, Said, ToolCallReader
from topkapi.model.conversation.tool_calls import ToolCallForm
from topkapi.model.decoding.grammar import compile_constraint
from topkapi.model.decoding.parameters import resolve
from topkapi.model.errors import InvalidRequest

HERMES = ToolCallForm("<tool_call>\n", "arguments", "\n</tool_call>", "\n")
BARE = ToolCallForm("", "parameters", "", None)
LISTED = ToolCallForm("[TOOL_CALLS] [", "arguments", "]", ", ", listed=True)
PHI = ToolCallForm("<|tool_call|>[", "arguments", "]<|/tool_call|>", ", ", listed=True)
FUNCTIONS = [WEATHER["function"], TIME["function"]]


def read(form: ToolCallForm, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and each call's name and arguments."""
    reader = ToolCallReader(form, ["weather", "time_now"])
    events = [event for piece in pieces for event in reader.feed(piece)] + list(reader.flush())
    text, calls = "", []
    for event in events:
        if isinstance(event, Said):
            text += event.text
        else:
            calls.append((event.name, event.arguments))
    assert reader.calls == len(calls)
    return text, calls


def test_the_form_is_found_by_asking_the_template(tiny_tokenizer) -> None:
    assert ToolCallForm.of(ChatTemplate(TOOL_TEMPLATE), tiny_tokenizer) == HERMES
    assert ToolCallForm.of(ChatTemplate(LLAMA_TEMPLATE), tiny_tokenizer) == BARE


MISTRAL_TEMPLATE = """\
{{- bos_token }}{%- if tools %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}{{ '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- set out = call.function | tojson %}{{ out[:-1] + ', "id": "' + call.id + '"}' }}
{%- if not loop.last %}{{ ', ' }}{% else %}{{ ']' + eos_token }}{% endif %}
{%- endfor %}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""
# The calls of earlier answers are not shown; the model is told how to write its own.
GRANITE_TEMPLATE = """\
{%- if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + (tools | tojson) }}
{{- 'Write <|tool_call|> and a list.' }}{% endif %}
{%- for message in messages %}
{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""


def test_lists_of_calls_are_found(tiny_tokenizer) -> None:
    assert ToolCallForm.of(ChatTemplate(MISTRAL_TEMPLATE), tiny_tokenizer) == LISTED
    granite = ToolCallForm("<|tool_call|>[", "arguments", "]", ", ", listed=True)
    assert ToolCallForm.of(ChatTemplate(GRANITE_TEMPLATE), tiny_tokenizer) == granite
    phi = GRANITE_TEMPLATE.replace("and a list.", "and a list, and <|/tool_call|>.")
    assert ToolCallForm.of(ChatTemplate(phi), tiny_tokenizer) == PHI
    # As control tokens they are no part of an answer's text.
    marked = tiny_tokenizer.with_control_tokens(["[TOOL_CALLS]", "<|tool_call|>", "<|/tool_call|>"])
    assert ToolCallForm.of(ChatTemplate(MISTRAL_TEMPLATE), marked).prefix.strip() == "["
    assert ToolCallForm.of(ChatTemplate(phi), marked) == ToolCallForm("[", "arguments", "]", ", ", listed=True)


def test_what_stands_before_the_first_call_alone_is_no_part_of_the_form(tiny_tokenizer) -> None:
    """As in Qwen3's template, which puts an empty block of reasoning before the last answer."""
    reasoning = TOOL_TEMPLATE.replace(
        "+ '\\n' + message.content }}", "+ '\\n<think>\\n\\n</think>\\n\\n' + message.content }}"
    )
    assert reasoning != TOOL_TEMPLATE
    assert ToolCallForm.of(ChatTemplate(reasoning), tiny_tokenizer) == HERMES


def test_a_template_without_tools_or_with_calls_in_another_form_is_refused(tiny_tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="takes no tools"):
        ToolCallForm.of(ChatTemplate.built_in("chatml"), tiny_tokenizer)
    other = TOOL_TEMPLATE.replace("'name': call.function.name, ", "")
    with pytest.raises(InvalidRequest, match="not as JSON"):
        ToolCallForm.of(ChatTemplate(other), tiny_tokenizer)


ARGUMENTS = '{"city": "An\\"}kara", "days": [1, {"x": "]"}]}'
CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
CASES = [
    (HERMES, "Well, then.", ("Well, then.", [])),
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", ("", [("weather", ARGUMENTS)])),
    (HERMES, f" I look. \n<tool_call>{CALL}</tool_call>\nDone", (" I look.\nDone", [("weather", ARGUMENTS)])),
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>\n" * 2, ("", [("weather", ARGUMENTS)] * 2)),
    (HERMES, '<tool_call>\n{"name": "time_now", "arguments": {}}\n</tool_call>', ("", [("time_now", "{}")])),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "weather"}</tool_call>', ("", [("weather", '{"a": 1}')])),
    (
        HERMES,
        f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}, "id": "c1"}}</tool_call>!',
        ("!", [("weather", ARGUMENTS)]),
    ),
    (
        HERMES,
        f'<tool_call>{{"id": 7, "arguments": {ARGUMENTS} ,"name":"weather"}}</tool_call>',
        ("", [("weather", ARGUMENTS)]),
    ),
    (
        HERMES,
        '<tool_call>{"arguments": {"a": "</tool_call>"}, "name": "weather"}</tool_call>',
        ("", [("weather", '{"a": "</tool_call>"}')]),
    ),
    (
        HERMES,
        '<tool_call>{"name": "weather", "arguments": {"a": "</tool_call>"}}</tool_call>',
        ("", [("weather", '{"a": "</tool_call>"}')]),
    ),
    (
        HERMES,
        '<tool_call>{"name": "weather", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ("", [("weather", '{"a": 1}')]),
    ),
    (HERMES, '<tool_call>{"name": "time_now"}</tool_call>', ("", [("time_now", "{}")])),
    (HERMES, '<tool_call>{"name": "weather", "arguments": 6898}</tool_call>', None),
    (HERMES, '<tool_call>{"name": "weather" "arguments": {}}</tool_call>', None),
    (HERMES, "a <tool_call> b", None),
    (HERMES, f"<tool_call><tool_call>{CALL}</tool_call>", ("<tool_call>", [("weather", ARGUMENTS)])),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {"a": "<tool_call>{}"}}</tool_call>', None),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None),
    (
        HERMES,
        '<tool_call>{"name": "weather", "arguments": {"a": "mkdir -p test/{x,y"}}</tool_call>',
        ("", [("weather", '{"a": "mkdir -p test/{x,y"}')]),
    ),
    (HERMES, "<tool_call>nonsense</tool_call> <b>", None),
    (HERMES, "a < b <tool_cal", None),
    # What an end cut off is no call, however much of it there is; without what closes it, it's whole.
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Anka', None),
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": {}', None),
    (HERMES, f"<tool_call>\n{CALL}\n</tool", ("", [("weather", ARGUMENTS)])),
    (
        HERMES,
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL[:-1]}",
        (f"\n<tool_call>\n{CALL[:-1]}", [("weather", ARGUMENTS)]),
    ),
    (BARE, '{"name": "weather", "parameters": {"city": "Izmir"}', None),
    # Several calls in one list, as Mistral, Granite and Phi write them.
    (LISTED, f"[TOOL_CALLS] [{CALL}]", ("", [("weather", ARGUMENTS)])),
    (LISTED, f"[TOOL_CALLS] [{CALL}, {CALL}] Done", (" Done", [("weather", ARGUMENTS)] * 2)),
    (LISTED, f"I look.[TOOL_CALLS] [\n{CALL},\n{CALL}\n]", ("I look.", [("weather", ARGUMENTS)] * 2)),
    (LISTED, f'[TOOL_CALLS] [{CALL[:-1]}, "id": "abcdefghi"}}]', ("", [("weather", ARGUMENTS)])),
    (LISTED, f"[TOOL_CALLS] [{CALL}, nonsense]", (", nonsense]", [("weather", ARGUMENTS)])),
    (LISTED, f"[TOOL_CALLS] [{CALL}, {CALL[:-1]}", (f", {CALL[:-1]}", [("weather", ARGUMENTS)])),
    (LISTED, "[TOOL_CALLS] [nonsense]", None),
    (LISTED, "a list: [1, 2]", None),
    (PHI, f"<|tool_call|>[{CALL}, {CALL}]<|/tool_call|>", ("", [("weather", ARGUMENTS)] * 2)),
    (PHI, f"<|tool_call|>[{CALL}]<|/tool_", ("", [("weather", ARGUMENTS)])),
    # What clients could not read is none either; broken lines within texts are mended.
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"a": 1e999}}</tool_call>', None),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>', None),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"a": "\\ud800"}}</tool_call>', None),
    (
        HERMES,
        '<tool_call>{"name": "weather", "arguments": {"a": "1\n2"}}</tool_call>',
        ("", [("weather", '{"a": "1\\n2"}')]),
    ),
    (BARE, '{"name": "weather", "parameters": {"city": "Izmir"}}', ("", [("weather", '{"city": "Izmir"}')])),
    (BARE, '{"name": "rm", "parameters": {}}', None),
    (BARE, 'It is {"name": "weather", "parameters": {}}', None),
    (BARE, '{"parameters": {"city": "Izmir"}, "name": "weather"} ', ("", [("weather", '{"city": "Izmir"}')])),
    (BARE, '{"answer": [1, 2', None),
    (BARE, "", ("", [])),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_an_answer_is_read_alike_whole_and_in_any_pieces(form, text, expected) -> None:
    # What is no call stays as it was written.
    expected = expected or (text, [])
    assert read(form, [text]) == expected
    assert read(form, list(text)) == expected
    for cut in range(len(text)):
        assert read(form, [text[:cut], text[cut:]]) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PARTS = ["</tool_call>", "<tool_call>", '"', "\\", "}", "{", "a", " ", "\n", "é"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)


@given(st.dictionaries(TEXTS, JSON | TEXTS, max_size=3), st.dictionaries(TEXTS, JSON | TEXTS, max_size=2), st.data())
def test_any_arguments_in_any_order_of_fields_survive_any_cut(arguments, further, data) -> None:
    ascii_only, spaces = data.draw(st.booleans()), data.draw(st.sampled_from([None, (",", ":"), (" , ", " :\n")]))
    written = json.dumps(arguments, ensure_ascii=ascii_only, separators=spaces)
    fields = {**further, "name": "weather", "arguments": arguments}
    order = data.draw(st.permutations(list(fields)))
    whole = json.dumps({name: fields[name] for name in order}, ensure_ascii=ascii_only, separators=spaces)
    text = f"Well.\n<tool_call>\n{whole}\n</tool_call> Done"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(HERMES, pieces) == ("Well. Done", [("weather", written)])


@given(TEXTS, st.integers(0, 40))
def test_whatever_is_no_call_stays_as_it_was_written(text, cut) -> None:
    assert read(HERMES, [text[:cut], text[cut:]]) == (text, [])


def test_numbers_that_no_client_reads_make_no_call() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"a": %s}}</tool_call>'
    assert read(HERMES, [text % ("9" * 4301)]) == (text % ("9" * 4301), [])
    assert read(HERMES, [text % ("9" * 4300)])[1]


def test_an_answer_of_one_call_ends_with_it() -> None:
    reader = ToolCallReader(HERMES, ["weather"], several=False)
    events = [event for piece in f"<tool_call>{CALL}</tool_call>x<tool_call>{CALL}" for event in reader.feed(piece)]
    assert reader.calls == 1 and not [*reader.flush()]
    assert events == [Call("weather", ARGUMENTS)]


REFERENCES = [
    {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "integer"}}},
    {"properties": {"a": {"$ref": "#/definitions/x"}}, "definitions": {"x": {"type": "integer"}}},
    {"properties": {"a": {"$ref": "#/$defs/x%20y"}}, "$defs": {"x y": {"type": "integer"}}},
    {"properties": {"a": {"$ref": "#here"}}, "$defs": {"x": {"$anchor": "here", "type": "integer"}}},
    {"properties": {"a": {"$ref": "b"}}, "$id": "http://a.example/", "$defs": {"x": {"$id": "b", "type": "integer"}}},
    {"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "integer"}}},
    {"$ref": "#/$defs/all", "$defs": {"all": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}},
    {"properties": {"a": {"type": "integer"}, "next": {"$ref": "#"}}},
]  # fmt: skip


@pytest.mark.parametrize("form", [HERMES, BARE, LISTED])
@pytest.mark.parametrize("schema", REFERENCES)
def test_references_of_parameters_hold_in_the_grammar(tiny_tokenizer, form, schema) -> None:
    tools = [TIME["function"], {"name": "weather", "parameters": {**schema, "required": ["a"]}}]
    make = compile_constraint(resolve({"grammar": form.grammar(tools, several=False)}), tiny_tokenizer, 512, [511])
    for arguments, allowed in (('{"a": 1}', True), ('{"a": "b"}', False), ("6898", False)):
        constraint = make(0)
        text = form.prefix + f'{{"name": "weather", "{form.arguments}": {arguments}}}' + form.suffix
        for token_id in tiny_tokenizer.encode(text):
            if not bool(constraint.mask()[token_id]):
                break
            constraint.advance(token_id)
        assert constraint.finished is allowed, arguments


def test_parameters_that_are_no_object_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="always an object"):
        HERMES.grammar([{"name": "a", "parameters": {"type": "integer"}}], several=False)


@pytest.mark.parametrize("form", [HERMES, BARE, LISTED, PHI])
def test_what_the_grammar_allows_is_read_as_a_call(tiny_tokenizer, form) -> None:
    source = form.grammar(FUNCTIONS, several=False)
    arguments = '{"city": "Izmir", "days": 3}'
    text = form.prefix + f'{{"name": "weather", "{form.arguments}": {arguments}}}' + form.suffix
    make = compile_constraint(resolve({"grammar": source}), tiny_tokenizer, tiny_tokenizer.vocab_size, [511])
    assert make is not None
    constraint = make(0)
    for token_id in tiny_tokenizer.encode(text):
        constraint.advance(token_id)
    assert constraint.finished
    assert read(form, [text]) == ("", [("weather", arguments)])
