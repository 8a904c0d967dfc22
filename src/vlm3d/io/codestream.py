"""What a JPEG, JPEG-LS or JPEG 2000 codestream says about its size, read before a decoder takes memory for it."""

from __future__ import annotations

import struct

_START = b"\xff\xd8"
_JPEG2000_START = b"\xff\x4f\xff\x51"
_FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}
"""Start of frame of JPEG (all but DHT, JPG and DAC) and of JPEG-LS."""


def codestream_size(data: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and samples a pixel that a codestream will decode to; None where it states none.

    Sources: ISO/IEC 10918-1, B.2.2 (SOF); 14495-1, C.2.2 (SOF55); 15444-1, A.5.1 (SIZ).
    """
    try:
        return _jpeg_size(data) if data[:2] == _START else _jpeg2000_size(data)
    except (struct.error, IndexError):
        return None


def _jpeg_size(data: bytes) -> tuple[int, int, int] | None:
    place = 2
    while data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        (length,) = struct.unpack_from(">H", data, place + 2)
        if marker in _FRAME_MARKERS:
            rows, columns, samples = struct.unpack_from(">HHB", data, place + 5)
            return rows, columns, samples
        place += 2 + length
    return None


def _jpeg2000_size(data: bytes) -> tuple[int, int, int] | None:
    start = 0 if data.startswith(_JPEG2000_START) else _boxed_codestream(data)
    if data[start : start + 4] != _JPEG2000_START:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    (samples,) = struct.unpack_from(">H", data, start + 40)
    return bottom - top, right - left, samples


def _boxed_codestream(data: bytes) -> int:
    """Where the codestream starts in a JP2 file, which some writers store instead of it (15444-1, I.4)."""
    place = 0
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"jp2c":
            return place + (16 if length == 1 else 8)
        if length < 8:
            raise IndexError("no further box")
        place += length
