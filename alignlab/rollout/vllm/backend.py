"""The protocol between a rollout engine and vLLM, wherever vLLM runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from alignlab.rollout.vllm.completions import Answer, Request

if TYPE_CHECKING:
    from alignlab.rollout.vllm.policy_weights import PolicyWeights

_FIRST_ON_CPU, _FIRST_ON_GPU = 2, 10


def num_always_verified(*, on_gpu: bool) -> int:
    """Return the number of first updates that are all verified, whatever the settings.

    A reload bug of vLLM shows from the second load on. The tests run on a CPU: on a GPU other code computes the same.
    """
    return _FIRST_ON_GPU if on_gpu else _FIRST_ON_CPU


class MemberLost(Exception):
    """One of several vLLMs stopped answering; its requests go to the others."""


@dataclass(frozen=True)
class Transfer:
    """Size of what an update sent; zeros on a rank that does not send."""

    num_tensors: int = 0
    num_bytes: int = 0


class Member(Protocol):
    """One vLLM of a backend.

    Attributes:
        is_verified: a canary has passed since this vLLM joined.
    """

    is_verified: bool


class Backend(Protocol):
    """One or several vLLMs with a copy of the policy's weights. See `RolloutEngine` for `rest` and `abandon`."""

    @property
    def on_gpu(self) -> bool:
        """True if vLLM runs on a GPU; known once open."""
        ...

    @property
    def model_runner(self) -> int:
        """Number of the model runner that vLLM uses, 1 or 2; known once open."""
        ...

    @property
    def adapter_only(self) -> bool:
        """True if updates bring the adapter alone, False if all weights; known once open, and equal on all ranks."""
        ...

    @property
    def first_rank_sends(self) -> bool:
        """True if the ranks share vLLM, which the first one gives weights to; False if each rank has its own."""
        ...

    def open(self) -> None:
        """Start vLLM, or reach its servers; called before anything else, and again after `close`.

        Raises:
            ConfigError: vLLM cannot run this model, or no server does. Nothing stays open then.
        """
        ...

    def put_weights(self, weights: PolicyWeights, policy_version: int, attempt: int) -> Transfer:
        """Replace vLLM's weights by the policy's, and drop what vLLM cached under the old ones.

        Where the first rank sends for all, the others call this afterwards, and only note what was sent.

        Args:
            weights: the policy's present weights.
            policy_version: recorded with every token sampled from now on.
            attempt: counts the calls, from 1; equal on all ranks.

        Raises:
            RolloutError: a tensor did not arrive with the digest that it was sent with, or no server took the weights.
            ConfigError: another run is using a server.
        """
        ...

    def members(self) -> Sequence[Member]:
        """Return the vLLMs whose log-probs this rank has to verify; where ranks share vLLM, none on ranks but the
        first."""
        ...

    def agreed(self) -> AbstractContextManager[None]:
        """Return a context in which requests for `answers` are prepared.

        Raises:
            RolloutError: at its end, where ranks share a vLLM: the body raised on another of them.
        """
        ...

    def answers(self, requests: Sequence[Request], member: Any = None) -> list[Answer]:
        """Return one completion for each request, in order.

        Ranks that share a vLLM call this together, also those without requests.

        Args:
            member: one of `members`, that alone may answer; default: any.

        Raises:
            RolloutError: a request is refused, no vLLM is left to answer it, or `abandon` was called meanwhile.
            MemberLost: `member` stopped answering.
        """
        ...

    def rest(self) -> None:
        """Free memory that is not needed until the next call."""
        ...

    def abandon(self) -> None:
        """Make every `answers` in flight raise soon; may be called from any thread."""
        ...

    def close(self) -> None:
        """Release processes, connections and memory; servers may then serve another run."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return figures of the work since `open`, by name."""
        ...
