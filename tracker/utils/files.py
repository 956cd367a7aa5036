"""Files and directories that are whole or not there: unique names, locks, and two names swapped in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import os
import secrets
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tracker.errors import WriteError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FULL = 2**26  # bytes up to which a file may be made of holes
MARK = b"A lock of tracker; it goes when its holder is done.\n"
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY)
UNLOCKABLE = (*UNSUPPORTED, errno.ENOLCK, errno.EBADF)
HERE, EXCHANGE = (
    -100,
    2,
)  # of renameat2: AT_FDCWD, RENAME_EXCHANGE; macOS's RENAME_SWAP is 2 as well


def write_whole(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file, replacing one that is there in a single step once all of it lies on the disk.

    Two writers at once do not mix: each has a draft of its own name, and the last one to finish wins. A link stays, and
    what it leads to is replaced.

    Raises:
        WriteError: It cannot be written; what was there is as it was.
    """
    write_together({path: data})
    return Path(path)


def write_together(files: Mapping[str | os.PathLike[str], bytes]) -> None:
    """Write several files, each as `write_whole` does: none is replaced before all of them lie on the disk.

    Raises:
        WriteError: One of them cannot be written; none was, or of those in other directories the last ones.
    """
    drafts: dict[Path, Path] = {}
    path: str | os.PathLike[str] = ""
    try:
        for path, data in files.items():
            target = Path(os.path.realpath(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and not target.is_file():
                raise OSError(errno.EINVAL, "something else than a file is there", str(target))
            draft = target.with_name(f".{target.name[:100]}.{unique()}.part")
            drafts[target] = draft
            with draft.open("xb") as file:
                file.write(data)
                file.flush()
                if target.exists():  # a private file stays private
                    os.chmod(draft, stat.S_IMODE(target.stat().st_mode))
                os.fsync(file.fileno())
        for target, draft in drafts.items():
            path = target
            os.replace(draft, target)
    except (OSError, ValueError) as error:
        raise WriteError(
            f"{os.fspath(path)!r} cannot be written: {_why(error)}. What was there is as it was; choose another path, "
            "or make room."
        ) from error
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def write_picture(path: str | os.PathLike[str], figure: Any) -> Path:
    """Write a figure of matplotlib as `write_whole` does; the ending tells the format, without one it is a PNG.

    Raises:
        WriteError: It cannot be written, or no picture has such an ending.
    """
    target = Path(path)
    target = target if target.suffix else Path(f"{os.fspath(path)}.png")
    return write_whole(target, picture(figure, target))


def picture(figure: Any, path: Path) -> bytes:
    """A figure of matplotlib in the format that the ending of the path tells.

    Raises:
        WriteError: No picture has such an ending.
    """
    ending, drawn = path.suffix[1:].lower(), io.BytesIO()
    if ending not in figure.canvas.get_supported_filetypes():
        known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
        raise WriteError(f"{os.fspath(path)!r} cannot be written: pictures end in {known}.")
    figure.savefig(drawn, format=ending)
    return drawn.getvalue()


def read_whole(path: str | os.PathLike[str], largest: int) -> bytearray:
    """All of an ordinary file; no pipe is waited for, and no device read without end.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no ordinary file, is larger than `largest` bytes, or the path is none.
    """
    flags = os.O_RDONLY
    for more in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, more, 0)
    handle = os.open(path, flags)
    try:
        return OpenFile(handle, os.fspath(path)).read(largest)
    finally:
        os.close(handle)


class OpenFile:
    """An ordinary file under a descriptor, as large as it was when it was opened."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name
        facts = os.fstat(descriptor)
        # A pipe or a device would never end.
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{name} is no ordinary file")
        self.size = facts.st_size

    def read(self, largest: int | None = None) -> bytearray:
        """All of it.

        Raises:
            ValueError: It is larger than `largest` bytes, has hardly anything in it, or became shorter.
        """
        if largest is not None and self.size > largest:
            raise ValueError(f"{self._name} is larger than {largest} bytes")
        if self.size > FULL and self._holes():
            raise ValueError(
                f"of the {self.size} bytes of {self._name} hardly any were written: it is read once it is copied with "
                "cp --sparse=never"
            )
        data = bytearray(self.size)
        view, done = memoryview(data), 0
        with os.fdopen(os.dup(self._descriptor), "rb", buffering=0) as file:
            while done < self.size and (count := file.readinto(view[done:])):
                done += count
        if done < self.size:
            raise ValueError(f"{self._name} became shorter while it was read")
        return data

    def _holes(self) -> bool:
        """Whether all but a hundredth of it are holes, which cost nothing to whoever made the file."""
        if not hasattr(os, "SEEK_DATA"):
            return False
        written = at = 0
        try:
            while written * 100 < self.size:
                begin = os.lseek(self._descriptor, at, os.SEEK_DATA)
                at = os.lseek(self._descriptor, begin, os.SEEK_HOLE)
                written += at - begin
        except OSError as error:
            return error.errno == errno.ENXIO  # no more data
        finally:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        return False


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def unique() -> str:
    """A name that no other process, thread, container or machine has, and that tells on which machine it was made."""
    return f"{machine()}-{secrets.token_hex(8)}"


@cache
def machine() -> str:
    """Of this running system: the same in all of its containers, another one after a restart."""
    try:
        facts = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        facts = socket.gethostname()
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def flush(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # directories cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. False: nothing was done, this system or file system cannot.

    Raises:
        OSError: It failed for another reason; nothing was done.
    """
    call = _exchange()
    if call is None:
        return False
    a, b = os.fsencode(one), os.fsencode(other)
    done = call(a, b, EXCHANGE) if sys.platform == "darwin" else call(HERE, a, HERE, b, EXCHANGE)
    if not done:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


@cache
def _exchange() -> Any:
    try:
        code = ctypes.CDLL(None, use_errno=True)
        number, text = ctypes.c_int, ctypes.c_char_p
        if sys.platform == "darwin":
            call = code.renamex_np
            call.argtypes = [text, text, ctypes.c_uint]
        else:
            call = code.renameat2
            call.argtypes = [number, text, number, text, ctypes.c_uint]
    except (AttributeError, OSError, TypeError):
        return None
    return call


@contextlib.contextmanager
def locked(path: Path, patience: float) -> Iterator[bool]:
    """Hold an exclusive lock on a file of this name, which is made for it and removed afterwards.

    patience: Seconds to wait for another holder. Yields whether there is a lock: some file systems have none. The
    system releases the locks of a process that dies.

    Raises:
        TimeoutError: Another one holds it.
        OSError: The file cannot be made.
    """
    handle = _acquire(path, time.monotonic() + patience)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                if os.pread(handle, len(MARK) + 1, 0) == MARK:
                    path.unlink()  # while it is held: who waits for it sees that, and makes another
            os.close(handle)


def _acquire(path: Path, until: float) -> int | None:
    if fcntl is None:
        return None
    wait = 0.001
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if _try_lock(handle) and _is_at(handle, path):
                if not os.fstat(handle).st_size:
                    os.write(handle, MARK)
                return handle
        except OSError as error:
            os.close(handle)
            if error.errno in UNLOCKABLE:
                return None
            raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if time.monotonic() > until:
            raise TimeoutError(errno.ETIMEDOUT, "another writer holds the lock", str(path))
        time.sleep(wait)
        wait = min(2 * wait, 0.05)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        here, there = os.fstat(handle), path.lstat()
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
