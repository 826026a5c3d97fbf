"""What can be refused is refused before torch is imported, and whoever waits is told what for."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from topkapi.service.commands.cli import COMMANDS, build_parser
from topkapi.service.commands.parser import Parser

# Commands are refused one after the other in one child, which says after each whether it has imported torch.
CHILD = """
import contextlib, io, json, sys
from topkapi.service.commands.cli import main
for line in sys.stdin:
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            code = main(json.loads(line))
        except SystemExit as end:
            code = end.code
    heavy = [name for name in ("torch", "gradio", "fastapi", "uvicorn", "numpy", "transformers") if name in sys.modules]
    print(json.dumps([code, told.getvalue(), heavy]), flush=True)
"""
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A directory with a checkpoint, things that are none, and data."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_checkpoint("prompt"), place / "good")
    shutil.copytree(tiny_checkpoint("prompt"), place / "foreign")
    (place / "foreign" / "config.json").write_text('{"model_type": "mamba"}')
    shutil.copytree(tiny_checkpoint("prompt"), place / "torn")
    (place / "torn" / "config.json").write_text("{")
    (place / "empty").mkdir()
    (place / "file.txt").write_text("Some text.")
    (place / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (place / "run").mkdir()
    (place / "run" / "config.yaml").write_text("data: [file.txt]\n")
    (place / "run" / "metrics.jsonl").write_text("{}\n")
    return place


@pytest.fixture(scope="module")
def refused(place: Path) -> Iterator[Refused]:
    """A function that gives a command and returns what it is told; nothing heavy may be imported for that."""
    import json

    environment = {name: value for name, value in os.environ.items() if not name.startswith("TOPKAPI_")}
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=place,
        env=environment,
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None

    def ask(*arguments: str) -> str:
        child.stdin.write(json.dumps(arguments) + "\n")
        child.stdin.flush()
        code, told, heavy = json.loads(child.stdout.readline())
        assert code == 2 and told.startswith("error: "), told
        assert heavy == [], f"imported to say: {told}"
        return str(told)

    yield ask
    child.stdin.close()
    child.wait(20)


@pytest.mark.parametrize("command", ["serve", "generate hello -c", "score file.txt -c", "chat", "bench"])
def test_a_checkpoint_that_is_none_is_refused_at_once(refused: Refused, command: str) -> None:
    given = command.split()
    assert "there is no checkpoint at nowhere" in refused(*given, "nowhere")
    assert "config.json is missing" in refused(*given, "empty")
    assert "is a file but not .gguf" in refused(*given, "file.txt")
    assert "mamba" in refused(*given, "foreign")
    assert "not valid JSON" in refused(*given, "torn")
    assert "a training run" in refused(*given, "run")
    if command != "score file.txt -c":
        assert "there is no checkpoint at nowhere" in refused(*given, "good", "--draft", "nowhere")
    assert "--dtype" in refused(*given, "good", "--dtype", "float8")
    assert "--threads" in refused(*given, "good", "--threads", "0")


@pytest.mark.parametrize("command", ["generate hello -c good", "chat good"])
@pytest.mark.parametrize(
    "flags,says",
    [
        ("--top-p 2", "--top-p must be at most 1"),
        ("--temperature -1", "temperature must be at least 0"),
        ("--min-tokens 9 --max-tokens 3", "--min-tokens (9) is above --max-tokens (3)"),
        ("--mirostat 2 --top-k 4", "can't be combined with --top-k"),
        ("--dynamic-temperature-exponent 2", "has no effect without"),
        ("--logit-bias 99999999=1", "the vocabulary has ids"),
        ("--order nonsense", "not a stage"),
        ("--trace", "trace is not part of plain text"),
        ("--regex [", "regex can't be followed: unclosed character class"),
        ("--regex (?=a)", "regex can't be followed: "),
        ('--json-schema {"type":"nonsense"}', "--json-schema can't be followed: Invalid type: nonsense"),
        ('--json-schema {"type"', "is not JSON"),
        ('--grammar start:"a', "grammar can't be followed: "),
        ('--grammar root::="a"', "it looks like llama.cpp's GBNF"),
    ],
)
def test_parameters_are_refused_at_once(refused: Refused, command: str, flags: str, says: str) -> None:
    assert says in refused(*command.split(), *flags.split())


@pytest.mark.parametrize(
    "command,says",
    [
        ("serve good --port 70000", "--port"),
        ("serve good --model-directory nowhere", "--model-directory"),
        ("serve good --stream-keep-alive -1", "--stream-keep-alive"),
        ("serve good good --port 0", "two checkpoints would be named 'good'"),
        ("generate hello -c good --system x", "--system needs --chat"),
        ("score missing.txt -c good", "missing.txt cannot be read"),
        ("score file.txt -c good --window 1", "window must be at least 2"),
        ("score file.txt -c good --window 9999999", "the context length"),
        ("score file.txt -c good --window 8 --stride 8", "below the window of 8"),
        ("score file.txt -c good --top -1", "--top must be at least 0"),
        ("chat good --n 2", "one answer at a time"),
        ("bench good --tokens 3", "--tokens must be at least 8"),
        ("bench good --tokens 8 --repeats 1", "--tokens 8 the first of 32 streams ends before all have begun"),
        ("bench --tokens 12 --prompt-tokens 512", "give at least --tokens 75"),
        ("bench good --tokens 100000", "do not fit the context"),
        ("bench --tokens 1024", "do not fit the context of 1024"),
    ],
)
def test_what_a_command_needs_is_checked_at_once(refused: Refused, command: str, says: str) -> None:
    assert says in refused(*command.split())


def test_a_port_in_use_is_refused_at_once(refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "is in use" in refused("serve", "good", "--port", str(taken.getsockname()[1]))


@pytest.mark.parametrize(
    "command,says",
    [
        ("pretrain --data missing.txt", "no such file"),
        ("pretrain", "no training text"),
        ("pretrain --data file.txt --tokenizer nowhere", "there is no tokenizer at nowhere"),
        ("pretrain --data file.txt --checkpoint nowhere", "there is no checkpoint at nowhere"),
        ("pretrain --data file.txt --checkpoint good --num-layers 3", "the checkpoint's own"),
        ("pretrain --data file.txt --model gpt2 --num-kv-heads 2", "as many key-value heads as heads"),
        ("pretrain --data file.txt --device tpu", "device 'tpu' is not supported"),
        ("pretrain --data file.txt --batch-size 0", "--batch-size must be a whole number of at least 1"),
        ("pretrain --data file.txt --out run", "already holds a run"),
        ("pretrain --data file.txt --out empty/../good", "is there and is not a run"),
        ("pretrain --data file.txt=3", "a weight for file.txt alone means nothing"),
        ("pretrain --resume nowhere", "there is no training run in nowhere"),
        ("finetune --data rows.jsonl", "no checkpoint to start from"),
        ("finetune --data rows.jsonl --checkpoint nowhere", "there is no checkpoint at nowhere"),
        ("finetune --data nothing.jsonl --checkpoint good", "no such file"),
        ("finetune --data rows.jsonl --checkpoint good --weights nonsense", "--weights"),
        ("finetune --data rows.jsonl --checkpoint good --chat-template nonsense", "there is no chat template nonsense"),
        ("dpo --data rows.jsonl --checkpoint empty", "config.json is missing"),
        ("dpo --data rows.jsonl --validation-data no.jsonl --checkpoint good", "no such file"),
        ("plan --data missing.txt", "no such file"),
        ("plan --data rows.jsonl --checkpoint nowhere --run finetune", "there is no checkpoint at nowhere"),
        ("merge good good --out merged", "is not an adapter"),
        ("merge nowhere good --out merged", "there is no checkpoint at nowhere"),
        ("export gguf nowhere out.gguf", "there is no checkpoint at nowhere"),
        ("export gguf good out.bin", "must end in .gguf"),
        ("evaluate nowhere --perplexity file.txt", "there is no checkpoint at nowhere"),
        ("evaluate good --perplexity missing.txt", "no such file"),
        ("evaluate good --instructions rows.jsonl --chat-template nonsense", "there is no chat template nonsense"),
        ("evaluate good --perplexity file.txt --threads 0", "--threads must be at least 1"),
        ("instructions answer rows.jsonl --checkpoint nowhere --out a.jsonl", "there is no checkpoint at nowhere"),
        ("instructions answer no.jsonl --checkpoint good --out a.jsonl", "no such file"),
        ("pick nowhere", "there is no training run in nowhere"),
        ("runs nowhere", "there are no training runs in nowhere"),
    ],
)
def test_training_commands_check_at_once(refused: Refused, command: str, says: str) -> None:
    assert says in refused(*command.split())


def parsers(parser: Parser) -> Iterator[Parser]:
    """A parser and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for child in action.choices.values():
                yield from parsers(child)


def test_no_beginning_of_a_flag_is_taken_for_the_flag(refused: Refused) -> None:
    assert all(not parser.allow_abbrev for parser in parsers(build_parser()))
    assert "there is no flag --model; did you mean --model-directory?" in refused("serve", "--model", "good")
    assert "there is no flag --vocab" in refused("tokenizer", "train", "file.txt", "--out", "t", "--vocab", "300")


def test_helps_import_nothing_heavy(place: Path) -> None:
    script = "import sys\nfrom topkapi.service.commands.cli import COMMANDS, build_parser\nparser = build_parser()\n"
    script += "def walk(parser):\n    parser.format_help()\n    for action in parser._actions:\n"
    script += "        for child in action.choices.values() if isinstance(action.choices, dict) else ():\n"
    script += "            walk(child)\nwalk(parser)\n"
    script += "print([name for name in ('torch', 'gradio', 'fastapi', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_help_of_all_commands_needs_none_of_them() -> None:
    assert build_parser("--help").format_help() == build_parser().format_help()
    script = "import sys\nfrom topkapi.service.commands.cli import main\ntry: main(['--help'])\nfinally: "
    script += "print([name for name in ('torch', 'pydantic', 'yaml', 'topkapi.training') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "examples:" in done.stdout and done.stdout.endswith("[]\n"), done.stderr


def test_the_help_has_every_command_once_by_what_it_is_for_and_examples_in_a_column() -> None:
    parser = build_parser()
    told, _, examples = parser.format_help().partition("examples:\n")
    lines = re.findall(r"^(?:  )?(\w[^\n:]*)", told.partition("COMMAND  ")[2].partition("\n")[2], re.MULTILINE)
    assert [line for line in lines if line in COMMANDS] == ["serve and ask", "models", "train", "judge"]
    (commands,) = parser._subparsers._group_actions  # type: ignore[union-attr]
    assert isinstance(commands.choices, dict)
    assert sorted(line.split()[0] for line in lines if line not in COMMANDS) == sorted(commands.choices)
    rows = [line for line in examples.partition("\n\n")[0].splitlines() if not line.endswith("--out runs/chat")]
    assert len(rows) > 5 and all(row[48:50] == "  " and row[50] != " " for row in rows)


def test_a_command_that_serves_makes_no_flags_of_training() -> None:
    whole = next(iter(build_parser()._subparsers._group_actions)).choices  # type: ignore[union-attr]
    alone = next(iter(build_parser("serve")._subparsers._group_actions)).choices  # type: ignore[union-attr]
    assert list(alone) == ["serve"] and alone["serve"].format_help() == whole["serve"].format_help()


# Importing torch is put off until a line comes in, so that nothing said before that can have waited for it.
HELD = """
import sys
class Wait:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            sys.__stdout__.write("importing torch\\n"); sys.__stdout__.flush()
            raise KeyboardInterrupt
sys.meta_path.insert(0, Wait())
from topkapi.service.commands.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_serve_says_what_it_loads_before_torch_is_imported(place: Path) -> None:
    command = [sys.executable, "-c", HELD, "serve", "good", "--port", "0"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("Topkapi ") and first.endswith(": loading good") and second == "importing torch"


@pytest.mark.parametrize("command", ["chat good", "generate hello -c good", "score file.txt -c good", "bench good"])
def test_a_terminal_is_told_what_is_waited_for(place: Path, command: str) -> None:
    terminal, side = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", HELD, *command.split()], cwd=place, stdout=subprocess.PIPE, stderr=side, text=True
    )
    os.close(side)
    shown, _ = child.communicate(timeout=60)
    assert shown == "importing torch\n"
    assert select.select([terminal], [], [], 0)[0]
    assert os.read(terminal, 1000).startswith(b"loading good")
    os.close(terminal)
