"""Digests of weights on their way to an engine, computed where the weights lie, by one of two algorithms.

Of tensors on a CPU it is XXH3 over their bytes, at the speed of memory. Of tensors on a GPU it is two sums of words, so
that no weight is copied to the host. A trainer compares with an engine that may be elsewhere: it takes the algorithm of
the engine's device.

Word sums: a tensor's bytes are 32-bit words w[i], signed, in rows of P = 4,096 words, and two sums wrap around in 64
bits:

    first  = sum over i of  w[i] * (2 i + 1)
    second = sum over i of  w[i] * R[i mod P] * Q[i div P]        R, Q: pseudo-random odd numbers, always the same

Both are exact, so that order, blocks and device do not matter, and sums of parts add up to the sums of the whole. Every
multiplier is odd: a single word that changed always changes both sums. Two unequal words at exchanged places always
change the first sum, in tensors of up to 16 GiB, because (w - v) * 2 (i - j) is then no multiple of 2^64. Anything else
escapes the second sum, a multilinear hash, with a probability of at most about 2^-32, and of about 2^-60 unless the
words differ in their highest bits alone. Lemire and Kaser (2014), "Strongly universal string hashing is fast",
arXiv:1202.4961.

The digests find accidents, not intent. Digests that are kept in files are of `fingerprints`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignlab.files.digests import fast_digest

WORD_SUMS = "word-sums-1"
XXH3 = "xxh3-128"
ALGORITHMS = (WORD_SUMS, XXH3)
"""Names of the algorithms; trainer and engine must take the same."""
_WORD_BYTES = 4
_ROW = 4096
"""Words in a row."""
_MAX_ROWS_CPU, _MAX_ROWS_GPU = 16, 2048
"""Rows computed at once: within a CPU's cache; on a GPU, 64-bit copies and products of 8 million words, 128 MiB."""


def algorithm_on(device_type: str) -> str:
    """Return the algorithm for tensors on a device of this type, such as "cpu"."""
    return XXH3 if device_type == "cpu" else WORD_SUMS


class PendingDigests:
    """Digests of tensors by name, whose word sums stay on the tensors' device until `read`."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._kinds: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor, *, algorithm: str | None = None) -> None:
        """Digest a tensor as it is now.

        Word sums do not wait for a GPU. XXH3 of a tensor on a GPU copies it to the host.

        Args:
            name: of the tensor.
            tensor: of any dtype, on any device.
            algorithm: of `ALGORITHMS`; default: that of the tensor's device.
        """
        algorithm = algorithm or algorithm_on(tensor.device.type)
        kind = _kind(algorithm, tensor.dtype, tensor.shape)
        if algorithm == XXH3:
            self._digests[name] = fast_digest([f"{kind}:", _bytes_of(tensor).cpu().numpy().data])
            return
        self._kinds[name], self._sums[name] = kind, content_sums(tensor)

    def read(self) -> dict[str, str]:
        """Return the digests; the sums come to the host in one transfer from each device."""
        by_device: dict[torch.device, list[str]] = {}
        for name, sums in self._sums.items():
            by_device.setdefault(sums.device, []).append(name)
        pairs = {
            name: pair
            for names in by_device.values()
            for name, pair in zip(names, torch.stack([self._sums[n] for n in names]).tolist(), strict=True)
        }
        return self._digests | {name: _digest(kind, pairs[name]) for name, kind in self._kinds.items()}


def sync_digests(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], *, algorithm: str | None = None
) -> dict[str, str]:
    """Return the digest of each tensor, 128 bits in hexadecimal, by name.

    Args:
        tensors: by name.
        algorithm: of `ALGORITHMS`; default: for each tensor that of its device.
    """
    pending = PendingDigests()
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        pending.add(name, tensor, algorithm=algorithm)
    return pending.read()


def digest_of_sums(dtype: torch.dtype, shape: Iterable[int], sums: Tensor) -> str:
    """Return the digest by word sums of a tensor whose parts are on several ranks.

    Args:
        dtype: of the tensor.
        shape: of the whole tensor.
        sums: `content_sums` of all parts, added up, [2].
    """
    return _digest(_kind(WORD_SUMS, dtype, shape), sums.tolist())


@torch.no_grad()
def content_sums(part: Tensor, *, offset: int = 0) -> Tensor:
    """Return the two sums of a tensor's bytes, [2] int64, on the tensor's device.

    Sums of disjoint parts of a tensor add up to those of the tensor, whatever their sizes.

    Args:
        part: the tensor, or a contiguous slice of it when flattened.
        offset: number of the whole tensor's elements before the slice.
    """
    data = _bytes_of(part)
    blocks = _blocks(data, offset * part.element_size())
    return _sums_on_cpu(blocks) if data.device.type == "cpu" else _sums_on_gpu(blocks, data.device)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, [B] uint8, on its device."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _blocks(data: Tensor, first_byte: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the first word, words [rows, columns] int32): whole rows together, parts of a row alone."""
    start, end = first_byte, first_byte + len(data)
    max_rows = _MAX_ROWS_CPU if data.device.type == "cpu" else _MAX_ROWS_GPU
    while start < end:
        word = start // _WORD_BYTES
        is_start_of_row = start % (_ROW * _WORD_BYTES) == 0
        num_rows = min((end - start) // (_ROW * _WORD_BYTES), max_rows) if is_start_of_row else 0
        stop = (word // _ROW + max(num_rows, 1)) * _ROW * _WORD_BYTES
        words = _words(data[start - first_byte : stop - first_byte], start % _WORD_BYTES)
        yield word, words.view(max(num_rows, 1), -1)
        start = stop


def _words(data: Tensor, num_before: int) -> Tensor:
    """Return bytes as int32 words, of which the first has `num_before` more bytes before these.

    Zeros stand for missing bytes of the first and the last word: a signed word is the sum of its bytes' values.
    """
    if num_before == data.storage_offset() % _WORD_BYTES == len(data) % _WORD_BYTES == 0:
        return data.view(torch.int32)
    size = num_before + len(data)
    padded = torch.zeros(size + -size % _WORD_BYTES, dtype=torch.uint8, device=data.device)
    padded[num_before:size] = data
    return padded.view(torch.int32)


def _sums_on_cpu(blocks: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Return the sums of all blocks; a dot product of integers, which CUDA does not have, needs no products in memory.
    """
    odd, random = (table.numpy() for table in _multipliers(torch.device("cpu")))
    memory = np.empty(0, np.int64)  # reused, which is faster than memory from the system
    sums = np.zeros(2, np.int64)
    for word, block in blocks:
        row, column = divmod(word, _ROW)
        memory = memory if len(memory) >= block.numel() else np.empty(block.numel(), np.int64)
        words = memory[: block.numel()].reshape(block.shape)
        words[:] = block.numpy()
        end = column + block.shape[1]
        rows = np.arange(row, row + len(words), dtype=np.int64)
        sums += _sums_of_rows(words.sum(1), words.dot(odd[column:end]), words.dot(random[column:end]), rows)
    return torch.from_numpy(sums)


def _sums_on_gpu(blocks: Iterable[tuple[int, Tensor]], device: torch.device) -> Tensor:
    """Return the sums of all blocks, on their device."""
    odd, random = _multipliers(device)
    sums = torch.zeros(2, dtype=torch.int64, device=device)
    for word, block in blocks:
        row, column = divmod(word, _ROW)
        words, end = block.long(), column + block.shape[1]
        linear, mixed = (words * odd[column:end]).sum(1), (words * random[column:end]).sum(1)
        rows = torch.arange(row, row + len(words), device=device)
        sums += torch.stack(_sums_of_rows(words.sum(1), linear, mixed, rows))
    return sums


def _sums_of_rows(plain: Any, linear: Any, mixed: Any, rows: Any) -> tuple[Any, Any]:
    """Return (first, second) from the sums of each row [rows]: of its words, and of its words times either table."""
    return (linear + plain * rows * (2 * _ROW)).sum(), (mixed * _random_odd(rows)).sum()


@cache
def _multipliers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the odd numbers from 1 on, and random odd numbers, [_ROW] int64 each, on a device."""
    columns = torch.arange(_ROW)
    return (2 * columns + 1).to(device), _random_odd(-1 - columns).to(device)  # other arguments than a row's number


def _random_odd(numbers: Any) -> Any:
    """Return an odd number for each number, as SplitMix64 mixes bits: Steele, Lea and Flood (2014).

    Args:
        numbers: int64, of numpy or of torch, whose arithmetic is the same: it wraps around, and shifts keep the sign.
    """
    bits = (numbers + 1) * -0x61C8864680B583EB
    bits = (bits ^ (bits >> 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27)) * -0x6B2FB644ECCEEE15
    return (bits ^ (bits >> 31)) | 1


def _kind(algorithm: str, dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{algorithm}:{dtype}{tuple(shape)}"


def _digest(kind: str, sums: Iterable[int]) -> str:
    return fast_digest([kind, *(f":{value % 2**64:016x}" for value in sums)])
