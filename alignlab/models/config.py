"""The configuration of an in-house policy: one transformer whose layers are chosen one at a time.

Field names are Hugging Face's, where it has one. Annotations here must be types, not strings: `strict` checks them.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from alignlab.models.config_rules import require as _require
from alignlab.models.config_rules import require_size
from alignlab.models.layer_sharing import check_sharing
from alignlab.models.router_rules import check_no_router, check_router

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@strict
class PolicyConfig(PreTrainedConfig):
    """Shape of a `PolicyForCausalLM`.

    Attributes:
        num_key_value_heads: None is multi-head attention, 1 multi-query; numbers between are grouped-query.
        head_dim: None is hidden_size / num_attention_heads.
        rope_parameters: Hugging Face's dictionary: rope_theta, rope_type (default, linear, llama3, yarn,
            longrope), its options;
            partial_rotary_factor is the part of each head that is rotated, its first numbers.
        rope_local_base_freq: rope_theta of layers with a window, which rotate by it unscaled, as in Gemma 3; None
            rotates them as the others.
        no_rope_layers: 1 for each layer that rotates by positions and 0 for each that does not, as Hugging Face has it;
            None rotates in all.
        attention_bias: biases of the query, key and value projections.
        attention_out_bias: bias of the output projection; None follows `attention_bias`.
        use_qk_norm: norm of the queries and keys before the rotation.
        qk_norm_scope: "head" norms each head apart, as in Qwen3; "all_heads" norms all heads of a token together, as in
            OLMo 2.
        query_pre_attn_scalar: scores are divided by its square root; None is the size of a query's head.
        norm_type: of all norms: "rmsnorm", "zero_centered_rmsnorm" (multiplies by 1 + weight, as in Gemma) or
            "layernorm".
        norm_position: "pre" norms what attention and feed-forward read; "post" what they give, before it is added to
            the residual stream, as in OLMo 2; "sandwich" both, as in Gemma.
        parallel_attn: attention and feed-forward read one norm of the layer's input, and both are added to it.
        residual_dropout: part of what attention and feed-forward give that is dropped before it is added to the
            residual stream, in trainers that compare no log-probs, see `dropout`.
        rms_norm_eps: epsilon of all norms, whatever their type.
        hidden_act: "silu", "gelu", "gelu_pytorch_tanh" or "relu", of feed-forwards and experts.
        mlp_gated: feed-forwards are gated (SwiGLU with silu); false is two matrices with the activation between.
        fused_projections: queries, keys and values are one matrix, and a feed-forward's gate and up another, as in
            Phi-3.
        embedding_multiplier: of the embeddings, rounded to their dtype; None is 1.
        num_mtp_layers: 1 has a layer that predicts the token after the next, see `mtp`; 0 has none.
        mtp_mlp_layer_type: its feed-forward is "dense", or "sparse" with experts, as in DeepSeek-V3.
        mtp_loss_coef: weight of its loss.
        mtp_detach: its loss trains that layer alone, and not the trunk, the embeddings and the head.
        layer_types: kind of attention of each layer, see `attention_kinds`; None is "full_attention" everywhere.
        shared_layers: for each layer the block of weights that it computes with, counted from 0, such as [0, 0, 1, 1];
            None gives each layer its own. See `layer_sharing`.
        sliding_window: tokens that a sliding layer sees, itself included.
        attention_sinks: a learned logit of each head in the softmax, which takes a share and adds nothing.
        q_lora_rank, kv_lora_rank: sizes of the latents of queries (None has none), and of keys and values, in layers
            with latent attention.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: sizes of the parts of a latent layer's query head without and
            with rotation, and of its value head.
        rope_interleave: latent layers rotate pairs of neighbouring numbers, and not of halves; None is True.
        num_attention_experts: heads that a layer of kind mixture_of_heads has; a token uses `num_attention_heads`.
        attention_router_aux_loss_coef: weight of the Switch balance loss of these layers.
        linear_num_key_heads, linear_num_value_heads, linear_key_head_dim, linear_value_head_dim: heads of recurrent
            layers, and their sizes; value heads are divided among the key heads.
        linear_conv_kernel_dim: tokens that the convolution of a recurrent layer reads, itself included.
        latent_norm_eps: epsilon of the norms of latents; None is `rms_norm_eps`.
        attn_logit_softcapping, final_logit_softcapping: logits become cap * tanh(logits / cap).
        mlp_layer_types: "dense" or "sparse" for each layer; None is sparse everywhere if there are experts.
        num_experts: routed experts of a sparse layer; 0 is a dense model.
        expert_bias: experts have biases, and the layout of gpt-oss, see `moe.BiasedExperts`.
        swiglu_limit: the gates of routed experts are cut off above it, and what they multiply on both sides, as in
            gpt-oss, see `layers.clamped_swiglu`; None computes `hidden_act`.
        swiglu_alpha: factor of the sigmoid there.
        n_shared_experts: experts that compute every token, each of `moe_intermediate_size` unless
            `shared_expert_intermediate_size` is given, which is the size of all together.
        shared_expert_gate: the shared experts' output is multiplied by the sigmoid of a number that each token has.
        router_type: "topk", "noisy_topk", "hash", "base", "sinkhorn", "expert_choice" or "reinforce"; see `routers`.
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus" of the router's logits.
        topk_method: "greedy"; "group_limited_greedy" or "noaux_tc" take experts of each token's best groups alone,
            whose score is that of their best expert, or the sum of their two best, bias included.
        n_group: groups of consecutive experts, such as those of one device.
        topk_group: groups that a token may use.
        capacity_factor: an expert takes factor * tokens * num_experts_per_tok / num_experts tokens of a pass, and drops
            others; None drops none.
        capacity_priority: "order" or "score", which tokens come first.
        norm_topk_prob: gates of a token's experts sum to 1.
        routed_scaling_factor: multiplies the gates.
        router_aux_loss_coef, router_z_loss_coef: weights of each token's and layer's Switch balance loss and z-loss.
        router_seq_aux_loss_coef, router_device_aux_loss_coef, router_comm_aux_loss_coef: weights of the losses that
            balance each sequence, groups of experts, and the tokens sent to each group.
        router_importance_loss_coef, router_load_loss_coef: weights of the losses of router_type noisy_topk.
        router_reinforce_coef: weight of the policy loss of router_type reinforce.
        router_sinkhorn_rounds: scalings of router_type sinkhorn.
        router_bias_update_rate: step of the auxiliary-loss-free balancing bias (arXiv:2408.15664).
        router_bias: there is such a bias even where its rate is 0, and it stays as it is: that of a checkpoint.
        router_linear_bias: the router's product has a bias, which is trained, as in gpt-oss.
        router_in_fp32: router logits are computed in float32 whatever the model's dtype, as in DeepSeek-V3.
        hub_config: config.json of the Hub checkpoint that this was made from; saving writes it back.
    """

    model_type = "alignlab_policy"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    use_qk_norm: bool = False
    qk_norm_scope: str = "head"
    query_pre_attn_scalar: float | int | None = None
    norm_type: str = "rmsnorm"
    norm_position: str = "pre"
    parallel_attn: bool = False
    residual_dropout: float | int = 0.0
    mlp_gated: bool = True
    fused_projections: bool = False
    embedding_multiplier: float | int | None = None
    rope_local_base_freq: float | int | None = None
    num_mtp_layers: int = 0
    mtp_mlp_layer_type: str = "dense"
    mtp_loss_coef: float | int = 0.1
    mtp_detach: bool = False
    layer_types: list[str] | None = None
    shared_layers: list[int] | None = None
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None
    attention_sinks: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_interleave: bool | None = None
    num_attention_experts: int | None = None
    attention_router_aux_loss_coef: float | int | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int | None = None
    latent_norm_eps: float | int | None = None
    attn_logit_softcapping: float | int | None = None
    final_logit_softcapping: float | int | None = None
    mlp_layer_types: list[str] | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    expert_bias: bool = False
    swiglu_limit: float | int | None = None
    swiglu_alpha: float | int = 1.702
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    router_type: str = "topk"
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    capacity_factor: float | int | None = None
    capacity_priority: str = "order"
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    router_aux_loss_coef: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    router_seq_aux_loss_coef: float | int = 0.0
    router_device_aux_loss_coef: float | int = 0.0
    router_comm_aux_loss_coef: float | int = 0.0
    router_importance_loss_coef: float | int = 0.0
    router_load_loss_coef: float | int = 0.0
    router_reinforce_coef: float | int = 0.0
    router_sinkhorn_rounds: int = 8
    router_bias_update_rate: float | int = 0.0
    router_bias: bool = False
    router_linear_bias: bool = False
    router_in_fp32: bool = False
    hub_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            require_size(name, getattr(self, name), getattr(type(self), name))
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        _require(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size is {self.hidden_size}, and must be a multiple of num_attention_heads "
            f"({self.num_attention_heads}) where head_dim is not given; give head_dim",
        )
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse" if self.num_experts else "dense"] * self.num_hidden_layers
        if self.shared_layers == list(range(self.num_hidden_layers)):
            self.shared_layers = None
        kwargs.setdefault("attn_implementation", "alignlab")
        super().__post_init__(**kwargs)
        from alignlab.models.attention_rules import check_attention  # these classes are built of a config
        from alignlab.models.block_rules import check_blocks

        check_attention(self)
        check_blocks(self)
        _check_layers(self)
        _check_experts(self)
        check_sharing(self)

    def validate_layer_type(self) -> None:
        """Accept the kinds that `transformers` does not know; `attention_rules` has checked them."""

    def rotates(self, layer_idx: int) -> bool:
        """Return whether a layer rotates queries and keys by their positions."""
        return self.no_rope_layers is None or self.no_rope_layers[layer_idx] == 1

    @property
    def layer_blocks(self) -> list[int]:
        """Block of weights that each layer computes with; several layers may have one, see `layer_sharing`."""
        return list(range(self.num_hidden_layers)) if self.shared_layers is None else self.shared_layers

    @property
    def rotary_factor(self) -> float:
        """Part of each head that is rotated, in layers that keep keys of heads."""
        return (self.rope_parameters or {}).get("partial_rotary_factor", 1.0)

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers with experts, in order."""
        return [index for index, kind in enumerate(self.mlp_layer_types or ()) if kind == "sparse"]

    @property
    def has_router_bias(self) -> bool:
        """True if a bias that balances the experts is added to the scores that choose."""
        return self.router_bias or self.router_bias_update_rate > 0

    @property
    def routed_attention(self) -> list[int]:
        """Indices of the layers that route tokens to heads, in order."""
        return [index for index, kind in enumerate(self.layer_types or ()) if kind == "mixture_of_heads"]

    @property
    def num_routers(self) -> int:
        """Layers of a record of choices: those with experts, then those that route tokens to heads."""
        return len(self.sparse_layers) + len(self.routed_attention)

    def router_index(self, layer_idx: int) -> int:
        """Return the place of a layer that routes tokens to heads in a record of choices."""
        return len(self.sparse_layers) + self.routed_attention.index(layer_idx)

    @property
    def shared_expert_size(self) -> int:
        """Width of all shared experts together; 0 without."""
        size = self.shared_expert_intermediate_size
        return self.n_shared_experts * (self.moe_intermediate_size or 0) if size is None else size

    @property
    def drops_choices(self) -> bool:
        """True if a chosen expert may not compute a token; see `routers.coded`."""
        return self.capacity_factor is not None or self.router_type == "expert_choice"


def _check_layers(config: PolicyConfig) -> None:
    layers = config.mlp_layer_types or []
    _require(
        len(layers) == config.num_hidden_layers,
        f"mlp_layer_types has {len(layers)} entries, and must have one for each of the {config.num_hidden_layers} "
        "layers",
    )
    wrong = sorted(set(layers) - {"dense", "sparse"})
    _require(not wrong, f"mlp_layer_types holds {', '.join(wrong)}; each entry must be dense or sparse")


def _check_experts(config: PolicyConfig) -> None:
    count, chosen, size = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
    if not config.sparse_layers:
        _require(count == 0, f"num_experts is {count}, but no layer is sparse; make one sparse or leave it out")
        _require(not config.n_shared_experts, "n_shared_experts is given, but no layer is sparse; leave it out")
        check_no_router(config)
        return
    _require(count >= 1, f"num_experts is {count}, and must be at least 1 where a layer is sparse; use 8")
    _require(
        1 <= chosen <= count,
        f"num_experts_per_tok is {chosen}, and must be from 1 to num_experts ({count}); use {min(2, count)}",
    )
    _require(
        size is not None and size >= 1,
        f"moe_intermediate_size is {size}, and must be given where a layer is sparse; use {config.intermediate_size}",
    )
    assert size is not None
    for name, width in (("moe_intermediate_size", size), ("hidden_size", config.hidden_size)):
        _require(
            width % 8 == 0,
            f"{name} is {width}, and must be a multiple of 8 where a layer is sparse, for the grouped product of the "
            f"experts; use {-(-width // 8) * 8}",
        )
    shared = config.n_shared_experts
    _require(shared >= 0, f"n_shared_experts is {shared}, and must not be negative; use 0 to turn it off")
    own = config.shared_expert_intermediate_size
    _require(
        (own is None and not config.shared_expert_gate) or shared > 0,
        "shared_expert_intermediate_size or shared_expert_gate is given, but n_shared_experts is 0; use 1, or leave "
        "them out",
    )
    _require(own is None or own >= 1, f"shared_expert_intermediate_size is {own}, and must be at least 1")
    check_router(config)
