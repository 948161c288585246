"""Offline distillation: the student learns its teacher's distribution at each token of given completions.

Hinton et al. (2015), arXiv:1503.02531, with the divergences of GKD (arXiv:2306.13649). The teacher answers at each
step; or once for all examples, of which its likeliest tokens are kept on disk (`runs.teacher_cache`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from alignlab.config.trainers import DistillConfig
from alignlab.data.examples import Example
from alignlab.data.packing import pack_examples
from alignlab.errors import ConfigError
from alignlab.functional.distillation import TopTokens
from alignlab.loop.given_data import GivenData, resolve_examples
from alignlab.loop.offline_algorithm import OfflineAlgorithm, OfflineInputs, policy_learner
from alignlab.loop.student import Comparison, Student, StudentForward, StudentOutput, shared_width
from alignlab.loop.teacher import load_teacher, load_teacher_tokenizer
from alignlab.loop.teacher_tokens import taught_pack, top_tokens
from alignlab.models.decoder import num_embeddings, num_positions
from alignlab.models.fingerprints import model_fingerprint
from alignlab.models.policy import Policy
from alignlab.models.routers.uses import check_policy_losses
from alignlab.runs.teacher_cache import CachedTeacher, TeacherCache
from alignlab.types import Experience


class Distill(OfflineAlgorithm[Example]):
    """Distillation on fixed completions.

    Raises:
        ConfigError: the teacher has other tokens than the student, or fewer logits.
    """

    config: DistillConfig
    compares_logprobs = False

    def __init__(self, config: DistillConfig, inputs: OfflineInputs) -> None:
        check_policy_losses(inputs.model, type(self).__name__)
        chunk_tokens = config.memory.logprob_chunk_tokens
        tokenizer = load_teacher_tokenizer(config.teacher)
        teacher = load_teacher(config.teacher, inputs.accelerator.device, chunk_tokens=chunk_tokens)
        width = shared_width(teacher.model, tokenizer, inputs.model, inputs.tokenizer)
        if config.top_k is not None and config.top_k > width:
            raise ConfigError(f"top_k is {config.top_k}, and must be at most the tokenizer's {width} ids; use 64")
        self.comparison = Comparison(
            config.beta, config.temperature, width, label_weight=config.hard_label_weight,
            label_smoothing=config.label_smoothing, z_loss_coef=config.z_loss_coef,
        )
        student = Student(inputs.model, self.comparison, chunk_tokens=chunk_tokens)
        self.forward = StudentForward(1.0, teacher)
        options = {"forward": self.forward, "compares_logprobs": self.compares_logprobs}
        super().__init__(config, inputs, policy_learner(config, inputs, student, **options))
        self._fingerprint = model_fingerprint(teacher.model)
        self._cached: CachedTeacher | None = None

    @property
    def teacher(self) -> Policy | None:
        """The teacher, frozen; None once all that it says of the examples is on disk."""
        return self.forward.teacher

    @property
    def positions(self) -> dict[str, float]:
        """The most tokens of an example for the student and its teacher."""
        return super().positions | ({} if self.teacher is None else {"the teacher": num_positions(self.teacher.model)})

    @property
    def embedding_rows(self) -> dict[str, int]:
        """The rows of the embedding tables of the student and its teacher."""
        teacher = {} if self.teacher is None else {"the teacher": num_embeddings(self.teacher.model)}
        return super().embedding_rows | teacher

    def read(self, data: GivenData) -> Sequence[Example]:
        """Return the examples of rows with `prompt` and `completion` or `messages`, or examples made already."""
        return resolve_examples(data, self.tokenizer)

    def prepare(self, train: Sequence[Example], held_out: Sequence[Example]) -> None:
        """With `top_k`, compute the teacher's likeliest tokens for all examples, or read them; then drop the teacher.
        """
        if self.config.top_k is None or self.teacher is None:
            return
        cache = TeacherCache(
            self.teacher.model, k=self.config.top_k, temperature=self.comparison.temperature,
            width=self.comparison.width,
        )
        self._cached = cache.get_or_make(train, self._top_tokens)
        self.forward.teacher = None

    def _top_tokens(self, examples: Sequence[Example]) -> TopTokens:
        assert self.teacher is not None and self.config.top_k is not None
        return top_tokens(self.teacher, examples, self.comparison, self.config.top_k, self.config.memory)

    def packs(self, name: str, examples: Sequence[Example], rows: Sequence[int]) -> list[Experience]:
        """Return the packs of some examples, each a sequence of its own, with the teacher's likeliest tokens if cached.
        """
        packs = pack_examples([examples[i] for i in rows], budget=self.config.memory.tokens_per_microbatch)
        if self._cached is None:
            return packs
        return [taught_pack(pack, [rows[i] for i in pack.segments.sequence_ids], self._cached) for pack in packs]

    def loss(self, output: StudentOutput, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return (1 - w) T^2 divergence + w cross-entropy + z-loss of each token [N]: Hinton et al. (2015), Sec. 2."""
        weight, scale = self.config.hard_label_weight, self.config.temperature**2
        metrics = {"divergence": output.divergence, "entropy": output.entropy, "cross_entropy": -output.logprobs}
        if self.config.z_loss_coef:
            metrics["log_normalizer"] = output.log_normalizer
        loss = (1 - weight) * scale * output.divergence
        return loss + output.label_loss if self.comparison.has_label_loss else loss, metrics

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """The teacher, until all that it says is on disk."""
        return [] if self.teacher is None else [self.teacher]

    @property
    def models_beside(self) -> dict[str, str]:
        """Description of the teacher."""
        return {"teacher": f"{self.config.teacher.name}, judges by tokens"}

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of the teacher."""
        return {"teacher": self._fingerprint}
