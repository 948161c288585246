"""Models that draft, made in minutes: a student of a few layers of its teacher, and a tiny model with an MTP layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alignlab import SFTTrainer
from alignlab.config.rollout import RolloutSettings
from alignlab.config.trainers import SFTConfig
from alignlab.data.examples import Example
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import load_model, load_tokenizer, new_model
from alignlab.models.layer_pruning import chosen_layers, student_from
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, SamplingParams

_HEROES = ("a dog", "the moon", "a queen", "a robot", "an old tree", "a fisherman", "the wind", "two sisters")
_THINGS = ("cup", "spoon", "box", "coat", "ring", "book", "ball", "door")
_COLOURS = ("pink", "brown", "grey", "gold")


def other_texts() -> list[tuple[str, float]]:
    """Return prompts like those that are measured, and none of them, with a temperature."""
    texts = [(f"Tell me a short story about {hero}.", 1.0) for hero in _HEROES]
    texts += [(f"What is {n} + {n + 7}? Show every step.", 1.0) for n in range(40, 64)]
    for start in range(8):
        lines = [
            f"{i + 1}. The {_COLOURS[(start + i) % 4]} {_THINGS[(start + 3 * i) % 8]} costs {(start + i) * 9} dollars."
            for i in range(5)
        ]
        texts.append(("Repeat this list word for word:\n" + "\n".join(lines), 0.0))
    return texts


def make_student(teacher: str, folder: Path, *, num_layers: int, num_steps: int, new_tokens: int) -> Path:
    """Cut a student out of a teacher, train it on what the teacher answers to `other_texts`, and return its folder."""
    tokenizer = load_tokenizer(teacher)
    samples = _answers(load_model(teacher, dtype=torch.bfloat16), tokenizer, new_tokens)
    whole = load_model(teacher, dtype=torch.float32)
    student = student_from(whole, chosen_layers(whole, None, num_layers))
    del whole
    return _trained(student, tokenizer, samples, folder, num_steps=num_steps, num_sequences=4, learning_rate=5e-4)


def make_counter(folder: Path, *, num_steps: int, preset: str) -> tuple[Path, list[str]]:
    """Train a tiny model with an MTP layer from nothing to count on, and return its folder and prompts to measure."""
    tokenizer = train_tokenizer([_counted(n) for n in range(200)], vocab_size=300)
    torch.manual_seed(0)
    model = new_model(
        {"preset": preset, "num_mtp_layers": 1}, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    samples = []
    for n in (n for n in range(200) if n % 10 != 3):
        start, rest = (tokenizer.encode(text, add_special_tokens=False) for text in _counted(n).split("|"))
        samples.append(Example((*start, *rest), (False,) * len(start) + (True,) * len(rest)))
    path = _trained(model, tokenizer, samples, folder, num_steps=num_steps, num_sequences=16, learning_rate=2e-3)
    return path, [_counted(n).split("|")[0] for n in range(3, 200, 10)]


def _counted(start: int) -> str:
    """Return a number and those that follow it, in words of digits: "17 18|19 20 21 ..."."""
    numbers = [str(start + i) for i in range(16)]
    return " ".join(numbers[:2]) + "|" + "".join(f" {number}" for number in numbers[2:])


def _answers(model: Any, tokenizer: Any, new_tokens: int) -> list[Example]:
    """Return the model's own answers to the texts, to be learnt."""
    engine = EmbeddedEngine(model, tokenizer, RolloutSettings())
    texts = other_texts()
    prompts = [
        Prompt(tuple(tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )), text)
        for text, _ in texts
    ]  # fmt: skip
    sampling = [SamplingParams(temperature=t, max_new_tokens=new_tokens, seed=1) for _, t in texts]
    return [
        Example(
            (*rollout.prompt.token_ids, *completion.token_ids),
            (False,) * len(rollout.prompt.token_ids) + (True,) * len(completion.token_ids),
        )
        for rollout in engine.generate(prompts, sampling)
        for completion in rollout.completions
    ]


def _trained(
    model: Any, tokenizer: Any, samples: list[Example], folder: Path, *, num_steps: int, num_sequences: int,
    learning_rate: float,
) -> Path:
    """Fine-tune a model, and return the folder of the result."""
    config = SFTConfig.model_validate({
        "output_dir": folder, "num_steps": num_steps, "num_sequences": num_sequences, "trackers": (),
        "optim": {"learning_rate": learning_rate, "schedule": "linear", "warmup_steps": min(5, num_steps - 1)},
    })  # fmt: skip
    return SFTTrainer(model, config, samples, tokenizer=tokenizer).train().model_path
