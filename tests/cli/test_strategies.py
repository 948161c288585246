"""`alignlab eval --strategy` and `--perplexity` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignlab.cli import main

WORDS = "red blue green one two three"
READER = (
    "def vowels(completions, **columns):\n"
    "    return [float(any(letter in text for letter in 'aeiou')) for text in completions]\n"
    "vowels.read_answer = lambda text: text.strip()[:1] or None\n"
    "def mute(completions, **columns):\n"
    "    return [1.0] * len(completions)\n"
    "def long(completions, **columns):\n"
    "    return [float(len(text)) for text in completions]\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, rows, rewards and a config."""
    from alignlab.data.tokenizer_training import train_tokenizer
    from alignlab.models.hub.checkpoints import new_model, save_model

    folder = tmp_path_factory.mktemp("strategies")
    tokenizer = train_tokenizer([WORDS] * 20, vocab_size=300)
    shape = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }  # fmt: skip
    model = new_model(
        shape, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    save_model(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"say {word}", "answer": word} for word in WORDS.split()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(READER)
    (folder / "forms.txt").write_text("{prompt}\nplease {prompt}\n")
    (folder / "text.txt").write_text(WORDS * 3)
    (folder / "held.txt").write_text(f"one {WORDS} two")
    config = {
        "model": {"name": str(folder / "model")},
        "data": {"path": str(folder / "rows.jsonl")},
        "eval_data": {"path": str(folder / "rows.jsonl"), "size": 6},
        "rewards": [{"name": f"{folder / 'reward.py'}:vowels"}, {"name": f"{folder / 'reward.py'}:long"}],
        "trainer": {
            "type": "grpo", "output_dir": str(folder / "run"), "sampling": {"max_new_tokens": 4}, "trackers": [],
        },
        "evaluation": {"num_samples": 4},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(config))
    return folder


def evaluated(capsys, *words: str) -> tuple[dict, str]:
    assert main(["eval", *words]) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def refused(capsys, *words: str) -> str:
    assert main(["eval", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_pool_gives_every_strategy_and_is_not_drawn_again(folder, tmp_path, capsys, monkeypatch):
    strategies = [
        "majority", f"best_of_n:reward={folder / 'reward.py'}:long", "weighted", "confidence:warmup=2,window=2",
        "adaptive:start=2", "calibrated", "budget:budgets=[2,4],waits=1,cue=red,answer_tokens=2",
        f"augment:templates={folder / 'forms.txt'}",
    ]  # fmt: skip
    words = ["--config", str(folder / "run.yaml"), "--pool", str(tmp_path / "pool")]
    words += [word for strategy in strategies for word in ("--strategy", strategy)]
    result, err = evaluated(capsys, *words, "--plot", str(tmp_path / "plot.png"))
    [model] = result["models"]
    ks = {}
    for figure in model["figures"]:
        ks.setdefault(figure["strategy"], []).append(figure["k"])
        assert 0 <= figure["low"] <= figure["accuracy"] <= figure["high"] <= 1 and figure["tokens"] > 0
    assert ks["oracle"] == ks["majority"] == ks["best_of_n " + strategies[1].partition("=")[2]] == [1, 2, 4]
    assert ks["weighted logprob"] == ks["confidence"] == [1, 2, 4] and ks["adaptive"] == ks["augment"] == [2, 4]
    assert ks["budget"] == [2, 4] and model["calibration"][0]["num_measured"] == 3
    assert (tmp_path / "plot.png").exists() and "6 problems, a pool of 4 samples each" in err
    assert len(list((tmp_path / "pool").rglob("*.jsonl"))) == 1 + 2 + 2
    monkeypatch.setattr("alignlab.cli.pools.load_policy", lambda *words: pytest.fail("a model was loaded"))
    again, _ = evaluated(capsys, *words)
    assert again == result
    assert "whose seed differ" in refused(capsys, *words, "--seed", "5")


@pytest.fixture
def reward_model(folder, tmp_path) -> str:
    """A random reward model with the policy's tokenizer."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from alignlab.models.hub.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "model"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward_model")
    tokenizer.save_pretrained(tmp_path / "reward_model")
    return str(tmp_path / "reward_model")


def test_samples_of_an_approximate_cache_are_not_taken_for_exact_ones(folder, tmp_path, capsys):
    words = ["--config", str(folder / "run.yaml"), "--pool", str(tmp_path / "pool"), "--strategy", "majority"]
    evaluated(capsys, *words)
    rounded = ["--set", "trainer.rollout.kv_cache.type=int8"]
    assert "samples whose kv_cache differ from what is asked for" in refused(capsys, *words, *rounded)
    words[3] = str(tmp_path / "rounded")
    evaluated(capsys, *words, *rounded)
    evaluated(capsys, *words, *rounded, "--set", "trainer.rollout.kv_cache.replay=false",
              "--set", "trainer.mismatch.correction=token_tis")


LOW_RANK = ["--set", "trainer.rollout.kv_cache.type=low_rank", "--set", "trainer.rollout.kv_cache.rank=2"]


@pytest.fixture
def measured_bases(monkeypatch) -> list[dict]:
    """Bases in the order in which they are measured."""
    from alignlab.models.kv_approximation.low_rank_bases import LowRankBases

    bases, choose = [], LowRankBases._choose
    monkeypatch.setattr(
        LowRankBases, "_choose", lambda self, moments: (choose(self, moments), bases.append(self.state()["bases"]))
    )
    return bases


def test_a_pool_is_continued_with_the_bases_that_it_began_with(folder, tmp_path, capsys, measured_bases):
    words = ["--config", str(folder / "run.yaml"), "--pool", str(tmp_path), "--strategy", "majority", *LOW_RANK]
    evaluated(capsys, *words)
    [pool] = tmp_path.rglob("*.jsonl")
    lines = pool.read_bytes().splitlines(keepends=True)
    pool.write_bytes(b"".join(lines[:-2]))  # of the missing problems alone the bases would be others
    evaluated(capsys, *words)
    assert len(pool.read_bytes().splitlines()) == len(lines)
    assert len(measured_bases) == 2 and measured_bases[0] == measured_bases[1]
    fewer = ["--set", "eval_data.size=5"]
    assert "samples whose measured_on differ" in refused(capsys, *words, *fewer)


def test_samples_are_continued_with_the_cache_that_they_began_with(
    folder, tmp_path, capsys, monkeypatch, measured_bases
):
    def sample(name: str, *more: str) -> int:
        words = ["--config", str(folder / "run.yaml"), "--prompts-at-once", "2", "--max-new-tokens", "16"]
        words += ["--regex", "[a-z]{2,4}"]
        return main(["sample", str(folder / "model"), "--output", str(tmp_path / name), *words, *more])

    def stop(*_):
        raise KeyboardInterrupt

    assert sample("whole.jsonl", *LOW_RANK) == 0
    with monkeypatch.context() as patch:
        patch.setattr("alignlab.synthesis.teacher_samples._show_progress", stop)
        assert sample("stopped.jsonl", *LOW_RANK) == 130
    higher = ["--set", "trainer.rollout.kv_cache.rank=3"]
    assert sample("stopped.jsonl") == sample("stopped.jsonl", *LOW_RANK, *higher) == 2
    assert "was begun with another model, other data or other settings" in capsys.readouterr().err
    assert sample("stopped.jsonl", *LOW_RANK) == 0
    assert measured_bases[0] == measured_bases[1] == measured_bases[-1] != measured_bases[-2]
    assert (tmp_path / "stopped.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_reward_model_chooses_and_its_sigmoid_weighs(folder, reward_model, capsys):
    words = ["--config", str(folder / "run.yaml"), "--strategy", f"best_of_n:reward={reward_model}"]
    result, _ = evaluated(capsys, *words, "--strategy", f"weighted:weight={reward_model},link=sigmoid")
    names = [figure["strategy"] for figure in result["models"][0]["figures"]]
    assert names == [*["oracle"] * 3, *[f"best_of_n {reward_model}"] * 3, *[f"weighted {reward_model}"] * 3]
    assert "add link=sigmoid" in refused(capsys, *words, "--strategy", f"weighted:weight={reward_model}")


def test_two_models_are_compared(folder, capsys):
    model = str(folder / "model")
    words = ["--config", str(folder / "run.yaml"), "--strategy", "majority", "--pass-at", "1", "4"]
    result, err = evaluated(capsys, f"before={model}", f"after={model}", *words)
    before, after = result["models"]
    assert before["figures"] == after["figures"] and result["complete"]
    [change] = result["sharpening"]
    assert change["gain"]["value"] == 0 and change["oracle_crosses_at"] == 1 and "after gains +0.000" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategy", "vote"], "--strategy is 'vote', and must be one of"),
        (["--strategy", "best_of_n"], "reward is missing"),
        (["--strategy", "best_of_n:reward=judge"], "trainer.type is grpo, and must be rlaif"),
        (["--strategy", "best_of_n:reward=nothing_there"], "nothing_there"),
        (["--strategy", "budget:budgets=0"], "each at least 1"),
        (["--strategy", "budget:budgets=1000"], "128 positions"),
        (["--strategy", "majority", "--pass-at", "1", "5"], "must hold numbers from 1 to num_samples (4) only"),
        (["--strategy", "majority", "--strategy", "majority"], "is given twice"),
        (["--strategy", "majority", "--temperature", "0"], "--temperature is 0"),
        (["--strategy", "majority", "--set", "evaluation.scorer={folder}/reward.py:mute"], "mute has no attribute"),
        (["--strategy", "calibrated", "--num-problems", "3"], "must leave at least 2 of 3 problems"),
        (["--strategy", "augment:templates={folder}/none.txt"], "none.txt cannot be read"),
        (["--strategy", "augment:templates={folder}/forms.txt", "--pass-at", "1"], "multiple of the 2 forms"),
        (["--strategy", "adaptive:start=8"], "start is 8"),
        (["--pool", "x"], "add --strategy"),
        (["--strategy", "majority", "--show", "1"], "--show shows completions"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(folder, capsys, monkeypatch, words, message):
    monkeypatch.setattr("alignlab.cli.pools.load_policy", lambda *words: pytest.fail("a model was loaded"))
    filled = [word.replace("{folder}", str(folder)) for word in words]
    assert message in refused(capsys, "--config", str(folder / "run.yaml"), *filled)


def test_perplexity_of_a_text_and_of_completions(folder, tmp_path, capsys):
    model, plot = str(folder / "model"), tmp_path / "plot.png"
    words = ["--perplexity", str(folder / "text.txt"), "--calibrate", str(folder / "held.txt"), "--window", "16"]
    result, err = evaluated(capsys, f"a={model}", f"b={model}", *words, "--stride", "4", "--plot", str(plot))
    first, second = result["models"]
    assert first["token_perplexity"] == second["token_perplexity"] and second["difference_bits_per_byte"]["value"] == 0
    assert first["num_bytes"] == len(WORDS) * 3 and first["temperature"] > 0 and plot.exists()
    assert first["bits_per_byte"]["low"] < first["bits_per_byte"]["value"] and "by resampling windows" in err
    result, _ = evaluated(capsys, model, "--perplexity", str(folder / "rows.jsonl"))
    assert result["models"][0]["num_texts"] == 6 and result["models"][0]["num_words"] == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--perplexity", "{folder}/text.txt", "--stride", "200"], "--stride is 200"),
        (["--perplexity", "{folder}/text.txt", "--window", "500"], "128 positions"),
        (["--perplexity", "{folder}/text.txt", "--calibrate", "{folder}/text.txt"], "must be other texts"),
        (["--perplexity", "{folder}/text.txt", "--calibrate", "{folder}/none.txt"], "none.txt cannot be read"),
        (["--perplexity", "{folder}/text.txt", "--num-samples", "3"], "--num-samples is about sampled answers"),
        (["--perplexity", "{folder}/text.txt", "--strategy", "majority"], "--strategy is about sampled answers"),
        (["--perplexity", "{folder}/text.txt", "--ban", "red"], "--ban is about sampled answers"),
        (["--perplexity", "{folder}/text.txt", "--temperature", "0"], "--temperature is about sampled answers"),
        (["--perplexity", "{folder}/text.txt", "--show", "2"], "--show is about sampled answers"),
        (["--task", "chain_sum", "--calibrate", "{folder}/held.txt"], "--calibrate is for --perplexity"),
    ],
)
def test_texts_that_cannot_be_read_are_refused_before_a_model_is_loaded(folder, capsys, monkeypatch, words, message):
    monkeypatch.setattr("alignlab.cli.perplexity.load_policy", lambda *words: pytest.fail("a model was loaded"))
    filled = [word.replace("{folder}", str(folder)) for word in words]
    assert message in refused(capsys, str(folder / "model"), *filled)


def test_every_accuracy_has_its_interval(folder, capsys):
    result, err = evaluated(capsys, "--config", str(folder / "run.yaml"), "--pass-at", "1", "2")
    assert set(result["intervals"]) == {"greedy", "sampled", "strict_greedy", "strict_sampled", "pass@1", "pass@2"}
    for name, (low, high) in result["intervals"].items():
        assert 0 <= low <= result[name] <= high <= 1 and low < high
    assert "95 % intervals" in err
