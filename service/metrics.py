"""Prometheus metrics, under the stems that vLLM's dashboards use and the prefix `topkapi_`.

One registry per application and one `ModelMetrics` per loaded checkpoint, so that two applications in a process (as in
tests) never share a counter.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
LENGTH_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Every metric of one application; labelled by the name of the checkpoint."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["model_name"]
        self.running = Gauge("topkapi_num_requests_running", "Requests being computed", labels, registry=self.registry)
        self.waiting = Gauge("topkapi_num_requests_waiting", "Requests in the queue", labels, registry=self.registry)
        self.healthy = Gauge(
            "topkapi_engine_healthy", "1 while the engine computes, 0 while it is broken down or hangs", labels,
            registry=self.registry,
        )  # fmt: skip
        self.restarts = Gauge(
            "topkapi_engine_restarts", "Times the engine has begun anew since the checkpoint was loaded", labels,
            registry=self.registry,
        )  # fmt: skip
        self.prompt = Counter("topkapi_prompt_tokens", "Prompt tokens read", labels, registry=self.registry)
        self.cached = Counter(
            "topkapi_prefix_cache_hits", "Prompt tokens not computed again", labels, registry=self.registry
        )
        self.generated = Counter("topkapi_generation_tokens", "Tokens generated", labels, registry=self.registry)
        self.success = Counter(
            "topkapi_request_success",
            "Sequences finished, by reason",
            [*labels, "finished_reason"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "topkapi_time_to_first_token_seconds", "From submission to the first token", labels,
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.inter_token = Histogram(
            "topkapi_inter_token_latency_seconds", "Between two tokens of a sequence", labels,
            buckets=TOKEN_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.latency = Histogram(
            "topkapi_e2e_request_latency_seconds", "From submission to the end", labels,
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.queue_time = Histogram(
            "topkapi_request_queue_time_seconds", "From submission to the first step", labels,
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.prompt_length = Histogram(
            "topkapi_request_prompt_tokens", "Prompt tokens of a request", labels,
            buckets=LENGTH_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.generation_length = Histogram(
            "topkapi_request_generation_tokens", "Tokens generated for a request", labels,
            buckets=LENGTH_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.prefill_time = Histogram(
            "topkapi_request_prefill_time_seconds", "From the first step to the first token", labels,
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.decode_time = Histogram(
            "topkapi_request_decode_time_seconds", "From the first token to the end", labels,
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.cache_usage = Gauge(
            "topkapi_kv_cache_usage_perc", "Part of the places for sequences that are in use, from 0 to 1", labels,
            registry=self.registry,
        )  # fmt: skip
        self.refused = Counter(
            "topkapi_requests_refused", "Requests answered with an error, by its kind", ["reason"],
            registry=self.registry,
        )  # fmt: skip
        self.key_requests = Counter(
            "topkapi_key_requests", "Requests that came with a key", ["key"], registry=self.registry
        )
        self.key_tokens = Counter(
            "topkapi_key_tokens", "Tokens read and generated for a key", ["key", "kind"], registry=self.registry
        )
        self.draining = Gauge(
            "topkapi_draining", "1 while the server finishes what runs and takes nothing new", registry=self.registry
        )


class Reporting(Protocol):
    """What an engine says of itself."""

    @property
    def running(self) -> int:
        """Jobs being worked on."""
        ...

    @property
    def waiting(self) -> int:
        """Jobs queued."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether it computes what it is given."""
        ...

    @property
    def restarts(self) -> int:
        """How often it has begun anew."""
        ...

    @property
    def usage(self) -> float:
        """The part of its room for sequences that is taken."""
        ...


class ModelMetrics:
    """The metrics of one loaded checkpoint."""

    def __init__(self, metrics: Metrics, name: str, engine: Reporting) -> None:
        self._gauges = (metrics.running, metrics.waiting, metrics.healthy, metrics.restarts, metrics.cache_usage)
        metrics.running.labels(name).set_function(lambda: engine.running)
        metrics.waiting.labels(name).set_function(lambda: engine.waiting)
        metrics.healthy.labels(name).set_function(lambda: engine.healthy)
        metrics.restarts.labels(name).set_function(lambda: engine.restarts)
        metrics.cache_usage.labels(name).set_function(lambda: engine.usage)
        self.prompt = metrics.prompt.labels(name)
        self.cached = metrics.cached.labels(name)
        self.generated = metrics.generated.labels(name)
        self.first_token = metrics.first_token.labels(name)
        self.inter_token = metrics.inter_token.labels(name)
        self.latency = metrics.latency.labels(name)
        self.queue_time = metrics.queue_time.labels(name)
        self.prompt_length = metrics.prompt_length.labels(name)
        self.generation_length = metrics.generation_length.labels(name)
        self.prefill_time = metrics.prefill_time.labels(name)
        self.decode_time = metrics.decode_time.labels(name)
        self.finished = partial(metrics.success.labels, name)
        """The counter of the sequences that have finished for the reason that it is called with."""
        self._name, self._key_tokens = name, metrics.key_tokens

    def used(self, key: str, kind: str, tokens: int) -> None:
        """Count tokens that were read (`prompt`) or generated (`generation`) for a key."""
        self._key_tokens.labels(key, kind).inc(tokens)

    def forget(self) -> None:
        """Report no more what the checkpoint is doing, and hold on to it no longer. What it has done stays counted."""
        for gauge in self._gauges:
            gauge.remove(self._name)
