"""The cache holds what each layer declares, and attention over it equals attention over whole sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.rollout.embedded.paged_attention import PagedBatch, RowGroup
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.scheduler import Work
from alignlab.rollout.embedded.sequence import Request, TokenSequence
from alignlab.rollout.embedded.step_plan import plan_step
from alignlab.types import SamplingParams
from tests.rollout.conftest import SIZES, VOCAB, MakeEngine, flat, full_logprobs, make_prompts

BLOCK = 4
LENGTHS = (11, 6, 19)
HEADS = 4
KEYS_AND_VALUES = {0: (2, 8, 8), 1: (1, 16, 6), 2: (4, 4, 12)}  # kv heads, key size, value size of each layer
LATENT = 3
SPECS = {layer: LayerCacheSpec.of_heads(*sizes) for layer, sizes in KEYS_AND_VALUES.items()} | {
    LATENT: LayerCacheSpec({"latent": (5,)})
}
STEPS = [  # tokens that each sequence computes in each step
    (5, 6, 1), (3, 0, 9), (1, 0, 1), (1, 0, 1), (1, 0, 7),
]


def steps_of(sequences: list[TokenSequence]) -> list[list[Work]]:
    steps = []
    for counts in STEPS:
        steps.append([Work(s, s.num_computed, n, 0) for s, n in zip(sequences, counts, strict=True) if n])
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.num_computed += count
    assert not any(sequence.num_pending for sequence in sequences)
    return steps


@pytest.fixture
def sequences() -> list[TokenSequence]:
    """Sequences whose blocks lie mixed in the cache."""
    prompts = make_prompts(*LENGTHS)
    sequences = [TokenSequence(Request(p, SamplingParams(), frozenset()), 0, list(p.token_ids)) for p in prompts]
    for sequence, blocks in zip(sequences, ([7, 2, 9], [1, 5], [4, 0, 8, 3, 6]), strict=True):
        sequence.tables = {None: blocks}
    return sequences


def whole_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one sequence: query [H,L,D], key [K,L,D], value [K,L,V] -> [L,H,V]."""
    key, value = (x.repeat_interleave(HEADS // x.shape[0], 0) for x in (key, value))
    scores = query @ key.transpose(1, 2) * 0.3
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ value).transpose(0, 1)


def test_layers_of_different_heads_and_sizes_share_one_cache(sequences: list[TokenSequence]) -> None:
    cache = PagedCache(SPECS, BLOCK)
    cache.resize({None: 10})
    generator = torch.Generator().manual_seed(0)
    tensors = {
        (layer, index): [torch.randn(n, length, d, generator=generator) for n, d in ((HEADS, k), (kv, k), (kv, v))]
        for layer, (kv, k, v) in KEYS_AND_VALUES.items() for index, length in enumerate(LENGTHS)
    }
    outputs: dict[tuple[int, int], list[Tensor]] = {place: [] for place in tensors}
    for works in steps_of(sequences):
        plan = plan_step(works, BLOCK).on(torch.device("cpu"))[0]
        batch = PagedBatch(cache, plan.slots, plan.groups)
        order = sorted(works, key=lambda w: int((plan.slots[None] == first_slot(w)).nonzero()))
        for layer in KEYS_AND_VALUES:
            rows = [(sequences.index(w.sequence), slice(w.start, w.start + w.count)) for w in order]
            query, key, value = (
                torch.cat([tensors[layer, i][kind][:, part] for i, part in rows], 1)[None] for kind in range(3)
            )
            output = batch.attend(layer, query, key, value, scaling=0.3, sliding_window=None, softcap=None)[0]
            for (i, _), part in zip(rows, output.split([w.count for w in order]), strict=True):
                outputs[layer, i].append(part)
    for place, parts in outputs.items():
        torch.testing.assert_close(torch.cat(parts), whole_attention(*tensors[place]), atol=1e-5, rtol=1e-5)


def test_the_tokens_that_end_a_group_are_known_on_the_host(sequences: list[TokenSequence]) -> None:
    """Groups of 3: of positions 0 to 4, 4 to 5 and 8, those are 2, 5 and 8."""
    first, second, third = sequences
    works = [Work(first, 0, 5, 0), Work(second, 4, 2, 0), Work(third, 8, 1, 0)]
    plan = plan_step(works, BLOCK, tokens_of_group=3).on(torch.device("cpu"))[0]
    assert plan.group_ends is not None
    assert sorted(plan.positions[plan.group_ends].tolist()) == [2, 5, 8]
    assert plan_step(works, BLOCK).on(torch.device("cpu"))[0].group_ends is None


def first_slot(work: Work) -> int:
    return work.sequence.tables[None][work.start // BLOCK] * BLOCK + work.start % BLOCK


def test_a_layer_that_keeps_a_latent_reads_all_earlier_latents(sequences: list[TokenSequence]) -> None:
    cache = PagedCache(SPECS, BLOCK)
    cache.resize({None: 10})
    latents = {id(s): torch.randn(len(s.token_ids), 5) for s in sequences}
    outputs: dict[int, list[Tensor]] = {id(s): [] for s in sequences}
    for works in steps_of(sequences):
        plan = plan_step(works, BLOCK).on(torch.device("cpu"))[0]
        order = sorted(works, key=lambda w: int((plan.slots[None] == first_slot(w)).nonzero()))
        entries = torch.cat([latents[id(w.sequence)][w.start : w.start + w.count] for w in order])
        batch = PagedBatch(cache, plan.slots, plan.groups)
        means = torch.cat([mean(group, c["latent"]) for group, c in batch.update(LATENT, {"latent": entries})])
        for work, part in zip(order, means.split([w.count for w in order]), strict=True):
            outputs[id(work.sequence)].append(part)
    for sequence in sequences:
        latent = latents[id(sequence)]
        expected = latent.cumsum(0) / torch.arange(1, len(latent) + 1)[:, None]
        torch.testing.assert_close(torch.cat(outputs[id(sequence)]), expected)
    assert set(cache.layers) == {LATENT} and cache.layers[LATENT]["latent"].shape == (40, 5)


def mean(group: RowGroup, latents: Tensor) -> Tensor:
    """Mean latent [tokens, 5] of all tokens up to each one."""
    visible = torch.arange(latents.shape[1]) <= group.positions[:, :, None]  # [R,Q,L]
    weights = visible.float() / visible.sum(-1, keepdim=True)
    return group.unpadded(weights @ latents.nan_to_num())


def test_the_size_of_a_block_is_what_the_layers_declare() -> None:
    assert PagedCache(SPECS, BLOCK).block_bytes(torch.float32) == {None: 4 * BLOCK * (2 * 16 + 22 + 4 * 16 + 5)}
    windowed = SPECS | {9: LayerCacheSpec.of_heads(2, 3, 4, window=6)}
    sizes = {None: 2 * BLOCK * (2 * 16 + 22 + 4 * 16 + 5), 6: 2 * BLOCK * 14}
    assert PagedCache(windowed, BLOCK).block_bytes(torch.bfloat16) == sizes


def test_copying_moves_every_layer_and_resizing_drops_all_entries() -> None:
    cache = PagedCache(SPECS, BLOCK)
    cache.resize({None: 5})
    latent, slots = torch.randn(BLOCK, 5), torch.arange(BLOCK, 2 * BLOCK)
    cache.write(LATENT, slots, {"latent": latent})
    cache.write(0, slots, {"key": torch.ones(BLOCK, 2, 8), "value": torch.ones(BLOCK, 2, 8)})
    cache.copy(None, torch.tensor([(1, 4)]))
    assert torch.equal(cache.layers[LATENT]["latent"].view(5, BLOCK, 5)[4], latent)
    assert cache.layers[0]["value"].view(5, -1)[4].eq(1).all()
    cache.resize({None: 7})
    assert (cache.num_blocks, cache.layers) == ({None: 7}, {})


def test_entries_of_another_shape_than_declared_are_our_mistake() -> None:
    cache = PagedCache(SPECS, BLOCK)
    cache.resize({None: 1})
    with pytest.raises(AssertionError, match=r"layer 3 keeps \{'latent': \(5,\)\}, not \{'latent': \(6,\)\}"):
        cache.write(LATENT, torch.arange(1), {"latent": torch.zeros(1, 6)})


def test_a_model_whose_layers_differ_in_kv_heads(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    for layer_idx, kv_heads in enumerate((4, 1)):
        config = LlamaConfig(**SIZES | {"num_key_value_heads": kv_heads}, vocab_size=VOCAB)
        config._attn_implementation = "alignlab"
        llama.model.layers[layer_idx].self_attn = LlamaAttention(config, layer_idx)
    engine = make_engine(llama.eval(), block_size=3)
    prompts = make_prompts(5, 17)
    for prompt, completion in zip(
        prompts, flat(engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=9, ignore_eos=True))),
        strict=True,
    ):
        logprobs = full_logprobs(llama, prompt.token_ids + completion.token_ids)[len(prompt.token_ids) - 1 : -1]
        assert completion.token_ids == tuple(logprobs.argmax(-1).tolist())
    widths = [engine._runner.cache.layers[layer]["key"].shape[1] for layer in (0, 1)]
    assert widths == [4 * 8, 1 * 8]
