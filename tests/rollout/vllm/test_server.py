"""vLLM on servers: updates are verified; servers that die, hang, return or belong to another run are survived."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import VLLMServerSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.adapters import add_lora
from alignlab.types import Completion, SamplingParams
from tests.rollout.conftest import flat, full_logprobs, make_prompts
from tests.rollout.vllm.conftest import DENSE, OWN_MOE, PATIENCE, free_address, make_model, wait_until_up
from tests.rollout.vllm.hostile_requests import HOSTILE, ask
from tests.rollout.vllm.test_routing import trainers_choices
from tests.rollout.vllm.test_sync import shake

pytestmark = pytest.mark.vllm
Serve = Callable[..., Any]
SAMPLING = SamplingParams(n=8, max_new_tokens=60, ignore_eos=True, seed=3)


@pytest.fixture(scope="module")
def pair(serve: Serve, make_client: Callable[..., Any]) -> tuple[Any, Any, Any, Any]:
    """Return (engine, model, settings, processes) of two servers."""
    model = make_model(DENSE)
    settings, processes = serve(model, count=2)
    return make_client(model, settings), model, settings, processes


def tokens(engine: Any, sampling: SamplingParams = SAMPLING) -> list[tuple[int, ...]]:
    return [c.token_ids for c in flat(engine.generate(make_prompts(5, 9, 30, 17), sampling))]


@contextmanager
def at_request(engine: Any, number: int, action: Callable[[], None]) -> Any:
    """Call `action` when the given request is about to be sent."""
    pool, num_sent = engine._backend._pool, 0
    ask_server = pool._ask

    async def counted(server: Any, request: Any) -> Any:
        nonlocal num_sent
        num_sent += 1
        if num_sent == number:
            action()
        return await ask_server(server, request)

    pool._ask = counted
    try:
        yield
    finally:
        pool._ask = ask_server


def test_two_servers_give_the_completions_of_one(pair: Any) -> None:
    engine = pair[0]
    assert engine.metrics()["servers/alive"] == 2
    expected = tokens(engine)
    for server in engine._backend._pool.alive:
        answers = engine._backend._pool.answers_of(server, requests_of(engine))
        assert [answer.token_ids for answer in answers] == expected


def requests_of(engine: Any) -> Any:
    from alignlab.rollout.vllm.completions import make_requests

    prompts = make_prompts(5, 9, 30, 17)
    return make_requests(prompts, [SAMPLING] * len(prompts), engine._lm, engine._tokenizer)


def test_a_server_that_hangs_is_lost_and_comes_back(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, _, processes = pair
    expected, before = tokens(engine), engine.metrics()
    with at_request(engine, 5, lambda: processes[0].send_signal(signal.SIGSTOP)), monkeypatch.context() as patch:
        patch.setattr("alignlab.rollout.vllm.client.CONNECT_S", 0.5)  # the health checks fail
        try:
            assert tokens(engine) == expected
        finally:
            processes[0].send_signal(signal.SIGCONT)
    after = engine.metrics()
    assert after["servers/lost"] == before["servers/lost"] + 1 and after["servers/alive"] == 1
    assert after["servers/reissued"] > before["servers/reissued"]
    engine.update_weights(engine.policy_version + 1)
    assert engine.metrics()["servers/alive"] == 2


def test_a_server_that_dies_is_survived_and_readmitted_after_a_restart(pair: Any) -> None:
    engine, model, _, processes = pair
    shake(model, 0.05)
    engine.update_weights(engine.policy_version + 1)
    expected, before = tokens(engine), engine.metrics()
    with at_request(engine, 9, lambda: processes[1].send_signal(signal.SIGKILL)):
        assert tokens(engine) == expected
    after = engine.metrics()
    assert after["servers/lost"] == before["servers/lost"] + 1 and after["servers/alive"] == 1
    processes[1].process.wait()
    processes[1].start()
    wait_until_up(processes[1])
    while engine.metrics()["servers/alive"] < 2:  # while requests run, it is checked, and sent the weights again
        assert tokens(engine) == expected
    [_, server] = engine._backend._pool.alive
    assert [a.token_ids for a in engine._backend._pool.answers_of(server, requests_of(engine))] == expected


def test_another_rank_generates_from_the_weights_that_the_first_rank_sent(pair: Any) -> None:
    from alignlab.rollout.vllm.pool import ServerPool
    from alignlab.rollout.vllm.weight_delivery import SentWeights

    engine, model, settings, _ = pair
    first = engine._backend._pool
    second_pool = ServerPool(settings, first._check, [], run=first.run, rank=1)
    second_pool.open()
    try:
        for _ in range(3):
            shake(model, 0.05)
            engine.update_weights(engine.policy_version + 1)
            second_pool.expect(SentWeights(first._delivery.sent.version, None, {}, False))
            answers = second_pool.answers(requests_of(engine))
            assert [answer.token_ids for answer in answers] == tokens(engine)
            assert {v for answer in answers for v in answer.policy_versions} == {engine.policy_version}
        assert second_pool.counts == {} and len(second_pool.alive) == 2
        second_pool.expect(SentWeights(f"{first.run}-99-99", None, {}, False))
        assert second_pool.alive == []  # no server has those weights
    finally:
        second_pool.close()


def assert_stopped(engine: Any, message: str) -> None:
    """Assert that the update raises, and that the engine then refuses to generate."""
    with pytest.raises(RolloutError, match=message):
        engine.update_weights(engine.policy_version + 1)
    with pytest.raises(RolloutError, match="in doubt since an update that failed"):
        engine.generate(make_prompts(3), SamplingParams())


def sent_wrongly(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Change tensors between the trainer's digests and the servers."""
    from alignlab.rollout.vllm import serialization, servers

    def tampered(tensors: Any, shapes: Any, adapter: Any) -> Any:
        copies = {name: tensor.detach().clone() for name, tensor in tensors}
        change(copies)
        return serialization.weights_file(copies.items(), {name: t.to("meta") for name, t in copies.items()}, adapter)

    monkeypatch.setattr(servers, "weights_file", tampered)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model.norm.weight"].add_(1e-6), "tensor model.norm.weight arrived with another content"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "tensor model.layers.1.mlp.up_proj.weight did not arr"),
    ],
)
def test_a_tensor_changed_on_the_way_is_named(
    change: Any, message: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model, settings, _ = pair
    shake(model, 0.01)
    with monkeypatch.context() as patch:
        sent_wrongly(patch, change)
        assert_stopped(engine, rf"server {settings.servers[0]}: .* {message}")
    engine.update_weights(engine.policy_version + 1)
    assert engine.last_sync.gap.largest < 5e-5


def test_an_upload_that_breaks_off_changes_nothing_on_the_servers(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.rollout.vllm import client

    engine = pair[0]
    read_chunks = client._chunks

    async def broken(path: Any) -> Any:
        async for chunk in read_chunks(path):
            yield chunk[: len(chunk) // 2]
            raise OSError("no more")

    expected = tokens(engine)
    with monkeypatch.context() as patch:
        patch.setattr(client, "_chunks", broken)
        with pytest.raises(OSError, match="no more"):
            engine.update_weights(engine.policy_version + 1)
    engine.update_weights(engine.policy_version + 1)
    assert tokens(engine) == expected


def test_servers_in_use_are_left_to_their_run(pair: Any, make_client: Any) -> None:
    engine, model, settings, _ = pair
    at_once = settings.model_copy(update={"reconnect_s": 0.0})
    with pytest.raises(ConfigError, match=r"was used by another run \d+ s ago; end that run, or name other servers"):
        make_client(model, at_once)
    assert tokens(engine)
    engine._backend._pool.release()
    next_engine = make_client(model, settings)  # takes the servers over, as a run after a finished one does
    with pytest.raises(RolloutError, match=r"holds the weights of another run .* give each run its own servers"):
        engine.generate(make_prompts(3), SamplingParams())
    with pytest.raises(RolloutError, match="holds the weights of another run"):
        engine.update_weights(engine.policy_version + 1)
    assert tokens(next_engine)
    next_engine.close()
    next_engine.close()
    with pytest.raises(RolloutError, match="was closed; update its weights"):
        next_engine.generate(make_prompts(3), SamplingParams())
    next_engine.update_weights(1)  # opens it again, as a run does that is resumed in the same process
    assert tokens(next_engine)
    next_engine.close()
    again = make_client(model, at_once)  # at once: a closed engine leaves its servers to others
    assert tokens(again)
    again.close()


def test_a_trainer_that_differs_is_refused(
    pair: Any, make_client: Any, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    from alignlab.rollout.engine import make_engine

    _, model, settings, _ = pair
    with pytest.raises(ConfigError, match=r"has num_hidden_layers 2, and must have the trainer's \(3\)"):
        make_client(make_model(DENSE | {"num_hidden_layers": 3}), settings)
    with pytest.raises(ConfigError, match=r"has dtype float32, and must have the trainer's \(bfloat16"):
        make_client(make_model(DENSE, dtype=torch.bfloat16), settings)
    longer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>", pad_token="e")
    with pytest.raises(ConfigError, match=r"has tokenizer's vocabulary 257 tokens, digest .*, and must have"):
        longer.add_tokens(["new"])
        make_engine(model, longer, settings)
    with pytest.raises(ConfigError, match="was started for all weights, and must be ready for an adapter of rank 4"):
        make_client(add_lora(make_model(DENSE), LoraSettings(rank=4)), settings.model_copy(update={"sync": "adapter"}))
    monkeypatch.setenv("ALIGNLAB_SERVER_TOKEN", "another-token-of-the-tests")
    with pytest.raises(ConfigError, match="does not take this run's token; set ALIGNLAB_SERVER_TOKEN"):
        make_client(model, settings)


def test_an_address_without_a_server_is_refused(make_client: Any) -> None:
    nowhere = VLLMServerSettings(servers=(free_address(),), **PATIENCE | {"reconnect_s": 0.0})
    with pytest.raises(ConfigError, match=r"no vLLM server answers at http://127\..*bash launch/serve_vllm.sh CONFIG"):
        make_client(make_model(DENSE), nowhere)

    class OtherServer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), OtherServer) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{http_server.server_port}"
        with pytest.raises(ConfigError, match="is not a server of alignlab's; start one with"):
            make_client(make_model(DENSE), nowhere.model_copy(update={"servers": (address,)}))
        http_server.shutdown()


def test_a_port_in_use_is_refused(pair: Any, tmp_path: Any) -> None:
    from alignlab.rollout.vllm.launch import make_server

    [address, _] = pair[2].servers
    with pytest.raises(ConfigError, match=f"cannot listen at {address}: Address already in use; end what uses"):
        make_server(address, tmp_path, {})


def test_without_any_server_left_the_engine_raises_in_time(
    pair: Any, make_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of the pair: it kills both servers."""
    _, model, settings, processes = pair
    monkeypatch.setattr("alignlab.rollout.vllm.weight_delivery.LEASE_S", -1.0)
    engine = make_client(model, settings.model_copy(update={"reconnect_s": 0.2}))

    def end() -> None:
        for process in processes:
            process.send_signal(signal.SIGKILL)

    with at_request(engine, 9, end), pytest.raises(RolloutError, match="all 2 vLLM servers are lost, and none came"):
        tokens(engine)
    with pytest.raises(RolloutError, match="no server took the weights of version"):
        engine.update_weights(engine.policy_version + 1)


@pytest.fixture(scope="module")
def adapter(serve: Serve, make_client: Any) -> tuple[Any, Any]:
    """Return (engine, model) of an adapter that is synced alone."""
    model: Any = add_lora(make_model(DENSE), LoraSettings(rank=4, alpha=12))
    settings, _ = serve(model, lora_rank=4, sync="adapter", max_staleness=1)
    return make_client(model, settings), model


def test_an_adapter_is_synced_alone(adapter: Any) -> None:
    engine, model = adapter
    for _ in range(3):
        shake(model)
        engine.update_weights(engine.policy_version + 1)
        assert engine.last_sync.gap.largest < 5e-5
        [completion] = flat(engine.generate(make_prompts(40), SamplingParams(max_new_tokens=3)))
        assert set(completion.policy_versions) == {engine.policy_version}
    assert engine.last_sync.transfer.num_tensors == 2 * len([n for n, _ in model.named_parameters() if "lora_A" in n])


def test_requests_end_with_the_adapter_that_they_began_with(adapter: Any) -> None:
    """An adapter stays loaded while requests use it, however many come after it."""
    engine, model = adapter
    first = engine.policy_version
    before = {name: value.clone() for name, value in model.state_dict().items()}
    completions: list[Completion] = []
    sampling = SamplingParams(n=4, max_new_tokens=100, ignore_eos=True, seed=1)
    thread = threading.Thread(target=lambda: completions.extend(flat(engine.generate(make_prompts(9), sampling))))
    started = threading.Event()
    with at_request(engine, 4, started.set):
        thread.start()
        assert started.wait(30)
        for version in range(first + 1, first + 4):
            shake(model, 0.05)
            engine.update_weights(version)
        thread.join()
    model.load_state_dict(before)
    assert len(completions) == 4
    for completion in completions:
        assert set(completion.policy_versions) == {first}
        rows = full_logprobs(model, make_prompts(9)[0].token_ids + completion.token_ids)[8:-1]
        expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (expected - torch.tensor(completion.logprobs)).abs().max() < 5e-5
    engine.update_weights(first + 4)


def test_a_failed_update_of_an_adapter_can_be_repeated(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = adapter
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    with monkeypatch.context() as patch:
        sent_wrongly(patch, lambda tensors: tensors[name].zero_())
        assert_stopped(engine, "tensor model.layers.0.mlp.up_proj.lora_B arrived with another content")
    engine.update_weights(engine.policy_version + 1)
    assert engine.last_sync.gap.largest < 5e-5


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_with_a_message_and_the_server_goes_on(name: str, adapter: Any) -> None:
    engine, _ = adapter
    *request, expected = HOSTILE[name]
    status, text = ask(engine._settings.servers[0], *request)
    assert status == expected and "Traceback" not in text and len(text) > 20, text
    assert flat(engine.generate(make_prompts(5), SamplingParams(max_new_tokens=1)))


@pytest.fixture(scope="module")
def moe(serve: Serve, make_client: Any) -> tuple[Any, Any]:
    """Return (engine, model) of an engine whose policy may be ahead of it; the server is started as a user's is."""
    model = make_model(OWN_MOE)
    settings, _ = serve(model, forked=False, max_staleness=1, prefill_tokens=128, max_running=8)
    return make_client(model, settings), model


def test_experts_and_routers_are_updated_and_their_choices_returned(moe: Any) -> None:
    engine, model = moe
    for _ in range(2):
        shake(model)
        engine.update_weights(engine.policy_version + 1)
        assert engine.last_sync.gap.largest < 5e-5
    for rollout in engine.generate(make_prompts(9, 33), SamplingParams(n=2, max_new_tokens=9, seed=0)):
        for completion in rollout.completions:
            expected, is_recorded = trainers_choices(model, rollout, completion), completion.routing >= 0
            assert is_recorded[len(rollout.prompt.token_ids) : -1].all()
            assert (completion.routing.sort(-1).values == expected.sort(-1).values)[is_recorded].all()


def completions_around_an_update(engine: Any, model: Any, group_size: int) -> list[Completion]:
    """Return completions of two prompts, sampled while the weights are changed and synced."""
    completions: list[Completion] = []
    sampling = SamplingParams(n=group_size, max_new_tokens=100, ignore_eos=True, seed=1)
    thread = threading.Thread(target=lambda: completions.extend(flat(engine.generate(make_prompts(9, 20), sampling))))
    started = threading.Event()
    with at_request(engine, 8, started.set):
        thread.start()
        assert started.wait(30)
        shake(model, 0.02)
        engine.update_weights(engine.policy_version + 1)
        thread.join()
    return completions


def test_requests_in_flight_go_on_under_the_new_weights(moe: Any) -> None:
    """Each token's log-prob is that of the weights whose version the token is recorded with.

    Eight requests run at a time, so that the update finds some half done; on a busy machine this takes more of them.
    """
    engine, model = moe
    for group_size in (24, 96, 384):
        first = engine.policy_version
        before = {name: value.clone() for name, value in model.state_dict().items()}
        completions = completions_around_an_update(engine, model, group_size)
        mixed = [c for c in completions if len(set(c.policy_versions)) == 2]
        if mixed:
            break
    assert mixed, "the update came after the last token"
    after = {name: value.clone() for name, value in model.state_dict().items()}
    for weights, version in ((before, first), (after, first + 1)):
        model.load_state_dict(weights)
        prompts = [prompt for prompt in make_prompts(9, 20) for _ in range(group_size)]
        for prompt, completion in zip(prompts, completions, strict=True):
            rows = full_logprobs(model, prompt.token_ids + completion.token_ids)[len(prompt.token_ids) - 1 : -1]
            expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            is_of_version = torch.tensor([v == version for v in completion.policy_versions])
            gaps = (expected - torch.tensor(completion.logprobs))[is_of_version].abs()
            assert (gaps < 5e-5).all()
    assert list(mixed[0].policy_versions) == sorted(mixed[0].policy_versions)
