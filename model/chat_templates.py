"""The chat templates that come with Topkapi, as Jinja source by name."""

from collections.abc import Mapping

CHATML = """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("role '" + message['role'] + "' is unknown: use system, user or assistant") -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""OpenAI's Chat Markup Language, as SmolLM and Qwen use it; no system message is added."""

ALPACA = """\
{%- set state = namespace(next='user', end=eos_token or '<|endoftext|>') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {{- messages[0]['content'] -}}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {{- 'Below is an instruction that describes a task. ' -}}
    {{- 'Write a response that appropriately completes the request.' -}}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] not in ['user', 'assistant'] -%}
        {{- raise_exception("role '" + message['role'] + "' is not possible here: use one system message at the "
            + "start, then user and assistant in turn") -}}
    {%- elif message['role'] != state.next -%}
        {{- raise_exception('roles must alternate, user first: expected a message of ' + state.next) -}}
    {%- elif message['role'] == 'user' -%}
        {{- '\\n\\n### Instruction:\\n' + message['content'] -}}
        {%- set state.next = 'assistant' -%}
    {%- else -%}
        {{- '\\n\\n### Response:\\n' -}}
        {%- generation -%}{{- message['content'] + state.end -}}{%- endgeneration -%}
        {%- set state.next = 'user' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\n\\n### Response:\\n' -}}
{%- endif -%}
"""
"""Stanford Alpaca's prompt with a single header, as "Build a Large Language Model (From Scratch)" uses it.

An input is part of the user's content: `{instruction}\\n\\n### Input:\\n{input}`. A system message takes the place of
the header line. Later turns repeat both headings after the end token.
"""

BUILT_IN_TEMPLATES: Mapping[str, str] = {"chatml": CHATML, "alpaca": ALPACA}
