"""
Recordings: a trace kept in a file, to be judged again on any machine, without root.

A file is ``MAGIC`` followed by frames: one byte of type, four bytes of length (little endian), and
that many bytes. Records are stored as the kernel wrote them; what is needed to read them (names of
nodes, drop reasons and functions) is stored as JSON. Rules are stored as the node's tools printed
them, compressed, at the start and whenever they changed. The last frame is END: a file without it
is truncated.
"""

import contextlib
import ctypes
import json
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from tracer.errors import RecordingError
from tracer.place import from_json, to_json
from tracer.ruleset.printed import Printed, unpack
from tracer.source import Source, SourceInfo
from tracer.views import Place
from tracer.wire import WIRE_VERSION, Kind, WireDrop

MAGIC = b"SRCIPREC\x01\n"
_FRAME = struct.Struct("<BI")
_INFO, _RECORD, _SYMBOL, _LOST, _END, _RULES, _NOT_SEEN = range(1, 8)
_NETNS = struct.Struct("<I")
# A longer frame is garbage: do not trust its length.
_MAX_FRAME = 16 << 20
_BATCH = 1024
# How much constantly changing rules may add to a file, in bytes per second and namespace.
_RULES_RATE = 16 << 10
# 292 years: no clock is further from 1970.
_MAX_CLOCK_NS = 1 << 63


class Recorder:
    """Writes a source's records to a file."""

    def __init__(
        self,
        path: Path,
        source: Source,
        places: Mapping[int, Place] | None = None,
        packed_rules: Callable[[], Mapping[int, bytes]] = dict,
    ) -> None:
        """
        Start a recording; an existing file is overwritten.

        Args:
            path: The file.
            source: The source to record.
            places: What is known about the traced nodes, by namespace.
            packed_rules: Returns their current rules, by namespace; the same object if unchanged.

        Raises:
            RecordingError: If it cannot be written.
        """
        self._path = path
        self._source = source
        self._packed_rules = packed_rules
        # By namespace: the rules written last, and when they may be written again.
        self._rules: dict[int, tuple[bytes, float]] = {}
        self._symbols: set[int] = set()
        try:
            self._stream = path.open("wb")
        except OSError as error:
            raise RecordingError(f"cannot write recording {path}: {error.strerror}") from error
        self._not_seen = source.info.not_seen
        info = _info_to_json(source.info)
        info["places"] = {str(netns): to_json(place) for netns, place in (places or {}).items()}
        self._put([MAGIC, _frame(_INFO, _dump(info)), *self._changed_rules()])

    def write(self, records: Iterable[bytes]) -> None:
        """
        Write records, and the names of functions that they refer to for the first time.

        Raises:
            RecordingError: If writing fails, as on a full disk.
        """
        chunks: list[bytes] = []
        for record in records:
            if not chunks:
                chunks += self._changed_rules()
            for address in _addresses(record):
                if address not in self._symbols:
                    self._symbols.add(address)
                    chunks.append(self._symbol(address))
            chunks.append(_frame(_RECORD, record))
        if chunks:
            self._put(chunks)

    def close(self) -> None:
        """
        Write the losses and the end mark, and close. Does nothing after an error in writing.

        Raises:
            RecordingError: If writing fails, as on a full disk.
        """
        if self._stream.closed:
            return
        chunks = [_frame(_LOST, _dump(dict(self._source.lost()))), _frame(_END, b"")]
        if self._source.info.not_seen != self._not_seen:
            chunks.insert(0, _frame(_NOT_SEEN, _dump(list(self._source.info.not_seen))))
        self._put(chunks)
        self._stream.close()

    def _changed_rules(self) -> Iterator[bytes]:
        now_s = time.monotonic()
        for netns, packed in self._packed_rules().items():
            last, next_s = self._rules.get(netns, (None, now_s))
            if packed is not last and now_s >= next_s:
                self._rules[netns] = packed, now_s + len(packed) / _RULES_RATE
                yield _frame(_RULES, _NETNS.pack(netns) + packed)

    def _symbol(self, address: int) -> bytes:
        return _frame(_SYMBOL, _dump([address, self._source.symbol(address)]))

    def _put(self, chunks: list[bytes]) -> None:
        try:
            self._stream.write(b"".join(chunks))
            self._stream.flush()
        except OSError as error:
            # Closing tries to write the buffered rest again.
            with contextlib.suppress(OSError):
                self._stream.close()
            raise RecordingError(f"cannot write {self._path}: {error.strerror}") from error


class RecordingSource:
    """A source that reads a recording. Needs no root and no BPF."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records = 0
        # Offsets of the next byte and of the current frame: a pipe has no tell().
        self._at = self._start = 0
        self._has_ended = False
        self._error: RecordingError | None = None
        self._lost: dict[str, int] = {}
        self._symbols: dict[int, str | None] = {}
        # As of the records returned last.
        self.places: dict[int, Place] = {}
        self._changed: tuple[int, Printed] | None = None
        try:
            self._stream: IO[bytes] = path.open("rb")
        except OSError as error:
            raise RecordingError(f"cannot read recording {path}: {error.strerror}") from error
        try:
            self.info = self._read_info()
        except BaseException:
            self._stream.close()
            raise

    def read(self, timeout_s: float) -> list[bytes] | None:  # noqa: ARG002 - the protocol's
        """
        Return the next records, None after the last.

        Raises:
            RecordingError: If the file is truncated or damaged here. The records before that have
                been returned.
        """
        if self._error is not None:
            raise self._error
        batch: list[bytes] = []
        self._change()
        while len(batch) < _BATCH and not self._has_ended:
            try:
                kind, payload = self._frame()
                self._take(kind, payload, batch)
                if self._changed is not None:
                    if batch:
                        break  # the new rules apply to what follows
                    self._change()
            except RecordingError as error:
                # Return what was read before, first.
                self._error = error
                if not batch:
                    raise
                break
        return batch if batch or not self._has_ended else None

    def lost(self) -> Mapping[str, int]:
        """What was lost when the recording was made, by reason."""
        return self._lost

    def symbol(self, address: int) -> str | None:
        """Return the recorded kernel's name for an address."""
        return self._symbols.get(address)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _change(self) -> None:
        if self._changed is not None:
            netns, printed = self._changed
            self.places[netns] = replace(self.places[netns], printed=printed)
            self._changed = None

    def _read_info(self) -> SourceInfo:
        if self._next(len(MAGIC)) != MAGIC:
            raise RecordingError(f"{self._path} is not a srcip recording")
        kind, payload = self._frame()
        if kind != _INFO:
            raise self._garbage(f"it begins with frame type {kind}")
        info = self._json(payload)
        try:
            source = _info_from_json(info)
            places = info.get("places", {})
            self.places = {int(netns): from_json(place) for netns, place in places.items()}
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise self._garbage(f"its header is malformed ({error!r:.80})") from error
        return source

    def _take(self, kind: int, payload: bytes, batch: list[bytes]) -> None:
        if kind == _RECORD:
            batch.append(payload)
            self._records += 1
        elif kind == _SYMBOL:
            match self._json(payload):
                case [int(address), str() | None as name]:
                    self._symbols[address] = name
                case _:
                    raise self._garbage("a function name is malformed")
        elif kind == _LOST:
            lost = self._json(payload)
            if not isinstance(lost, dict) or not all(isinstance(n, int) for n in lost.values()):
                raise self._garbage("its losses are malformed")
            self._lost = lost
        elif kind == _NOT_SEEN:
            match self._json(payload):
                case list(lines):
                    self.info = replace(self.info, not_seen=tuple(map(str, lines)))
                case _:
                    raise self._garbage("its list of what was not seen is malformed")
        elif kind == _RULES:
            self._changed = self._read_rules(payload)
        elif kind == _END:
            self._has_ended = True
        else:
            raise self._garbage(f"unknown frame type {kind}")

    def _read_rules(self, payload: bytes) -> tuple[int, Printed]:
        try:
            (netns,) = _NETNS.unpack_from(payload)
            if netns not in self.places:
                raise ValueError(f"they are of the unknown namespace {netns}")
            return netns, unpack(payload[_NETNS.size :])
        except (struct.error, ValueError) as error:
            raise self._garbage(f"its rules are malformed ({error!s:.80})") from error

    def _frame(self) -> tuple[int, bytes]:
        self._start = self._at
        head = self._next(_FRAME.size)
        if len(head) < _FRAME.size:
            raise self._cut_off()
        kind, length = _FRAME.unpack(head)
        if length > _MAX_FRAME:
            raise self._garbage(f"a frame claims {length} bytes")
        payload = self._next(length)
        if len(payload) < length:
            raise self._cut_off()
        return kind, payload

    def _next(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except OSError as error:
            raise RecordingError(f"cannot read recording {self._path}: {error.strerror}") from error
        self._at += len(data)
        return data

    def _json(self, payload: bytes) -> Any:
        try:
            return json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise self._garbage("a frame is not JSON") from error

    def _cut_off(self) -> RecordingError:
        return RecordingError(
            f"recording {self._path} is cut off after {self._records} records "
            f"(byte {self._start}): it has no end mark"
        )

    def _garbage(self, what: str) -> RecordingError:
        return RecordingError(
            f"recording {self._path} is damaged after {self._records} records "
            f"(byte {self._start}): {what}"
        )


def _frame(kind: int, payload: bytes) -> bytes:
    return _FRAME.pack(kind, len(payload)) + payload


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _addresses(record: bytes) -> tuple[int, ...]:
    """Return the kernel addresses in a record."""
    if len(record) != ctypes.sizeof(WireDrop):
        return ()
    drop = WireDrop.from_buffer_copy(record)
    if drop.header.kind != Kind.DROP:
        return ()
    return tuple(address for address in (drop.location, drop.dst_input) if address)


def _info_to_json(info: SourceInfo) -> dict[str, object]:
    return {
        "wire_version": WIRE_VERSION,
        "byte_order": sys.byteorder,
        "clock_offset_ns": info.clock_offset_ns,
        "nodes": {str(inode): node for inode, node in info.nodes.items()},
        "drop_reasons": {str(number): name for number, name in info.drop_reasons.items()},
        "rung": info.rung,
        "not_seen": list(info.not_seen),
        "has_proxy_headers": info.has_proxy_headers,
    }


def _info_from_json(info: dict[str, Any]) -> SourceInfo:
    if info["wire_version"] != WIRE_VERSION:
        raise ValueError(f"wire version {info['wire_version']}, expected {WIRE_VERSION}")
    if info["byte_order"] != sys.byteorder:
        raise ValueError(f"recorded on a {info['byte_order']}-endian machine")
    clock_offset_ns = int(info["clock_offset_ns"])
    if abs(clock_offset_ns) > _MAX_CLOCK_NS:
        raise ValueError(f"clock offset {clock_offset_ns}")
    return SourceInfo(
        clock_offset_ns=clock_offset_ns,
        nodes={int(inode): str(node) for inode, node in info["nodes"].items()},
        drop_reasons={int(number): str(name) for number, name in info["drop_reasons"].items()},
        rung=str(info["rung"]),
        not_seen=tuple(str(line) for line in info["not_seen"]),
        has_proxy_headers=bool(info.get("has_proxy_headers", False)),
    )
