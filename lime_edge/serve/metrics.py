"""What Prometheus is told: requests, tokens, the queue, latency, and each expert's share."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

PREFIX = "lime_edge"
FAST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds to a first token
SLOW = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds of a whole answer

disable_created_metrics()  # a second series for each, which says when it was first counted


class Metrics:
    """The numbers of one server. `render` writes them as Prometheus reads them."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def count(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", told, labels, registry=registry)

        self.requests = count("http_requests", "HTTP requests, by route and status", "route", "status")
        self.prompt_tokens = count("prompt_tokens", "tokens of prompts that were taken", "expert")
        self.kept_tokens = count("kept_tokens", "tokens of prompts that did not have to be read again", "expert")
        self.answer_tokens = count("generated_tokens", "tokens that were generated", "expert")
        self.answers = count("answers", "answers by expert and by what ended them", "expert", "reason")
        self.refused = count("refused", "requests that found the queue full")
        self.failures = count("engine_failures", "times that the engine failed while answers ran")
        self.first_token = Histogram(
            f"{PREFIX}_first_token_seconds",
            "from the queue to the first token",
            buckets=FAST,
            registry=registry,
        )
        self.seconds = Histogram(
            f"{PREFIX}_answer_seconds",
            "from the queue to the end of an answer",
            buckets=SLOW,
            registry=registry,
        )

    def watch(self, name: str, told: str, read: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        Gauge(f"{PREFIX}_{name}", told, registry=self._registry).set_function(read)

    def render(self) -> bytes:
        """All of them, in the text format 0.0.4."""
        return generate_latest(self._registry)
