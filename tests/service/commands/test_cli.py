"""The `topkapi` command: what it prints, what it refuses, and that it starts fast."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from topkapi.model.decoding.parameters import PARAMETERS
from topkapi.model.errors import SettingsError
from topkapi.model.scoring import score
from topkapi.service.commands.cli import build_parser, main
from topkapi.service.locations import default_checkpoints, name_of, split_location
from topkapi.service.models import load_checkpoint
from topkapi.service.settings import Settings

COMMAND = [sys.executable, "-m", "topkapi.service.commands.cli"]


@pytest.fixture(scope="module")
def chat(tiny_checkpoint: Callable[..., Path]) -> str:
    return str(tiny_checkpoint("terminal-chat"))


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Callable[..., Path]) -> str:
    return str(tiny_checkpoint("terminal-base", chat=False, context=2048))


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither the checkout's checkpoints nor the caller's variables are seen."""
    for name in [name for name in os.environ if name.startswith("TOPKAPI_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard error of a command that is refused."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and "Traceback" not in printed.err
    return printed.err


def type_in(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_help_and_version_load_no_torch() -> None:
    for flag, words in (("--help", "serve checkpoints over HTTP"), ("--version", "topkapi ")):
        script = f"import sys; sys.argv = ['topkapi', '{flag}']\nimport topkapi.service.commands.cli\n"
        script += (
            "try: topkapi.service.commands.cli.main()\nfinally: print('torch' in sys.modules, 'gradio' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert words in done.stdout and done.stdout.endswith("False False\n"), done.stderr


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "examples:" in capsys.readouterr().out


def test_every_parameter_of_the_table_is_a_flag() -> None:
    parsed = build_parser().parse_args(
        ["generate", "a", "--top-k", "3", "--stop", "x", "--stop", "y", "--logit-bias", "5=-1.5", "--ignore-end-token"]
    )
    assert (parsed.top_k, parsed.stop, parsed.logit_bias, parsed.ignore_end_token) == (3, ["x", "y"], [(5, -1.5)], True)
    choices = build_parser()._subparsers._group_actions[0].choices
    for command in ("generate", "chat"):
        shown = choices[command].format_help()
        for parameter in PARAMETERS:
            assert f"--{parameter.name.replace('_', '-')}" in shown


def test_generate_prints_the_text(chat: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "A list is", "-c", chat, "--max-tokens", "8", "--seed", "3"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert text == answer["outputs"][0]["text"] + "\n"
    assert main([*arguments, "--n", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"--- 1 of 2\n{text}--- 2 of 2\n")


def test_generate_says_why_there_is_nothing(chat: str, capsys) -> None:
    assert main(["generate", "A list is", "-c", chat, "--max-tokens", "0"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("\n", "nothing was generated: --max-tokens is 0\n")


def test_generate_tells_a_model_that_ends_at_once_how_to_be_asked(capsys) -> None:
    """The one that comes with Topkapi answers messages and has nothing to add to a text that is none."""
    question = [
        "generate",
        "What is the capital of France?",
        "-c",
        str(Path(__file__).parents[3] / "checkpoints" / "topkapi-chat"),
    ]
    assert main([*question, "--temperature", "0"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "\n" and "ended at once\nhint: " in printed.err and "--chat" in printed.err
    assert main([*question, "--temperature", "0", "--chat"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_generate_reads_standard_input(chat: str, capsys, monkeypatch) -> None:
    type_in(monkeypatch, b"A list is")
    assert main(["generate", "-c", chat, "--max-tokens", "5", "--temperature", "0"]) == 0
    piped = capsys.readouterr().out
    assert main(["generate", "A list is", "-c", chat, "--max-tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == piped


def test_generate_with_chat_sends_a_message(chat: str, base: str, capsys) -> None:
    assert main(["generate", "hi", "--chat", "--system", "Be brief.", "-c", chat, "--max-tokens", "3"]) == 0
    assert "chat template" in fails(capsys, "generate", "hi", "--chat", "-c", base)
    assert "--chat" in fails(capsys, "generate", "hi", "--system", "x", "-c", chat)


def test_score_agrees_with_the_network(base: str, capsys, monkeypatch) -> None:
    text = "A list is a mutable sequence."
    type_in(monkeypatch, text.encode())
    assert main(["score", "-c", base, "--json", "--per-token"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    checkpoint = load_checkpoint(base)
    assert result["nll"] == pytest.approx(score(checkpoint.model, checkpoint.tokenizer.encode(text)).nll)
    Path("one.txt").write_text(text)
    Path("two.txt").write_text("Another.")
    assert main(["score", "one.txt", "two.txt", "-c", base, "--per-token"]) == 0
    printed = capsys.readouterr().out
    assert f"one.txt: perplexity {result['perplexity']:.4g}" in printed and "two.txt: perplexity" in printed
    assert printed.count("\n") == result["tokens"] + len(checkpoint.tokenizer.encode("Another.")) + 2


def test_a_text_is_the_same_with_and_without_the_line_end_that_echo_puts_after_it(
    base: str, capsys, monkeypatch
) -> None:
    def scored(raw: bytes, *more: str) -> str:
        type_in(monkeypatch, raw)
        assert main(["score", "-c", base, *more]) == 0
        return capsys.readouterr().out.replace(", without the line end after it", "")

    text = b"A list is a mutable sequence."
    assert scored(text + b"\n") == scored(text + b"\r\n") == scored(text)
    assert scored(text + b"\n\n") != scored(text)
    Path("one.txt").write_bytes(text + b"\n")
    assert scored(b"", "one.txt").removeprefix("one.txt") == scored(text).removeprefix("standard input")
    type_in(monkeypatch, text + b"\n")
    assert main(["score", "-c", base]) == 0
    assert "bytes, without the line end after it)" in capsys.readouterr().out
    type_in(monkeypatch, b"\n")
    assert "standard input is empty" in fails(capsys, "score", "-c", base)

    def continued(raw: bytes) -> str:
        type_in(monkeypatch, raw)
        assert main(["generate", "-c", base, "--max-tokens", "5", "--temperature", "0"]) == 0
        return str(capsys.readouterr().out)

    assert continued(text + b"\n") == continued(text) != continued(text + b"\n\n")


def test_alternatives_are_shown_in_json_alone(base: str, capsys) -> None:
    Path("one.txt").write_text("A list is")
    assert "add --json" in fails(capsys, "score", "one.txt", "-c", base, "--top", "3")


def test_texts_that_cannot_be_scored(base: str, capsys, monkeypatch) -> None:
    type_in(monkeypatch, b"caf\xe9")
    assert "standard input is not UTF-8 text: byte 0xe9 at offset 3" in fails(capsys, "score", "-c", base)
    type_in(monkeypatch, b"")
    assert "empty" in fails(capsys, "score", "-c", base)
    assert "missing.txt cannot be read" in fails(capsys, "score", "missing.txt", "-c", base)
    assert "cannot be read" in fails(capsys, "score", ".", "-c", base)


def test_wrong_values_are_named(chat: str, capsys) -> None:
    assert "temperature must be at least 0" in fails(capsys, "generate", "a", "-c", chat, "--temperature", "-1")
    assert "context holds 128" in fails(capsys, "generate", "word " * 200, "-c", chat)
    assert "prompt is empty" in fails(capsys, "generate", "", "-c", chat)
    assert "one answer" in fails(capsys, "chat", chat, "--n", "2")
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "a", "--logit-bias", "5"])
    assert "ID=NUMBER" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_loaded_is_named(chat: str, capsys, tmp_path: Path) -> None:
    import shutil

    assert "no checkpoint at nowhere" in fails(capsys, "generate", "a", "-c", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in fails(capsys, "serve", "empty", "--port", "0")
    shutil.copytree(chat, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = fails(capsys, "serve", "cut", "--port", "0")
    assert "cut/model.safetensors" in message and "hint: " in message


def test_a_port_in_use_is_found_before_anything_is_loaded(capsys) -> None:
    from topkapi.service.commands.launch import bind

    with bind("127.0.0.1", 0) as taken:
        message = fails(capsys, "serve", "nowhere", "--port", str(taken.getsockname()[1]))
    assert "is in use" in message and "--port" in message


def test_settings_name_the_flag_or_the_variable(capsys, monkeypatch) -> None:
    assert "--port" in fails(capsys, "serve", "--port", "70000")
    assert "no-such-host" in fails(capsys, "serve", "--host", "no-such-host.invalid", "--port", "0")
    monkeypatch.setenv("TOPKAPI_PORT", "eighty")
    assert "TOPKAPI_PORT" in fails(capsys, "serve")
    monkeypatch.setenv("TOPKAPI_PORT", "81")
    monkeypatch.setenv("TOPKAPI_CORS_ORIGINS", "http://a.example, http://b.example")
    assert Settings.read().port == 81 and Settings.read(port=82).port == 82
    assert Settings.read().cors_origins == ("http://a.example", "http://b.example")


def test_default_checkpoints_are_found(chat: str, base: str, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOPKAPI_CHECKPOINTS", str(tmp_path / "here"))
    assert "TOPKAPI_CHECKPOINTS" in fails(capsys, "serve", "--port", "0")
    (tmp_path / "here").mkdir()
    for name, target in (("a-base", base), ("my-chat", chat), ("same-chat", chat)):
        (tmp_path / "here" / name).symlink_to(target)
    found = [Path(path).name for path in default_checkpoints(Settings.read())]
    assert found == ["my-chat", "a-base"], "chat first, and a checkpoint with two names once"
    monkeypatch.setenv("TOPKAPI_CHECKPOINTS", chat)
    assert default_checkpoints(Settings.read()) == [chat]


def test_checkpoints_have_telling_names() -> None:
    assert name_of(Path("models/SmolLM2.Q4_1.gguf")) == "SmolLM2.Q4_1"
    assert name_of(Path("runs/verdict/best")) == "verdict-best"
    assert name_of(Path("runs/verdict/checkpoints/step-90")) == "verdict-step-90"
    assert name_of(Path("checkpoints/tiny/")) == "tiny"
    assert split_location("tuned=runs/x/best") == ("tuned", Path("runs/x/best"))
    assert split_location("dir/a=b") == (None, Path("dir/a=b"))


def test_chat_keeps_the_conversation_until_reset(chat: str, capsys, monkeypatch) -> None:
    from topkapi.service.commands import terminal

    asked: list[list[str]] = []
    encode = terminal.conversation_tokens

    def spy(model, messages):
        asked.append([f"{message['role']}: {message['content']}" for message in messages])
        return encode(model, messages)

    monkeypatch.setattr(terminal, "conversation_tokens", spy)
    type_in(monkeypatch, b"one\ntwo\n\n/reset\nthree\n")
    assert main(["chat", chat, "--system", "Be brief.", "--max-tokens", "4", "--seed", "1"]) == 0
    _, first, *_ = capsys.readouterr().out.split("\n> ")
    answer = first.removesuffix(" (cut off at the token limit)\n")
    assert asked == [
        ["system: Be brief.", "user: one"],
        ["system: Be brief.", "user: one", f"assistant: {answer}", "user: two"],
        ["system: Be brief.", "user: three"],
    ]


def test_a_conversation_beyond_the_context_loses_its_oldest_turns(chat: str, capsys, monkeypatch) -> None:
    type_in(monkeypatch, b"Tell me about lists and tuples, please.\n" * 6 + b"word " * 200 + b"\nAnd now?\n")
    assert main(["chat", chat, "--max-tokens", "10", "--seed", "1"]) == 0
    printed = capsys.readouterr()
    assert "the oldest 2 messages are no longer read" in printed.out
    assert printed.err.count("error: ") == 1 and "context holds 128" in printed.err


def test_ctrl_c_stops_an_answer_and_not_the_conversation(base: str) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "chat", base, "--ignore-end-token", "--temperature", "0"],
        stdin=follower, stdout=follower, stderr=follower, close_fds=True, start_new_session=True,
    )  # fmt: skip
    os.close(follower)

    unread = b""

    def read_more() -> None:
        nonlocal unread
        readable, _, _ = select.select([leader], [], [], 60)
        assert readable, unread[-500:]
        unread += os.read(leader, 65536)

    def read_until(wanted: bytes) -> None:
        """Read up to and including `wanted`; what came with it is kept for the next call."""
        nonlocal unread
        while wanted not in unread:
            read_more()
        unread = unread.split(wanted, 1)[1]

    read_until(b"> ")
    os.write(leader, b"begin\n")
    read_until(b"begin")
    while len(unread) < 20:
        read_more()
    process.send_signal(signal.SIGINT)
    read_until(b"(stopped)")
    read_until(b"> ")
    os.write(leader, b"\x04")
    assert process.wait(60) == 0
    os.close(leader)


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(base: str) -> None:
    reader = subprocess.Popen(
        [*COMMAND, "generate", "a", "-c", base, "--ignore-end-token", "--max-tokens", "400"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert reader.stdout is not None and reader.stderr is not None
    reader.stdout.read(1)
    reader.stdout.close()
    errors = reader.stderr.read().decode()
    assert reader.wait(60) == 141 and errors == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--trace"], "trace is not part of plain text"),
        (["generate", "a", "--threads", "100000"], "--threads"),
        (["serve", "--port", "0", "--cors-origins", "example"], "--cors-origins: an origin is a scheme and a host"),
    ],
)
def test_what_could_only_be_ignored_or_go_wrong_is_refused(
    arguments: list[str], message: str, tiny_checkpoint, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = str(tiny_checkpoint("refusing"))
    where = ["-c", checkpoint] if arguments[0] == "generate" else [checkpoint]
    assert main([*arguments, *where]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_the_chat_has_the_flag_of_the_other_commands_and_a_help(chat: str, capsys, monkeypatch) -> None:
    for given in (["-c", chat], [chat]):
        type_in(monkeypatch, b"/help\n/nonsense of a text\n  \n/reset")
        assert main(["chat", *given]) == 0
        printed = capsys.readouterr().out
        assert "begin a new conversation" in printed and "no command /nonsense" in printed
        assert printed.rstrip("\n> ").endswith("(a new conversation)"), "neither went to the model"


def test_a_usage_of_dozens_of_flags_is_its_outline(capsys) -> None:
    for command, usage, explained in (
        (["chat"], "usage: topkapi chat [options] [checkpoint]\n\n", ("-h, --help", "--temperature X", "--top-k N")),
        (["bench"], "usage: topkapi bench [options] [checkpoint]\n\n", ("-h, --help", "--streams N")),
        (["instructions", "make"], "usage: topkapi instructions make [-h] --out FILE ", ("--out FILE",)),
    ):
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--help"])
        printed = capsys.readouterr().out
        assert printed.startswith(usage)
        assert all(f"\n  {flag}" in printed for flag in explained), "each is explained below"


def test_what_the_command_line_does_not_know_is_told_in_two_lines(capsys) -> None:
    for arguments in (["generate", "a", "--temperature", "warm"], ["generate", "a", "--tpo-k", "5"], ["nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        error, hint = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and "--help" in hint and hint.startswith("hint: topkapi")


@pytest.mark.parametrize(
    ("arguments", "message", "command"),
    [
        (["generate", "a", "--tpo-k", "5"], "there is no flag --tpo-k; did you mean --top-k?", "topkapi generate"),
        (["pretrain", "--learnin_rate=3"], "no flag --learnin_rate; did you mean --learning-rate?", "topkapi pretrain"),
        (["export", "gguf", "a", "b.gguf", "--tipe", "f16"], "did you mean --type?", "topkapi export gguf"),
        (["runs", "a", "b"], "'b' is more than can be given here", "topkapi runs"),
        (["pretrian", "--data", "a"], "there is no command 'pretrian'; did you mean pretrain?", "topkapi"),
        (["export", "guff"], "there is no command 'guff'; did you mean gguf?", "topkapi export"),
        (["score", "a", "--dtype", "float23"], "there is no choice 'float23'; did you mean float32?", "topkapi score"),
        (["nonsense"], "there is no command 'nonsense': choose from serve, generate", "topkapi"),
    ],
)
def test_what_was_mistyped_is_named_with_what_was_meant(
    arguments: list[str], message: str, command: str, capsys
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error, hint = capsys.readouterr().err.splitlines()
    assert message in error and hint == f"hint: {command} --help explains what can be given"


def test_fields_are_called_as_their_flags_are_typed(chat: str, capsys) -> None:
    parser = build_parser().parse_args(["pretrain"]).parser
    told = parser.told(
        SettingsError(
            "vocab_size 3 is less than num_heads; see my_vocab_size, 'vocab_size' and runs/vocab_size.txt",
            field="vocab_size",
            hint="raise vocab_size.",
        )
    )
    assert told.splitlines() == [
        "error: --vocab-size 3 is less than --num-heads; see my_vocab_size, 'vocab_size' and runs/vocab_size.txt",
        "hint: raise --vocab-size.",
    ]
    # What is no flag of the command is the name of something else.
    assert parser.told(SettingsError("top_k and vocab_size", field="top_k")) == "error: top_k and vocab_size"
    assert "--max-tokens" in fails(capsys, "generate", "a", "-c", chat, "--max-tokens", "-3")


def test_a_training_run_is_no_checkpoint_but_holds_some(chat: str, capsys, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("model: tiny")
    for arguments in (["generate", "a", "-c", "runs/mine"], ["serve", "runs/mine", "--port", "0"]):
        assert "a training run that has kept no checkpoint yet" in fails(capsys, *arguments)
    (run / "checkpoints" / "step-4").symlink_to(chat)
    for name in ("best", "last"):
        (run / name).symlink_to("checkpoints/step-4")
    for arguments in (
        ["generate", "a", "-c", "runs/mine"],
        ["serve", "runs/mine", "--port", "0"],
        ["finetune", "--checkpoint", "runs/mine", "--data", "a.json"],
        ["evaluate", "runs/mine", "--perplexity", "runs/mine/config.yaml"],
    ):
        message = fails(capsys, *arguments)
        assert "runs/mine is a training run, not a checkpoint" in message
        assert "hint: give one that it kept: runs/mine/best or runs/mine/last" in message
    assert "runs/mine/checkpoints/step-4" in fails(capsys, "serve", "runs/mine/checkpoints", "--port", "0")
