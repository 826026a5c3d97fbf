"""deploy/ray_serve.py as Ray Serve runs it: its own proxies listen, before the same front and replicas."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.driver import free_port, is_ready
from topkapi.service.keys import Key, digest_of, line_of
from topkapi.service.quotas import Limits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[3]
START_SECONDS = 200
ADMIN, NARROW = "a" * 32, "n" * 32
LONG = {"prompt": "one", "max_tokens": 1500, "ignore_end_token": True, "stream": True}
CHAT = {"model": "deployed", "messages": [{"role": "user", "content": "hi"}]}


@dataclass
class Deployed:
    """What was deployed, and a client with a key that may do everything."""

    client: httpx.Client

    def post(self, path: str, /, key: str = ADMIN, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

    @property
    def metrics(self) -> str:
        return self.client.get("/metrics").text

    @property
    def generated(self) -> float:
        found = re.findall(r"^topkapi_generation_tokens_total{.*} (\S+)$", self.metrics, re.MULTILINE)
        return sum(map(float, found))

    @property
    def replicas(self) -> set[str]:
        return set(re.findall(r'replica="(\w+)"', self.metrics))


@pytest.fixture(scope="module")
def deployed(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """`serve run` with deploy/ray_serve.yaml: only port, keys, checkpoints and numbers are others."""
    pytest.importorskip("ray", reason="needs ray[serve]")
    place = tmp_path_factory.mktemp("deployed")
    narrow = Key("narrow", "use", digest_of(NARROW), Limits(tokens_per_minute=60))
    (place / "keys").write_text(f"{line_of(Key('root', 'admin', digest_of(ADMIN)))}\n{line_of(narrow)}\n")
    (place / "checkpoints").mkdir()
    tiny_checkpoint("deployed", context=2048).rename(place / "checkpoints" / "deployed")
    port = free_port()
    configuration = yaml.safe_load((ROOT / "deploy" / "ray_serve.yaml").read_text())
    configuration["http_options"]["port"] = port
    configuration["applications"][0]["runtime_env"]["env_vars"] = {
        "TOPKAPI_REPLICAS": "2", "TOPKAPI_THREADS": "1", "TOPKAPI_KEYS": str(place / "keys"),
        "TOPKAPI_CHECKPOINTS": str(place / "checkpoints"), "TOPKAPI_STUDIO": "false", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    (place / "ray_serve.yaml").write_text(yaml.safe_dump(configuration))
    program = Path(sys.executable).with_name("serve")
    # A Ray of its own, wherever another one may run.
    settings = {"RAY_ADDRESS": "local", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "run", place / "ray_serve.yaml"], cwd=ROOT, env=os.environ | settings, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            client.headers["Authorization"] = f"Bearer {ADMIN}"
            end = time.monotonic() + START_SECONDS
            while not is_ready(client):
                log_so_far = (place / "log").read_text(errors="replace")[-5000:]
                assert process.poll() is None and time.monotonic() < end, log_so_far
                time.sleep(0.5)
            yield Deployed(client)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def test_keys_hosts_sizes_and_limits_are_the_fronts(deployed: Deployed) -> None:
    assert deployed.post("/generate", key="tk-wrong", prompt="a").json()["error"]["type"] == "invalid_api_key"
    claude = deployed.post("/v1/messages", key="tk-wrong")
    assert (claude.status_code, claude.json()["type"]) == (401, "error")
    assert deployed.client.get("/models", headers={"Host": "evil.example"}).status_code == 421
    assert deployed.post("/models", path="x").status_code == 409
    assert deployed.client.get("/openapi.json").json()["security"] == [{"key": []}]
    large = deployed.client.post(
        "/generate", content=b" " * (32 * 2**20 + 1), headers={"Content-Type": "application/json"}
    )
    assert large.status_code == 413
    assert deployed.post("/generate", key=NARROW, prompt="a", max_tokens=50, ignore_end_token=True).status_code == 200
    refused = deployed.post("/generate", key=NARROW, prompt="the list of the names " * 30, max_tokens=1)
    assert refused.status_code == 429 and "60 tokens a minute" in refused.json()["error"]["message"]


def test_both_replicas_answer_the_same_under_the_name_that_was_given(deployed: Deployed) -> None:
    answers, names = set(), set()
    end = time.monotonic() + 60
    while len(names) < 2:
        assert time.monotonic() < end
        answer = deployed.post("/generate", prompt="one two", max_tokens=8, seed=3, ignore_end_token=True)
        names.add(answer.json()["id"].rpartition("-")[2])
        answers.add(answer.json()["outputs"][0]["text"])
        scored = deployed.post("/score", text="A list is a list").json()["results"]
        answers.add(f"scored {scored[0]['nll']}")
    assert len(answers) == 2 and names == deployed.replicas
    mine = deployed.client.get("/models", headers={"X-Request-Id": "mine"})
    assert mine.headers.get_list("X-Request-Id") == ["mine"]


def test_a_stream_comes_piece_by_piece_and_ends_with_who_leaves(deployed: Deployed) -> None:
    body = CHAT | {"stream": True, "max_tokens": 1500, "ignore_eos": True}
    before = deployed.generated
    with deployed.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
    end = time.monotonic() + 30
    while re.search(r"^topkapi_num_requests_running{.*} [^0]", deployed.metrics, re.MULTILINE):
        assert time.monotonic() < end, "it is computed on"
        time.sleep(0.05)
    assert 0 < deployed.generated - before < 1500
    whole = deployed.post("/v1/chat/completions", **CHAT | {"stream": True, "max_tokens": 5, "ignore_eos": True})
    assert whole.text.endswith("data: [DONE]\n\n")


def test_a_lost_stream_goes_on_where_it_was(deployed: Deployed) -> None:
    body = LONG | {"max_tokens": 40, "seed": 1}
    whole = deployed.post("/generate", **body).text.split("\n\n")
    third = whole[2].partition("\n")[0].removeprefix("id: ")
    for _ in range(4):
        again = deployed.client.get(f"/streams/{third.partition(':')[0]}", headers={"Last-Event-ID": third})
        assert again.text.split("\n\n") == whole[3:]


def test_a_replica_that_is_killed_takes_its_own_requests_alone(deployed: Deployed) -> None:
    ends: list[tuple[str, str]] = []
    begun = threading.Barrier(9)

    def read(seed: int) -> None:
        with deployed.client.stream("POST", "/generate", json=LONG | {"seed": seed}, timeout=120) as answer:
            lines = answer.iter_lines()
            replica = next(lines).rpartition(":")[0].rpartition("-")[2]
            begun.wait(60)
            events = [line for line in lines if line]
            ends.append((replica, f"{events[-2]} {json.loads(events[-1].removeprefix('data: ')).get('error', {})}"))

    before = deployed.replicas
    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for reader in readers:
        reader.start()
    begun.wait(60)
    listed = subprocess.run(["pgrep", "-f", "^ray::ServeReplica:topkapi:replicas"], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[0]), signal.SIGKILL)
    for reader in readers:
        reader.join(120)
    lost = {replica for replica, end in ends if "replica_lost" in end}
    assert len(lost) == 1 and len(ends) == 8
    assert all(end.startswith("event: done") for replica, end in ends if replica not in lost)
    assert deployed.post("/generate", prompt="a", max_tokens=1).status_code == 200
    end = time.monotonic() + 120
    while len(deployed.replicas) < 2:
        assert time.monotonic() < end, "no replica took the place of the one that was lost"
        time.sleep(0.5)
    assert deployed.replicas != before


def test_without_keys_it_is_not_deployed(tiny_checkpoint: Callable[..., Path]) -> None:
    pytest.importorskip("ray", reason="needs ray[serve]")
    command = [sys.executable, "-c", "import deploy.ray_serve"]
    environment = {"TOPKAPI_CHECKPOINTS": str(tiny_checkpoint("open").parent), "TOPKAPI_REPLICAS": "2"}
    refused = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert refused.returncode == 1 and "there are no keys" in refused.stderr
    kept = environment | {"TOPKAPI_INSECURE": "true", "TOPKAPI_MODEL_DIRECTORY": str(tiny_checkpoint("m").parent)}
    refused = subprocess.run(command, cwd=ROOT, env=os.environ | kept, capture_output=True, text=True)
    assert refused.returncode == 1 and "replicas keep" in refused.stderr
