"""The way in from Python that the README shows, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from alignlab.config.rewards import RewardSettings
from alignlab.scoring.loading import load_reward
from alignlab.types import Completion, Prompt, Rollout, SamplingParams

README = Path(__file__).parents[3] / "alignlab" / "evaluation" / "README.md"


class Engine:
    """Says 0, 1, 2, ... as the samples of each prompt."""

    def generate(self, prompts, sampling):
        said = tuple(Completion.of((1,) * (i + 1), str(i), logprobs=(-1.0,) * (i + 1)) for i in range(sampling.n))
        return [Rollout(prompt, said) for prompt in prompts]


def test_the_readme_s_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    names = {
        "prompts": [Prompt((1, row), f"problem {row}", row, {"answer": str(row)}) for row in range(3)],
        "engine": Engine(), "scorer": load_reward(RewardSettings(name="exact_match")), "Path": Path,
        "SamplingParams": SamplingParams, "load_reward": load_reward, "RewardSettings": RewardSettings,
    }  # fmt: skip
    exec(compile(code, "README.md", "exec"), names)
    measured = names["measured"]
    # One of 16 samples is right: pass@4 = 1 - C(15, 4) / C(16, 4) = 4 / 16
    assert [round(figure.accuracy, 6) for figure in measured.of("oracle")] == [1 / 16, 0.25, 1.0]
    assert {figure.strategy for figure in measured.figures} == {"oracle", "majority", "best_of_n length"}
    assert (tmp_path / "pool.jsonl").is_file()
