"""Digests: the same for the same content, another for damaged content."""

import hashlib
from datetime import date
from pathlib import Path

import pytest

from alignlab.files.digests import (
    DamagedError,
    digest_of_values,
    fast_digest,
    fast_digest_of_file,
    parse_sealed,
    sealed,
    sha256_of,
    sha256_of_file,
    unsealed,
)


def test_a_file_has_the_digests_of_its_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one block
    path = tmp_path / "file"
    path.write_bytes(content)
    assert sha256_of_file(path) == sha256_of(content) == hashlib.sha256(content).hexdigest()
    assert fast_digest_of_file(path) == fast_digest([content])


def test_parts_are_joined() -> None:
    assert fast_digest(["ab", b"c", memoryview(b"d")]) == fast_digest(["abcd"]) != fast_digest(["abce"])


def test_a_sealed_object_comes_back_and_a_changed_one_is_damaged() -> None:
    record = sealed({"step": 3, "sums": {1: 2.5}})
    assert unsealed(record) == {"step": 3, "sums": {"1": 2.5}}
    with pytest.raises(DamagedError, match="SHA-256"):
        unsealed(record | {"step": 4})
    with pytest.raises(DamagedError, match="no digest of itself"):
        unsealed({"step": 3})
    with pytest.raises(DamagedError, match="no JSON"):
        parse_sealed('{"step": 3')


def test_the_digest_of_values_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert digest_of_values([{"a": 1, "b": 2}]) == digest_of_values([{"b": 2, "a": 1}])
    values = [[1, 2], [2, 1], [12], ["12"], [1.0, 2], [{"a": 1}], [date(2024, 1, 1)], [b"a"], [2**5000], [None]]
    assert len({digest_of_values(each) for each in values}) == len(values)
