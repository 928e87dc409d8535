"""A collector: takes spans over OTLP/gRPC and keeps them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from hasgpu_runtime.trace_catalogue import SeenSpan
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc


@dataclass(frozen=True)
class Span:
    """What the tests look at."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    kind: str = ""
    links: tuple[str, ...] = ()
    """Ids of the spans linked."""
    resource: dict[str, Any] = field(default_factory=dict)

    @property
    def seen(self) -> SeenSpan:
        """As the catalogue's checks take it."""
        return SeenSpan(self.name, self.service, self.span_id, self.parent_id, tuple(self.attributes))


def plain(value: Any) -> Any:
    """An attribute's value as Python has it."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


def plain_attributes(attributes: Iterable[Any]) -> dict[str, Any]:
    return {item.key: plain(item.value) for item in attributes}


class OtlpSink(otlp_grpc.TraceServiceServicer):
    """Serves on a free port of the loopback address."""

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
        otlp_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(address)
        self._server.start()

    def Export(self, request: otlp.ExportTraceServiceRequest, context: Any) -> otlp.ExportTraceServiceResponse:
        for resource_spans in request.resource_spans:
            resource = plain_attributes(resource_spans.resource.attributes)
            for scope in resource_spans.scope_spans:
                for span in scope.spans:
                    kept = Span(
                        span.name,
                        str(resource.get("service.name", "")),
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        plain_attributes(span.attributes),
                        span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                        tuple(link.span_id.hex() for link in span.links),
                        resource,
                    )
                    with self._lock:
                        self._spans.append(kept)
        return otlp.ExportTraceServiceResponse()

    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def traces(self) -> dict[str, list[Span]]:
        """Spans by trace, in order of their start."""
        found: dict[str, list[Span]] = {}
        for span in sorted(self.spans(), key=lambda s: s.start_ns):
            found.setdefault(span.trace_id, []).append(span)
        return found

    def stop(self) -> None:
        self._server.stop(None).wait()
