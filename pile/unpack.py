"""Compressed files as streams of bytes: .gz, .bz2, .xz and .zst.

Of the readers at hand, bz2's and lzma's take a damaged second stream for the end of the file, and
zstandard's takes a file that was cut short for a whole one. Here every stream must have its end.
Behind the last one there may be zeros, as gzip(1) has it, and nothing else.

Two kilobytes are unpacked at a time, to 64 MB at the most, however small the file is. What zstd
--long and xz remember of the text before (the window, up to 2 GB) comes on top.
"""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import zstandard

from system.errors import UserError
from system.files import short
from system.terminal import quoted

FEED = 1 << 11  # bytes that are unpacked at a time
BLOCK = 1 << 16  # bytes that are read at a time
MOST = 1 << 20  # bytes that bz2 and xz give at a time
LOOK = 6  # bytes that tell what a stream is
ERRORS = (OSError, MemoryError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


@dataclass
class Packing:
    name: str
    magic: bytes  # that a stream begins with
    new: Callable  # () -> what unpacks one stream: decompress(), eof, unused_data


def new_zstd():
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


PACKINGS = {
    ".gz": Packing("gzip", b"\x1f\x8b", lambda: zlib.decompressobj(31)),
    ".bz2": Packing("bzip2", b"BZh", bz2.BZ2Decompressor),
    ".xz": Packing("xz", b"\xfd7zXZ\0", lzma.LZMADecompressor),
    ".zst": Packing("zstd", b"\x28\xb5\x2f\xfd", new_zstd),
}
SKIPPED = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a frame without text, as pzstd writes them


def unpacked(raw, name, suffix):
    """An open file -> a stream of its bytes, unpacked where the suffix says so. Reading it raises
    UserError, which says what is wrong with the file."""
    if not suffix:
        return raw
    return io.BufferedReader(Unpacked(raw, name, PACKINGS[suffix]), 1 << 20)


class Unpacked(io.RawIOBase):
    """The bytes of a file's streams, one after another."""

    def __init__(self, raw, name, packing):
        self.raw, self.packing = raw, packing
        self.name = name
        self.block = b""  # of the file
        self.at = 0  # where in the block the bytes begin that are not unpacked yet
        self.behind = 0  # bytes of the file before the block
        self.stream = None  # what unpacks the stream that has begun
        self.streams = 0
        self.ready = memoryview(b"")  # unpacked, and not read yet

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            if self.stream is None and not self.begin():
                return 0
            self.ready = memoryview(self.unpack())
        n = min(len(buffer), len(self.ready))
        buffer[:n] = self.ready[:n]
        self.ready = self.ready[n:]
        return n

    def unpack(self):
        """The stream's next bytes, perhaps none. Raises UserError where it is damaged."""
        bounded = hasattr(self.stream, "needs_input")  # bz2 and lzma, which can hold bytes back
        packed = self.take() if not bounded or self.stream.needs_input else b""
        try:
            options = (MOST,) if bounded else ()
            found = self.stream.decompress(packed, *options)
        except ERRORS as e:
            raise UserError(f"{self.name} {self.explain(e)}") from e
        if self.stream.eof:
            self.at -= len(self.stream.unused_data)
            self.stream = None
        return found

    def explain(self, error):
        text = short(error)
        if "Dictionary mismatch" in text:
            cure = "unpack it with that first (zstd -d -D DICTIONARY)"
            return f"was packed with a zstd dictionary of its own: {cure}"
        if isinstance(error, MemoryError) or "not enough memory" in text:
            return f"cannot be unpacked ({text}): it needs more memory than this machine has"
        return f"is damaged or cut short ({text}): fetch it again"

    def take(self):
        """The file's next bytes, at least one. Raises UserError at its end: a stream goes on."""
        if not self.look(1):
            what = f"it ends in the midst of its {self.packing.name} data"
            raise UserError(f"{self.name} is damaged or cut short ({what}): fetch it again")
        piece = self.block[self.at : self.at + FEED]
        self.at += len(piece)
        return piece

    def look(self, n):
        """The file's next n bytes, which stay where they are; fewer at its end."""
        while len(self.block) - self.at < n:
            more = self.raw.read(BLOCK)
            if not more:
                break
            self.behind += self.at
            self.block = self.block[self.at :] + more
            self.at = 0
        return self.block[self.at : self.at + n]

    def begin(self):
        """Begins the next stream; whether there is one. Raises UserError where there is something
        else."""
        while self.streams and self.look(1) == b"\0":
            rest = self.block[self.at :].lstrip(b"\0")
            self.at = len(self.block) - len(rest)
        found = self.look(LOOK)
        if self.streams and not found:
            return False
        skipped = self.packing.name == "zstd" and SKIPPED.match(found)
        if not skipped and not found.startswith(self.packing.magic):
            raise UserError(f"{self.name} {self.explain_strange(found)}")
        self.stream = self.packing.new()
        self.streams += 1
        return True

    def explain_strange(self, found):
        kind = self.packing.name
        if self.packing.magic.startswith(found):
            return f"is damaged or cut short (its {kind} data has no end): fetch it again"
        if not self.streams:
            what = f"or no {kind} file (it begins with {found!r})"
            return f"is damaged or cut short, {what}: fetch it again, or name it as what it is"
        end = self.behind + self.at
        cure = f"`head -c {end} {quoted(str(self.name))}` is the file without that"
        what = f"goes on behind its {kind} data with something else ({found!r})"
        return f"{what}: {cure}, if that is none of it; else fetch it again"
