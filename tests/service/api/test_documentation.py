"""What docs/api.md prints is true, so is /openapi.json, and the server says what it has loaded."""

import json
import re
from pathlib import Path

from topkapi.model.decoding.parameters import PARAMETERS
from topkapi.service.settings import Settings

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "api.md").read_text()


def test_the_printed_error_is_what_comes(served) -> None:
    printed = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOCUMENT, re.S)]
    assert served.post("/generate", prompt="a", temprature=1).json() in printed


def test_every_setting_is_documented() -> None:
    for name, field in Settings.model_fields.items():
        row = re.search(rf"\| `TOPKAPI_{name.upper()}` \| (.*?) \|", DOCUMENT)
        assert row, name
        if isinstance(field.default, int | str) and name != "studio":
            assert row[1].lower() == str(field.default).lower()


def test_openapi_describes_every_route_and_parameter(served) -> None:
    schema = served.client.get("/openapi.json").json()
    assert set(schema["paths"]) >= {
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
    assert statuses >= {"200", "400", "404", "413", "415", "422", "429", "500", "503"}


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
    assert chat["parameters"] == 35_040
    assert 2 * 35_040 <= chat["memory"]["weights"] <= 4.1 * 35_040 and chat["memory"]["cache"] > 0
    assert (chat["license"], chat["card"]) == (None, False)
    assert served.client.get("/health").json()["status"] == "ok"
    assert served.client.get("/ready").json()["models"] == ["chat", "base"]

    def counted() -> float:
        pattern = r'^topkapi_generation_tokens_total{model_name="chat"(?:,replica="\w+")?} (\S+)$'
        return sum(map(float, re.findall(pattern, metrics(), re.MULTILINE)))

    def metrics() -> str:
        return served.client.get("/metrics").text

    before = counted()
    served.answer("/generate", prompt="a", max_tokens=5, ignore_end_token=True)
    assert counted() == before + 5
    assert 'topkapi_request_success_total{finished_reason="length",model_name="chat"' in metrics()


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
