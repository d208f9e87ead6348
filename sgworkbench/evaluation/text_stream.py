"""Text files read piece by piece: encodings that are mixed, JSON that is too large to hold."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sgworkbench.errors import WorkbenchError

_CHUNK_BYTES = 1 << 20
_NOT_UTF8 = "sgworkbench-windows-1252"


def _windows_1252(error: UnicodeError) -> tuple[str, int]:
    """Decode the bytes that UTF-8 stumbled over; five codes undefined in Windows-1252 become Latin-1 controls."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    foreign = (bytes([byte]) for byte in error.object[error.start : error.end])
    text = "".join(byte.decode("latin-1" if byte in b"\x81\x8d\x8f\x90\x9d" else "cp1252") for byte in foreign)
    return text, error.end


codecs.register_error(_NOT_UTF8, _windows_1252)


def decode_mixed(data: bytes) -> str:
    """Decode UTF-8, reading every byte sequence that is not UTF-8 as Windows-1252."""
    return data.decode("utf-8", errors=_NOT_UTF8)


def replace_lone_surrogates(text: str) -> str:
    """Replace lone surrogates (from broken JSON escapes), which no file format can store."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _open_text(path: Path) -> BinaryIO:
    """Open a file behind its UTF-8 byte-order mark; refuse the encodings that have other ones."""
    handle = path.open("rb")
    start = handle.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start == b"\x00\x00\xfe\xff":
        handle.close()
        raise WorkbenchError(f"{path.name} is UTF-16 or UTF-32 text; save it as UTF-8 and try again.")
    handle.seek(3 if start[:3] == b"\xef\xbb\xbf" else 0)
    return handle


def decoded_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends, split at line feeds only.

    Raises:
        WorkbenchError: UTF-16 or UTF-32.
    """
    with _open_text(path) as handle:
        for line in handle:
            yield decode_mixed(line)


def decoded_chunks(path: Path) -> Iterator[str]:
    """Yield a text file in pieces of about a megabyte, never cutting a character in two.

    Raises:
        WorkbenchError: UTF-16 or UTF-32.
    """
    with _open_text(path) as handle:
        held = b""
        while data := handle.read(_CHUNK_BYTES):
            data = held + data
            cut = len(data) - _unfinished(data)
            held = data[cut:]
            yield decode_mixed(data[:cut])
        if held:
            yield decode_mixed(held)


def _unfinished(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character that is not complete."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if length > back else 0
        if byte < 0x80:
            return 0
    return 0


class JsonStream:
    """A JSON text taken apart value by value, so that a large list is never held whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._chunks = decoded_chunks(path)
        self._text = ""
        self._at = 0
        self._line = 1
        self._ended = False
        self._decoder = json.JSONDecoder()

    def where(self) -> str:
        """The line of the next character."""
        return f"line {self._line + self._text.count(chr(10), 0, self._at)}"

    def _more(self) -> bool:
        """Drop what was used and append at least as much as is left, so that long values stay linear in time."""
        self._line += self._text.count("\n", 0, self._at)
        pieces = [self._text[self._at :]]
        wanted = max(_CHUNK_BYTES, len(pieces[0]))
        got = 0
        while got < wanted and not self._ended:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._ended = True
            else:
                pieces.append(chunk)
                got += len(chunk)
        self._text, self._at = "".join(pieces), 0
        return got > 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        """Step over one punctuation character."""
        found = self.peek()
        if found != character:
            raise WorkbenchError(
                f"{self.path.name}, {self.where()}: not valid JSON (expected {character!r}, found {found!r})."
            )
        self._at += 1

    def value(self) -> Any:
        """Step over one value and return it."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number at the end of the buffer may go on behind it.
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            except (ValueError, RecursionError) as error:
                if self._ended or isinstance(error, RecursionError):
                    message = getattr(error, "msg", "nested too deeply")
                    raise WorkbenchError(
                        f"{self.path.name}, {self.where()}: not valid JSON in the value that starts here ({message})."
                    ) from None
            self._more()
