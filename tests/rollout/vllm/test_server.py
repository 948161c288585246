"""vLLM in processes of its own: updates proved, servers that die, hang, come back or are another's survived."""

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
from tests.rollout.vllm.conftest import DENSE, OWN_MOE, PATIENCE, free_address, make_model
from tests.rollout.vllm.hostile_requests import HOSTILE, ask
from tests.rollout.vllm.test_routing import own_choices
from tests.rollout.vllm.test_sync import shake

pytestmark = pytest.mark.vllm
Serve = Callable[..., Any]
SAMPLING = SamplingParams(n=8, max_new_tokens=60, ignore_eos=True, seed=3)


@pytest.fixture(scope="module")
def pair(serve: Serve, make_client: Callable[..., Any]) -> tuple[Any, Any, Any, Any]:
    """(engine, model, settings, processes) of two servers."""
    model = make_model(DENSE)
    settings, processes = serve(model, count=2)
    return make_client(model, settings), model, settings, processes


def tokens(engine: Any, sampling: SamplingParams = SAMPLING) -> list[tuple[int, ...]]:
    return [c.token_ids for c in flat(engine.generate(make_prompts(5, 9, 30, 17), sampling))]


@contextmanager
def at_request(engine: Any, number: int, action: Callable[[], None]) -> Any:
    """Do something when a request is about to be sent."""
    pool, sent = engine._pool, 0
    call = pool._call

    async def counted(server: Any, request: Any) -> Any:
        nonlocal sent
        sent += 1
        if sent == number:
            action()
        return await call(server, request)

    pool._call = counted
    try:
        yield
    finally:
        pool._call = call


def test_both_servers_work_and_give_what_one_gives(pair: Any) -> None:
    engine = pair[0]
    assert engine.metrics()["servers/alive"] == 2
    expected = tokens(engine)
    for server in engine._pool.alive:
        own = [a.token_ids for a in engine._pool.answers_of(server, requests_of(engine))]
        assert own == expected


def requests_of(engine: Any) -> Any:
    from alignlab.rollout.vllm.completions import make_requests

    prompts = make_prompts(5, 9, 30, 17)
    return make_requests(prompts, [SAMPLING] * len(prompts), engine._lm, engine._tokenizer)


def test_a_server_that_hangs_is_lost_and_comes_back(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, _, processes = pair
    expected, before = tokens(engine), engine.metrics()
    with at_request(engine, 5, lambda: processes[0].stop(signal.SIGSTOP)), monkeypatch.context() as patch:
        patch.setattr("alignlab.rollout.vllm.server.client.CONNECT_S", 0.5)  # it does not say that it lives
        try:
            assert tokens(engine) == expected
        finally:
            processes[0].stop(signal.SIGCONT)
    after = engine.metrics()
    assert after["servers/lost"] == before["servers/lost"] + 1 and after["servers/alive"] == 1
    assert after["servers/reissued"] > before["servers/reissued"]
    engine.update_weights(engine.policy_version + 1)
    assert engine.metrics()["servers/alive"] == 2


def test_a_server_that_dies_is_survived_and_taken_back_when_it_is_started_again(pair: Any) -> None:
    from alignlab.rollout.vllm.server.process import wait_until_up

    engine, model, _, processes = pair
    shake(model, 0.05)
    engine.update_weights(engine.policy_version + 1)
    expected, before = tokens(engine), engine.metrics()
    with at_request(engine, 9, lambda: processes[1].stop(signal.SIGKILL)):
        assert tokens(engine) == expected
    after = engine.metrics()
    assert after["servers/lost"] == before["servers/lost"] + 1 and after["servers/alive"] == 1
    processes[1].process.wait()
    processes[1].start()
    wait_until_up(processes[1])
    again = threading.Event()
    with at_request(engine, 1, again.set):
        while engine.metrics()["servers/alive"] < 2:  # it is looked at while requests run, and given the weights again
            assert tokens(engine) == expected
    assert again.is_set()
    [_, server] = engine._pool.alive
    assert [a.token_ids for a in engine._pool.answers_of(server, requests_of(engine))] == expected


def test_another_rank_follows_the_first_one_s_updates(pair: Any) -> None:
    """It sends nothing, and asks for the weights that the first rank has sent, of the servers that have them."""
    from alignlab.rollout.vllm.server.handout import SentWeights
    from alignlab.rollout.vllm.server.pool import ServerPool

    engine, model, settings, _ = pair
    first = engine._pool
    other = ServerPool(settings, first._identity, [], run=first.run, rank=1, check=lambda about: None)
    other.open()
    try:
        for _ in range(3):
            shake(model, 0.05)
            engine.update_weights(engine.policy_version + 1)
            other.expect(SentWeights(first._handout.sent.version, None, {}, False))
            answers = other.answers(requests_of(engine))
            assert [answer.token_ids for answer in answers] == tokens(engine)
            assert {v for answer in answers for v in answer.policy_versions} == {engine.policy_version}
        assert other.counts == {} and len(other.alive) == 2
        other.expect(SentWeights(f"{first.run}-99-99", None, {}, False))
        assert other.alive == []  # nobody has those
    finally:
        other.close()


def stopped(engine: Any, message: str) -> None:
    """The update is refused, and nothing is generated until one succeeds."""
    with pytest.raises(RolloutError, match=message):
        engine.update_weights(engine.policy_version + 1)
    with pytest.raises(RolloutError, match="in doubt since an update that failed"):
        engine.generate(make_prompts(3), SamplingParams())


def sent_wrongly(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Let tensors be changed between the trainer's digests and the servers."""
    from alignlab.rollout.vllm.server import engine, wire

    def tampered(tensors: Any, adapter: Any) -> Any:
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        change(copies)
        return wire.weights_file(copies, adapter)

    monkeypatch.setattr(engine, "weights_file", tampered)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model.norm.weight"].add_(1e-6), "tensor model.norm.weight arrived with another content"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "tensor model.layers.1.mlp.up_proj.weight did not arr"),
    ],
)
def test_what_happens_on_the_way_is_caught_by_name(
    change: Any, message: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model, settings, _ = pair
    shake(model, 0.01)
    with monkeypatch.context() as patch:
        sent_wrongly(patch, change)
        stopped(engine, rf"server {settings.servers[0]}: .* {message}")
    engine.update_weights(engine.policy_version + 1)
    assert engine.proof.gap.largest < 5e-5


def test_an_update_that_breaks_off_changes_nothing_at_the_servers(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.rollout.vllm.server import client

    engine = pair[0]
    whole = client._chunks

    async def broken(path: Any) -> Any:
        async for chunk in whole(path):
            yield chunk[: len(chunk) // 2]
            raise OSError("no more")

    expected = tokens(engine)
    with monkeypatch.context() as patch:
        patch.setattr(client, "_chunks", broken)
        with pytest.raises(OSError, match="no more"):
            engine.update_weights(engine.policy_version + 1)
    engine.update_weights(engine.policy_version + 1)
    assert tokens(engine) == expected


def test_servers_of_another_run_are_left_to_it(pair: Any, make_client: Any) -> None:
    engine, model, settings, _ = pair
    at_once = settings.model_copy(update={"reconnect_s": 0.0})
    with pytest.raises(ConfigError, match=r"was used by another run \d+ s ago; end that run, or name other servers"):
        make_client(model, at_once)
    assert tokens(engine)
    engine.release()
    other = make_client(model, settings)  # takes the servers over, as a run after a finished one does
    with pytest.raises(RolloutError, match=r"holds the weights of another run .* give each run its own servers"):
        engine.generate(make_prompts(3), SamplingParams())
    with pytest.raises(RolloutError, match="holds the weights of another run"):
        engine.update_weights(engine.policy_version + 1)
    assert tokens(other)


def test_a_trainer_that_differs_is_refused(
    pair: Any, make_client: Any, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    from alignlab.rollout.engines import make_engine

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


def test_a_place_without_a_server(make_client: Any) -> None:
    nowhere = VLLMServerSettings(servers=(free_address(),), **PATIENCE | {"reconnect_s": 0.0})
    with pytest.raises(ConfigError, match=r"no vLLM server answers at http://127\..*bash launch/serve_vllm.sh CONFIG"):
        make_client(make_model(DENSE), nowhere)

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{other.server_port}"
        with pytest.raises(ConfigError, match="is no server of alignlab's; start one with"):
            make_client(make_model(DENSE), nowhere.model_copy(update={"servers": (address,)}))
        other.shutdown()


def test_a_port_in_use_is_named(pair: Any, tmp_path: Any) -> None:
    from alignlab.rollout.vllm.server.process import make_server

    [address, _] = pair[2].servers
    with pytest.raises(ConfigError, match=f"cannot listen at {address}: Address already in use; end what uses"):
        make_server(address, tmp_path, {})


def test_when_no_server_is_left_it_says_so_in_time(
    pair: Any, make_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of the pair: nothing brings them back."""
    _, model, settings, processes = pair
    monkeypatch.setattr("alignlab.rollout.vllm.server.handout.LEASE_S", -1.0)
    engine = make_client(model, settings.model_copy(update={"reconnect_s": 0.2}))

    def end() -> None:
        for process in processes:
            process.stop(signal.SIGKILL)

    with at_request(engine, 9, end), pytest.raises(RolloutError, match="all 2 vLLM servers are lost, and none came"):
        tokens(engine)
    with pytest.raises(RolloutError, match="no server took the weights of version"):
        engine.update_weights(engine.policy_version + 1)


@pytest.fixture(scope="module")
def adapter(serve: Serve, make_client: Any) -> tuple[Any, Any]:
    """(engine, model) of an adapter that is sent alone."""
    model: Any = add_lora(make_model(DENSE), LoraSettings(rank=4, alpha=12))
    settings, _ = serve(model, lora_rank=4, sync="adapter", max_staleness=1)
    return make_client(model, settings), model


def test_an_adapter_travels_alone(adapter: Any) -> None:
    engine, model = adapter
    for _ in range(3):
        shake(model)
        engine.update_weights(engine.policy_version + 1)
        assert engine.proof.gap.largest < 5e-5
        [completion] = flat(engine.generate(make_prompts(40), SamplingParams(max_new_tokens=3)))
        assert set(completion.policy_versions) == {engine.policy_version}
    assert engine.proof.num_tensors == 2 * len([n for n, _ in model.named_parameters() if "lora_A" in n])


def test_requests_end_with_the_adapter_that_they_began_with(adapter: Any) -> None:
    """It stays as long as they need it, however many come after it."""
    engine, model = adapter
    first = engine.policy_version
    before = {name: value.clone() for name, value in model.state_dict().items()}
    got: list[Completion] = []
    sampling = SamplingParams(n=4, max_new_tokens=100, ignore_eos=True, seed=1)
    thread = threading.Thread(target=lambda: got.extend(flat(engine.generate(make_prompts(9), sampling))))
    started = threading.Event()
    with at_request(engine, 4, started.set):
        thread.start()
        assert started.wait(30)
        for version in range(first + 1, first + 4):
            shake(model, 0.05)
            engine.update_weights(version)
        thread.join()
    model.load_state_dict(before)
    assert len(got) == 4
    for completion in got:
        assert set(completion.policy_versions) == {first}
        rows = full_logprobs(model, make_prompts(9)[0].token_ids + completion.token_ids)[8:-1]
        own = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (own - torch.tensor(completion.logprobs)).abs().max() < 5e-5
    engine.update_weights(first + 4)


def test_an_adapter_s_update_that_failed_can_be_tried_again(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = adapter
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    with monkeypatch.context() as patch:
        sent_wrongly(patch, lambda tensors: tensors[name].zero_())
        stopped(engine, "tensor model.layers.0.mlp.up_proj.lora_B arrived with another content")
    engine.update_weights(engine.policy_version + 1)
    assert engine.proof.gap.largest < 5e-5


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_with_a_sentence_and_the_server_goes_on(name: str, adapter: Any) -> None:
    engine, _ = adapter
    *request, expected = HOSTILE[name]
    status, text = ask(engine._settings.servers[0], *request)
    assert status == expected and "Traceback" not in text and len(text) > 20, text
    assert flat(engine.generate(make_prompts(5), SamplingParams(max_new_tokens=1)))


@pytest.fixture(scope="module")
def moe(serve: Serve, make_client: Any) -> tuple[Any, Any]:
    """(engine, model) that may run behind."""
    model = make_model(OWN_MOE)
    settings, _ = serve(model, max_staleness=1, prefill_tokens=128, max_running=8)
    return make_client(model, settings), model


def test_experts_and_routers_are_updated_and_their_choices_told(moe: Any) -> None:
    engine, model = moe
    for _ in range(2):
        shake(model)
        engine.update_weights(engine.policy_version + 1)
        assert engine.proof.gap.largest < 5e-5
    for rollout in engine.generate(make_prompts(9, 33), SamplingParams(n=2, max_new_tokens=9, seed=0)):
        for completion in rollout.completions:
            own, known = own_choices(model, rollout, completion), completion.routing >= 0
            assert known[len(rollout.prompt.token_ids) : -1].all()
            assert (completion.routing.sort(-1).values == own.sort(-1).values)[known].all()


def completions_around_an_update(engine: Any, model: Any, group_size: int) -> list[Completion]:
    """Completions of two prompts, during which the weights are shaken and given to the server."""
    got: list[Completion] = []
    sampling = SamplingParams(n=group_size, max_new_tokens=100, ignore_eos=True, seed=1)
    thread = threading.Thread(target=lambda: got.extend(flat(engine.generate(make_prompts(9, 20), sampling))))
    started = threading.Event()
    with at_request(engine, 8, started.set):
        thread.start()
        assert started.wait(30)
        shake(model, 0.02)
        engine.update_weights(engine.policy_version + 1)
        thread.join()
    return got


def test_what_runs_goes_on_under_the_new_weights(moe: Any) -> None:
    """Each token is from the weights of the version that it bears, and its log-prob theirs, to the bit of float32.

    Eight run at a time, so that the update finds some that are half done; on a busy machine it takes more of them.
    """
    engine, model = moe
    for group_size in (24, 96, 384):
        first = engine.policy_version
        before = {name: value.clone() for name, value in model.state_dict().items()}
        got = completions_around_an_update(engine, model, group_size)
        mixed = [c for c in got if len(set(c.policy_versions)) == 2]
        if mixed:
            break
    assert mixed, "the update came too late to see anything"
    after = {name: value.clone() for name, value in model.state_dict().items()}
    for weights, version in ((before, first), (after, first + 1)):
        model.load_state_dict(weights)
        for prompt, completion in zip([p for p in make_prompts(9, 20) for _ in range(group_size)], got, strict=True):
            rows = full_logprobs(model, prompt.token_ids + completion.token_ids)[len(prompt.token_ids) - 1 : -1]
            own = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            here = torch.tensor([v == version for v in completion.policy_versions])
            assert (own - torch.tensor(completion.logprobs))[here].abs().max().item() < 5e-5 if here.any() else True
    assert list(mixed[0].policy_versions) == sorted(mixed[0].policy_versions)
