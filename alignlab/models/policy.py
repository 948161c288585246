"""The policy: a causal language model that answers with log-probs of given tokens, and never with logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor, nn

from alignlab.errors import ConfigError, DataError
from alignlab.functional.logprobs import chunked_logprobs
from alignlab.models.attention import causal_lm, hidden_states, output_head
from alignlab.models.moe import RoutingRecord
from alignlab.types import Segments


class PolicyOutput(NamedTuple):
    """What is known of each of N tokens; 0 where the mask is False.

    Attributes:
        logprobs: [N] float32, log-prob of the token given what precedes it, nats.
        entropy: [N] float32, of the distribution that the token was drawn from, nats.
        router_loss: [N] float32, weighted balance and z-losses of the token's routing, summed over the MoE layers;
            None without them.
        routing: [N, L, K] int16, experts that were used; None for a model without experts of ours.
        routing_disagreement: [N] float32, fraction of the layers whose router differs from what was replayed; None
            without replay.
    """

    logprobs: Tensor
    entropy: Tensor
    router_loss: Tensor | None
    routing: Tensor | None = None
    routing_disagreement: Tensor | None = None


class Policy(nn.Module):
    """A causal language model over packed tokens.

    All parameters are used inside `forward`, so that accelerate may wrap this module (DDP and its like).

    Args:
        model: ours, one of `transformers`', or a PeftModel around it.
        chunk_tokens: tokens whose logits exist at one time.
        num_ids: ids that share the probability, from 0 on; default: all for which there is a logit.

    Raises:
        ConfigError: the logits are more than the product with the head's weight: adapted, or scaled.
    """

    def __init__(self, model: nn.Module, *, chunk_tokens: int = 512, num_ids: int | None = None) -> None:
        super().__init__()
        output_head(model)
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.num_ids = num_ids

    def in_use(self) -> AbstractContextManager[None]:
        """Within this context the model is the policy, as it is outside of a critic's."""
        return nullcontext()

    def forward(
        self, tokens: Tensor, segments: Segments, mask: Tensor,
        *, temperature: float = 1.0, entropy_grad: bool = False, routing: Tensor | None = None,
    ) -> PolicyOutput:
        """Log-prob and entropy of the masked tokens; the head sees their predecessors alone.

        Args:
            tokens: [N] ids.
            segments: how they divide into sequences.
            mask: [N] bool, tokens that are asked about; none may be the first of a sequence.
            temperature: > 0, of the distribution asked about.
            entropy_grad: whether the entropy carries a gradient.
            routing: [N, L, K] experts to replay, -1 where there is no record; for an in-house MoE.

        Raises:
            DataError: a masked token has no predecessor.
            ConfigError: the model cannot be computed with this layout, or has no experts to replay.
        """
        hidden, record = self.predicting_states(tokens, segments, mask, routing=routing)
        asked = mask.nonzero()[:, 0]
        weight, bias, softcap = output_head(self.model)
        logprobs, entropy = chunked_logprobs(
            hidden, weight[: self.num_ids], tokens[asked],
            bias=None if bias is None else bias[: self.num_ids], temperature=temperature, softcap=softcap,
            chunk_tokens=self.chunk_tokens, entropy_grad=entropy_grad,
        )
        return self._output(logprobs, entropy, mask, record)

    def predicting_states(
        self, tokens: Tensor, segments: Segments, mask: Tensor, *, routing: Tensor | None = None
    ) -> tuple[Tensor, RoutingRecord | None]:
        """The hidden states [M, D] that predict the masked tokens, and how their experts were chosen; see `forward`."""
        predecessors = segments.predecessors[mask.nonzero()[:, 0]]
        if bool((predecessors < 0).any()):
            raise DataError("the mask holds a sequence's first token, which nothing predicts; leave it out of the mask")
        record = self._routing_record(routing, mask)
        options = {} if record is None else {"routing": record}
        return hidden_states(self.model, tokens, segments.position_ids, segments, **options)[predecessors], record

    def _output(self, logprobs: Tensor, entropy: Tensor, mask: Tensor, record: RoutingRecord | None) -> PolicyOutput:
        """What is known of the masked tokens [M] at their places."""
        asked = mask.nonzero()[:, 0]
        zeros = logprobs.new_zeros(len(mask))
        router_loss = None if record is None else record.total_loss()
        return PolicyOutput(
            zeros.index_put((asked,), logprobs),
            zeros.index_put((asked,), entropy),
            None if router_loss is None else router_loss * mask,
            None if record is None else record.stacked_choices(),
            None if record is None else record.disagreement(),
        )

    def _routing_record(self, routing: Tensor | None, mask: Tensor) -> RoutingRecord | None:
        """A fresh record for a model with experts of ours; expert loads are counted on the masked tokens."""
        lm = causal_lm(self.model)
        if getattr(lm.config, "sparse_layers", None):
            return RoutingRecord(replay=routing, counted=mask)
        if routing is not None:
            raise ConfigError(
                f"expert choices were given for {type(lm).__name__}, which can replay none; give routing to an "
                "in-house MoE model only"
            )
        return None
