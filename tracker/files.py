"""Files and directories that are whole or not there: unique names, locks, and two names swapped in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MARK = b"A lock of tracker; it goes when its holder is done.\n"
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY)
UNLOCKABLE = (*UNSUPPORTED, errno.ENOLCK, errno.EBADF)
HERE, EXCHANGE = (
    -100,
    2,
)  # of renameat2: AT_FDCWD, RENAME_EXCHANGE; macOS's RENAME_SWAP is 2 as well


def write_whole(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file, replacing one that is there in a single step once all of it lies on the disk.

    Two writers at once do not mix: each has a draft of its own name, and the last one to finish wins.

    Raises:
        OSError: It cannot be written; what was there is as it was.
        ValueError: The path holds a NUL.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    draft = target.with_name(f".{target.name[:100]}.{unique()}.part")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    return target


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
