"""`topkapi generate`, `score` and `chat`: what the server does, in a terminal and without a server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch

from topkapi.model.errors import DataError, InvalidRequest
from topkapi.service import scoring
from topkapi.service.api.native.generate import generate_response, new_id, timestamp
from topkapi.service.api.native.score import score_result
from topkapi.service.commands.inputs import Text, loading
from topkapi.service.generation import Generation, plan
from topkapi.service.locations import name_of_location
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import Message, conversation_tokens, fit_conversation, prompt_tokens
from topkapi.service.settings import Settings

HELP = """/reset   begin a new conversation
/help    show this
Ctrl-C   stop an answer
Ctrl-D   leave
How answers are chosen is set when the chat is started: topkapi chat --help"""

LONGEST_LINE = 1 << 24
"""Characters of a message that comes through a pipe; no context is as long."""

USUAL_ANSWER = 256
"""Tokens of context kept free for an answer when a conversation grows too long."""


def generate(
    arguments: argparse.Namespace, settings: Settings, location: str, text: str, parameters: dict[str, Any]
) -> int:
    """Continue a prompt, streaming to standard output; Ctrl-C stops it and keeps what there is."""
    with loaded(settings, location) as model:
        if arguments.chat:
            prompts = [conversation_tokens(model, [*_system(arguments), {"role": "user", "content": text}])]
        else:
            prompts = prompt_tokens(model, text)
        generation = Generation(plan(model, prompts, parameters, chat=arguments.chat))
        stream = not arguments.json and generation.parameters.n == 1
        interrupted = asyncio.run(_run(generation, stream))
        if arguments.json:
            _print_json(generate_response(generation, new_id("gen"), timestamp()))
        elif stream:
            print()
            if not generation.outputs[0].text and not interrupted:
                ended = generation.parameters.max_tokens != 0
                because = "the model ended at once" if ended else "--max-tokens is 0"
                print(f"nothing was generated: {because}", file=sys.stderr)
                if ended and model.checkpoint.chat is not None and not arguments.chat:
                    print("hint: it answers messages: --chat sends the prompt as one", file=sys.stderr)
        else:
            for output in generation.outputs:
                print(f"--- {output.index + 1} of {len(generation.outputs)}\n{output.text}")
    return 130 if interrupted else 0


def score(arguments: argparse.Namespace, settings: Settings, location: str, given: list[tuple[str, Text]]) -> int:
    """Perplexity of each of the `given` files, and of its tokens if asked for."""
    with loaded(settings, location) as model:
        items = [
            scoring.Item(token_ids) for token_ids in prompt_tokens(model, [text.content for _, text in given], "text")
        ]
        scoring.check_items(model, items, arguments.window, arguments.stride)
        found = asyncio.run(
            scoring.score_items(model, items, arguments.window, arguments.stride, arguments.top, _progress())
        )
        summaries = [scoring.summarise(model, *pair) for pair in zip(items, found, strict=True)]
        if arguments.json:
            results = [
                _complete(score_result(model, item, scores, summary, arguments.per_token, arguments.top))
                for item, scores, summary in zip(items, found, summaries, strict=True)
            ]
            _print_json({"id": new_id("score"), "model": model.name, "results": results})
            return 0
        for (name, text), item, scores, summary in zip(given, items, found, summaries, strict=True):
            if arguments.per_token:
                for position, token_id in enumerate(item.token_ids):
                    logprob = f"{scores.logprobs[position - 1]:9.4f}" if position else " " * 9
                    print(f"{logprob}  {model.token_text(token_id)!r}")
            perplexity = "none" if summary.perplexity is None else f"{summary.perplexity:.4g}"
            bits = "none" if summary.bits_per_byte is None else f"{summary.bits_per_byte:.4f}"
            source = "standard input" if name == "-" else name
            less = ", without the line end after it" if text.ended else ""
            over = f"{summary.scored_tokens:,} tokens ({summary.bytes:,} bytes{less})"
            print(f"{source}: perplexity {perplexity}, {bits} bits per byte, nll {summary.nll:.3f} over {over}")
    return 0


def _complete(result: dict[str, Any]) -> dict[str, Any]:
    """A result with the tokens that were to be written one by one."""
    return result | {"per_token": list(result["per_token"])} if "per_token" in result else result


def chat(arguments: argparse.Namespace, settings: Settings, location: str, parameters: dict[str, Any]) -> int:
    """A conversation that lasts until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing and history)

    with loaded(settings, location) as model:
        talks = model.checkpoint.chat is not None
        if not talks and arguments.system is not None:
            raise InvalidRequest(f"{model.name} is a base checkpoint and takes no system message", field="system")
        about = "/help lists the commands, /reset begins anew, Ctrl-C stops an answer, Ctrl-D leaves"
        print(f"{model.name}: {about}" if talks else f"{model.name} continues your text (a base checkpoint): {about}")
        plan(model, [[0]], parameters, chat=talks)
        messages: list[Message] = list(_system(arguments))
        while True:
            try:
                text = ask()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print()
                continue
            if text.strip() == "/reset":
                messages = list(_system(arguments))
                print("(a new conversation)")
            elif text.strip() == "/help":
                print(HELP)
            elif (word := text.split()[:1]) and re.fullmatch(r"/\w+", word[0]):
                print(f"there is no command {word[0]}; /help lists those there are")
            elif text.strip():
                _answer(model, messages, text, parameters)


def ask() -> str:
    """The next line that is typed, or that comes through a pipe. Raises `EOFError` after the last."""
    if sys.stdin.isatty():
        return input("\n> ")
    print("\n> ", end="", flush=True)
    line = sys.stdin.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise DataError(
            f"a line of standard input has more than {LONGEST_LINE:,} characters", hint="a message is one line"
        )
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _answer(model: LoadedModel, messages: list[Message], text: str, parameters: dict[str, Any]) -> None:
    try:
        if model.checkpoint.chat is None:
            prepared = plan(model, prompt_tokens(model, text), parameters)
        else:
            messages.append({"role": "user", "content": text})
            kept, forgotten = fit_conversation(model, messages, parameters.get("max_tokens") or USUAL_ANSWER)
            if forgotten:
                print(f"(the context is full: the oldest {forgotten} messages are no longer read)")
            prepared = plan(model, [conversation_tokens(model, kept)], parameters, chat=True)
        generation = Generation(prepared)
    except InvalidRequest as error:
        if messages and messages[-1]["role"] == "user":
            messages.pop()
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return
    stopped = asyncio.run(_run(generation, stream=True))
    output = generation.outputs[0]
    print(" (stopped)" if stopped else " (cut off at the token limit)" if output.finish_reason == "length" else "")
    if model.checkpoint.chat is not None:
        messages.append({"role": "assistant", "content": output.text})


@contextlib.contextmanager
def loaded(settings: Settings, location: str) -> Iterator[LoadedModel]:
    """The checkpoint at `location`, its engine running while the block does."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    models = Models(settings.model_copy(update={"max_queue_seconds": 0.0}))
    try:
        with loading(name_of_location(location)):
            model = models.load(location)
        for warning in model.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        yield model
    finally:
        models.close()


async def _run(generation: Generation, stream: bool) -> bool:
    """Run to the end, or to Ctrl-C; returns whether it was interrupted."""
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        generation.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
    async with generation:
        async for delta in _deltas(generation):
            if stream:
                print(delta, end="", flush=True)
    return interrupted


async def _deltas(generation: Generation) -> AsyncIterator[str]:
    async for delta in generation.steps():
        if delta.text:
            yield delta.text


def _progress() -> scoring.ScoringProgress | None:
    """Progress on standard error where somebody is looking."""
    if not sys.stderr.isatty():
        return None

    def show(scored: int, total: int) -> None:
        print(f"\r{scored:,} of {total:,} tokens", end="\n" if scored == total else "", file=sys.stderr, flush=True)

    return show


def _system(arguments: argparse.Namespace) -> list[Message]:
    return [{"role": "system", "content": arguments.system}] if arguments.system is not None else []


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False))
