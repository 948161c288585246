"""Exports, digests and files read from weights that are spread over ranks, against those of a whole model."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.files.tensor_files import write_tensors
from alignlab.models.config import PolicyConfig
from alignlab.models.fingerprints import model_digest, model_fingerprint, tensor_digests
from alignlab.models.hub.checkpoints import load_model, save_model
from alignlab.models.hub.export import adapter_tensors, base_tensors, checkpoint_shapes, merged_tensors, write_base
from alignlab.models.hub.reward_checkpoints import padded_tokenizer, save_reward_model
from alignlab.models.reward_model import RewardModel
from alignlab.models.sync_digests import sync_digests
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.models.weight_view import WeightsInside, parameter_names, view_of, whole_tensors
from alignlab.rollout.vllm.backend import Transfer
from alignlab.rollout.vllm.policy_weights import PolicyWeights
from tests.models.conftest import SIZES
from tests.models.test_merging import FORMS, MOE, adapted, folder_of


class TwoRanks:
    """Weights of which a module holds the first halves, and another rank the others; cuts the module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._names = tuple(module.state_dict())
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}
        self._local = view_of(module)
        self._other = {name: self._half(tensor.detach(), 1) for name, tensor in module.state_dict().items()}
        for parameter in module.parameters():
            parameter.data = self._half(parameter.data, 0)

    @staticmethod
    def _half(tensor: Tensor, rank: int) -> Tensor:
        middle = tensor.numel() // 2
        return (tensor.flatten()[:middle] if rank == 0 else tensor.flatten()[middle:]).clone()

    def names(self) -> tuple[str, ...]:
        return self._names

    def whole(self, name: str) -> Tensor:
        if name not in self._shapes:  # a buffer
            return self.local(name)
        return torch.cat([self.local(name), self._other[name]]).view(self._shapes[name])

    def empty(self, name: str) -> Tensor:
        return self.whole(name).to("meta")

    def local(self, name: str) -> Tensor:
        return self._local.local(name)


def make(form: str, tmp_path, *, tied: bool) -> nn.Module:
    if form == "experts":
        torch.manual_seed(0)
        return PolicyForCausalLM(PolicyConfig(**SIZES, **MOE, tie_word_embeddings=tied)).eval()
    base = load_model(folder_of(tmp_path, tied=tied), dtype=torch.float32)
    return base if form == "whole" else adapted(base, form)


def files_of(folder) -> dict[str, str]:
    return {name: digest for path in sorted(folder.glob("*.safetensors"))
            for name, digest in tensor_digests(load_file(path)).items()}  # fmt: skip


ADAPTED = ("plain", "dora", "lora_bias", "embeddings", "modules_to_save", "tokens")


@pytest.mark.parametrize(
    ("form", "tied"),
    [*((form, True) for form in ("whole", *ADAPTED)), *((form, False) for form in ("whole", "experts", "plain"))],
)
def test_weights_on_two_ranks_give_the_same_export_digest_and_files_as_a_whole_model(form, tied, tmp_path):
    model = make(form, tmp_path, tied=tied)
    cut = copy.deepcopy(model)
    view = TwoRanks(cut)
    assert all(a.numel() != b.numel() for a, b in zip(model.parameters(), cut.parameters(), strict=True))

    assert tensor_digests(merged_tensors(cut, view)) == tensor_digests(merged_tensors(model))
    assert tensor_digests(base_tensors(cut, view)) == tensor_digests(base_tensors(model))
    assert model_digest(cut, view) == model_digest(model)
    assert model_fingerprint(cut, view) == model_fingerprint(model)
    if form in FORMS:
        assert tensor_digests(adapter_tensors(cut, weights=view)) == tensor_digests(adapter_tensors(model))
    for write in (lambda m, v, folder: write_base(m, folder, v), lambda m, v, folder: save_model(m, folder, view=v)):
        for name, held, weights in (("model", model, None), ("cut", cut, view)):
            (tmp_path / name).mkdir(exist_ok=True)
            write(held, weights, tmp_path / name)
        assert files_of(tmp_path / "cut") == files_of(tmp_path / "model")


@pytest.mark.parametrize(("form", "adapter_only"), [("whole", False), ("plain", False), ("plain", True)])
def test_an_update_of_vllm_is_made_from_weights_on_two_ranks(form, adapter_only, tmp_path):
    model = make(form, tmp_path, tied=True)
    cut = copy.deepcopy(model)
    update = PolicyWeights(cut, adapter_only=adapter_only, weights=TwoRanks(cut))
    expected = adapter_tensors(model) if adapter_only else merged_tensors(model)
    tensors = dict(update)
    assert tensor_digests(tensors) == tensor_digests(expected)
    assert any("embed_tokens" in name for name in tensors) != adapter_only
    assert update.size == Transfer(len(tensors), sum(tensor.nbytes for tensor in tensors.values()))
    if not adapter_only:
        assert update.digests() == sync_digests(expected)


@pytest.mark.parametrize("form", ["whole", "experts", *ADAPTED])
def test_shapes_of_a_checkpoint_are_known_before_its_weights_are_read(form, tmp_path):
    model = make(form, tmp_path, tied=form != "experts")
    shapes = {name: (empty.shape, empty.dtype) for name, empty in checkpoint_shapes(model).items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in merged_tensors(model).items()}


def test_an_update_holds_no_more_than_a_layer_s_tensors(tmp_path):
    model = make("plain", tmp_path, tied=True)
    view, read = TwoRanks(model), []
    whole = view.whole
    view.whole = lambda name: read.append(name) or whole(name)  # type: ignore[method-assign]
    layers = []
    for name, _ in PolicyWeights(model, adapter_only=False, weights=view):
        layers.append({name.partition(".layers.")[2].partition(".")[0] for name in read if ".layers." in name})
        read.clear()
    assert max(map(len, layers)) == 1 and set.union(*layers) == {"0", "1"}


@pytest.mark.parametrize("form", ["whole", "plain"])
def test_a_reward_model_on_two_ranks_is_saved_as_a_whole_one(form, tmp_path):
    tokenizer = padded_tokenizer(train_tokenizer(["abc abd ab ba 123"], vocab_size=262))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(2)
    reward = RewardModel(make(form, tmp_path, tied=True))
    cut = copy.deepcopy(reward)
    save_reward_model(reward, tmp_path / "reward", tokenizer)
    save_reward_model(cut, tmp_path / "cut", tokenizer, view=TwoRanks(cut))
    files = files_of(tmp_path / "cut")
    assert files == files_of(tmp_path / "reward") and any("score" in name for name in files)


def test_digests_tell_models_apart_that_differ_in_the_other_ranks_half(tmp_path):
    model = make("whole", tmp_path, tied=False)
    other = copy.deepcopy(model)
    other.lm_head.weight.data[-1, -1] += 1
    digests = []
    for each in (model, other):
        view = TwoRanks(each)
        digests.append((model_digest(each, view), model_fingerprint(each, view)))
    assert digests[0][0] != digests[1][0]
    assert digests[0][1] == digests[1][1], "a fingerprint reads a few values of each tensor"


def test_names_list_tied_weights_under_both_names_and_parameters_once(tmp_path):
    model = make("whole", tmp_path, tied=True)
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    assert tied <= set(view_of(model).names())
    assert tied & set(parameter_names(model)) == {"model.embed_tokens.weight"}


def test_a_view_of_an_inner_module_has_its_names_and_tensors(tmp_path):
    model = make("whole", tmp_path, tied=False)
    inside = WeightsInside(view_of(model), "model.layers.1")
    state = model.model.layers[1].state_dict()
    assert inside.names() == tuple(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole_tensors(inside))
    assert WeightsInside(view_of(model), "").names() == view_of(model).names()


def test_replaced_parameters_are_seen(tmp_path):
    model = make("whole", tmp_path, tied=False)
    view = view_of(model)
    model.lm_head.weight = nn.Parameter(torch.ones_like(model.lm_head.weight))
    assert view.whole("lm_head.weight").eq(1).all() and not view.whole("lm_head.weight").requires_grad


def test_files_of_tensors_are_those_of_safetensors_and_may_share_memory(tmp_path):
    from safetensors.torch import save_file

    base = torch.randn(4, 3)
    kinds = (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    tensors = {str(kind): base.to(kind) for kind in kinds} | {"scalar": torch.tensor(3.0), "none": torch.empty(0, 3)}
    write_tensors(tensors, tmp_path / "ours", {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()

    write_tensors({"a": base, "same": base, "row": base[1], "transposed": base.T}, tmp_path / "shared")
    loaded = load_file(tmp_path / "shared")
    assert torch.equal(loaded["same"], base) and torch.equal(loaded["row"], base[1])
    assert torch.equal(loaded["transposed"], base.T)
