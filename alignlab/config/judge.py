"""Who judges completions, how its answers are read, and what it may cost."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from alignlab.addresses import HIDDEN
from alignlab.config.addresses import check_address
from alignlab.config.base import Frozen
from alignlab.config.messages import BrokenRule
from alignlab.config.model import Dtype
from alignlab.config.on_resume import MayChange, OnResume

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class _JudgeSettings(Frozen):
    """What every judge has that is asked questions."""

    on_resume = OnResume.REFUSED
    answers: Literal["probabilities", "sampled"] = "probabilities"
    """How an answer is read: from the probabilities of the choices' tokens, or by sampling texts and counting votes,
    for a judge that reasons first or does not tell its probabilities."""
    votes: int = Field(1, ge=1)
    """Judgements that are averaged, each by a principle of its own (Bai et al. 2022, arXiv:2212.08073, Sec. 4.1) while
    there are some left."""
    max_rating: int = Field(9, ge=2, le=9)
    """Of a single completion, from 1 on: a digit is one token for every tokenizer."""
    max_questions: MayChange[int | None] = Field(None, ge=1)
    """Comparisons and ratings that each rank may ask for in a run, over all its starts; what was asked for labels or a
    step that were not kept does not count, and answers that are on disk already cost nothing. Labels are then made of
    what was answered; a policy that the judge rewards stops, to be resumed."""
    max_attempts: MayChange[int] = Field(3, ge=1)
    """For one question, before it goes without an answer."""
    cache: MayChange[bool] = True
    """Keep answers on disk, for this run after an interruption and for others."""
    max_new_tokens: int = Field(256, ge=1)
    """Of a sampled answer."""
    temperature: float = Field(1.0, gt=0, le=2)
    """Of a sampled answer."""

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        for name in ("max_new_tokens", "temperature"):
            default = type(self).model_fields[name].default
            if self.answers != "sampled" and getattr(self, name) != default:
                must = f"stay {default} with answers {self.answers}, where nothing is sampled"
                raise BrokenRule(name, getattr(self, name), must, f"remove {name}, or use answers: sampled")
        return self


class ModelJudge(_JudgeSettings):
    """A model in this process, computed by our layers and sampled by our engine."""

    backend: Literal["model"] = "model"
    name: str | None = None
    """A Hub id, a folder or a packaged model; default: the policy's own base, its adapter off, with no second copy."""
    dtype: Dtype = "auto"
    """auto: bfloat16."""
    tokens_per_batch: MayChange[int] = Field(4096, ge=1)
    """Tokens in one forward pass."""

    @model_validator(mode="after")
    def _check_unread(self) -> Self:
        sampled = self.answers == "sampled"
        _refuse_unread(self, "tokens_per_batch" if sampled else "max_attempts", self.answers)
        return self

    @model_validator(mode="after")
    def _check_dtype(self) -> Self:
        if self.name is None and self.dtype != "auto":
            must = "stay auto without name: the policy's base is as it is"
            raise BrokenRule("dtype", self.dtype, must, "remove dtype, or give name")
        return self


class EndpointJudge(_JudgeSettings):
    """A server that speaks OpenAI's chat completions: vLLM's, or any other."""

    backend: Literal["endpoint"] = "endpoint"
    url: MayChange[str] = "http://127.0.0.1:8000/v1"
    model: str
    """As the server calls it."""
    api_key_env: MayChange[str | None] = None
    """The environment variable that holds the key, a name in capitals; no key is ever in a file."""
    top_logprobs: int = Field(20, ge=2)
    """Tokens whose probabilities are asked for."""
    request_timeout_s: MayChange[float] = Field(60.0, gt=0)
    """For one attempt in all, from connecting to the answer's last byte."""
    max_concurrent: MayChange[int] = Field(16, ge=1)
    """Requests under way at one time."""
    retry_wait_s: MayChange[float] = Field(1.0, ge=0)
    """Before the second attempt; doubled before each further one. A server that asks for a longer wait (Retry-After)
    gets it, up to 120 s."""

    @model_validator(mode="after")
    def _check_unread(self) -> Self:
        if self.answers == "sampled":
            _refuse_unread(self, "top_logprobs", self.answers)
        return self

    @model_validator(mode="after")
    def _check_url(self) -> Self:
        must = "be the address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1"
        check_address("url", self.url, must=must, schemes=("http", "https"))
        return self

    @model_validator(mode="after")
    def _check_api_key_env(self) -> Self:
        if self.api_key_env is not None and not _VARIABLE.fullmatch(self.api_key_env):
            must = "name an environment variable in capitals, and never hold the key itself"
            raise BrokenRule("api_key_env", HIDDEN, must, "write for example OPENAI_API_KEY, and export the key there")
        return self


def _refuse_unread(settings: _JudgeSettings, name: str, answers: str) -> None:
    default = type(settings).model_fields[name].default
    if getattr(settings, name) != default:
        must = f"stay {default} with answers {answers}, which do not read it"
        raise BrokenRule(name, getattr(settings, name), must, f"remove {name}")


class RewardJudge(Frozen):
    """A reward model, as trainer type reward writes it, or any of `transformers`' with one label."""

    on_resume = OnResume.REFUSED
    backend: Literal["reward_model"] = "reward_model"
    name: str
    """Its folder."""


JudgeSettings = ModelJudge | EndpointJudge | RewardJudge
PromptedSettings = ModelJudge | EndpointJudge
AnyJudge = Annotated[JudgeSettings, Field(discriminator="backend")]


def fill_judge(given: Any) -> Any:
    """Settings that name no backend are those of a model in this process."""
    return {"backend": "model"} | given if isinstance(given, dict) else given
