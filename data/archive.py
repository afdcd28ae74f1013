"""Members of a tar archive, read forward from any source and checked for being cut off.

Python's `tarfile` decodes the single header. The walk around it is our own, because `tarfile` ends in silence at some
cuts, cannot say at which byte, and reads what it could pass over.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator

from data import DataError
from data.urls import Source

BLOCK = tarfile.BLOCKSIZE  # 512 bytes, the unit of a tar
_RECORD = tarfile.RECORDSIZE  # writers pad an archive with zeros to a multiple of this

# The first bytes of what people save as .tar by mistake.
_LOOKALIKES = (
    (b"\x1f\x8b", "gzip data; decompress it first"),
    (b"\xfd7zXZ", "xz data; decompress it first"),
    (b"BZh", "bzip2 data; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "zstandard data; decompress it first"),
    (b"PK\x03\x04", "a zip archive; repack it as tar"),
    (b"<", "an HTML or XML page; was the download refused?"),
    (b"{", "JSON text; was the download refused?"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself"),
)

_SIZE = re.compile(rb"[0-9]{1,18}")  # a number of bytes; longer ones are hostile


class Walker:
    """The regular members of a tar, one after the other; `data` gives the content of the current one.

    Long names of GNU tar and PAX are resolved. Directories, links and webdataset's `__meta__` members are passed over.
    """

    def __init__(self, url: str, source: Source, start: int = 0) -> None:
        """Begin at byte `start` of the source, which must be the header of a member."""
        self.position = source.skip(start)  # bytes behind us
        self.begin = start  # where the first header of the current member stands
        self.truncated: str | None = None
        self.lost_data = False  # the cut went through the content of the last member
        self.closed = False  # the archive ended the way it should
        self.notes: list[str] = []
        self._url = url
        self._source = source
        self._name = ""
        self._size = 0  # content of the current member, not yet read
        self._header: bytes | None = None  # of the next member, where it came with the content

    def members(self) -> Iterator[str]:
        """Yield member names until the end, or until `truncated` is set."""
        long_name: str | None = None
        long_size: int | None = None
        begin = self.position
        while (info := self._next_header()) is not None:
            self._name, self._size = info.name, info.size
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = _text((self.data() or b"").rstrip(b"\0"))
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                fields = _pax_fields(self.data() or b"")
                long_name = _text(fields[b"path"]) if b"path" in fields else long_name
                long_size = int(fields[b"size"]) if _SIZE.fullmatch(fields.get(b"size", b"")) else long_size
            elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self.begin = begin
                self._name = info.name if long_name is None else long_name
                self._size = info.size if long_size is None else long_size
                long_name = long_size = None
                if not info.isreg():  # links, folders and devices have no content whatever their size says
                    self._size = 0 if info.type in tarfile.SUPPORTED_TYPES else self._size
                begin = self.position + _padded(self._size)
                if info.isreg() and not re.match(r"__[^/]*__($|/)", self._name):
                    yield self._name

    def data(self) -> bytes | None:
        """The content of the current member, once; None if it was cut off."""
        size, padded = self._size, _padded(self._size)
        self._size = 0
        block = self._source.read(padded + BLOCK)  # one read brings the next header along
        self._advance(min(len(block), padded), size)
        self._header = block[padded:]
        return None if self.lost_data else block[:size]

    def _advance(self, passed: int, size: int) -> None:
        """Account for `passed` bytes of a member whose content is `size` bytes long."""
        self.position += passed
        if passed < _padded(size):
            self.lost_data = passed < size
            place = "content" if self.lost_data else "padding"
            self.truncated = f"cut off at byte {self.position} in the {place} of {self._name!r}"

    def _next_header(self) -> tarfile.TarInfo | None:
        if self._size:
            size, self._size = self._size, 0
            self._advance(self._source.skip(_padded(size)), size)
        if self.truncated is not None:
            return None
        header = self._source.read(BLOCK) if self._header is None else self._header
        self._header = None
        if not header:
            self._refuse_lookalike(header)
            self.notes.append("no end-of-archive blocks")
            return None
        if not header.strip(b"\0") and len(header) == BLOCK:
            self.closed = True
            rest = self._source.read(_RECORD)
            if len(rest) < BLOCK:
                self.notes.append("a single end-of-archive block instead of two")
            elif rest.strip(b"\0"):
                self.notes.append("more data behind the end-of-archive blocks (archives joined with cat?) is not read")
            return None
        try:
            info = plain_header(header) or tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
        except tarfile.HeaderError:
            self._refuse_lookalike(header)
            cut = f"cut off at byte {self.position + len(header)} in a header"
            self.truncated = cut if len(header) < BLOCK else f"damaged header at byte {self.position}"
            return None
        if info.size < 0 or info.type == tarfile.GNUTYPE_SPARSE:
            self.truncated = f"header of an unsupported kind at byte {self.position}; repack without --sparse"
            return None
        self.position += BLOCK
        return info

    def _refuse_lookalike(self, header: bytes) -> None:
        """Raise DataError if the very first block shows that this is no tar at all."""
        if self.position:
            return
        self._source.finish()  # the failure of a command explains more than the bytes it gave
        if not header:
            raise DataError(f"{self._url} is empty (0 bytes); write it again")
        start = header.lstrip()
        kind = next(
            (kind for magic, kind in _LOOKALIKES if start.startswith(magic)), "no tar (its first header is damaged)"
        )
        raise DataError(f"{self._url} is not a tar shard: it looks like {kind}")


def plain_header(header: bytes) -> tarfile.TarInfo | None:
    """Name and size from the header of an ordinary file; None for all else, damage included, which tarfile decides.

    Four times as fast as `TarInfo.frombuf`, which took a third of the time to read small images.
    """
    size, checksum = header[124:136].rstrip(b" \0"), header[148:156].strip(b" \0")
    if len(header) < BLOCK or header[156:157] != tarfile.REGTYPE or header[345] or not size.isdigit():
        return None
    try:
        # The sum counts the checksum's own eight bytes as spaces.
        if int(checksum, 8) != sum(header) - sum(header[148:156]) + 8 * 32:
            return None
        info = tarfile.TarInfo(_text(header[:100].partition(b"\0")[0]))
        info.size = int(size, 8)
    except ValueError:
        return None
    return info


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _pax_fields(data: bytes) -> dict[bytes, bytes]:
    """The `LENGTH KEY=VALUE` lines of an extended header; reading stops at the first that is malformed."""
    fields: dict[bytes, bytes] = {}
    position = 0
    while match := re.compile(rb"([0-9]{1,18}) ([^=]+)=").match(data, position):
        end = position + int(match[1])
        if not match.end() < end <= len(data):
            break
        fields[match[2]] = data[match.end() : end - 1]
        position = end
    return fields
