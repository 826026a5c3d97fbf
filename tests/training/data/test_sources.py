"""Every kind of file gives the same documents, and a damaged one is named."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from topkapi.model.errors import DataError
from topkapi.training.data.finding import find_files
from topkapi.training.data.instructions import read_conversations
from topkapi.training.data.sources import read_documents

TEXTS = ["one\u2028line", "two\u0085\n", "üç 🙂", "dört " * 500]
ROWS = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


def arrow(path: Path, *, indexed: bool) -> None:
    table = pyarrow.table({"text": TEXTS, "other": [1, 2, 3, 4]})
    make = pyarrow.ipc.new_file if indexed else pyarrow.ipc.new_stream
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(ROWS),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(ROWS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(ROWS)),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(ROWS)),
    "a.JSONL.GZ": lambda path: path.write_bytes(gzip.compress(ROWS)),
    "two-parts.jsonl.gz": lambda path: path.write_bytes(gzip.compress(ROWS[:30]) + gzip.compress(ROWS[30:])),
    "two-parts.jsonl.zst": lambda path: path.write_bytes(zstd(ROWS[:30]) + zstd(ROWS[30:])),
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path),
    "data-00000-of-00001.arrow": lambda path: arrow(path, indexed=False),
    "indexed.arrow": lambda path: arrow(path, indexed=True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert list(read_documents(tmp_path / name)) == TEXTS
    assert find_files([str(tmp_path)]) == [tmp_path / name]


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "a.jsonl"])
def test_half_a_file_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=path.name) as caught:
        list(read_documents(path))
    assert "cannot be read" in caught.value.message


@pytest.mark.parametrize("name", ["a.parquet", "indexed.arrow"])
def test_a_missing_column_is_named_with_those_there_are(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    with pytest.raises(DataError, match="no column 'body'") as caught:
        list(read_documents(tmp_path / name, "body"))
    assert "text" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst"])
def test_instructions_may_be_compressed(name: str, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "Why?", "completion": "Because."}).encode()
    (tmp_path / name).write_bytes(gzip.compress(row) if name.endswith("gz") else zstd(row))
    (conversation,) = read_conversations(tmp_path / name, input_heading=False)
    assert conversation.messages[-1]["content"] == "Because."


def test_a_saved_dataset_is_a_folder_like_any_other(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets extra is not installed")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"what datasets computed")
    (file,) = find_files([str(tmp_path / "saved")])
    assert list(read_documents(file)) == TEXTS


def test_a_dataset_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may also be a folder of files that `datasets` knows how to load; it keeps the result in its cache."""
    pytest.importorskip("datasets", reason="the datasets extra is not installed")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_bytes(ROWS)
    files = find_files(["hf:mine"])
    assert [text for file in files for text in read_documents(file)] == TEXTS
    with pytest.raises(DataError, match="no-such-set cannot be loaded") as caught:
        find_files(["hf:no-such-set"])
    assert "hf:NAME:SPLIT" in (caught.value.hint or "")


def test_without_a_network_only_this_machine_is_searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked in the usual way, the hub's client would try six times, over half a minute."""
    datasets = pytest.importorskip("datasets", reason="the datasets extra is not installed")
    import huggingface_hub

    class Cut:
        def head(self, *arguments: object, **options: object) -> None:
            raise OSError("no route to host")

    def load(*arguments: object, **options: object) -> None:
        flags.append((datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        raise ConnectionError("tried nothing")

    flags: list[tuple[bool, bool]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Cut)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="is not on this machine, and the hub cannot be reached: no route") as caught:
        find_files(["hf:owner/far-away"])
    assert "give files or folders" in (caught.value.hint or "")
    assert flags == [(True, True)]
    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_name_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets") as caught:
        find_files(["hf:anything"])
    assert "topkapi[datasets]" in (caught.value.hint or "")


def test_a_slice_of_a_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files hold the whole split, all of which would be trained on."""
    monkeypatch.setattr("topkapi.training.data.finding.extra_package", lambda *arguments: None)
    with pytest.raises(DataError, match=r"train\[:10%\]"):
        find_files(["hf:owner/name:train[:10%]"])
