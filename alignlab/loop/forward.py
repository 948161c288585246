"""Forward passes of a pack through each kind of module that a learner trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alignlab.types import Experience

Forward = Callable[[nn.Module, Experience], Any]
"""(module, pack) -> output with at least a `router_loss` [N] or None. The module may be wrapped, as by DDP."""


@dataclass(frozen=True)
class PolicyForward:
    """Log-probs and entropies of a pack's masked tokens: `PolicyOutput`.

    Attributes:
        temperature: of the distribution that completions are sampled from, > 0.
        entropy_grad: whether the loss needs the gradient of the entropy.
    """

    temperature: float = 1.0
    entropy_grad: bool = False

    def __call__(self, module: nn.Module, pack: Experience) -> Any:
        """Return the policy's output for a pack."""
        return module(
            pack.tokens, pack.segments, pack.completion_mask, temperature=self.temperature,
            entropy_grad=self.entropy_grad, routing=pack.routing, kv_record=pack.kv_record,
        )


def critic_forward(module: nn.Module, pack: Experience) -> Any:
    """Return the values of a pack's masked tokens: `CriticOutput`."""
    return module(pack.tokens, pack.segments, pack.completion_mask, routing=pack.routing)


def reward_forward(module: nn.Module, pack: Experience) -> Any:
    """Return the rewards of a pack's sequences: `RewardOutput`."""
    return module(pack.tokens, pack.segments, pack.completion_mask)


def model_losses(output: Any, weights: Tensor) -> dict[str, Tensor]:
    """Return the weighted sums of the losses that a model adds of its own: of its routers, of multi-token prediction.

    Args:
        output: of a forward pass.
        weights: of tokens, [N].
    """
    of_tokens = {name: getattr(output, name, None) for name in ("router_loss", "mtp_loss")}
    return {name: (loss * weights).sum() for name, loss in of_tokens.items() if loss is not None}
