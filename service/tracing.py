"""OpenTelemetry traces: a span for each request, and below it how long it waited, was read, and was written.

Where they are sent, under which name and how many of them, say OpenTelemetry's own variables
(`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`, …). Nothing of a request's text is in them.
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from topkapi.model.errors import SettingsError
from topkapi.service.version import VERSION

if TYPE_CHECKING:
    # The start checks what is needed before anything large is imported.
    from starlette.types import Scope

    from topkapi.service.calls import Call

FLUSH_MS = 2000
"""How long what is not sent yet may take at the end."""

PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def check_tracing() -> None:
    """Raise `SettingsError` where traces are wanted and can't be had."""
    # The packages share one namespace, which may be there without these.
    if not all(map(_is_there, ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"))):
        raise SettingsError("traces need OpenTelemetry", field="traces", hint="pip install 'topkapi[otel]'")
    protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        message = f"traces are sent by http/protobuf, and {protocol!r} is asked for"
        hint = "let OTEL_EXPORTER_OTLP_ENDPOINT name the collector's HTTP port (4318), and leave the protocol out"
        raise SettingsError(message, field="traces", hint=hint)


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def tracing_of_environment() -> Tracing:
    """What tells OpenTelemetry of requests, as its variables say. Raises `SettingsError` where it can't be had."""
    check_tracing()
    return Tracing(provider_of_environment())


def provider_of_environment() -> Any:
    """What makes spans and sends them in batches from a thread of its own, as the variables say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # The name that OTEL_SERVICE_NAME gives comes before this one.
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "topkapi"}
    provider = TracerProvider(resource=Resource.create({"service.version": VERSION} | named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """The spans of one application."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._trace = provider, trace
        self._tracer = provider.get_tracer("topkapi", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, call: Call, scope: Scope) -> Any:
        """The span of a request that has just come in, below the one that its `traceparent` names."""
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        given = {name: value for name, value in headers if name in ("traceparent", "tracestate")}
        span = self._tracer.start_span(
            _name(scope),
            context=self._propagator.extract(given),
            kind=self._trace.SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "topkapi.request_id": call.identifier},
        )
        carried: dict[str, str] = {}
        self._propagator.inject(carried, context=self._trace.set_span_in_context(span))
        call.trace = carried
        return span

    def end(self, span: Any, call: Call, status: int) -> None:
        """End the span of a request with what became of it, and tell of its work below it."""
        attributes = {
            "http.response.status_code": status or None,
            "error.type": call.refusal,
            "gen_ai.request.model": call.model,
            "gen_ai.usage.input_tokens": call.prompt_tokens or None,
            "gen_ai.usage.output_tokens": call.generated_tokens or None,
            "topkapi.key": None if call.key is None else call.key.name,
            "topkapi.queue_s": call.queue_s,
            "topkapi.first_token_s": call.first_token_s,
        }
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        context = self._trace.set_span_in_context(span)
        # What is measured by another clock than spans are told by.
        offset = time.time() - time.monotonic()
        for part in call.parts:
            at = part.ended - part.queue_s - part.prefill_s - part.decode_s + offset
            read = {"gen_ai.usage.input_tokens": part.read, "topkapi.cached_tokens": part.cached}
            for name, seconds, about in (
                ("queue", part.queue_s, {}),
                ("prefill", part.prefill_s, read),
                ("decode", part.decode_s, {"gen_ai.usage.output_tokens": part.generated}),
            ):
                below = self._tracer.start_span(name, context=context, start_time=int(at * 1e9), attributes=about)
                at += seconds
                below.end(int(at * 1e9))
        span.end()

    def close(self) -> None:
        """Send what is not sent yet, if that can be done soon."""
        self._provider.force_flush(FLUSH_MS)


def _name(scope: Scope) -> str:
    """The method and the route, of which there are few; an address may hold anything."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    routes = getattr(scope["app"].state, "api_routes", ()) if "app" in scope else ()
    route = next((route.path for route in routes if route.path_regex.match(path)), None)
    return f"{scope['method']} {route}" if route else scope["method"]
