"""The ranks of a group: how they find each other, agree before they serve, and add up on a CPU.

Each rank is a process with one device and a share of the model. They meet at a store that rank 0 serves, by
torch.distributed; from then on they do the same things in the same order, because they get the same steps.
"""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from gpu_worker.config import WorkerSettings
from gpu_worker.launch import RENDEZVOUS_FD
from kernels.ranks import Ranks

RENDEZVOUS_S = 120.0
# How long one rank may load and measure for, after another one has done so.
LOADING = timedelta(hours=1)
# NVLink multicast stays off: not every container may use it, and those that may not do not say so.
NO_MULTICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
# Where all meet on the loopback, nothing that they say need leave the machine.
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class RendezvousError(Exception):
    """The ranks did not find each other; the message says who was missing. Trying again may help."""


@dataclass(frozen=True)
class Group:
    """A rank's view of its group."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store

    def exchange(self, what: str, value: str) -> list[str]:
        """What each rank says about `what`, in the order of ranks; once for each name. Waits for all of them.

        Raises:
            torch.distributed.DistError: one of them is gone.
        """
        self.store.set(f"{what}/{self.rank}", value)
        return [self.store.get(f"{what}/{rank}").decode() for rank in range(self.size)]

    def ranks(self, num_rows: int, width: int, dtype: torch.dtype) -> Ranks:
        """What they do together in a forward, for sums of up to [num_rows, width]."""
        if self.device.type == "cpu":
            return HostRanks(self.rank, self.size)
        from kernels.cuda.ranks import DeviceRanks  # Triton is for CUDA alone

        world = dist.group.WORLD
        assert world is not None, "connect has made it"
        return DeviceRanks(world, self.device, num_rows, width, dtype)


def connect(settings: WorkerSettings, device: torch.device) -> Group | None:
    """Meet the other ranks; None where there are none.

    Raises:
        RendezvousError: one of them does not come within `RENDEZVOUS_S`.
    """
    rank, size, where = settings.rank, settings.world_size, settings.rendezvous
    if size == 1:
        return None
    host, port = where.rpartition(":")[::2]
    os.environ.update(NO_MULTICAST)
    if host in ("127.0.0.1", "localhost"):
        os.environ.update(ON_LOOPBACK | dict(os.environ))
    patience, names = timedelta(seconds=RENDEZVOUS_S), [f"rank/{other}" for other in range(size)]
    address = host.strip("[]"), int(port)
    listener = _listener(*address) if rank == 0 else None
    open_store = partial(dist.TCPStore, wait_for_workers=False, master_listen_fd=listener)
    missing = ["rank/0"]
    try:
        # By another thread, because torch waits for ever where something listens that does not answer.
        opening = ThreadPoolExecutor(1).submit(open_store, *address, size, rank == 0, patience)
        store = opening.result(RENDEZVOUS_S + 1)
        store.set(names[rank], "")
        try:
            store.wait(names, patience)
        except dist.DistError:
            missing = [name for name in names if not store.check([name])]
            raise
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    except (RuntimeError, TimeoutError) as error:
        who = ", ".join(missing).replace("/", " ")
        raise RendezvousError(f"not at --rendezvous {where}: {who} of {size} ({error!r:.200})") from error
    store.set_timeout(LOADING)
    return Group(rank, size, device, store)


def _listener(host: str, port: int) -> int:
    """Where rank 0 listens: a socket of this address alone, inherited or made here."""
    if RENDEZVOUS_FD in os.environ:
        return int(os.environ.pop(RENDEZVOUS_FD))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family).detach()
    except OSError as error:
        raise RendezvousError(f"rank 0 cannot listen at --rendezvous {host}:{port}: {error}") from error


@dataclass
class HostRanks:
    """`kernels.ranks.Ranks` on CPUs, over the process group. See there for what each call does.

    Parts are gathered and added in the order of ranks, in float32: all ranks get the same bits, and a row
    gets the same ones whatever else is in its batch. gloo's own sums promise only the former.
    """

    rank: int
    size: int
    quiet: bool = False  # nobody rehearses on a CPU

    def part(self, place: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Ranks.part`."""
        return torch.empty((rows, width), dtype=dtype)

    def summed(self, place: int, part: torch.Tensor) -> torch.Tensor:
        """See `Ranks.summed`; the result is `part`."""
        parts = self._parts(part)
        total = parts[0].float()
        for other in parts[1:]:
            total += other
        return part.copy_(total)

    def gathered(self, columns: torch.Tensor) -> torch.Tensor:
        """See `Ranks.gathered`."""
        return torch.cat(self._parts(columns), dim=1)

    def _parts(self, own: torch.Tensor) -> list[torch.Tensor]:
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return parts
