"""Reward models on disk: what `transformers` and PEFT call a sequence-classification model of one label.

All weights: a `...ForSequenceClassification` folder. An adapter: PEFT's, of task type SEQ_CLS, with the head in
`modules_to_save`. Both are read back here, and so are those that others wrote, whatever the rest of their training was.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GenericForSequenceClassification

from alignlab.config.input_limits import read_json_object
from alignlab.errors import CheckpointError, ConfigError
from alignlab.models.adapter_files import TENSORS, adapter_config, base_of, check_tensors, is_adapter
from alignlab.models.adapters import compute_in_base_dtype, fill_adapter, load_role
from alignlab.models.attention import causal_lm, num_embeddings
from alignlab.models.checkpoints import load_headless, load_model
from alignlab.models.config import PolicyConfig
from alignlab.models.families import write_hub_config
from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.models.intact import check_folder, named_errors
from alignlab.models.packaged import resolve_checkpoint
from alignlab.models.reward_model import RewardModel
from alignlab.models.saving import save_adapter_without_weights, save_without_weights
from alignlab.models.transformer import PolicyForCausalLM, PolicyPreTrainedModel

HEAD = "score.weight"
_ADAPTER_HEAD = f"base_model.model.{HEAD}"
_TASK = "SEQ_CLS"
_BASE_FILE = "reward_model.json"  # beside an adapter: which base it was trained on


class PolicyForSequenceClassification(GenericForSequenceClassification, PolicyPreTrainedModel):
    """Our decoder with `transformers`' own sequence-classification head, for shapes that no Hub family has."""


AutoModelForSequenceClassification.register(PolicyConfig, PolicyForSequenceClassification, exist_ok=True)


def padded_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose padding token is not its end token.

    `transformers` reads the reward at the last token that is not the padding token; a sequence's own end token must not
    be taken for padding.

    Raises:
        ConfigError: there is no other special token.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    others = sorted(special - {tokenizer.eos_token_id}, key=lambda index: (index == tokenizer.bos_token_id, index))
    if not others:
        raise ConfigError(
            f"a reward model needs a padding token that is not the end token {tokenizer.eos_token!r}, and the "
            "tokenizer has no other special token; set its pad_token to a token that ends no text"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[0])
    return tokenizer


def classifier_of(model: nn.Module, pad_token_id: int) -> PreTrainedModel:
    """The sequence-classification model, of one label and without weights, that a language model is to be saved as.

    Raises:
        ConfigError: `transformers` has none for this architecture, or one with another kind of head.
    """
    lm = causal_lm(model)
    own = write_hub_config(lm.config) if isinstance(lm, PolicyForCausalLM) else None
    rows = num_embeddings(lm)
    if pad_token_id >= rows:
        raise ConfigError(
            f"the padding token of a reward model is id {pad_token_id}, and the model has {rows} rows of embeddings; "
            "set the tokenizer's pad_token to a token that the model has, and that ends no text"
        )
    config: Any = copy.deepcopy(lm.config) if own is None else own
    config.num_labels, config.pad_token_id, config.dtype = 1, pad_token_id, lm.dtype
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            twin = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    except ValueError as error:
        raise ConfigError(
            f"transformers has no sequence-classification model of {type(lm).__name__}, which a reward model is saved "
            f"as: {error}; use a model of another architecture"
        ) from error
    head = getattr(twin, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or twin.base_model_prefix != lm.base_model_prefix:
        raise ConfigError(
            f"{type(twin).__name__} has another head than a reward model's, a linear layer `score` without a bias; "
            "use a model of another architecture"
        )
    return twin


def save_reward_model(
    reward: RewardModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase, *, base_digest: str | None = None,
    weights: bool = True,
) -> None:
    """Write a reward model and its tokenizer so that plain `transformers`, and PEFT for an adapter, load them.

    Args:
        tokenizer: with a padding token of its own, see `padded_tokenizer`.
        base_digest: of an adapter's base, by which it is known to be a policy's base too.
        weights: see `save_model`.
    """
    folder = Path(folder)
    if not weights:
        try_reward_model(reward.model, folder, tokenizer)
        return
    if isinstance(reward.model, PeftModel):
        _save_adapter(reward, reward.model, folder, base_digest)
    else:
        twin = _classifier_over(reward.model, tokenizer)
        twin.load_state_dict({HEAD: reward.score.weight.detach()}, strict=False, assign=True)
        twin.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def try_reward_model(model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all but the weights of the reward model that a language model, with or without its weights, becomes.

    Args:
        tokenizer: with a padding token of its own, see `padded_tokenizer`.

    Raises:
        ConfigError, CheckpointError: it cannot be saved.
    """
    if isinstance(model, PeftModel):
        classifier_of(model, tokenizer.pad_token_id)
        save_adapter_without_weights(model, folder)
    else:
        save_without_weights(_classifier_over(model, tokenizer), folder)
    tokenizer.save_pretrained(folder)


def _classifier_over(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The sequence-classification model over the language model's own tensors, without a head's."""
    twin = classifier_of(model, tokenizer.pad_token_id)
    known = twin.base_model.state_dict()  # without what an MoE counts, which no Hub family has
    decoder = causal_lm(model).base_model.state_dict()
    twin.base_model.load_state_dict({name: decoder[name] for name in known}, assign=True)
    return twin


def _save_adapter(reward: RewardModel, model: PeftModel, folder: Path, base_digest: str | None) -> None:
    name = reward.role or model.active_adapter
    config: Any = copy.deepcopy(model.peft_config[name])
    config.task_type, config.modules_to_save, config.inference_mode = _TASK, ["score"], True
    config.base_model_name_or_path = config.base_model_name_or_path or causal_lm(model).config.name_or_path or None
    config.save_pretrained(str(folder))
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_file(tensors | {_ADAPTER_HEAD: reward.score.weight.detach()}, folder / TENSORS, {"format": "pt"})
    told = {"base_digest": base_digest, "base_dtype": str(causal_lm(model).dtype).removeprefix("torch.")}
    (folder / _BASE_FILE).write_text(json.dumps(told) + "\n")


def load_reward_model(
    name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
    base: PreTrainedModel | None = None,
) -> RewardModel:
    """The reward model of a folder or Hub id, in evaluation mode, on a model of its own.

    Args:
        dtype: default: that it was trained in.
        base: of an adapter; default: the one that it names.

    Raises:
        CheckpointError: it is no reward model, or cannot be loaded.
        NumericsError: a weight of it is not finite.
    """
    path = resolve_checkpoint(name)
    if Path(path).is_dir():
        path = str(Path(path).resolve())
        check_folder(path)
    if is_adapter(path):
        config, tensors, head = _read_adapter(path)
        if base is None:
            base = _base(path, dtype, device)
        config.base_model_name_or_path = None  # PEFT takes it from the base
        model = compute_in_base_dtype(get_peft_model(base, config))
        fill_adapter(model, model.active_adapter, tensors)
        return _with_head(RewardModel(model), head, name).eval()
    head = _read_head(path, name)
    return _with_head(RewardModel(load_headless(path, dtype=dtype, device=device)), head, name).eval()


def load_reward_role(model: PeftModel, name: str, role: str) -> RewardModel:
    """The reward model of an adapter's folder as another role on a policy's frozen base.

    Raises:
        CheckpointError: it is no reward model's adapter, or does not fit the base.
        NumericsError: a weight of it is not finite.
    """
    check_folder(name)
    config, tensors, head = _read_adapter(name)
    check_finite(tensors.items(), f"the weights of the reward model {name}", fix=TAKE_ANOTHER)
    if role in model.peft_config:
        model.delete_adapter(role)  # an earlier trainer's
    load_role(model, role, config, tensors)
    return _with_head(RewardModel(model, role=role), head, name)


def known_base(name: str) -> str | None:
    """The digest of the base that a reward model's adapter was trained on; None where none is known."""
    return _told(resolve_checkpoint(name)).get("base_digest")


def is_reward_model(path: str) -> bool:
    """Whether a local folder holds a sequence-classification model, or an adapter for one."""
    if is_adapter(path):
        return bool(adapter_config(path).task_type == _TASK)
    config = Path(path) / "config.json"
    kinds = _read_object(config).get("architectures") if config.is_file() else None
    return isinstance(kinds, list) and any(str(kind).endswith("ForSequenceClassification") for kind in kinds)


def _told(path: str) -> dict[str, Any]:
    file = Path(path) / _BASE_FILE
    return _read_object(file) if file.is_file() else {}


def _read_object(file: Path) -> dict[str, Any]:
    return read_json_object(file, CheckpointError)


def _base(path: str, dtype: torch.dtype | None, device: torch.device | str) -> Any:
    name, known = base_of(path), _told(path).get("base_dtype")
    if dtype is None:
        with named_errors(f"the dtype of the base of {path} is not known", "Copy the adapter again"):
            dtype = getattr(torch, known) if known else AutoConfig.from_pretrained(resolve_checkpoint(name)).dtype
    return load_model(name, dtype=dtype or torch.float32, device=device)


def _read_adapter(path: str) -> tuple[PeftConfig, dict[str, Tensor], Tensor]:
    """(config of an adapter on a causal language model, its tensors, the head)."""
    config: Any = adapter_config(path)
    check_tensors(path)
    tensors = load_file(Path(path) / TENSORS)
    if config.task_type != _TASK or _ADAPTER_HEAD not in tensors:
        raise CheckpointError(
            f"{path} must be the adapter of a reward model (task_type {_TASK}, with {_ADAPTER_HEAD}), and has "
            f"task_type {config.task_type}; give a folder that trainer type reward wrote"
        )
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
    return config, tensors, tensors.pop(_ADAPTER_HEAD)


def _read_head(path: str, name: str) -> Tensor:
    """The head of a full checkpoint."""
    if not is_reward_model(path):
        raise CheckpointError(
            f"{name} must be a local folder of a reward model, a ...ForSequenceClassification of one label, and is "
            "not; give a folder that trainer type reward wrote, or download the checkpoint first"
        )
    for file in sorted(Path(path).glob("*.safetensors")):
        with named_errors(f"{file} is damaged", "Copy the folder again"), safe_open(file, "pt") as tensors:
            if HEAD in tensors.keys():  # noqa: SIM118  not a mapping
                head: Tensor = tensors.get_tensor(HEAD)
                return head
    raise CheckpointError(f"{name} holds no {HEAD} in its safetensors; its head must be a linear layer called score")


def _with_head(reward: RewardModel, head: Tensor, name: str) -> RewardModel:
    wanted = reward.score.weight
    if head.shape != wanted.shape:
        raise CheckpointError(
            f"the head of {name} is {list(head.shape)}, and a reward model's on this base is {list(wanted.shape)}; it "
            "must have one label, on a base of the same width"
        )
    with torch.no_grad():
        wanted.copy_(head)
    own = reward.named_parameters() if reward.role is None else [(HEAD, head)]
    check_finite(own, f"the weights of the reward model {name}", fix=TAKE_ANOTHER)
    return reward.requires_grad_(False) if reward.role is None else reward
