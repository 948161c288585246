from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.errors import RolloutError
from alignlab.rollout.embedded.block_manager import BlockManager, chain_digest

ACTIONS = st.lists(st.tuples(st.sampled_from(["take", "share", "release", "publish", "find"]), st.integers(0, 99)))


@given(num_blocks=st.integers(1, 6), actions=ACTIONS)
def test_any_use_leaks_nothing_and_gives_no_block_twice(num_blocks: int, actions: list[tuple[str, int]]) -> None:
    manager = BlockManager(num_blocks, 4)
    held: list[int] = []
    names: dict[bytes, int] = {}  # what a block was last published as, while it holds that content
    for action, number in actions:
        digest = bytes([number % 8])
        if action == "take" and manager.num_free:
            block = manager.allocate()
            assert block not in held
            names = {d: b for d, b in names.items() if b != block}
            held.append(block)
        elif action == "find":
            found = manager.find(digest)
            assert found == names.get(digest)
            held += [] if found is None else [found]
        elif held:
            block = held[number % len(held)]
            if action == "share":
                held.append(manager.share(block))
            elif action == "release":
                held.remove(block)
                manager.release(block)
            elif action == "publish" and digest not in names and block not in names.values():
                manager.publish(block, digest)
                names[digest] = block
        users = Counter(held)
        assert manager.num_free == num_blocks - len(users)
        assert all(manager.users(block) == users[block] for block in range(num_blocks))
        assert manager.num_published == len(names)
    for block in held:
        manager.release(block)
    assert manager.num_free == num_blocks


def test_an_empty_cache_is_named() -> None:
    manager = BlockManager(1, 4)
    manager.allocate()
    with pytest.raises(RolloutError, match="all 1 blocks of the cache are in use; raise"):
        manager.allocate()


def test_releasing_twice_is_refused() -> None:
    manager = BlockManager(1, 4)
    block = manager.allocate()
    manager.release(block)
    with pytest.raises(AssertionError, match="free already"):
        manager.release(block)


def test_published_blocks_are_reused_last_and_the_oldest_first() -> None:
    manager = BlockManager(3, 4)
    first, second, plain = (manager.allocate() for _ in range(3))
    manager.publish(first, b"1")
    manager.publish(second, b"2")
    for block in (first, second, plain):
        manager.release(block)
    assert [manager.allocate(), manager.allocate()] == [plain, first]
    assert manager.find(b"1") is None
    assert manager.find(b"2") == second


def test_a_found_block_is_not_taken_by_others() -> None:
    manager = BlockManager(2, 4)
    block = manager.allocate()
    manager.publish(block, b"1")
    manager.release(block)
    assert manager.find(b"1") == block
    assert manager.allocate() != block
    assert manager.num_free == 0


def test_the_first_block_with_a_digest_keeps_it() -> None:
    manager = BlockManager(2, 4)
    first, second = manager.allocate(), manager.allocate()
    manager.publish(first, b"1")
    manager.publish(second, b"1")
    manager.release(second)
    assert manager.find(b"1") == first


def test_forgetting_keeps_blocks_in_use() -> None:
    manager = BlockManager(2, 4)
    block = manager.allocate()
    manager.publish(block, b"1")
    manager.forget_all()
    assert manager.find(b"1") is None
    assert (manager.users(block), manager.num_free) == (1, 1)


def test_growing_keeps_what_is_there() -> None:
    manager = BlockManager(1, 4)
    block = manager.allocate()
    manager.publish(block, b"1")
    manager.grow(3)
    assert (manager.num_free, manager.find(b"1")) == (2, block)
    manager.grow(2)
    assert manager.num_blocks == 3


def test_digests_depend_on_all_that_precedes() -> None:
    digests = {chain_digest(parent, tokens) for parent in (b"", b"x") for tokens in ([1, 2], [2, 1], [1, 2, 0])}
    assert len(digests) == 6
    assert chain_digest(b"x", [1, 2]) == chain_digest(b"x", (1, 2))
