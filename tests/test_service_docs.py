"""docs/api.md runs as printed, /openapi.json is true, and the server says what it has loaded."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from model.decoding.parameters import PARAMETERS
from service.settings import Settings

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "api.md").read_text()
REQUESTS = [line for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.S) for line in re.split(r"\n(?=curl)", block)]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: re.search(r"8000(/\w+)", request)[1])
def test_every_request_of_the_document_runs_as_printed(served, request_) -> None:
    expected = re.search(r"# (\d+)$", request_.strip())
    command = request_.replace("http://127.0.0.1:8000", served.url).replace(
        "curl -s", r"curl -w '\n%{http_code}' -s", 1
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    body, status = done.stdout.rsplit("\n", 1)
    assert status == (expected[1] if expected else "200"), body
    if "/metrics" in request_:
        assert "topkapi_num_requests_running" in body
    elif '"stream"' in request_:
        assert body.startswith("event: token\ndata: {") and "\nevent: done\ndata: {" in body
    else:
        assert json.loads(body)


def test_the_printed_error_is_what_comes(served) -> None:
    (printed,) = re.findall(r"```json\n(.*?)```", DOCUMENT, re.S)
    assert served.post("/generate", prompt="a", temprature=1).json() == json.loads(printed)


def test_every_setting_is_documented() -> None:
    for name, field in Settings.model_fields.items():
        row = re.search(rf"\| `TOPKAPI_{name.upper()}` \| (.*?) \|", DOCUMENT)
        assert row, name
        if isinstance(field.default, int | str) and name != "studio":
            assert row[1].lower() == str(field.default).lower()


def test_openapi_describes_every_route_and_parameter(served) -> None:
    schema = served.client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/generate", "/score", "/tokenize", "/detokenize", "/models", "/health", "/ready", "/metrics",
    }  # fmt: skip
    generate = schema["components"]["schemas"]["GenerateRequest"]
    assert generate["additionalProperties"] is False
    for parameter in PARAMETERS:
        described = generate["properties"][parameter.name]
        assert parameter.meaning in described["description"]
        if parameter.kind in ("integer", "number"):
            number = described["anyOf"][0]
            assert (number.get("minimum"), number.get("maximum")) == (parameter.minimum, parameter.maximum)
    statuses = set(schema["paths"]["/generate"]["post"]["responses"])
    assert statuses == {"200", "400", "404", "413", "415", "422", "429", "500"}


def test_every_reference_in_openapi_resolves(served) -> None:
    text = served.client.get("/openapi.json").text
    known = json.loads(text)["components"]["schemas"]
    references = set(re.findall(r'"\$ref":\s*"#/components/schemas/([^"]+)"', text))
    assert references and references <= known.keys()


def test_the_documentation_page_loads_its_scripts_from_here(served) -> None:
    page = served.client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources and all(source.startswith("/") for source in sources)
    for source in sources:
        assert served.client.get(source).status_code == 200


def test_models_health_and_metrics(served) -> None:
    chat, base = served.client.get("/models").json()["models"]
    assert (chat["name"], chat["default"], chat["chat"], chat["context_length"]) == ("chat", True, True, 128)
    assert (base["name"], base["default"], base["chat"], base["context_length"]) == ("base", False, False, 2048)
    assert chat["parameters"] == sum(p.numel() for p in served.models.get().checkpoint.model.parameters())
    assert served.client.get("/health").json()["status"] == "ok"
    assert served.client.get("/ready").json()["models"] == ["chat", "base"]

    def counted() -> float:
        return float(re.search(r'topkapi_generation_tokens_total{model_name="chat"} (\S+)', metrics())[1])

    def metrics() -> str:
        return served.client.get("/metrics").text

    before = counted()
    served.answer("/generate", prompt="a", max_tokens=5, ignore_end_token=True)
    assert counted() == before + 5
    assert 'topkapi_request_success_total{finished_reason="length",model_name="chat"}' in metrics()


def test_other_origins_may_call_only_if_allowed(serve, tiny_checkpoint) -> None:
    asked = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    with serve(tiny_checkpoint("closed")) as served:
        assert "access-control-allow-origin" not in served.client.options("/generate", headers=asked).headers
    with serve(tiny_checkpoint("open"), cors_origins="http://a.example") as served:
        allowed = served.client.options("/generate", headers=asked).headers["access-control-allow-origin"]
        assert allowed == "http://a.example"


def test_without_a_checkpoint_the_server_is_not_ready(serve) -> None:
    with serve() as served:
        assert served.client.get("/health").status_code == 200
        assert served.client.get("/ready").status_code == 503
        assert served.post("/generate", prompt="a").status_code == 404
