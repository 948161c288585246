"""The pool of servers, with connections that break, against stand-ins that compute nothing."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from alignlab.errors import RolloutError
from alignlab.rollout.vllm.client import ServerLost
from alignlab.rollout.vllm.pool import ServerPool
from tests.rollout.vllm.stand_in import RUN, StandIn, requests, weights


def pool_with_an_upload_in_flight(start: Any, connect: Any) -> tuple[ServerPool, StandIn, StandIn]:
    """Return (pool, its server that lives, a server restarted after a loss that has not answered its upload yet)."""
    first, second = start(), start()
    pool = connect(first, second)
    second.die()
    while len(pool.alive) == 2:
        pool.answers(requests(4))
    again = start(second.server_port)
    again.may_answer_put.clear()
    while not again.put_began.is_set():
        pool.answers(requests(1))
    return pool, first, again


def test_a_returning_server_is_sent_the_weights_once_however_short_the_requests(start: Any, connect: Any) -> None:
    """The upload goes on when the requests on other servers end."""
    pool, _, again = pool_with_an_upload_in_flight(start, connect)
    for _ in range(20):
        assert [answer.token_ids for answer in pool.answers(requests(2))] == [(7,), (7,)]
    assert len(pool.alive) == 1
    again.may_answer_put.set()
    while len(pool.alive) == 1:
        pool.answers(requests(1))
    assert (again.num_puts, again.version) == (1, f"{RUN}-1-1")
    assert pool.counts["returned"] == 1


def test_an_update_waits_for_an_upload_in_flight(start: Any, connect: Any, tmp_path: Path) -> None:
    pool, first, again = pool_with_an_upload_in_flight(start, connect)
    update = threading.Thread(target=lambda: pool.put(weights(tmp_path, 2)))
    update.start()
    while first.version != f"{RUN}-2-2":
        pass
    assert again.version is None
    again.may_answer_put.set()
    update.join()
    assert again.version == f"{RUN}-2-2" and len(pool.alive) == 2


def test_cancelled_requests_leave_no_connection_open(start: Any, connect: Any) -> None:
    """The first request after a server's death closes its many connections, and is cancelled meanwhile."""
    server = start()
    pool = connect(server)
    server.together = threading.Barrier(60)
    pool.answers_of(pool.alive[0], requests(60))
    [server_of_pool] = pool.alive
    server.die()
    with pytest.raises(ServerLost):
        pool.answers_of(server_of_pool, requests(2))
    gc.collect()  # pytest turns the warning of a leaked connection into an error


def test_abandoned_calls_raise(start: Any, connect: Any) -> None:
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
    assert server.num_requests.acquire() and server.num_requests.acquire()
    pool.abandon()
    thread.join()
    assert [str(error) for error in errors] == ["generation was abandoned, because the run ends"]
    server.together.abort()
    assert pool.answers(requests(1))[0].token_ids == (7,)


def test_of_several_concurrent_errors_one_is_raised_with_its_cause(connect: Any, start: Any) -> None:
    server = start()
    pool = connect(server)
    [server_of_pool] = pool.alive
    server.die()
    with pytest.raises(ServerLost, match="ConnectError") as raised:
        pool.answers_of(server_of_pool, requests(3))
    assert isinstance(raised.value.__cause__, httpx2.ConnectError)
