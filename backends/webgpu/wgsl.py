"""TVM's WGSL, which stores bytes and booleans, as the WGSL that there is, which has numbers of 32 bits alone.

rewrite:  u8(e), i8(e)  ->  the lowest byte of 32 bits, with its sign where it has one
          bytes that the program only reads  ->  four in a word, taken apart where they are read
          bytes that it writes  ->  a word each
ensures:  the same numbers; names that WGSL allows
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Mapping

HEAD = re.compile(r"^// Function: (\w+)\n", re.MULTILINE)
BINDING = re.compile(r"@binding\((\d+)\) var<storage, (\w+)> (\w+) : array<(\w+)>")
_WORDS = {"u8": "u32", "i8": "i32"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of TVM's source. ``bytewise``: (binding, "u8" or "i8") of its buffers of bytes."""

    name: str
    text: str

    @property
    def bytewise(self) -> dict[int, str]:
        return {int(place): kind for place, _, _, kind in BINDING.findall(self.text) if kind in _WORDS}


def kernels(source: str) -> list[Kernel]:
    """The kernels of ``source``."""
    parts = HEAD.split(source)
    names, texts = parts[1::2], parts[2::2]
    return [Kernel(name, text) for name, text in zip(names, texts, strict=True) if "@compute" in text]


def name_of(kernel: str) -> str:
    """``kernel`` without the underscores in front that WGSL keeps for itself."""
    return kernel.lstrip("_")


def merged(kernel: Kernel, twins: Mapping[int, int]) -> Kernel:
    """``kernel`` with each buffer at a binding of ``twins`` bound once: where the other of the pair is.

    WGSL does not let a shader write a buffer that it reads under another name.
    """
    names = {int(place): name for place, _, name, _ in BINDING.findall(kernel.text)}
    text = kernel.text
    for one, other in twins.items():
        text = re.sub(rf".*var<storage, \w+> {names[one]} : .*\n", "", text)
        text = re.sub(rf"\b{names[one]}\b", names[other], text)
        text = re.sub(rf"var<storage, \w+> {names[other]} :", f"var<storage, read_write> {names[other]} :", text)
    count = itertools.count()
    return Kernel(kernel.name, re.sub(r"@binding\(\d+\)", lambda _: f"@binding({next(count)})", text))


def written(kernel: Kernel, packed: Collection[int]) -> str:
    """The text of ``kernel``; the buffers at bindings ``packed`` hold four bytes in a word."""
    text = kernel.text.replace(f"fn {kernel.name}(", f"fn {name_of(kernel.name)}(")
    for place, _, name, kind in BINDING.findall(text):
        if kind not in _WORDS:
            continue
        if int(place) in packed:
            text = _each(text, f"{name}[", "]", _taken(name, kind))
            text = text.replace(f"{name} : array<{kind}>", f"{name} : array<u32>")
        else:
            text = re.sub(rf"(\b{name}\[.*\]) = (.*);", rf"\1 = {_WORDS[kind]}(\2);", text)
    for kind, make in (("u8", "(u32({0}) & 255u)"), ("i8", "((i32({0}) << 24u) >> 24u)")):
        text = _each(text, f"{kind}(", ")", make.format)
        text = re.sub(rf": {kind}\b", f": {_WORDS[kind]}", text).replace(f"array<{kind}>", f"array<{_WORDS[kind]}>")
    return re.sub(r"^//.*\n", "", text, flags=re.MULTILINE).strip() + "\n"


def _taken(name: str, kind: str) -> Callable[[str], str]:
    """What reads byte ``index`` of ``name``, words of four."""

    def read(index: str) -> str:
        word, shift = f"{name}[u32({index}) >> 2u]", f"((u32({index}) & 3u) * 8u)"
        if kind == "u8":
            return f"(({word} >> {shift}) & 255u)"
        return f"(bitcast<i32>({word} << (24u - {shift})) >> 24u)"

    return read


def _each(text: str, start: str, end: str, make: Callable[[str], str]) -> str:
    """``text`` with every ``start`` e ``end`` replaced by ``make`` of e, the innermost first."""
    begin, last = start[-1], end
    place = len(text)
    while (place := text.rfind(start, 0, place)) >= 0:
        if place and (text[place - 1].isalnum() or text[place - 1] == "_"):
            continue
        inner, depth, stop = place + len(start), 1, place + len(start)
        while depth:
            depth += (text[stop] == begin) - (text[stop] == last)
            stop += 1
        text = text[:place] + make(text[inner : stop - 1]) + text[stop:]
    return text
