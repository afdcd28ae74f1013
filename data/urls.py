"""Bytes behind the name of a shard: a local file, http(s), any fsspec URL, or the output of a `pipe:` command.

Every source reads forward and can pass bytes over. Remote sources survive dropped connections: they reopen at the byte
they had reached, after a growing pause, and refuse to go on if the file was exchanged in between.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, Protocol

from data import DataError

RETRIES = 5  # attempts in a row that bring no byte before a remote read is given up
FIRST_PAUSE = 0.5  # seconds before the second attempt; doubles with each further one
TIMEOUT = 60.0  # seconds without a byte before a connection counts as dead
CHUNK = 1 << 20  # bytes: largest single remote read, and the longest gap that is read through instead of reconnected

_ABSENT = (403, 404, 410)  # buckets that may not be listed answer 403 for a file that does not exist
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)

log = logging.getLogger(__name__)


class Source(Protocol):
    """A forward reader of one shard's bytes."""

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end of the file."""

    def skip(self, size: int) -> int:
        """Pass over `size` bytes, unread where the source can; how many there were (fewer only at the end)."""

    def finish(self) -> None:
        """Called once the reader is done with the whole archive; raises DataError if the source failed after all."""

    def close(self) -> None:
        """Release the file, connection or process; safe to call twice."""


def scheme(url: str) -> str:
    """'pipe', 'http', 's3', ...; '' for a path on this machine, whatever characters it holds."""
    if url.startswith("pipe:"):
        return "pipe"
    match = re.match(r"([A-Za-z][A-Za-z0-9+.\-]*)://", url)
    return match.group(1).lower() if match else ""


def open_source(url: str, *, allow_pipe: bool = False) -> Source:
    """Open a shard for reading from its first byte.

    Raises DataError when it cannot be opened, or when it is a `pipe:` command and those were not allowed.
    """
    kind = scheme(url)
    if kind == "pipe":
        check_pipe(url, allow_pipe)
        return _Pipe(url)
    if kind in ("http", "https"):
        return _Remote(url, _Http(url).connect)
    if kind:
        return _Remote(url, _Fsspec(url).connect)
    return _Local(url)


def check_pipe(url: str, allow_pipe: bool) -> None:
    """Raise DataError for a shell command that the user did not allow."""
    if not allow_pipe:
        raise DataError(f"{url!r} would run a shell command; allow it with --allow_pipe if you trust it")


def read_whole(url: str) -> bytes | None:
    """The content of a small file (a shard index), or None where there is none. Raises DataError on other failures."""
    try:
        source = open_source(url)
    except _AbsentError:
        return None
    with contextlib.closing(source):
        try:
            parts = iter(lambda: source.read(CHUNK), b"")
            return b"".join(parts)
        except _AbsentError:
            return None


class _AbsentError(DataError):
    """The named file does not exist."""


class _Local:
    """A file of this machine, unbuffered: the walker already asks for whole members."""

    def __init__(self, path: str) -> None:
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close())
            self._left = os.fstat(self._file.fileno()).st_size
        except FileNotFoundError as error:
            raise _AbsentError(f"no such file: {path}") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise DataError(f"cannot open {path}: {_reason(error)}") from error
        self._path = path

    def read(self, size: int) -> bytes:
        size = min(size, self._left)  # a damaged header may ask for far more than there is
        parts = []
        while size > 0:
            try:
                part = self._file.read(size)  # one call, except beyond 2 GiB
            except OSError as error:
                raise DataError(f"cannot read {self._path}: {_reason(error)}") from error
            if not part:
                break
            parts.append(part)
            size -= len(part)
            self._left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> int:
        size = min(size, self._left)
        self._file.seek(size, os.SEEK_CUR)
        self._left -= size
        return size

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


# Runs a command in a process group that is killed when the standard input ends, which only the reader holds open.
_GUARD = """
exec 3<&0
/bin/sh -c "$1" 3<&- </dev/null &
command=$!
{ read -r line <&3; kill -KILL 0; } >/dev/null &
wait $command
code=$?
kill -PIPE $!  # which a shell does not report
wait $!
exit $code
"""


class _Pipe:
    """Standard output of a shell command; its return code decides whether the bytes count.

    The command and its children are a process group of their own, which a Ctrl-C at the terminal does not reach: the
    reader decides when to stop. They are killed by `close` and when the reader's process ends, however it ends: a
    command that waits for a network would otherwise stay until it next writes.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        # The shell is the documented meaning of `pipe:`, hence the separate permission.
        command = ["/bin/sh", "-c", _GUARD, "sh", url.removeprefix("pipe:")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._held_open = self._process.stdin
        self._file: IO[bytes] = self._process.stdout

    def read(self, size: int) -> bytes:
        return b"".join(_parts(self._file, size))

    def skip(self, size: int) -> int:
        return sum(len(part) for part in _parts(self._file, size))

    def finish(self) -> None:
        while self._file.read(CHUNK):
            pass
        code = self._process.wait()
        if code != 0:
            raise DataError(f"{self._url!r} failed with exit code {code}; what it printed cannot be trusted")

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._file.close()
        self._held_open.close()
        self._process.wait()


def _parts(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The next `size` bytes in pieces of at most CHUNK, fewer at the end."""
    while size > 0 and (part := file.read(min(size, CHUNK))):
        size -= len(part)
        yield part


class _Remote:
    """A remote file that reopens where it was after a failure. `connect(position)` gives (file, whole size or None)."""

    def __init__(self, url: str, connect: Callable[[int], tuple[IO[bytes], int | None]]) -> None:
        self._url = url
        self._connect = connect
        self._size: int | None = None
        self._file: IO[bytes] | None = None
        self._position = 0
        self._failures = 0

    def read(self, size: int) -> bytes:
        return b"".join(self._parts(size))

    def skip(self, size: int) -> int:
        if size > CHUNK and self._size is None:  # one byte tells how long the file is; without it all must be read
            if not self.read(1):
                return 0
            return 1 + self.skip(size - 1)
        if size <= CHUNK or self._size is None:
            return sum(len(part) for part in self._parts(size))
        self.close()  # the next read connects at the new place
        size = min(size, self._size - self._position)
        self._position += size
        return size

    def _parts(self, size: int) -> Iterator[bytes]:
        while size > 0:
            try:
                part = self._read_once(min(size, CHUNK))
            except DataError:
                raise
            except Exception as error:  # fsspec's back ends raise classes of their own
                self._pause(error)
                continue
            if not part:
                break
            self._failures = 0
            self._position += len(part)
            size -= len(part)
            yield part

    def _read_once(self, size: int) -> bytes:
        if self._file is None:
            if self._size is not None and self._position >= self._size:
                return b""
            self._file, self._size = self._connect(self._position)
        if self._file.seekable():  # memory:// hands one file object to all its readers
            self._file.seek(self._position)
        part = self._file.read(size)
        if not part and self._size is not None and self._position < self._size:
            raise ConnectionError("connection closed early")
        return part

    def _pause(self, error: Exception) -> None:
        self.close()
        self._failures += 1
        if self._failures >= RETRIES:
            raise DataError(
                f"cannot read {self._url} at byte {self._position}: {_reason(error)} ({self._failures} attempts)"
            ) from error
        pause = FIRST_PAUSE * 2 ** (self._failures - 1)
        log.warning("%s: %s; again from byte %d in %.1f s", self._url, _reason(error), self._position, pause)
        time.sleep(pause)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._file.close()
            self._file = None


class _Http:
    """Opens an http(s) file at a byte, by Range where the server knows it, and notices when the file was exchanged."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._identity: dict[str, str | None] | None = None

    def connect(self, position: int) -> tuple[IO[bytes], int | None]:
        request = urllib.request.Request(self._url)
        if position:
            request.add_header("Range", f"bytes={position}-")
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _TEMPORARY:
                raise ConnectionError(f"HTTP {error.code}") from error
            if error.code == 416:
                raise DataError(f"{self._url} became shorter than {position} bytes while it was read") from error
            absent = error.code in _ABSENT
            raise (_AbsentError if absent else DataError)(f"cannot open {self._url}: HTTP {error.code}") from error
        except ValueError as error:  # a URL that the library cannot parse
            raise DataError(f"cannot open {self._url}: {_reason(error)}") from error
        length = response.headers.get("Content-Length")
        size = int(length) if length is not None and length.isdigit() else None
        skip = position
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != position:
                response.close()
                raise DataError(f"{self._url}: the server answered a request for byte {position} with another range")
            size, skip = (None if match[2] == "*" else int(match[2])), 0
        self._check_identity(response.headers.get("ETag"), response.headers.get("Last-Modified"), size)
        while skip > 0:  # a server without Range sends everything again
            part = response.read(min(skip, CHUNK))
            if not part:
                raise ConnectionError("connection closed early")
            skip -= len(part)
        return response, size

    def _check_identity(self, etag: str | None, modified: str | None, size: int | None) -> None:
        identity = {"ETag": etag, "Last-Modified": modified, "size": None if size is None else str(size)}
        first = self._identity = self._identity or identity
        for name, value in identity.items():
            if None not in (value, first[name]) and value != first[name]:
                raise DataError(
                    f"{self._url} changed while it was read ({name} {first[name]} became {value}); start again"
                )


class _Fsspec:
    """Opens any other URL scheme (s3, gs, memory, ...) through fsspec, at a byte."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._size: int | None = None

    def connect(self, position: int) -> tuple[IO[bytes], int | None]:
        import fsspec

        try:
            file = fsspec.open(self._url, "rb").open()
        except FileNotFoundError as error:
            raise _AbsentError(f"no such file: {self._url}") from error
        except (PermissionError, ValueError, ImportError) as error:  # unknown scheme, or its package is not installed
            raise DataError(f"cannot open {self._url}: {_reason(error)}") from error
        size = getattr(file, "size", None)
        if self._size not in (None, size):
            raise DataError(f"{self._url} changed while it was read ({self._size} bytes became {size}); start again")
        self._size = size
        file.seek(position)
        return file, size


def _reason(error: Exception) -> str:
    """One line about an exception, without the file name that the caller already gives."""
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
    return " ".join(text.split())
