"""Predicted memory against what is held: of shapes alone and of real tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights

from alignlab import GRPOConfig, GRPOTrainer, LoraSettings
from alignlab.config.rollout import RolloutSettings, SamplingSettings
from alignlab.config.trainers import SFTConfig
from alignlab.functional.logprobs import block_rows
from alignlab.loop.accelerator import make_accelerator
from alignlab.loop.learner import Learner
from alignlab.loop.memory import kept_bytes, training_bytes
from alignlab.models.adapters import add_lora
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm, hidden_states
from alignlab.models.empty import without_weights
from alignlab.models.hub.checkpoints import load_model, new_model
from alignlab.models.kv_approximation.groups import GroupedRounding
from alignlab.models.kv_approximation.protocol import Replay
from alignlab.models.policy import Policy
from alignlab.models.presets import preset_config, preset_names
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.memory import engine_bytes, merges_adapters, predicted_for
from alignlab.types import Segments
from tests.models.attention_kinds import make_model
from tests.trainers.conftest import DENSE, SPARSE
from tests.trainers.tiny import prompts, save_teacher

DENSE_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MIXTURE_30B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "use_qk_norm": True,
}


@pytest.mark.parametrize("architecture", [DENSE, SPARSE], ids=["dense", "mixture"])
def test_float32_keeps_about_twice_as_much_as_bfloat16(architecture: dict[str, Any]) -> None:
    whole, half = (
        kept_bytes(new_model(architecture, vocab_size=50, dtype=dtype).to("meta"), 64)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 1.5 * half < whole <= 2 * half


def test_activations_grow_with_tokens_and_shrink_by_checkpointing() -> None:
    model: Any = new_model(DENSE, vocab_size=50).to("meta")
    short, long = kept_bytes(model, 512), kept_bytes(model, 1024)
    assert long == 2 * short
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert kept_bytes(model, 1024) < long / 3


@pytest.mark.parametrize(("shape", "gigabytes"), [(DENSE_8B, 24.2), (MIXTURE_30B, 25.3)], ids=["8B", "30B-A3B"])
def test_models_of_real_sizes_keep_what_fake_tensors_keep(shape: dict[str, Any], gigabytes: float) -> None:
    with init_empty_weights():
        model: Any = PolicyForCausalLM(PolicyConfig(**shape, vocab_size=1000)).to(torch.bfloat16)
    assert 0.8 * gigabytes < kept_bytes(add_lora(model, LoraSettings(rank=16)), 4096) / 1e9 < 1.1 * gigabytes


@pytest.mark.parametrize("kind", ["gated-deltanet", "kimi-delta"])
def test_recurrent_layers_keep_what_is_predicted(kind: str) -> None:
    """Beside norms, of which the fast one of a CPU keeps less, and what packing keeps once of a sequence."""
    model, kept = make_model(kind), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens = torch.zeros(256, dtype=torch.int64)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model.train(), tokens, torch.arange(256), Segments.single(256))
    measured = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    assert 0.85 < kept_bytes(model.to("meta"), 256) / measured < 1.3


def test_rounded_keys_that_stand_beside_exact_ones_are_predicted() -> None:
    """Of 100 tokens, 96 are in complete groups of 8."""
    model: Any = new_model(DENSE, vocab_size=50)
    groups = GroupedRounding(8, 1)

    def measured(approximation: GroupedRounding | None) -> int:
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        options = {} if approximation is None else {"kv_replay": Replay(approximation)}
        tokens = torch.zeros(100, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden_states(model.train(), tokens, torch.arange(100), Segments.single(100), **options)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.is_floating_point())

    more = measured(groups) - measured(None)
    per_token = 2 * model.config.num_hidden_layers * 2 * 8 * 4  # keys and values of 2 heads of 8 numbers
    model = model.to("meta")
    assert kept_bytes(model, 100, groups) - kept_bytes(model, 100) == more == 96 * per_token


@pytest.mark.parametrize("name", preset_names())
def test_activations_of_every_preset_are_predicted(name: str) -> None:
    with init_empty_weights(include_buffers=True):
        model = PolicyForCausalLM(preset_config(name, vocab_size=50)).to(torch.bfloat16)
    assert kept_bytes(model, 256) > 256 * 2 * 64 * 4  # at least a hidden state for each layer


def test_parts_of_a_run(tokenizer: Any, tmp_path: Path) -> None:
    name = save_teacher(tmp_path / "model", tokenizer)
    config = GRPOConfig(
        output_dir=tmp_path / "run", num_prompts=2, group_size=3, trackers=(),
        sampling=SamplingSettings(max_new_tokens=7), rollout=RolloutSettings(native="off"),
    )
    with without_weights():
        trainer = GRPOTrainer(
            name, lambda **_: [0.0], config, prompts(2), tokenizer=tokenizer, peft_config=LoraSettings(rank=2)
        )
    memory = trainer.preflight().memory
    base: Any = load_model(name, dtype=torch.bfloat16)
    adapter = sum(weight.numel() for weight in trainer.learner.trained.values())
    assert memory["weights"] == sum(p.numel() for p in base.parameters()) * 2 + adapter * 4
    assert memory["gradients and optimizer"] == 3 * adapter * 4
    layers = [module for module in base.modules() if isinstance(module, torch.nn.Linear)]
    merged = sum(layer.weight.numel() for layer in layers if layer is not base.get_output_embeddings()) * 2
    heads = base.config.num_key_value_heads * base.config.head_dim
    longest = max(len(prompt.token_ids) for prompt in trainer.source.prompts)
    per_token = 2 * base.config.num_hidden_layers * 2 * heads
    cache = 2 * 3 * 16 * per_token  # one block of 16 tokens a sequence
    assert 2 < longest + 7 <= 16
    assert memory["rollouts"] == merged + cache
    alone = engine_bytes(
        causal_lm(trainer.learner.model), RolloutSettings(merge_lora=False), torch.device("cpu"), num_sequences=6,
        num_tokens=longest + 7,
    )
    assert alone == cache


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (128, 1), (129, 2)])
def test_the_cache_of_a_gpu_is_in_blocks_of_128_tokens(num_tokens: int, num_blocks: int) -> None:
    model: Any = new_model(DENSE, vocab_size=50, dtype=torch.bfloat16).to("meta")
    per_token = 2 * model.config.num_hidden_layers * 2 * model.config.num_key_value_heads * model.config.head_dim

    def predicted(settings: Any) -> int:
        return engine_bytes(model, settings, torch.device("cuda"), num_sequences=5, num_tokens=num_tokens)

    assert predicted(RolloutSettings(merge_lora=False)) == 5 * num_blocks * 128 * per_token
    assert predicted(RolloutSettings(merge_lora=False, block_size=16)) == 5 * -(-num_tokens // 16) * 16 * per_token


def test_a_prediction_for_a_gpu_on_a_cpu_has_the_sizes_of_a_gpu(tokenizer: Any, tmp_path: Path) -> None:
    config = GRPOConfig(output_dir=tmp_path / "run", num_prompts=2, group_size=3, trackers=())
    name = save_teacher(tmp_path / "model", tokenizer)
    with without_weights():
        trainer = GRPOTrainer(
            name, lambda **_: [0.0], config, prompts(2), tokenizer=tokenizer, peft_config=LoraSettings(rank=2)
        )
    here = trainer.predicted_memory()
    with predicted_for("cuda"):
        on_gpu = trainer.predicted_memory()
    with predicted_for("cpu"):
        assert trainer.predicted_memory() == here
    vocabulary = len(tokenizer)
    rows = {"cpu": min(512, block_rows(vocabulary, "cpu")), "cuda": min(2048, block_rows(vocabulary, "cuda"))}
    assert on_gpu["activations"] - here["activations"] == vocabulary * (
        (2048 - 512) * 2 + 4 * 4 * (rows["cuda"] - rows["cpu"])
    )
    assert on_gpu["rollouts"] > here["rollouts"], "blocks of 128 tokens"
    assert {part: on_gpu[part] for part in ("weights", "gradients and optimizer")} == {
        part: here[part] for part in ("weights", "gradients and optimizer")
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_here_is_predicted_to_have_80_gib() -> None:
    def merges(hidden_size: int) -> bool:
        with init_empty_weights():
            model: Any = PolicyForCausalLM(PolicyConfig(**DENSE_8B | {"hidden_size": hidden_size}, vocab_size=1000))
        with predicted_for("cuda"):
            return merges_adapters(add_lora(model.bfloat16(), LoraSettings(rank=16)), None, torch.device("cuda"))

    assert merges(1024) and not merges(4096)


def test_a_reference_on_the_host_takes_no_memory_of_the_device_but_while_it_scores(
    make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    config = GRPOConfig(output_dir=tmp_path / "run", num_prompts=2, group_size=2, trackers=(), kl={"coef": 0.1})
    trainer = GRPOTrainer(make_model(), lambda **_: [0.0], config, prompts(2), tokenizer=tokenizer)
    lasting = trainer.predicted_memory()
    trainer.algorithm.reference.policy.rests_on_host = True
    visiting = trainer.predicted_memory()
    size = sum(weight.numel() * weight.element_size() for weight in trainer.learner.trained.values())
    assert lasting["weights"] == 2 * size and visiting["weights"] == size
    assert visiting["activations"] == max(lasting["activations"], size)


def test_a_reference_on_the_host_has_no_effect_on_a_cpu_and_that_is_said(
    make_model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for lora, reason in ((None, "no GPU"), (LoraSettings(rank=2), "its base")):
        config = GRPOConfig(
            output_dir=tmp_path / str(lora), num_prompts=2, group_size=2, trackers=(), kl={"coef": 0.1},
            memory={"reference_on_host": True},
        )
        GRPOTrainer(make_model(), lambda **_: [0.0], config, prompts(2), tokenizer=tokenizer, peft_config=lora)
        assert "trainer.memory.reference_on_host: no effect: " in caplog.text and reason in caplog.text


@pytest.mark.parametrize(
    ("sharding", "weights", "rest"),
    [
        ({"strategy": "ddp"}, 1.0, 4 + 8),
        ({"strategy": "fsdp2"}, 1 / 4, (4 + 8) / 4),
        ({"strategy": "zero1"}, 1.0, 4 + (8 + 4) / 4),
        ({"strategy": "zero2"}, 1.0, (4 + 8 + 4) / 4),
        ({"strategy": "zero3"}, 1 / 4, (4 + 8 + 4) / 4),
        ({"strategy": "zero3", "offload": "optimizer"}, 1 / 4, 4 / 4),
        ({"strategy": "zero3", "offload": "all"}, 0.0, 4 / 4),
    ],
)
def test_ranks_share_out_what_their_strategy_says(
    sharding: dict[str, str], weights: float, rest: float, tokenizer: Any, tmp_path: Path
) -> None:
    """All weights in float32 on four ranks, by hand: bytes of gradients, moments, and DeepSpeed's copy a weight."""
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1).to("meta")
    config = SFTConfig(output_dir=tmp_path, sharding=sharding)  # type: ignore[arg-type]
    learner = Learner(Policy(model), config, make_accelerator(60.0), total_updates=1)
    count = sum(parameter.numel() for parameter in model.parameters())
    teacher = copy.deepcopy(learner.module)
    with predicted_for(None, num_ranks=4):
        alone = training_bytes({"": learner}, [], config.memory, config.sharding)
        beside = training_bytes({"": learner}, [teacher], config.memory, config.sharding)
        teacher.follows_policy = True  # the reference
        followed = training_bytes({"": learner}, [teacher], config.memory, config.sharding)
    assert alone["weights"] == pytest.approx(4 * count * weights, rel=1e-6)
    assert alone["gradients and optimizer"] == pytest.approx(count * rest, rel=1e-6)
    assert beside["weights"] == pytest.approx(4 * count * (weights + 1), rel=1e-6), "a teacher is whole on each rank"
    assert followed["weights"] == pytest.approx(8 * count * weights, rel=1e-6)


def test_fsdp2_holds_weights_in_16_bits_as_their_float32_copies_alone(tokenizer: Any, tmp_path: Path) -> None:
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1).to("meta", torch.bfloat16)
    config = SFTConfig(output_dir=tmp_path, sharding={"strategy": "fsdp2"})  # type: ignore[arg-type]
    learner = Learner(Policy(model), config, make_accelerator(60.0), total_updates=1)
    with predicted_for(None, num_ranks=4):
        memory = training_bytes({"": learner}, [], config.memory, config.sharding)
    held = memory["weights"] + memory["gradients and optimizer"]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert held == pytest.approx(count * (4 + 4 + 8) / 4, rel=1e-6), "the copy, its gradient and two moments"
