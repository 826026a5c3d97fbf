"""What a chat checkpoint answers to 300 first messages: `python -m benchmarks.first_messages checkpoints/topkapi-chat`.

`tests/data/first_messages.md` says how the messages were written and how answers are judged. Each is answered greedily
and, with `--seeds N`, at the checkpoint's own settings with the seeds 1 to N; printed are the shares by category, of
the seeds on average. `--development` asks instead the messages that are there to choose between checkpoints by, and
`--fresh` and `--unread` 150 more of three categories each. `--answers FILE` keeps every answer with its judgement, a
JSON line each. With several checkpoints `--answers` is a folder.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from topkapi.training.data.exercises.typed import spelling

FILE = Path(__file__).resolve().parent.parent / "tests/data/first_messages.yaml"
DEVELOPMENT = FILE.with_name("first_messages_development.yaml")
"""Others, by which to choose between checkpoints, so that those of `FILE` stay a measure."""
FRESH = FILE.with_name("first_messages_fresh.yaml")
"""More greetings, questions of who it is, thanks and goodbyes, by somebody who had seen no exercise."""
UNREAD = FILE.with_name("first_messages_unread.yaml")
"""As many again, by another, which whoever trains has not read: to be asked of a checkpoint that is chosen already."""
Judgement = Literal["right", "declined", "false claim", "wrong"]
_IGNORING_CASE = re.IGNORECASE | re.DOTALL
_NUMBER = re.compile(r"\d+")
_NAME = re.compile(r"(?<![.!?:] )(?<!^)\b[A-Z][\w']*")


@dataclass(frozen=True)
class FirstMessage:
    """A message with what judges its answer; `first` is asked before it, if anything. `decline` is None where that is
    no answer."""

    category: str
    say: str
    first: str | None
    right: re.Pattern[str]
    decline: re.Pattern[str] | None
    instead: re.Pattern[str]
    claims: bool
    most: int

    def judge(self, answer: str, stopped: bool) -> Judgement:
        """What an answer is; `stopped` tells whether it ended by itself."""
        if stopped and 1 <= len(answer.split()) <= self.most and spelling(answer) != spelling(self.say):
            if self.right.search(answer):
                return "right"
            if self.decline and self.decline.search(answer) and not self._invents(answer):
                return "declined"
        return "false claim" if self.claims else "wrong"

    def _invents(self, answer: str) -> bool:
        """Whether an answer has numbers or names that the message has not, before it goes on to what it can do."""
        declined = self.instead.split(answer)[0]
        said = {*_NAME.findall(declined), *_NUMBER.findall(declined)} - {"Topkapi", "English", "I"}
        return any(each.casefold() not in self.say.casefold() for each in said)


@dataclass(frozen=True)
class Answer:
    """An answer with its judgement, and of a follow-up what had been answered before."""

    category: str
    first: str | None
    before: str | None
    say: str
    answer: str
    stopped: bool
    judgement: Judgement


def read_messages(path: Path = FILE) -> list[FirstMessage]:
    """The messages of a file, in its order, with the rubric of `FILE`."""
    rubric = yaml.safe_load(FILE.read_text("utf-8"))
    categories = yaml.safe_load(path.read_text("utf-8"))["categories"]

    def pattern(name: str) -> re.Pattern[str]:
        return re.compile(rubric["named"].get(name, name), _IGNORING_CASE)

    messages = []
    for category, own in categories.items():
        rules = rubric["categories"][category]
        for row in own["messages"]:
            told: dict[str, Any] = {"say": row} if isinstance(row, str) else row
            messages.append(
                FirstMessage(
                    category,
                    told["say"],
                    told.get("first"),
                    pattern(str(told.get("right", rules["sensible"]))),
                    pattern(rubric["decline"]) if rules.get("declines") else None,
                    pattern(rubric["instead"]),
                    rules.get("claims", False),
                    told.get("most", rules.get("most", rubric["most"])),
                )
            )
    return messages


def ask(checkpoint: Any, messages: Sequence[FirstMessage], seed: int | None) -> list[Answer]:
    """Every message answered: greedily without a seed, else at the checkpoint's own settings."""
    firsts = [message for message in messages if message.first]
    said = dict(
        zip(
            [message.say for message in firsts],
            _answers(checkpoint, [[_user(message.first)] for message in firsts], seed),
            strict=True,
        )
    )
    turns = []
    for message in messages:
        before = said.get(message.say)
        earlier = [_user(message.first), {"role": "assistant", "content": before[0]}] if before else []
        turns.append([*earlier, _user(message.say)])
    found = []
    for message, (answer, stopped) in zip(messages, _answers(checkpoint, turns, seed), strict=True):
        before = said.get(message.say)
        judged = message.judge(answer, stopped)
        found.append(
            Answer(message.category, message.first, before and before[0], message.say, answer, stopped, judged)
        )
    return found


def _user(content: str | None) -> dict[str, str]:
    assert content is not None
    return {"role": "user", "content": content}


def _answers(
    checkpoint: Any, conversations: Sequence[list[dict[str, str]]], seed: int | None
) -> list[tuple[str, bool]]:
    from topkapi.engine.batch import run_batch
    from topkapi.engine.request import GenerateJob
    from topkapi.model.decoding.parameters import decoding_defaults, resolve

    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    jobs = []
    for messages in conversations:
        asked = {"max_tokens": 160} | ({"temperature": 0} if seed is None else {"seed": seed})
        defaults = {} if seed is None else decoding_defaults(checkpoint.generation, chat=True)
        parameters = resolve(asked, defaults, vocab_size=config.vocab_size, end_token_ids=config.end_token_ids)
        prompt = checkpoint.chat.encode(messages, tokenizer, add_generation_prompt=True).token_ids
        jobs.append(GenerateJob(prompt, parameters))
    answers = []
    for result in run_batch(checkpoint.model, jobs, together=32):
        stopped = result.finish_reason == "stop"
        ids = list(result.token_ids)[: -1 if stopped else None]
        answers.append((tokenizer.decode(ids).strip(), stopped))
    return answers


def table(runs: Sequence[Sequence[Answer]]) -> list[str]:
    """A line for each category and one for all: sensible or declined, right, and falsely claimed, in percent."""
    lines = [f"{'':22}{'messages':>9}{'sensible':>10}{'right':>8}{'declined':>10}{'false claims':>14}"]
    every = [answer for run in runs for answer in run]
    for category in [*dict.fromkeys(answer.category for answer in every), "all"]:
        part = [answer for answer in every if category in (answer.category, "all")]
        of = Counter(answer.judgement for answer in part)
        share = {name: 100 * count / len(part) for name, count in of.items()}
        right, declined = share.get("right", 0.0), share.get("declined", 0.0)
        lines.append(
            f"{category:22}{len(part) // len(runs):>9}{right + declined:>10.1f}{right:>8.1f}{declined:>10.1f}"
            f"{share.get('false claim', 0.0):>14.1f}"
        )
    stopped = sum(answer.stopped for answer in every)
    return [*lines, f"ended by themselves: {100 * stopped / len(every):.1f} %"]


def main(arguments: Iterable[str] | None = None) -> int:
    """Print the tables of the checkpoints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument(
        "--list", action="store_true", help="print the messages, for topkapi instructions make --except"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--development", action="store_true", help="the messages to choose between checkpoints by")
    which.add_argument("--fresh", action="store_true", help="150 more greetings, questions of who it is, and thanks")
    which.add_argument("--unread", action="store_true", help="150 more of these three")
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="also at its own settings, seeds 1 to N [0]")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="keep every answer, a JSON line each")
    asked = parser.parse_args(None if arguments is None else list(arguments))
    chosen = {DEVELOPMENT: asked.development, FRESH: asked.fresh, UNREAD: asked.unread, FILE: True}
    messages = read_messages(next(path for path, wanted in chosen.items() if wanted))
    if asked.list:
        print(*(message.say for message in messages), sep="\n")
    if not asked.checkpoints:
        return 0
    from topkapi.model.serving import prepare, reading
    from topkapi.model.storage.checkpoint import load_checkpoint

    for path in asked.checkpoints:
        checkpoint = load_checkpoint(path, **reading("auto"))
        prepare(checkpoint.model, "auto")
        greedy = ask(checkpoint, messages, None)
        print(f"{path}, greedily", *table([greedy]), sep="\n", flush=True)
        runs = [ask(checkpoint, messages, seed) for seed in range(1, asked.seeds + 1)]
        if runs:
            print(f"{path}, its own settings, {asked.seeds} seeds", *table(runs), sep="\n", flush=True)
        if asked.answers:
            several = len(asked.checkpoints) > 1
            out = asked.answers / f"{path.name}.jsonl" if several else asked.answers
            with out.open("w", encoding="utf-8") as file:
                for seed, run in enumerate([greedy, *runs]):
                    for answer in run:
                        file.write(json.dumps({"seed": seed or None, **asdict(answer)}, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
