"""The reference: the policy as it was when the run began, to which KL and preference margins are measured."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from alignlab.data.packing import pack_groups
from alignlab.data.preferences import CompletionGroup
from alignlab.loop.learner import Learner
from alignlab.models.adapter_rules import check_base_is_reference
from alignlab.models.adapters import adapters_disabled, has_adapters
from alignlab.models.empty import is_empty
from alignlab.models.fingerprints import weights_fingerprint
from alignlab.models.host_weights import HostWeights
from alignlab.models.policy import Policy
from alignlab.models.shards import is_spread, shard_root, sharded_copy, whole_copy
from alignlab.models.weight_view import whole_parameters
from alignlab.runs.reference_cache import ReferenceCache
from alignlab.types import Experience, Rollout

logger = logging.getLogger(__name__)
NAME = "the reference"
_COMPUTED_TOGETHER = 512


class Reference:
    """Log-probs under the reference: a frozen copy of the policy or, for an adapter, the base with the adapter off.

    Args:
        learner: of the policy.

    Attributes:
        policy: the frozen copy, in the dtype of the policy; None for an adapter. Its weights are on the device only
            within `with_logprobs` where they rest on the host.
        fingerprints: of the copy's weights, by name; empty for an adapter.

    Raises:
        ConfigError: the adapter was made by changing the base.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.policy = frozen_copy(learner.module)
        self._on_host = _on_host(self.policy, learner)
        copied = {} if self.policy is None else {"reference": weights_fingerprint(whole_parameters(self.policy))}
        self.fingerprints: dict[str, str] = copied

    def with_logprobs(self, packs: Sequence[Experience]) -> list[Experience]:
        """Return the packs with the reference's log-probs of their masked tokens.

        Raises:
            NumericsError: one is not finite.
        """
        # The reference chooses its own experts and rounds its own keys: a record is of the policy's.
        free = [replace(pack, routing=None, kv_record=None) for pack in packs]
        if self.policy is not None:
            with nullcontext() if self._on_host is None else self._on_host.in_use():
                logprobs = self.learner.logprobs(free, self.policy, frozen_as=NAME)
        else:
            with adapters_disabled(self.learner.module.model):
                logprobs = self.learner.logprobs(free, frozen_as=NAME)
        return [replace(pack, ref_logprobs=values) for pack, values in zip(packs, logprobs, strict=True)]


def _on_host(copied: Policy | None, learner: Learner) -> HostWeights | None:
    """Return the weights of a copy, moved to the host if the config says so; None if they stay where they are."""
    if not learner.config.memory.reference_on_host:
        return None
    obstacles = {
        "the adapter's reference is its base": copied is None,
        "the copy is spread over the ranks": learner.is_spread,
        "this machine has no GPU": learner.device.type != "cuda",
    }
    reason = next((text for text, is_so in obstacles.items() if is_so), None)
    if copied is None or reason is not None:
        logger.warning("trainer.memory.reference_on_host: no effect: %s", reason)
        return None
    copied.rests_on_host = True
    return None if is_empty(copied) else HostWeights(copied, learner.device)


def frozen_copy(policy: Policy) -> Policy | None:
    """Return a frozen copy of a policy; None for an adapter, whose reference is its base.

    Raises:
        ConfigError: the adapter was made by changing the base.
    """
    if not has_adapters(policy.model):
        copied = Policy(
            _copied(policy.model), chunk_tokens=policy.chunk_tokens, num_ids=policy.num_ids,
            kv_approximation=policy.kv_approximation,
        ).eval()
        copied.follows_policy = True
        return copied
    check_base_is_reference(policy.model)
    if any("lora_B" in name and _is_trained(weight) for name, weight in policy.named_parameters()):
        logger.warning(
            "the adapter is not a new one: the reference is the base without it, and not the policy that the "
            "training starts from; to change that, merge the adapter (alignlab merge) and train from the result"
        )
    return None


def _copied(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a model, spread over ranks where the model is."""
    if shard_root(model) is None:
        return copy.deepcopy(model).requires_grad_(False)
    return sharded_copy(model) if is_spread(model) else whole_copy(model)


def _is_trained(weight: Tensor) -> bool:
    """Return whether a matrix that begins at 0 has moved; an empty model's is not known."""
    return not weight.is_meta and bool(weight.any())


class ExampleReference:
    """Log-probs of the reference on fixed examples: computed batch by batch, or once for all and kept on disk.

    Args:
        learner: of the policy.
        budget: tokens of a pack.
    """

    def __init__(self, learner: Learner, *, budget: int) -> None:
        self._learner, self._budget = learner, budget
        self._reference: Reference | None = Reference(learner)
        self.fingerprints = self._reference.fingerprints
        self._computed: dict[str, list[tuple[float, ...]]] = {}

    @property
    def modules(self) -> list[nn.Module]:
        """The copy of the policy, while there is one."""
        copied = None if self._reference is None else self._reference.policy
        return [] if copied is None else [copied]

    def precompute(self, data: Mapping[str, Sequence[CompletionGroup]]) -> None:
        """Compute the log-probs of all examples by name, or read what an earlier run has computed.

        A copy of the policy is dropped then.
        """
        if self._reference is None:
            return
        cache = ReferenceCache((self._reference.policy or self._learner.module).model)
        get_or_make = partial(cache.get_or_make, make=self._compute)
        if self._learner.is_spread:
            get_or_make = partial(
                cache.get_or_make_together, make=self._compute, any_rank=self._learner.ranks.any,
                writes=self._learner.ranks.is_main,
            )
        computed = {name: get_or_make(examples) for name, examples in data.items() if examples}
        self._computed, self._reference = computed, None  # all or nothing: it may have been interrupted

    def packs(
        self, name: str, examples: Sequence[CompletionGroup], rows: Sequence[int], subset: slice = slice(None),
        share: Callable[[Sequence[Experience]], Sequence[Experience]] = list,
    ) -> list[Experience]:
        """Return the packs of some examples of a name with the reference's log-probs; no example is divided.

        Args:
            subset: of each example's completions.
            share: takes those of the packs that are returned; default: all.
        """
        groups = [examples[row].as_group() for row in rows]
        chosen = [replace(group, completions=group.completions[subset]) for group in groups]
        packs = share(pack_groups(chosen, budget=self._budget))
        if self._reference is not None:
            return self._with_logprobs(packs)
        logprobs = [
            of_completion
            for row, group in zip(rows, groups, strict=True)
            for of_completion in _of_completions(self._computed[name][row], group)[subset]
        ]
        return [replace(pack, rollout_logprobs=None, ref_logprobs=_on_tokens(logprobs, pack)) for pack in packs]

    def _compute(self, examples: Sequence[CompletionGroup]) -> list[tuple[float, ...]]:
        """Return the log-probs of all completions, end to end, of each example."""
        logprobs: list[tuple[float, ...]] = []
        for start in range(0, len(examples), _COMPUTED_TOGETHER):
            groups = [example.as_group() for example in examples[start : start + _COMPUTED_TOGETHER]]
            of_groups: list[tuple[float, ...]] = [()] * len(groups)
            for pack in self._with_logprobs(pack_groups(groups, budget=self._budget)):
                assert pack.ref_logprobs is not None
                segments = pack.segments
                of_segments = pack.ref_logprobs.cpu().split(segments.lengths)
                for values, sequence, group in zip(
                    of_segments, segments.sequence_ids, segments.group_ids, strict=True
                ):
                    if sequence >= 0:  # the completions of a group are in their order
                        of_groups[group] += tuple(values.tolist())
            logprobs += of_groups
        return logprobs

    def _with_logprobs(self, packs: Sequence[Experience]) -> list[Experience]:
        assert self._reference is not None
        return self._reference.with_logprobs(
            [replace(pack, rollout_logprobs=None).to(self._learner.device) for pack in packs]
        )


def _of_completions(values: tuple[float, ...], group: Rollout) -> list[tuple[float, ...]]:
    """Divide the log-probs of a group, end to end, among its completions."""
    remaining = iter(values)
    return [tuple(itertools.islice(remaining, len(completion.token_ids))) for completion in group.completions]


def _on_tokens(values: Sequence[tuple[float, ...]], pack: Experience) -> Tensor:
    """Return the values of each sequence of the step on the tokens [N] of a pack; 0 on prompts."""
    of_segments = [
        values[sequence] if sequence >= 0 else (0.0,) * length
        for sequence, length in zip(pack.segments.sequence_ids, pack.segments.lengths, strict=True)
    ]
    return torch.tensor(list(itertools.chain.from_iterable(of_segments)))
