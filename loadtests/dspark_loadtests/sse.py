"""Server-sent events, from bytes cut anywhere."""

from __future__ import annotations

from collections.abc import Iterator


class SSEDecoder:
    """Splits a byte stream into server-sent events, however the network cut it.

    Handles LF and CRLF line ends, comments and multi-line data. A last event without its
    closing blank line is dropped, as the specification says.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._data: list[bytes] = []
        self._event = ""

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Yield ``(event name, data)`` for every event that ``data`` completes."""
        self._pending += data
        while (end := self._pending.find(b"\n")) >= 0:
            line = bytes(self._pending[:end]).removesuffix(b"\r")
            del self._pending[: end + 1]
            if line:
                self._field(line)
                continue
            if self._data:
                yield self._event, b"\n".join(self._data)
            self._data, self._event = [], ""

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
