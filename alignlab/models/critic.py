"""The critic: the expected reward from the state in which each token was chosen.

If the policy is an adapter, the critic can be another adapter on the same frozen base, or a head on the base itself:
PPO then holds one copy of the weights for policy, reference and critic.
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
from alignlab.models.decoder import causal_lm
from alignlab.models.policy import PackedModel, at_masked
from alignlab.types import Segments

ROLE = "critic"


class CriticOutput(NamedTuple):
    """Values of N tokens.

    Attributes:
        values: [N] float32, of the state in which each masked token was chosen; 0 elsewhere.
        router_loss: None, because only the policy trains routers.
    """

    values: Tensor
    router_loss: None = None


class Critic(PackedModel):
    """A value head, float32, on the hidden states of a decoder.

    It starts at 0, so that the first advantages are the rewards themselves.

    Args:
        model: the policy's model, on which the role lives; or a model of the critic's own.
        form: see `CriticSettings`.
    """

    def __init__(self, model: nn.Module, form: str) -> None:
        super().__init__(model)
        self.form = form
        config = causal_lm(model).config.get_text_config()
        device = next(model.parameters()).device
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, device=device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def in_use(self) -> AbstractContextManager[None]:
        """Return a context in which the model is the critic's; see `PackedModel.in_use`."""
        if self.form == "model":
            return nullcontext()
        assert isinstance(self.model, PeftModel)
        return in_role(self.model, ROLE) if self.form == "lora" else _frozen(self.model)

    def forward(
        self, tokens: Tensor, segments: Segments, mask: Tensor, *, routing: Tensor | None = None
    ) -> CriticOutput:
        """Return values of the states in which the masked tokens [N] were chosen; to be called in `in_use`.

        Args:
            tokens, segments, mask, routing: see `Policy.forward`.
        """
        nothing = torch.zeros_like(mask)  # routers count what the policy chooses in training
        hidden, _ = self.predicting_states(tokens, segments, mask, routing=routing, counted=nothing)
        return CriticOutput(at_masked(linear(hidden.float(), self.weight, self.bias)[:, 0], segments, mask))


def make_critic(model: nn.Module, settings: CriticSettings) -> Critic:
    """Make a critic: another adapter on the policy's base, the base itself, or a copy of the model.

    Args:
        model: the policy's.

    Raises:
        ConfigError: the critic is to share the policy's frozen base, and the policy trains all its weights.
    """
    if settings.form == "model":
        twin = copy.deepcopy(model)
        head = causal_lm(twin).get_output_embeddings()
        if not causal_lm(twin).config.get_text_config().tie_word_embeddings:
            head.requires_grad_(False)  # a critic makes no logits
        return Critic(twin, "model")
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"trainer.critic.form is {settings.form}, which shares the frozen base of an adapter, and the policy "
            "trains all its weights; use critic.form: model, or give model.lora"
        )
    if settings.form == "lora":
        if ROLE in model.peft_config:
            model.delete_adapter(ROLE)  # of an earlier trainer
        add_role(model, ROLE, rank=settings.rank, alpha=settings.alpha)
    return Critic(model, settings.form)


@contextmanager
def _frozen(model: PeftModel) -> Iterator[None]:
    """Make the model its frozen base, with no weight in training, within this context."""
    with adapters_disabled(model):
        for parameter in model.parameters():
            parameter.requires_grad = False
        yield
