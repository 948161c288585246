"""The critic: how much reward is to come, of the state in which each token was chosen.

On a policy that is an adapter, the critic is another adapter on the same frozen base, or reads the base as it is: PPO
then holds one copy of the weights for policy, reference and critic.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear

from alignlab.config.trainers import CriticSettings
from alignlab.errors import ConfigError
from alignlab.models.adapters import adapters_disabled, add_role, in_role
from alignlab.models.attention import causal_lm, hidden_states
from alignlab.models.moe import RoutingRecord, routers
from alignlab.types import Segments

ROLE = "critic"


class CriticOutput(NamedTuple):
    """Attributes:
    values: [N] float32, of the state in which each masked token was chosen; 0 elsewhere.
    router_loss: none: routers are the policy's.
    """

    values: Tensor
    router_loss: None = None


class Critic(nn.Module):
    """A value head, float32, on the hidden states of a decoder.

    It starts at 0, so that the first advantages are the rewards themselves.

    Args:
        model: the policy's model, on which the role lives; or a model of the critic's own.
        form: see `CriticSettings`.
    """

    def __init__(self, model: nn.Module, form: str) -> None:
        super().__init__()
        self.model = model
        self.form = form
        config = causal_lm(model).config.get_text_config()
        device = next(model.parameters()).device
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, device=device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def in_use(self) -> AbstractContextManager[None]:
        """Within this context the model is the critic's, for forward and backward passes alike."""
        if self.form == "model":
            return nullcontext()
        assert isinstance(self.model, PeftModel)
        return in_role(self.model, ROLE) if self.form == "lora" else _frozen(self.model)

    def forward(
        self, tokens: Tensor, segments: Segments, mask: Tensor, *, routing: Tensor | None = None
    ) -> CriticOutput:
        """Values of the states in which the masked tokens [N] were chosen; to be called in `in_use`.

        Args:
            routing: [N, L, K] experts to replay, see `Policy`.
        """
        asked = mask.nonzero()[:, 0]
        # Routers count what the policy chooses in training, and nothing of this.
        record = RoutingRecord(replay=routing, counted=torch.zeros_like(mask)) if routers(self.model) else None
        options = {} if record is None else {"routing": record}
        hidden = hidden_states(self.model, tokens, segments.position_ids, segments, **options)
        values = linear(hidden[segments.predecessors[asked]].float(), self.weight, self.bias)[:, 0]
        return CriticOutput(values.new_zeros(len(tokens)).index_put((asked,), values))


def make_critic(model: nn.Module, settings: CriticSettings) -> Critic:
    """The critic of a policy's model, which gets another role or is copied.

    Raises:
        ConfigError: it is to share the policy's base, and the policy has none that is frozen.
    """
    if settings.form == "model":
        own = copy.deepcopy(model)
        head = causal_lm(own).get_output_embeddings()
        if not causal_lm(own).config.get_text_config().tie_word_embeddings:
            head.requires_grad_(False)  # no logits are made
        return Critic(own, "model")
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"trainer.critic.form is {settings.form}, which shares the frozen base of an adapter, and the policy "
            "trains all its weights; use critic.form: model, or give model.lora"
        )
    if settings.form == "lora":
        if ROLE in model.peft_config:
            model.delete_adapter(ROLE)  # an earlier trainer's
        add_role(model, ROLE, rank=settings.rank, alpha=settings.alpha)
    return Critic(model, settings.form)


@contextmanager
def _frozen(model: PeftModel) -> Iterator[None]:
    """The base as it is, no weight of it in training."""
    with adapters_disabled(model):
        for parameter in model.parameters():
            parameter.requires_grad = False
        yield
