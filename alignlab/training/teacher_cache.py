"""What a teacher answers at each token of a dataset, asked once and kept on disk as memory-mapped arrays.

A folder by all that the answers depend on holds three `.npy` files, one row for each of the T taught tokens of all
examples, end to end:

    ids.npy       [T, K] int32    the likeliest tokens; vocabularies are larger than 16 bits
    logprobs.npy  [T, K] float32  of these; in float16 those of unlikely tokens would be off by up to 0.4 %, and the
                                  probabilities with the rest would not add up to 1
    rest.npy      [T] float32     log of the probability of all other tokens

They are written some examples at a time, and how many are on the disk is told beside them, with digests: a process that
is killed midway goes on from there. The folder gets its name when all is there. What is found damaged is asked again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.lib.format import open_memmap
from torch import nn

from alignlab.atomic_files import make_folder, sync_file, write_atomically
from alignlab.data.examples import Example
from alignlab.digests import READ_BYTES, DamagedError, parse_sealed, sealed
from alignlab.file_lock import one_at_a_time
from alignlab.functional.distillation import TopTokens
from alignlab.library_errors import writing
from alignlab.models.packaged import cache_folder
from alignlab.training.checkpoint import fingerprint
from alignlab.training.reference_cache import digest_of_model

logger = logging.getLogger(__name__)
_FORMAT = 2
_TYPES = {"ids": np.int32, "logprobs": np.float32, "rest": np.float32}
_DONE = "done.json"
ASKED_TOGETHER = 512

Ask = Callable[[Sequence[Example]], TopTokens]


class KeptTeacher:
    """Answers on disk, read where they are asked for.

    Args:
        folder: of the arrays.
        offsets: the first row of each example, and the number of rows.
    """

    def __init__(self, folder: Path, offsets: Sequence[int]) -> None:
        self._offsets = offsets
        self._arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _TYPES]

    def of(self, index: int) -> TopTokens:
        """What the teacher answers at the taught tokens of one example."""
        rows = slice(self._offsets[index], self._offsets[index + 1])
        return TopTokens(*(torch.from_numpy(np.array(array[rows])) for array in self._arrays))


def _reserve(path: Path) -> None:
    """Have the disk set aside all of a file: writing to its memory on a full disk would end the process by a signal."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _digests(folder: Path) -> dict[str, str]:
    """Of each array's file."""
    found = {}
    for name in _TYPES:
        digest = xxhash.xxh3_128()
        with (folder / f"{name}.npy").open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
        found[name] = digest.hexdigest()
    return found


def _is_whole(folder: Path) -> bool:
    """Whether the files are what was written; says so where they are not."""
    if not folder.exists():
        return False
    try:
        whole = _read_done(folder)["digests"] == _digests(folder)
    except (OSError, KeyError, DamagedError):
        whole = False
    if not whole:
        logger.warning("the teacher's answers in %s are damaged, and are asked for again", folder)
    return whole


def _read_done(folder: Path) -> dict[str, Any]:
    """What is told of a folder's arrays."""
    content = (folder / _DONE).read_bytes()
    try:
        return parse_sealed(content)
    except DamagedError:
        return _of_earlier_version(content)


def _of_earlier_version(content: bytes) -> dict[str, Any]:
    """What an earlier version told of a whole folder, without a digest of that itself."""
    try:
        told = json.loads(content)
    except ValueError as error:
        raise DamagedError(f"it is no JSON: {error}") from error
    if not isinstance(told, dict) or told.keys() != {"examples", "digests"}:
        raise DamagedError("it holds no digest of itself")
    return told


def _rows_digest(arrays: Sequence[np.memmap], rows: slice) -> str:
    """Of some rows of all arrays."""
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(np.ascontiguousarray(array[rows]).tobytes())
    return digest.hexdigest()



class TeacherCache:
    """Folders in `teacher/` of the folder of converted models.

    Args:
        model: the teacher, with or without an adapter.
        k, temperature, width: see `functional.distillation.chunked_top_tokens`.
    """

    def __init__(self, model: nn.Module, *, k: int, temperature: float, width: int) -> None:
        self._k = k
        adapters = [[n, c.r, c.lora_alpha, c.use_rslora] for n, c in sorted(getattr(model, "peft_config", {}).items())]
        weights = [digest_of_model(model), fingerprint(model.named_parameters()), adapters]
        self._told = [_FORMAT, weights, k, temperature, width]
        self._folder = cache_folder() / "teacher"

    def path(self, examples: Sequence[Example]) -> Path:
        """Where the answers about these examples are kept."""
        digest = xxhash.xxh3_128(json.dumps(self._told).encode())
        for example in examples:
            digest.update(json.dumps([example.token_ids, example.completion_mask]).encode())
        return self._folder / digest.hexdigest()

    def get_or_make(self, examples: Sequence[Example], ask: Ask) -> KeptTeacher:
        """The answers about all of `examples`: as kept, or asked for now and kept."""
        path = self.path(examples)
        offsets = [0, *accumulate(sum(example.completion_mask) for example in examples)]
        make_folder(self._folder)
        with one_at_a_time(path, "asks the teacher"):
            if not _is_whole(path):
                shutil.rmtree(path, ignore_errors=True)
                self._make(path, examples, offsets, ask)
        return KeptTeacher(path, offsets)

    def _make(self, path: Path, examples: Sequence[Example], offsets: Sequence[int], ask: Ask) -> None:
        unfinished = path.with_name(f".{path.name}.tmp")
        unfinished.mkdir(exist_ok=True)
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
        told = {"parts": parts, "digests": _digests(unfinished)}
        write_atomically(unfinished / _DONE, json.dumps(sealed(told)))
        os.replace(unfinished, path)
        sync_file(path.parent)

    def _go_on(self, folder: Path, offsets: Sequence[int]) -> tuple[list[np.memmap], list[tuple[int, str]]]:
        """The arrays, and the parts of them that an earlier call has written: (examples done, digest) of each.

        From the first part that is damaged on, all is asked again.
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
