"""A served checkpoint is swapped for another one under traffic: no request is lost, and none is of both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.test_adapters import make_adapter
from topkapi.model.errors import SettingsError
from topkapi.service.following import all_followed
from topkapi.service.locations import check_followed
from topkapi.service.models import Models
from topkapi.service.settings import Settings

LONG = {"model": "first", "prompt": "Names are", "max_tokens": 100, "ignore_end_token": True, "seed": 1, "logprobs": 1}
SHORT = LONG | {"max_tokens": 8}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """Two checkpoints of one shape."""
    library = tmp_path_factory.mktemp("swapped")
    for seed, name in enumerate(("first", "second")):
        shutil.copytree(tiny_checkpoint(name, seed=seed, context=512), library / name)
    return library


def tokens(answer: dict[str, Any]) -> list[Any]:
    """With their log-probabilities: tiny networks often choose alike."""
    found: list[Any] = answer["outputs"]
    return found


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def test_no_request_is_lost_or_of_two_checkpoints(serve: Callable, library: Path) -> None:
    with serve(library / "first", library / "second", model_directory=library) as served:
        wanted = [
            {
                number: tokens(served.answer("/generate", **body | {"model": name}))
                for number, body in enumerate((SHORT, LONG))
            }
            for name in ("first", "second")
        ]
        assert served.client.delete("/models/second").status_code == 204
        found: list[tuple[int, list[Any]]] = []
        over = threading.Event()

        def ask(number: int) -> None:
            while not over.is_set():
                response = served.post("/generate", **(SHORT, LONG)[number])
                assert response.status_code == 200, response.text
                found.append((number, tokens(response.json())))

        threads = [threading.Thread(target=ask, args=(number % 2,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for name in ("second", "first", "second"):
            answered, expected = len(found), wanted[name == "first"]
            # Both kinds are answered by the one that is to be replaced.
            wait_for(lambda: all((kind, expected[kind]) in found[answered:] for kind in (0, 1)))  # noqa: B023
            assert served.post("/models", path=name, name="first", replace=True).status_code == 201
            # Who comes now is answered by the new one.
            assert tokens(served.answer("/generate", **SHORT)) == wanted[name == "second"][0]
        over.set()
        for thread in threads:
            thread.join(30)
        old, new = ([number for number, each in found if each == of[number]] for of in wanted)
        assert len(old) + len(new) == len(found) and set(old) == set(new) == {0, 1}
        wait_for(lambda: not served.models._leaving)


@pytest.mark.slow
def test_what_has_begun_ends_on_the_old_weights_though_it_was_long_on_its_way(serve: Callable, library: Path) -> None:
    """Somebody has the checkpoint in hand, and asks its engine only once another one has its name."""
    with serve(library / "first", model_directory=library) as served:
        expected = tokens(served.answer("/generate", **LONG))
        in_hand = [served.models.get("first")]
        network, engine = weakref.ref(in_hand[0].checkpoint.model), weakref.ref(in_hand[0].engine)
        answers: list[dict[str, Any]] = []
        asking = threading.Thread(target=lambda: answers.append(served.answer("/generate", **LONG)))
        asking.start()
        wait_for(lambda: in_hand[0].engine.running or answers)
        served.models.load_as("first", library / "second", replace=True)
        assert served.models.get("first") is not in_hand[0]
        asking.join(30)
        assert tokens(answers[0]) == expected != tokens(served.answer("/generate", **LONG))
        time.sleep(0.3)
        assert not in_hand[0].engine.stopped
        in_hand.clear()
        wait_for(lambda: engine() is None and network() is None)


def test_the_old_one_stays_where_the_new_one_is_damaged(serve: Callable, library: Path) -> None:
    broken = shutil.copytree(library / "second", library / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    with serve(library / "first", model_directory=library) as served:
        expected = tokens(served.answer("/generate", **SHORT))
        refused = served.post("/models", path="broken", name="first", replace=True)
        assert refused.status_code == 422
        assert tokens(served.answer("/generate", **SHORT)) == expected
        said = served.client.get("/models/first").json()["reload_error"]
        assert "broken" in said and str(library) not in said
        assert served.post("/models", path="second", name="first", replace=True).status_code == 201
        assert served.client.get("/models/first").json()["reload_error"] is None
    shutil.rmtree(broken)


def test_a_stopping_server_waits_for_what_runs_on_a_replaced_one(library: Path) -> None:
    models = Models(Settings.read())
    before = models.load(str(library / "first"))
    models.load_as("first", library / "second", replace=True)
    assert not models.stopped and models.idle
    models.close()
    assert models.stopped and before.engine.stopped


# Following


@pytest.fixture
def run(tmp_path: Path, library: Path) -> Path:
    """A training run with two saves, the earlier of which is the best."""
    run = tmp_path / "run"
    for step, name in ((10, "first"), (20, "second")):
        shutil.copytree(library / name, run / "checkpoints" / f"step-{step}")
    (run / "best").symlink_to("checkpoints/step-10")
    return run


def point(run: Path, step: int) -> None:
    (run / "new").symlink_to(f"checkpoints/step-{step}")
    os.replace(run / "new", run / "best")


@pytest.fixture
def models() -> Iterator[Models]:
    models = Models(Settings.read())
    yield models
    models.close()


def test_the_best_of_a_run_is_followed(models: Models, run: Path) -> None:
    location = str(run / "best")
    (link,) = all_followed(models, [location])
    served = models.load(location)
    assert served.name == "run-best" and not link.look()
    point(run, 20)
    assert link.look() and not link.look()
    assert models.get("run-best") is not served
    assert models.get("run-best").checkpoint.path == run / "checkpoints" / "step-20"
    shutil.rmtree(run / "checkpoints" / "step-10")
    (run / "best").unlink()
    assert not link.look(), "while it leads nowhere what is served stays"


def test_a_damaged_save_is_told_and_the_one_after_it_taken(models: Models, run: Path) -> None:
    (link,) = all_followed(models, [str(run / "best")])
    served = models.load(str(run / "best"))
    weights = run / "checkpoints" / "step-20" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    point(run, 20)
    assert not link.look()
    assert models.get("run-best") is served and "model.safetensors" in models.failures["run-best"]
    shutil.copytree(run / "checkpoints" / "step-20", run / "checkpoints" / "step-30")
    (run / "checkpoints" / "step-30" / "model.safetensors").write_bytes(whole)
    point(run, 30)
    assert link.look() and not models.failures


def test_what_was_unloaded_is_not_brought_back(models: Models, run: Path) -> None:
    (link,) = all_followed(models, [str(run / "best")])
    models.load(str(run / "best"))
    models.unload("run-best")
    point(run, 20)
    link.look()
    assert not len(models)


def test_an_adapter_s_run_is_followed_too(models: Models, library: Path, tmp_path: Path) -> None:
    run = tmp_path / "tuned"
    for step in (10, 20):
        make_adapter(run / "checkpoints" / f"step-{step}", library / "first", step)
    (run / "best").symlink_to("checkpoints/step-10")
    models.settings = Settings.read(adapters=f"tuned={run / 'best'}")
    (link,) = all_followed(models, [str(library / "first")])
    models.load(str(library / "first"))
    models.load_adapter("tuned", run / "best")
    before = models.adapters.get("tuned")
    point(run, 20)
    assert link.look() and models.adapters.get("tuned") is not before


def test_there_must_be_something_to_follow(library: Path, run: Path) -> None:
    with pytest.raises(SettingsError, match="none of what is served can be followed"):
        check_followed([str(library / "first")], Settings.read(follow=True))
    check_followed([str(run / "best")], Settings.read(follow=True))


@pytest.mark.slow
def test_a_server_follows_within_seconds(run: Path, tmp_path: Path) -> None:
    """As an operator starts it."""
    command = [sys.executable, "-c", "import sys; from topkapi.service.commands.cli import main; sys.exit(main())"]
    options = ["serve", str(run / "best"), "--follow", "--port", "0", "--no-studio"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(line.split()[2] for line in process.stdout if line.startswith("Ready at"))
        with httpx.Client(base_url=url, timeout=30) as client:
            body = SHORT | {"model": "run-best"}
            before = client.post("/generate", json=body).json()["outputs"]
            point(run, 20)
            try:
                wait_for(lambda: client.post("/generate", json=body).json()["outputs"] != before, 30)
            finally:
                process.terminate()
        assert process.wait(30) == 0
