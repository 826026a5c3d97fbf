"""docs/extending.md's dialect, taken from that page: one file and one line make it answer, stream, refuse and fail."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from starlette.testclient import TestClient

from tests.extending import examples
from tests.service.api.tgi.test_routes import fails_after
from tests.tiny import run_by
from topkapi.service.app import create_app
from topkapi.service.models import Models
from topkapi.service.settings import Settings


def module(name: str, code: str, folder: Path) -> ModuleType:
    """Code as the module that it would be as a file."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Callable[..., Path]) -> Iterator[Models]:
    loaded = Models(Settings.read(port=0, studio=False))
    loaded.load(str(tiny_checkpoint("parrot", context=64)))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def client(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    file, line = examples("A dialect")
    assert line.count("\n") == 1, "a dialect is one file and one line"
    folder = tmp_path_factory.mktemp("dialect")
    module("topkapi.service.api.parrot", file, folder)
    imports = "from topkapi.service.api import parrot\nfrom topkapi.service.api.http.registration import register\n"
    app = create_app(models, models.settings)
    module("with_parrot", f"{imports}\n\ndef add(app, models):\n    {line}", folder).add(app, models)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client
    del sys.modules["topkapi.service.api.parrot"], sys.modules["with_parrot"]


def events(response: httpx.Response) -> list[tuple[str, dict]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", response.text)
    return [(name, json.loads(data)) for name, data in found]


BODY = {"say": "Names are", "max_new_tokens": 8, "seed": 5}


def test_it_answers_whole_and_word_by_word_alike(client: TestClient) -> None:
    whole = client.post("/parrot", json=BODY).json()
    assert set(whole) == {"said", "tired"} and whole["said"]
    *words, (last, told) = events(client.post("/parrot", json=BODY | {"stream": True}))
    assert (last, told) == ("end", whole)
    assert {name for name, _ in words} == {"word"} and "".join(word["said"] for _, word in words) == whole["said"]


@pytest.mark.parametrize(
    "body,status,about",
    [
        ({"say": ""}, 422, "say"),
        ({"say": "hi", "max_new_tokens": "many"}, 422, "max_new_tokens"),
        ({"say": "hi", "seed": -5}, 422, "seed"),
        ({"say": "hello " * 300}, 422, "say"),
        ({"say": "hi", "mood": "good"}, 422, "mood"),
    ],
)
def test_it_refuses_in_its_own_words_and_names_the_field(
    client: TestClient, body: dict, status: int, about: str
) -> None:
    for stream in (False, True):
        response = client.post("/parrot", json=body | {"stream": stream})
        assert response.status_code == status, response.text
        assert response.json()["about"] == about and about in response.json()["sorry"]


def test_what_no_route_takes_is_told_in_its_words_too(client: TestClient) -> None:
    assert "no route" in client.post("/parrot/feathers", json={}).json()["sorry"]
    assert "does not answer GET" in client.get("/parrot").json()["sorry"]
    assert "JSON" in client.post("/parrot", content=b"hi", headers={"Content-Type": "text/plain"}).json()["sorry"]
    assert set(client.post("/generate", json={}).json()) == {"error"}, "other dialects stay as they are"


def test_a_failed_step_ends_the_answer_and_the_stream(
    client: TestClient, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = models.get().engine.network
    run = network.run
    run_by(monkeypatch, network, fails_after(0, run))
    failed = client.post("/parrot", json=BODY)
    assert failed.status_code == 500 and failed.json()["sorry"]
    run_by(monkeypatch, network, fails_after(5, run))
    *_, (last, told) = events(client.post("/parrot", json=BODY | {"stream": True}))
    assert last == "sorry" and "made up" in told["sorry"]
    run_by(monkeypatch, network, run)
    assert client.post("/parrot", json=BODY).status_code == 200


def test_it_is_described_with_the_others(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/parrot"]["post"]
    assert operation["tags"] == ["parrot"] and set(operation["responses"]) >= {"200", "422", "429"}
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
