"""Fuzzes the parsers of what strangers send: `python -m benchmarks.fuzz --seconds 60 json regex`; without names all.

Each parser is given texts made from examples of its own, changed at random: by Hypothesis, or with `--atheris` by
libFuzzer, which looks for inputs that reach new lines of ours (`pip install atheris`). A parser may refuse, by the
error that it promises, and must not take longer than LONGEST seconds; anything else is a finding, printed with its
input, and the exit code is 1. Files of checkpoints are damaged by their formats' own terms in `test_file_fuzz.py`.
"""

from __future__ import annotations

import argparse
import atexit
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import hypothesis
from hypothesis import strategies as st

from topkapi.model.conversation.chat_template import BUILT_IN_TEMPLATES, ChatTemplate
from topkapi.model.conversation.reasoning import ReasoningReader
from topkapi.model.conversation.tool_call_reader import Call, ToolCallReader
from topkapi.model.conversation.tool_calls import ToolCallForm
from topkapi.model.decoding.gbnf import lark_of
from topkapi.model.decoding.grammar import compile_constraint
from topkapi.model.decoding.parameters import resolve
from topkapi.model.errors import TopkapiError
from topkapi.model.hub.names import hub_name
from topkapi.model.storage.card import read_card
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.service.api.http.authority import given_key
from topkapi.service.api.http.body import json_in, parse_json
from topkapi.service.api.http.middleware import timeout_of
from topkapi.service.keys import read_keys
from topkapi.service.runs import Runs
from topkapi.service.settings import Settings
from topkapi.service.settings_file import read_settings
from topkapi.training.data.instructions import read_conversations
from topkapi.training.data.preferences import read_preferences
from topkapi.training.recipes.arguments import build_recipe, read_yaml
from topkapi.training.recipes.recipe import FinetuneRecipe, PretrainRecipe

LONGEST = 15.0
"""Seconds for one input; compiling a grammar may take ten."""

Parser = Callable[[bytes], None]
SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-"))
"""Where files lie that are read; gone with the process."""
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
(SCRATCH / "run").mkdir()
CONVERSATION: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
DIGEST = "sha256:" + "a" * 64


def text_of(data: bytes) -> str:
    """What arrives as text: JSON has no lone surrogates."""
    return data.decode("utf-8", "replace")


def read_json(data: bytes) -> None:
    """What is read must be what Python's reader reads, and refused must be what its standard refuses."""
    document = parse_json(data)
    assert document == json.loads(data)
    json.dumps(document, ensure_ascii=False).encode()
    json_in(text_of(data), "field")


def read_headers(data: bytes) -> None:
    """Keys and deadlines of a request's head."""
    lines = [line.partition(b":") for line in data.split(b"\n")]
    headers = [(name.strip().lower(), value.strip()) for name, _, value in lines]
    given_key(headers)
    timeout_of(headers)


def render(data: bytes) -> None:
    """A template of a stranger's: it ends, by an error or a text that is not without end."""
    text = ChatTemplate(text_of(data)).render(CONVERSATION, tools=[{"type": "function", "function": {"name": "f"}}])
    assert len(text) < 10_000_000


def structure(field: str) -> Parser:
    """Compiles a grammar, and follows it for a few tokens."""
    tokenizer = _tokenizer()

    def compiled(data: bytes) -> None:
        value: Any = text_of(data)
        if field == "gbnf":
            value = lark_of(value)
        elif field == "json_schema":
            value = json_in(value, field)
        parameters = resolve({"grammar" if field == "gbnf" else field: value, "max_tokens": 5})
        make = compile_constraint(parameters, tokenizer, tokenizer.vocab_size, [0])
        if make is not None:
            constraint, drawn = make(0), random.Random(data)
            for _ in range(6):
                if constraint.finished:
                    break
                constraint.advance(drawn.choice(constraint.mask().nonzero().flatten().tolist()))

    return compiled


def read_calls(data: bytes) -> None:
    """Calls of tools are read alike however the answer is cut, and nothing of it is lost or told twice."""
    text = text_of(data)
    forms = (
        ToolCallForm("<tool_call>\n", "arguments", "\n</tool_call>", "\n"),
        ToolCallForm("[TOOL_CALLS][", "arguments", "]", ", ", listed=True),
        ToolCallForm("", "parameters", "", None),
    )
    drawn = random.Random(data)
    for form in forms:
        whole, pieces = (_events(ToolCallReader(form, ["f", "g"]), parts) for parts in ([text], _cut(text, drawn)))
        assert whole == pieces, (whole, pieces)
        for call in whole:
            assert not isinstance(call, tuple) or isinstance(json.loads(call[1]), dict)


def read_reasoning(data: bytes) -> None:
    """Thoughts are read alike however the answer is cut."""
    text = text_of(data)
    for opened in (False, True):
        told = []
        for parts in ([text], _cut(text, random.Random(data))):
            reader, said = ReasoningReader(opened=opened), [("", "")]
            for event in [event for part in parts for event in reader.feed(part)] + list(reader.flush()):
                kind = type(event).__name__
                said.append((kind, said.pop()[1] + event.text) if said[-1][0] == kind else (kind, event.text))
            told.append(said)
        assert told[0] == told[1]


def _events(reader: ToolCallReader, parts: list[str]) -> list[str | tuple[str, str]]:
    said: list[str | tuple[str, str]] = [""]
    for event in [event for part in parts for event in reader.feed(part)] + list(reader.flush()):
        if isinstance(event, Call):
            said.append((event.name, event.arguments))
            said.append("")
        else:
            said[-1] += event.text  # type: ignore[operator]
    return said


def _cut(text: str, drawn: random.Random) -> list[str]:
    places = sorted(drawn.randrange(len(text) + 1) for _ in range(drawn.randrange(1, 9)))
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


def in_file(name: str, read: Callable[[Path], object]) -> Parser:
    """A parser of files."""

    def parsed(data: bytes) -> None:
        path = SCRATCH / name
        path.write_bytes(data)
        read(path)

    return parsed


def read_config(path: Path) -> None:
    """The server's settings."""
    Settings.read(config=path)
    read_settings(path, list(Settings.model_fields), "--config")


def read_recipe(path: Path) -> None:
    """A run's settings, of either kind."""
    fields = read_yaml(path)
    for kind in (PretrainRecipe, FinetuneRecipe):
        try:
            build_recipe(kind, dict(fields), str(path))
        except TopkapiError:
            continue


def read_run(path: Path) -> None:
    """A run's files, as the server tells of them: whatever they hold, it is JSON."""
    runs = Runs(SCRATCH)
    run = path.parent
    (run / "config.yaml").write_bytes(path.read_bytes())
    (run / "samples.jsonl").write_bytes(path.read_bytes())
    json.dumps([runs.summary(run.name), runs.details(run.name)], allow_nan=False)
    for every in (1, 3):
        page = runs.page(run.name, "metrics", every=every)
        assert all(json.loads(record) is not None for record in page.records)


def read_tokenizer(data: bytes) -> None:
    """A tokenizer of a stranger's, in this process: what it takes beyond our checks is the library's."""
    document = json_in(text_of(data), "tokenizer.json")
    if isinstance(document, dict):
        tokenizer = Tokenizer(document)
        tokenizer.decode(tokenizer.encode("a b <|im_end|> é")[:5])


def _tokenizer() -> Tokenizer:
    words = 'a regular text with words, numbers 0123456789 and "signs" {}[]():,.-+ true false null\n' * 4
    return Tokenizer.train([words], 300, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def rows(path: Path) -> None:
    """Examples to tune on."""
    for read in (lambda: read_conversations(path, input_heading=True), lambda: read_preferences(path)):
        try:
            read()
        except TopkapiError:
            continue


def _lines(*documents: object) -> bytes:
    return "\n".join(json.dumps(document) for document in documents).encode()


EXAMPLES = {
    "json": [
        b'{"prompt": "a\\u00e9\\ud83d\\ude00", "n": 1, "logit_bias": {"1": -1.5e3}, "stop": ["a", null], "x": [1, 2]}',
        b'{"a": [[[]]], "a2": {"b": {}}}',
    ],
    "headers": [
        b"Authorization: Bearer abcdefgh\nx-api-key: abcdefgh\nX-Request-Timeout: 2.5\n"
        b"x-envoy-expected-rq-timeout-ms: 1e3"
    ],
    "template": [
        *(source.encode() for source in BUILT_IN_TEMPLATES.values()),
        b"{% macro a(x) %}{{ x|tojson }}{% endmacro %}{% for m in messages[::-1] %}{% set ns = namespace(i=0) %}"
        b"{{ a(m.content * 3)|indent(2) }}{{ '%5s' % m['role'] }}{% endfor %}",
    ],
    "regex": [rb"(a|b)*c{2,3}[^x-z]\d+\w?", rb"(?i:ab)\p{L}+.{0,5}", rb"((((a+)+)+)+)+b"],
    "json_schema": [
        b'{"type": "object", "required": ["a"], "properties": {"a": {"type": ["string", "null"], "pattern": "^[a-z]+"},'
        b' "b": {"$ref": "#/$defs/c"}, "d": {"enum": [1, "x"], "minimum": 0}}, "$defs": {"c": {"anyOf": [{"const": 1},'
        b' {"type": "array", "items": {"type": "number"}, "maxItems": 3}]}}, "additionalProperties": false}',
        b"true",
    ],
    "lark": [b'start: NUMBER (" + " NUMBER)+ | word\nNUMBER: /[1-9][0-9]{0,2}/\nword: "a".."z" ~ 2..3\n%ignore " "'],
    "gbnf": [b'root ::= "a" item+ ws\nitem ::= [a-z0-9] | "(" item{1,3} ")" | "\\n"?\nws ::= " "*\n'],
    "calls": [
        b'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, "\\"}</tool_call>"], "b": null}}\n</tool_call>'
        b' so [TOOL_CALLS][{"name": "g", "arguments": {}}, {"arguments": {"x": 1e5}, "name": "f"}]'
    ],
    "reasoning": [b"<think>\n a b </think>\n\n c", b"a <think>b</think>"],
    "settings": [
        b"port: 8000\nallowed_hosts: [a.org, '*.b.org']\nmax_queue_seconds: 1.5\nkeys: null\nlog_format: json\n"
        b"cors_origins: https://a.org\n"
    ],
    "recipe": [
        b"data: [a.txt, {path: b.jsonl, weight: 2}]\nlearning_rate: 1e-3\nbatch_size: 16\nepochs: 1\nmodel: tiny\n"
        b"&a x: *a\nwhen: 2001-01-01 10:00:00\n"
    ],
    "keys": [
        f"# keys\nalice admin {DIGEST}\nbob use {DIGEST[:-1]}b requests_per_minute=60 priority=-10\n".encode(),
    ],
    "rows": [
        _lines({"messages": CONVERSATION}, {"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "c"}),
        _lines({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": CONVERSATION, "rejected": [], "weight": 0}),
    ],
    "list": [b'[{"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "", "output": "c"}]'],
    "table": [b'prompt,completion,label\n"a ""b""\n",c,true\nd,e,1\n'],
    "run": [_lines({"step": 1, "loss": 2.5, "tokens": 10}, {"step": 3, "loss": float("inf"), "kind": "evaluation"})],
    "card": [b"---\nlicense: [mit, apache-2.0]\nlicense_name: x\n- y\n---\n# Title\ntext"],
    "hub name": [b"hf.co/owner/name@main:Q4_K_M", b"https://huggingface.co/o/n"],
}


def targets() -> dict[str, tuple[Parser, list[bytes]]]:
    """Each parser with examples of what it reads."""
    parsers: dict[str, Parser] = {
        "json": read_json,
        "headers": read_headers,
        "template": render,
        "regex": structure("regex"),
        "json_schema": structure("json_schema"),
        "lark": structure("grammar"),
        "gbnf": structure("gbnf"),
        "calls": read_calls,
        "reasoning": read_reasoning,
        "settings": in_file("settings.yaml", read_config),
        "recipe": in_file("recipe.yaml", read_recipe),
        "keys": lambda data: void(read_keys(text_of(data), "keys")),
        "tokenizer": read_tokenizer,
        "rows": in_file("rows.jsonl", rows),
        "list": in_file("rows.json", rows),
        "table": in_file("rows.csv", rows),
        "run": in_file("run/metrics.jsonl", read_run),
        "card": in_file("README.md", lambda path: read_card(path.parent)),
        "gguf head": in_file("a.gguf", read_card),
        "hub name": lambda data: void(hub_name(text_of(data))),
    }
    made = {"tokenizer": [json.dumps(_tokenizer().definition).encode()], "gguf head": [_gguf_head()]}
    return {name: (parse, (EXAMPLES | made)[name]) for name, parse in parsers.items()}


def void(_: object) -> None:
    """Nothing."""


def _gguf_head() -> bytes:
    import struct

    text = b"general.license"
    head = (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 2) + b"\0" * 8
    )
    return head + struct.pack("<Q", len(text)) + text + struct.pack("<IQ", 8, 3) + b"mit"


def check(name: str, parse: Parser, data: bytes) -> None:
    """Give a parser an input. Raises what it raises, unless that is a refusal, and where it takes too long."""
    began = time.monotonic()
    try:
        parse(data)
    except TopkapiError as error:
        error.message.encode()
        assert len(error.message) < 5000, f"a message of {len(error.message)} characters"
    took = time.monotonic() - began
    assert took < LONGEST, f"{name} took {took:.1f} s"


PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\u",
    b"\\ud800",
    b"9" * 400,
    b"1e999",
    b"-",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"'",
]
PIECES += [
    b"\n",
    b"\r",
    b"\t",
    b" ",
    b":",
    b",",
    b"#",
    b"&a ",
    b"*a ",
    b"!!",
    b"!!int ",
    b"<<: ",
    b"? ",
    b"%",
    b"{{",
    b"}}",
    b"{%",
]
PIECES += [
    b"(",
    b")",
    b"*",
    b"+",
    b"{99999}",
    b"{2,1}",
    b"|",
    b"^",
    b"$",
    b"\\",
    b"\\p{",
    b"(?",
    b"[^]",
    b"::=",
    b"root",
    b"null",
    b"true",
    b"NaN",
]
PIECES += [
    "é".encode(),
    "\u2028".encode(),
    "\U0001f600".encode(),
    "٣".encode(),
    b"0x",
    b"0o7",
    b"2001-99-99",
    b"12:99",
    b".inf",
    b"=",
    b"a" * 3000,
]


@st.composite
def changed(draw: Any, examples: list[bytes]) -> bytes:
    """One of the examples with some of it left out, repeated, exchanged, or something put in."""
    data = draw(st.sampled_from(examples))
    for _ in range(draw(st.integers(0, 5))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.sampled_from((0, 0, 1, 1, 2, 5, 20, 100))))
        way = draw(st.integers(0, 5))
        piece = (
            draw(st.sampled_from(PIECES)) if way < 3 else draw(st.binary(max_size=4)) if way == 3 else data[begin:end]
        )
        times = draw(st.sampled_from((1, 1, 1, 2, 50))) if way == 4 else 1
        data = data[:begin] + piece * times + data[end if way != 5 else begin :]
    return bytes(data[:200_000])


def by_hypothesis(name: str, parse: Parser, examples: list[bytes], seconds: float) -> tuple[int, str | None]:
    """How many inputs were tried in so many seconds, and what was found."""
    end, tried = time.monotonic() + seconds, 0

    @hypothesis.settings(
        max_examples=500, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(changed(examples))
    def run(data: bytes) -> None:
        nonlocal tried
        tried += 1
        hypothesis.note(f"{name}: {data[:3000]!r}")
        check(name, parse, data)

    while time.monotonic() < end:
        try:
            run()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return tried, "".join(traceback.format_exception(error))[-6000:] + "\n".join(
                getattr(error, "__notes__", [])
            )
    return tried, None


def _functions() -> Iterator[FunctionType]:
    """The functions of our modules and of their classes, as far as they are imported."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("topkapi."):
            owners = [module, *(each for each in vars(module).values() if isinstance(each, type))]
            found = [each for owner in owners for each in vars(owner).values()]
            yield from (each for each in found if isinstance(each, FunctionType) and each.__module__ == module_name)


def by_atheris(name: str, parse: Parser, examples: list[bytes], seconds: float) -> None:
    """Let libFuzzer look for an input that reaches new lines of ours; it ends the process."""
    import atheris

    for function in _functions():
        atheris.instrument_func(function)
    corpus = SCRATCH / f"corpus-{name.replace(' ', '-')}"
    corpus.mkdir(exist_ok=True)
    for number, example in enumerate(examples):
        (corpus / str(number)).write_bytes(example)
    options = [
        f"-max_total_time={int(seconds)}",
        "-max_len=8192",
        "-timeout=20",
        "-rss_limit_mb=4000",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: check(name, parse, data))
    atheris.Fuzz()


def chosen(names: list[str]) -> Iterator[tuple[str, Parser, list[bytes]]]:
    """The parsers of these names, or all."""
    known = targets()
    for name in names or known:
        if name not in known:
            raise SystemExit(f"there is no parser {name!r}: {', '.join(known)}")
        yield name, *known[name]


def main() -> int:
    """Parse the options and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parsers", nargs="*")
    parser.add_argument("--seconds", type=float, default=60, help="for each parser [60]")
    parser.add_argument("--atheris", action="store_true", help="by libFuzzer, a process for each parser")
    options = parser.parse_args()
    findings = 0
    if options.atheris and len(options.parsers) != 1:
        # libFuzzer ends its process, so each has one of its own.
        command = [sys.executable, "-m", "benchmarks.fuzz", "--atheris", "--seconds", str(options.seconds)]
        for name, *_ in chosen(options.parsers):
            print(f"{name}:", flush=True)
            findings += subprocess.run([*command, name], check=False).returncode != 0
        print(f"{findings} parsers with findings")
        return min(findings, 1)
    for name, parse, examples in chosen(options.parsers):
        for example in examples:
            check(name, parse, example)
        if options.atheris:
            by_atheris(name, parse, examples, options.seconds)
        tried, found = by_hypothesis(name, parse, examples, options.seconds)
        print(f"{name:12} {tried:8} inputs{'' if found is None else ': FOUND'}", flush=True)
        if found is not None:
            findings += 1
            print(found, flush=True)
    return min(findings, 1)


if __name__ == "__main__":
    sys.exit(main())
