"""Data in every form that people have: which rows, fields and files are used is what other trainers' loaders use."""

import bz2
import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.service.commands.cli import main
from topkapi.training.data.finding import EXAMPLES, TEXTS, find_data, find_files, held_out_files, named
from topkapi.training.data.instructions import encode_conversations, read_conversations
from topkapi.training.data.row_files import Names, read_rows
from topkapi.training.data.sources import read_documents

ASK, SO = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
TRL = json.loads((Path(__file__).parent / "trl_examples.json").read_text())


def messages(path: Path, names: list[str] | None = None) -> list[Any]:
    found = read_conversations(path, input_heading=False, names=Names(names or []))
    return [each.messages for each in found]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2().with_control_tokens(["<|im_start|>", "<|im_end|>"])


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("form", TRL["rows"])
def test_a_form_trains_the_tokens_that_trl_trains(form: str, ending: str, gpt2: Tokenizer, tmp_path: Path) -> None:
    """The values are TRL's own; `how` in their file says how they were had."""
    expected = TRL["rows"][form]
    row, ids, trained = expected["row"], expected["ids"], list(map(bool, expected["trained"]))
    write(tmp_path / f"rows.{ending}", [row])
    ((example,), _) = encode_conversations(
        read_conversations(tmp_path / f"rows.{ending}", input_heading=False), gpt2, ChatTemplate(TRL["template"]),
        longest=9999,
    )  # fmt: skip
    if form == "prompt and completion of messages":
        # TRL trains everything after the prompt, so also what the template puts behind the end of the last turn.
        assert gpt2.decode([ids[-1]]) == "\n" and trained.pop() and not example.trained[-1]
        trained.append(False)
    if form == "turns after the last answer":
        # These train nothing, so they are not computed.
        ids, trained = ids[: len(example.token_ids)], trained[: len(example.token_ids)]
        assert not any(expected["trained"][len(ids) :])
    assert example.token_ids == ids
    assert example.trained == trained


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue())


SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
ROWS: dict[str, dict[str, Any]] = {
    "ShareGPT": {"id": "1", "conversations": SHAREGPT},
    "ShareGPT, other names": {
        "conversations": [{"from": "user", "value": "Why?"}, {"from": "chatgpt", "value": "So."}]
    },
    "LMSYS": {"conversation_id": "1", "model": "x", "conversation": [ASK, SO], "turn": 1},
    "conversations with roles": {"conversations": [ASK, SO]},
    "Dolly": {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"},
    "prompt and response": {"prompt": "Why?", "response": "So."},
    "query and response": {"query": "Why?", "response": "So."},
    "OpenAI": {"messages": [ASK, SO | {"weight": 1}], "tools": [], "parallel_tool_calls": False},
}


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("form", ROWS)
def test_every_form_in_every_file_is_the_same_conversation(form: str, ending: str, tmp_path: Path) -> None:
    row = dict(ROWS[form])
    if ending in ("csv", "tsv"):
        row = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    if ending == "parquet":
        row.pop("tools", None)  # an empty list has no type there
    write(tmp_path / f"rows.{ending}", [row])
    assert messages(tmp_path / f"rows.{ending}") == [[ASK, SO]]


def test_what_sharegpt_says_of_tools_is_a_call_and_its_result(tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": {"city": "Izmir"}}
    said = [SHAREGPT[0], {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "Sun."},
            {"from": "gpt", "value": "So.", "weight": 0}, *SHAREGPT]  # fmt: skip
    write(tmp_path / "rows.json", [{"conversations": said, "tools": "[]"}])
    (found,) = read_conversations(tmp_path / "rows.json", input_heading=False)
    calls = [{"type": "function", "function": call}]
    assert found.messages[1:3] == [
        {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "Sun."}
    ]  # fmt: skip
    assert found.told and found.told.untrained == {3}
    for wrong, message in (({"from": "cat", "value": "Miaow."}, r"conversations\[1\].from is 'cat'"),
                           ({"from": "gpt"}, r"no text in the field 'content' of conversations\[1\]"),
                           ({"from": "function_call", "value": "weather()"}, r"value is not valid JSON")):  # fmt: skip
        write(tmp_path / "rows.json", [{"conversations": [SHAREGPT[0], wrong]}])
        with pytest.raises(DataError, match=message):
            messages(tmp_path / "rows.json")


def test_null_in_a_column_of_calls_was_never_said(tmp_path: Path) -> None:
    """Arrow gives the arguments of one call the names of all others; TRL takes these out as well."""
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"b": 2})
    ]
    rows = [{"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls]
    write(tmp_path / "rows.parquet", rows)
    assert [each[1]["tool_calls"] for each in messages(tmp_path / "rows.parquet")] == [[call] for call in calls]


@pytest.mark.parametrize("label", [True, False, 1, 0])
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_a_label_that_judges_the_answer_is_refused(label: object, ending: str, tmp_path: Path) -> None:
    write(tmp_path / f"rows.{ending}", [{"prompt": "Why?", "completion": "So.", "label": label}])
    with pytest.raises(DataError, match="'label' can't be used") as caught:
        messages(tmp_path / f"rows.{ending}")
    assert "topkapi kto trains on answers labelled good or bad" in (caught.value.hint or "")


def test_fields_are_read_under_other_names(tmp_path: Path) -> None:
    write(
        tmp_path / "rows.json",
        [{"Question": "Why?", "Reply": "So.", "completion": "No."}, {"prompt": "Why?", "Reply": "So."}],
    )
    with pytest.raises(DataError, match="row 1: Reply is to be read as completion, and there is a field completion"):
        messages(tmp_path / "rows.json", ["Question=prompt", "Reply=completion"])
    assert (
        messages(tmp_path / "rows.json", ["Question=prompt", "Reply=completion", "completion=other"]) == [[ASK, SO]] * 2
    )
    write(
        tmp_path / "rows.json",
        [{"talk": [{"speaker": "user", "text": "Why?"}, {"speaker": "assistant", "text": "So."}]}],
    )
    inner = ["talk=messages", "messages[].speaker=role", "messages[].text=content"]
    assert messages(tmp_path / "rows.json", inner) == [[ASK, SO]]
    names = Names(["Qestion=prompt"])
    names.applied({"Question": "Why?"}, "row 1")
    with pytest.raises(DataError, match="no row of the data has the field Qestion"):
        names.check("the data")


def test_a_table_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"Why,\nso?","He said ""so""."\n\nHow?,"a,b"\n')
    assert [place for place, _ in read_rows(path)] == [f"{path}, line 3", f"{path}, line 5"]
    assert messages(path)[0] == [{"role": "user", "content": "Why,\nso?"}, SO | {"content": 'He said "so".'}]
    for text, message in (("a,b\n1\n", "line 2: 1 cells where the first line names 2"),
                          ("a,b\n1,2,3\n", "line 2: 3 cells where"),
                          ("a,a\n1,2\n", "line 1: the names of columns must"),
                          (',b\n1,2\n', "line 1: the names of columns must"),
                          ('a,b\n1,"2\n', "line 2: no valid CSV")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            list(read_rows(path))
    path.write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(DataError, match="invalid UTF-8"):
        list(read_rows(path))


TEXT = "Üç küçük ördek 🦆\nbir göl.\n"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress,
    ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("ending", [".txt", ".md", ".csv", ".tsv", ".jsonl"])
def test_texts_are_read_whatever_they_are_wrapped_in(
    ending: str, compression: str, encoding: str, tmp_path: Path
) -> None:
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE}
    content = {".txt": TEXT, ".md": TEXT, ".jsonl": json.dumps({"text": TEXT}, ensure_ascii=False) + "\n" * 2}.get(
        ending
    )
    separator = "\t" if ending == ".tsv" else ","
    content = content or f'id{separator}text\n1{separator}"{TEXT}"\n'
    path = tmp_path / f"text{ending}{compression}"
    path.write_bytes(COMPRESS[compression](marks.get(encoding, b"") + content.encode(encoding)))
    assert list(read_documents(path)) == [TEXT]
    assert find_files([str(tmp_path)]) == [path]


def test_broken_utf16_and_half_an_archive_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF16_LE + "aı".encode("utf-16-le") + b"\x00")
    with pytest.raises(DataError, match="invalid UTF-16"):
        list(read_documents(path))
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(codecs.BOM_UTF16_LE + b"a\x00\n\x00\x00\xd8\x0a\x00")
        with pytest.raises(DataError, match="UTF-16"):
            list(read_documents(tmp_path / name))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 999)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_documents(tmp_path / "a.txt.gz"))


def saved(folder: Path, names: list[str]) -> None:
    """As `Dataset.save_to_disk` writes it, its shards in an order of their own."""
    folder.mkdir(parents=True)
    for name in names:
        write(folder / name, [{"text": name, "prompt": "Why?", "completion": "So."}])
    (folder / "cache-0123.arrow").write_bytes(b"what datasets computed")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None})
    )


@pytest.mark.parametrize("kind", [TEXTS, EXAMPLES])
def test_a_dataset_in_parts_is_trained_on_its_part_to_train(kind: Any, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for part in ("train", "validation", "test"):
        saved(whole / part, ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"])
    (whole / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    found = find_data([str(whole)], kind=kind)
    assert found.files == [whole / "train" / f"data-0000{number}-of-00002.arrow" for number in (1, 0)]
    assert found.left_out == [f"the part test of {whole} (2 files)"]
    assert {file.parent.name for file in held_out_files(found, [], 0.1, kind)} == {"validation"}
    # Named where others are, or not wished, it is left out by name.
    for sources, named_files, fraction in (
        ([whole, whole / "test"], [], 0.1),
        ([whole], [whole / "test"], 0.1),
        ([whole], [], 0),
    ):
        found = find_data([str(each) for each in sources], kind=kind)
        files = held_out_files(found, [str(each) for each in named_files], fraction, kind)
        assert {file.parent.name for file in files} == ({"test"} if named_files else set())
        assert "a part to validate on (2 files)" in found.left_out
    # To validate on, a dataset's part for it is taken, else that to test on.
    assert {file.parent.name for file in find_files([str(whole)], kind=kind, part="validation")} == {"validation"}
    (whole / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert {file.parent.name for file in find_files([str(whole)], kind=kind, part="validation")} == {"test"}
    (whole / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    with pytest.raises(DataError, match="has no part to train on, only test"):
        find_files([str(whole)], kind=kind)
    (whole / "test" / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="lacks its file data-00000"):
        find_files([str(whole / "test")], kind=kind)


def test_a_folder_of_the_hub_is_trained_on_its_part_to_train(tmp_path: Path) -> None:
    """As `datasets.load_dataset(folder)` splits it: by words in the names of files and folders."""
    for name in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl",
                 "data/val.jsonl", "testimony/train.jsonl"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("# A dataset")
    (tmp_path / ".gitattributes").write_text("")
    (tmp_path / "data" / "picture.png").write_bytes(b"")
    found = find_data([str(tmp_path)])
    assert [file.name for file in found.files] == [
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
        "train.jsonl",
    ]
    assert [file.name for file in found.validation] == ["val.jsonl"]
    assert found.left_out == [
        str(tmp_path / "README.md"), str(tmp_path / "data" / "picture.png"), f"the part test of {tmp_path} (1 file)"
    ]  # fmt: skip


def test_without_a_part_to_train_only_whole_names_are_parts(tmp_path: Path) -> None:
    for name in (
        "the-test-of-time.txt",
        "evaluation of bread.txt",
        "other.txt",
        "test.txt",
        "testing-00000-of-00001.txt",
    ):
        (tmp_path / name).write_text("text")
    found = find_data([str(tmp_path)])
    assert [file.name for file in found.files] == ["evaluation of bread.txt", "other.txt", "the-test-of-time.txt"]
    assert found.left_out == [f"the part test of {tmp_path} (2 files)"]
    # What is named is meant.
    assert find_files([str(tmp_path / "test.txt")]) == [tmp_path / "test.txt"]


def test_many_files_that_are_left_out_are_told_by_their_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(b"")
    assert find_data([str(tmp_path)]).left_out == ["30 files with .png"]


def test_files_of_one_name_are_told_apart() -> None:
    files = [Path("a/train/data.arrow"), Path("a/test/data.arrow"), Path("b/other.arrow")]
    assert named(files) == ["train/data.arrow", "test/data.arrow", "other.arrow"]
    assert named([Path("x/a/d"), Path("y/a/d")]) == ["x/a/d", "y/a/d"]


def test_finetune_takes_folders_and_says_what_it_leaves_out(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("train", 6), ("validation", 2), ("test", 2)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        write(
            folder / "data.parquet", [{"Q": f"{name} {number}?", "A": "So.", "id": number} for number in range(count)]
        )
    (tmp_path / "data" / "notes.docx").write_bytes(b"")
    flags = [
        "--map",
        "Q=question",
        "A=answer",
        *["--max-steps", "1", "--batch-size", "2", "--threads", "1", "--sample-every", "never"],
    ]
    given = [
        "--checkpoint",
        str(tiny_checkpoint("parent")),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["finetune", *given, *flags]) == 0
    said = capsys.readouterr().out
    assert "6 training examples, 2 for validation" in said
    assert f"not used: {tmp_path / 'data' / 'notes.docx'}, the part test of {tmp_path / 'data'} (1 file)" in said
    assert "fields of the rows that are not used: id" in said
    made = json.loads((tmp_path / "run" / "best" / "topkapi.json").read_text())
    assert set(made["data"]["sources"]) == {"train/data.parquet", "validation/data.parquet"}


def test_a_field_of_one_row_alone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"A text of number {number}, and more. " * 9} for number in range(9)]
    write(tmp_path / "rows.jsonl", [*rows, {"text": "last " * 99, "summary": "s"}])
    flags = "--model tiny --hidden-size 32 --intermediate-size 64 --num-layers 1 --context-length 32"
    flags += " --batch-size 2 --threads 1 --max-steps 1 --sample-every never --overwrite"
    given = ["--data", str(tmp_path / "rows.jsonl"), "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "run")]
    for _ in ("tokenized", "from the cache"):
        assert main(["pretrain", *given, *flags.split()]) == 0
        assert "fields of the rows that are not used: summary" in capsys.readouterr().out
