"""Reward models on disk: sequence-classification models of one label, as `transformers` and PEFT define them.

With all weights: a `...ForSequenceClassification` folder. As an adapter: PEFT's, of task type SEQ_CLS, with the head in
`modules_to_save`. Both forms are read back, also from folders that other tools wrote.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GenericForSequenceClassification

from alignlab.errors import CheckpointError, ConfigError
from alignlab.files.input_files import read_json_object
from alignlab.files.tensor_files import write_tensors
from alignlab.models.adapters import compute_in_base_dtype, fill_adapter, load_role
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm, num_embeddings
from alignlab.models.empty import is_empty
from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.models.hub.adapter_files import (
    TENSORS,
    adapter_config,
    base_of,
    check_adapter_shapes,
    check_tensors,
    is_adapter,
)
from alignlab.models.hub.checkpoints import check_shapes, empty_model, load_headless, load_model
from alignlab.models.hub.export import adapter_tensors
from alignlab.models.hub.families import write_hub_config
from alignlab.models.hub.intact import check_folder, named_errors
from alignlab.models.hub.packaged import resolve_checkpoint
from alignlab.models.hub.saving import save_adapter_without_weights, save_without_weights
from alignlab.models.reward_model import RewardModel
from alignlab.models.transformer import PolicyForCausalLM, PolicyPreTrainedModel
from alignlab.models.weight_view import WeightsInside, WeightView, view_of, whole_tensors

HEAD = "score.weight"
_ADAPTER_HEAD = f"base_model.model.{HEAD}"
_TASK = "SEQ_CLS"
_BASE_FILE = "reward_model.json"  # beside an adapter: which base it was trained on


class PolicyForSequenceClassification(GenericForSequenceClassification, PolicyPreTrainedModel):
    """Our decoder with `transformers`' own sequence-classification head, for shapes that no Hub family has."""


AutoModelForSequenceClassification.register(PolicyConfig, PolicyForSequenceClassification, exist_ok=True)


def padded_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy whose padding token is not its end token.

    `transformers` reads the reward at the last token that is not the padding token; a sequence's own end token must not
    be taken for padding.

    Raises:
        ConfigError: there is no other special token.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    candidates = sorted(special - {tokenizer.eos_token_id}, key=lambda index: (index == tokenizer.bos_token_id, index))
    if not candidates:
        raise ConfigError(
            f"a reward model needs a padding token that is not the end token {tokenizer.eos_token!r}, and the "
            "tokenizer has no other special token; set its pad_token to a token that ends no text"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(candidates[0])
    return tokenizer


def classifier_of(model: nn.Module, pad_token_id: int) -> PreTrainedModel:
    """Return the sequence-classification model of one label, without weights, as which a reward model is saved.

    Raises:
        ConfigError: `transformers` has none for this architecture, or one with another kind of head.
    """
    lm = causal_lm(model)
    family_config = write_hub_config(lm.config) if isinstance(lm, PolicyForCausalLM) else None
    rows = num_embeddings(lm)
    if pad_token_id >= rows:
        raise ConfigError(
            f"the padding token of a reward model is id {pad_token_id}, and the model has {rows} rows of embeddings; "
            "set the tokenizer's pad_token to a token that the model has, and that ends no text"
        )
    config: Any = copy.deepcopy(lm.config) if family_config is None else family_config
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
    weights: bool = True, view: WeightView | None = None,
) -> None:
    """Write a reward model and its tokenizer so that plain `transformers`, and PEFT for an adapter, load them.

    Args:
        tokenizer: with a padding token of its own, see `padded_tokenizer`.
        base_digest: of an adapter's base; a policy with the same base can share it.
        weights: see `save_model`.
        view: of the weights of `reward`; default: `view_of` it.
    """
    folder, view = Path(folder), view or view_of(reward)
    if not weights:
        try_reward_model(reward.model, folder, tokenizer, WeightsInside(view, "model"))
        return
    if isinstance(reward.model, PeftModel):
        _save_adapter(reward, reward.model, folder, base_digest, view)
    else:
        twin = _classifier_over(reward.model, tokenizer, WeightsInside(view, "model"))
        twin.load_state_dict({HEAD: view.whole(HEAD)}, strict=False, assign=True)
        twin.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def try_reward_model(
    model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase, view: WeightView | None = None
) -> None:
    """Write all but the weights of the reward model that a language model, with or without its weights, becomes.

    Args:
        tokenizer: with a padding token of its own, see `padded_tokenizer`.
        view: of the model's weights; default: `view_of` it.

    Raises:
        ConfigError, CheckpointError: it cannot be saved.
    """
    if isinstance(model, PeftModel):
        classifier_of(model, tokenizer.pad_token_id)
        save_adapter_without_weights(model, folder)
    else:
        save_without_weights(_classifier_over(model, tokenizer, view or view_of(model)), folder)
    tokenizer.save_pretrained(folder)


def _classifier_over(model: nn.Module, tokenizer: PreTrainedTokenizerBase, view: WeightView) -> PreTrainedModel:
    """Return the sequence-classification model over a language model's own tensors; the head has none yet."""
    twin = classifier_of(model, tokenizer.pad_token_id)
    names = tuple(twin.base_model.state_dict())  # without what an MoE counts, which no Hub family has
    decoder = WeightsInside(view, causal_lm(model).base_model_prefix)
    twin.base_model.load_state_dict(dict(whole_tensors(decoder, names)), assign=True)
    return twin


def _save_adapter(
    reward: RewardModel, model: PeftModel, folder: Path, base_digest: str | None, view: WeightView
) -> None:
    name = reward.role or model.active_adapter
    config: Any = copy.deepcopy(model.peft_config[name])
    config.task_type, config.modules_to_save, config.inference_mode = _TASK, ["score"], True
    config.base_model_name_or_path = config.base_model_name_or_path or causal_lm(model).config.name_or_path or None
    config.save_pretrained(str(folder))
    tensors = adapter_tensors(model, name, WeightsInside(view, "model")) | {_ADAPTER_HEAD: view.whole(HEAD)}
    write_tensors(tensors, folder / TENSORS, {"format": "pt"})
    base = {"base_digest": base_digest, "base_dtype": str(causal_lm(model).dtype).removeprefix("torch.")}
    (folder / _BASE_FILE).write_text(json.dumps(base) + "\n")


def load_reward_model(
    name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
    base: PreTrainedModel | None = None,
) -> RewardModel:
    """Return the reward model of a folder or Hub id, in evaluation mode, on a model of its own.

    Args:
        dtype: default: that it was trained in.
        base: of an adapter; default: the one that it names.

    Raises:
        CheckpointError: it is not a reward model, or cannot be loaded.
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
        if is_empty(model):
            check_adapter_shapes(model, path)
        else:
            fill_adapter(model, model.active_adapter, tensors)
        return _with_head(RewardModel(model), head, name).eval()
    head = _read_head(path, name)
    return _with_head(RewardModel(load_headless(path, dtype=dtype, device=device)), head, name).eval()


def check_reward_model(name: str) -> None:
    """Raise if the weights of a reward model's folder have other names or shapes than its config says; none is read.

    Raises:
        CheckpointError: naming the first of them, or see `load_reward_model`.
    """
    path = resolve_checkpoint(name)
    check_folder(path)
    if is_adapter(path):
        config, _, _ = _read_adapter(path)
        check_adapter_shapes(get_peft_model(empty_model(base_of(path)), config), path)
    else:
        check_shapes(name, path, headless=True)


def load_reward_role(model: PeftModel, name: str, role: str) -> RewardModel:
    """Return the reward model of an adapter's folder as another role on a policy's frozen base.

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
    """Return the digest of the base that a reward model's adapter was trained on; None if its folder has none."""
    return _base_facts(resolve_checkpoint(name)).get("base_digest")


def is_reward_model(path: str) -> bool:
    """Return True if a local folder holds a sequence-classification model, or an adapter for one."""
    if is_adapter(path):
        return bool(adapter_config(path).task_type == _TASK)
    config = Path(path) / "config.json"
    kinds = _read_object(config).get("architectures") if config.is_file() else None
    return isinstance(kinds, list) and any(str(kind).endswith("ForSequenceClassification") for kind in kinds)


def _base_facts(path: str) -> dict[str, Any]:
    file = Path(path) / _BASE_FILE
    return _read_object(file) if file.is_file() else {}


def _read_object(file: Path) -> dict[str, Any]:
    return read_json_object(file, CheckpointError)


def _base(path: str, dtype: torch.dtype | None, device: torch.device | str) -> Any:
    name, dtype_name = base_of(path), _base_facts(path).get("base_dtype")
    if dtype is None:
        with named_errors(f"the dtype of the base of {path} is not known", "Copy the adapter again"):
            checkpoint = resolve_checkpoint(name)
            dtype = getattr(torch, dtype_name) if dtype_name else AutoConfig.from_pretrained(checkpoint).dtype
    return load_model(name, dtype=dtype or torch.float32, device=device)


def _read_adapter(path: str) -> tuple[PeftConfig, dict[str, Tensor], Tensor]:
    """Return (config of an adapter on a causal language model, its tensors, the head)."""
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
    """Return the head of a full checkpoint."""
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
    weight = reward.score.weight
    if head.shape != weight.shape:
        raise CheckpointError(
            f"the head of {name} is {list(head.shape)}, and a reward model's on this base is {list(weight.shape)}; it "
            "must have one label, on a base of the same width"
        )
    with torch.no_grad():
        weight.copy_(head)
    loaded = reward.named_parameters() if reward.role is None else [(HEAD, head)]
    check_finite(loaded, f"the weights of the reward model {name}", fix=TAKE_ANOTHER)
    return reward.requires_grad_(False) if reward.role is None else reward
