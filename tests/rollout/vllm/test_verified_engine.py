"""Updates are verified before anything is generated from them, here with a copy of the policy in vLLM's place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import RolloutSettings, VLLMServerSettings, VLLMSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.vllm import verified_engine
from alignlab.rollout.vllm.backend import Backend, MemberLost, Transfer
from alignlab.rollout.vllm.completions import Answer, Request
from alignlab.rollout.vllm.policy_weights import PolicyWeights
from alignlab.rollout.vllm.verified_engine import VerifiedEngine
from alignlab.types import Prompt, SamplingParams
from tests.rollout.conftest import flat, make_prompts

SAMPLING = SamplingParams(max_new_tokens=4, ignore_eos=True, seed=1)


class CopyMember:
    """A member with a copy of the policy of its own."""

    def __init__(self) -> None:
        self.is_verified = False
        self.is_lost = False
        self.engine: EmbeddedEngine


class CopyBackend:
    """A backend that generates from copies of the policy, made at every `put_weights`.

    Attributes:
        calls: names of the methods called.
        keeps_old_weights: `put_weights` does nothing, silently.
    """

    adapter_only = False
    first_rank_sends = True
    on_gpu = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.calls: list[str] = []
        self.copies = [CopyMember()]
        self.keeps_old_weights = False
        self._model, self._tokenizer = model, tokenizer

    def open(self) -> None:
        self.calls.append("open")

    def put_weights(self, weights: PolicyWeights, policy_version: int, attempt: int) -> Transfer:
        self.calls.append("put_weights")
        for member in [] if self.keeps_old_weights else self.copies:
            member.engine = EmbeddedEngine(copy.deepcopy(self._model), self._tokenizer, RolloutSettings())
        return Transfer(1, 1)

    @property
    def model_runner(self) -> int:
        assert self.calls[-1] != "close", "a closed vLLM has none"
        return 1

    def members(self) -> Sequence[CopyMember]:
        return self.copies

    def agreed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def answers(self, requests: Sequence[Request], member: CopyMember | None = None) -> list[Answer]:
        member = member or self.copies[0]
        if member.is_lost:
            raise MemberLost
        return [self._answer(member.engine, request) for request in requests]

    @staticmethod
    def _answer(engine: EmbeddedEngine, request: Request) -> Answer:
        sampling = SamplingParams(
            max_new_tokens=request.params["max_tokens"], seed=request.params["seed"], ignore_eos=True
        )
        [completion] = flat(engine.generate([Prompt(request.token_ids, "")], sampling))
        return Answer(completion.token_ids, completion.logprobs, "length", None, completion.policy_versions, None)

    def rest(self) -> None:
        self.calls.append("rest")

    def abandon(self) -> None:
        self.calls.append("abandon")

    def close(self) -> None:
        self.calls.append("close")

    def metrics(self) -> dict[str, float]:
        return {"copies": float(len(self.copies))}


Make = Callable[..., VerifiedEngine]


@pytest.fixture
def backend(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> CopyBackend:
    return CopyBackend(llama, tokenizer)


@pytest.fixture
def make(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, backend: CopyBackend) -> Make:
    """Make an engine on the backend; keywords are settings."""

    def make_engine(**settings: Any) -> VerifiedEngine:
        kind: Any = VLLMServerSettings if "max_staleness" in settings else VLLMSettings
        plain: Backend = backend
        return VerifiedEngine(llama, tokenizer, kind(**settings), plain)

    return make_engine


def move(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.2)


def test_stale_weights_fail_the_canary_and_stop_the_engine(
    make: Make, backend: CopyBackend, llama: PreTrainedModel
) -> None:
    engine = make()
    assert engine.last_sync.gap is not None and engine.last_sync.gap.largest < 5e-5
    before = flat(engine.generate(make_prompts(5), SAMPLING))
    move(llama)
    backend.keeps_old_weights = True
    with pytest.raises(RolloutError, match="does not compute what the policy computes"):
        engine.update_weights(1)
    assert engine.policy_version == 0
    with pytest.raises(RolloutError, match="in doubt since an update that failed: the rollout engine does not compute"):
        engine.generate(make_prompts(5), SAMPLING)
    backend.keeps_old_weights = False
    engine.update_weights(1)
    assert flat(engine.generate(make_prompts(5), SAMPLING))[0].logprobs != before[0].logprobs


@pytest.mark.parametrize(("on_gpu", "verified"), [(False, {0, 1, 4, 8, 12}), (True, {*range(10), 12})])
def test_canaries_run_at_the_first_updates_and_then_as_configured(
    on_gpu: bool, verified: set[int], make: Make, backend: CopyBackend
) -> None:
    backend.on_gpu = on_gpu
    engine = make(canary_every_updates=4)
    has_canary = [engine.last_sync.gap is not None]
    for version in range(1, 14):
        engine.update_weights(version)
        has_canary.append(engine.last_sync.gap is not None)
    assert {number for number, has in enumerate(has_canary) if has} == verified


def test_a_new_member_is_verified_at_the_next_update(make: Make, backend: CopyBackend) -> None:
    engine = make(canary_every_updates=100)
    engine.update_weights(1)
    backend.copies.append(CopyMember())
    engine.update_weights(2)
    assert engine.last_sync.gap is not None and backend.copies[1].is_verified
    engine.update_weights(3)
    assert engine.last_sync.gap is None


def test_a_member_lost_at_its_canary_stays_unverified_and_all_lost_is_an_error(
    make: Make, backend: CopyBackend
) -> None:
    engine = make(canary_every_updates=1)
    backend.copies.append(CopyMember())
    backend.copies[1].is_lost = True
    engine.update_weights(1)
    assert engine.last_sync.gap is not None and not backend.copies[1].is_verified
    backend.copies[0].is_lost = True
    with pytest.raises(RolloutError, match="every vLLM server was lost at its canary"):
        engine.update_weights(2)


def test_a_closed_engine_generates_nothing_until_an_update_opens_it_again(make: Make, backend: CopyBackend) -> None:
    engine = make()
    for call in (engine.rest, engine.abandon, engine.close, engine.close, engine.rest, engine.abandon):
        call()
    assert backend.calls == ["open", "put_weights", "rest", "abandon", "close"]
    with pytest.raises(RolloutError, match="was closed; update its weights before generating"):
        engine.generate(make_prompts(5), SAMPLING)
    engine.update_weights(1)
    assert backend.calls[-2:] == ["open", "put_weights"]
    assert flat(engine.generate(make_prompts(5), SAMPLING))


def test_an_engine_that_cannot_be_made_leaves_nothing_open(
    make: Make, backend: CopyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise ConfigError("no")

    monkeypatch.setattr(backend, "put_weights", refuse)
    with pytest.raises(ConfigError):
        make()
    assert backend.calls == ["open", "close"]
    monkeypatch.setattr(backend, "open", refuse)
    with pytest.raises(ConfigError):
        make()
    assert backend.calls == ["open", "close"]


def test_the_first_rank_sends_before_the_others_unless_each_has_a_vllm_of_its_own(
    make: Make, backend: CopyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def wait_for_first_rank(meanwhile: Callable[[], None]) -> Iterator[None]:
        backend.calls.append("first_rank_first")
        yield

    monkeypatch.setattr(verified_engine, "first_rank_first", wait_for_first_rank)
    make()
    backend.first_rank_sends = False
    make()
    assert backend.calls == ["open", "first_rank_first", "put_weights", "open", "put_weights"]


@pytest.mark.parametrize("max_staleness", [None, 1])
def test_changed_weights_need_an_update_unless_the_policy_may_be_ahead(
    max_staleness: int | None, make: Make, llama: PreTrainedModel
) -> None:
    engine = make() if max_staleness is None else make(max_staleness=max_staleness)
    move(llama)
    if max_staleness is None:
        with pytest.raises(RolloutError, match="weights were changed since version 0"):
            engine.generate(make_prompts(5), SAMPLING)
    else:
        assert flat(engine.generate(make_prompts(5), SAMPLING))
    with pytest.raises(RolloutError, match="policy_version is 0, and must be over the present one"):
        engine.update_weights(0)


def test_metrics_are_the_backends_and_the_last_canarys_gap(make: Make) -> None:
    metrics = make().metrics()
    assert metrics["copies"] == 1 and metrics["engine/model_runner"] == 1 and 0 <= metrics["engine/canary_gap"] < 5e-5


def test_a_closed_engine_still_tells_its_metrics(make: Make) -> None:
    engine = make()
    metrics = engine.metrics()
    engine.close()
    assert engine.metrics() == metrics
