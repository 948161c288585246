"""The process group of weights, between plain processes over gloo: order, packing, deadlines, processes that fail."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.errors import ConfigError, RolloutError
from alignlab.rollout.vllm import packed_weights, weight_group
from alignlab.rollout.vllm.inside.asgi import Refusal
from alignlab.rollout.vllm.inside.uploads import parse_broadcast
from alignlab.rollout.vllm.packed_weights import TensorShape, buffers, receive, send, shapes_from_json, shapes_to_json
from alignlab.rollout.vllm.weight_broadcast import check_cards, listening_address
from alignlab.rollout.vllm.weight_group import BroadcastBroken, GroupInMaking, Rendezvous, address_towards, join

CPU = torch.device("cpu")
BUFFER_BYTES = 256
FORK = multiprocessing.get_context("fork")
KINDS = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def some_tensors() -> dict[str, Tensor]:
    """Return tensors of many sizes, of which some share a buffer, one is larger than it, and one is a scalar."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3,), (5, 7), (), (0, 4), (400,), (2, 2, 2), (33,), (1,), (6,), (9, 3)]
    return {
        f"tensor{index}": torch.randint(0, 2 if kind == torch.bool else 100, size, generator=generator).to(kind)
        for index, (size, kind) in enumerate(zip(sizes, KINDS * 2, strict=True))
    }


def transposed() -> dict[str, Tensor]:
    """Return tensors that are not contiguous."""
    return {"alone": torch.arange(600.0).view(20, 30).t(), "first": torch.arange(6.0).view(2, 3).t()}


def in_process(work: Callable[..., None], *arguments: Any) -> Any:
    """Start a process, which must end by itself."""
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def receiver(rendezvous: Rendezvous, rank: int, shapes: list[TensorShape], queue: Any) -> None:
    """Join, receive, and tell what arrived."""
    group = join(rendezvous, rank, CPU)
    stream = receive(shapes, group, buffer_bytes=BUFFER_BYTES)
    queue.put((rank, [(name, tensor.tolist(), str(tensor.dtype)) for name, tensor in stream]))


@pytest.mark.parametrize("make", [some_tensors, transposed])
def test_two_receivers_get_every_tensor_in_order(make: Callable[[], dict[str, Tensor]]) -> None:
    tensors = make()
    shapes, queue = packed_weights.shapes_of(tensors), FORK.Queue()
    in_making = GroupInMaking("127.0.0.1", 2, CPU)
    processes = [in_process(receiver, in_making.rendezvous, rank, shapes, queue) for rank in (1, 2)]
    group = in_making.join(lambda: False)
    send(tensors.items(), shapes, group, buffer_bytes=BUFFER_BYTES)
    expected = [(name, tensor.tolist(), str(tensor.dtype)) for name, tensor in tensors.items()]
    assert sorted(queue.get(timeout=60) for _ in processes) == [(1, expected), (2, expected)]
    for process in processes:
        process.join()


def test_small_tensors_share_aligned_buffers_and_large_ones_travel_alone() -> None:
    shapes = [TensorShape(str(size), torch.uint8, (size,)) for size in (100, 100, 100, 300, 10, 0, 5)]
    layout = [
        ([(start, shape.name) for start, shape in buffer.tensors], buffer.size)
        for buffer in buffers(shapes, BUFFER_BYTES)
    ]
    assert layout == [
        ([(0, "100"), (112, "100")], 212), ([(0, "100")], 100), ([(0, "300")], 300),
        ([(0, "10"), (16, "0"), (16, "5")], 21),
    ]  # fmt: skip


class Recorder:
    """Takes the place of a group; keeps the buffers that are sent."""

    device = CPU

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def broadcast(self, data: Tensor) -> None:
        """Keep a buffer."""
        self.sent.append(data.clone())

    def close(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("tensor1"), r"the next tensor to broadcast is tensor2 .*, and tensor1 .* was announced"),
        (lambda t: t.update(tensor0=t["tensor0"].double()), r"is tensor0 \(torch.float64, \(3,\)\), and tensor0"),
        (lambda t: t.popitem(), "is nothing"),
        (lambda t: t.update(more=torch.ones(1)), "tensor more is to be broadcast, and was not announced"),
    ],
)
def test_a_tensor_that_was_not_announced_is_refused(change: Any, message: str) -> None:
    tensors = some_tensors()
    shapes = packed_weights.shapes_of(tensors)
    change(tensors)
    with pytest.raises(RolloutError, match=message):
        send(tensors.items(), shapes, Recorder(), buffer_bytes=BUFFER_BYTES)


def test_no_more_than_a_buffer_is_read_before_it_is_sent() -> None:
    group, tensors = Recorder(), some_tensors()
    shapes = packed_weights.shapes_of(tensors)
    layout = list(buffers(shapes, BUFFER_BYTES))
    ends = [sum(len(buffer.tensors) for buffer in layout[: index + 1]) for index in range(len(layout))]

    def stream() -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(tensors.items()):
            assert len(group.sent) == sum(end <= index for end in ends)
            yield pair

    send(stream(), shapes, group, buffer_bytes=BUFFER_BYTES)
    assert [len(data) for data in group.sent] == [buffer.size for buffer in layout]


def dies(rendezvous: Rendezvous, rank: int, shapes: list[TensorShape], at: str) -> None:
    """Join, and die or stop taking part somewhere."""
    group = join(rendezvous, rank, CPU)
    stream = receive(shapes, group, buffer_bytes=BUFFER_BYTES)
    next(stream)
    if at == "hangs":
        FORK.Event().wait()
    os._exit(1)


@pytest.mark.parametrize("at", ["in the middle", "hangs"])
def test_a_process_that_fails_in_the_middle_ends_the_broadcast_by_name(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"tensor{number}": torch.zeros(2**22) for number in range(4)}  # more than sockets hold
    shapes = packed_weights.shapes_of(tensors)
    in_making = GroupInMaking("127.0.0.1", 1, CPU)
    process = in_process(dies, in_making.rendezvous, 1, shapes, at)
    group = in_making.join(lambda: False)
    monkeypatch.setattr(weight_group, "upload_deadline_s", lambda num_bytes: 1.0 if at == "hangs" else 60.0)
    with pytest.raises(BroadcastBroken, match="the broadcast of the weights broke off: "):
        send(tensors.items(), shapes, group, buffer_bytes=BUFFER_BYTES)
    process.kill()
    process.join()


def test_a_worker_that_never_joins_ends_the_wait_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_group, "JOIN_S", 0.2)
    in_making = GroupInMaking("127.0.0.1", 3, CPU)
    with pytest.raises(BroadcastBroken, match=r"3 of 3 workers did not reach 127.0.0.1 within 0.2 s"):
        in_making.join(lambda: False)
    with pytest.raises(BroadcastBroken):  # it listens no more
        join(in_making.rendezvous, 1, CPU)


def test_the_wait_ends_at_once_when_a_server_refuses() -> None:
    with pytest.raises(BroadcastBroken, match="a server will not take part"):
        GroupInMaking("127.0.0.1", 1, CPU).join(lambda: True)


def listening_sockets(port: int) -> list[str]:
    """Return the addresses of this machine at which something listens on a port, as the kernel spells them."""
    with open("/proc/net/tcp") as four, open("/proc/net/tcp6") as six:
        rows = [line.split() for line in (*four.readlines(), *six.readlines())]
    return [row[1] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port]


def test_the_rendezvous_listens_at_loopback_alone_and_only_until_the_group_is_made() -> None:
    in_making = GroupInMaking("127.0.0.1", 1, CPU)
    port = in_making.rendezvous.port
    assert listening_sockets(port) == [f"0100007F:{port:04X}"]
    queue = FORK.Queue()
    process = in_process(receiver, in_making.rendezvous, 1, [], queue)
    in_making.join(lambda: False)
    assert queue.get(timeout=60) == (1, [])
    process.join()
    assert listening_sockets(port) == []


def test_a_group_has_a_name_that_nobody_can_guess() -> None:
    first, second = (GroupInMaking("127.0.0.1", 1, CPU).rendezvous for _ in range(2))
    assert len(first.name) == 32 and first.name != second.name and first.port != second.port


def test_servers_on_this_machine_are_awaited_at_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listening_address(["http://127.0.0.1:1", "http://localhost:2"]) == "127.0.0.1"
    assert address_towards("127.0.0.5", 9) == "127.0.0.1"

    def no_way(host: str, port: int) -> str:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("alignlab.rollout.vllm.weight_broadcast.address_towards", no_way)
    with pytest.raises(ConfigError, match=r"no way leads to the server http://192.0.2.1:8000 \(Network is unreachable"):
        listening_address(["http://127.0.0.1:1", "http://192.0.2.1:8000"])


GPU = torch.device("cuda", 0)


def about(device: str, *cards: str) -> dict[str, Any]:
    return {"device": device, "cards": list(cards)}


@pytest.mark.parametrize(
    ("device", "abouts", "message"),
    [
        (CPU, [about("cuda", "b")], "the policy is on cpu and the server http://0 on cuda"),
        (GPU, [about("cpu", "")], "the policy is on cuda and the server http://0 on cpu"),
        (GPU, [about("cuda", "b", "a")], "the server http://0 shares the GPU a with the training, and NCCL takes one"),
        (GPU, [about("cuda", "b"), about("cuda", "b")], "http://1 shares the GPU b with the server http://0"),
        (GPU, [about("cuda", "b", "b")], "http://0 shares the GPU b with the server http://0"),
        (CPU, [{"device": "cpu"}], "the server http://0 does not tell its GPUs; start it with this version"),
    ],
)
def test_processes_that_cannot_be_in_one_group_are_refused(
    device: torch.device, abouts: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignlab.rollout.vllm.weight_broadcast.card_of", lambda d: "" if d == CPU else "a")
    servers = [(f"http://{number}", one) for number, one in enumerate(abouts)]
    with pytest.raises(ConfigError, match=f"rollout.transfer is broadcast, and .*{message}"):
        check_cards(device, servers)
    check_cards(CPU, [("http://0", about("cpu", "", "")), ("http://1", about("cpu", ""))])
    check_cards(GPU, [("http://0", about("cuda", "b", "c")), ("http://1", about("cuda", "d"))])


GOOD: dict[str, Any] = {
    "rendezvous": {"name": "n", "host": "127.0.0.1", "port": 5, "world_size": 4, "join_s": 9.5, "nccl_id": ""},
    "first_rank": 2, "buffer_bytes": 256, "tensors": [["a", "float32", [2, 3]]],
}  # fmt: skip


def rendezvous_with(**fields: Any) -> dict[str, Any]:
    return GOOD | {"rendezvous": GOOD["rendezvous"] | fields}


def test_an_announcement_is_understood() -> None:
    assert parse_broadcast(json.dumps(GOOD).encode(), num_workers=2, max_bytes=24) == GOOD
    assert shapes_to_json(shapes_from_json(GOOD["tensors"])) == GOOD["tensors"]


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (GOOD | {"tensors": [["a", "float32", [2, 4]]]}, 413),
        (GOOD | {"tensors": [["a", "complex64", [2]]]}, 400),
        (GOOD | {"tensors": [["a", "float32", [-2]]]}, 400),
        (GOOD | {"tensors": [["a", "float32", [True]]]}, 400),
        (GOOD | {"tensors": [["a", "float32"]]}, 400),
        (GOOD | {"tensors": GOOD["tensors"] * 2}, 400),
        (GOOD | {"tensors": {}}, 400),
        (GOOD | {"first_rank": 3}, 400),
        (GOOD | {"first_rank": 0}, 400),
        (GOOD | {"first_rank": "1"}, 400),
        (GOOD | {"buffer_bytes": 2**34}, 400),
        (rendezvous_with(port=0), 400),
        (rendezvous_with(port=2**16), 400),
        (rendezvous_with(world_size=1.5), 400),
        (rendezvous_with(name=""), 400),
        (rendezvous_with(host=7), 400),
        (rendezvous_with(more=1), 400),
        (rendezvous_with(join_s="1"), 400),
        (rendezvous_with(join_s=1e9), 400),
        ([], 400),
        ("x", 400),
    ],
)
def test_a_faulty_announcement_is_refused(message: Any, status: int) -> None:
    with pytest.raises(Refusal) as refused:
        parse_broadcast(json.dumps(message).encode(), num_workers=2, max_bytes=24)
    assert refused.value.status == status
