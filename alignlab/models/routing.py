"""Expert choices of one forward pass: recorded, replayed and counted, whatever the router.

Shapes: N tokens, E experts, K experts a token, L sparse layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.models.routers.coded import experts_of
from alignlab.models.routers.protocol import (
    NOTHING_KNOWN,
    PolicyRouter,
    RoutedTokens,
    Router,
    RouterScores,
    RoutingPolicy,
)
from alignlab.types import Segments

NONE = -(2**15)
"""In a record, where a layer chooses fewer than another; no expert, and not the -1 of a token without a record."""


@dataclass(eq=False)
class RoutingRecord:
    """Expert choices that go into a forward pass and come out of it. The L layers are the sparse ones, from 0 on.

    Attributes:
        replay: [N, L, K] int16, choices to use, dropped ones too (see `routers.coded`); -1 where a token has no record
            and makes its own. Their gates come from the live router, so that it keeps its gradient (R3,
            arXiv:2510.11370).
        counted: [N] bool, tokens whose choices are counted in training; None counts all.
        tokens: what the pass says of its tokens; set by the decoder.
        chosen: by layer, [N, K] int64, the choices made.
        differs: by layer, [N] bool, where the router would have chosen other experts than those replayed.
        losses: by layer, [N] float32, weighted router losses of each token, with gradient.
        policies: by layer, what REINFORCE needs of the choices; of routers that learn so, in training alone.
        counting: this pass trains, so its choices are added to the routers' counts; set by the decoder.

    Activation checkpointing runs a layer again within the same pass; the second run finds its choices here and repeats
    them.
    """

    replay: Tensor | None = None
    counted: Tensor | None = None
    tokens: RoutedTokens = NOTHING_KNOWN
    chosen: dict[int, Tensor] = field(default_factory=dict)
    differs: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    policies: dict[int, RoutingPolicy] = field(default_factory=dict)
    counting: bool = False

    def begin(self, *, counting: bool, ids: Tensor | None = None, segments: Segments | None = None) -> None:
        """Begin the forward pass; the decoder calls this once.

        Args:
            counting: whether the pass trains.
            ids: [B, N] of the tokens, if the pass has them.
            segments: of packed tokens.
        """
        assert not self.chosen, "a RoutingRecord holds one forward pass; make a new one for each"
        self.counting = counting
        self.tokens = RoutedTokens(
            ids=None if ids is None else ids.flatten(), segments=segments, num_rows=1 if ids is None else len(ids),
            counted=self.counted, recorded=None if self.replay is None else is_recorded(self.replay.flatten(1)),
            trains=counting,
        )

    def choose(self, layer: int, router: Router, scores: RouterScores) -> Tensor:
        """Return a layer's choices [N, K], replayed or the router's own, and record them with the router's losses."""
        # A second run under activation checkpointing must build the same graph, so the losses come before its return.
        losses = router.losses(scores, self.tokens) if torch.is_grad_enabled() else None
        is_second_run = layer in self.chosen
        choices = self.chosen[layer] if is_second_run else self._first_choices(layer, router, scores)
        policy = router.policy(scores, choices) if self.counting and isinstance(router, PolicyRouter) else None
        if is_second_run:
            return choices
        self.chosen[layer] = choices
        if losses is not None:
            self.losses[layer] = losses
        if policy is not None:
            self.policies[layer] = policy
        if self.counting:
            router.count(choices, self.counted)
        return choices

    def _first_choices(self, layer: int, router: Router, scores: RouterScores) -> Tensor:
        """Return a layer's choices [N, K], replayed or the router's own."""
        choices = router.choose(scores, self.tokens)
        if self.replay is None:
            return choices
        replayed = with_replay(choices, self.replay[:, layer, : choices.shape[1]])
        own, used = (experts_of(of_tokens).sort(-1).values for of_tokens in (choices, replayed))
        self.differs[layer] = (own != used).any(-1)
        return replayed

    def stacked_choices(self) -> Tensor:
        """Return all choices, [N, L, K] int16, on the model's device; layers of fewer are filled up with `NONE`."""
        most = max(choices.shape[1] for choices in self.chosen.values())
        filled = [
            F.pad(self.chosen[layer], (0, most - self.chosen[layer].shape[1]), value=NONE)
            for layer in sorted(self.chosen)
        ]
        return torch.stack(filled, dim=1).to(torch.int16)

    def disagreement(self) -> Tensor | None:
        """Return the fraction of layers whose router differs from the replayed choices, [N]; None without replay."""
        if not self.differs:
            return None
        return torch.stack([self.differs[layer] for layer in sorted(self.differs)]).float().mean(0)

    def total_loss(self) -> Tensor | None:
        """Return the router losses summed over the layers, [N]; None where the config weighs no router loss."""
        return torch.stack([self.losses[layer] for layer in sorted(self.losses)]).sum(0) if self.losses else None

    def policy(self) -> RoutingPolicy | None:
        """Return what REINFORCE needs of every layer, [N, L]; None without routers that learn so, or in evaluation."""
        if not self.policies:
            return None
        by_layer = [self.policies[layer] for layer in sorted(self.policies)]
        return RoutingPolicy(*(torch.stack(parts, dim=1) for parts in zip(*by_layer, strict=True)))


def is_recorded(record: Tensor) -> Tensor:
    """Return which tokens have a record [..., K], in which -1 stands for none: [...] bool."""
    return (record != -1).all(dim=-1)


def with_replay(choices: Tensor, record: Tensor) -> Tensor:
    """Return the recorded choices [N, K], dropped ones too, and the router's own for tokens without a record (-1)."""
    return torch.where(is_recorded(record)[:, None], record.to(choices), choices)
