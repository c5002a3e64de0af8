"""What Prometheus reads from ``/metrics``."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from detrkit.serving.batching import Times

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)

CONTENT_TYPE: str = CONTENT_TYPE_LATEST


class Metrics:
    """The counters of one server; each has its own, so that there can be several in a process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ours = {"registry": self._registry}
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "detrkit_requests", "Requests that were answered.", ["path", "status"], **ours
        )
        self._latency = Histogram(
            "detrkit_request_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            ["path"],
            buckets=_SECONDS,
            **ours,
        )
        self._stages = Histogram(
            "detrkit_stage_seconds",
            "Seconds that a request spent reading its image, waiting for the model, and in the model.",
            ["stage"],
            buckets=_SECONDS,
            **ours,
        )
        self._batches = Histogram(
            "detrkit_batch_images",
            "Images that went through the model together with the image of a request.",
            buckets=_IMAGES,
            **ours,
        )
        self._images = Counter("detrkit_images", "Images that were answered.", ["model"], **ours)
        self._pending = Gauge(
            "detrkit_pending_requests", "Requests that are accepted and not yet answered.", **ours
        )
        self._ready = Gauge("detrkit_ready", "1 while requests are accepted.", **ours)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts a request; ``path`` must be one of few."""
        self._requests.labels(path, str(status)).inc()
        self._latency.labels(path).observe(seconds)

    def done(self, model: str, times: Times) -> None:
        """Counts an image that went through a model."""
        self._images.labels(model).inc()
        self._batches.observe(times.batch)
        for stage in ("read", "wait", "model"):
            self._stages.labels(stage).observe(getattr(times, stage))

    def text(self, pending: int, ready: bool) -> bytes:
        """All of it in Prometheus' text format."""
        self._pending.set(pending)
        self._ready.set(int(ready))
        return bytes(generate_latest(self._registry))
