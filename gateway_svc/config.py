"""The gateway's configuration: frozen, validated once, at its start."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pagoda.models import EMBEDDED_MODEL, served_name
from pagoda.settings import ServiceSettings, check_listen


class GatewaySettings(ServiceSettings):
    """Flags, variables (`PAGODA_GATEWAY_*`) and the `[gateway]` section of the configuration file."""

    section: ClassVar[str] = "gateway"

    scheduler: str = Field("127.0.0.1:50051", description="host:port of the scheduler.")
    model: str = Field(EMBEDDED_MODEL, description="Name or path whose tokenizer and chat template are used.")
    served_model_name: str = Field("", description="Name that clients ask for; default: the model's own.")
    chat_template: str = Field("", description="File with a chat template; default: the model's own.")
    tool_call_parser: Literal["auto", "hermes", "llama3", "mistral", "json"] = Field(
        "auto", description="How the model writes calls of tools; auto asks its chat template."
    )
    http_host: str = Field("127.0.0.1", description="Address of the HTTP server.")
    http_port: int = Field(8000, ge=0, le=65535, description="Port of the HTTP server; 0 takes any.")
    grpc_host: str = Field("127.0.0.1", description="Address of the gRPC server.")
    grpc_port: int = Field(8001, ge=0, le=65535, description="Port of the gRPC server; 0 takes any.")
    metrics_host: str = Field("127.0.0.1", description="Address of /metrics.")
    metrics_port: int = Field(9400, ge=0, le=65535, description="Port of /metrics; 0 takes any.")
    processes: int = Field(1, ge=1, le=64, description="Processes that share the ports.")
    max_body_mb: float = Field(8, gt=0, description="Largest HTTP body or gRPC message.")
    max_requests: int = Field(4096, ge=1, description="Prompts in flight in one process; more get 429.")
    tokenizer_threads: int = Field(2, ge=1, le=64, description="Threads that tokenize and render templates.")
    grace_s: float = Field(5, ge=0, description="How long running requests may go on after SIGTERM.")
    trust_request_chat_template: bool = Field(
        False, description="Let requests bring a chat template, which is a program."
    )

    @property
    def served_name(self) -> str:
        """The name that clients ask for."""
        return self.served_model_name or served_name(self.model)

    @property
    def max_body_bytes(self) -> int:
        """Largest HTTP body or gRPC message, in bytes."""
        return int(self.max_body_mb * 1_000_000)

    def check(self) -> None:
        """Refuse addresses that strangers can reach. Raises SystemExit."""
        for name, host, port in (
            ("--http-host", self.http_host, self.http_port),
            ("--grpc-host", self.grpc_host, self.grpc_port),
            ("--metrics-host", self.metrics_host, self.metrics_port),
        ):
            check_listen(name, address(host, port), self.token, self.insecure)


def address(host: str, port: int) -> str:
    """host:port, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
