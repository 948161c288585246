"""Language models over packed tokens, and the policy: log-probs of given tokens, never logits.

Shapes: N tokens of a pack, M masked tokens, D hidden size, L sparse layers, K experts a token.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignlab.errors import ConfigError
from alignlab.functional.logprobs import chunked_logprobs
from alignlab.masked_tokens import masked_tokens
from alignlab.models.decoder import causal_lm, hidden_states, output_head
from alignlab.models.kv_approximation.protocol import KVApproximation, Replay
from alignlab.models.mtp import mtp_losses
from alignlab.models.routers.protocol import RoutingPolicy
from alignlab.models.routing import RoutingRecord
from alignlab.models.shards import shard_root
from alignlab.types import Segments


class PolicyOutput(NamedTuple):
    """Log-probs and more of N tokens; 0 where the mask is False.

    Attributes:
        logprobs: [N] float32, log-prob of the token given what precedes it, nats.
        entropy: [N] float32, of the distribution that the token was drawn from, nats.
        router_loss: [N] float32, weighted balance and z-losses of the token's routing, summed over the MoE layers;
            None without them.
        routing: [N, L, K] int16, experts that were used; None for a model without experts of ours.
        routing_disagreement: [N] float32, fraction of the layers whose router differs from what was replayed; None
            without replay.
        routing_policy: [N, L] each, of the experts from which the token was predicted; None without routers that are
            learnt by REINFORCE, or in evaluation.
        mtp_loss: [N] float32, weighted loss of multi-token prediction; None without it, and where nothing trains.
    """

    logprobs: Tensor
    entropy: Tensor
    router_loss: Tensor | None
    routing: Tensor | None = None
    routing_disagreement: Tensor | None = None
    routing_policy: RoutingPolicy | None = None
    mtp_loss: Tensor | None = None


class PackedModel(nn.Module):
    """A language model over packed tokens, and a head on its hidden states: policy, critic, reward model.

    A subclass has a `forward` of its own. All parameters are used inside it, so that accelerate may wrap the subclass
    (DDP and its like).

    Args:
        model: ours, one of `transformers`', or a PeftModel around it.
        kv_approximation: of keys and values, which every pass applies; None computes exactly.

    Attributes:
        rests_on_host: whether the weights are on the device only while the module computes without a gradient.
        follows_policy: whether this is a copy of the policy, whose weights are spread over ranks as the policy's are.
    """

    rests_on_host = False
    follows_policy = False

    def __init__(self, model: nn.Module, *, kv_approximation: KVApproximation | None = None) -> None:
        super().__init__()
        self.model = model
        self.kv_approximation = kv_approximation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward`, within the root of a model whose weights are spread over ranks."""
        root, run = shard_root(self.model), partial(super().__call__, *args, **kwargs)
        return run() if root is None else root(run)

    def in_use(self) -> AbstractContextManager[None]:
        """Return a context in which a shared model takes this role: its adapter is active, its weights train.

        A model that has one role alone is always in it. Forward and backward passes are run in the context.
        """
        return nullcontext()

    def states(
        self, tokens: Tensor, segments: Segments, *, counted: Tensor, routing: Tensor | None = None,
        kv_record: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """Return the final hidden states [N, D], and the record of expert choices; None without experts of ours.

        Args:
            tokens: [N] ids.
            segments: how they divide into sequences.
            counted: [N] bool, tokens whose expert choices count in training.
            routing: [N, L, K] experts to replay, -1 where there is no record; for an in-house MoE.
            kv_record: [N, L, bytes] of how the engine rounded keys and values, which is replayed where this module
                approximates them.

        Raises:
            ConfigError: the model cannot be computed with this layout, or has no experts to replay.
        """
        lm = causal_lm(self.model)
        options = {} if self.kv_approximation is None else {"kv_replay": Replay(self.kv_approximation, kv_record)}
        if not getattr(lm.config, "num_routers", 0):
            if routing is not None:
                raise ConfigError(
                    f"expert choices were given for {type(lm).__name__}, which can replay none; give routing to an "
                    "in-house MoE model only"
                )
            return hidden_states(self.model, tokens, segments.position_ids, segments, **options), None
        record = RoutingRecord(replay=routing, counted=counted)
        states = hidden_states(self.model, tokens, segments.position_ids, segments, routing=record, **options)
        return states, record

    def predicting_states(
        self, tokens: Tensor, segments: Segments, mask: Tensor,
        *, routing: Tensor | None = None, counted: Tensor | None = None, kv_record: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """Return the hidden states [M, D] from which the masked tokens are predicted; see `states`.

        Args:
            mask: [N] bool, tokens that are asked about; none may be the first of a sequence.
            counted: default: the mask.

        Raises:
            DataError: a masked token has no predecessor.
        """
        predecessors = masked_tokens(mask, segments.predecessors).predecessors
        hidden, record = self.states(
            tokens, segments, counted=mask if counted is None else counted, routing=routing, kv_record=kv_record
        )
        return hidden[predecessors], record


    def mtp_loss(
        self, states: Tensor, tokens: Tensor, segments: Segments, mask: Tensor,
        *, chunk_tokens: int | None, num_ids: int | None = None,
    ) -> Tensor | None:
        """Return the weighted loss of multi-token prediction [N], 0 where the mask is False; see `mtp.mtp_losses`.

        None where the model has no layer for it, or the pass trains nothing.
        """
        if not (self.training and torch.is_grad_enabled()):
            return None
        losses = mtp_losses(
            self.model, states, tokens, segments, mask, chunk_tokens=chunk_tokens, num_ids=num_ids
        )
        return None if losses is None else at_masked(losses, segments, mask)


class Policy(PackedModel):
    """A causal language model that answers with log-probs of given tokens.

    Args:
        model: see `PackedModel`.
        chunk_tokens: tokens whose logits exist at one time; default: by device, see `chunked_logprobs`.
        num_ids: ids that share the probability, from 0 on; default: all for which there is a logit.
        kv_approximation: see `PackedModel`.

    Raises:
        ConfigError: the logits are more than the product with the head's weight: adapted, or scaled.
    """

    def __init__(
        self, model: nn.Module, *, chunk_tokens: int | None = None, num_ids: int | None = None,
        kv_approximation: KVApproximation | None = None,
    ) -> None:
        super().__init__(model, kv_approximation=kv_approximation)
        output_head(model)
        self.chunk_tokens = chunk_tokens
        self.num_ids = num_ids

    def forward(
        self, tokens: Tensor, segments: Segments, mask: Tensor,
        *, temperature: float = 1.0, entropy_grad: bool = False, routing: Tensor | None = None,
        kv_record: Tensor | None = None,
    ) -> PolicyOutput:
        """Return log-prob and entropy of the masked tokens; the head is applied to their predecessors alone.

        Args:
            tokens, segments, routing, kv_record: see `PackedModel.states`.
            mask: [N] bool, tokens that are asked about; none may be the first of a sequence.
            temperature: > 0, of the distribution asked about.
            entropy_grad: whether the entropy carries a gradient.

        Raises:
            DataError, ConfigError: see `PackedModel.predicting_states`.
        """
        predecessors = masked_tokens(mask, segments.predecessors).predecessors
        states, record = self.states(tokens, segments, counted=mask, routing=routing, kv_record=kv_record)
        weight, bias, softcap = output_head(self.model)
        logprobs, entropy = chunked_logprobs(
            states[predecessors], weight[: self.num_ids], tokens[masked_tokens(mask, segments.predecessors).indices],
            bias=None if bias is None else bias[: self.num_ids], temperature=temperature, softcap=softcap,
            chunk_tokens=self.chunk_tokens, entropy_grad=entropy_grad,
        )
        ahead = self.mtp_loss(
            states, tokens, segments, mask, chunk_tokens=self.chunk_tokens, num_ids=self.num_ids
        )
        return policy_output(logprobs, entropy, segments, mask, record)._replace(mtp_loss=ahead)


def at_masked(values: Tensor, segments: Segments, mask: Tensor) -> Tensor:
    """Return values [M, ...] of the masked tokens at their places in [N, ...], and 0 elsewhere."""
    places = masked_tokens(mask, segments.predecessors).indices
    return values.new_zeros(len(mask), *values.shape[1:]).index_put((places,), values)


def masked_router_loss(record: RoutingRecord | None, mask: Tensor) -> Tensor | None:
    """Return the router losses [N] of the masked tokens, 0 elsewhere; None where the config weighs none."""
    loss = None if record is None else record.total_loss()
    return None if loss is None else loss * mask


def policy_output(
    logprobs: Tensor, entropy: Tensor, segments: Segments, mask: Tensor, record: RoutingRecord | None
) -> PolicyOutput:
    """Return a policy's output from log-probs and entropy [M] of the masked tokens.

    Args:
        segments: of the pack.
        mask: [N] bool.
        record: of the forward pass.
    """
    return PolicyOutput(
        at_masked(logprobs, segments, mask),
        at_masked(entropy, segments, mask),
        masked_router_loss(record, mask),
        None if record is None else record.stacked_choices(),
        None if record is None else record.disagreement(),
        _routing_policy(record, segments, mask),
    )


def _routing_policy(record: RoutingRecord | None, segments: Segments, mask: Tensor) -> RoutingPolicy | None:
    """Return what REINFORCE needs of the routing from which each masked token was predicted; None without it."""
    policy = None if record is None else record.policy()
    if policy is None:
        return None
    predecessors = masked_tokens(mask, segments.predecessors).predecessors
    return RoutingPolicy(*(at_masked(values[predecessors], segments, mask) for values in policy))
