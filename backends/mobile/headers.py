"""What a library says of itself: enough of ELF (64 bits, little-endian) and Mach-O to check what was linked."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

from qcompile.errors import UserError

MACHINES = {62: "x86_64", 183: "aarch64"}
PLATFORMS = {1: "macos", 2: "ios", 7: "ios-simulator"}
_CPUS = {0x0100000C: "aarch64", 0x01000007: "x86_64"}
_LOAD, _DYNAMIC, _DYNSYM = 1, 2, 11
_NEEDED, _STRTAB, _SONAME = 1, 5, 14
_ID_DYLIB, _LOAD_DYLIB, _BUILD_VERSION = 0xD, 0xC, 0x32


@dataclasses.dataclass(frozen=True)
class Header:
    """One library. ``machine``: aarch64 or x86_64; ``format``: elf or mach-o.

    needed: the libraries that it loads; undefined: the names that it takes from them (of Mach-O not read)
    page: the least alignment of its segments in bytes; platform: of Mach-O, with the lowest version
    """

    format: str
    machine: str
    name: str
    needed: tuple[str, ...]
    undefined: tuple[str, ...] = ()
    page: int = 0
    platform: str = ""


def read(path: Path) -> Header:
    """The header of the shared library at ``path``; UserError where it is none."""
    data = path.read_bytes()
    try:
        if data[:4] == b"\x7fELF":
            return _elf(data)
        if data[:4] == b"\xcf\xfa\xed\xfe":
            return _mach_o(data)
    except (struct.error, IndexError, ValueError) as error:
        raise UserError(f"'{path}' is damaged: {error}", hint="compile the model again") from error
    raise UserError(f"'{path}' is no library", hint="give a .so or .dylib that qcompile wrote")


def _elf(data: bytes) -> Header:
    kind, machine = struct.unpack_from("<HH", data, 16)
    if kind != 3:
        raise ValueError("it is no shared object")
    segments = list(_segments(data))
    alignments = [s["align"] for s in segments if s["type"] == _LOAD]
    entries = [entry for s in segments if s["type"] == _DYNAMIC for entry in _dynamic(data, s["offset"], s["size"])]
    start = _offset(segments, next(value for tag, value in entries if tag == _STRTAB))
    named = {tag: [_string(data, start + value) for t, value in entries if t == tag] for tag in (_NEEDED, _SONAME)}
    return Header(
        format="elf",
        machine=MACHINES.get(machine, str(machine)),
        name="".join(named[_SONAME]),
        needed=tuple(named[_NEEDED]),
        undefined=tuple(sorted(_undefined(data, start))),
        page=min(alignments),
    )


def _segments(data: bytes) -> Iterator[dict[str, int]]:
    start, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    names = ("type", "flags", "offset", "address", "physical", "size", "memory", "align")
    for number in range(count):
        yield dict(zip(names, struct.unpack_from("<IIQQQQQQ", data, start + number * size), strict=True))


def _dynamic(data: bytes, offset: int, size: int) -> Iterator[tuple[int, int]]:
    for place in range(offset, offset + size, 16):
        tag, value = struct.unpack_from("<qQ", data, place)
        if tag == 0:
            return
        yield tag, value


def _offset(segments: list[dict[str, int]], address: int) -> int:
    """Where in the file the byte at ``address`` lies."""
    held = next(s for s in segments if s["type"] == _LOAD and s["address"] <= address < s["address"] + s["size"])
    return address - held["address"] + held["offset"]


def _undefined(data: bytes, strings: int) -> Iterator[str]:
    start, size, count = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 58)
    for number in range(count):
        _, kind, _, _, offset, length = struct.unpack_from("<IIQQQQ", data, start + number * size)
        if kind != _DYNSYM:
            continue
        for place in range(offset + 24, offset + length, 24):
            name, _, _, section = struct.unpack_from("<IBBH", data, place)
            if section == 0:
                yield _string(data, strings + name)


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def _mach_o(data: bytes) -> Header:
    cpu, _, kind, count = struct.unpack_from("<IIII", data, 4)
    if kind != 6:
        raise ValueError("it is no dylib")
    name, platform, needed, place = "", "", [], 32
    for _ in range(count):
        command, size = struct.unpack_from("<II", data, place)
        if command in (_ID_DYLIB, _LOAD_DYLIB):
            text = _string(data, place + struct.unpack_from("<I", data, place + 8)[0])
            name = text if command == _ID_DYLIB else name
            needed += [text] if command == _LOAD_DYLIB else []
        if command == _BUILD_VERSION:
            number, lowest = struct.unpack_from("<II", data, place + 8)
            platform = f"{PLATFORMS.get(number, number)} {lowest >> 16}.{lowest >> 8 & 255}"
        place += size
    return Header("mach-o", _CPUS.get(cpu, hex(cpu)), name, tuple(needed), platform=platform)
