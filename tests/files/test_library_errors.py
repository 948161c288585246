"""Errors of libraries about disks and files have names: what cannot be read or written, why, and what to do."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from alignlab.errors import AlignlabError, CheckpointError, ConfigError, DataError, DiskError, MemoryLimitError
from alignlab.files.input_files import _LimitedLoader
from alignlab.files.library_errors import disk_number, named, reading, writing

FULL = Path("/dev/full")
linux = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def full_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE t (x)")
        database.execute("PRAGMA max_page_count=2")
        database.execute("INSERT INTO t VALUES (zeroblob(100000))")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "Python": lambda path: path.write_text("x"),
    "numpy": lambda path: np.zeros(10**6).tofile(path),
    "tokenizers": lambda path: Tokenizer(models.BPE()).save(str(path)),
    "Parquet": lambda path: pq.write_table(pa.table({"x": [1]}), path),
}


@linux
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_raises_the_same_error_from_every_library(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.symlink_to(FULL)  # a library that replaces its file replaces the link
    expected = f"^the result cannot be written to {path}: .*; free some space there"
    with pytest.raises(DiskError, match=expected) as raised, writing(path, "the result"):
        WRITERS[name](path)
    assert raised.value.errno == errno.ENOSPC and raised.value.__cause__ is not None


def test_a_database_that_cannot_grow_is_reported_as_a_full_disk(tmp_path: Path) -> None:
    expected = r"database or disk is full .*GiB are free in .*; free some space"
    with pytest.raises(DiskError, match=expected), writing(tmp_path / "db", "the answers"):
        full_database(tmp_path / "db")


def test_a_file_size_limit_is_reported_from_safetensors(tmp_path: Path) -> None:
    """In a child process, whose limit it is."""
    script = f"""
import resource, signal, sys
import torch
from safetensors.torch import save_file
from alignlab.files.library_errors import writing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with writing({str(tmp_path / "x")!r}, "the checkpoint"):
    save_file({{"x": torch.zeros(10000)}}, {str(tmp_path / "x")!r})
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("alignlab.errors.DiskError: the checkpoint cannot be written to ")
    assert "File too large" in last and "raise the limit of a file's size (ulimit -f)" in last


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space"), (errno.EDQUOT, "within the quota"), (errno.EFBIG, "ulimit -f"),
        (errno.EIO, "the disk itself fails"), (errno.EACCES, "chmod"), (errno.EROFS, "choose another place"),
        (errno.EMFILE, "ulimit -n"), (errno.ENAMETOOLONG, "shorter path"), (errno.ENXIO, "or the disk"),
    ],
)  # fmt: skip
def test_each_reason_has_its_fix(number: int, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    for error in (OSError(number, os.strerror(number), str(path)), Exception(f"I/O error: oh (os error {number})")):
        with pytest.raises(DiskError, match=fix) as raised, writing(path, "it"):
            raise error
        told = named(error)
        assert raised.value.errno == number and isinstance(told, DiskError) and fix in str(told)


READERS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "JSON": (b"{", lambda path: json.loads(path.read_text())),
    "JSON that is nested": (b"[" * 100_000, lambda path: json.loads(path.read_text())),
    "a number of 5000 digits": (b"9" * 5000, lambda path: json.loads(path.read_text())),
    "a key": (b"{}", lambda path: json.loads(path.read_text())["key"]),
    "another type": (b"[]", lambda path: json.loads(path.read_text())["key"]),
    "an attribute": (b"[]", lambda path: json.loads(path.read_text()).items()),
    "UTF-8": (b"\xff", lambda path: path.read_text("utf-8")),
    "YAML": (b"a: [", lambda path: yaml.safe_load(path.read_text())),
    "YAML's date": (b"a: 2026-13-45", lambda path: yaml.load(path.read_text(), Loader=_LimitedLoader)),
    "safetensors": (b"x" * 100, load_file),
    "Parquet": (b"PAR1", pq.read_table),
    "numpy": (b"\x93NUMPY\x01\x00", lambda path: np.load(path, allow_pickle=False)),
    "numpy without pickles": (b"\x80\x04.", lambda path: np.load(path, allow_pickle=False)),
    "gzip": (b"\x1f\x8b\x08", lambda path: gzip.decompress(path.read_bytes())),
    "no gzip": (b"text", lambda path: gzip.decompress(path.read_bytes())),
    "zip": (b"PK", lambda path: zipfile.ZipFile(path)),
    "a database": (b"x" * 4096, lambda path: sqlite3.connect(path).execute("SELECT * FROM t").fetchall()),
    "a folder's entry": (b"", lambda path: (path / "x").read_text()),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_raises_the_same_error_from_every_library(name: str, tmp_path: Path) -> None:
    content, read = READERS[name]
    path = tmp_path / "x"
    path.write_bytes(content)
    expected = f"^the file cannot be read from {path}: "
    with pytest.raises(AlignlabError, match=expected) as raised, reading(path, "the file", CheckpointError):
        read(path)
    assert isinstance(raised.value, DiskError if name == "a folder's entry" else CheckpointError)
    assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)


def test_a_missing_file_raises_the_requested_error(tmp_path: Path) -> None:
    path, expected = tmp_path / "x", r"the config cannot be read from .*: No such file or directory; write one"
    with pytest.raises(ConfigError, match=expected), reading(path, "the config", ConfigError, fix="write one"):
        path.read_text()


def test_named_errors_our_own_faults_and_signals_pass_unchanged(tmp_path: Path) -> None:
    for error in (DataError("its own"), KeyboardInterrupt(), NotImplementedError()):
        with pytest.raises(type(error)) as raised, reading(tmp_path, "it", CheckpointError):
            raise error
        assert raised.value is error
    for error in (ValueError("ours"), TypeError("ours"), ConnectionResetError(104, "theirs"), TimeoutError()):
        with pytest.raises(type(error)) as raised, writing(tmp_path, "it"):
            raise error
        assert raised.value is error


def test_a_disk_error_is_an_os_error_that_reads_as_its_message() -> None:
    error = DiskError("the disk is full; free some space")
    error.errno = errno.ENOSPC
    assert isinstance(error, OSError) and str(error) == "the disk is full; free some space"


def test_errors_of_this_program_get_no_name() -> None:
    for error in (ValueError("x"), KeyError("x"), RuntimeError("x"), AssertionError("x")):
        assert named(error) is None
    assert isinstance(named(MemoryError()), MemoryLimitError)
    assert isinstance(named(torch.OutOfMemoryError("CUDA out of memory")), MemoryLimitError)
    assert isinstance(named(sqlite3.DatabaseError("database disk image is malformed")), DataError)
    own = DataError("it has a name")
    assert named(own) is own
    told = named(FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"))
    assert str(told) == "a/b: No such file or directory; correct the path, or make what is to be there"


def test_a_real_limit_of_open_files_is_reported(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = [(tmp_path / "first").open("w")]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[0].fileno() + 1, hard))
    expected = "Too many open files; raise the limit of open files"
    try:
        with pytest.raises(DiskError, match=expected), writing(tmp_path / "x", "it"):
            for number in range(1000):
                files.append((tmp_path / str(number)).open("w"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            file.close()


def test_an_errno_in_a_text_is_recognised() -> None:
    assert disk_number(Exception("oh (os error 28)")) == errno.ENOSPC
    assert disk_number(Exception("oh")) is None and disk_number(ConnectionResetError(104, "x")) is None


def test_the_wrapped_library_calls_work(tmp_path: Path) -> None:
    with writing(tmp_path / "x", "it"):
        save_file({"x": torch.ones(2)}, tmp_path / "x")
    with reading(tmp_path / "x", "it", CheckpointError):
        assert load_file(tmp_path / "x")["x"].tolist() == [1, 1]
