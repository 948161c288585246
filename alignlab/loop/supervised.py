"""A language model that is taught given tokens: its output holds their loss beside what a policy's holds."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from alignlab.functional.cross_entropy import chunked_cross_entropy
from alignlab.masked_tokens import masked_tokens
from alignlab.models.decoder import output_head
from alignlab.models.policy import PackedModel, at_masked, policy_output
from alignlab.models.routers.protocol import RoutingPolicy
from alignlab.types import Experience, Segments


class SupervisedOutput(NamedTuple):
    """`PolicyOutput`, whose log-probs have no gradient, with two fields [N] float32, 0 where the mask is False.

    Attributes:
        label_loss: cross-entropy and z-loss, which are learnt from.
        log_normalizer: log of the softmax's denominator.
    """

    logprobs: Tensor
    entropy: Tensor
    router_loss: Tensor | None
    routing: Tensor | None
    routing_disagreement: Tensor | None
    routing_policy: RoutingPolicy | None
    mtp_loss: Tensor | None
    label_loss: Tensor
    log_normalizer: Tensor


class SupervisedModel(PackedModel):
    """A causal language model that answers with the loss of given tokens.

    Args:
        model: see `PackedModel`.
        label_smoothing, z_loss_coef: see `chunked_cross_entropy`.
        chunk_tokens: tokens whose logits exist at one time; default: by device.

    Raises:
        ConfigError: the logits are more than the product with the head's weight: adapted, or scaled.
    """

    def __init__(
        self, model: nn.Module, *, label_smoothing: float, z_loss_coef: float, chunk_tokens: int | None
    ) -> None:
        super().__init__(model)
        output_head(model)
        self.label_smoothing, self.z_loss_coef, self.chunk_tokens = label_smoothing, z_loss_coef, chunk_tokens

    def forward(
        self, tokens: Tensor, segments: Segments, mask: Tensor, *, routing: Tensor | None = None
    ) -> SupervisedOutput:
        """Return loss, log-prob and entropy of the masked tokens; see `Policy.forward`."""
        labels, predecessors = masked_tokens(mask, segments.predecessors)
        states, record = self.states(tokens, segments, counted=mask, routing=routing)
        weight, bias, softcap = output_head(self.model)
        loss, logprobs, entropy, log_normalizer = chunked_cross_entropy(
            states[predecessors], weight, tokens[labels], bias=bias, softcap=softcap,
            label_smoothing=self.label_smoothing, z_loss_coef=self.z_loss_coef, chunk_tokens=self.chunk_tokens,
        )
        mtp_loss = self.mtp_loss(states, tokens, segments, mask, chunk_tokens=self.chunk_tokens)
        of_policy = policy_output(logprobs, entropy, segments, mask, record)._replace(mtp_loss=mtp_loss)
        return SupervisedOutput(
            *of_policy, label_loss=at_masked(loss, segments, mask),
            log_normalizer=at_masked(log_normalizer, segments, mask),
        )


def supervised_forward(module: nn.Module, pack: Experience) -> Any:
    """Return the output of a `SupervisedModel` for a pack."""
    return module(pack.tokens, pack.segments, pack.completion_mask, routing=pack.routing)
