"""The protocol of routers, and what they may know of the tokens.

Shapes: N tokens, H hidden size, E experts, K experts a token, D groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from alignlab.types import Segments


class RouterScores(NamedTuple):
    """Tokens against experts.

    Attributes:
        logits: [N, E] float32, with noise where the router adds it.
        scores: [N, E] float32, the logits' softmax, sigmoid or square root of softplus.
        clean_logits: [N, E] float32, the logits without noise; None of a router that has none.
        noise_std: [N, E] float32, standard deviation of the noise; None likewise.
        baseline: [N] float32, the loss that the router expects; None of a router that does not learn from it.
    """

    logits: Tensor
    scores: Tensor
    clean_logits: Tensor | None = None
    noise_std: Tensor | None = None
    baseline: Tensor | None = None


@dataclass(frozen=True)
class RoutedTokens:
    """The N tokens of a forward pass, beside their hidden states.

    Attributes:
        ids: [N] int64; None where the pass has embeddings alone.
        segments: how packed tokens divide into sequences; None for an ordinary batch, or the engine's.
        num_rows: sequences of equal length that the tokens are, where there are no segments.
        counted: [N] bool, tokens whose choices count in training; None counts all.
        recorded: [N] bool, tokens whose choices are replayed; None where no pass was recorded.
        trains: whether this pass trains, so that a router may choose otherwise than it does when it serves.
    """

    ids: Tensor | None = None
    segments: Segments | None = None
    num_rows: int = 1
    counted: Tensor | None = None
    recorded: Tensor | None = None
    trains: bool = False


NOTHING_KNOWN = RoutedTokens()


@runtime_checkable
class StartsAtZero(Protocol):
    """A module with matrices that are zero before training, so that their zeros say nothing of pruning.

    Attributes:
        starts_at_zero: names of these parameters.
    """

    starts_at_zero: tuple[str, ...]


@runtime_checkable
class Router(Protocol):
    """Chooses the experts of tokens. It is a module: `__call__` scores, so that hooks on modules see it."""

    def __call__(self, hidden: Tensor, tokens: RoutedTokens) -> RouterScores:
        """Return the scores of hidden states [N, H]."""
        ...

    def choose(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        """Return the choices of each token, [N, K] int64 as in `coded`, without a gradient."""
        ...

    def gates(self, scores: RouterScores, choices: Tensor) -> Tensor:
        """Return the weight of each chosen expert, [N, K] float32; 0 for a dropped one.

        Args:
            choices: [N, K], of `choose` or of a record that is replayed; the gates are live in both cases.
        """
        ...

    def losses(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor | None:
        """Return the weighted router losses of each token, [N]; None where the config weighs none."""
        ...

    def count(self, choices: Tensor, counted: Tensor | None = None) -> None:
        """Add choices [N, K] to those of this optimizer step.

        Args:
            counted: [N] bool, tokens whose choices count; None counts all.
        """
        ...

    def counts(self) -> Tensor:
        """Return how often each expert was chosen in this optimizer step, [E] int64.

        A router that weighs communication appends how many tokens had an expert in each group: [E + D].
        """
        ...

    def forget_counts(self) -> None:
        """Set the counts to zero."""
        ...

    def take_load(self, counts: Tensor) -> None:
        """Take the use of experts for the next step's balance loss from `counts` of all ranks, if any is above 0."""
        ...

    def move_bias(self, counts: Tensor) -> None:
        """Move the balancing bias, if there is one, towards equal use, by `counts` of all ranks."""
        ...


class RoutingPolicy(NamedTuple):
    """The numbers by which REINFORCE trains a router.

    Attributes:
        logprobs: [N] float32, log-probability of the experts chosen for each token.
        baselines: [N] float32, the loss that the router expects.
    """

    logprobs: Tensor
    baselines: Tensor


@runtime_checkable
class PolicyRouter(Router, Protocol):
    """A router whose choices are the actions of a policy, learnt from the losses that follow them."""

    def policy(self, scores: RouterScores, choices: Tensor) -> RoutingPolicy:
        """Return the log-probability of choices [N, K], and the baseline."""
        ...
