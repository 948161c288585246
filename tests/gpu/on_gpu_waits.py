"""How often the host waits for the GPU: budgets, with the lines that wait in the message of a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.data.packing import pack_rollouts
from alignlab.errors import NumericsError
from alignlab.functional.reduction import moments
from alignlab.functional.values import gae, token_rewards
from alignlab.models.adapters import add_lora
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.finite import check_finite
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.block_pools import BlockPools
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.sequence import Request, TokenSequence
from alignlab.rollout.embedded.state_cache import StateCache
from alignlab.rollout.embedded.swapping import SwapStore
from alignlab.types import Completion, Experience, Prompt, Rollout, SamplingParams
from tests.gpu.graph_stand_in import Rerun
from tests.gpu.pretended import CUDA, PretendedGPU
from tests.trainers.conftest import DENSE, SPARSE

MIXTURE = SPARSE | {"mlp_layer_types": None, "router_aux_loss_coef": 0.01}
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {}, "truncated": {"top_k": 20, "top_p": 0.9}, "greedy": {"temperature": 0.0},
    "least length": {"min_new_tokens": 8}, "penalty": {"repetition_penalty": 1.1},
}


def make_model(tokenizer: Any, architecture: dict[str, Any], num_layers: int = 2) -> Any:
    torch.manual_seed(0)
    return new_model(
        architecture | {"num_hidden_layers": num_layers}, vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )


def make_pack() -> Experience:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 250, (count,), generator=generator).tolist())

    rollouts = [
        Rollout(Prompt(ids(5 + i), ""), tuple(Completion.of(ids(4 + j)) for j in range(4))) for i in range(3)
    ]
    [pack] = pack_rollouts(rollouts, budget=4096)
    return pack


def test_a_pack_reaches_the_device_in_one_transfer_without_a_wait(gpu: Callable[..., Any]) -> None:
    with gpu() as mode:
        pack = make_pack()
        mode.reset()
        moved = pack.to("cuda:0")
        for tensor in (moved.tokens, moved.completion_mask, *moved.segments.per_token.values()):
            assert tensor.device == CUDA
        assert sum(mode.transfers.values()) == 1 and not mode.num_waits, mode.report()
        assert moved.to("cuda:0") is moved


@pytest.mark.parametrize("architecture", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_a_forward_and_backward_pass_never_waits(
    architecture: dict[str, Any], gpu: Callable[..., Any], tokenizer: Any
) -> None:
    with gpu() as mode:
        policy = Policy(make_model(tokenizer, architecture)).to("cuda:0").train()
        pack = make_pack().to("cuda:0")
        mode.reset()
        output = policy(pack.tokens, pack.segments, pack.completion_mask)
        loss = output.logprobs.sum() + output.entropy.sum()
        (loss if output.router_loss is None else loss + output.router_loss.sum()).backward()
        assert not mode.num_waits, mode.report()


def kinds(mode: PretendedGPU) -> list[str]:
    """The transfers that were made, in the order of their names."""
    return sorted(kind for (kind, _), times in mode.transfers.items() for _ in range(times))


def test_a_sequence_leaves_the_gpu_and_comes_back_by_one_copy_each_without_a_wait(gpu: Callable[..., Any]) -> None:
    """Beside the places of its blocks, which are a copy of their own."""
    with gpu() as mode:
        pools = BlockPools([None], 4)
        pools.grow({None: 9})
        cache = PagedCache({layer: LayerCacheSpec.of_heads(2, 8, 8) for layer in range(3)}, 4)
        cache.resize({None: 9})
        for layer in range(3):
            numbers = torch.randn(36, 2, 8, device="cuda:0")
            cache.write(layer, torch.arange(36, device="cuda:0"), {"key": numbers, "value": -numbers})
        request = Request(Prompt((1,), ""), SamplingParams(), frozenset())
        sequence = TokenSequence(request, 0, list(range(11)), num_computed=10)
        sequence.tables = {None: [pools.managers[None].allocate() for _ in range(3)]}
        before = [tensor.index_select(0, torch.tensor([0, 1, 2], device="cuda:0")) for tensor in cache.tensors_of(None)]
        swap = SwapStore(cache, StateCache({}, torch.float32), 1 << 20)
        mode.reset()
        assert swap.take_out(sequence, pools)
        assert kinds(mode) == ["device to host", "host to device"] and not mode.num_waits, mode.report()
        pools.release(sequence.tables)
        for tensor in cache.tensors_of(None):
            tensor.zero_()
        mode.reset()
        assert swap.find(sequence, pools) == {None: 3}
        swap.bring_back(sequence, pools, None)
        assert kinds(mode) == ["host to device"] * 2 and not mode.num_waits, mode.report()
        places = torch.tensor(sequence.tables[None], device="cuda:0")
        for tensor, old in zip(cache.tensors_of(None), before, strict=True):
            assert torch.equal(tensor.index_select(0, places), old)


def test_a_check_of_many_weights_waits_once(gpu: Callable[..., Any]) -> None:
    with gpu() as mode:
        weights = [(str(i), torch.ones(3, device="cuda:0")) for i in range(20)]
        mode.reset()
        check_finite(weights, "the weights")
        assert mode.num_waits == 1, mode.report()
        weights[7][1][1] = torch.nan
        with pytest.raises(NumericsError, match="1 of 3 numbers of 7 are not"):
            check_finite(weights, "the weights")


def test_advantages_never_wait_and_launch_a_few_operations_for_any_length(gpu: Callable[..., Any]) -> None:
    length = 1024
    with gpu() as mode:
        mask = torch.ones(4 * length, dtype=torch.bool, device="cuda:0")
        ids = torch.arange(4, device="cuda:0").repeat_interleave(length, output_size=4 * length)
        x = torch.randn(4 * length, device="cuda:0")
        where: dict[str, Any] = {"mask": mask, "sequence_ids": ids}
        mode.reset()
        rewards = token_rewards(x[:4], x, **where, kl_coef=0.1)
        gae(rewards, x, **where, num_sequences=4, gamma=1.0, lam=0.95)
        moments(x, mask)
        assert not mode.num_waits, mode.report()
        assert sum(mode.operations.values()) < 150


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING.keys())
@pytest.mark.parametrize("architecture", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_a_decoding_step_waits_once_and_moves_one_block_each_way(
    architecture: dict[str, Any], sampling: dict[str, Any], gpu: Callable[..., Any], tokenizer: Any
) -> None:
    """Once, for the tokens that it sampled, whatever was sent before in one copy; with 2 layers as with 3."""
    for num_layers in (2, 3):
        with gpu() as mode:
            model = add_lora(make_model(tokenizer, architecture, num_layers), LoraSettings(rank=2)).to("cuda:0")
            engine = EmbeddedEngine(model, tokenizer, RolloutSettings())
            prompts = [Prompt(tuple(range(1, 10 + i)), "") for i in range(3)]
            reports: list[tuple[int, list[str], str]] = []

            def count_step(tokens: int, done: int, mode: PretendedGPU = mode, into: Any = reports) -> None:
                copies = [kind for (kind, _), times in mode.transfers.items() for _ in range(times)]
                into.append((mode.num_waits, sorted(copies), mode.report()))
                mode.reset()

            params = SamplingParams(**{"n": 2, "max_new_tokens": 9, "seed": 1, "ignore_eos": True} | sampling)
            engine.generate(prompts, params, on_step=count_step)
            for waits, copies, report in reports[1:-1]:  # sequences start in the first step, and end in the last
                assert waits == 1 and copies == ["device to host", "host to device"], report
            replayed = [graph.times for graph in Rerun.made]
            assert replayed == ([] if architecture is MIXTURE else [5]), "a mixture in float32 waits inside"
            Rerun.made.clear()
