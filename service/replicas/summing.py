"""The metrics of many processes as those of one server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

AT_THE_FRONT = ("topkapi_requests_refused", "topkapi_key_requests", "topkapi_draining")
"""What is counted where requests come in, once for all replicas."""


class _Collected(CollectorRegistry):
    """What is collected already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        super().__init__()
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def together(front: CollectorRegistry, replicas: Mapping[str, str]) -> bytes:
    """The front's metrics and its replicas', those with a label `replica` each, as Prometheus reads them."""
    families = {family.name: family for family in front.collect()}
    for replica, text in replicas.items():
        for family in text_string_to_metric_families(text):
            if family.name.removesuffix("_created") in AT_THE_FRONT:
                continue
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [
                Sample(sample.name, {**sample.labels, "replica": replica}, sample.value) for sample in family.samples
            ]
    return generate_latest(_Collected(families.values()))
