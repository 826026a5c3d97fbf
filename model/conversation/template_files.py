"""The chat templates that come with Topkapi, as Jinja source by name, and those of a checkpoint directory."""

from collections.abc import Mapping
from pathlib import Path

from topkapi.model.errors import CheckpointError
from topkapi.model.reading import read_json, read_text

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


def stored_templates(directory: Path) -> dict[str, str]:
    """The chat templates of a checkpoint directory by their names, empty where it has none.

    As in transformers they are `chat_template.jinja`, called `default`, and the files of `additional_chat_templates`;
    without these, `chat_template` in `tokenizer_config.json`: a text, or named texts as an object or as a list of
    `{"name", "template"}`. Raises CheckpointError for what can't be read or has another form.
    """
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    try:
        if files:
            return {name: read_text(path) for name, path in files.items()}
        return named_templates(read_json(directory / "tokenizer_config.json").get("chat_template"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the chat template of {directory} cannot be read: {error}") from error


def named_templates(stored: object) -> dict[str, str]:
    """The templates of a `chat_template` in any of its forms by their names. Raises ValueError for another form."""
    if stored is None or stored == "":
        return {}
    if isinstance(stored, str):
        return {"default": stored}
    if isinstance(stored, list) and all(isinstance(entry, Mapping) for entry in stored):
        stored = {entry.get("name"): entry.get("template") for entry in stored}
    if isinstance(stored, Mapping) and all(isinstance(text, str) for item in stored.items() for text in item):
        return dict(stored)
    raise ValueError("chat_template is neither a text nor named texts")
