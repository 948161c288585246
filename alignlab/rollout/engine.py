"""The embedded rollout engine: generates from the policy's own weights, in its own process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import RolloutSettings
from alignlab.cpu_threads import follow_free_cores
from alignlab.errors import RolloutError
from alignlab.models.attention import causal_lm, require_paging
from alignlab.rollout.block_manager import BlockManager
from alignlab.rollout.detokenizer import Detokenizer, decode
from alignlab.rollout.requests import check_prompts, completion_keys, end_token_ids, for_each
from alignlab.rollout.runner import Runner
from alignlab.rollout.sampling import Sampled, SamplingTable, sample
from alignlab.rollout.scheduler import Scheduler
from alignlab.rollout.sequence import Request, TokenSequence
from alignlab.rollout.weights import EngineWeights, changed_weights
from alignlab.types import Completion, Prompt, Rollout, SamplingParams

Progress = Callable[[int, int], None]
"""Called after each step with the tokens sampled and the sequences finished so far."""


class EmbeddedEngine:
    """Paged, continuously batched generation; see `scheduler` and `paged_attention` for how.

    Args:
        model: a causal language model whose attention is "alignlab", with or without LoRA.
        tokenizer: decodes completions; its end token ends them.
        settings: sizes; the meaning of each is `RolloutSettings`'s.
        policy_version: of the weights as they are now.
        share_prefixes: compute what sequences have in common once.

    Raises:
        ConfigError: the model's attention is another, or an adapter cannot be merged.

    Attributes:
        num_preempted: sequences that had to give their blocks up, since the engine was made.
        num_computed: tokens that went through the model, since the engine was made.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: RolloutSettings,
        *, policy_version: int = 0, share_prefixes: bool = True,
    ) -> None:
        self.policy_version = policy_version
        self.num_preempted = 0
        self.num_computed = 0
        self._tokenizer = tokenizer
        self._settings = settings
        self._share = share_prefixes
        self._lm = causal_lm(model)
        require_paging(model)
        self._weights = EngineWeights(model, merge=settings.merge_lora, pack=settings.pack_weights)
        self._runner = Runner(model, self._weights, settings.block_size)
        self._blocks = BlockManager(0, settings.block_size)
        self._table: tuple[list[TokenSequence], SamplingTable] | None = None
        self._busy = False

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams],
        *, on_step: Progress | None = None,
    ) -> list[Rollout]:
        """`sampling.n` completions of each prompt, in the order of `prompts`.

        Args:
            sampling: for all prompts, or one for each.
            on_step: told the progress after each step.

        Raises:
            RolloutError: a prompt leaves no room for a completion, a parameter is out of range, or the model's
                logits are not finite.
        """
        each = for_each(prompts, sampling)
        sequences = self._prepare(prompts, each)
        routing: dict[TokenSequence, Tensor | None] = {}
        with self._running(sequences) as scheduler, self._weights.in_use():
            tokens = 0
            while scheduler.has_work:
                tokens += self._step(scheduler, routing)
                if on_step is not None:
                    on_step(tokens, len(routing))
        completions = iter([self._completion(sequence, routing[sequence]) for sequence in sequences])
        return [
            Rollout(prompt, tuple(next(completions) for _ in range(params.n)))
            for prompt, params in zip(prompts, each, strict=True)
        ]

    def stream(self, prompt: Prompt, sampling: SamplingParams) -> Iterator[str]:
        """The text of one completion, piece by piece as it is certain; the pieces joined are the completion's text.

        Raises:
            RolloutError: as `generate`, or `sampling.n` is not 1.
        """
        if sampling.n != 1:
            raise RolloutError(f"sampling.n is {sampling.n}, and must be 1 to stream one completion; use generate")
        sequences = self._prepare([prompt], for_each([prompt], sampling))
        return self._stream(sequences[0])

    def update_weights(self, policy_version: int) -> None:
        """Take over the policy's present weights under a new version; drops what was cached under the old one.

        Raises:
            RolloutError: the version does not advance.
        """
        self._require_idle()
        if policy_version <= self.policy_version:
            raise RolloutError(
                f"policy_version is {policy_version}, and must be over the present one ({self.policy_version}), "
                "because what is cached and recorded is told apart by it; count versions up"
            )
        self._weights.refresh()
        self._blocks.forget_all()
        self.policy_version = policy_version

    def metrics(self) -> dict[str, float]:
        """Sequences that had to give their blocks up, so far."""
        return {"engine/preempted": float(self.num_preempted)}

    def release(self) -> None:
        """Give the cache's memory back; the next call allocates it again."""
        self._require_idle()
        self._blocks = BlockManager(0, self._settings.block_size)
        self._runner.cache.release()

    def _prepare(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> list[TokenSequence]:
        """Check that all fits, make the cache large enough, and return the sequences in order."""
        self._require_idle()
        if self._weights.is_stale:
            raise changed_weights(self.policy_version)
        longest = getattr(self._lm.config.get_text_config(), "max_position_embeddings", None)
        shorten = "shorten the prompt or lower max_new_tokens"
        check_prompts(
            prompts, sampling, self._lm.config.get_text_config().vocab_size,
            [
                (longest, "the model's max_position_embeddings", shorten),
                (self._settings.cache_tokens, "rollout.cache_tokens", f"raise cache_tokens, {shorten}"),
            ],
        )
        sequences: list[TokenSequence] = []
        for prompt, params, keys in zip(prompts, sampling, completion_keys(prompts, sampling), strict=True):
            request = Request(prompt, params, end_token_ids(self._lm, self._tokenizer, params))
            sequences += [
                TokenSequence(
                    request, key, list(prompt.token_ids),
                    detokenizer=Detokenizer(self._tokenizer, self._ends) if params.stop else None,
                )
                for key in keys
            ]
        self._reserve(prompts, sampling)
        return sequences

    def _reserve(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> None:
        """Have cache blocks for as much of the batch as runs together, within the limit."""
        size, running = self._settings.block_size, self._settings.max_running
        own, shared, least = [], [], 0
        for prompt, params in zip(prompts, sampling, strict=True):
            common = len(prompt.token_ids) // size if self._share else 0
            total = self._blocks.blocks_for(len(prompt.token_ids) + params.max_new_tokens)
            own += [total - common] * params.n
            shared.append(common)
            least = max(least, total)
        wanted = sum(sorted(own)[-running:]) + sum(sorted(shared)[-running:])
        limit = self._block_limit()
        if least > limit:
            raise RolloutError(
                f"the longest sequence needs {least * size} tokens of cache, and half of the free memory holds "
                f"{limit * size}; lower max_new_tokens or free memory"
            )
        num_blocks = max(min(wanted, limit), self._blocks.num_blocks)
        self._runner.cache.grow(num_blocks)  # first: it may run out of memory
        self._blocks.grow(num_blocks)

    def _block_limit(self) -> int:
        """Blocks that the settings, or half of the free memory, allow."""
        if self._settings.cache_tokens is not None:
            return self._blocks.blocks_for(self._settings.cache_tokens)
        device = self._runner.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        return self._blocks.num_blocks + free // 2 // self._runner.block_bytes

    @contextmanager
    def _running(self, sequences: Sequence[TokenSequence]) -> Iterator[Scheduler]:
        """A scheduler with the sequences; whatever interrupts it, the engine is idle and whole afterwards."""
        self._require_idle()
        root = str(self.policy_version).encode() if self._share else None
        scheduler = Scheduler(
            self._blocks, root=root, max_running=self._settings.max_running,
            prefill_tokens=self._settings.prefill_tokens,
        )
        scheduler.add(sequences)
        self._busy = True
        try:
            yield scheduler
        except BaseException:  # Ctrl-C may leave any count half done
            self._blocks.reset()
            raise
        finally:
            self.num_preempted += scheduler.num_preempted
            self._table = None
            self._busy = False

    def _require_idle(self) -> None:
        if self._busy:
            raise RolloutError(
                "the engine is generating already, and does one call at a time; read the stream to its end or close it"
            )

    @torch.inference_mode()
    def _step(self, scheduler: Scheduler, routing: dict[TokenSequence, Tensor | None]) -> int:
        """Compute one step and take its tokens; returns how many. Finished sequences go into `routing`."""
        if self._runner.device.type == "cpu":
            follow_free_cores()
        step = scheduler.schedule()
        samples = scheduler.commit(step)
        logits = self._runner.logits(step, [index for _, index in samples])
        self.num_computed += sum(work.count for work in step.work)
        if not samples:
            return 0
        sequences = [sequence for sequence, _ in samples]
        self._take(sequences, self._sample(logits, sequences))
        for sequence in sequences:
            if sequence.finish_reason is not None:
                routing[sequence] = self._runner.routing(sequence)
                scheduler.finish(sequence)
        return len(samples)

    def _sample(self, logits: Tensor, sequences: list[TokenSequence]) -> Sampled:
        """The next token of each sequence."""
        device = logits.device
        if self._table is None or self._table[0] != sequences:
            params, keys = [s.request.sampling for s in sequences], [s.key for s in sequences]
            table = SamplingTable.build(params, keys, vocab_size=logits.shape[1], device=device)
            self._table = (sequences, table)
        return sample(
            logits, self._table[1], torch.tensor([s.num_sampled for s in sequences], device=device),
            seen=_pairs([s.penalised_ids for s in sequences], device),
            banned=_pairs([s.banned_ids for s in sequences], device),
        )

    def _take(self, sequences: list[TokenSequence], sampled: Sampled) -> None:
        """Bring the sampled tokens to the host, all in one transfer, and append them."""
        packed = torch.stack([sampled.tokens.double(), sampled.logprobs.double(), sampled.raw_logprobs.double()])
        for sequence, token, logprob, raw_logprob in zip(sequences, *packed.tolist(), strict=True):
            if raw_logprob != raw_logprob:
                raise RolloutError(
                    "the model's logits must be finite, and after "
                    f"{len(sequence.token_ids)} tokens they are not; check the weights, or use float32"
                )
            sequence.append(int(token), logprob, raw_logprob, self.policy_version)

    @property
    def _ends(self) -> frozenset[int]:
        """The tokens that end the model's completions."""
        return end_token_ids(self._lm, self._tokenizer, SamplingParams())

    def _completion(self, sequence: TokenSequence, routing: Tensor | None) -> Completion:
        # Offsets into the text as it came are offsets into that text alone: some tokenizers decode the whole otherwise.
        came = sequence.detokenizer
        text = decode(self._tokenizer, sequence.sampled_ids, self._ends) if came is None else came.whole
        return replace(sequence.completion(text), routing=routing)

    def _stream(self, sequence: TokenSequence) -> Iterator[str]:
        sequence.detokenizer = sequence.detokenizer or Detokenizer(self._tokenizer, self._ends)
        held_back = max((len(stop) for stop in sequence.request.sampling.stop), default=1) - 1
        emitted = 0
        with self._running([sequence]) as scheduler:
            while scheduler.has_work:
                with self._weights.in_use():
                    self._step(scheduler, {})
                certain = max(emitted, len(sequence.detokenizer.text) - held_back)
                if sequence.finish_reason is None and certain > emitted:
                    yield sequence.detokenizer.text[emitted:certain]
                    emitted = certain
        rest = self._completion(sequence, None).text[emitted:]
        if rest:
            yield rest


def _pairs(tokens: Sequence[Collection[int]], device: torch.device) -> Tensor | None:
    """[M,2] int64, (row, token) for every token of every row; None where there are none."""
    pairs = [(row, token) for row, ids in enumerate(tokens) for token in ids]
    return torch.tensor(pairs, device=device) if pairs else None
