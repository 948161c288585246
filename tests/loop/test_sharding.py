"""Weights that are spread over ranks: as one rank would train them, saved by parts, and read by any number of ranks.

Every trainer under each strategy: `tests.trainers.test_conformance`. Failures of a rank: `tests.loop.test_keeping`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab.config.trainers import GRPOConfig, RewardConfig
from alignlab.errors import ConfigError
from alignlab.loop.accelerator import make_accelerator
from alignlab.loop.empty_packs import empty_like, filled_up
from alignlab.loop.learner import Learner
from alignlab.loop.ranks import Ranks
from alignlab.loop.sharding import check_equal, shard_weights
from alignlab.models.exact_weights import dtype_in_training
from alignlab.models.policy import Policy
from alignlab.models.reward_model import RewardModel
from alignlab.runs.checkpoint import MASTER
from alignlab.runs.tensor_groups import read_groups
from alignlab.types import Experience, Segments
from tests.loop import rank_skipping
from tests.loop.rank_sharding import AVERAGED, CHANGES, MODELS
from tests.ranks import ROOT, run_ranks

HALF = "all in bfloat16"
GROUPS = ("policy.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def folder_of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    done = run_ranks(str(ROOT / "tests/loop/rank_sharding.py"), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("model", [name for name, (_, dtype, lora) in MODELS.items() if lora or dtype == torch.float32])
def test_a_run_goes_on_with_its_weights_in_other_places(model: str, folder_of_two_ranks: Path) -> None:
    expected = load_file(folder_of_two_ranks / model / "ddp ddp" / "rank0.safetensors")
    for first, then in CHANGES[model]:
        run = folder_of_two_ranks / model / f"{first} {then}"
        ranks = [load_file(run / f"rank{rank}.safetensors") for rank in (0, 1)]
        for name, weight in expected.items():
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            torch.testing.assert_close(ranks[0][name], weight, rtol=0, atol=1e-6, msg=f"{first} {then}: {name}")
        saved = sorted(path.name for path in (run / "checkpoints" / "step-00000002").glob("policy*"))
        parts = [f"policy-part-{rank:05d}.safetensors" for rank in (0, 1)]
        assert saved == (["policy.safetensors"] if first == "ddp" else parts)


@pytest.mark.distributed
@pytest.mark.parametrize("model", AVERAGED)
def test_the_average_that_is_saved_is_that_of_weights_in_one_place(model: str, folder_of_two_ranks: Path) -> None:
    expected = load_file(folder_of_two_ranks / model / "ddp ddp" / "model" / "model.safetensors")
    last = load_file(folder_of_two_ranks / model / "ddp ddp" / "rank0.safetensors")
    rounding = 2.0**-8 if "bfloat16" in model else 0.0
    for first, then in CHANGES[model][1:]:
        run = folder_of_two_ranks / model / f"{first} {then}"
        saved = load_file(run / "model" / "model.safetensors")
        assert saved.keys() == expected.keys()
        for name, weight in expected.items():
            assert saved[name].dtype == weight.dtype == MODELS[model][1]
            torch.testing.assert_close(saved[name], weight, rtol=rounding, atol=1e-6, msg=f"{first} {then}: {name}")
        parts = sorted(path.name for path in (run / "checkpoints" / "step-00000002").glob("average*"))
        assert len(parts) == (1 if first == "ddp" else 2)
    assert any((last[f"model.{name}"] - weight).abs().max() > 1e-4 for name, weight in expected.items())


@pytest.mark.distributed
def test_weights_in_16_bits_have_the_same_float32_copies_in_other_places(folder_of_two_ranks: Path) -> None:
    def saved(first: str, then: str) -> dict[str, Any]:
        step = folder_of_two_ranks / HALF / f"{first} {then}" / "checkpoints" / "step-00000003"
        return read_groups(step, [path.name for path in step.glob("*-part-*")] or GROUPS)

    expected = saved("ddp", "ddp")
    copies = [name for name in expected["optimizer"] if name.startswith(f"{MASTER}.")]
    assert len(copies) == len(expected["policy"])
    for first, then in CHANGES[HALF][1:]:
        groups, run = saved(first, then), f"{first} {then}"
        assert groups["policy"].keys() == expected["policy"].keys()
        assert groups["optimizer"].keys() == expected["optimizer"].keys()
        for name in copies:
            copy, weight = groups["optimizer"][name], groups["policy"][name.removeprefix(f"{MASTER}.")]
            assert copy.dtype == torch.float32 and torch.equal(weight, copy.bfloat16())
            torch.testing.assert_close(copy, expected["optimizer"][name], rtol=0, atol=1e-6, msg=f"{run}: {name}")
        ranks = [load_file(folder_of_two_ranks / HALF / run / f"rank{rank}.safetensors") for rank in (0, 1)]
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
        assert {weight.dtype for weight in ranks[0].values()} == {torch.bfloat16}


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_each_rank_saves_its_piece_alone(strategy: str, folder_of_two_ranks: Path) -> None:
    name = "model.model.layers.0.mlp.gate_proj.weight"
    run = folder_of_two_ranks / "dense" / f"{strategy} {strategy}"
    whole = load_file(run / "rank0.safetensors")[name]
    step = run / "checkpoints" / "step-00000003"
    parts = [load_file(step / f"policy-part-0000{rank}.safetensors") for rank in (0, 1)]
    assert torch.equal(torch.cat([part[name] for part in parts]), whole.view(-1))
    assert [len(part[name]) for part in parts] == [whole.numel() // 2] * 2


def pack(**fields: Any) -> Experience:
    segments = Segments((3, 2), (-1, 0), (-1, 0), (0, 0))
    return Experience(torch.arange(5), segments, torch.tensor([False, False, False, True, True]), **fields)


def test_an_empty_pack_has_the_fields_of_another_and_no_gradient(make_model: Callable[..., Any]) -> None:
    experts = torch.ones(5, 1, 2, dtype=torch.int16)
    full = pack(advantages=torch.ones(5), routing=experts, desirable=torch.tensor([True]))
    empty = empty_like(full)
    assert empty.tokens.tolist() == [0, 0] and not empty.completion_mask.any()
    assert empty.routing is not None and empty.routing.shape == (2, 1, 2) and (empty.routing == -1).all()
    assert empty.advantages is not None and empty.advantages.tolist() == [0, 0]
    assert empty.desirable is full.desirable, "the labels of the step's sequences, by their number"
    policy = Policy(make_model())
    policy(empty.tokens, empty.segments, empty.completion_mask).logprobs.sum().backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, "each weight takes part in the exchange of gradients"
    assert not any(gradient.any() for gradient in gradients.values() if gradient is not None)


def test_ranks_fill_up_to_the_largest_number_of_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(make_accelerator(60.0))
    monkeypatch.setattr(ranks, "largest", lambda number: 3)
    full = pack()
    assert [one.num_tokens for one in filled_up([full, full], ranks)] == [5, 5, 2]
    assert [one.num_tokens for one in filled_up([], ranks)] == [2, 2, 2]
    assert [one.num_tokens for one in filled_up([full] * 3, ranks)] == [5, 5, 5]


def test_one_rank_has_nothing_to_spread_weights_over(make_model: Callable[..., Any], tmp_path: Path) -> None:
    config = GRPOConfig(output_dir=tmp_path, sharding={"strategy": "fsdp2"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has one rank"):
        Learner(Policy(make_model()), config, make_accelerator(60.0), total_updates=1)


def test_ranks_that_begin_with_unequal_weights_are_named(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, ranks = Policy(make_model()), Ranks(make_accelerator(60.0))

    def of_two_ranks(digests: dict[str, str]) -> list[dict[str, str]]:
        return [digests, digests | {"model.model.norm.weight": "of rank 1"}]

    check_equal(policy, ranks)
    monkeypatch.setattr(ranks, "gather_json", of_two_ranks)
    with pytest.raises(ConfigError, match=r"unequal weights, first model\.model\.norm\.weight \(1 in all\)"):
        check_equal(policy, ranks)


def test_a_head_in_float32_on_a_model_in_16_bits_is_not_trained_by_deepspeed(make_model: Callable[..., Any]) -> None:
    config, ranks = RewardConfig(sharding={"strategy": "zero2"}), Ranks(make_accelerator(60.0))  # type: ignore[arg-type]
    reward = RewardModel(make_model().to(torch.bfloat16))
    with pytest.raises(ConfigError, match="must have one dtype, and this trains bfloat16, float32"):
        shard_weights(reward, config, ranks)
    with pytest.raises(ConfigError, match="has one rank"):
        shard_weights(RewardModel(make_model()), config, ranks)


def test_weights_of_two_dtypes_are_not_spread_in_training(make_model: Callable[..., Any]) -> None:
    model = make_model().to(torch.bfloat16)
    assert dtype_in_training(model) == torch.bfloat16
    assert dtype_in_training(make_model()) is None
    model.lm_head.float()
    with pytest.raises(ConfigError, match="must all have one dtype, and the model has bfloat16, float32"):
        dtype_in_training(model)
    assert dtype_in_training(model.requires_grad_(False)) is None


@pytest.mark.distributed
def test_an_update_that_is_left_out_leaves_no_trace_in_the_next_ones(tmp_path: Path) -> None:
    """A gradient that is not finite on one rank, and an update without a token: under every strategy as under DDP."""
    done = run_ranks(str(ROOT / "tests/loop/rank_skipping.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = load_file(tmp_path / "ddp.rank0.safetensors")
    norms = json.loads((tmp_path / "ddp.rank0.json").read_text())["norms"]
    assert norms[0] > 1 < norms[2], "gradients are clipped"
    for place in rank_skipping.PLACES:
        for rank in (0, 1):
            measured = json.loads((tmp_path / f"{place}.rank{rank}.json").read_text())
            assert measured["counts"] == {"skipped": 1, "empty": 1, "taken": 3}, place
            for update in (0, 2, 4):
                assert measured["norms"][update] == pytest.approx(norms[update], rel=1e-5), place
            weights = load_file(tmp_path / f"{place}.rank{rank}.safetensors")
            for name, weight in expected.items():
                torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6, msg=f"{place}: {name}")
