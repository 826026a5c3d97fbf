"""Conversations in the formats of the most used small models: text and ids are those of transformers.

The templates are written here after the formats that the models' makers document, with the twists that theirs have:
macros, namespaces, slices of the messages, refusals, dates, stripped reasoning, generated whitespace.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests import texts
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import InvalidRequest
from topkapi.model.text.tokenizer import Tokenizer

QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You are Qwen.' }}{%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
QWEN3 = """\
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last_query_index == messages|length - 1 %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate user and assistant") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- else %}{{- " " + message["content"]|trim + eos_token }}{%- endif %}
{%- endfor %}
"""
TEKKEN = MISTRAL.replace('"[INST] "', '"[INST]"').replace('" " + message["content"]|trim', 'message["content"]|trim')
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model
'}}{%- endif -%}
"""
PHI3 = """\
{% for message in messages %}{% if message['role'] == 'system' %}\
{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}\
{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}\
{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}\
{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
PHI4 = """\
{% for message in messages %}\
{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}\
{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}\
{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""
GRANITE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Knowledge Cutoff Date: April 2024.\\nYou are Granite, developed by IBM." %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- for message in loop_messages %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}
{%- endfor %}"""
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
OLMO2 = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}\
{{ '<|system|>\\n' + message['content'] \
+ '\\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}\
{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\\n' + message['content'] + eos_token \
+ '\\n' }}{% else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}{% endif %}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""
R1 = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}\
{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}\
{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{'<｜Assistant｜>' + content + eos_token}}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""
SMOLLM3 = """\
{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}
{%- set reasoning_mode = "/think" if enable_thinking else "/no_think" %}
{%- if messages[0].role == "system" %}
    {%- set system_message = messages[0].content %}
    {%- if "/no_think" in system_message %}{%- set reasoning_mode = "/no_think" %}{%- endif %}
    {%- set custom = system_message.replace("/no_think", "").replace("/think", "").rstrip() %}
{%- endif %}
{{- "<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: " + reasoning_mode + "\\n\\n" }}
{%- if custom %}{{- custom + "\\n\\n" }}{%- endif %}{{- "<|im_end|>\\n" }}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else "" %}
    {%- if message.role == "user" %}{{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" %}
        {%- if reasoning_mode == "/think" %}{{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else %}
            {{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- if reasoning_mode == "/think" %}{{ "<|im_start|>assistant\\n" }}
    {%- else %}{{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" }}{%- endif %}
{%- endif %}
"""
TEMPLATES = {
    "qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3, "mistral": MISTRAL, "tekken": TEKKEN, "gemma": GEMMA,
    "phi3": PHI3, "phi4": PHI4, "granite": GRANITE, "zephyr": ZEPHYR, "olmo2": OLMO2, "r1": R1, "smollm3": SMOLLM3,
}  # fmt: skip
CONTROL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]",
    "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<｜User｜>", "<｜Assistant｜>",
]  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief. "}
TURNS = [
    {"role": "user", "content": "  The ferry left at dawn, {{ didn't }} it?\n"},
    {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nnobody aboard had slept <b> & é👋 "},
    {"role": "user", "content": "Why?"},
]
ANSWERED = [*TURNS, {"role": "assistant", "content": "They'd sung ALL night."}]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    trained = Tokenizer.train([texts.JOINED], 330, CONTROL)
    directory = tmp_path_factory.mktemp("vocabulary")
    trained.save(directory)
    config = directory / "tokenizer_config.json"
    named = PreTrainedTokenizerFast.from_pretrained(directory, bos_token="<s>", eos_token="</s>")
    config.unlink()
    named.save_pretrained(directory)
    return Tokenizer.from_directory(directory), directory


@pytest.mark.parametrize("messages", [TURNS, [SYSTEM, *TURNS], ANSWERED, [SYSTEM, *ANSWERED]], ids=[1, 2, 3, 4])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_those_of_transformers(
    name: str, messages: list[dict[str, Any]], vocabulary: tuple[Tokenizer, Path]
) -> None:
    tokenizer, directory = vocabulary
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    template = ChatTemplate(TEMPLATES[name])
    given: list[dict[str, Any]] = [{}]
    if name in ("qwen3", "smollm3"):
        given += [{"enable_thinking": False}, {"enable_thinking": True}]
    for variables in given:
        prompt = messages[-1]["role"] == "user"
        options = {"chat_template": TEMPLATES[name], "add_generation_prompt": prompt, **variables}
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        assert template.render(messages, add_generation_prompt=prompt, **special, **variables) == expected
        # Without a prompt it is for training, which refuses templates that show an answer otherwise than it is.
        if prompt:
            ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
            assert template.encode(messages, tokenizer, **variables).token_ids == ids


def test_tools_and_their_results_are_shown_as_by_transformers(vocabulary: tuple[Tokenizer, Path]) -> None:
    tokenizer, directory = vocabulary
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    tool = {"type": "function", "function": {"name": "ferry", "description": "When “it” left <b>", "parameters": {
        "type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]}}}  # fmt: skip
    call = {"id": "call00000", "type": "function", "function": {"name": "ferry", "arguments": {"day": "é 1"}}}
    messages = [
        *TURNS[:1],
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        *({"role": "tool", "content": text, "tool_call_id": "call00000"} for text in ("dawn", "noon")),
    ]
    expected = theirs.apply_chat_template(
        messages, tools=[tool], chat_template=QWEN25, add_generation_prompt=True, return_dict=True
    )
    encoded = ChatTemplate(QWEN25).encode(messages, tokenizer, tools=[tool])
    assert encoded.token_ids == expected["input_ids"]


@pytest.mark.parametrize("name", ["mistral", "tekken"])
def test_what_a_template_refuses_is_said(name: str) -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate(TEMPLATES[name]).render(TURNS[:1] * 2, bos_token="<s>", eos_token="</s>")
