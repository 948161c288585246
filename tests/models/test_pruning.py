"""Which weights become zero, on numbers computed by hand; and narrower students that are cut by hand too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignlab.errors import ConfigError
from alignlab.models.hub.checkpoints import load_model, new_model, save_model
from alignlab.models.pruning.calibration import CalibrationText, square_sums
from alignlab.models.pruning.importance import Importance, importance_of
from alignlab.models.pruning.masks import (
    choice,
    highest_of_groups,
    highest_of_matrix,
    highest_of_rows,
    magnitude_scores,
    wanda_scores,
)
from alignlab.models.pruning.sparsity import check_pattern, prune_by_magnitude, prune_by_wanda, sparsity_of
from alignlab.models.pruning.width import Width, check_width, narrowed
from alignlab.types import Segments

SHAPE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "use_qk_norm": True, "initializer_range": 0.3,
}
WEIGHT = torch.tensor([[1.0, -4.0, 2.0, 3.0], [-8.0, 5.0, -7.0, 6.0]])


def random_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return new_model(SHAPE | changes, vocab_size=32).eval()


def text() -> CalibrationText:
    tokens = torch.arange(40) * 7 % 29 + 2
    return CalibrationText(tokens, Segments((15, 25), (-1, -1), (0, 1), (0, 1)))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 21).view(2, 9), use_cache=False).logits


def test_the_smallest_weights_of_a_matrix_or_of_each_row_go() -> None:
    scores = magnitude_scores(WEIGHT)
    assert highest_of_matrix(scores, 0.5).tolist() == [[False] * 4, [True] * 4]
    assert highest_of_matrix(scores, 0.3).tolist() == [[False, True, False, True], [True] * 4]
    assert highest_of_rows(scores, 0.5).tolist() == [[False, True, False, True], [True, False, True, False]]
    assert highest_of_rows(scores, 0.49).tolist() == [[False, True, True, True], [True, False, True, True]]


def test_a_pattern_keeps_as_many_of_each_group() -> None:
    scores = magnitude_scores(WEIGHT)
    assert highest_of_groups(scores, 1, 2).tolist() == [[False, True, False, True], [True, False, True, False]]
    assert highest_of_groups(scores, 3, 4).tolist() == [[False, True, True, True], [True, False, True, True]]
    ties = torch.ones(1, 4)
    assert highest_of_groups(ties, 2, 4).tolist() == [[False, False, True, True]]


def test_wanda_weighs_by_the_norm_of_what_is_read() -> None:
    scores = wanda_scores(WEIGHT, torch.tensor([9.0, 1.0, 0.5, 2.0]))
    assert scores.tolist() == [[9.0, 4.0, 1.0, 6.0], [72.0, 5.0, 3.5, 12.0]]


def test_what_layers_read_is_added_up() -> None:
    layer = nn.Linear(2, 3)
    with square_sums({"a": layer}) as sums:
        layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer(torch.tensor([[[0.0, 5.0]]]))
    assert sums["a"].tolist() == [10.0, 45.0]
    layer(torch.ones(1, 2))
    assert sums["a"].tolist() == [10.0, 45.0]


def test_magnitude_takes_linear_layers_alone() -> None:
    model = random_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune_by_magnitude(model, choice(dropped=0.25, pattern=None, by_row=False))
    for name, tensor in model.state_dict().items():
        if "_proj" not in name:
            assert torch.equal(tensor, before[name]), name
            continue
        dropped = tensor == 0
        assert int(dropped.sum()) == tensor.numel() // 4, name
        assert torch.equal(tensor[~dropped], before[name][~dropped])
        assert before[name][dropped].abs().max() <= before[name][~dropped].abs().min()
    zeros, size = sparsity_of(model)
    assert zeros == size / 4


def test_wanda_prunes_a_layer_by_what_the_pruned_layers_before_it_compute() -> None:
    """The slow twin prunes one layer after the other, each by a pass of its own."""
    stays = choice(dropped=None, pattern=(2, 4), by_row=True)
    expected, model = random_model(), random_model()
    for layer in expected.model.layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        with square_sums(linears) as sums, torch.no_grad():
            tokens, segments = text()
            for start, length in zip(segments.starts, segments.lengths, strict=True):
                expected(tokens[None, start : start + length], use_cache=False)
        for name, linear in linears.items():
            kept = stays(linear.weight.detach().abs() * sums[name].sqrt())
            linear.weight.data *= kept
    prune_by_wanda(model, stays, text())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    zeros, size = sparsity_of(model)
    assert zeros == size / 2


def test_a_pattern_must_divide_the_inputs_and_experts_are_not_pruned() -> None:
    check_pattern(random_model(), 8)
    with pytest.raises(ConfigError, match=r"over 5 inputs needs a multiple of 5, and self_attn.q_proj reads 16"):
        check_pattern(random_model(), 5)
    mixture = random_model(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    with pytest.raises(ConfigError, match="stacks the weights of its experts"):
        prune_by_magnitude(mixture, choice(dropped=0.5, pattern=None, by_row=False))


def equal_importance() -> Importance:
    return Importance([torch.ones(24)] * 3, [torch.ones(2)] * 3, torch.ones(16))


def test_a_student_of_all_parts_is_its_teacher() -> None:
    teacher = random_model(tie_word_embeddings=True)
    student = narrowed(teacher, Width(24, 2, 16), equal_importance())
    assert torch.equal(logits(student), logits(teacher))


def test_neurons_heads_and_channels_that_compute_nothing_are_cut_without_a_change() -> None:
    """Dead parts are found by their importance. A dead channel is one that nothing is ever written to."""
    teacher = random_model()
    model = teacher.model
    with torch.no_grad():
        model.embed_tokens.weight[:, [0, 5]] = 0
        for layer in model.layers:
            layer.mlp.down_proj.weight[[0, 5]] = 0
            layer.self_attn.o_proj.weight[[0, 5]] = 0
            layer.mlp.gate_proj.weight[[1, 7, 23]] = 0
        model.layers[0].self_attn.v_proj.weight[:8] = 0  # the first key's heads
        model.layers[1].self_attn.v_proj.weight[8:] = 0
        model.layers[2].self_attn.v_proj.weight[:8] = 0
    importance = importance_of(teacher, text())
    student = narrowed(teacher, Width(21, 1, None), importance)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    assert student.config.num_attention_heads == 2
    # A norm divides by the mean over all channels: with 14 of 16 its output is smaller by a factor known beforehand.
    narrow = narrowed(teacher, Width(None, None, 14), importance)
    with torch.no_grad():
        for name, weight in narrow.named_parameters():
            if "layernorm" in name or name == "model.norm.weight":
                weight.mul_((16 / 14) ** 0.5)
    torch.testing.assert_close(logits(narrow), logits(teacher), rtol=1e-4, atol=1e-4)


def test_a_narrow_student_is_saved_and_read_again(tmp_path: Any) -> None:
    teacher = random_model()
    student = narrowed(teacher, Width(12, 1, 8), importance_of(teacher, text()))
    save_model(student, tmp_path / "student")
    again = load_model(str(tmp_path / "student"), dtype=torch.float32)
    assert again.config.intermediate_size == 12 and again.config.hidden_size == 8 and again.config.head_dim == 8
    assert torch.equal(logits(again), logits(student))


def test_the_importance_of_parts_is_that_of_their_outputs() -> None:
    teacher = random_model()
    seen: dict[str, Tensor] = {}
    layer = teacher.model.layers[1]
    layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.update(down=args[0]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    importance = importance_of(teacher, text())
    assert importance.neurons[1].tolist() == pytest.approx(seen["down"][0].abs().mean(0).tolist(), rel=1e-6)
    per_key = seen["out"][0].view(40, 2, 16).pow(2).sum(-1).sqrt().mean(0)
    assert importance.groups[1].tolist() == pytest.approx(per_key.tolist(), rel=1e-6)
    assert importance.channels.shape == (16,)


@pytest.mark.parametrize(
    ("changes", "width", "message"),
    [
        ({}, Width(intermediate_size=25), "intermediate_size is 25, and must be from 1 to the teacher's 24"),
        ({}, Width(num_key_value_heads=0), "num_key_value_heads is 0, and must be from 1 to the teacher's 2"),
        ({"qk_norm_scope": "all_heads"}, Width(hidden_size=8), "the teacher has Attention of another form"),
        ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, Width(hidden_size=8), "SparseFeed"),
        ({"attention_sinks": True}, Width(hidden_size=8), "the teacher has model.layers.0.self_attn.sinks"),
        ({"shared_layers": [0, 0, 1]}, Width(hidden_size=8), "widths are cut of single layers"),
    ],
)
def test_what_is_not_cut_is_refused(changes: Any, width: Width, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_width(random_model(**changes), width)
