"""Checkpoints are loaded, renamed, replaced and unloaded while others serve, where the settings allow it."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from topkapi.engine.engine import Engine
from topkapi.model.errors import SettingsError
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.service.api.native.checkpoints import ModelDetails, ModelsResponse
from topkapi.service.garbage import set_aside
from topkapi.service.jobs import AT_ONCE
from topkapi.service.locations import default_checkpoints
from topkapi.service.models import Models
from topkapi.service.settings import Settings

SLOW = {"prompt": "a", "ignore_end_token": True, "temperature": 0}


@pytest.fixture(scope="module")
def library(tmp_path_factory, tiny_checkpoint) -> Path:
    """A directory with two checkpoints, a link to one of them, a link that leads out of it, and something else."""
    library = tmp_path_factory.mktemp("shelf") / "library"
    library.mkdir()
    for seed, name in enumerate(("first", "second")):
        shutil.copytree(tiny_checkpoint(name, seed=seed, context=2048), library / name)
    shutil.copytree(library / "first", library.parent / "outside")
    (library / "linked").symlink_to("second")
    (library / "away").symlink_to("../outside")
    (library / "notes.txt").write_text("nothing to load")
    return library


@pytest.fixture
def open_server(serve, library) -> Iterator:
    """A server of `first` that lets requests load what is in the library."""
    with serve(library / "first", model_directory=library) as served:
        yield served


@pytest.fixture(scope="module")
def refusing(serve, library) -> Iterator:
    """The same for all tests in which nothing comes to be loaded."""
    with serve(library / "first", model_directory=library) as served:
        yield served


def names(served) -> list[str]:
    answer = served.client.get("/models").json()
    ModelsResponse.model_validate(answer)
    return [model["name"] for model in answer["models"]]


def error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_a_checkpoint_comes_and_goes_while_another_serves(open_server) -> None:
    prompt = {"prompt": "Names are", "max_tokens": 12, "seed": 1}
    before = open_server.answer("/generate", **prompt)["outputs"]
    response = open_server.post("/models", path="second", aliases=["gpt-4o", "org/second"])
    assert response.status_code == 201
    details = response.json()
    assert ModelDetails.model_validate(details).model_dump() == details
    assert (details["name"], details["aliases"], details["default"]) == ("second", ["gpt-4o", "org/second"], False)
    assert open_server.client.get("/models/gpt-4o").json() == details
    assert names(open_server) == ["first", "second"]
    by_name = [open_server.answer("/generate", model=name, **prompt) for name in details["aliases"] + ["second"]]
    assert {answer["model"] for answer in by_name} == {"second"}
    assert by_name[0]["outputs"] == by_name[2]["outputs"] != before
    assert open_server.client.delete("/models/second").status_code == 204
    assert names(open_server) == ["first"]
    for name in ("second", "gpt-4o"):
        assert "loaded: first" in error(open_server.post("/generate", model=name, **prompt), 404)["hint"]
    assert open_server.answer("/generate", **prompt)["outputs"] == before


def test_the_default_and_the_aliases_can_be_changed(open_server) -> None:
    open_server.post("/models", path="second", name="other", default=True)
    assert names(open_server) == ["other", "first"]
    assert open_server.answer("/generate", prompt="a", max_tokens=1)["model"] == "other"
    changed = open_server.client.patch("/models/first", json={"default": True, "aliases": ["tiny"]}).json()
    assert (changed["default"], changed["aliases"]) == (True, ["tiny"])
    assert names(open_server) == ["first", "other"]
    assert open_server.client.patch("/models/tiny", json={"aliases": []}).json()["aliases"] == []
    open_server.client.delete("/models/first")
    assert open_server.answer("/generate", prompt="a", max_tokens=1)["model"] == "other"


def test_names_belong_to_one_checkpoint(open_server) -> None:
    taken = error(open_server.post("/models", path="second", name="first"), 409)
    assert (taken["type"], taken["field"]) == ("conflict", "name") and "'first'" in taken["message"]
    assert error(open_server.post("/models", path="second", aliases=["first"]), 409)
    assert error(open_server.post("/models", path="second", aliases=["second"]), 409)["field"] == "aliases"
    assert error(open_server.post("/models", path="second", aliases=["a", "a"]), 409)["field"] == "aliases"
    assert open_server.post("/models", path="second", aliases=["a"]).status_code == 201
    assert error(open_server.client.patch("/models/first", json={"aliases": ["a"]}), 409)
    assert error(open_server.post("/models", path="second", name="a", replace=True), 409)
    assert error(open_server.client.patch("/models/none", json={}), 404)
    assert error(open_server.client.delete("/models/none"), 404)


def test_a_newer_checkpoint_takes_the_place_of_a_loaded_one(open_server, library) -> None:
    prompt = {"model": "first", "prompt": "Names are", "max_tokens": 12, "seed": 1}
    old = open_server.answer("/generate", **prompt)["outputs"]
    assert open_server.post("/models", path="second", name="first", replace=True).status_code == 201
    assert names(open_server) == ["first"]
    new = open_server.answer("/generate", **prompt)["outputs"]
    assert new != old
    open_server.wait_until_idle()
    assert 'topkapi_num_requests_running{model_name="first"} 0.0' in open_server.client.get("/metrics").text


@pytest.mark.parametrize("path", ["../outside", "/etc", "away", "second/../../outside", "../library2", "../nothing"])
def test_nothing_outside_the_directory_can_be_reached(refusing, path) -> None:
    """Nor can anybody learn what is there: what exists is refused as what does not."""
    refused = error(refusing.post("/models", path=path), 403)
    assert (refused["type"], refused["field"]) == ("forbidden", "path")
    assert refused["message"] == "path leads out of the directory that checkpoints may be loaded from"
    assert names(refusing) == ["first"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"path": "nothing"}, "path"),
        ({"path": "notes.txt"}, "path"),
        ({"path": "."}, "path"),
        ({"path": "a\0b"}, "path"),
        ({"path": "x" * 3000}, "path"),
        ({"path": ""}, "path"),
        ({"path": 1}, "path"),
        ({}, "path"),
        ({"path": "second", "name": ""}, "name"),
        ({"path": "second", "name": "a/b"}, "name"),
        ({"path": "second", "aliases": ["?"]}, "aliases[0]"),
        ({"path": "second", "aliases": "a"}, "aliases"),
        ({"path": "second", "nam": "a"}, "nam"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_a_sentence(refusing, library, body, field) -> None:
    refused = error(refusing.post("/models", **body), 422)
    assert refused["field"] == field and str(library) not in json.dumps(refused)
    assert names(refusing) == ["first"] and refusing.client.get("/ready").status_code == 200


def test_a_network_that_yields_no_numbers_is_refused_when_it_is_loaded(refusing, library) -> None:
    """Its weights are sound, and its rotary positions are not."""
    damaged = library / "damaged"
    shutil.copytree(library / "first", damaged)
    (damaged / "topkapi.json").unlink()
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"rope_parameters": None, "rope_theta": 1e-300}))
    refused = refusing.post("/models", path="damaged")
    shutil.rmtree(damaged)
    assert refused.status_code == 422 and "NaN or infinite logits" in refused.json()["error"]["message"]
    assert names(refusing) == ["first"]


def test_a_link_within_the_directory_is_followed(open_server) -> None:
    assert open_server.post("/models", path="linked").json()["name"] == "linked"


def test_without_the_setting_no_request_changes_anything(serve, library) -> None:
    with serve(library / "first") as served:
        for response in (
            served.post("/models", path="second"),
            served.client.patch("/models/first", json={"default": True}),
            served.client.delete("/models/first"),
        ):
            assert "TOPKAPI_MODEL_DIRECTORY" in error(response, 403)["hint"]
        assert names(served) == ["first"]


def test_running_requests_of_an_unloaded_checkpoint_end_clearly(serve, library, monkeypatch) -> None:
    monkeypatch.setattr("topkapi.service.models.Engine", functools.partial(Engine, max_running=2))
    with serve(library / "first", library / "second", model_directory=library) as served:

        async def play() -> tuple[httpx.Response, httpx.Response, str, httpx.Response]:
            async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
                asked = [
                    asyncio.create_task(client.post("/generate", json=SLOW)),
                    asyncio.create_task(client.post("/generate", json=SLOW | {"prompt": ["a"] * 40})),
                    asyncio.create_task(client.post("/generate", json=SLOW | {"stream": True})),
                    asyncio.create_task(client.post("/score", json={"text": "word " * 20_000, "model": "first"})),
                ]
                other = asyncio.create_task(
                    client.post("/generate", json=SLOW | {"model": "second", "max_tokens": 300})
                )
                # All four have come: of the forty prompts as many as are handed on at once.
                engine = served.models.get("first").engine
                while engine.running + engine.waiting < 3 + AT_ONCE:
                    await asyncio.sleep(0.01)
                assert (await client.delete("/models/first")).status_code == 204
                one, many, stream, score = await asyncio.wait_for(asyncio.gather(*asked), 10)
                assert (await other).json()["usage"]["completion_tokens"] == 300
                return one, many, stream.text, score

        one, many, stream, score = asyncio.run(play())
        assert one.json()["outputs"][0]["finish_reason"] == "cancelled"
        assert "unloaded" in error(many, 503)["message"] and many.json()["error"]["type"] == "cancelled"
        assert json.loads(stream.strip().rpartition("data: ")[2])["outputs"][0]["finish_reason"] == "cancelled"
        assert error(score, 503)["type"] == "cancelled"


def test_an_unloaded_checkpoint_leaves_memory(open_server) -> None:
    open_server.post("/models", path="second")
    open_server.answer("/generate", model="second", prompt="a", max_tokens=3)
    network = weakref.ref(open_server.models.get("second").checkpoint.model)
    open_server.client.delete("/models/second")
    # Threads that have just done with it let go of it in a moment.
    end = time.monotonic() + 20
    while network() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    assert network() is None
    assert 'running{model_name="second"}' not in open_server.client.get("/metrics").text


def test_one_is_loaded_at_a_time_and_readiness_tells(serve, library, monkeypatch) -> None:
    go_on, begun = threading.Event(), threading.Event()

    def slowly(*arguments, **options):
        begun.set()
        assert go_on.wait(20)
        return load_checkpoint(*arguments, **options)

    monkeypatch.setattr("topkapi.service.models.load_checkpoint", slowly)
    with serve(model_directory=library) as served:
        assert served.client.get("/ready").json()["status"] == "no checkpoint is loaded"
        answers = []
        loading = threading.Thread(target=lambda: answers.append(served.post("/models", path="first")))
        loading.start()
        assert begun.wait(20)
        ready = served.client.get("/ready")
        assert (ready.status_code, ready.json()["status"], ready.json()["loading"]) == (503, "loading", "first")
        listed = served.client.get("/models").json()
        assert (listed["models"], listed["data"], listed["loading"]) == ([], [], "first")
        busy = error(served.post("/models", path="second"), 409)
        assert "first is being loaded" in busy["message"]
        assert error(served.client.delete("/models/first"), 409)
        go_on.set()
        loading.join(20)
        assert answers[0].status_code == 201
        ready = served.client.get("/ready")
        assert (ready.status_code, ready.json()["status"], ready.json()["loading"]) == (200, "ready", None)


def test_a_directory_that_cannot_be_read_is_said_so(tmp_path, monkeypatch) -> None:
    def unreadable(path: Path) -> Iterator[Path]:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "iterdir", unreadable)
    with pytest.raises(SettingsError, match=r"cannot be read: Permission denied"):
        default_checkpoints(Settings(checkpoints=tmp_path))


def test_what_lies_beside_checkpoints_does_not_matter(tmp_path, tiny_checkpoint, monkeypatch) -> None:
    library = tmp_path / "library"
    shutil.copytree(tiny_checkpoint("mine"), library / "mine")
    (library / "private").mkdir()
    (library / "loop").symlink_to("loop")
    is_file = Path.is_file

    def closed(path: Path) -> bool:
        if path.parent.name == "private":
            raise PermissionError(13, os.strerror(13))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", closed)
    assert default_checkpoints(Settings(checkpoints=library)) == [str(library / "mine")]
    assert len(Models(Settings())) == 0


def test_an_unloaded_checkpoint_leaves_memory_though_the_collector_was_not_to_look(
    tiny_checkpoint,
) -> None:
    models = Models(Settings.read())
    models.load(str(tiny_checkpoint("stays")))
    models.load(str(tiny_checkpoint("goes")))
    network = weakref.ref(models.get("goes").checkpoint.model)
    try:
        set_aside()
        models.unload("goes")
        assert network() is None
    finally:
        models.close()
        gc.unfreeze()


def test_a_checkpoint_tells_its_licence_and_card(serve, tiny_checkpoint) -> None:
    path = tiny_checkpoint("told")
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Told\n<b>as it is</b>\n")
    details = json.loads((path / "topkapi.json").read_text())
    (path / "topkapi.json").write_text(json.dumps(details | {"examples": ["hi", 5, "", "x" * 300, "Who are you?"]}))
    with serve(path, tiny_checkpoint("silent")) as served:
        told, silent = served.client.get("/models").json()["models"]
        assert (told["license"], told["card"]) == ("mit", True) and (silent["license"], silent["card"]) == (None, False)
        assert told["examples"] == ["hi", "Who are you?"] and silent["examples"] == []
        card = served.client.get("/models/told/card")
        assert card.text == "# Told\n<b>as it is</b>" and card.headers["content-type"].startswith("text/markdown")
        missing = served.client.get("/models/silent/card")
        assert missing.status_code == 404 and "no card" in missing.json()["error"]["message"]
