"""Cache on disk of a teacher's likeliest tokens at each position of a dataset, as memory-mapped arrays.

A folder, named by a digest of the teacher, the settings and the examples, holds three `.npy` files with one row for
each of the T trainable tokens of all examples, end to end:

    ids.npy       [T, K] int32    the likeliest tokens; vocabularies are larger than 16 bits
    logprobs.npy  [T, K] float32  their log-probs; in float16 those of unlikely tokens would be off by up to 0.4 %, and
                                  all probabilities would not sum to 1
    rest.npy      [T] float32     log of the probability of all other tokens

The arrays are written some examples at a time; `done.json` records how many examples are on the disk, with digests, so
that a process which was killed resumes there. The folder gets its name when it is complete. Damaged parts are computed
again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import nn

from alignlab.data.examples import Example
from alignlab.files.atomic_files import make_folder, sync_file, write_atomically
from alignlab.files.digests import DamagedError, fast_digest, fast_digest_of_file, parse_sealed, sealed
from alignlab.files.file_lock import one_at_a_time
from alignlab.files.library_errors import writing
from alignlab.files.paths import teacher_cache_folder
from alignlab.functional.distillation import TopTokens
from alignlab.models.fingerprints import model_digest, weights_fingerprint
from alignlab.models.weight_view import whole_parameters

logger = logging.getLogger(__name__)
_FORMAT = 2
_TYPES = {"ids": np.int32, "logprobs": np.float32, "rest": np.float32}
_DONE = "done.json"
ASKED_TOGETHER = 512

Ask = Callable[[Sequence[Example]], TopTokens]


class CachedTeacher:
    """A teacher's likeliest tokens, read from the disk.

    Args:
        folder: folder of the arrays.
        offsets: first row of each example, and at the end the number of rows.
    """

    def __init__(self, folder: Path, offsets: Sequence[int]) -> None:
        self._offsets = offsets
        self._arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _TYPES]

    def get(self, index: int) -> TopTokens:
        """Return the teacher's likeliest tokens at the trainable tokens of an example."""
        rows = slice(self._offsets[index], self._offsets[index + 1])
        return TopTokens(*(torch.from_numpy(np.array(array[rows])) for array in self._arrays))


def _reserve(path: Path) -> None:
    """Reserve the disk space of a file: a full disk under a memory-mapped file would end the process by SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _digests(folder: Path) -> dict[str, str]:
    """Return the digest of each array's file."""
    return {name: fast_digest_of_file(folder / f"{name}.npy") for name in _TYPES}


def _is_whole(folder: Path) -> bool:
    """Return True if all files are as they were written; warn if one is damaged."""
    if not folder.exists():
        return False
    try:
        whole = not _has_pipe(folder) and _read_done(folder)["digests"] == _digests(folder)
    except (OSError, KeyError, DamagedError):
        whole = False
    if not whole:
        logger.warning("the teacher's answers in %s are damaged, and are asked for again", folder)
    return whole


def _has_pipe(folder: Path) -> bool:
    """Return True if a folder holds a pipe, which a reader would wait for without an end."""
    return any(path.is_fifo() for path in folder.iterdir())


def _read_done(folder: Path) -> dict[str, Any]:
    """Return the content of `done.json`."""
    content = (folder / _DONE).read_bytes()
    try:
        return parse_sealed(content)
    except DamagedError:
        return _of_earlier_version(content)


def _of_earlier_version(content: bytes) -> dict[str, Any]:
    """Return the content of an earlier version's `done.json`, which has no digest of itself."""
    try:
        record = json.loads(content)
    except ValueError as error:
        raise DamagedError(f"it is no JSON: {error}") from error
    if not isinstance(record, dict) or record.keys() != {"examples", "digests"}:
        raise DamagedError("it holds no digest of itself")
    return record


def _rows_digest(arrays: Sequence[np.memmap], rows: slice) -> str:
    """Return the digest of some rows of all arrays."""
    return fast_digest(np.ascontiguousarray(array[rows]).tobytes() for array in arrays)


class TeacherCache:
    """Folders of answers in `teacher_cache_folder()`.

    Args:
        model: the teacher, with or without an adapter.
        k, temperature, width: see `functional.distillation.chunked_top_tokens`.
    """

    def __init__(self, model: nn.Module, *, k: int, temperature: float, width: int) -> None:
        self._k = k
        adapters = [[n, c.r, c.lora_alpha, c.use_rslora] for n, c in sorted(getattr(model, "peft_config", {}).items())]
        weights = [model_digest(model), weights_fingerprint(whole_parameters(model)), adapters]
        self._key = [_FORMAT, weights, k, temperature, width]
        self._folder = teacher_cache_folder()

    def path(self, examples: Sequence[Example]) -> Path:
        """Return the folder of the answers about these examples."""
        questions = (json.dumps([example.token_ids, example.completion_mask]) for example in examples)
        return self._folder / fast_digest(chain([json.dumps(self._key)], questions))

    def get_or_make(self, examples: Sequence[Example], ask: Ask) -> CachedTeacher:
        """Return the answers about all examples: from the cache, or by `ask`."""
        path = self.path(examples)
        offsets = [0, *accumulate(sum(example.completion_mask) for example in examples)]
        make_folder(self._folder)
        with one_at_a_time(path, "asks the teacher"):
            if not _is_whole(path):
                shutil.rmtree(path, ignore_errors=True)
                self._make(path, examples, offsets, ask)
        return CachedTeacher(path, offsets)

    def _make(self, path: Path, examples: Sequence[Example], offsets: Sequence[int], ask: Ask) -> None:
        unfinished = path.with_name(f".{path.name}.tmp")
        unfinished.mkdir(exist_ok=True)
        if _has_pipe(unfinished):
            shutil.rmtree(unfinished)
            unfinished.mkdir()
        row = sum(np.dtype(kind).itemsize * (1 if name == "rest" else self._k) for name, kind in _TYPES.items())
        size = offsets[-1] * row
        print(f"alignlab: the teacher's answers take {size / 2**30:.2f} GiB, in {path}", file=sys.stderr)
        arrays, parts = self._go_on(unfinished, offsets)
        for start in range(parts[-1][0] if parts else 0, len(examples), ASKED_TOGETHER):
            stop = min(start + ASKED_TOGETHER, len(examples))
            for array, answer in zip(arrays, ask(examples[start:stop]), strict=True):
                array[offsets[start] : offsets[stop]] = answer.numpy()
                array.flush()
            parts.append((stop, _rows_digest(arrays, slice(offsets[start], offsets[stop]))))
            write_atomically(unfinished / _DONE, json.dumps(sealed({"parts": parts})))
            print(f"\ralignlab: the teacher has read {stop} of {len(examples)} examples", end="", file=sys.stderr)
        print(file=sys.stderr, flush=True)
        for name in _TYPES:
            sync_file(unfinished / f"{name}.npy")
        record = {"parts": parts, "digests": _digests(unfinished)}
        write_atomically(unfinished / _DONE, json.dumps(sealed(record)))
        os.replace(unfinished, path)
        sync_file(path.parent)

    def _go_on(self, folder: Path, offsets: Sequence[int]) -> tuple[list[np.memmap], list[tuple[int, str]]]:
        """Return the arrays, and (number of examples done, digest) of each part that an earlier process has written.

        From the first damaged part on, all examples are asked about again.
        """
        if not (folder / _DONE).exists():
            return self._arrays(folder, offsets[-1], new=True), []
        intact: list[tuple[int, str]] = []
        try:
            parts = _read_done(folder)["parts"]
            arrays = self._arrays(folder, offsets[-1], new=False)
        except (OSError, ValueError, KeyError) as error:
            logger.warning("the teacher's answers in %s are damaged (%s), and are asked for again", folder, error)
            return self._arrays(folder, offsets[-1], new=True), []
        for stop, digest in parts:
            start = intact[-1][0] if intact else 0
            if _rows_digest(arrays, slice(offsets[start], offsets[stop])) != digest:
                logger.warning(
                    "the teacher's answers in %s are damaged from example %d on, and are asked for again", folder, start
                )
                break
            intact.append((stop, digest))
        return arrays, intact

    def _arrays(self, folder: Path, num_rows: int, *, new: bool) -> list[np.memmap]:
        shapes = {"ids": (num_rows, self._k), "logprobs": (num_rows, self._k), "rest": (num_rows,)}
        mode = "w+" if new else "r+"
        arrays = []
        for name, dtype in _TYPES.items():
            path = folder / f"{name}.npy"
            with writing(path, "the teacher's answers"):
                arrays.append(open_memmap(path, mode=mode, dtype=dtype, shape=shapes[name]))
                _reserve(path)
        for (name, dtype), array in zip(_TYPES.items(), arrays, strict=True):
            if array.shape != shapes[name] or array.dtype != dtype:
                raise ValueError(f"{name}.npy is {array.dtype} {list(array.shape)}, not {list(shapes[name])}")
        return arrays
