"""The event record: everything that went into the core and what came out, and its replay.

A record is a file of frames, each a length and a CRC-32 (both 32 bits, little-endian) and a msgpack value:
the header with the core's configuration, then every `apply` and every `plan` in the order of the calls.
Replaying it needs no worker, no model and no clock. It holds prompts as token ids, so only its owner may
read it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import Event, Outputs, Plan
from scheduler_svc.core.scheduler import Scheduler

FORMAT_VERSION = 2
FLUSH_BYTES = 1 << 20
FRAME_HEAD = struct.Struct("<II")  # length and checksum of a frame


class Header(msgspec.Struct, frozen=True, array_like=True, tag="header"):
    """The first frame."""

    version: int
    config: CoreConfig


class Applied(msgspec.Struct, frozen=True, array_like=True, tag="applied"):
    """One `apply`: its inputs, and a digest of its outputs."""

    now: float
    events: list[Event]
    digest: bytes


class Planned(msgspec.Struct, frozen=True, array_like=True, tag="planned"):
    """One `plan`: its inputs and its result."""

    worker: str
    now: float
    plan: Plan | None


Frame = Header | Applied | Planned


class Divergence(Exception):
    """The core did not do again what the record says. `differences` are lines for people."""

    def __init__(self, frame: int, what: str, differences: list[str]) -> None:
        super().__init__("\n".join([f"frame {frame}: {what}", *differences]))
        self.frame = frame
        self.differences = differences


class BadRecord(Exception):
    """The file is not a record that this version reads."""


class ReplayReport(msgspec.Struct, frozen=True):
    """What a replay went through. `truncated` says that the last frame was cut off, as by a kill."""

    num_events: int
    num_plans: int
    num_requests: int
    truncated: bool


def digest(outputs: Outputs) -> bytes:
    """16 bytes that two equal `Outputs` share."""
    encoded = msgspec.msgpack.encode(outputs)  # sessions in the order in which the core came to them
    return hashlib.blake2b(encoded, digest_size=16).digest()


class Recorder:
    """Writes a record. Frames are buffered; `flush` is called from a timer and at the end."""

    def __init__(self, path: Path, config: CoreConfig) -> None:
        """Raises OSError where the file cannot be written, or is being written by another process."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, 0)
        except OSError as error:
            os.close(descriptor)
            raise OSError(f"--record: cannot write {path}: {error.strerror}") from error
        self._file: IO[bytes] = os.fdopen(descriptor, "wb", buffering=FLUSH_BYTES)
        self._encoder = msgspec.msgpack.Encoder()
        self._write(Header(FORMAT_VERSION, config))
        self.flush()

    def applied(self, now: float, events: list[Event], outputs: Outputs) -> None:
        """Write down one `apply`."""
        self._write(Applied(now, events, digest(outputs)))

    def planned(self, worker: str, now: float, plan: Plan | None) -> None:
        """Write down one `plan`."""
        self._write(Planned(worker, now, plan))

    def _write(self, frame: Frame) -> None:
        encoded = self._encoder.encode(frame)
        self._file.write(FRAME_HEAD.pack(len(encoded), zlib.crc32(encoded)))
        self._file.write(encoded)

    def flush(self) -> None:
        """Hand what is buffered to the file."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


def read_frames(path: Path) -> Iterator[Frame | None]:
    """The frames of a record; a last None stands for a frame that was cut off.

    Raises BadRecord where the file is something else or damaged.
    """
    decoder = msgspec.msgpack.Decoder(Frame)
    number = 0
    with path.open("rb") as file:
        while head := file.read(FRAME_HEAD.size):
            body = b""
            if len(head) == FRAME_HEAD.size:
                length, checksum = FRAME_HEAD.unpack(head)
                body = file.read(length)
            if len(head) < FRAME_HEAD.size or len(body) < length:
                yield None
                return
            if zlib.crc32(body) != checksum:
                raise BadRecord(f"{path}: frame {number} is damaged: its checksum is wrong")
            try:
                yield decoder.decode(body)
            except msgspec.MsgspecError as error:
                raise BadRecord(f"{path}: frame {number} is not of this version: {error}") from error
            number += 1


def replay(path: str | Path) -> ReplayReport:
    """Run the core again on the inputs of a record.

    Raises Divergence at the first plan or output that differs, BadRecord for a file that is no record.
    """
    frames = read_frames(Path(path))
    header = next(frames, None)
    if not isinstance(header, Header) or header.version != FORMAT_VERSION:
        raise BadRecord(f"{path}: does not begin with the header of a record of version {FORMAT_VERSION}")
    core = Scheduler(header.config)
    num_events = num_plans = num_requests = 0
    truncated = False
    for number, frame in enumerate(frames, 1):
        match frame:
            case None:
                truncated = True
            case Applied(now, events, expected):
                if digest(core.apply(events, now)) != expected:
                    raise Divergence(number, f"the outputs of apply at {now:.6f} differ", describe(events))
                num_events += len(events)
                num_requests += sum(type(event).__name__ == "RequestArrived" for event in events)
            case Planned(worker, now, recorded):
                _compare(number, recorded, core.plan(worker, now))
                num_plans += recorded is not None
            case _:
                raise BadRecord(f"{path}: frame {number} is a second header")
    return ReplayReport(num_events, num_plans, num_requests, truncated)


def _compare(number: int, recorded: Plan | None, planned: Plan | None) -> None:
    if recorded == planned:
        return
    if recorded is None or planned is None:
        some = planned if recorded is None else recorded
        which = "the core plans a step, the record has none" if recorded is None else "the core plans none"
        raise Divergence(number, which, describe([some]))
    step = f"plan {recorded.step_id} of worker {recorded.worker!r} differs"
    raise Divergence(number, step, differences(recorded, planned))


def differences(recorded: msgspec.Struct, planned: msgspec.Struct) -> list[str]:
    """Lines that name each field in which two structs of one type differ."""
    lines = []
    for name in recorded.__struct_fields__:
        old, new = getattr(recorded, name), getattr(planned, name)
        if old == new:
            continue
        if isinstance(old, list):
            at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), -1)
            place = f" from entry {at}" if at >= 0 else ""
            lines.append(f"  {name}: {len(old)} entries recorded, {len(new)} now; they differ{place}")
            old, new = (old[at:], new[at:]) if at >= 0 else (old, new)
        lines.append(f"  {name}: recorded {_short(old)}")
        lines.append(f"  {name}: now      {_short(new)}")
    return lines


def describe(values: Sequence[Any]) -> list[str]:
    """One line a value."""
    return [f"  {_short(value)}" for value in values]


def _short(value: object, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
