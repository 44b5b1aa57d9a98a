"""Merge counts of several replicas for Prometheus. Imports nothing heavy, so the front process needs no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def merge(texts: Mapping[str, bytes]) -> bytes:
    """Merge the texts of several replicas, each sample with its replica's name."""
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            into.samples += [sample._replace(labels={**sample.labels, "replica": name}) for sample in family.samples]

    class Merged(Collector):
        """The merged samples, as prometheus_client asks for them."""

        def collect(self) -> Iterator[Metric]:
            return iter(families.values())

    registry = CollectorRegistry()
    registry.register(Merged())
    return generate_latest(registry)
