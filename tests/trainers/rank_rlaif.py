"""Run by a launcher: stages of RLAIF on several ranks. Usage: rank_rlaif.py FOLDER [CASE ...]"""

from __future__ import annotations

import os
import sys
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from alignlab.config.model import LoraSettings
from alignlab.config.trainers import RLAIFConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.loop.learner import Learner
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.weight_view import view_of
from alignlab.scoring.judges.judge import PromptedJudge
from alignlab.trainers.rlaif.trainer import RLAIFTrainer
from tests.scoring.judges.conftest import CONSTITUTION
from tests.trainers.conftest import DENSE
from tests.trainers.rank_cases import EPSILON
from tests.trainers.test_rlaif import CASES_OF_RANKS, POLICIES, SAMPLING, STAGE, LetterModel

STRATEGIES = ("ddp", "fsdp2")


class Editor(LetterModel):
    """Criticises each answer, and writes "abab" in its place."""

    def write(self, conversations: Any, **_: Any) -> Any:
        return ["abab" if len(conversation) == 3 else "criticism" for conversation in conversations]


def run(folder: Path, case: str, strategy: str) -> dict[str, torch.Tensor]:
    """Run the stages of a case, and return the weights of the policy at the end."""
    os.environ["ALIGNLAB_CACHE"] = str(folder / f"cache {strategy}")  # a judge answers anew
    path, is_judged_by_base = CASES_OF_RANKS[case], case == "judged by its base"
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    if is_judged_by_base:
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    constitution = folder / f"constitution{os.environ['RANK']}.yaml"
    constitution.write_text(yaml.safe_dump(CONSTITUTION.model_dump(mode="json")))
    sharding: Any = {"sharding": {"strategy": strategy}}
    settings: dict[str, Any] = {"policy": POLICIES[path] | sharding}
    if path in ("dpo", "reward_model"):
        settings["labels"] = {"sampling": SAMPLING, "prompts_per_batch": 2}
    if path == "reward_model":
        settings["reward"] = {"num_pairs": 4} | STAGE | sharding
        settings["revision"] = {"sampling": SAMPLING, "trainer": {"num_sequences": 4} | STAGE | sharding}
    config = RLAIFConfig(
        output_dir=folder / f"{case} {strategy}", constitution=str(constitution), path=path,
        judge={} if is_judged_by_base else {"name": "given"}, **settings,
    )  # type: ignore[arg-type]  # pydantic reads the sections
    trainer = RLAIFTrainer(
        model, config, [{"prompt": f"ab{i}", "answer": str(i)} for i in range(8)], tokenizer=tokenizer,
        peft_config=LoraSettings(rank=4),
        judge=None if is_judged_by_base else PromptedJudge(Editor(), CONSTITUTION, config.judge),
    )
    policies: list[Any] = []
    trainer.callbacks = (lambda loop, *_: policies.append(loop.learner.model),)
    trainer.train()
    view = view_of(policies[-1])
    return {name: view.whole(name) for name in view.names() if ".default." in name}


def with_epsilon(make: Any) -> Any:
    """Return the constructor of a learner whose optimizer does not divide rounding by itself; see `rank_cases`."""

    @wraps(make)
    def made(self: Learner, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        for group in self.optimizer.param_groups:
            group["eps"] = EPSILON

    return made


def main() -> None:
    folder = Path(sys.argv[1])
    Learner.__init__ = with_epsilon(Learner.__init__)  # type: ignore[method-assign]
    for case in sys.argv[2:] or CASES_OF_RANKS:
        for strategy in STRATEGIES:
            weights = {name: weight.contiguous() for name, weight in run(folder, case, strategy).items()}
            save_file(weights, folder / f"{case}.{strategy}.rank{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()
