"""Compressed files as streams of bytes: .gz, .bz2, .xz and .zst.

Python's own readers miss damage: those of bz2 and lzma take a damaged second stream for the end of
the file, and zstandard's takes a file that was cut short for a whole one. Here every stream must
have its end. Behind the last one there may be zeros, as gzip(1) allows, and nothing else.

Two kilobytes are unpacked at a time. They become 64 MB at the most, however small the file is. The
window of zstd --long and xz, the text before that they refer to, takes up to 2 GB more.
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
LOOK = 6  # bytes that tell the kind of a stream
ERRORS = (OSError, MemoryError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


@dataclass
class Packing:
    """A way to pack files."""

    name: str
    magic: bytes  # what a stream begins with
    new: Callable  # returns an object that unpacks one stream: decompress(), eof, unused_data


def new_gzip():
    return zlib.decompressobj(31)  # 31: with gzip's header, and the largest window


def new_zstd():
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


PACKINGS = {
    ".gz": Packing("gzip", b"\x1f\x8b", new_gzip),
    ".bz2": Packing("bzip2", b"BZh", bz2.BZ2Decompressor),
    ".xz": Packing("xz", b"\xfd7zXZ\0", lzma.LZMADecompressor),
    ".zst": Packing("zstd", b"\x28\xb5\x2f\xfd", new_zstd),
}
SKIPPED = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # begins a frame without text, as of pzstd


def unpacked(raw, name, suffix):
    """An open file -> a stream of its bytes, unpacked as the suffix (".gz", ...; or "") says.

    Reading the stream raises UserError where the file is damaged."""
    if not suffix:
        return raw
    return io.BufferedReader(Unpacked(raw, name, PACKINGS[suffix]), 1 << 20)


class Unpacked(io.RawIOBase):
    """The bytes of a file's streams, one after another."""

    def __init__(self, raw, name, packing):
        self.raw = raw
        self.name = name
        self.packing = packing
        self.block = b""  # of the file
        self.start = 0  # where in the block the bytes begin that are not unpacked yet
        self.before_block = 0  # bytes of the file in front of the block
        self.stream = None  # unpacks the stream that has begun
        self.n_streams = 0  # begun so far
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
        holds_back = hasattr(self.stream, "needs_input")  # bz2 and lzma, what is more than MOST
        packed = b"" if holds_back and not self.stream.needs_input else self.take()
        try:
            if holds_back:
                content = self.stream.decompress(packed, MOST)
            else:
                content = self.stream.decompress(packed)
        except ERRORS as e:
            raise UserError(f"{self.name} {self.explain(e)}") from e
        if self.stream.eof:
            self.start -= len(self.stream.unused_data)
            self.stream = None
        return content

    def explain(self, error):
        """What is wrong with the file, for the end of a sentence that begins with its name."""
        text = short(error)
        if "Dictionary mismatch" in text:
            cure = "unpack it with that first (zstd -d -D DICTIONARY)"
            return f"was packed with a zstd dictionary of its own: {cure}"
        if isinstance(error, MemoryError) or "not enough memory" in text:
            return f"cannot be unpacked ({text}): it needs more memory than this machine has"
        return f"is damaged or cut short ({text}): fetch it again"

    def take(self):
        """The file's next bytes, at least one. Raises UserError at its end: the stream has none."""
        if not self.look(1):
            what = f"it ends in the midst of its {self.packing.name} data"
            raise UserError(f"{self.name} is damaged or cut short ({what}): fetch it again")
        piece = self.block[self.start : self.start + FEED]
        self.start += len(piece)
        return piece

    def look(self, n):
        """The file's next n bytes, which stay where they are; fewer at its end."""
        while len(self.block) - self.start < n:
            more = self.raw.read(BLOCK)
            if not more:
                break
            self.before_block += self.start
            self.block = self.block[self.start :] + more
            self.start = 0
        return self.block[self.start : self.start + n]

    def begin(self):
        """Begins the next stream. Returns whether there is one.

        Raises UserError where there is something else."""
        while self.n_streams and self.look(1) == b"\0":
            rest = self.block[self.start :].lstrip(b"\0")
            self.start = len(self.block) - len(rest)
        begin = self.look(LOOK)
        if self.n_streams and not begin:
            return False
        skipped = self.packing.name == "zstd" and SKIPPED.match(begin)
        if not skipped and not begin.startswith(self.packing.magic):
            raise UserError(f"{self.name} {self.explain_strange(begin)}")
        self.stream = self.packing.new()
        self.n_streams += 1
        return True

    def explain_strange(self, begin):
        """What is wrong with a file in which a stream begins with these bytes."""
        kind = self.packing.name
        if self.packing.magic.startswith(begin):
            return f"is damaged or cut short (its {kind} data has no end): fetch it again"
        if not self.n_streams:
            what = f"or no {kind} file (it begins with {begin!r})"
            return f"is damaged or cut short, {what}: fetch it again, or name it as what it is"
        end = self.before_block + self.start
        cure = f"`head -c {end} {quoted(str(self.name))}` is the file without that"
        what = f"goes on behind its {kind} data with something else ({begin!r})"
        return f"{what}: {cure}, if that is none of it; else fetch it again"
