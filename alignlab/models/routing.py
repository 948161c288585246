"""Expert choices of one forward pass: recorded, replayed and counted, whatever the router.

Shapes: N tokens, E experts, K experts a token, L sparse layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignlab.models.routers import Router, RouterScores


@dataclass(eq=False)
class RoutingRecord:
    """Expert choices that go into a forward pass and come out of it. The L layers are the sparse ones, from 0 on.

    Attributes:
        replay: [N, L, K] int16, choices to use; -1 where a token has no record and makes its own. Their gates come from
            the live router, so that it keeps its gradient (R3, arXiv:2510.11370).
        counted: [N] bool, tokens whose choices are counted in training; None counts all.
        chosen: by layer, [N, K] int64, the choices made.
        differs: by layer, [N] bool, where the router would have chosen other experts than those replayed.
        losses: by layer, [N] float32, weighted router losses of each token, with gradient.
        counting: this pass trains, so its choices are added to the routers' counts; set by the decoder.

    Activation checkpointing runs a layer again within the same pass; the second run finds its choices here and repeats
    them.
    """

    replay: Tensor | None = None
    counted: Tensor | None = None
    chosen: dict[int, Tensor] = field(default_factory=dict)
    differs: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    counting: bool = False

    def begin(self, *, counting: bool) -> None:
        """Begin the forward pass; the decoder calls this once."""
        assert not self.chosen, "a RoutingRecord holds one forward pass; make a new one for each"
        self.counting = counting

    def choose(self, layer: int, router: Router, scores: RouterScores) -> Tensor:
        """Return a layer's choices [N, K], replayed or the router's own, and record them with the router's losses."""
        # A second run under activation checkpointing must build the same graph, so the losses come before its return.
        losses = router.losses(scores) if torch.is_grad_enabled() else None
        if layer in self.chosen:
            return self.chosen[layer]
        choices = router.choose(scores)
        if self.replay is not None:
            replayed = with_replay(choices, self.replay[:, layer])
            self.differs[layer] = (choices.sort(-1).values != replayed.sort(-1).values).any(-1)
            choices = replayed
        self.chosen[layer] = choices
        if losses is not None:
            self.losses[layer] = losses
        if self.counting:
            router.count(choices, self.counted)
        return choices

    def stacked_choices(self) -> Tensor:
        """Return all choices, [N, L, K] int16, on the model's device."""
        return torch.stack([self.chosen[layer] for layer in sorted(self.chosen)], dim=1).to(torch.int16)

    def disagreement(self) -> Tensor | None:
        """Return the fraction of layers whose router differs from the replayed choices, [N]; None without replay."""
        if not self.differs:
            return None
        return torch.stack([self.differs[layer] for layer in sorted(self.differs)]).float().mean(0)

    def total_loss(self) -> Tensor | None:
        """Return the router losses summed over the layers, [N]; None where the config weighs no router loss."""
        return torch.stack([self.losses[layer] for layer in sorted(self.losses)]).sum(0) if self.losses else None


def with_replay(choices: Tensor, record: Tensor) -> Tensor:
    """Return the recorded experts [N, K], and the router's own choices for tokens without a record (-1)."""
    return torch.where((record >= 0).all(dim=-1, keepdim=True), record.to(choices), choices)
