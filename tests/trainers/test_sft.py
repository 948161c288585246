"""What supervised fine-tuning measures on held-out examples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from alignlab.config.loader import load_config
from alignlab.config.model import LoraSettings
from alignlab.config.trainers import SFTConfig
from alignlab.data.examples import Example
from alignlab.errors import ConfigError
from alignlab.evaluation.results import LikelihoodResult, evaluation_from_json
from alignlab.models.hub.checkpoints import save_model
from alignlab.run_from_config import run
from alignlab.trainers.sft import SFTTrainer
from tests.settings import merged
from tests.trainers.conftest import leave_base

Make = Callable[..., Any]
ROWS = [{"prompt": f"ab{i}", "completion": "ab" * (1 + i % 3)} for i in range(8)]


def make_trainer(make_model: Make, tokenizer: Any, folder: Path, lora: Any = None, **changes: Any) -> SFTTrainer:
    base: dict[str, Any] = {"num_steps": 4, "num_sequences": 4, "optim": {"learning_rate": 1e-2}, "trackers": ()}
    config = SFTConfig(output_dir=folder, **merged(base, changes))
    return SFTTrainer(
        make_model(), config, ROWS, eval_dataset=ROWS[:5], tokenizer=tokenizer, peft_config=lora
    )


def plain_loss(model: Any, examples: list[Example]) -> tuple[float, int]:
    """Sum of -log p of taught tokens over their number, an example at a time, by a plain forward pass."""
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example.token_ids])
            logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
            taught = torch.tensor(example.completion_mask[1:])
            own = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
            total, count = total - float(own[taught].sum()), count + int(taught.sum())
    return total / count, count


@pytest.mark.parametrize("budget", [8, 4096])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["all weights", "adapter"])
def test_the_held_out_loss_is_that_of_a_plain_forward_pass(
    budget: int, lora: Any, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(make_model, tokenizer, tmp_path / "run", lora, memory={"tokens_per_microbatch": budget})
    if lora is not None:
        leave_base(trainer)
    result = trainer.evaluate()
    expected, count = plain_loss(trainer.learner.model.eval(), list(trainer.eval_examples))
    assert result is not None
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert (result.num_examples, result.num_tokens) == (5, count)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_held_out_examples_are_measured_before_after_and_between(
    make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(make_model, tokenizer, tmp_path / "run", eval_every_steps=1)
    result = trainer.train()
    assert isinstance(result.before, LikelihoodResult) and isinstance(result.after, LikelihoodResult)
    assert result.after.loss < result.before.loss
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert list(measured) == [0, 1, 2, 3, 4]
    assert (measured[0], measured[4]) == (result.before.loss, result.after.loss)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert evaluation_from_json(report["before"]) == result.before


def test_held_out_data_does_not_change_the_trained_weights(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    ends = []
    for name, held_out in (("with", ROWS[:5]), ("without", None)):
        config = SFTConfig(output_dir=tmp_path / name, num_steps=2, num_sequences=4, trackers=())
        trainer = SFTTrainer(make_model(), config, ROWS, eval_dataset=held_out, tokenizer=tokenizer)
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.learner.trained.values()]))
    assert torch.equal(*ends)


def test_copy_of_the_head_beside_an_adapter_trains_for_a_model_given_by_name(
    make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    """The advice where an adapter is on the output head: `modules_to_save`."""
    save_model(make_model(), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = SFTConfig(
        output_dir=tmp_path / "run", num_steps=1, num_sequences=4, optim={"learning_rate": 1e-2}, trackers=()
    )
    on_head = LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"train the whole head: modules_to_save=\['lm_head'\]"):
        SFTTrainer(str(tmp_path / "model"), config, ROWS, peft_config=on_head)
    advised = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    trainer = SFTTrainer(str(tmp_path / "model"), config, ROWS, peft_config=LoraConfig(**advised))
    [head] = [weight for name, weight in trainer.learner.trained.items() if "lm_head" in name]
    before = head.clone()
    trainer.train()
    assert not torch.equal(head, before)
    config = config.model_copy(update={"output_dir": tmp_path / "half"})
    half = SFTTrainer(make_model().bfloat16(), config, ROWS, tokenizer=tokenizer, peft_config=LoraConfig(**advised))
    half.train()
    [head] = [weight for name, weight in half.learner.trained.items() if "lm_head" in name]
    assert head.dtype == torch.bfloat16 and half.learner.optimizer.state[head]["master"].dtype == torch.float32


def test_perplexity_beyond_float_range_is_infinite() -> None:
    assert LikelihoodResult(1e4, 1, 1).perplexity == math.inf


CONFIG = """
model:
  architecture: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4,
    num_key_value_heads: 2}
  tokenizer: {vocab_size: 300, num_texts: 50}
data: {path: ROWS}
eval_data: {path: ROWS, size: 3}
trainer: {type: sft, num_steps: 2, num_sequences: 4, eval_every_steps: 1, trackers: []}
"""


def test_eval_data_of_a_config_is_evaluated(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "run.yaml").write_text(CONFIG.replace("ROWS", str(rows)))
    told = run(load_config(tmp_path / "run.yaml", [f"trainer.output_dir={tmp_path / 'run'}"])).to_json()
    assert set(told["before"]) == set(told["after"]) == {"loss", "perplexity"}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["after"]["num_examples"] == 3


def test_warm_start_has_no_evaluation() -> None:
    from alignlab.config.run import WarmStart

    with pytest.raises(ConfigError, match=r"trainer\.eval_every_steps is 1, and must stay null in a warm start"):
        WarmStart(trainer=SFTConfig(eval_every_steps=1))
