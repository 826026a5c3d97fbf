"""How a template writes calls of tools, found by asking it; calls read out of text however it is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.chat import ChatTemplate
from model.decoding.grammar import compile_constraint
from model.decoding.parameters import resolve
from model.errors import InvalidRequest
from model.tool_calls import CallArguments, CallBegan, Said, ToolCallForm, ToolCallReader
from tests.openai_cases import LLAMA_TEMPLATE, TIME, TOOL_TEMPLATE, WEATHER

HERMES = ToolCallForm("<tool_call>\n", "arguments", "\n</tool_call>", "\n")
BARE = ToolCallForm("", "parameters", "", None)
FUNCTIONS = [WEATHER["function"], TIME["function"]]


def read(form: ToolCallForm, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and each call's name and arguments."""
    reader = ToolCallReader(form, ["weather", "time_now"])
    events = [event for piece in pieces for event in reader.feed(piece)] + list(reader.flush())
    text, calls = "", []
    for event in events:
        if isinstance(event, Said):
            text += event.text
        elif isinstance(event, CallBegan):
            calls.append((event.name, ""))
        else:
            assert isinstance(event, CallArguments)
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    assert reader.calls == len(calls)
    return text, calls


def test_the_form_is_found_by_asking_the_template(tiny_tokenizer) -> None:
    assert ToolCallForm.of(ChatTemplate(TOOL_TEMPLATE), tiny_tokenizer) == HERMES
    assert ToolCallForm.of(ChatTemplate(LLAMA_TEMPLATE), tiny_tokenizer) == BARE


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
    (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None),
    (HERMES, "<tool_call>nonsense</tool_call> <b>", None),
    (HERMES, "a < b <tool_cal", None),
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Anka', ("", [("weather", '{"city": "Anka')])),
    (BARE, '{"name": "weather", "parameters": {"city": "Izmir"}}', ("", [("weather", '{"city": "Izmir"}')])),
    (BARE, '{"name": "rm", "parameters": {}}', None),
    (BARE, 'It is {"name": "weather", "parameters": {}}', None),
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


@given(st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(), st.lists)), st.data())
def test_any_arguments_survive(arguments, data) -> None:
    written = json.dumps(arguments, ensure_ascii=data.draw(st.booleans()))
    text = f'<tool_call>\n{{"name": "weather", "arguments": {written}}}\n</tool_call>'
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(HERMES, pieces) == ("", [("weather", written)])


@pytest.mark.parametrize("form", [HERMES, BARE])
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
