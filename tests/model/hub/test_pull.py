"""Models come from a hub by their names, whole or not at all, and stay usable without it."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.hub import TOKEN, Hub, connect, running_hub
from topkapi.model.errors import CheckpointError
from topkapi.model.hub import remote
from topkapi.model.hub.cache import cached, entries, remove
from topkapi.model.hub.files import choose
from topkapi.model.hub.names import HubName, hub_name, meant
from topkapi.model.hub.resolve import local_path, pull
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.storage.gguf_export import export_gguf
from topkapi.service.commands.cli import main

NAME = "somebody/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with nothing in it, and a clean cache of its models."""
    with running_hub() as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        yield hub


@pytest.fixture
def directory(hub: Hub, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint directory, which the hub has as somebody/model, with much beside it that nobody needs."""
    made = tiny_checkpoint("somewhere")
    model = hub.add(NAME, made)
    model.commits["main"] |= {
        "README.md": b"---\nlicense: mit\n---\n",
        "LICENSE": b"MIT",
        "modeling_tiny.py": b"raise SystemExit('code of a stranger')",
        "pytorch_model.bin": b"a pickle",
        "model.fp16.safetensors": b"another variant",
        "onnx/model.onnx": b"something else",
    }
    return made


@pytest.fixture
def ggufs(hub: Hub, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """GGUF files by their quantisations, which the hub has as somebody/model-GGUF."""
    checkpoint = load_checkpoint(tiny_checkpoint("somewhere"), dtype=torch.float32)
    made = {}
    for kind in ("q8_0", "f16"):
        made[kind.upper()] = tmp_path / f"model-{kind.upper()}.gguf"
        export_gguf(checkpoint, made[kind.upper()], kind)
        hub.add("somebody/model-GGUF", made[kind.upper()])
    hub.models["somebody/model-GGUF"].commits["main"] |= {"mmproj-model-F16.gguf": b"GGUF eyes", "README.md": b"# card"}
    return made


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("owner/name", HubName("owner/name")),
        ("owner/name@v1.0", HubName("owner/name", "v1.0")),
        ("owner/name@refs/pr/1", HubName("owner/name", "refs/pr/1")),
        ("owner/name:Q4_K_M", HubName("owner/name", None, "Q4_K_M")),
        ("owner/name@main:Q4_K_M", HubName("owner/name", "main", "Q4_K_M")),
        ("owner/name:sub/model-q8_0.gguf", HubName("owner/name", None, "sub/model-q8_0.gguf")),
        ("hf.co/owner/na.me", HubName("owner/na.me")),
        ("hf.co/owner/name:Q8_0", HubName("owner/name", None, "Q8_0")),
        ("https://huggingface.co/owner/name", HubName("owner/name")),
        ("https://huggingface.co/owner/name/tree/v2", HubName("owner/name", "v2")),
        ("https://huggingface.co/owner/name/blob/main/a.gguf", HubName("owner/name", "main", "a.gguf")),
        ("https:/huggingface.co/owner/name", HubName("owner/name")),
        ("name", None),
        ("a/b/c", None),
        ("/owner/name", None),
        ("../owner/name", None),
        ("owner/na--me", None),
        ("owner/name@main/../../other", None),
        ("https://huggingface.co/owner/name/tree/..", None),
        ("owner/", None),
        ("owner name/x", None),
    ],
)  # fmt: skip
def test_names_are_read_as_people_type_and_paste_them(typed: str, name: HubName | None) -> None:
    assert hub_name(typed) == name


def test_what_is_there_or_looks_like_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert meant("owner/name") is None, "it exists"
    assert meant("owner/nmae") is None, "it lies in a directory that exists: the name of something there was mistyped"
    assert meant("hf.co/owner/nmae") == HubName("owner/nmae"), "but it can be said"
    assert (
        meant("runs/mine") is meant("checkpoints/mine") is meant("other/model.gguf") is meant("other/model.pth") is None
    )
    assert meant("other/model") == HubName("other/model")
    with pytest.raises(CheckpointError, match="names no model on the Hugging Face hub"):
        meant("hf.co/owner")


def test_a_directory_is_pulled_with_what_it_needs_and_no_more(
    hub: Hub, directory: Path, capfd: pytest.CaptureFixture
) -> None:
    path = local_path(NAME)
    assert sorted(file.name for file in path.iterdir()) == sorted(
        ["LICENSE", "README.md", *(file.name for file in directory.iterdir())]
    )
    assert all((path / file.name).read_bytes() == file.read_bytes() for file in directory.iterdir())
    loaded = load_checkpoint(path)
    assert (loaded.name, loaded.details["note"]) == ("model", "random weights")
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert (path / "model.safetensors").resolve().name == digest, "as the library keeps it"
    before = len(hub.asked)
    assert local_path(NAME) == local_path(f"hf.co/{NAME}") == path
    assert len(hub.asked) == before, "the hub isn't asked again"


def test_revisions_are_kept_apart(hub: Hub, directory: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    hub.add(NAME, tiny_checkpoint("older", seed=7), revision="v1")
    newest, older = local_path(NAME), local_path(f"{NAME}@v1")
    assert newest != older
    first, second = (load_checkpoint(path).model.embed_tokens.weight for path in (newest, older))
    assert not torch.equal(first, second)
    commit = hub.models[NAME].commit("v1")
    assert local_path(f"{NAME}@{commit}") == older
    hub.add(NAME, tiny_checkpoint("newer", seed=8))
    assert local_path(NAME) == newest, "what is here is taken"
    assert pull(HubName(NAME)) != newest and local_path(NAME) != newest, "until somebody pulls"


def test_of_gguf_files_one_is_pulled(hub: Hub, ggufs: dict[str, Path]) -> None:
    name = "somebody/model-GGUF"
    assert local_path(f"{name}:f16").read_bytes() == ggufs["F16"].read_bytes()
    assert [file for file, _ in hub.fetched] == ["model-F16.gguf"]
    usual = local_path(name)
    assert usual.name == "model-Q8_0.gguf", "the smaller of the two, though the other one is here"
    assert load_checkpoint(usual).name == "model-Q8_0.gguf"
    assert local_path(f"{name}:model-F16.gguf").name == "model-F16.gguf"
    with pytest.raises(CheckpointError, match="no such GGUF file") as refused:
        local_path(f"{name}:Q4_K_M")
    assert f"{name}:F16, {name}:Q8_0" in str(refused.value.hint)


def test_several_that_could_be_meant_are_listed(hub: Hub, ggufs: dict[str, Path]) -> None:
    files = hub.models["somebody/model-GGUF"].commits["main"]
    files["other-Q8_0.gguf"] = files["model-Q8_0.gguf"]
    with pytest.raises(CheckpointError, match="several GGUF files") as refused:
        local_path("somebody/model-GGUF")
    assert "somebody/model-GGUF:other-Q8_0.gguf" in str(refused.value.hint)
    files.clear()
    files |= {f"big-Q4_K_M-0000{part}-of-00002.gguf": b"GGUF" for part in (1, 2)} | {"big-Q2_K.gguf": b"GGUF"}
    with pytest.raises(CheckpointError, match="split into 2 files") as refused:
        local_path("somebody/model-GGUF:Q4_K_M")
    assert "somebody/model-GGUF:Q2_K" in str(refused.value.hint)


def test_shards_come_with_their_index(hub: Hub, directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    files = hub.models[NAME].commits["main"]
    parts: dict[str, str] = {}
    for part, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        shard = f"model-0000{part}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, tmp_path / shard)
        files[shard] = (tmp_path / shard).read_bytes()
        parts |= dict.fromkeys(names, shard)
    for name in ("model.safetensors", "topkapi.json"):
        del files[name]
    files["model.safetensors.index.json"] = json.dumps({"weight_map": parts}).encode()
    assert load_checkpoint(local_path(NAME)).config == load_checkpoint(directory).config


def test_what_is_chosen_of_a_repository_is_what_is_read() -> None:
    templates = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    whole = ["config.json", "tokenizer.json", "model.safetensors"]
    strange = [
        "model.py",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "original/params.json",
        "a/../b.jinja",
        "tokenizer.model",
    ]
    choice = choose(HubName(NAME), [*whole, *templates, *strange, "LICENSE.txt"])
    assert {*choice.texts, *choice.weights} == {*whole, *templates, "LICENSE.txt"}


def test_an_adapter_brings_its_base(hub: Hub, directory: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), LoraConfig(target_modules=["q_proj"]))
    peft.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(directory), NAME))
    hub.add("somebody/adapter", tmp_path / "adapter")
    path = local_path("somebody/adapter")
    assert load_checkpoint(path).name == "adapter" and cached(HubName(NAME)) is not None
    remove(HubName(NAME))
    with pytest.raises(CheckpointError, match="which is not there") as refused:
        load_checkpoint(path)
    assert f"topkapi pull {NAME}" in str(refused.value.hint)


def test_what_was_damaged_on_the_way_is_not_kept(hub: Hub, directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    hub.models[NAME].lies["model.safetensors"] = content[:-1] + b"!"
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not come as the hub says it is"):
        local_path(NAME)
    assert cached(HubName(NAME)) is None
    kept = [file for file in remote.cache_directory().rglob("*") if file.is_file()]
    assert not any(file.stat().st_size == len(content) for file in kept)
    remove(HubName(NAME))
    hub.models[NAME].lies = {"tokenizer_config.json": b"{}"}
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json does not come"):
        local_path(NAME)
    hub.models[NAME].lies = {}
    assert load_checkpoint(local_path(NAME)).name == "model"


@pytest.mark.parametrize("digest", ["../../../../victim", "/tmp/victim", "a" * 63, "A" * 64, ""])
def test_a_digest_that_is_none_becomes_no_path(digest: str, hub: Hub, directory: Path) -> None:
    hub.models[NAME].digests["model.safetensors"] = digest
    with pytest.raises(CheckpointError, match="what no hub would"):
        local_path(NAME)
    assert not hub.fetched


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", "a\\b.safetensors"])
def test_a_file_that_lies_elsewhere_is_refused(file: str, hub: Hub, directory: Path) -> None:
    hub.models[NAME].commits["main"][file] = b"content"
    with pytest.raises(CheckpointError, match="what no hub would"):
        local_path(NAME)


def test_no_more_is_written_than_was_announced(hub: Hub, directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    hub.models[NAME].lies["model.safetensors"] = content + bytes(1 << 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not come as the hub says it is"):
        local_path(NAME)
    kept = [file.stat().st_size for file in remote.cache_directory().rglob("*") if file.is_file()]
    assert max(kept) < len(content)


def test_an_earlier_part_is_gone_on_with_and_a_wrong_one_is_not(hub: Hub, directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    blob = remote.cache_directory() / "models--somebody--model" / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True)
    partial = blob.with_name(blob.name + ".incomplete")
    partial.write_bytes(content[:1000])
    local_path(NAME)
    assert hub.fetched == [("model.safetensors", "bytes=1000-")] and blob.read_bytes() == content
    remove(HubName(NAME))
    blob.parent.mkdir(parents=True)
    partial.write_bytes(b"?" * 1000)
    hub.fetched.clear()
    assert load_checkpoint(local_path(NAME)).name == "model"
    assert [ranges for _, ranges in hub.fetched] == ["bytes=1000-", None]


def test_two_that_want_the_same_fetch_it_once(hub: Hub, directory: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(local_path, [NAME, NAME])
    assert first == second and load_checkpoint(first).name == "model"
    assert [file for file, _ in hub.fetched] == ["model.safetensors"]


def refusal(name: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as refused:
        local_path(name)
    assert not [file for file in remote.cache_directory().rglob("*.safetensors") if file.exists()]
    return refused.value


def test_what_cannot_be_had_is_told_with_the_way_out(
    hub: Hub, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal("nobody/nothing")
    assert "has no model nobody/nothing" in error.message and f"{hub.url}/models?search=nothing" in str(error.hint)
    error = refusal(f"{NAME}@v9")
    assert "has no revision 'v9'" in error.message and f"{NAME}/commits" in str(error.hint)

    hub.models[NAME].gated = True
    error = refusal(NAME)
    assert "is gated" in error.message and "hf auth login" in str(error.hint) and f"{hub.url}/{NAME}" in str(error.hint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_checkpoint(local_path(NAME)).name == "model", "with a token it comes; the storage never saw that"
    remove(HubName(NAME))
    monkeypatch.delenv("HF_TOKEN")
    hub.models[NAME].gated = False

    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 100}))
    error = refusal(NAME)
    assert "100 bytes are free" in error.message and "HF_HOME" in str(error.hint) and "topkapi rm" in str(error.hint)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("lost", "given", "message", "hint"),
    [
        (["model.safetensors"], {}, "pickled weights only", "topkapi import somebody/model model"),
        (["config.json"], {}, "no config.json", "another repository"),
        (["tokenizer.json"], {}, "no tokenizer.json", "save_pretrained"),
        (["model.safetensors", "pytorch_model.bin"], {}, "no weights that are read", "model.safetensors"),
        ([], {"config.json": b'{"model_type": "t5"}'}, "'t5' is not supported", "supported families"),
        ([], {"config.json": b"{"}, "not valid JSON", "download it again"),
    ],
)  # fmt: skip
def test_a_repository_of_something_else_is_refused_before_its_weights_come(
    hub: Hub, directory: Path, lost: list[str], given: dict[str, bytes], message: str, hint: str
) -> None:
    files = hub.models[NAME].commits["main"]
    for name in lost:
        files.pop(name)
    files |= given
    error = refusal(NAME)
    assert message in error.message and hint in str(error.hint), (error.message, error.hint)
    assert not hub.fetched


def test_a_lying_config_is_told_when_it_is_loaded(hub: Hub, directory: Path) -> None:
    files = hub.models[NAME].commits["main"]
    del files["topkapi.json"]
    files["config.json"] = files["config.json"].replace(b'"hidden_size": 32', b'"hidden_size": 64')
    with pytest.raises(CheckpointError, match="config.json implies") as refused:
        load_checkpoint(local_path(NAME))
    assert "different models" in str(refused.value.hint)


def test_without_a_connection_what_is_here_serves(
    hub: Hub,
    directory: Path,
    ggufs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here, file = local_path(NAME), local_path("somebody/model-GGUF")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_path(NAME) == here and local_path("somebody/model-GGUF") == file
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as refused:
        local_path("somebody/else")
    assert "topkapi pull somebody/else" in str(refused.value.hint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.refusal = 503
    assert local_path("somebody/model-GGUF") == file
    assert "answers with status 503: taking model-Q8_0.gguf, which is here" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is not on this machine") as refused:
        local_path("somebody/else")
    assert "check the connection" in str(refused.value.hint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be reached"):
        local_path("somebody/else")


def test_models_are_listed_and_deleted(
    hub: Hub,
    directory: Path,
    ggufs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOPKAPI_CHECKPOINTS", str(directory.parent))
    assert main(["pull", NAME, "somebody/model-GGUF:f16"]) == 0
    assert f"serve it with: topkapi serve {NAME}\n" in capsys.readouterr().out
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", NAME, "somebody/model-GGUF:F16", str(directory)]
    assert [line.split()[3:5] for line in lines[1:]] == [["qwen3", "float32"], ["qwen3", "F16"], ["qwen3", "float32"]]
    assert main(["rm", NAME]) == 2 and "add --yes" in capsys.readouterr().err
    assert main(["rm", str(directory)]) == 2 and "rm -r" in capsys.readouterr().err and directory.is_dir()
    assert main(["rm", NAME, "--yes"]) == 0 and "are free again" in capsys.readouterr().out
    assert [str(entry.name) for entry in entries()] == ["somebody/model-GGUF:F16"]
    local_path("somebody/model-GGUF:q8_0")
    assert remove(HubName("somebody/model-GGUF", None, "F16")) == ggufs["F16"].stat().st_size
    assert [str(entry.name) for entry in entries()] == ["somebody/model-GGUF:Q8_0"]
    remove(HubName("somebody/model-GGUF", None, "Q8_0"))
    assert list(entries()) == [] and not list(remote.cache_directory().glob("models--*"))
    assert main(["rm", NAME, "--yes"]) == 2 and "topkapi list shows" in capsys.readouterr().err
