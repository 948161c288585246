"""Weights broadcast to real servers: from whole and from spread weights, with servers that fail in the middle."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignlab.config.model import LoraSettings
from alignlab.errors import RolloutError
from alignlab.models.adapters import add_lora
from alignlab.types import SamplingParams
from tests.rollout.conftest import flat, make_prompts
from tests.rollout.vllm.conftest import DENSE, make_model, wait_until_up
from tests.rollout.vllm.test_sync import shake

pytestmark = pytest.mark.vllm
SAMPLING = SamplingParams(n=4, max_new_tokens=20, ignore_eos=True, seed=3)


@pytest.fixture(scope="module")
def pair(serve: Callable[..., Any], make_client: Callable[..., Any]) -> tuple[Any, Any, Any, Any]:
    """Return (engine, model, settings, processes) of two servers that get weights by broadcast."""
    model = make_model(DENSE)
    settings, processes = serve(model, count=2, transfer="broadcast")
    return make_client(model, settings), model, settings, processes


def tokens(engine: Any) -> list[tuple[int, ...]]:
    return [c.token_ids for c in flat(engine.generate(make_prompts(5, 9, 30, 17), SAMPLING))]


def test_two_servers_get_the_weights_of_every_update_in_one_group(pair: Any) -> None:
    engine, model, _, _ = pair
    names = set()
    for _ in range(3):
        shake(model)
        engine.update_weights(engine.policy_version + 1)
        assert engine.last_sync.gap.largest < 5e-5
        names.add(engine._backend._broadcast._rendezvous.name)
    assert len(names) == 1 and engine.metrics()["servers/alive"] == 2
    assert engine.last_sync.transfer.num_bytes == sum(w.nbytes for w in model.state_dict().values())
    assert engine._backend._pool._delivery.sent.path is None


HALF_OF_A_LAYER = "model.layers.1.mlp.up_proj.weight"
"""vLLM puts it into one matrix with another one, which comes before it."""


def at_tensor(name: str, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `action` once, before the trainer sends a tensor; buffers are small, so that it travels alone."""
    from alignlab.rollout.vllm import packed_weights

    monkeypatch.setattr(packed_weights, "BUFFER_BYTES", 4096)
    fill, actions = packed_weights._filled, [action]

    def filled(buffer: Any, *others: Any) -> Any:
        if buffer.tensors[0][1].name == name and actions:
            actions.pop()()
        return fill(buffer, *others)

    monkeypatch.setattr(packed_weights, "_filled", filled)


def test_a_server_that_dies_in_the_middle_is_left_out_and_joins_the_next_update(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that lives has loaded half of the weights, and is sent them again."""
    engine, model, _, processes = pair
    before = engine.metrics()
    shake(model)
    with monkeypatch.context() as patch:
        at_tensor(HALF_OF_A_LAYER, lambda: processes[1].send_signal(signal.SIGKILL), patch)
        engine.update_weights(engine.policy_version + 1)
    after = engine.metrics()
    assert after["servers/alive"] == 1 and after["servers/lost"] == before["servers/lost"] + 1
    assert engine.last_sync.gap.largest < 5e-5
    expected = tokens(engine)
    processes[1].process.wait()
    processes[1].start()
    wait_until_up(processes[1])
    assert tokens(engine) == expected and engine.metrics()["servers/alive"] == 1
    shake(model)
    engine.update_weights(engine.policy_version + 1)
    assert engine.metrics()["servers/alive"] == 2 and engine.last_sync.gap.largest < 5e-5


def test_weights_are_right_after_a_broadcast_that_broke_off_between_the_halves_of_a_matrix(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignlab.rollout.vllm.weight_group import BroadcastBroken

    engine, model, _, _ = pair
    before = engine.metrics()

    def break_off() -> None:
        raise BroadcastBroken("a cable was pulled")

    shake(model)
    with monkeypatch.context() as patch:
        at_tensor(HALF_OF_A_LAYER, break_off, patch)
        engine.update_weights(engine.policy_version + 1)
    assert engine.last_sync.gap.largest < 5e-5
    assert engine.metrics()["servers/lost"] == before["servers/lost"]


def test_a_server_that_hangs_in_the_middle_is_left_out(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model, _, processes = pair
    shake(model)
    with monkeypatch.context() as patch:
        patch.setattr("alignlab.rollout.vllm.weight_group.upload_deadline_s", lambda num_bytes: 2.0)
        patch.setattr("alignlab.rollout.vllm.weight_broadcast.ANSWER_S", 2.0)
        patch.setattr("alignlab.rollout.vllm.client.CONNECT_S", 2.0)
        at_tensor(HALF_OF_A_LAYER, lambda: processes[0].send_signal(signal.SIGSTOP), patch)
        try:
            engine.update_weights(engine.policy_version + 1)
        finally:
            processes[0].send_signal(signal.SIGCONT)
    assert engine.metrics()["servers/alive"] == 1 and engine.last_sync.gap.largest < 5e-5
    shake(model)
    engine.update_weights(engine.policy_version + 1)
    assert engine.metrics()["servers/alive"] == 2 and engine.last_sync.gap.largest < 5e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model.norm.weight"].add_(1e-6), "tensor model.norm.weight arrived with another content"),
        (lambda t: t.update({"model.more": t["model.norm.weight"]}), r"refuses /alig.* no module or .* named \W*more"),
    ],
)
def test_a_tensor_that_is_changed_or_refused_ends_the_update_by_name(
    change: Any, message: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine refuses to generate until an update succeeds."""
    from alignlab.rollout.vllm import packed_weights

    engine, _, settings, _ = pair
    send = packed_weights.send

    def tampered(weights: Any, shapes: Any, group: Any, **options: Any) -> None:
        copies = {name: tensor.detach().clone() for name, tensor in weights}
        change(copies)
        send(copies.items(), packed_weights.shapes_of(copies), group, **options)

    announced = type(engine._backend._broadcast)._start_taking

    def tampered_announcement(broadcast: Any, described: Any, shapes: Any, *others: Any) -> Any:
        copies = {shape.name: torch.zeros(shape.shape, dtype=shape.dtype) for shape in shapes}
        change(copies)
        return announced(broadcast, described, packed_weights.shapes_of(copies), *others)

    with monkeypatch.context() as patch:
        patch.setattr(packed_weights, "send", tampered)
        patch.setattr(type(engine._backend._broadcast), "_start_taking", tampered_announcement)
        with pytest.raises(RolloutError, match=message):
            engine.update_weights(engine.policy_version + 1)
    with pytest.raises(RolloutError, match="in doubt since an update that failed"):
        engine.generate(make_prompts(3), SamplingParams())
    engine.update_weights(engine.policy_version + 1)
    assert engine.last_sync.gap.largest < 5e-5 and engine.metrics()["servers/alive"] == len(settings.servers)


def test_a_server_that_does_not_join_is_named(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told an address at which nobody listens, and so are all others."""
    from alignlab.rollout.vllm import verified_engine, weight_broadcast

    engine = pair[0]
    engine._backend._broadcast.close()
    rendezvous = weight_broadcast.asdict
    with monkeypatch.context() as patch:
        patch.setattr(weight_broadcast, "asdict", lambda value: rendezvous(value) | {"port": 1})
        patch.setattr("alignlab.rollout.vllm.weight_group.JOIN_S", 1.0)
        patch.setattr(verified_engine, "_MAX_BROADCASTS", 2)
        with pytest.raises(RolloutError, match=r"workers did not reach 127.0.0.1 within 1 s, 2 times; use"):
            engine.update_weights(engine.policy_version + 1)
    engine.update_weights(engine.policy_version + 1)
    assert engine.metrics()["servers/alive"] == 2


@pytest.mark.slow
def test_all_workers_of_a_server_in_parts_are_in_the_group(
    serve: Callable[..., Any], make_client: Callable[..., Any]
) -> None:
    """Also of a LoRA policy, whose adapter is merged, and with a second server of one worker beside it."""
    model: Any = add_lora(make_model(DENSE), LoraSettings(rank=4))
    in_parts, _ = serve(model, tensor_parallel=2, transfer="broadcast")
    whole, _ = serve(model, transfer="broadcast")
    settings = in_parts.model_copy(update={"servers": in_parts.servers + whole.servers})
    engine = make_client(model, settings)
    for _ in range(2):
        shake(model)
        engine.update_weights(engine.policy_version + 1)
        assert engine.last_sync.gap.largest < 5e-5 and engine.metrics()["servers/alive"] == 2
    assert engine._backend._broadcast._rendezvous.world_size == 4
