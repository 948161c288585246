"""Critique and revision: who is asked what, and what becomes of texts that do not come."""

from __future__ import annotations

from typing import Any

from alignlab.scoring.judges.chat_model import Failure
from alignlab.synthesis.revision import Reviser
from tests.scoring.judges.conftest import CONSTITUTION, RuledModel, rollout


def reviser(model: Any, **settings: Any) -> Reviser:
    usual = {"num_revisions": 1, "max_new_tokens": 8, "temperature": 1, "seed": 0}
    return Reviser(model, CONSTITUTION, **usual | settings)


def test_critique_and_revision_quote_the_same_principle() -> None:
    model = RuledModel(texts=[" too short ", "better"])
    [row] = reviser(model).revise([rollout(4, "bad")])
    assert row["index"] == 4 and row["answer"] == "bad" and row["outcome"] == "revised"
    assert row["critiques"] == ["too short"] and row["completion"] == "better"
    critique, revision = model.asked
    assert "question 4" in critique[0]["content"] and "Answer: bad" in critique[0]["content"]
    assert list(revision[:1]) == list(critique)
    assert revision[1] == {"role": "assistant", "content": "too short"}
    name = next(p.name for p in CONSTITUTION.principles if p.critique in critique[0]["content"])
    assert revision[2]["content"].startswith(f"Be {name}.")


def test_a_second_revision_takes_the_first_one_s_text_and_another_principle() -> None:
    model = RuledModel(texts=["c1", "r1", "c2", "r2"])
    [row] = reviser(model, num_revisions=2).revise([rollout(0, "bad")])
    assert row["completion"] == "r2" and row["critiques"] == ["c1", "c2"]
    assert "Answer: r1" in model.asked[2][0]["content"]
    critiques = [str(model.asked[i][0]["content"]) for i in (0, 2)]
    first, second = (next(p.name for p in CONSTITUTION.principles if p.critique in text) for text in critiques)
    assert first != second


def test_a_failed_text_leaves_out_its_own_row_only() -> None:
    late = Failure("timeout", "late")
    model = RuledModel(texts=[late, "c", " ", "fine", "better", Failure("refused", "no")])
    # Critiques of the first four (the last answer is empty and never shown), then revisions of those left.
    rows = reviser(model).revise([rollout(0, "a"), rollout(1, "b"), rollout(2, "c"), rollout(3, "d"), rollout(4, "")])
    assert [row["outcome"] for row in rows] == ["timeout", "revised", "empty", "refused", "empty"]
    assert [row["completion"] for row in rows] == [None, "better", None, None, None]
