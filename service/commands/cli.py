"""The `topkapi` command: serving and the terminal here, training registered from its own room.

What a command needs is imported when it runs, so that `topkapi --help` answers at once; and nothing is imported with
this module that takes a moment, for Ctrl-C in it would end in the interpreter's trace.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from types import FrameType
    from typing import Any

DESCRIPTION = "Train small language models, serve them over HTTP, and talk to them."
EPILOG = """examples:
  topkapi serve                                   the default checkpoints at http://127.0.0.1:8000
  topkapi serve runs/mine/best                    a checkpoint of your own
  topkapi serve HuggingFaceTB/SmolLM2-135M        one of the Hugging Face hub
  topkapi chat                                    a conversation in the terminal
  topkapi generate "Once upon a time" --top-k 40  continue a text
  topkapi score book.txt                          perplexity of a file
  topkapi import ckpt.pt imported/mine            what another trainer wrote, as a checkpoint
  topkapi pretrain --data my.txt --out runs/my    a model from random weights
  topkapi finetune --checkpoint runs/my/best --data chat.jsonl --out runs/chat
                                                  the same, tuned to answer

`topkapi COMMAND --help` explains a command."""
COMMANDS = {
    "serve and ask": {
        "serve": "serve checkpoints over HTTP, with a studio in the browser",
        "chat": "talk to a checkpoint",
        "generate": "continue a prompt",
        "score": "perplexity and log-probabilities of texts",
        "bench": "measure how fast a checkpoint is served",
        "key": "make an API key, or the hash of one",
        "config": "print the settings that topkapi serve would have, and where each comes from",
    },
    "models": {
        "list": "what models are on this machine",
        "pull": "download a model from the Hugging Face hub, or its newest commit",
        "rm": "delete a downloaded model",
        "import": "make a checkpoint of what another trainer wrote",
        "export": "write a checkpoint as GGUF, for ollama, in another precision, averaged, or its card",
        "merge": "make a checkpoint of its own from an adapter and its base",
    },
    "train": {
        "tokenizer": "train a tokenizer",
        "instructions": "make, prepare, ask for and answer instruction data",
        "plan": "say what a run will take, and what is wrong with its data",
        "find-lr": "find the learning rate that a run can take",
        "pretrain": "train a model from random weights on plain text",
        "finetune": "train a checkpoint on instructions or conversations",
        "dpo": "train a checkpoint to prefer some answers to others",
        "kto": "train a checkpoint on answers labelled good or bad",
        "sweep": "search for better settings of a run",
    },
    "judge": {
        "runs": "list training runs, or compare some",
        "pick": "find the best of a run's checkpoints on held-out data",
        "evaluate": "measure checkpoints on texts, questions and instructions",
    },
}
"""What `topkapi --help` says of each command, as the command itself does: making their flags would take longer."""
COMPUTING = ("dtype", "kv_cache_dtype", "threads", "draft")
"""Settings of the commands that compute but do not serve."""
CHECKPOINT_HELP = (
    "checkpoint directory, .gguf file or owner/name on the Hugging Face hub (default: the first of checkpoints/)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. What the user can mend is told in a line or two, never a trace."""
    # Threads that wait for each other by spinning take the cores from the event loop, from whatever else runs on the
    # machine, and then from one another. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    before = signal.getsignal(signal.SIGINT)
    # Whoever ignores Ctrl-C, as a shell does for what runs in the background, goes on ignoring it.
    takes_over = before is signal.default_int_handler and _in_main_thread()
    if takes_over:
        signal.signal(signal.SIGINT, interrupted)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone (`topkapi generate … | head -1`): flushing at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        if takes_over:
            signal.signal(signal.SIGINT, before)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: a `KeyboardInterrupt`; but while something is imported, the end of the process at once.

    Extension modules lose such an exception, or leave a module behind that is half there and fails as something else.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _run(arguments: Sequence[str] | None) -> int:
    from topkapi.model.errors import TopkapiError

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser(arguments[0] if arguments else "--help")
    parsed = parser.parse_args(arguments)
    if "handler" not in parsed:
        parser.print_help()
        return 0
    try:
        code: int = parsed.handler(parsed)
    except TopkapiError as error:
        print(parsed.parser.told(error), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        # Wherever it was looked at, it is a name that was given.
        print(
            parsed.parser.told(TopkapiError(f"there is no file of so long a name: {error.filename}")), file=sys.stderr
        )
        return 2
    return code


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of every command; each sets `handler`, which takes the parsed namespace and returns an exit code.

    Where `command`, which is given, is one that serves or trains, the others' flags are left out, and all where help is
    asked for: they take a moment to make.
    """
    import argparse

    from topkapi.service.commands.parser import Parser
    from topkapi.service.version import VERSION

    parser = Parser(
        "topkapi", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"topkapi {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", help="one of those below")
    own = {"serve": _add_serve, "generate": _add_generate, "score": _add_score, "chat": _add_chat, "bench": _add_bench,
           "key": _add_key, "config": _add_config}  # fmt: skip
    if command in ("-h", "--help", "--version"):
        for summaries in COMMANDS.values():
            for name, summary in summaries.items():
                commands.add_parser(name, help=summary)
        _show_in_groups(parser, commands)
        return parser
    if command in own:
        own[command](commands)
        return parser
    from topkapi.training.cli import COMMANDS as TRAINING

    if command in TRAINING:
        TRAINING[command](commands)
        return parser
    from topkapi.service.commands.hub import add_hub
    from topkapi.service.commands.importing import add_import

    for add in (*own.values(), add_hub, add_import, *TRAINING.values()):
        add(commands)
    _show_in_groups(parser, commands)
    return parser


def _show_in_groups(parser: argparse.ArgumentParser, commands: Any) -> None:
    """Have the help list the commands by what they are for; argparse puts all of them below each other."""
    shown = {each.dest: each for each in commands._choices_actions}
    for title, summaries in COMMANDS.items():
        parser.add_argument_group(title)._group_actions += [shown.pop(name) for name in summaries]
    commands._choices_actions = [*shown.values()]


def _add_serve(commands: Any) -> None:
    from topkapi.service.commands.flags import add_setting_flags

    serve = commands.add_parser(
        "serve",
        help="serve checkpoints over HTTP, with a studio in the browser",
        description="Serve checkpoints over HTTP: the studio at /, the API's documentation at /docs. Every flag but "
        "the checkpoints can also be set as TOPKAPI_HOST, TOPKAPI_PORT, …, or in the file of --config. topkapi config "
        "shows what is in force.",
    )
    serve.add_argument(
        "checkpoint",
        nargs="*",
        help="directory, .gguf file or owner/name on the Hugging Face hub, or name=any of these (default: every one in "
        "checkpoints/)",
    )
    add_setting_flags(serve)
    serve.set_defaults(handler=_handler("serve"))


def _add_generate(commands: Any) -> None:
    from topkapi.service.commands.flags import add_parameter_flags, add_setting_flags

    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt, printing the text as it comes.",
    )
    generate.add_argument(
        "prompt", nargs="?", help="the text to continue (default: standard input, less a line end after it)"
    )
    generate.add_argument("-c", "--checkpoint", help=CHECKPOINT_HELP)
    generate.add_argument("--chat", action="store_true", help="send the prompt as a message and print the answer")
    generate.add_argument("--system", help="system message for --chat")
    generate.add_argument("--json", action="store_true", help="print the whole result as JSON, as POST /generate does")
    add_setting_flags(generate, COMPUTING)
    add_parameter_flags(generate)
    generate.set_defaults(handler=_handler("generate"))


def _add_score(commands: Any) -> None:
    from topkapi.service.commands.flags import add_setting_flags

    score = commands.add_parser(
        "score",
        help="perplexity and log-probabilities of texts",
        description="Perplexity of text files, or of standard input. Long texts are read in strided windows. A line "
        "end at the very end, as echo and editors put it there, is not scored.",
    )
    score.add_argument("file", nargs="*", help="UTF-8 text file; - or none is standard input")
    score.add_argument("-c", "--checkpoint", help=CHECKPOINT_HELP)
    score.add_argument("--window", type=int, metavar="N", help="tokens read at a time [the context length]")
    score.add_argument("--stride", type=int, metavar="N", help="tokens between windows [half a window]")
    score.add_argument("--per-token", action="store_true", help="print every token with its log-probability")
    score.add_argument("--top", type=int, default=0, metavar="K", help="with --json: alternatives per token [0]")
    score.add_argument("--json", action="store_true", help="print the whole result as JSON, as POST /score does")
    add_setting_flags(score, COMPUTING[:3])
    score.set_defaults(handler=_handler("score"))


def _add_chat(commands: Any) -> None:
    from topkapi.service.commands.flags import add_parameter_flags, add_setting_flags

    chat = commands.add_parser(
        "chat",
        help="talk to a checkpoint",
        description="A conversation in the terminal. /reset begins anew, Ctrl-C stops an answer, Ctrl-D leaves. A "
        "base checkpoint, which knows no conversation, continues each text instead.",
    )
    _add_checkpoint(chat, CHECKPOINT_HELP)
    chat.add_argument("--system", help="system message")
    add_setting_flags(chat, COMPUTING)
    add_parameter_flags(chat)
    chat.set_defaults(handler=_handler("chat"))


def _add_bench(commands: Any) -> None:
    from pathlib import Path

    from topkapi.service.commands.flags import add_setting_flags

    bench = commands.add_parser(
        "bench",
        help="measure how fast a checkpoint is served",
        description="Measure decoding, prefill and what a step costs outside the network, through the path that every "
        "request takes. Figures are medians of the repeats, with the least and the greatest. With several numbers of "
        "--streams or with --url: rates, and percentiles of the times to the first token and between tokens, by the "
        "number of streams.",
    )
    _add_checkpoint(bench, "directory, .gguf file or owner/name on the hub (default: GPT-2's shape, random weights)")
    bench.add_argument("--url", metavar="URL", help="measure this running server instead, the model that is named "
                       "or its first one")  # fmt: skip
    bench.add_argument("--streams", type=_numbers, metavar="N[,N…]",
                       help="requests at once; several numbers are measured one after the other [32]")  # fmt: skip
    bench.add_argument("--tokens", type=int, metavar="N", help="tokens that each generates [64]")
    bench.add_argument("--prompt-tokens", type=int, metavar="N", help="tokens of each prompt [64]")
    bench.add_argument("--repeats", type=int, metavar="N", help="how often everything is measured [5]")
    bench.add_argument("--json", action="store_true", help="print the figures as JSON")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves of --streams into this .png or .svg")
    add_setting_flags(bench, COMPUTING)
    bench.set_defaults(handler=_handler("bench"))


def _add_key(commands: Any) -> None:
    from topkapi.service.commands.operating import add_key

    add_key(commands)


def _add_config(commands: Any) -> None:
    from topkapi.service.commands.operating import add_config

    add_config(commands)


def _numbers(text: str) -> list[int]:
    import argparse

    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor several such as 1,8,32") from None


def _add_checkpoint(parser: argparse.ArgumentParser, meaning: str) -> None:
    """A checkpoint as the one argument, or by the flag that the other commands have."""
    import argparse

    parser.add_argument("checkpoint", nargs="?", default=argparse.SUPPRESS, help=meaning)
    parser.add_argument("-c", "--checkpoint", metavar="CHECKPOINT", help="the same as a flag")


def _handler(command: str) -> Callable[[argparse.Namespace], int]:
    """What `service.commands.launch` does for a command; imported when it is given."""

    def handle(arguments: argparse.Namespace) -> int:
        from topkapi.service.commands import launch

        code: int = getattr(launch, command)(arguments)
        return code

    return handle


if __name__ == "__main__":
    sys.exit(main())
