"""Reading what a service exposes on /metrics."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.support.cluster_sched import Process

# What a Prometheus asks for; a service may answer in another of these formats than to nobody in particular.
PROMETHEUS_ACCEPTS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


def scrape(url: str, token: str = "") -> str:
    """The text behind `url`."""
    request = urllib.request.Request(url, headers={"accept": PROMETHEUS_ACCEPTS})
    if token:
        request.add_header("authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=30) as reply:
        return str(reply.read().decode())


def worker_url(worker: Process) -> str:
    """Where a worker of a `cluster` serves its metrics."""
    arguments = worker.popen.args
    assert isinstance(arguments, list)
    return f"http://127.0.0.1:{arguments[arguments.index('--metrics-port') + 1]}/metrics"


def samples(text: str, name: str, **labels: str) -> Iterator[Sample]:
    """The samples of this full name that have these labels."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample


def total(text: str, name: str, **labels: str) -> float:
    """Their sum; 0 where there are none."""
    return sum(sample.value for sample in samples(text, name, **labels))
