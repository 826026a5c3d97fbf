"""OpenTelemetry traces: what is told of a request, below whose span, and that nothing of its text is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from topkapi.model.errors import SettingsError
from topkapi.service import tracing
from topkapi.service.commands.cli import main

TRACE = "0af7651916cd43dd8448eb211c80319c"
ABOVE = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """What has been told so far, by servers that trace, into memory."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    memory = InMemorySpanExporter()

    def provider() -> Any:
        made = sdk.TracerProvider()
        made.add_span_processor(SimpleSpanProcessor(memory))
        return made

    monkeypatch.setattr(tracing, "provider_of_environment", provider)
    monkeypatch.setattr(tracing, "check_tracing", lambda: None)
    return lambda: list(memory.get_finished_spans())


def test_a_request_and_its_parts_are_told_of(spans, serve, tiny_checkpoint: Callable[..., Path]) -> None:
    with serve(tiny_checkpoint("traced"), traces=True) as served:
        headers = {"traceparent": ABOVE, "X-Request-Id": "mine"}
        secret = {"prompt": "violets", "max_tokens": 5, "ignore_end_token": True, "n": 2, "seed": 1}
        answer = served.client.post("/generate", json=secret, headers=headers)
        served.client.get("/ready")
        served.client.post("/generate?violets", json={"prompt": 1}, headers=headers)
    # A request is told of once its answer is out.
    found = spans()
    refused = found[-1]
    assert (refused.name, refused.attributes["error.type"]) == ("POST /generate", "invalid_request")
    queue, prefill, decode, request = found[:-1]
    assert [span.name for span in found[:-1]] == ["queue", "prefill", "decode", "POST /generate"]
    assert f"{request.context.trace_id:032x}" == TRACE and f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert {span.parent.span_id for span in (queue, prefill, decode)} == {request.context.span_id}
    usage = answer.json()["usage"]
    expected = {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "topkapi.request_id": "mine",
        "gen_ai.request.model": "traced",
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 10,
    }
    assert expected.items() <= dict(request.attributes).items()
    assert request.start_time <= queue.start_time + 1_000_000 and decode.end_time <= request.end_time + 1_000_000
    assert queue.end_time == prefill.start_time and prefill.end_time == decode.start_time
    assert decode.attributes["gen_ai.usage.output_tokens"] == 10
    assert "violets" not in "".join(span.to_json() for span in found)


def test_without_the_extra_a_start_says_what_to_install(monkeypatch, capsys, tiny_checkpoint) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    assert main(["serve", str(tiny_checkpoint("untraced")), "--traces", "--port", "0"]) == 2
    assert "topkapi[otel]" in capsys.readouterr().err


def test_a_protocol_that_is_not_spoken_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda name: True)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(SettingsError, match="grpc"):
        tracing.check_tracing()
