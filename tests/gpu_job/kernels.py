"""Kernels against slow twins: packed attention, grouped experts; and the host's waits for the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from alignlab.functional.logprobs import chunked_logprobs
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.moe import Experts
from alignlab.models.packed_attention import packed_attention
from alignlab.models.policy import Policy
from alignlab.types import Experience, Segments
from tests.gpu_job.lines import Line, checked, relative_error
from tests.models.conftest import make_segments
from tests.reference.attention import dense_attention
from tests.reference.moe import mixture

PACKS = {
    "one block": [(100, [])], "odd lengths": [(37, [101, 3, 64]), (129, [])],
    "a long prompt": [(300, [77] * 4)], "many": [(17, [5, 9])] * 20,
}  # fmt: skip
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
DENSE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MIXTURE = {**DENSE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def attention(device: torch.device) -> Iterator[Line]:
    """Yield the errors of packed attention, forward and backward, against one dense mask in float64."""
    for name, groups in PACKS.items():
        segments = make_segments(groups)
        for dtype, limit in LIMITS.items():
            for window in (None, 50):
                error = max(_attention_errors(segments, dtype, window, device))
                sees = "all" if window is None else f"a window of {window}"
                yield checked(f"attention: {name}, {str(dtype)[6:]}, {sees}", error, limit)


def _attention_errors(segments: Segments, dtype: torch.dtype, window: int | None, device: torch.device) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, segments.num_tokens, 64) for heads in (8, 2, 2)]
    x = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    exact_x = [value.detach().double().cpu().requires_grad_() for value in x]
    options = {"scaling": 0.125, "sliding_window": window}
    ours = packed_attention(x[0], x[1], x[2], segments.to(device), **options)
    exact = dense_attention(exact_x[0], exact_x[1], exact_x[2], segments, **options)
    grad = torch.randn(ours.shape, generator=generator).to(dtype)
    ours.backward(grad.to(device))
    exact.backward(grad.double())
    pairs = [(ours, exact), *((a.grad, b.grad) for a, b in zip(x, exact_x, strict=True))]
    return [relative_error(a.detach(), b.detach()) for a, b in pairs if a is not None and b is not None]


def experts(device: torch.device) -> Iterator[Line]:
    """Yield the errors of experts, some of which have no token, against one token and one expert at a time."""
    config = PolicyConfig(**MIXTURE, vocab_size=10)
    for dtype, limit in LIMITS.items():
        torch.manual_seed(0)
        module = Experts(config)
        for weight in module.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        module.to(device, dtype)
        hidden = torch.randn(37, config.hidden_size).to(device, dtype).requires_grad_()
        choices = torch.randint(0, 3, (37, 1)).repeat(1, 2)  # of eight experts three have tokens
        choices[:, 1] += 3
        gates = torch.rand(37, 2)
        output = module(hidden, choices.to(device), gates.to(device))
        output.sum().backward()
        exact_hidden = hidden.detach().double().cpu().requires_grad_()
        gate_up, down = (weight.detach().double().cpu() for weight in (module.gate_up_proj, module.down_proj))
        exact = mixture(exact_hidden, gate_up, down, choices, gates.double())
        exact.sum().backward()
        assert hidden.grad is not None and exact_hidden.grad is not None
        errors = relative_error(output.detach(), exact.detach()), relative_error(hidden.grad, exact_hidden.grad)
        yield checked(f"experts, two of eight idle, {str(dtype)[6:]}", max(errors), limit)


def head(device: torch.device) -> Iterator[Line]:
    """Yield the errors of log-probs and of a trained head's gradients, over several chunks, against float64."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((700, 64), (1000, 64)))
    targets = torch.randint(0, 1000, (700,), generator=generator)
    for dtype, limit in LIMITS.items():
        ours = [x.clone().to(device, dtype).requires_grad_() for x in (hidden, weight)]
        exact = [x.to(dtype).double().requires_grad_() for x in (hidden, weight)]
        logprobs, _ = chunked_logprobs(*ours, targets.to(device), chunk_tokens=256)
        logprobs.sum().backward()
        expected = torch.log_softmax(exact[0] @ exact[1].T, -1).gather(1, targets[:, None])[:, 0]
        expected.sum().backward()
        pairs = [(logprobs, expected), *((_gradient(a), _gradient(b)) for a, b in zip(ours, exact, strict=True))]
        error = max(relative_error(a.detach(), b.detach()) for a, b in pairs)
        yield checked(f"log-probs and a trained head, {str(dtype)[6:]}", error, limit)


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def waits(device: torch.device) -> Iterator[Line]:
    """Yield whether a policy's forward and backward pass makes the host wait for the device."""
    for kind, architecture in (("dense", DENSE), ("mixture", MIXTURE)):
        name = f"no wait in a forward and backward pass, {kind}"
        if device.type != "cuda":
            yield Line(name, "skipped", "the CPU computes at once")
            continue
        policy = Policy(new_model(architecture, vocab_size=300, dtype=torch.bfloat16).to(device))
        problem = _first_wait(policy, device)
        yield Line(name, "failed" if problem else "ok", problem)


def _first_wait(policy: Policy, device: torch.device) -> str:
    """Return torch's message about the first operation that waits for the device; empty without one."""
    segments = make_segments([(40, [30, 21]), (60, [10])])
    tokens = torch.randint(0, 300, (segments.num_tokens,))
    pack = Experience(tokens, segments, segments.sequence_of_token >= 0).to(device)
    _forward_and_backward(policy, pack)  # compiles
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _forward_and_backward(policy, pack)
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _forward_and_backward(policy: Policy, pack: Experience) -> None:
    policy(pack.tokens, pack.segments, pack.completion_mask).logprobs.sum().backward()
