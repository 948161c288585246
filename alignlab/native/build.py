"""Compilation of the kernels: once for each source, compiler and processor, into a private folder of the user's.

The file's name is a digest of all that it depends on. Processes that need it at the same time wait for each other by a
lock; it is written under another name and renamed when it is whole, so that none loads a part of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

import torch

from alignlab.errors import ConfigError
from alignlab.files.paths import cache_folder
from alignlab.native.processor import INTEGER_PRODUCTS, NEEDED, has_fast_pairs, processor_flags

logger = logging.getLogger(__name__)
SHARED = Path(__file__).parent / "source"
"""Headers that all sources may include."""
COMPILER = "g++"
STORAGE = {torch.float32: "Float32", torch.bfloat16: "BFloat16"}
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno")
_TIMEOUT_S = 300
_SHOWN = 300  # characters of a compiler's message


class BuildError(Exception):
    """The kernels could not be built or loaded; the message says why."""


def load_library(source: Path, dtype: torch.dtype) -> ctypes.CDLL:
    """Return kernels for a type of storage, which are compiled where they are not yet.

    Args:
        source: the .cpp file, beside its own headers.
        dtype: float32 or bfloat16.

    Raises:
        BuildError: there is no compiler, it fails, or the folder for its results is not this user's alone.
    """
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise BuildError(f"there is no compiler {COMPILER} on the PATH; install one")
    try:
        with _private_folder(native_folder()) as handle:
            path = native_folder() / f"{_digest(compiler, source, dtype)}.so"
            with _locked(path.with_suffix(".lock")):
                library = _loaded(handle, path.name)
                if library is None:  # there is none, or one that a power cut has left half written
                    _compile(compiler, source, dtype, path)
                    library = _loaded(handle, path.name)
    except ConfigError as error:  # no home folder is known
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(f"the folder {native_folder()} cannot be used: {error}") from error
    if library is None:
        raise BuildError(f"what the compiler {compiler} made, {path}, cannot be loaded; check it, and remove the file")
    return library


def native_folder() -> Path:
    """Return the folder of compiled kernels, which need not exist."""
    return cache_folder() / "native"


@contextmanager
def _private_folder(folder: Path) -> Iterator[int]:
    """Open a folder, after making it.

    Raises:
        BuildError: it is another user's or others may write to it, and what lies there is run.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(handle)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise BuildError(
                f"{folder} must belong to this user and be writable by no other, because what lies there is run; "
                "remove it, or name another folder by $ALIGNLAB_CACHE"
            )
        yield handle
    finally:
        os.close(handle)


def _digest(compiler: str, source: Path, dtype: torch.dtype) -> str:
    """Return a digest of the sources, the compiler and its arguments, and the processor's instructions."""
    files = [source, *sorted(source.parent.glob("*.h")), *sorted(SHARED.glob("*.h"))]
    parts = [path.name.encode() + b"\0" + path.read_bytes() for path in files]
    version = _run([compiler, "--version"])
    parts += [text.encode() for text in (compiler, version, *_arguments(dtype), *sorted(processor_flags()))]
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _arguments(dtype: torch.dtype) -> list[str]:
    """Return the compiler's arguments: the instructions that are used by name, and no others of the processor."""
    flags = [*NEEDED[dtype], *({INTEGER_PRODUCTS} & processor_flags())]
    instructions = [f"-m{flag.replace('_', '')}" for flag in flags]
    pairs = ["-DALIGNLAB_PAIRED_PRODUCTS"] if has_fast_pairs() else []
    return [*_FLAGS, f"-I{SHARED}", *instructions, *pairs, f"-DALIGNLAB_STORAGE={STORAGE[dtype]}"]


def _compile(compiler: str, source: Path, dtype: torch.dtype, path: Path) -> None:
    """Compile the kernels to a path, which is there only when they are whole."""
    started = time.monotonic()
    handle, name = tempfile.mkstemp(suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        _run([compiler, *_arguments(dtype), str(source), "-o", name])
        os.chmod(name, 0o700)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    logger.info("compiled %s in %.1f s, to %s", source.name, time.monotonic() - started, path)


def _run(command: list[str]) -> str:
    """Return what a command of the compiler prints.

    Raises:
        BuildError: it fails, or takes too long.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        message = " ".join(done.stderr.split())[:_SHOWN] or "it says nothing"
        raise BuildError(f"the compiler {command[0]} fails with status {done.returncode}: {message}")
    return done.stdout


def _loaded(folder: int, name: str) -> ctypes.CDLL | None:
    """Return the library of a name in the folder that was opened, which cannot be another one by now.

    None if there is none, or a file that is no library.
    """
    with suppress(OSError):
        return ctypes.CDLL(f"/proc/self/fd/{folder}/{name}")
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes of this user wait for."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
