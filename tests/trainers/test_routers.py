"""Mixtures of every router through the trainers: what is sampled is what is trained, and what cannot be is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.data.packing import pack_rollouts
from alignlab.errors import ConfigError
from alignlab.models.adapters import add_lora
from alignlab.models.moe import routers
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.engine import make_engine
from alignlab.types import Prompt, SamplingParams
from tests.models.routers_cases import CAUSAL, ROUTERS
from tests.ranks import ROOT, run_ranks
from tests.trainers.conftest import SPARSE
from tests.trainers.rank_routers import SHARDED, STRATEGIES
from tests.trainers.steps import weights_of
from tests.trainers.tiny import CASES, make_case

Make = Callable[..., Any]
SHAPE = SPARSE | {"num_experts": 6, "mlp_layer_types": ["sparse", "sparse"], "initializer_range": 0.3}
SAMPLING = SamplingParams(n=3, max_new_tokens=9, ignore_eos=True, seed=0)


def prompts(*lengths: int) -> list[Prompt]:
    torch.manual_seed(4)
    return [
        Prompt(index=i, token_ids=tuple(torch.randint(3, 200, (n,)).tolist()), text="") for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("name", CAUSAL)
def test_log_probs_of_the_engine_are_the_trainers_under_replay(name: str, make_model: Make, tokenizer: Any) -> None:
    """Dropped choices too: the engine sees a few rows a step, and the trainer whole packs."""
    model = make_model(SHAPE | ROUTERS[name])
    engine = EmbeddedEngine(model, tokenizer, RolloutSettings(prefill_tokens=16, max_running=4))
    rollouts = engine.generate(prompts(5, 13, 8), SAMPLING)
    gaps, free_gaps, dropped = [], [], []
    for pack in pack_rollouts(rollouts, budget=64):
        mask = pack.completion_mask
        assert pack.routing is not None
        with torch.no_grad():
            for routing, of_packs in ((pack.routing, gaps), (None, free_gaps)):
                logprobs = Policy(model)(pack.tokens, pack.segments, mask, routing=routing).logprobs
                of_packs.append((logprobs - pack.rollout_logprobs)[mask].abs())
        dropped.append((pack.routing < -1).float())
    assert torch.cat(gaps).max() < 1e-5
    if "capacity_factor" in ROUTERS[name]:
        assert torch.cat([of_pack.flatten() for of_pack in dropped]).mean() > 0.05
        assert torch.cat(free_gaps).max() > 1e-3


@pytest.mark.parametrize("name", ["by_score", "hash", "expert_choice"])
def test_an_adapter_on_experts_has_the_output_of_the_merged_model(name: str, make_model: Make) -> None:
    model = make_model(SHAPE | ROUTERS[name])
    adapted = add_lora(model, LoraSettings(rank=4, target_modules="all-linear"))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 200, (1, 20))
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids, use_cache=False).logits
        base = adapted.merge_and_unload()
        torch.testing.assert_close(base(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_first_update_of_a_policy_gradient_is_at_the_policy_that_sampled(
    name: str, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    found: list[dict[str, float]] = []
    trainer = make_case(
        "grpo", tmp_path / "run", make_model(SHAPE | ROUTERS[name]), tokenizer, num_steps=2,
        callbacks=[lambda _, __, metrics: found.append(metrics)],
    )
    before = {key: value.clone() for key, value in weights_of(trainer).items()}
    trainer.train()
    assert found[0]["ratio"] == pytest.approx(1.0, abs=1e-5) and found[0]["rollout_gap"] < 1e-4
    after = weights_of(trainer)
    assert any(not torch.equal(after[key], before[key]) for key in before if "experts" in key)


@pytest.mark.parametrize("name", ROUTERS)
def test_supervised_training_lowers_the_loss(name: str, make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    found: list[float] = []
    trainer = make_case(
        "sft", tmp_path / "run", make_model(SHAPE | ROUTERS[name]), tokenizer, num_steps=12,
        callbacks=[lambda _, __, metrics: found.append(metrics["loss"])],
    )
    result = trainer.train()
    assert result.before is not None and found[-1] < 0.8 * found[0]


@pytest.mark.parametrize("name", ["noisy", "reinforce", "hash"])
def test_a_resumed_run_has_the_noise_of_an_uninterrupted_one(
    name: str, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    def stop(trainer: Any, step: int, metrics: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def trainer(folder: str, **options: Any) -> Any:
        model = make_model(SHAPE | ROUTERS[name])
        return make_case("sft", tmp_path / folder, model, tokenizer, num_steps=4, **options)

    whole = trainer("whole")
    whole.train()
    trainer("stopped", callbacks=[stop]).train()
    resumed = trainer("stopped")
    resumed.train(resume=True)
    expected = weights_of(whole)
    assert all(torch.equal(weight, expected[key]) for key, weight in weights_of(resumed).items())


@pytest.mark.parametrize("name", ["noisy", "reinforce", "softmax", "groups_v2"])
def test_micro_batches_of_any_size_give_the_same_step(
    name: str, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    """Noise and draws belong to tokens, loads to the last step, and sequences are whole in a pack."""
    balance = {"router_seq_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
    if name == "groups_v2":
        balance |= {"router_device_aux_loss_coef": 0.1, "router_comm_aux_loss_coef": 0.1}
    stepped = []
    for budget in (16, 4096):
        trainer = make_case(
            "sft", tmp_path / str(budget), make_model(SHAPE | ROUTERS[name] | balance), tokenizer, num_steps=1,
            memory={"tokens_per_microbatch": budget},
        )
        trainer.train()
        stepped.append(weights_of(trainer))
    for key, weight in stepped[0].items():
        torch.testing.assert_close(weight, stepped[1][key], rtol=1e-3, atol=2e-4, msg=key)


def test_a_router_learns_by_reinforce_which_expert_has_the_lower_loss(
    make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    """With gates of 1 its gradient is the policy's alone."""
    shape = SHAPE | ROUTERS["reinforce"] | {"num_experts_per_tok": 1}
    trainer = make_case("sft", tmp_path / "run", make_model(shape), tokenizer, num_steps=1)
    before = {key: value.clone() for key, value in weights_of(trainer).items()}
    trainer.train()
    after = weights_of(trainer)
    moved = [key for key in before if key.endswith(("gate.weight", "baseline_bias"))]
    assert moved and all(not torch.equal(after[key], before[key]) for key in moved)


REFUSED = [
    *(
        (case, "expert_choice", "expert_choice") for case in sorted(CASES)
        if not case.startswith(("sft", "distill"))
    ),
    *((case, "by_order", "capacity_factor is 0.75") for case in ("dpo", "kto", "reward", "online_dpo")),
    *((case, "reinforce", "router_type is reinforce") for case in ("dpo", "kto", "reward", "online_dpo", "distill")),
]


@pytest.mark.parametrize(("case", "name", "message"), REFUSED)
def test_trainers_refuse_by_name_what_a_router_cannot_do(
    case: str, name: str, message: str, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_case(case, tmp_path / "run", make_model(SHAPE | ROUTERS[name]), tokenizer)


def test_drops_that_are_not_replayed_are_refused(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would drop other choices"):
        make_case(
            "grpo", tmp_path / "run", make_model(SHAPE | ROUTERS["by_order"]), tokenizer, routing_replay="none"
        )


def test_engines_and_caches_refuse_what_is_not_causal(make_model: Make, tokenizer: Any) -> None:
    model = make_model(SHAPE | ROUTERS["expert_choice"])
    with pytest.raises(ConfigError, match="nothing can be generated"):
        make_engine(model, tokenizer, RolloutSettings())
    with pytest.raises(ConfigError, match="a cache cannot stand"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)


def test_a_trainer_that_compares_log_probs_switches_exploring_off_and_sft_on(
    make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(SHAPE | ROUTERS["noisy"])
    make_case("grpo", tmp_path / "grpo", model, tokenizer)
    assert not any(router.explores for router in routers(model))
    make_case("sft", tmp_path / "sft", model, tokenizer)
    assert all(router.explores for router in routers(model))


@pytest.mark.distributed
def test_weights_spread_over_ranks_train_as_whole_ones(tmp_path: Path) -> None:
    done = run_ranks(str(ROOT / "tests/trainers/rank_routers.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in SHARDED:
        expected = load_file(tmp_path / name / "ddp" / "rank0.safetensors")
        for strategy in STRATEGIES:
            for rank in (0, 1):
                weights = load_file(tmp_path / name / strategy / f"rank{rank}.safetensors")
                for key, weight in expected.items():
                    torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-6, msg=f"{name} {strategy}: {key}")
