"""What a server counts, in the text form of Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from megatron_carve.serving.worker import Worker

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters and gauges of one server, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, worker: Worker) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        prefix = "megatron_carve"
        self.requests = Counter(
            f"{prefix}_requests", "HTTP requests by path and status; 499: the client went away.", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(f"{prefix}_prompt_tokens", "Tokens of prompts accepted.", registry=registry)
        self.tokens = Counter(f"{prefix}_completion_tokens", "Tokens made for clients.", registry=registry)
        self.first = Histogram(
            f"{prefix}_first_token_seconds", "From a request to its first tokens.", buckets=SECONDS, registry=registry
        )
        self.whole = Histogram(
            f"{prefix}_request_seconds", "From a completion request to its end.", buckets=SECONDS, registry=registry
        )
        running = Gauge(f"{prefix}_choices_running", "Choices that the engine runs.", registry=registry)
        running.set_function(lambda: min(worker.running, worker.max_requests))
        waiting = Gauge(f"{prefix}_choices_waiting", "Choices that wait for the engine.", registry=registry)
        waiting.set_function(lambda: max(worker.running - worker.max_requests, 0))

    def text(self) -> bytes:
        return generate_latest(self._registry)
