from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from alignlab.evaluation.likelihood import measure as module
from alignlab.evaluation.likelihood.measure import Interval, LikelihoodMeter, difference
from alignlab.evaluation.likelihood.report import likelihood_table, plot_reliability
from alignlab.evaluation.likelihood.texts import ScoredText, windows_of


def random_texts(count: int, seed: int = 0, longest: int = 30) -> list[ScoredText]:
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(2, longest, (), generator=generator))
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        texts.append(ScoredText((256, *ids), (False, *[True] * length), length, 1 + length // 5))
    return texts


def sampled_texts(model, count: int, length: int, temperature: float, seed: int) -> list[ScoredText]:
    """Texts drawn from the model at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((count, 1), 256)
    for _ in range(length):
        with torch.no_grad():
            probabilities = torch.softmax(model(ids).logits[:, -1] / temperature, -1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return [ScoredText(tuple(row), (False, *[True] * length), length, 1) for row in ids.tolist()]


def logits_of(model, windows):
    """Logits that predict each token that counts, and the tokens; a forward pass of the model a window."""
    rows, ids = [], []
    for window in windows:
        with torch.no_grad():
            logits = model(torch.tensor([window.token_ids])).logits[0]
        for place, scored in enumerate(window.scored):
            if scored:
                rows.append(logits[place - 1])
                ids.append(window.token_ids[place])
    return torch.stack(rows), torch.tensor(ids)


def test_perplexities_are_those_of_plain_forward_passes(llama, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 40)
    texts = random_texts(9)
    windows = list(windows_of(texts, width=12, stride=5))
    result = LikelihoodMeter(llama).measure(texts, windows)
    logits, ids = logits_of(llama, windows)
    nats = torch.nn.functional.cross_entropy(logits, ids, reduction="sum").item()
    num_bytes, num_words = sum(t.num_bytes for t in texts), sum(t.num_words for t in texts)
    sizes = (result.num_tokens, result.num_bytes, result.num_words, result.num_texts)
    assert sizes == (len(ids), num_bytes, num_words, 9)
    assert result.token.value == pytest.approx(math.exp(nats / len(ids)), rel=1e-5)
    assert result.byte.value == pytest.approx(math.exp(nats / num_bytes), rel=1e-5)
    assert result.word.value == pytest.approx(math.exp(nats / num_words), rel=1e-4)
    assert result.bits_per_byte.value == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)
    assert result.token.low < result.token.value < result.token.high and result.resampled == "texts"


def test_the_calibration_error_is_that_of_the_likeliest_token(llama):
    texts = random_texts(4)
    windows = list(windows_of(texts, width=30, stride=15))
    result = LikelihoodMeter(llama).measure(texts, windows)
    confidence, likeliest = logits_of(llama, windows)[0].softmax(-1).max(-1)
    right = (likeliest == logits_of(llama, windows)[1]).double()
    error = 0.0
    for i in range(15):
        inside = (confidence >= i / 15) & (confidence < (i + 1) / 15)
        error += abs(float((right - confidence)[inside].sum())) / len(right)
    assert result.reliability.error.value == pytest.approx(error, rel=1e-4) and result.resampled == "windows"
    assert sum(of_bin.size for of_bin in result.reliability.bins) == result.num_tokens


def test_the_temperature_of_held_out_texts_is_the_one_that_they_were_drawn_with(llama):
    with torch.no_grad():
        llama.lm_head.weight *= 4  # sure enough to have something to calibrate
    windows = list(windows_of(sampled_texts(llama, 40, 24, 2.5, seed=1), width=32, stride=16))
    meter = LikelihoodMeter(llama)
    temperature, count = meter.fit_temperature(windows)
    logits, ids = logits_of(llama, windows)

    def loss(t: float) -> float:
        return torch.nn.functional.cross_entropy(logits / t, ids).item()

    assert count == len(ids) and temperature == pytest.approx(2.5, rel=0.1)
    assert loss(temperature) < min(loss(temperature * 1.05), loss(temperature / 1.05))
    other = sampled_texts(llama, 12, 24, 2.5, seed=2)
    result = meter.measure(other, list(windows_of(other, width=32, stride=16)), temperature=temperature)
    assert result.tempered is not None and result.tempered_token is not None
    assert result.tempered.error.value < result.reliability.error.value
    assert result.tempered_token.value < result.token.value


def test_calibration_stops_at_its_limit(llama, monkeypatch):
    monkeypatch.setattr(module, "MAX_CALIBRATION_TOKENS", 20)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 16)
    windows = list(windows_of(random_texts(12), width=32, stride=16))
    assert LikelihoodMeter(llama).fit_temperature(windows)[1] == 20


def test_a_single_window_has_no_interval(llama):
    texts = random_texts(1)
    result = LikelihoodMeter(llama).measure(texts, list(windows_of(texts, width=64, stride=32)))
    assert math.isnan(result.token.low) and math.isnan(result.reliability.error.high)
    assert result.to_json()["token_perplexity"]["low"] is None
    assert Interval(math.inf, math.inf, math.inf).to_json()["value"] is None


def test_two_models_are_compared_text_by_text(llama):
    texts = random_texts(10)
    windows = list(windows_of(texts, width=64, stride=32))
    first = LikelihoodMeter(llama).measure(texts, windows)
    with torch.no_grad():
        llama.lm_head.weight *= 2
    second = LikelihoodMeter(llama).measure(texts, windows)
    change = difference(first, second)
    assert change is not None and difference(first, first) is None
    assert change.value == pytest.approx(second.bits_per_byte.value - first.bits_per_byte.value)
    assert change.low < change.value < change.high
    # The difference of pairs is narrower than the two intervals together.
    width = second.bits_per_byte.high - first.bits_per_byte.low
    assert change.high - change.low < width
    assert difference(first, replace(second, resampled="windows")) is None
    assert likelihood_table({"a": first, "b": second}).row_count == 7


def test_the_reliability_diagram_is_drawn(llama, tmp_path):
    texts = random_texts(3)
    windows = list(windows_of(texts, width=64, stride=32))
    meter = LikelihoodMeter(llama)
    plot_reliability({"m": meter.measure(texts, windows, temperature=2.0)}, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000
