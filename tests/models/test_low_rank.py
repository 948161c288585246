"""Keys and values in few dimensions: rotations are found and undone, and bases measured."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from alignlab.config.kv_cache import LowRankCache
from alignlab.errors import ConfigError
from alignlab.models.decoder import hidden_states
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.kv_approximation.low_rank import LowRank
from alignlab.models.kv_approximation.low_rank_bases import LowRankBases, _rank_for, bases_of
from alignlab.models.kv_approximation.rotations import KeyRecorder, KeyRotation, key_rotations
from alignlab.models.rope import rope_frequencies
from alignlab.types import Segments
from tests.models.conftest import SIZES, VOCAB

PROMPTS = [list(range(2, 30)), list(range(40, 5, -1))]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
OPTIONS: dict[str, Any] = {"scaling": 0.4, "sliding_window": None, "softcap": None, "sinks": None}


def rotated_model(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {name: number for name, number in SIZES.items() if not name.endswith(("_id", "vocab_size"))}
    return new_model(sizes | {"max_position_embeddings": 64} | changes, vocab_size=VOCAB)


def test_a_rotation_by_hand_and_back() -> None:
    """Two pairs, (0, 2) and (1, 3), that turn a quarter and nothing at position 1; the last number stays."""
    rotation = KeyRotation(torch.tensor([torch.pi / 2, 0.0]))
    key = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    turned = rotation.rotate(key, torch.tensor(1))
    torch.testing.assert_close(turned, torch.tensor([-3.0, 2.0, 1.0, 4.0, 5.0]))
    torch.testing.assert_close(rotation.rotate(turned, torch.tensor(1), back=True), key)
    assert torch.equal(KeyRotation(None).rotate(key, torch.tensor(1)), key)


@pytest.mark.parametrize("changes", [
    {}, {"partial_rotary_factor": 0.5},
    {"rope_parameters": YARN},
    {"no_rope_layers": [1, 0]},
    {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "rope_local_base_freq": 100.0},
])  # fmt: skip
def test_rotations_of_our_models_are_found(changes: dict[str, Any]) -> None:
    model = rotated_model(**changes)
    found = key_rotations(model)
    own, _ = rope_frequencies(model.config, int(8 * changes.get("partial_rotary_factor", 1)))
    expected = {0: own, 1: own}
    if "no_rope_layers" in changes:
        [unrotated] = [layer_idx for layer_idx, rotation in found.items() if rotation.frequencies is None]
        del expected[unrotated]
    if "rope_local_base_freq" in changes:
        expected[0] = rope_frequencies(model.config, 8, local=True)[0]
    for layer_idx, frequencies in expected.items():
        assert torch.equal(found[layer_idx].frequencies, frequencies)


def test_another_rotation_is_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if neighbours were pairs."""
    attend = KeyRecorder.attend

    def interleaved(self: Any, layer_idx: int, query: Any, key: Any, *args: Any, **options: Any) -> Any:
        output = attend(self, layer_idx, query, key, *args, **options)
        self.keys[layer_idx] = key.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return output

    assert key_rotations(llama)[0].frequencies is not None
    monkeypatch.setattr(KeyRecorder, "attend", interleaved)
    with pytest.raises(ConfigError, match=r"which undoes the rotation of keys, and layer 0 of Llama.*another"):
        key_rotations(llama)


def test_a_rotation_that_changes_with_the_batch_is_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = LlamaConfig(**SIZES, rope_parameters=rope, attn_implementation="alignlab")
    with pytest.raises(ConfigError, match="rotates them in a way that it does not know"):
        key_rotations(LlamaForCausalLM(config))


def test_all_dimensions_are_exact_and_few_are_the_best_ones(llama: PreTrainedModel) -> None:
    """The squares that are lost on the calibration tokens are those of the smallest singular values."""
    segments = Segments.single(28)
    recorder = KeyRecorder()
    with torch.no_grad():
        hidden_states(llama, torch.tensor(PROMPTS[0]), segments.position_ids, segments, kv_replay=recorder)
    keys = recorder.keys[1][0].transpose(0, 1)  # [N,K,D]
    positions = segments.position_ids[:, None]
    turned = key_rotations(llama)[1].rotate(keys, positions, back=True)
    for rank in (3, 8):
        bases = LowRankBases(LowRankCache(rank=rank))
        bases.measure(llama, PROMPTS[:1])
        low = LowRank(bases)
        kept = low.encode(1, "key", keys, positions)
        assert kept.shape == (28, 2, rank)
        error = (low.decode(1, "key", kept, positions) - keys).square().sum((0, 2))
        values = torch.linalg.svdvals(turned.transpose(0, 1))  # [K,8], falling
        torch.testing.assert_close(error, values[:, rank:].square().sum(-1), atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_the_projection(llama: PreTrainedModel) -> None:
    bases = LowRankBases(LowRankCache(rank=2))
    bases.measure(llama, PROMPTS)
    basis = bases.basis(0, "value", torch.device("cpu"))
    torch.testing.assert_close(basis @ basis.transpose(1, 2), torch.eye(2).expand(2, -1, -1), atol=1e-6, rtol=0)
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    value = torch.randn(1, 2, 3, 8, requires_grad=True)
    low = LowRank(bases).of_layer(0)
    low.attend(query, key, value, Segments.single(3), **OPTIONS)[0, 0].sum().backward()
    # The first token sees itself alone: each of the two heads of a kv head has a gradient of 1 in every number.
    expected = 2 * torch.ones(2, 1, 8) @ basis.transpose(1, 2) @ basis
    torch.testing.assert_close(value.grad[0, :, :1], expected)


def test_bases_are_measured_once_and_restored_to_the_bit(llama: PreTrainedModel) -> None:
    settings = LowRankCache(energy=0.7)
    bases = bases_of(llama, settings)
    assert bases is bases_of(llama, settings.model_copy(update={"replay": False}))
    assert bases is not bases_of(llama, LowRankCache(energy=0.8)) and bases.rank_of("key", 8) == 8
    bases.measure(llama, PROMPTS)
    state = json.loads(json.dumps(bases.state()))
    before = {name: bases.basis(1, name, torch.device("cpu")).clone() for name in ("key", "value")}
    with torch.no_grad():
        for weight in llama.parameters():
            weight.add_(torch.randn(weight.shape))
    bases.measure(llama, PROMPTS)
    other = LowRankBases(settings)
    other.measure(llama, PROMPTS)
    assert not torch.equal(other.basis(1, "key", torch.device("cpu"))[:, :1], before["key"][:, :1])
    other.load_state(state)
    assert other.ranks == bases.ranks
    for name, basis in before.items():
        assert torch.equal(bases.basis(1, name, torch.device("cpu")), basis)
        assert torch.equal(other.basis(1, name, torch.device("cpu")), basis)


def test_a_share_of_the_energy_by_hand() -> None:
    """Heads with shares 0.6, 0.3, 0.1 and 0.8, 0.2, 0: on average 0.7, 0.95 and 1."""
    energies = [torch.tensor([[6.0, 3.0, 1.0]]), torch.tensor([[80.0, 20.0, 0.0]])]
    assert [_rank_for(energies, share) for share in (0.5, 0.7, 0.71, 0.95, 0.96, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_too_few_tokens_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"must have at least 4 tokens of them, but 1 prompts have 3; give more"):
        LowRankBases(LowRankCache(rank=4)).measure(llama, [[1, 2, 3]])
    with pytest.raises(ConfigError, match=r"at least 1 tokens of them, but 0 prompts have 0"):
        LowRankBases(LowRankCache(energy=0.5)).measure(llama, [])
