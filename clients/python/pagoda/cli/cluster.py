"""What a local cluster consists of: ports, programs and the configuration of their supervisor.

`pagoda serve`, `make cluster` and `make demo` all run what this module describes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from pagoda import models

# A service that ends with one of these would end with it again: bad configuration, and a worker that
# the scheduler refused (its model or version does not fit).
EXIT_UNUSABLE = 78
FINAL_EXIT_CODES = (2, EXIT_UNUSABLE)
STOP_WAIT_S = 10
LOG_BYTES = 20 << 20


class ClusterError(Exception):
    """The cluster cannot be started or cannot go on; `exit_code` is what the command should end with."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class ClusterSpec:
    """What to run. A port of 0 is replaced by a free one in `with_ports`; None leaves it to the services.

    Each of `workers` holds the model over `tensor_parallel` ranks.
    """

    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    workers: int = 1
    tensor_parallel: int = 1
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    scheduler_port: int = 50051
    metrics_port: int = 9400
    common_args: tuple[str, ...] = ()
    scheduler_args: tuple[str, ...] = ()
    worker_args: tuple[str, ...] = ()
    gateway_args: tuple[str, ...] = ()
    more_metrics_ports: tuple[int, ...] = ()  # scheduler's, then the workers'; set by `with_ports`

    @property
    def http_url(self) -> str:
        """Where the OpenAI routes are, seen from this machine."""
        return f"http://{_reachable(self.host)}:{self.http_port}"

    @property
    def grpc_target(self) -> str:
        """Where the gateway's gRPC port is, seen from this machine."""
        return f"{_reachable(self.host)}:{self.grpc_port}"

    @property
    def scheduler_target(self) -> str:
        """Where the scheduler is; it serves this machine only."""
        return f"127.0.0.1:{self.scheduler_port}"


@dataclass(frozen=True)
class Program:
    """One process to keep alive."""

    name: str
    tier: str
    argv: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def check_installed() -> None:
    """Refuse to start what is not installed. Raises ClusterError that says what to install."""
    for module, extra in (
        ("scheduler_svc", ""),
        ("gpu_worker", ""),
        ("fastapi", "gateway"),
        ("tokenizers", "gateway"),
        ("torch", "worker"),
        ("supervisor", "cluster"),
    ):
        if importlib.util.find_spec(module) is None:
            what = f"its extra [{extra}]" if extra else "it"
            raise ClusterError(
                f"{module} is not installed: this command runs the server, and {what} is missing. "
                "Install pagoda-server[gateway,worker,cluster] (`make setup` in the repository)."
            )


def check_model(model: str) -> None:
    """Refuse a model that is not on this machine. Raises ClusterError."""
    try:
        models.resolve(model)
    except FileNotFoundError as error:
        raise ClusterError(str(error)) from error


def with_ports(spec: ClusterSpec) -> ClusterSpec:
    """`spec` with free ports where it says 0. Raises ClusterError when a wanted port is in use.

    Metrics ports: gateway, scheduler and workers, from `metrics_port` up, or all free ones when it is 0.
    """
    wanted = {
        "http_port": (spec.host, spec.http_port, "--http-port"),
        "grpc_port": (spec.host, spec.grpc_port, "--grpc-port"),
        "scheduler_port": ("127.0.0.1", spec.scheduler_port, "--scheduler-port"),
    }
    num_metrics = 2 + spec.workers
    chosen: dict[str, int] = {}
    with ExitStack() as held:  # all are held until all are chosen, so that no two are the same
        for name, (host, port, option) in wanted.items():
            chosen[name] = _claim(held, host, port, option)
        base = spec.metrics_port
        metrics = [
            _claim(held, "127.0.0.1", base + i if base else 0, "--metrics-port") for i in range(num_metrics)
        ]
    return replace(
        spec,
        http_port=chosen["http_port"],
        grpc_port=chosen["grpc_port"],
        scheduler_port=chosen["scheduler_port"],
        metrics_port=metrics[0],
        more_metrics_ports=tuple(metrics[1:]),
    )


def programs_of(spec: ClusterSpec) -> list[Program]:
    """The processes of a cluster whose ports are chosen, in the order of their start. Raises ClusterError."""
    scheduler_metrics, *worker_metrics = spec.more_metrics_ports
    python = (sys.executable, "-m")
    model = _given("--model", spec.model)
    programs = [
        Program(
            "scheduler",
            "scheduler",
            (
                *(*python, "scheduler_svc", "--listen", spec.scheduler_target),
                *("--metrics-port", str(scheduler_metrics)),
                *spec.common_args,
                *spec.scheduler_args,
            ),
        )
    ]
    for i in range(spec.workers):
        argv = (*python, "gpu_worker", "--scheduler", spec.scheduler_target, *model)
        argv += (*_given("--device", spec.device), *_given("--dtype", spec.dtype))
        argv += ("--group-name", f"worker-{i}", "--metrics-port", str(worker_metrics[i]), *spec.common_args)
        if spec.tensor_parallel > 1:
            argv += ("--tensor-parallel", str(spec.tensor_parallel))
        if spec.device != "cuda" and spec.workers > 1 and "--threads" not in spec.worker_args:
            argv += ("--threads", str(_threads_each(spec.workers * spec.tensor_parallel)))
        programs.append(Program(f"worker-{i}", "workers", argv + spec.worker_args, _gpu_of(spec, i)))
    programs.append(
        Program(
            "gateway",
            "gateway",
            (
                *(*python, "gateway_svc", "--scheduler", spec.scheduler_target, *model),
                *("--http-host", spec.host, "--http-port", str(spec.http_port)),
                *("--grpc-host", spec.host, "--grpc-port", str(spec.grpc_port)),
                *("--metrics-port", str(spec.metrics_port)),
                *spec.common_args,
                *spec.gateway_args,
            ),
        )
    )
    return programs


def supervisor_config(programs: list[Program], run_dir: Path, control_socket: Path) -> str:
    """A supervisord configuration that keeps `programs` alive, in the foreground.

    A process that stays up for a second and then dies is started again at once. One that cannot stay up for
    a second is tried four times, a little later each time. One that ends with a final exit code stays down.
    """
    lines = [
        "[supervisord]",
        "nodaemon=true",
        "silent=true",
        f"logfile={_value(run_dir / 'supervisord.log')}",
        "logfile_maxbytes=0",
        f"pidfile={_value(run_dir / 'supervisord.pid')}",
        f"childlogdir={_value(run_dir / 'logs')}",
        *([f"user={os.getuid()}"] if os.getuid() == 0 else []),  # says that root is meant
        "[unix_http_server]",
        f"file={_value(control_socket)}",
        "chmod=0600",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
        "[supervisorctl]",
        f"serverurl=unix://{_value(control_socket)}",
    ]
    for program in programs:
        environment = ",".join(f'{key}="{_value(text)}"' for key, text in program.environment.items())
        lines += [
            f"[program:{program.name}]",
            f"command={_value(shlex.join(program.argv))}",
            *([f"environment={environment}"] if environment else []),
            "autorestart=unexpected",
            f"exitcodes={','.join(map(str, FINAL_EXIT_CODES))}",
            "startsecs=1",
            "startretries=3",
            f"stopwaitsecs={STOP_WAIT_S}",
            "stopasgroup=true",
            "killasgroup=true",
            "redirect_stderr=true",
            f"stdout_logfile={_value(run_dir / 'logs' / (program.name + '.log'))}",
            f"stdout_logfile_maxbytes={LOG_BYTES}",
            "stdout_logfile_backups=2",
        ]
    # Tiers are groups because supervisord stops one group after another: text, then tensors, then tokens.
    for priority, tier in enumerate(dict.fromkeys(program.tier for program in programs)):
        members = ",".join(program.name for program in programs if program.tier == tier)
        lines += [f"[group:{tier}]", f"programs={members}", f"priority={priority}"]
    return "\n".join(lines) + "\n"


def _value(text: str | Path) -> str:
    """`text` as supervisord reads it back: % starts an expansion there, and a blank with ; or # a comment."""
    text = str(text)
    if re.search(r"\s[;#]|[\n\r]", text):
        raise ClusterError(f"{text!r} holds a blank followed by ; or #, which supervisor takes for a comment")
    return text.replace("%", "%%")


def _claim(held: ExitStack, host: str, port: int, option: str) -> int:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)  # only a listening socket keeps others off its port
        return int(listener.getsockname()[1])
    except OSError as error:
        hint = f"stop what uses it, or choose another port with {option} (0 takes any)"
        raise ClusterError(f"cannot use {host}:{port}: {error.strerror}; {hint}") from error


def _given(option: str, value: str | None) -> tuple[str, ...]:
    return () if value is None else (option, value)


def _threads_each(processes: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _gpu_of(spec: ClusterSpec, index: int) -> dict[str, str]:
    """The GPUs of a worker, one for each of its ranks, when several workers share a machine."""
    if spec.device != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(i) for i in range(len(_gpus()))]
    ranks = spec.tensor_parallel
    if gpus and ranks > len(gpus):
        raise ClusterError(
            f"--tensor-parallel {ranks} wants a GPU for each rank, and {len(gpus)} can be seen"
            + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""),
            EXIT_UNUSABLE,
        )
    if spec.workers == 1 or not gpus:
        return {}
    own = [gpus[(index * ranks + rank) % len(gpus)] for rank in range(ranks)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def _gpus() -> list[Path]:
    return sorted(Path("/proc/driver/nvidia/gpus").glob("*"))


def _reachable(host: str) -> str:
    """An address to call where `host` is one to listen on."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
