"""LoRA adapters are asked for by name, in every dialect, beside their base and one another."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from topkapi.model.adapter import TARGETS, Adapter, attach
from topkapi.model.errors import CheckpointError, Overloaded, SettingsError
from topkapi.model.storage.checkpoint import load_checkpoint, save_adapter, weights_digest
from topkapi.service.adapters import Adapters, Budget, Use, is_base
from topkapi.service.locations import AdapterLocation, adapter_locations
from topkapi.service.models import Models
from topkapi.service.settings import Settings

PROMPT = {"prompt": "Names are", "max_tokens": 12, "seed": 1, "logprobs": 1}


def make_adapter(directory: Path, base: Path, seed: int, rank: int = 4, **changes: Any) -> Path:
    """An adapter as `finetune --method lora` writes them, with random numbers; `changes` are to adapter_config.json."""
    checkpoint = load_checkpoint(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"rank": rank, "scale": 2.0, "dropout": 0.0, "decomposed": changes.pop("dora", False)}
    attach(checkpoint.model, TARGETS, lambda linear: Adapter(linear, generator=generator, **options))
    with torch.no_grad():
        for name, parameter in checkpoint.model.named_parameters():
            if name.endswith("up.weight"):
                parameter.normal_(0, 0.3, generator=generator)
    save_adapter(
        directory,
        model=checkpoint.model,
        base=base,
        rank=rank,
        alpha=2.0 * rank,
        dropout=0.0,
        tokenizer=checkpoint.tokenizer,
        chat=checkpoint.chat,
        generation={},
        details={"parent": {"sha256": weights_digest(base)}},
    )
    if changes:
        settings = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(settings | changes))
        # As one that somebody else wrote.
        (directory / "topkapi.json").unlink()
    return directory


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A directory with two checkpoints and, in `adapters`, twenty adapters for the first one."""
    library = tmp_path_factory.mktemp("library")
    for seed, name in enumerate(("first", "second")):
        shutil.copytree(tiny_checkpoint(name, seed=seed, context=512), library / name)
    for seed in range(20):
        make_adapter(library / "adapters" / f"a{seed}", library / "first", seed, rank=1 + seed % 7)
    make_adapter(library / "for-second", library / "second", 1)
    return library


@pytest.fixture(scope="module")
def beside(serve: Callable, library: Path) -> Iterator[Any]:
    """`first`, `second` and all adapters, in a server that lets requests load what is in the library."""
    with serve(library / "first", library / "second", model_directory=library) as served:
        for path in sorted((library / "adapters").iterdir()):
            served.models.load_adapter(path.name, path)
        yield served


def error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_a_request_for_one_is_answered_as_by_the_two_merged(serve: Callable, beside: Any, library: Path) -> None:
    text = {"text": "The cat sat on the mat."}
    with serve(library / "adapters" / "a3") as merged:
        expected = merged.answer("/score", **text)["results"][0]
    found = beside.answer("/score", model="a3", **text)["results"][0]
    base = beside.answer("/score", model="first", **text)["results"][0]
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-4) != pytest.approx(base["nll"], rel=1e-3)


def test_they_are_listed_with_their_base(beside: Any) -> None:
    listed = {entry["id"]: entry for entry in beside.client.get("/v1/models").json()["data"]}
    assert (listed["a3"]["parent"], listed["a3"]["root"]) == ("first", "a3") and listed["first"]["parent"] is None
    details = {entry["name"]: entry for entry in beside.client.get("/models").json()["models"]}
    assert list(details) == ["first", *sorted(f"a{seed}" for seed in range(20)), "second"]
    assert (details["a3"]["parent"], details["a3"]["rank"], details["a3"]["default"]) == ("first", 4, False)
    assert details["first"]["parent"] is None and details["first"]["in_memory"] is True
    assert beside.client.get("/v1/models/a3").json() == listed["a3"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "a", "seed": 1}),
        ("/v1/completions", {"prompt": "a", "seed": 1, "max_tokens": 8}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "seed": 1, "max_tokens": 8}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 8, "temperature": 0}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "temperature": 0}),
        ("/completion", {"prompt": "a", "seed": 1, "n_predict": 8}),
        ("/v1/embeddings", {"input": "a cat"}),
        ("/embedding", {"content": "a cat"}),
        ("/score", {"text": "a cat"}),
    ],
)
def test_every_dialect_asks_for_one_as_model(beside: Any, path: str, body: dict[str, Any]) -> None:
    def said(model: str) -> str:
        answer = beside.answer(path, **body, model=model)
        if isinstance(answer, dict):
            assert answer.get("model", model) == model
        kept = ("choices", "output", "content", "data", "results", "outputs")
        parts = [answer.get(name) for name in kept] if isinstance(answer, dict) else answer
        return json.dumps(parts)

    assert said("a1") != said("first")


def test_twenty_and_the_base_at_once_give_each_what_it_gets_alone(beside: Any) -> None:
    asked = [PROMPT | {"model": f"a{seed}", "trace": seed == 3} for seed in range(20)]
    asked += [PROMPT | {"model": "first", "seed": seed} for seed in range(6)]
    alone = [beside.answer("/generate", **body)["outputs"] for body in asked]
    with ThreadPoolExecutor(26) as pool:
        together = list(pool.map(lambda body: beside.answer("/generate", **body)["outputs"], asked))
    assert together == alone
    assert len({json.dumps(outputs) for outputs in alone}) == len(asked)


def test_one_comes_and_goes_while_others_serve(beside: Any) -> None:
    response = beside.post("/adapters", path="adapters/a2", name="again")
    assert response.status_code == 201 and response.json()["parent"] == "first"
    assert error(beside.post("/adapters", path="adapters/a2", name="first"), 409)["field"] == "name"
    assert error(beside.post("/adapters", path="adapters/a2", name="again"), 409)
    assert error(beside.post("/models", path="second", name="again", replace=True), 409)
    before = beside.answer("/generate", model="again", **PROMPT)["outputs"]
    assert beside.client.get("/models/again").json()["in_memory"] is True
    assert beside.post("/adapters", path="adapters/a4", name="again", replace=True).status_code == 201
    after = beside.answer("/generate", model="again", **PROMPT)["outputs"]
    assert before != after == beside.answer("/generate", model="a4", **PROMPT)["outputs"]
    assert error(beside.client.delete("/adapters/first"), 404)
    assert error(beside.client.patch("/models/again", json={"default": True}), 409)
    assert beside.client.delete("/adapters/again").status_code == 204
    assert error(beside.post("/generate", model="again", **PROMPT), 404)


def test_the_base_is_told_by_what_the_adapter_says_or_by_the_request(beside: Any, library: Path) -> None:
    assert beside.post("/adapters", path="for-second").json()["parent"] == "second"
    assert beside.client.delete("/models/for-second").status_code == 204
    refused = error(beside.post("/adapters", path="for-second", base="first"), 422)
    assert "other weights" in refused["message"] and str(library) not in json.dumps(refused)
    assert error(beside.post("/adapters", path="for-second", base="a1"), 409)["field"] == "base"
    assert error(beside.post("/adapters", path="for-second", base="none"), 404)
    make_adapter(library / "foreign", library / "first", 5, base_model_name_or_path="somebody/Else-7B")
    refused = error(beside.post("/adapters", path="foreign"), 422)
    assert "another base" in refused["message"] and "first" in refused["hint"]
    assert beside.post("/adapters", path="foreign", base="first").status_code == 201
    assert beside.client.delete("/adapters/foreign").status_code == 204


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = torch.nan


def without_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in list(tensors.items()):
        tensors[name] = tensor[:0] if "lora_A" in name else tensor[:, :0]


def with_another_rank(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.cat([tensors[name]] * 2)


def too_wide(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in list(tensors.items()):
        if "lora_A" in name:
            tensors[name] = torch.cat([tensor] * 2, dim=1)


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("q_proj", "conv_in")] = tensors.pop(name)


def deeper(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)


def of_integers(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in list(tensors.items()):
        tensors[name] = tensor.to(torch.int32)


def with_an_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(512, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_nan, "no number"),
        (without_rank, "rank"),
        (with_another_rank, "rank"),
        (too_wide, "is for a"),
        (renamed, "does not have"),
        (deeper, "does not have it"),
        (of_integers, "no floats"),
        (with_an_embedding, "weights of its own"),
        (dict.clear, "changes nothing"),
    ],
)
def test_files_that_are_damaged_or_do_not_fit_are_refused(
    beside: Any, library: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    path = make_adapter(library / "damaged", library / "first", 1, peft_version="0")
    rewritten(path, change)
    refused = error(beside.post("/adapters", path="damaged", base="first"), 422)
    shutil.rmtree(path)
    assert refused["field"] == "path" and said in refused["message"], refused
    assert str(library) not in json.dumps(refused)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"dora": True, "peft_version": "0"}, "DoRA"),
        ({"lora_alpha": "many"}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "no number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"something_new": 5}, "something_new"),
    ],
)
def test_what_is_not_plain_lora_is_refused(beside: Any, library: Path, changes: dict[str, Any], said: str) -> None:
    path = make_adapter(library / "special", library / "first", 1, **changes)
    refused = error(beside.post("/adapters", path="special", base="first"), 422)
    shutil.rmtree(path)
    assert said in refused["message"], refused


def test_rank_stabilised_scales_are_honoured(beside: Any, library: Path) -> None:
    """LoRA divides alpha by the rank, rsLoRA by its root: four times 1 / 4 is twice 1 / 2."""
    outputs = []
    for name, changes in {"plain": {"lora_alpha": 8}, "stable": {"lora_alpha": 4, "use_rslora": True}}.items():
        path = make_adapter(library / name, library / "first", 1, rank=4, **changes)
        assert beside.post("/adapters", path=name, base="first").status_code == 201
        outputs.append(beside.answer("/generate", model=name, **PROMPT)["outputs"])
        assert beside.client.delete(f"/adapters/{name}").status_code == 204
        shutil.rmtree(path)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("path", ["../outside", "/etc", "adapters/../../outside"])
def test_nothing_outside_the_directory_can_be_reached(beside: Any, path: str) -> None:
    assert error(beside.post("/adapters", path=path), 403)["field"] == "path"


def test_links_out_of_it_are_not_followed(beside: Any, library: Path, tmp_path: Path) -> None:
    inside = shutil.copytree(library / "adapters" / "a1", library / "leading")
    shutil.move(inside / "adapter_model.safetensors", tmp_path / "weights")
    (inside / "adapter_model.safetensors").symlink_to(tmp_path / "weights")
    refused = error(beside.post("/adapters", path="leading"), 422)
    shutil.rmtree(inside)
    assert "leads out of" in refused["message"]


def test_without_the_setting_no_request_changes_anything(serve: Callable, library: Path) -> None:
    with serve(library / "first") as served:
        assert "TOPKAPI_MODEL_DIRECTORY" in error(served.post("/adapters", path="adapters/a1"), 403)["hint"]
        assert error(served.client.delete("/adapters/a1"), 403)


# Memory


@given(st.lists(st.tuples(st.sampled_from(["use", "drop", "busy", "idle"]), st.integers(0, 5)), max_size=60))
def test_the_least_recently_used_that_nobody_uses_goes_first(steps: list[tuple[str, int]]) -> None:
    sizes, busy, most = [1, 2, 3, 4, 5, 9], set[int](), 10
    room: Budget[int, int] = Budget(most, lambda value: value in busy)
    order: list[int] = []
    for step, key in steps:
        if step == "busy":
            busy |= {key} & set(order)
        elif step == "idle":
            busy.discard(key)
        elif step == "drop":
            room.drop(key)
            order = [each for each in order if each != key]
        elif room.get(key) is not None:
            order = [*(each for each in order if each != key), key]
        else:
            idle = [each for each in order if each not in busy]
            kept = sum(sizes[each] for each in order)
            gone = []
            while kept + sizes[key] > most and idle:
                gone.append(idle.pop(0))
                kept -= sizes[gone[-1]]
            fits = kept + sizes[key] <= most
            assert room.make(sizes[key]) is fits
            if fits:
                room.put(key, key, sizes[key])
                order = [*(each for each in order if each not in gone), key]
        assert list(room) == order and room.taken == sum(sizes[each] for each in order) <= most


def test_adapters_share_a_budget_of_memory(library: Path) -> None:
    base = load_checkpoint(library / "first")
    paths = [library / "adapters" / f"a{number}" for number in (2, 9, 16)]  # of one rank
    size = Adapters(2**30).add("one", paths[0], "first", base).size
    adapters = Adapters(2 * size)
    one, two, three = (adapters.add(path.name, path, "first", base) for path in paths)
    uses = [Use(adapters, each, base) for each in (one, two)]
    lives = [use.live() for use in uses]
    assert adapters.taken == 2 * size
    with pytest.raises(Overloaded, match="takes .* MiB of memory, and running requests use"):
        Use(adapters, three, base).live()
    assert Use(adapters, one, base).live() is lives[0], "one that is in memory is shared"
    del uses
    Use(adapters, three, base).live()
    assert [adapters.loaded(each) for each in (one, two, three)] == [True, False, True]
    assert Use(adapters, two, base).live().number > max(live.number for live in lives), (
        "and read again when it is asked for"
    )
    with pytest.raises(CheckpointError) as refused:
        Adapters(size - 1).add("one", paths[0], "first", base)
    assert "--adapter-memory" in (refused.value.hint or "")


def test_one_that_is_asked_for_by_many_is_read_once(library: Path) -> None:
    base = load_checkpoint(library / "first")
    adapters = Adapters(2**30)
    adapter = adapters.add("a1", library / "adapters" / "a1", "first", base)
    with ThreadPoolExecutor(8) as pool:
        uses = [Use(adapters, adapter, base) for _ in range(8)]
        assert len(set(pool.map(lambda use: use.live(), uses))) == 1


def test_what_changed_or_went_on_disk_is_said_and_costs_nobody_else(serve: Callable, library: Path) -> None:
    with serve(library / "first") as served:
        path = make_adapter(library / "changing", library / "first", 1)
        served.models.load_adapter("changing", path)
        shutil.rmtree(path)
        refused = error(served.post("/generate", model="changing", **PROMPT), 404)
        assert "there is no adapter" in refused["message"] and str(library) not in json.dumps(refused)
        make_adapter(library / "changing", library / "first", 1, rank=9)
        assert "not what it was" in error(served.post("/generate", model="changing", **PROMPT), 404)["message"]
        shutil.rmtree(path)
        assert served.answer("/generate", **PROMPT)


# Settings


def test_settings_name_them_one_by_one_or_by_directory(library: Path) -> None:
    place = library / "adapters"
    one = Settings.read(adapters=f"sql={place / 'a1'},fr@first={place / 'a2'}")
    assert adapter_locations(one) == [
        AdapterLocation("sql", None, place / "a1"), AdapterLocation("fr", "first", place / "a2"),
    ]  # fmt: skip
    assert len(adapter_locations(Settings.read(adapters=str(place)))) == 20
    for wrong in (str(library / "first"), f"x={library}", f"a1={place / 'a2'},{place / 'a1'}", "nowhere"):
        with pytest.raises(SettingsError):
            adapter_locations(Settings.read(adapters=wrong))


def test_a_base_is_known_by_its_name_wherever_it_lies(library: Path) -> None:
    base = load_checkpoint(library / "first")
    for named in ("org/First", "/elsewhere/first/", str(library / "first"), "alias"):
        assert is_base(named, base, ["alias"])
    for named in ("org/second", "first-2", ""):
        assert not is_base(named, base, ["alias"])


def test_adapters_of_a_checkpoint_go_with_it(library: Path) -> None:
    models = Models(Settings.read())
    models.load(str(library / "first"))
    models.load(str(library / "second"))
    try:
        models.load_adapter("a1", library / "adapters" / "a1")
        assert models.get("a1").engine is models.get("first").engine
        models.unload("first")
        assert [model.name for model in models.everything] == ["second"]
    finally:
        models.close()


def test_requests_of_one_end_while_it_is_unloaded(beside: Any, library: Path) -> None:
    beside.models.load_adapter("going", library / "adapters" / "a5")
    answers: list[Any] = []
    long = {"model": "going", "prompt": "a", "max_tokens": 300, "ignore_end_token": True, "temperature": 0}
    expected = beside.answer("/generate", **long)["outputs"]
    asking = threading.Thread(target=lambda: answers.append(beside.answer("/generate", **long)["outputs"]))
    asking.start()
    while not beside.models.get("first").engine.running and asking.is_alive():
        time.sleep(0.001)
    beside.client.delete("/adapters/going")
    asking.join(30)
    assert answers == [expected]
