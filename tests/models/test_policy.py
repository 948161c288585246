"""Log-probs of the policy against the full logits of ordinary sequences."""

import pytest
import torch
from accelerate import Accelerator
from transformers import Gemma2Config, Gemma2ForCausalLM

from alignlab.errors import ConfigError, DataError
from alignlab.models.config import PolicyConfig
from alignlab.models.policy import Policy
from alignlab.models.routing import RoutingRecord
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.types import Segments
from tests.models.conftest import SIZES, VOCAB, sequences_of


def completion_mask(pack: Segments) -> torch.Tensor:
    return (pack.sequence_of_token >= 0) & (pack.predecessors >= 0)


def reference(model, pack, tokens, mask, temperature=1.0):
    """(logprobs, entropy) [N] by full logits of each sequence alone."""
    logprobs, entropy = torch.zeros(len(tokens)), torch.zeros(len(tokens))
    for index in sequences_of(pack):
        log_p = (model(tokens[index][None]).logits[0].float() / temperature).log_softmax(-1)
        chosen = log_p[:-1].gather(1, tokens[index][1:, None])[:, 0]
        place = index[1:][mask[index[1:]]]
        logprobs = logprobs.index_put((place,), chosen[mask[index[1:]]])
        entropy = entropy.index_put((place,), -(log_p.exp() * log_p).sum(-1)[:-1][mask[index[1:]]])
    return logprobs, entropy


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_full_logits_and_their_gradient(name, temperature, pack, tokens, request):
    model, mask = request.getfixturevalue(name), completion_mask(pack)
    mask[-1] = False
    weights = torch.randn(len(tokens), generator=torch.Generator().manual_seed(3))
    output = Policy(model, chunk_tokens=4)(tokens, pack, mask, temperature=temperature, entropy_grad=True)
    ((output.logprobs + output.entropy) * weights).sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logprobs, entropy = reference(model, pack, tokens, mask, temperature)
    ((logprobs + entropy) * weights).sum().backward()
    torch.testing.assert_close(output.logprobs, logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.entropy, entropy, rtol=1e-4, atol=1e-5)
    assert not output.logprobs[~mask].any() and not output.entropy[~mask].any() and output.router_loss is None
    for mine, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-5)


def test_the_head_s_soft_cap_is_applied(pack, tokens):
    torch.manual_seed(0)
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4, **caps, attn_implementation="alignlab")).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(30)
    mask = completion_mask(pack)
    output = Policy(model)(tokens, pack, mask)
    logprobs, _ = reference(model, pack, tokens, mask)
    torch.testing.assert_close(output.logprobs, logprobs, rtol=1e-4, atol=1e-5)


def test_the_first_token_of_a_sequence_cannot_be_asked_about(llama, pack, tokens):
    with pytest.raises(DataError, match="a sequence's first token"):
        Policy(llama)(tokens, pack, torch.ones_like(tokens, dtype=torch.bool))


def test_an_empty_mask_gives_zeros_and_zero_gradients(llama, pack, tokens):
    output = Policy(llama)(tokens, pack, torch.zeros_like(tokens, dtype=torch.bool))
    assert not output.logprobs.any() and not output.entropy.any()
    output.logprobs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in llama.parameters())


def test_accelerate_can_wrap_a_policy(llama, pack, tokens):
    policy, mask = Policy(llama), completion_mask(pack)
    prepared = Accelerator(cpu=True).prepare(policy)
    assert torch.equal(prepared(tokens, pack, mask).logprobs, policy(tokens, pack, mask).logprobs)


def moe(**options) -> PolicyForCausalLM:
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.5}
    return PolicyForCausalLM(PolicyConfig(**SIZES, **experts, attn_implementation="alignlab", **options))


def test_router_loss_is_of_the_masked_tokens_and_carries_a_gradient(pack, tokens):
    model, mask = moe().train(), completion_mask(pack)
    loss = Policy(model)(tokens, pack, mask).router_loss
    assert loss.shape == tokens.shape and (loss[mask] > 0).all() and not loss[~mask].any()
    loss.sum().backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_routing_is_replayed(pack, tokens):
    model, mask = moe().eval(), completion_mask(pack)
    record = RoutingRecord()
    own = Policy(model)(tokens, pack, mask).logprobs
    model.get_decoder()(
        input_ids=tokens[None], position_ids=pack.position_ids[None], layout=pack, routing=record, use_cache=False
    )
    chosen = record.stacked_choices()
    assert torch.equal(Policy(model)(tokens, pack, mask, routing=chosen).logprobs, own)
    other = (chosen + 1) % 4
    assert not torch.allclose(Policy(model)(tokens, pack, mask, routing=other).logprobs, own, atol=1e-6)
    unrecorded = torch.full_like(chosen, -1)
    assert torch.equal(Policy(model)(tokens, pack, mask, routing=unrecorded).logprobs, own)


def test_a_dense_model_has_no_experts_to_replay(llama, pack, tokens):
    with pytest.raises(ConfigError, match="expert choices were given for LlamaForCausalLM"):
        Policy(llama)(tokens, pack, completion_mask(pack), routing=torch.zeros(len(tokens), 2, 1, dtype=torch.int16))


def test_checkpointing_changes_no_gradient(pack, tokens):
    mask, grads = completion_mask(pack), []
    for checkpointing in (False, True):
        model = moe().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        output = Policy(model)(tokens, pack, mask)
        (output.logprobs.sum() + output.router_loss.sum()).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_tokens_of_the_vocabulary_alone_are_scored(llama):
    """Probabilities of all continuations of one prompt sum to 1."""
    pack = Segments((3, *[1] * VOCAB), (-1, *[0] * VOCAB), (-1, *range(VOCAB)), (0,) * (VOCAB + 1))
    tokens = torch.cat([torch.tensor([4, 9, 7]), torch.arange(VOCAB)])
    output = Policy(llama)(tokens, pack, pack.sequence_of_token >= 0)
    torch.testing.assert_close(output.logprobs[3:].exp().sum(), torch.tensor(1.0))
