"""Judges of completions, how their answers are read, what they may cost; and their constitutions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen, MayChange, OnResume, at_home, check_address
from alignlab.config.error_messages import BrokenRule
from alignlab.config.model import Dtype
from alignlab.errors import ConfigError
from alignlab.files.input_files import MAX_SETTINGS_BYTES, parse_yaml, read_limited
from alignlab.network.addresses import HIDDEN

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class _JudgeSettings(Frozen):
    """Settings of every judge that is asked questions."""

    on_resume = OnResume.REFUSED
    answers: Literal["probabilities", "sampled"] = "probabilities"
    """probabilities: an answer is read from the probabilities of the choices' tokens. sampled: texts are sampled and
    votes counted, for a judge that reasons first or does not report probabilities."""
    votes: int = Field(1, ge=1)
    """Judgements that are averaged, each by a principle of its own where there are enough (Bai et al. 2022,
    arXiv:2212.08073, Sec. 4.1)."""
    max_rating: int = Field(9, ge=2, le=9)
    """Highest rating of a single completion; the lowest is 1. A digit is one token for every tokenizer."""
    max_questions: MayChange[int | None] = Field(None, ge=1)
    """Limit of comparisons and ratings that each rank asks for in a run, over all its starts. Questions for labels or a
    step that were discarded do not count, nor do answers that are on disk already. At the limit, labels are made of the
    answers so far; a policy that the judge rewards stops, to be resumed."""
    max_attempts: MayChange[int] = Field(3, ge=1)
    """Attempts for one question, before it stays without an answer."""
    cache: MayChange[bool] = True
    """Keep answers on disk, for this run after an interruption and for others."""
    max_new_tokens: int = Field(256, ge=1)
    """Of a sampled answer."""
    temperature: float = Field(1.0, gt=0, le=2)
    """Of a sampled answer."""

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.answers != "sampled":
            for name in ("max_new_tokens", "temperature"):
                because = f"with answers {self.answers}, where nothing is sampled"
                self.refuse_unread(name, because, f"remove {name}, or use answers: sampled")
        return self


class ModelJudge(_JudgeSettings):
    """A model in this process, with alignlab's layers and embedded engine."""

    backend: Literal["model"] = "model"
    name: str | None = None
    """A Hub id, a folder or a packaged model; default: the policy's own base, its adapter off, with no second copy."""
    dtype: Dtype = "auto"
    """auto: bfloat16."""
    tokens_per_batch: MayChange[int] = Field(4096, ge=1)
    """Tokens in one forward pass."""

    _at_home = field_validator("name")(at_home)

    @model_validator(mode="after")
    def _check_unread(self) -> Self:
        unread = "tokens_per_batch" if self.answers == "sampled" else "max_attempts"
        self.refuse_unread(unread, f"with answers {self.answers}, which do not read it")
        if self.name is None:
            because = "without name: the policy's base is loaded already"
            self.refuse_unread("dtype", because, "remove dtype, or give name")
        return self


class EndpointJudge(_JudgeSettings):
    """A server that speaks OpenAI's chat completions: vLLM's, or any other."""

    backend: Literal["endpoint"] = "endpoint"
    url: MayChange[str] = "http://127.0.0.1:8000/v1"
    model: str
    """Name of the model at the server."""
    api_key_env: MayChange[str | None] = None
    """The environment variable that holds the key, a name in capitals; no key is ever in a file."""
    top_logprobs: int = Field(20, ge=2)
    """Number of tokens whose probabilities are requested."""
    request_timeout_s: MayChange[float] = Field(60.0, gt=0)
    """Limit of one attempt, from connecting to the answer's last byte."""
    max_concurrent: MayChange[int] = Field(16, ge=1)
    """Requests under way at one time."""
    retry_wait_s: MayChange[float] = Field(1.0, ge=0)
    """Wait before the second attempt, doubled before each further one. A server that asks for a longer wait
    (Retry-After) gets it, up to 120 s."""

    @model_validator(mode="after")
    def _check_unread(self) -> Self:
        if self.answers == "sampled":
            self.refuse_unread("top_logprobs", "with answers sampled, which do not read it")
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


class RewardJudge(Frozen):
    """A reward model: of the trainer `reward`, or any of `transformers` with one label."""

    on_resume = OnResume.REFUSED
    backend: Literal["reward_model"] = "reward_model"
    name: str
    """Its folder."""

    _at_home = field_validator("name")(at_home)


JudgeSettings = ModelJudge | EndpointJudge | RewardJudge
PromptedSettings = ModelJudge | EndpointJudge
AnyJudge = Annotated[JudgeSettings, Field(discriminator="backend")]


def fill_judge(raw: Any) -> Any:
    """Return the judge's settings with the default backend, a model in this process."""
    return {"backend": "model"} | raw if isinstance(raw, dict) else raw


class Principle(Frozen):
    """One principle, in the words of the questions to a model."""

    name: str
    prefer: str
    """The question by which two answers are compared, such as "Which answer is more honest?"."""
    rate: str
    """The question by which one answer is rated, such as "How honest is the answer?"."""
    critique: str
    """What to look for in an answer, such as "Point out where the answer is not honest."."""
    revise: str
    """The instruction after the critique, such as "Rewrite the answer so that it is honest."."""


class Constitution(Frozen):
    """Principles by which completions are criticised, revised and compared."""

    name: str
    introduction: str = ""
    """Text before every question to the judge."""
    principles: tuple[Principle, ...] = Field(min_length=1)


def load_constitution(path: str | Path) -> Constitution:
    """Load a constitution from YAML.

    Raises:
        ConfigError: the file cannot be read, or does not hold a `Constitution`.
    """
    try:
        text = read_limited(Path(path), MAX_SETTINGS_BYTES, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"the constitution {path} must be a YAML file of a name and principles: {error}") from None
    content = parse_yaml(text, f"the constitution {path}")
    if not isinstance(content, dict):
        holds = type(content).__name__
        raise ConfigError(f"the constitution {path} must hold a name and principles, and holds {holds}")
    try:
        return Constitution.model_validate(content)
    except ConfigError as error:
        raise ConfigError(f"the constitution {path}: {error}") from None
