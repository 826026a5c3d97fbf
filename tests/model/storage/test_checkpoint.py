"""A checkpoint is read whole and unaltered or refused by name; a failed save leaves the earlier one."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import topkapi.model.storage.checkpoint
from tests.tiny import tiny_model
from topkapi.model.errors import CheckpointError
from topkapi.model.files import write_directory
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.model.storage.location import check_location
from topkapi.model.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a few words, a few words"], 258, ["<|endoftext|>"])


def save(folder: Path, tokenizer: Tokenizer, seed: int = 0, **options: object) -> Path:
    model = tiny_model(seed=seed, vocab_size=260)
    return save_checkpoint(
        folder, model=model, tokenizer=tokenizer, chat=None, generation={}, details={"seed": seed}, **options
    )


def test_round_trip_keeps_every_bit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path / "checkpoint", tokenizer)
    loaded = load_checkpoint(path)
    state = tiny_model(vocab_size=260).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.details["seed"] == 0
    assert loaded.config.end_token_ids == (0, tokenizer.end_token_id)


def test_bfloat16_halves_the_file_and_keeps_vectors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    full = save(tmp_path / "full", tokenizer)
    half = save(tmp_path / "half", tokenizer, dtype=torch.bfloat16)
    sizes = [(path / "model.safetensors").stat().st_size for path in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    model = load_checkpoint(half).model
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float32
    assert load_checkpoint(half, dtype=torch.float32).model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["removed", "truncated", "altered"])
def test_damage_is_named(tmp_path: Path, tokenizer: Tokenizer, name: str, damage: str) -> None:
    path = save(tmp_path / "checkpoint", tokenizer)
    content = (path / name).read_bytes()
    if damage == "removed":
        (path / name).unlink()
    elif damage == "truncated":
        (path / name).write_bytes(content[: len(content) // 2])
    else:
        (path / name).write_bytes(content[:-20] + bytes(20))
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(path)
    assert caught.value.hint


@pytest.mark.parametrize("damage", ["removed", "truncated"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damage_is_named_without_digests_too(tmp_path: Path, tokenizer: Tokenizer, name: str, damage: str) -> None:
    path = save(tmp_path / "checkpoint", tokenizer)
    (path / "topkapi.json").unlink()
    content = (path / name).read_bytes()
    (path / name).unlink()
    if damage == "truncated":
        (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)


def test_missing_and_foreign_things_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_checkpoint(tmp_path / "empty")
    (tmp_path / "weights.npz").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not .gguf"):
        load_checkpoint(tmp_path / "weights.npz")
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not loaded as they are") as refused:
        load_checkpoint(tmp_path / "weights.pt")
    assert f"topkapi import {tmp_path / 'weights.pt'} imported/weights" in str(refused.value.hint)
    path = save(tmp_path / "pickled", tokenizer)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    (path / "topkapi.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "safetensors" in str(caught.value.hint)


def test_whoever_may_read_the_directory_may_read_its_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A checkpoint made by one user is mounted into a container that runs as another."""
    path = save(tmp_path / "checkpoint", tokenizer)
    for file in path.iterdir():
        assert file.stat().st_mode & 0o666 == path.stat().st_mode & 0o666, file.name


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "checkpoint", tokenizer)

    def refused(file: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr("topkapi.model.storage.verification.sha256", refused)
    with pytest.raises(CheckpointError, match=r"checkpoint/config\.json cannot be read: Permission denied"):
        load_checkpoint(path)


def test_shapes_and_names_that_do_not_fit_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path / "checkpoint", tokenizer)
    (path / "topkapi.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    with pytest.raises(CheckpointError, match=r"shape \[32, 64\], config.json implies \[32, 65\]"):
        load_checkpoint(path)
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="lacks layers.2"):
        load_checkpoint(path)
    (path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="unknown layers.0.self_attn.k_norm"):
        load_checkpoint(path)
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(CheckpointError, match="tokenizer has 258 entries"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "checkpoint", tokenizer, seed=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(topkapi.model.storage.checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        save(path, tokenizer, seed=2)
    assert "unchanged" in str(caught.value.hint)
    assert load_checkpoint(path).details["seed"] == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint"]


KILLED = """
import os, sys
from pathlib import Path
import topkapi.model.files
final = Path(sys.argv[1])
rename, seen = Path.rename, []
def die_at_second(self, target):
    seen.append(target)
    if len(seen) == 2:
        os._exit(9)
    return rename(self, target)
Path.rename = die_at_second
with topkapi.model.files.write_directory(final) as partial:
    (partial / "file").write_text("new")
"""


def test_death_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    final = tmp_path / "directory"
    with write_directory(final) as partial:
        (partial / "file").write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(final)], check=False).returncode == 9
    assert not final.exists()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_checkpoint(final)
    assert (final / "file").read_text() == "old"


def test_a_block_that_fails_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), write_directory(tmp_path / "directory") as partial:
        (partial / "file").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_default_checkpoint_may_be_meant_by_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "small").mkdir(parents=True)
    with pytest.raises(CheckpointError) as refused:
        check_location(Path("small"))
    assert refused.value.hint == "did you mean checkpoints/small?"
