"""DPO and its family: each loss and its gradient by plain forward passes, pairs however they are cut, learning."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.data import RenderSettings
from alignlab.config.model import LoraSettings
from alignlab.config.trainers import DPOConfig
from alignlab.data.common_prompt import common_prompt
from alignlab.data.preferences import Preference, preferences_from_rows
from alignlab.errors import CheckpointError, ConfigError, DataError
from alignlab.functional import preference_losses as losses
from alignlab.loop.reference import ExampleReference
from alignlab.models.adapters import add_lora
from alignlab.models.fingerprints import model_digest
from alignlab.models.moe import routers
from alignlab.trainers.dpo import DPOTrainer
from alignlab.trainers.pairs import Pairs, pair_metrics, pairs_of
from tests.settings import merged
from tests.trainers.conftest import SPARSE, leave_base
from tests.trainers.steps import packs_of, update_on
from tests.trainers.tiny import pairs

Make = Callable[..., Any]
LORA = LoraSettings(rank=4)
FAMILY: dict[str, dict[str, Any]] = {
    "sigmoid": {}, "cdpo": {"loss": "sigmoid", "label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}, "ipo": {},
    "ipo_mean": {}, "hinge": {}, "simpo": {"beta": 2.0}, "orpo": {"beta": 0.3},
}


@pytest.fixture
def make_trainer(
    make_model: Make, tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., DPOTrainer]:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def make(
        *, data: Any = None, held_out: Any = None, lora: Any = LORA, folder: str = "run", callbacks: Any = (),
        seed: int = 0, **changes: Any,
    ) -> DPOTrainer:
        base: dict[str, Any] = {
            "output_dir": tmp_path / folder, "num_steps": 4, "num_pairs": 4,
            "optim": {"learning_rate": 1e-2}, "trackers": (),
        }
        return DPOTrainer(
            make_model(seed=seed), DPOConfig(**merged(base, changes)), data or pairs(8), eval_dataset=held_out,
            tokenizer=tokenizer, peft_config=lora, callbacks=callbacks,
        )

    return make


def logprob(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """Return the log-prob of each token of a completion, by a plain forward pass."""
    ids = torch.tensor([[*prompt, *completion]])
    rows = model(ids).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_gradient_are_those_of_plain_forward_passes(name: str, make_trainer: Make) -> None:
    settings = {"loss": name} | FAMILY[name]
    trainer = make_trainer(**settings, memory={"tokens_per_microbatch": 30}, precompute_reference=False)
    leave_base(trainer)
    data, model, beta = trainer.train_examples[:4], trainer.learner.model, trainer.config.beta
    trainer.learner.module.zero_grad()
    total = torch.zeros(())
    for pair in data:
        with torch.no_grad(), model.disable_adapter():
            ref = [logprob(model, pair.prompt, ids) for ids in (pair.chosen, pair.rejected)]
        own = [logprob(model, pair.prompt, ids) for ids in (pair.chosen, pair.rejected)]
        ratios = [(o - r) for o, r in zip(own, ref, strict=True)]
        margin, mean_margin = ratios[0].sum() - ratios[1].sum(), ratios[0].mean() - ratios[1].mean()
        total = total + {
            "sigmoid": lambda m=margin: -torch.log(torch.sigmoid(beta * m)),
            "cdpo": lambda m=margin: losses.dpo_sigmoid(m[None], beta=beta, label_smoothing=0.1)[0],
            "robust": lambda m=margin: losses.dpo_robust(m[None], beta=beta, label_smoothing=0.1)[0],
            "ipo": lambda m=margin: (m - 1 / (2 * beta)) ** 2,
            "ipo_mean": lambda m=mean_margin: (m - 1 / (2 * beta)) ** 2,
            "hinge": lambda m=margin: torch.relu(1 - beta * m),
            "simpo": lambda o=own: -torch.log(torch.sigmoid(beta * (o[0].mean() - o[1].mean()) - 1.0)),
            "orpo": lambda o=own: (
                beta * losses.orpo_odds(o[0].mean()[None], o[1].mean()[None])[0] - o[0].mean()
            ),
        }[name]() / len(data)
    total.backward()
    expected = {n: p.grad.clone() for n, p in trainer.learner.trained.items()}
    found: dict[str, Tensor] = {}
    trainer.learner.module.zero_grad()
    step, trainer.learner._step = trainer.learner._step, lambda *_: (
        found.update({n: p.grad.clone() for n, p in trainer.learner.trained.items()}), {}
    )[1]
    packs = packs_of(trainer, range(4))
    assert len(packs) > 1
    metrics = update_on(trainer, packs)
    trainer.learner._step = step
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_soft_labels_smooth_each_pair_by_itself(make_trainer: Make) -> None:
    """The loss of a pair whose label is right with probability p is p of the loss, 1 - p of that of the other label."""
    known = [replace(pair, probability=p) for pair, p in zip(pairs(4), (1.0, 0.5, 0.75, 0.9), strict=True)]
    trainer = make_trainer(
        data=known, probability_column="sure", memory={"tokens_per_microbatch": 30}, precompute_reference=False
    )
    leave_base(trainer)
    packs = packs_of(trainer, range(4))
    assert len(packs) > 1
    total, expected = 0.0, 0.0
    with torch.no_grad():
        for pack in packs:
            output = trainer.learner.outputs([pack])[0]
            total += float(trainer.algorithm.loss(output, pack)[0].sum())
            for margin, number in zip(pairs_of(output.logprobs, pack).margins, pack.segments.pairs, strict=True):
                p = known[number].probability
                right = torch.sigmoid(0.1 * margin)
                expected -= float(p * torch.log(right) + (1 - p) * torch.log(1 - right))
    assert total == pytest.approx(expected, rel=1e-5)
    own = make_trainer(data=known, folder="own")
    assert packs_of(own, [1])[0].pair_probabilities is not None, "no column is needed"
    for changes in ({"loss": "hinge"}, {"label_smoothing": 0.1}):
        with pytest.raises(ConfigError, match=r"probability below 1, such as 0\.5, which loss sigmoid alone takes"):
            make_trainer(data=known, **changes)
    for changes, message in (
        ({"loss": "ipo"}, "must be null with loss ipo"),
        ({"label_smoothing": 0.1}, "must be 0 with probability_column"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_trainer(probability_column="sure", **changes)


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "copy"])
def test_the_loss_starts_at_log_two(lora: Any, make_trainer: Make) -> None:
    seen: list[Any] = []
    trainer = make_trainer(lora=lora, num_steps=2, callbacks=[lambda t, s, m: seen.append(dict(m))])
    trainer.train()
    assert seen[0]["loss"] == pytest.approx(math.log(2), rel=1e-5) and seen[1]["loss"] != seen[0]["loss"]
    assert seen[0]["margin"] == pytest.approx(0, abs=1e-5)


def test_equal_policies_have_accuracy_half(make_trainer: Make) -> None:
    trainer = make_trainer(held_out=pairs(5, seed=1), num_steps=1, precompute_reference=False)
    result = trainer.train()
    assert result.before.accuracy == 0.5 and result.verdict.to_json() == {"learnt": True}


@pytest.mark.parametrize("loss", ["sigmoid", "ipo_mean"])
def test_what_differs_by_rounding_is_a_guess(loss: str, make_trainer: Make) -> None:
    trainer = make_trainer(loss=loss)
    one, two = torch.ones(4), 2 * torch.ones(4)
    ratios = torch.tensor([0.0, 9e-4, -9e-4, 2.1e-3])
    found = pair_metrics(Pairs(one, one, ratios, 0 * one, two, two, one), trainer.config)
    assert found["preference_accuracy"].tolist() == [0.5, 0.5, 0.5, 1.0]
    free = pair_metrics(Pairs(ratios, 0 * one, ratios, 0 * one, two, two, one), DPOConfig(loss="simpo"))
    assert free["preference_accuracy"].tolist() == [0.5, 1.0, 0.0, 1.0]


def test_both_completions_of_a_pair_are_in_one_pack(make_trainer: Make) -> None:
    trainer = make_trainer(memory={"tokens_per_microbatch": 1})
    packs = packs_of(trainer, range(4))
    assert len(packs) == 4
    for pack in packs:
        assert sum(sequence >= 0 for sequence in pack.segments.sequence_ids) == 2
    long, short = (
        packs_of(make_trainer(memory={"tokens_per_microbatch": n}, folder=str(n)), range(4)) for n in (4096, 20)
    )
    assert len(long) == 1 < len(short)

    def lengths(packs: Any) -> list[float]:
        """By summing ones."""
        found = [pairs_of(torch.ones(p.num_tokens), replace(p, ref_logprobs=None)) for p in packs]
        return sorted(torch.cat([pair.chosen * 100 + pair.rejected for pair in found]).tolist())

    known = [100.0 * len(pair.chosen) + len(pair.rejected) for pair in trainer.train_examples[:4]]
    assert lengths(long) == lengths(short) == sorted(known)


def test_the_reference_is_scored_once_and_kept_on_disk(
    make_trainer: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = pairs(3, seed=1)
    first = make_trainer(held_out=held_out, num_steps=2).train()
    files = list((tmp_path / "cache" / "reference").glob("*.safetensors"))
    assert len(files) == 2
    calls: list[int] = []
    monkeypatch.setattr(ExampleReference, "_compute", lambda *_: calls.append(1) or [])
    second = make_trainer(held_out=held_out, num_steps=2, folder="second").train()
    assert second.metrics["loss"] == first.metrics["loss"] and second.after == first.after
    assert calls == []
    monkeypatch.undo()
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    make_trainer(folder="third", num_steps=2, seed=1).train()  # another base is another reference
    assert len(list((tmp_path / "cache" / "reference").glob("*.safetensors"))) == 3


def test_fingerprint_of_the_reference_depends_on_each_of_its_parts(make_model: Make) -> None:
    """The fingerprint covers all bytes of weights and buffers, and the config."""
    def changed(change: Callable[[Any], None]) -> str:
        model = make_model(SPARSE | {"router_bias_update_rate": 0.1})
        change(model)
        return model_digest(model)

    def last_row(model: Any) -> None:
        with torch.no_grad():
            model.get_input_embeddings().weight[-1, -1] += 1e-6

    def bias(model: Any) -> None:
        routers(model)[0].e_score_correction_bias += 0.1

    def theta(model: Any) -> None:
        model.config.rms_norm_eps *= 2

    keys = [changed(change) for change in (lambda model: None, last_row, bias, theta)]
    assert len(set(keys)) == 4 and changed(lambda model: None) == keys[0]
    adapters = (LORA, LoraSettings(rank=3), LoraSettings(rank=2, target_modules=["q_proj", "v_proj"]))
    digests = [model_digest(make_model()), *(model_digest(add_lora(make_model(), lora)) for lora in adapters)]
    assert len(set(digests)) == 1, "an adapter, wherever it is, leaves its base the same"

    def load(model: Any) -> None:
        routers(model)[0].expert_load += 0.1

    assert changed(load) == keys[0], "what a router counts is in no log-prob"


def test_resumption_with_another_reference_is_refused(make_trainer: Make) -> None:
    make_trainer(lora=None, num_steps=1).train()
    with pytest.raises(CheckpointError, match="the reference has other weights than when the run began"):
        make_trainer(lora=None, num_steps=2, seed=1).train(resume=True)


def test_resumption_with_other_rows_is_refused(make_trainer: Make) -> None:
    make_trainer(num_steps=1).train()
    with pytest.raises(CheckpointError, match="the training data has changed"):
        make_trainer(num_steps=2, data=[*pairs(7), *pairs(1, seed=5)]).train(resume=True)


def test_rows_longer_than_the_model_reads_are_refused(make_trainer: Make) -> None:
    long = Preference((1,), (2,) * 4096, (3,))
    with pytest.raises(DataError, match=r"example 8 .* has 4097 tokens, and must fit the model's 4096 positions"):
        make_trainer(data=[*pairs(8), long])
    with pytest.raises(DataError, match=r"example 0 .* has 4097 tokens"):
        make_trainer(held_out=[long])


def test_texts_of_two_speakers_need_a_prompt_where_chats_are_rendered(tokenizer: Any) -> None:
    chats = copy.deepcopy(tokenizer)
    chats.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [{"chosen": "Human: a Assistant: b", "rejected": "Human: a Assistant: c"}]
    with pytest.raises(DataError, match=r"row 0 .* give a prompt, chat messages, or render_settings=.*chat=False"):
        preferences_from_rows(rows, RenderSettings(), chats)


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "copy"])
def test_precomputed_and_live_references_train_alike(lora: Any, make_trainer: Make) -> None:
    ends = []
    for precompute in (True, False):
        trainer = make_trainer(folder=str(precompute), precompute_reference=precompute, lora=lora)
        trainer.train()
        assert (trainer.algorithm.reference._reference is None) == precompute, "a copy is let go once asked"
        ends.append(torch.cat([p.detach().flatten() for p in trainer.learner.trained.values()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-5)


def test_incomplete_reference_log_probs_are_computed_again(make_trainer: Make) -> None:
    trainer = make_trainer(lora=None, held_out=pairs(3, seed=1))
    ask, asked = trainer.algorithm.reference._compute, []

    def stopped(examples: Any) -> Any:
        asked.append(len(examples))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(examples)

    trainer.algorithm.reference._compute = stopped
    with pytest.raises(KeyboardInterrupt):
        trainer.open(None, None, None)
    assert trainer.algorithm.reference._reference is not None
    trainer.open(None, None, None)
    assert asked == [8, 3, 3] and trainer.algorithm.reference._reference is None
    assert trainer.evaluate().margin == pytest.approx(0, abs=1e-5)
    trainer.open(None, None, None)
    assert asked == [8, 3, 3], "the copy is gone, and all is known"


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "orpo"])
def test_training_learns_which_completions_are_preferred(loss: str, make_trainer: Make) -> None:
    """Chosen ones begin with one token, rejected ones with another: held-out pairs are told apart afterwards."""

    def marked(pair: Preference) -> Preference:
        return Preference(pair.prompt, (8, *pair.chosen[1:]), (9, *pair.rejected[1:]))

    train, held_out = ([marked(pair) for pair in pairs(48, seed=seed)] for seed in (2, 3))
    trainer = make_trainer(
        data=train, held_out=held_out, num_steps=60, num_pairs=16, optim={"learning_rate": 2e-2}, loss=loss,
        beta=2.0 if loss == "simpo" else 0.1,
    )
    result = trainer.train()
    assert result.after.accuracy > 0.9 and result.after.margin > result.before.margin


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "has the same completion in 'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": "b"}, "has no column 'rejected'"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "has an empty string in the column 'chosen'"),
        ({"chosen": "xb", "rejected": "yb"}, "has no column of prompts, and 'chosen' and 'rejected' do not begin"),
        ({"chosen": "xb", "rejected": "xbc"}, "has nothing in 'chosen' or 'rejected' after what the two have in comm"),
        ({"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "b"}]}, "has a string in one of"),
    ],
)
def test_rows_that_are_no_preferences(row: Any, message: str, make_trainer: Make) -> None:
    with pytest.raises(DataError, match=f"row 1 .*{message}"):
        make_trainer(data=[{"prompt": "a", "chosen": "b", "rejected": "c"}, row])


def test_prompts_are_explicit_or_what_both_begin_with(make_trainer: Make) -> None:
    [one] = make_trainer(data=[{"prompt": "ab", "chosen": " 1", "rejected": " 2"}]).train_examples
    [other] = make_trainer(data=[{"chosen": "ab 1", "rejected": "ab 2"}]).train_examples
    assert one == other and one.chosen != one.rejected


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("France? Paris", "France? Prague", "France?"), ("sum 12", "sum 13", "sum"), ("a\nbc", "a\nbd", "a\n"),
        ("a  b", "a  c", "a "), ("2+2=4", "2+2=5", "2+2="), ("a:Yes", "a:No", "a:"),
        ("\u95ee\uff1a\u7b54\u56db", "\u95ee\uff1a\u7b54\u4e94", "\u95ee\uff1a\u7b54"),
    ],
)
def test_common_prompt_of_a_pair_ends_between_words(chosen: str, rejected: str, prompt: str) -> None:
    found = common_prompt(chosen, rejected)
    assert found == (prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))


def test_pairs_of_whole_conversations_beside_their_prompt(tokenizer: Any) -> None:
    chats = copy.deepcopy(tokenizer)
    chats.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    asked, texts = {"role": "user", "content": "q"}, [{"role": "assistant", "content": text} for text in ("a", "b")]
    whole, rest = (
        preferences_from_rows([row], RenderSettings(), chats)[0]
        for row in (
            {"prompt": "q", "chosen": [asked, texts[0]], "rejected": [asked, texts[1]]},
            {"prompt": "q", "chosen": [texts[0]], "rejected": [texts[1]]},
        )
    )
    assert whole == rest and chats.decode(whole.prompt) == "<user>q<assistant>"


def test_a_text_prompt_and_conversations_agree_but_for_white_space_and_a_system_message(tokenizer: Any) -> None:
    chats = copy.deepcopy(tokenizer)
    chats.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    system, asked = {"role": "system", "content": "s"}, {"role": "user", "content": "q r"}

    def prompt_of(before: Any, text: str = "q  r\n", **settings: Any) -> str:
        whole = {name: [*before, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
        [pair] = preferences_from_rows([{"prompt": text, **whole}], RenderSettings(**settings), chats)
        return chats.decode(pair.prompt)

    assert prompt_of([asked]) == "<user>q  r\n<assistant>"
    assert prompt_of([system, asked], "q r") == "<system>s<user>q r<assistant>"
    assert prompt_of([system, asked], "q r", system_prompt="other") == "<system>s<user>q r<assistant>"
    assert prompt_of([asked], "q r", system_prompt="other") == "<system>other<user>q r<assistant>"
    for before in ([system, {"role": "user", "content": "qr"}], [system], [{"role": "user", "content": "Q r"}]):
        with pytest.raises(DataError, match=r"row 0 .* and not with the prompt"):
            prompt_of(before, "q r")


def test_settings_that_are_not_read_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing is 0\.1, and must stay 0\.0 with loss hinge"):
        DPOConfig(loss="hinge", label_smoothing=0.1)
    with pytest.raises(ConfigError, match=r"simpo_gamma is 0\.5, and must stay 1\.0 with loss sigmoid"):
        DPOConfig(simpo_gamma=0.5)
    with pytest.raises(ConfigError, match="be above 0 with loss robust"):
        DPOConfig(loss="robust")


@torch.no_grad()
@pytest.mark.parametrize("precompute", [True, False])
def test_what_a_tool_says_in_a_completion_is_read_and_not_counted(precompute: bool, make_trainer: Make) -> None:
    mask = (True, False, False, True)
    pair = Preference((5, 6), (7, 8, 9, 10), (11, 12), chosen_mask=mask)
    trainer = make_trainer(data=[pair, *pairs(3)], num_pairs=4, lora=None, precompute_reference=precompute)
    if precompute:
        trainer.algorithm.reference.precompute({"train": trainer.train_examples})
    [pack] = packs_of(trainer, [0])
    known = pairs_of(trainer.learner.logprobs([pack])[0], pack)
    counted = logprob(trainer.learner.model, pair.prompt, pair.chosen)[torch.tensor(mask)]
    assert known.chosen_tokens.tolist() == [2] and known.rejected_tokens.tolist() == [2]
    assert known.chosen.item() == pytest.approx(counted.sum().item(), abs=1e-4)
    assert known.chosen_ratio.item() == pytest.approx(0, abs=1e-4), "the reference's is of the same tokens"


def test_the_reference_of_masked_and_whole_completions_is_not_mixed_up(make_trainer: Make) -> None:
    from alignlab.runs.reference_cache import ReferenceCache

    cache = ReferenceCache(make_trainer().learner.model)
    whole = Preference((5, 6), (7, 8, 9), (11, 12))
    masked = replace(whole, chosen_mask=(True, False, True))
    assert cache.path([whole]) != cache.path([masked])
    assert whole.labels != masked.labels
