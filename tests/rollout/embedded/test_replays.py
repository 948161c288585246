"""The engine as it runs on a GPU, with attention and graphs replaced: in-place reading, few shapes, replayed steps."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.models import paged_flex
from alignlab.models.adapters import add_lora
from alignlab.rollout.embedded import engine as engine_module
from alignlab.rollout.embedded import runner
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.replays import RECORDED_AT, Replays
from alignlab.rollout.memory import cache_may_stay
from alignlab.types import Completion, SamplingParams
from tests.gpu.flex_stand_in import paged_stand_in
from tests.gpu.graph_stand_in import Rerun, pretend_recording
from tests.rollout.conftest import MakeEngine, flat, make_prompts

KINDS = ["llama", "dense", "sparse"]
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, max_new_tokens=24, n=2, ignore_eos=True),
    "sampled": SamplingParams(max_new_tokens=24, n=3, seed=4, top_p=0.9, repetition_penalty=1.1),
}
SCHEDULES: dict[str, dict[str, int]] = {
    "default": {}, "few run together": {"max_running": 3}, "small blocks": {"block_size": 4, "prefill_tokens": 9},
    "preemption": {"block_size": 4, "cache_tokens": 120},
}  # fmt: skip


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Rerun]:
    """The choices of a GPU; what is recorded."""
    monkeypatch.setattr(runner, "reads_in_place", lambda device: True)
    monkeypatch.setattr(runner, "can_be_recorded", lambda model, device: True)
    monkeypatch.setattr(paged_flex, "_compiled_flex", paged_stand_in)
    return pretend_recording(monkeypatch)


def close(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(torch.tensor(one.raw_logprobs), torch.tensor(other.raw_logprobs), atol=1e-4, rtol=0)
        assert (one.routing is None) == (other.routing is None)
        assert one.routing is None or torch.equal(one.routing, other.routing)  # type: ignore[arg-type]


def rollouts_of(engine: EmbeddedEngine, params: SamplingParams) -> list[Completion]:
    return flat(engine.generate(make_prompts(5, 33, 1), params))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("name", KINDS)
def test_replayed_steps_sample_the_tokens_of_a_cpu(
    name: str, sampling: str, schedule: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model, params = request.getfixturevalue(name), SAMPLING[sampling]
    expected = rollouts_of(make_engine(model, **SCHEDULES[schedule]), params)
    made = request.getfixturevalue("replayed")
    engine = make_engine(model, **SCHEDULES[schedule])
    close(rollouts_of(engine, params), expected)
    if schedule == "preemption":
        assert engine.num_preempted
    assert sum(graph.times for graph in made) > 5
    assert len(made) <= 6


@pytest.mark.parametrize("name", KINDS)
def test_scoring_in_place_gives_the_logprobs_of_a_cpu(
    name: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    rollouts = make_engine(model).generate(make_prompts(5, 33, 1), SAMPLING["sampled"])
    expected = make_engine(model).logprobs(rollouts)
    request.getfixturevalue("replayed")
    for ours, exact in zip(make_engine(model, prefill_tokens=7).logprobs(rollouts), expected, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=0)


def test_without_graphs_steps_are_computed_in_place(
    make_engine: MakeEngine, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest
) -> None:
    expected = rollouts_of(make_engine(), SAMPLING["greedy"])
    made = request.getfixturevalue("replayed")
    engine = EmbeddedEngine(llama, tokenizer, RolloutSettings(cuda_graphs=False))
    close(rollouts_of(engine, SAMPLING["greedy"]), expected)
    assert not made


def test_graphs_stay_while_weights_and_cache_lie_where_they_were(
    make_engine: MakeEngine, llama: PreTrainedModel, replayed: list[Rerun]
) -> None:
    engine = make_engine()
    rollouts_of(engine, SAMPLING["greedy"])
    num_recorded = len(replayed)
    with torch.no_grad():  # in place, as an optimizer does
        for weight in llama.parameters():
            weight.mul_(1.1)
    engine.update_weights(1)
    found = rollouts_of(engine, SAMPLING["greedy"])
    assert len(replayed) == num_recorded > 0
    close(found, rollouts_of(make_engine(), SAMPLING["greedy"]))
    engine.rest()
    replayed.clear()
    rollouts_of(engine, SAMPLING["greedy"])
    assert replayed, "the cache was allocated anew"


def test_a_small_cache_stays_while_the_policy_learns_with_the_steps_that_read_it(
    make_engine: MakeEngine, llama: PreTrainedModel, replayed: list[Rerun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "cache_may_stay", lambda num_bytes, device: num_bytes > 0)
    engine = make_engine()
    rollouts_of(engine, SAMPLING["greedy"])
    num_recorded, num_replayed = len(replayed), sum(graph.times for graph in replayed)
    places = [tensor.data_ptr() for tensors in engine._runner.cache.layers.values() for tensor in tensors.values()]
    engine.rest()
    blocks = engine._space.blocks
    assert blocks.num_blocks and not blocks.num_published, "blocks stay, and prefixes do not"
    with torch.no_grad():
        for weight in llama.parameters():
            weight.mul_(1.1)
    engine.update_weights(1)
    found = rollouts_of(engine, SAMPLING["greedy"])
    assert len(replayed) == num_recorded > 0
    assert sum(graph.times for graph in replayed) >= 2 * num_replayed
    layers = engine._runner.cache.layers.values()
    assert places == [tensor.data_ptr() for tensors in layers for tensor in tensors.values()]
    close(found, rollouts_of(make_engine(), SAMPLING["greedy"]))


@pytest.mark.parametrize(("num_bytes", "stays"), [(1000, True), (1001, False)])
def test_a_cache_stays_on_a_gpu_where_it_takes_at_most_a_sixteenth_of_the_memory(
    num_bytes: int, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=16000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert cache_may_stay(num_bytes, torch.device("cuda", 0)) == stays
    assert not cache_may_stay(num_bytes, torch.device("cpu"))


def test_graphs_of_merged_weights_that_were_merged_anew_are_dropped(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, make_engine: MakeEngine, replayed: list[Rerun]
) -> None:
    model = add_lora(llama, LoraSettings(rank=2))
    engine = EmbeddedEngine(model, tokenizer, RolloutSettings())
    before = rollouts_of(engine, SAMPLING["greedy"])
    num_recorded = len(replayed)
    kept = [copy for *_, copy in engine._weights._copies]  # so that no new copy gets an old one's address
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.add_(0.3)
    engine.update_weights(1)
    after = rollouts_of(engine, SAMPLING["greedy"])
    assert kept and len(replayed) > num_recorded > 0
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    close(after, rollouts_of(EmbeddedEngine(model, tokenizer, RolloutSettings()), SAMPLING["greedy"]))


def test_a_shape_is_recorded_when_it_has_come_often_and_reads_its_own_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pretend_recording(monkeypatch)
    sums = Replays(lambda tensors: tensors[0].sum() + tensors[1].sum())
    for number in range(RECORDED_AT + 3):
        for size in (2, 3):
            inputs = [torch.full((size,), number), torch.full((1,), 0.5)]
            assert float(sums.run(inputs)) == size * number + 0.5
            for tensor in inputs:
                tensor.fill_(1000)  # the next call must not read these
        assert len(made) == (0 if number + 1 < RECORDED_AT else 2)
    assert made[0].pool is made[1].pool
    sums.keep_if_at((1, 2))
    sums.run(inputs)
    assert len(made) == 2, "counted from the beginning"


def test_our_models_are_recorded_where_no_step_waits_for_the_device(
    sparse: PreTrainedModel, dense: PreTrainedModel, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runner.can_be_recorded(dense, cuda) and not runner.can_be_recorded(dense, cpu)
    assert not runner.can_be_recorded(llama, cuda)
    assert not runner.can_be_recorded(sparse, cuda) and runner.can_be_recorded(sparse.bfloat16(), cuda)
    capability = (8, 0)
    assert not runner.can_be_recorded(sparse, cuda) and runner.can_be_recorded(dense, cuda)
