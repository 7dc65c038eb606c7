"""The span of a request at the gateway: the root of its trace, or a child of what the client sent.

Attributes are OpenTelemetry's for generative AI, and vLLM's for latencies. They are counts, names and
parameters, never text: also an error's message may quote what a client wrote, so only its kind and field are
told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pagoda.tracing import Tracing

if TYPE_CHECKING:
    from gateway_svc.gateway import Call
    from gateway_svc.generation import Job

_COUNTS = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "ttft_s": "gen_ai.latency.time_to_first_token",
    "e2e_s": "gen_ai.latency.e2e",
}
_PARAMETERS = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "max_tokens": "gen_ai.request.max_tokens",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
}


class Spans:
    """Begins a call's span and ends it with what came of the call."""

    def __init__(self, tracing: Tracing, model: str) -> None:
        self._tracing = tracing
        self._model = model

    def begin(self, call: Call, operation: str, parent: Mapping[str, str]) -> None:
        """A call has arrived; `parent` is what it says of a trace."""
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "pagoda",
            "gen_ai.request.model": self._model,
            "gen_ai.request.id": call.request_id,
            "gen_ai.request.stream": call.stream,
            **(
                {"http.request.method": "POST", "http.route": call.route}
                if call.route.startswith("/")
                else {"rpc.system": "grpc", "rpc.method": call.route}
            ),
        }
        name = f"{operation} {self._model}"
        call.span = self._tracing.begin(name, parent, attributes, call.arrived_at, server=True)

    def end(self, call: Call, job: Job | None, summary: Mapping[str, Any]) -> None:
        """A call is over; `summary` is its line in the log."""
        if call.span is None:
            return
        span, call.span = call.span, None
        if not span.is_recording():
            return
        attributes: dict[str, Any] = {
            name: summary[key] for key, name in _COUNTS.items() if summary.get(key) is not None
        }
        if job is not None and job.generations:
            sampling = job.generations[0].spec.sampling
            attributes |= {
                name: getattr(sampling, field)
                for field, name in _PARAMETERS.items()
                if sampling.HasField(field)  # type: ignore[arg-type]
            }
            attributes["gen_ai.request.choice.count"] = job.generations[0].spec.num_results
            attributes["gen_ai.usage.num_sequences"] = len(job.samples)
            reasons = [reason for reason in summary["finish_reasons"] if reason]
            attributes["gen_ai.response.finish_reasons"] = reasons
            attributes["gen_ai.response.model"] = self._model
        status = summary["status"]
        if status != "ok":
            attributes["error.type"] = status
        if field := summary.get("field"):
            attributes["pagoda.error.field"] = field
        self._tracing.finish(span, attributes, "" if status == "ok" else status)

    def fault(self, call: Call) -> None:
        """A bug ended the call, and nothing else ended its span."""
        if call.span is not None:
            span, call.span = call.span, None
            self._tracing.finish(span, {"error.type": "internal"}, "internal")
