"""Compile the kernel once, keep it where only this user can write, and find it there again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
PARTS = ("activity", "covariance")
PATIENCE = 60  # seconds for one call of a compiler
COMMON = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti "
    "-fno-math-errno -fno-trapping-math -fno-signed-zeros -ffp-contract=fast -w"
)
# By what torch found out about this processor: fp32 lanes of a vector, and the instructions that go with them.
WIDTHS = {
    "AVX512": "-DWIDTH=16 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
    "AVX2": "-DWIDTH=8 -mavx2 -mfma",
}


class UnavailableError(Exception):
    """Why there is no kernel here."""


def library() -> tuple[Path, bool]:
    """The kernel's file, checked, and whether it was built just now.

    Raises:
        UnavailableError: No compiler, none that works, or no place that only this user can write to.
    """
    directory, problems = cache_directory(), []
    for compiler in compilers():
        found = _by(compiler, directory)
        if not isinstance(found, str):
            return found
        problems.append(f"{shlex.join(compiler)}: {found}")
    raise UnavailableError(
        "; ".join(problems) or "no C++ compiler was found (CXX, c++, g++, clang++)"
    )


def _by(compiler: list[str], directory: Path) -> tuple[Path, bool] | str:
    """The same by one compiler, or why not."""
    try:
        key = _key(compiler)
        found = _cached(directory, key)
        return (found, False) if found else (_build(compiler, directory, key), True)
    except subprocess.TimeoutExpired:
        return f"not done in {PATIENCE} s"
    except (OSError, UnavailableError) as error:
        return str(error)


def compilers() -> list[list[str]]:
    """Commands to try, in order."""
    named = [shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]]
    return [c for c in named if c and shutil.which(c[0])]


def capability() -> str:
    """The vector instructions that torch found: "AVX512", "AVX2", or whatever has plain code here."""
    return torch.backends.cpu.get_cpu_capability()


def cache_directory() -> Path:
    """A directory of this user's, made if there is none.

    Raises:
        UnavailableError: It cannot be made, or others could write to it.
    """
    try:
        if sys.platform == "win32":
            base = Path(os.environ["LOCALAPPDATA"])
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME", ""))
            base = base if base.is_absolute() else Path.home() / ".cache"
        directory = base / "tracker-kernels"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _only_ours(directory, stat.S_ISDIR) or not os.access(directory, os.W_OK):
            raise UnavailableError(
                f"{directory} is not a directory that only this user can write to"
            )
    except (OSError, KeyError, RuntimeError) as error:
        raise UnavailableError(f"there is no cache directory ({error})") from error
    return directory


def _only_ours(path: Path, kind: object) -> bool:
    status = path.lstat()
    if not kind(status.st_mode):  # type: ignore[operator]
        return False
    return sys.platform == "win32" or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def _flags() -> list[str]:
    return f"{COMMON} {WIDTHS.get(capability(), '-DWIDTH=4')}".split()


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode:
        raise UnavailableError(f"{Path(command[0]).name} ended with {done.returncode}")
    return done.stdout.decode(errors="replace")


def _key(compiler: list[str]) -> str:
    """Of everything that the code depends on."""
    facts = [
        (HERE / name).read_text(encoding="utf-8")
        for name in sorted(p.name for p in HERE.glob("*.[ch]*"))
    ]
    facts += [
        *compiler,
        _run([*compiler, "--version"]),
        *_flags(),
        platform.machine(),
        sys.platform,
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _name(key: str, content: bytes) -> str:
    # A file that was cut short or changed no longer fits its name: loading it could end the process.
    return f"{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _cached(directory: Path, key: str) -> Path | None:
    for path in sorted(directory.glob(f"{key}-*.so")):
        with contextlib.suppress(OSError):  # another process may tidy up as well
            if _only_ours(path, stat.S_ISREG) and path.name == _name(key, path.read_bytes()):
                return path
            path.unlink()
    return None


def _build(compiler: list[str], directory: Path, key: str) -> Path:
    with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as made:
        work, flags = Path(made), _flags()
        objects = [f"{part}.o" for part in PARTS]
        _run([*compiler, *flags, "-c", *(str(HERE / f"{part}.cpp") for part in PARTS)], work)
        _run([*compiler, "-w", str(HERE / "check.cpp"), *objects, "-o", "check"], work)
        _run([str(work / "check")], work)
        _run([*compiler, "-shared", *objects, "-o", "kernel.so"], work)
        built = work / "kernel.so"
        built.chmod(0o700)
        path = directory / _name(key, built.read_bytes())
        os.replace(built, path)  # whole or not at all, whoever else is building
    return path
