"""Manners: the 300 first messages are never trained on, their rubric judges answers, honesty has its rows."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Container
from pathlib import Path
from random import Random

import pytest

from benchmarks import first_messages
from benchmarks.first_messages import FirstMessage, read_messages
from topkapi.service.commands.cli import main
from topkapi.training.data.exercises.followups import JOKES
from topkapi.training.data.exercises.manners import NO_IDEA, WORLD, honest_answer
from topkapi.training.data.exercises.rows import GROUPS, make_rows
from topkapi.training.data.exercises.typed import drawn_out, spelling
from topkapi.training.data.exercises.words import tables


@pytest.fixture(scope="module")
def messages() -> list[FirstMessage]:
    return read_messages()


def of(messages: list[FirstMessage], said: str) -> FirstMessage:
    return next(message for message in messages if message.say == said)


def test_three_hundred_messages_of_all_categories(messages: list[FirstMessage]) -> None:
    assert len(messages) == len({message.say for message in messages}) == 300
    counts = Counter(message.category for message in messages)
    assert len(counts) == 23 and min(counts.values()) >= 8


def test_the_messages_to_choose_by_are_others(messages: list[FirstMessage]) -> None:
    others = read_messages(first_messages.DEVELOPMENT)
    assert len(others) == 170 and {each.category for each in others} == {each.category for each in messages}
    assert not {spelling(each.say) for each in others} & {spelling(each.say) for each in messages}
    assert of(others, "40 minus 13").judge("40 - 13 = 30 - 3 = 27.", True) == "right"
    assert of(others, "40 minus 13").judge("40 - 13 = 33.", True) == "false claim", "the rubric is that of the 300"


def test_more_openings_were_written_by_others(messages: list[FirstMessage]) -> None:
    before = messages + read_messages(first_messages.DEVELOPMENT)
    for path in (first_messages.FRESH, first_messages.UNREAD):
        more = read_messages(path)
        assert Counter(each.category for each in more) == {"greeting": 60, "identity": 40, "thanks and goodbyes": 50}
        assert len({spelling(each.say) for each in more} - {spelling(each.say) for each in before}) == 150
        before += more


def test_first_messages_are_never_trained_on(messages: list[FirstMessage]) -> None:
    """But for those that the first part of the chat checkpoint had learned of already."""
    held_out = {spelling(message.say): message.say for message in messages}
    held_out |= {spelling(each.say): each.say for each in read_messages(first_messages.DEVELOPMENT)}

    def said(group: str, seed: int, without: Container[str], count: int = 4000) -> set[str]:
        rows = make_rows(seed, count, held_out=False, kinds=GROUPS[group], without=without)
        told = {spelling(turn["content"]) for row in rows for turn in row["messages"] if turn["role"] == "user"}
        return {held_out[each] for each in told & held_out.keys()}

    trained_on = {"manners": 3, "basics": 4, "drill": 6, "polish": 33, "openings": 40}
    assert not any(said(group, seed, held_out) for group, seed in trained_on.items())
    held_out |= {spelling(each.say): each.say for each in read_messages(first_messages.FRESH)}
    trained_on = {"openings": 50, "manners": 51, "drill": 52, "polish": 53, "basics": 54}
    assert not any(said(group, seed, held_out, 3000) for group, seed in trained_on.items())
    held_out |= {spelling(each.say): each.say for each in read_messages(first_messages.UNREAD)}
    trained_on = {"review": 60, "openings": 61, "manners": 62, "drill": 63, "polish": 64, "basics": 65}
    assert not any(said(group, seed, held_out, 3000) for group, seed in trained_on.items())
    assert not said("said", 70, held_out, 3000)
    assert not said("beyond", 80, held_out, 3000)
    learned = said("basics", 3, ()) & {message.say for message in messages}
    assert learned <= {
        "HELLO THERE", "hi there :)", "how many days are there in a week?", "3*9=", "10-7",
        "what month comes before march", "plural of child?", "write a sentence with the word river", "spell cat",
        "Tell me a story about a dragon",
    }  # fmt: skip


def test_what_everybody_says_is_trained_on() -> None:
    rows = make_rows(3, 20_000, held_out=False, kinds=["first words", "who it is", "jokes", "last words"])
    said = Counter(row["messages"][0]["content"].casefold() for row in rows)
    for common in ("hi", "hello", "hey", "thanks", "bye", "who are you", "tell me a joke", "how are you"):
        assert said[common] > 5, common


def test_scorn_and_praise_come_in_the_same_sentences() -> None:
    """Only what is said of it tells them apart, and each has its own answer."""
    said: dict[bool, set[str]] = {True: set(), False: set()}
    for row in make_rows(6, 3000, held_out=False, kinds=["scorn and praise"]):
        asked, answer = row["messages"][-2:]
        said["sorry" in answer["content"]].add(spelling(asked["content"]))
    assert not said[True] & said[False]
    for each in said.values():
        for sentence in ("thisis", "youare", "youranswers", "whata", "ithinkthat"):
            assert sum(sentence in asked for asked in each) >= 3, sentence
    table = tables("drill.yaml")["slots"]
    assert not set(table["scorn"]) & set(table["praised"])


def test_a_difference_of_the_drill_borrows_and_is_written_down() -> None:
    rows = list(make_rows(6, 1000, held_out=False, kinds=["differences"], steps=True))
    written = [row["messages"][-1]["content"] for row in rows]
    assert 400 < sum(answer.count(" = ") == 2 for answer in written) < 700
    for row in make_rows(6, 300, held_out=True, kinds=["problems of one step"]):
        first, sign, second = row["messages"][-1]["content"].split(" ")[:3]
        asked = row["messages"][-2]["content"]
        assert first in asked and second in asked and sign in "+-", "both numbers are told"


def test_problems_of_several_steps_are_declined() -> None:
    for row in make_rows(6, 300, held_out=False, kinds=["problems of several steps"]):
        assert re.search(NO_IDEA, row["messages"][-1]["content"]), row


def test_a_single_word_decides() -> None:
    """Thanks, greetings and goodbyes of one word, drawn out or not, beside words that are none of these."""
    answers: dict[str, set[str]] = {"welcome": set(), "Hello": set(), "Goodbye": set(), "spell it": set()}
    for row in make_rows(40, 1500, held_out=False, kinds=["one word or another"]):
        asked, answer = row["messages"][-2:]
        for told, words in answers.items():
            if told in answer["content"]:
                words.add(spelling(asked["content"]))
    assert all(len(words) > 30 for words in answers.values())
    assert not answers["spell it"] & (answers["welcome"] | answers["Hello"] | answers["Goodbye"])
    assert {"thanks", "thx"} <= answers["welcome"] and "hi" in answers["Hello"] and "bye" in answers["Goodbye"]
    random = Random(1)
    for word in ("hi", "thanks", "bye", "hmm"):
        longer = {drawn_out(word, random) for _ in range(50)}
        assert len(longer) > 3 and all(re.sub(r"(.)\1+", r"\1", each) == word.replace("mm", "m") for each in longer)
    assert drawn_out("123", random) == "123", "there is nothing to draw out"


def test_what_is_no_greeting_in_english_is_not_greeted() -> None:
    """Keys struck at random and greetings of other languages have answers of their own."""
    kinds = ["struck at random", "greetings of other languages", "first and last words, afterwards"]
    answers: dict[str, set[str]] = {kind: set() for kind in kinds}
    for row in make_rows(60, 600, held_out=False, kinds=kinds):
        answers[row["kind"]].add(row["messages"][-1]["content"])
    assert all("understand" in answer for answer in answers[kinds[0]])
    assert all("only know English" in answer for answer in answers[kinds[1]])
    openings = "".join(answers[kinds[2]])
    assert all(
        part in openings for part in ("Hello!", "Good morning", "welcome", "Goodbye", "I am Topkapi", "No, I am")
    )


def test_in_one_conversation_each_question_has_its_own_answer() -> None:
    """Whatever was answered before it; and each of the sentences that others wrote is asked."""
    answers: dict[str, set[str]] = {}
    for row in make_rows(70, 2000, held_out=False, kinds=["one after another"]):
        *before, asked, answer = row["messages"]
        assert sum(turn["role"] == "user" for turn in before) in (1, 2, 3)
        answers.setdefault(spelling(asked["content"]), set()).add(answer["content"])
    for question in ("whatcanyoudo", "whatdoyoudo"):
        assert all(re.search("I can|sk me", answer) for answer in answers[question])
    assert all("Topkapi" in answer for answer in answers["whoareyou"])
    written = {sentence for said in tables("said.yaml").values() for sentence in said.split("|")}
    asked = Counter(
        row["messages"][-2]["content"].casefold().rstrip(".?! ")
        for row in make_rows(71, 6000, held_out=False, kinds=["as people said it"])
    )
    assert sum(sentence in asked for sentence in written) > 0.6 * len(written) > 700


def test_the_rubric_tells_answers_from_nonsense(messages: list[FirstMessage]) -> None:
    for said, answer, judged in (
        ("hiya", "Hello! How can I help you?", "right"),
        ("hiya", "Thehi world is a country that people keep for its eggs.", "wrong"),
        ("hi hi hi", "hi hi hi", "wrong"),
        ("what r u", "I am a person who makes clothes.", "false claim"),
        ("what r u", "I am Topkapi, a small language model.", "right"),
        ("is this chatgpt", "Yes, I am Topkapi.", "false claim"),
        ("capital of canada", "The capital of Canada is Ottawa.", "right"),
        ("capital of canada", "The capital of Canada is Paris.", "false claim"),
        ("capital of canada", "I do not know that. Ask me for the capital of France.", "declined"),
        ("capital of canada", "I do not know that: Toronto is a city of 3 streets.", "false claim"),
        ("who invented the telephone", "I do not know that: I am too small.", "declined"),
        ("hiya", "I do not know that: I am too small.", "wrong"),
        ("7 plus 8?", "7 + 8 = 15.", "right"),
        ("7 plus 8?", "7 + 8 = 14.", "false claim"),
        ("got any jokes?", "What do you call a bear with no teeth? A gummy bear.", "right"),
        ("write me a poem", "Roses are red,\nViolets are blue,", "right"),
        ("write me a poem", "A poem.", "wrong"),
        ("shut up", "I am sorry that I could not help.", "right"),
        ("Ciao, come ti chiami?", "I am sorry, I only know English.", "right"),
    ):
        assert of(messages, said).judge(answer, True) == judged, (said, answer)
    assert of(messages, "hiya").judge("Hello! How can I help you?", False) == "wrong", "it did not end"
    assert of(messages, "hiya").judge("Hello, how can I help you? " * 9, True) == "wrong", "it goes on and on"


def test_the_messages_can_be_listed_and_excepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_messages.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert len(listed.splitlines()) == 300
    out, excepted = tmp_path / "made.jsonl", tmp_path / "first.txt"
    rows = list(make_rows(3, 80, held_out=False, kinds=["first words"]))
    said = rows[0]["messages"][-2]["content"]
    excepted.write_text(f"{said.upper()}?!\n", "utf-8")
    command = ["instructions", "make", "--kinds", "first words", "--count", "80", "--seed", "3", "--out", str(out)]
    assert main([*command, "--except", str(excepted)]) == 0
    made = [json.loads(line)["messages"] for line in out.read_text("utf-8").splitlines()]
    assert len(made) == 80 and not any(spelling(told["content"]) == spelling(said) for row in made for told in row)
    out.unlink()
    assert main([*command, "--except", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
    excepted.write_bytes(b"\xff\xfe\xfa")
    assert main([*command, "--except", str(excepted)]) == 2
    assert "UTF-8" in capsys.readouterr().err and not out.exists()


def test_questions_are_answered_honestly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {
        "Who was the first king of Spain?": "know",
        "Write a python program that sorts.": "code|program",
        "How do I repair a bicycle?": "advice|advise|know",
        "Write an email to my boss.": "write",
        "Translate good night into French.": "English",
        "What is the capital of France?": "",
        "Classify the following: dog, cat": "",
    }
    rows = [{"instruction": text, "output": "Something wrong."} for text in asked]
    source, out = tmp_path / "asked.json", tmp_path / "out"
    source.write_text(json.dumps(rows), "utf-8")
    held_out = tmp_path / "first.txt"
    held_out.write_text("who was the first king of spain\n", "utf-8")
    assert main(["instructions", "prepare", str(source), "--honest", "--out", str(out)]) == 0
    assert "2 answerable or about a text" in capsys.readouterr().out
    made = [json.loads(line)["messages"] for line in (out / "asked.jsonl").read_text("utf-8").splitlines()]
    assert [row[0]["content"] for row in made] == [text for text, word in asked.items() if word]
    for question, answer in made:
        words = asked[question["content"]].split("|")
        assert any(word in answer["content"] for word in words), answer
        assert answer["content"] == honest_answer(question["content"]), "the same question has the same answer"
    command = ["instructions", "prepare", str(source), "--honest", "--except", str(held_out), "--out", str(out)]
    assert main(command) == 0
    assert "1 asked in what is excepted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("group", "seed", "count", "digest"),
    [
        ("basics", 1, 500, "f57cec005fa5a5e6a18faf426fd888d0a48ff3c6a7b8ae2dba2832f13ea62b99"),
        ("manners", 3, 400, "422e6a898b6141cfd4178bdac3234031cbc61cba39f214b9bb35c132c2c9abc1"),
        ("drill", 6, 400, "f4596c21911324df2d4c4530c47fc7b546616f617c9865ecee0d3a648ae35d9d"),
        ("polish", 33, 400, "9199e9de723d1406df1e6fb5d5900d2fbc02f840a1cdd6cc8f946982d1112ca1"),
        ("openings", 50, 400, "31b0ca60e9aacab360e894f1f219a3725ca0ddf8e67d68fcd3b6d22f019039dd"),
        ("said", 70, 400, "21ad383fe1eb6579e1b785dbdac8baaf6c556bfb23dc1de2b9f09040bc624cad"),
        ("beyond", 80, 400, "f0d7fa0e64d1d76808554bdd3e106b84077922b94cd963d96efabd9cdd2d67e8"),
    ],
)
def test_what_was_trained_on_can_be_made_again(group: str, seed: int, count: int, digest: str) -> None:
    """topkapi.json of a part has the digests of what the command makes: its kinds draw as they did."""
    rows = make_rows(seed, count, held_out=False, kinds=GROUPS[group])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_what_it_is_to_know() -> None:
    assert len(WORLD["capitals"]) == 60 and len(JOKES) == 3
    assert not set(WORLD["capitals"]) & set(WORLD["other_countries"])
