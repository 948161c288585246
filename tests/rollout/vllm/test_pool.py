"""The pool of servers, over connections that break, against stand-ins that speak its protocol and compute nothing."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from alignlab.errors import RolloutError
from alignlab.rollout.vllm.server.client import ServerLost
from alignlab.rollout.vllm.server.pool import ServerPool
from tests.rollout.vllm.stand_in import RUN, StandIn, requests, weights


def one_is_being_given_the_weights(start: Any, connect: Any) -> tuple[ServerPool, StandIn, StandIn]:
    """(pool, its server that lives, one started again after a loss, which has not yet said that it has the weights)."""
    first, second = start(), start()
    pool = connect(first, second)
    second.die()
    while len(pool.alive) == 2:
        pool.answers(requests(4))
    again = start(second.server_port)
    again.free.clear()
    while not again.began.is_set():
        pool.answers(requests(1))
    return pool, first, again


def test_a_server_that_is_back_is_given_the_weights_once_however_short_the_requests(start: Any, connect: Any) -> None:
    """Requests on the others end, and giving it the weights goes on."""
    pool, _, again = one_is_being_given_the_weights(start, connect)
    for _ in range(20):
        assert [answer.token_ids for answer in pool.answers(requests(2))] == [(7,), (7,)]
    assert len(pool.alive) == 1
    again.free.set()
    while len(pool.alive) == 1:
        pool.answers(requests(1))
    assert (again.num_puts, again.version) == (1, f"{RUN}-1-1")
    assert pool.counts["returned"] == 1


def test_an_update_waits_for_the_weights_that_a_server_is_being_given(start: Any, connect: Any, tmp_path: Path) -> None:
    pool, first, again = one_is_being_given_the_weights(start, connect)
    update = threading.Thread(target=lambda: pool.put(weights(tmp_path, 2)))
    update.start()
    while first.version != f"{RUN}-2-2":
        pass
    assert again.version is None
    again.free.set()
    update.join()
    assert again.version == f"{RUN}-2-2" and len(pool.alive) == 2


def test_no_connection_is_left_open_where_requests_are_given_up_in_the_middle(start: Any, connect: Any) -> None:
    """The first request after a server's death tidies up its many connections, and is given up while it does."""
    server = start()
    pool = connect(server)
    server.together = threading.Barrier(60)
    pool.answers_of(pool.alive[0], requests(60))
    [known] = pool.alive
    server.die()
    with pytest.raises(ServerLost):
        pool.answers_of(known, requests(2))
    gc.collect()  # an open connection that nobody holds is an error of this test


def test_who_waits_when_all_is_given_up_hears_of_it(start: Any, connect: Any) -> None:
    server = start()
    pool = connect(server)
    server.together = threading.Barrier(3)  # the third never comes
    errors: list[Exception] = []

    def ask() -> None:
        try:
            pool.answers(requests(2))
        except RolloutError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert server.asked.acquire() and server.asked.acquire()
    pool.abandon()
    thread.join()
    assert [str(error) for error in errors] == ["generation was abandoned, because the run ends"]
    server.together.abort()
    assert pool.answers(requests(1))[0].token_ids == (7,)


def test_the_cause_of_an_error_survives_the_others_that_ran_beside_it(connect: Any, start: Any) -> None:
    """Of several requests to a server that is gone, one error is raised, and it tells the connection's."""
    server = start()
    pool = connect(server)
    [known] = pool.alive
    server.die()
    with pytest.raises(ServerLost, match="ConnectError") as raised:
        pool.answers_of(known, requests(3))
    assert isinstance(raised.value.__cause__, httpx2.ConnectError)
