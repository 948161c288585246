"""Names of our settings in TRL, PEFT and verl: an unknown key that is theirs is answered with ours."""

from __future__ import annotations

_SHARED = {
    "max_steps": "num_steps",
    "num_train_epochs": "num_steps, which counts batches",
    "per_device_train_batch_size": "num_prompts (completions a step = num_prompts x group_size; memory is bounded by "
    "memory.tokens_per_microbatch)",
    "gradient_accumulation_steps": "memory.tokens_per_microbatch, which cuts a step to fit in memory; same gradient",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup_steps",
    "save_steps": "checkpoints.every_steps",
    "save_total_limit": "checkpoints.keep",
    "report_to": "trackers",
    "logging_steps": "not needed: metrics.jsonl holds every step",
    "bf16": "dtype of the section model",
    "fp16": "dtype of the section model",
    "tf32": "numerics.tf32",
    "full_determinism": "numerics.deterministic",
    "use_cpu": "not needed: a GPU is used where there is one",
    "max_prompt_length": "max_prompt_tokens of the section data",
    "use_liger_kernel": "memory.logprob_chunk_tokens; the logits are always computed in chunks",
    "model_init_kwargs": "dtype and architecture of the section model",
    "eval_strategy": "eval_every_steps, where the trainer has it",
    "save_strategy": "checkpoints.every_steps",
    "load_best_model_at_end": "early_stopping.export, where the trainer has it",
    "metric_for_best_model": "early_stopping.metric, where the trainer has it",
    "greater_is_better": "not needed: a loss improves by falling, an accuracy by rising",
    "early_stopping_patience": "early_stopping.patience, where the trainer has it",
    "logging_strategy": "not needed: metrics.jsonl holds every step",
    "per_device_eval_batch_size": "not needed: memory is bounded by memory.tokens_per_microbatch, in evaluations too",
    "remove_unused_columns": "not needed: rewards receive all columns of the dataset",
    "disable_dropout": "not needed: dropout of the model is off, but for residual_dropout in SFT; see lora.dropout",
    "dataset_num_proc": "not needed: rows are read once, in one process",
    "trust_remote_code": "not offered: code from a checkpoint is never run",
    "pad_to_multiple_of": "not needed: nothing is padded",
    "chat_template_kwargs": "chat_template_kwargs of the section data",
    "shuffle_dataset": "not needed: examples are drawn in a shuffled order, by seed",
    "run_name": "output_dir",
}

_GRPO = {
    "num_generations": "group_size",
    "generation_batch_size": "num_prompts x group_size",
    "steps_per_generation": "num_minibatches",
    "eval_steps": "eval_every_steps",
    "num_iterations": "num_epochs",
    "max_completion_length": "sampling.max_new_tokens",
    "beta": "kl.coef",
    "epsilon": "clip_low and clip_high",
    "epsilon_high": "clip_high",
    "delta": "dual_clip",
    "loss_type": "recipe, or reduction alone",
    "scale_rewards": "advantage: group_normalized divides by the standard deviation, group_centered does not",
    "importance_sampling_level": "surrogate: ppo_clip is by token, gspo_clip by sequence",
    "mask_truncated_completions": "mask_truncated",
    "reward_weights": "the weight of each of rewards; in Python reward_funcs=[(function, weight), ...]",
    "use_vllm": "rollout.engine",
    "num_generations_eval": "num_samples of the section evaluation",
    "generation_kwargs": "sampling",
    "router_aux_loss_coef": "a field of architecture, in the section model",
}

_PPO = {
    "num_ppo_epochs": "num_epochs",
    "cliprange": "clip_low and clip_high",
    "cliprange_value": "critic.value_clip",
    "kl_coef": "kl.coef",
    "kl_estimator": "kl.estimator",
    "lam": "gae_lambda",
    "whiten_rewards": "whiten_advantages, which whitens the advantages",
    "response_length": "sampling.max_new_tokens",
}

_ON_POLICY_DISTILL = {
    "teacher_model_name_or_path": "teacher.name",
    "lmbda": "not needed: the student samples all completions",
    "beta": "kl.coef for the KL to the starting policy; the KL to the teacher is always the reverse KL",
    "loss_type": "surrogate",
    "scale_rewards": "not needed: a task's rewards are normalised in their group, with the weight task_weight",
    "importance_sampling_level": "surrogate, which is by token",
}

_DPO = {
    "per_device_train_batch_size": "num_pairs, over all ranks",
    "loss_type": "loss",
    "eval_steps": "eval_every_steps",
    "precompute_ref_log_probs": "precompute_reference",
    "max_length": "max_prompt_tokens of the section data",
}

_KTO = {
    "per_device_train_batch_size": "num_sequences, over all ranks",
    "eval_steps": "eval_every_steps",
    "precompute_ref_log_probs": "precompute_reference",
    "max_length": "max_prompt_tokens of the section data",
}

_ONLINE_DPO = {
    "per_device_train_batch_size": "num_prompts, over all ranks",
    "loss_type": "loss",
    "max_new_tokens": "sampling.max_new_tokens",
    "temperature": "sampling.temperature",
}

_SFT = {
    "per_device_train_batch_size": "num_sequences, over all ranks",
    "packing": "not needed: examples are always packed, without attending to each other",
    "label_smoothing_factor": "label_smoothing",
    "eval_steps": "eval_every_steps",
    "padding_free": "not needed: nothing is padded",
    "eval_packing": "not needed: examples are always packed, without attending to each other",
    "packing_strategy": "not needed: examples are always packed, without attending to each other",
    "completion_only_loss": "not needed: the loss is always on the completion alone",
    "assistant_only_loss": "not needed: the loss is always on the assistant's turns alone; see data.taught_turns",
    "dataset_text_field": "prompt_column of the section data; plain text is a row with an empty prompt, which is no "
    "example here",
    "max_seq_length": "max_prompt_tokens of the section data",
    "chat_template_path": "model.tokenizer, a folder with another chat template",
    "max_length": "max_prompt_tokens of the section data",
}

_REWARD = {
    "per_device_train_batch_size": "num_pairs, over all ranks",
    "center_rewards_coefficient": "centring_coef",
    "eval_steps": "eval_every_steps",
    "max_length": "max_prompt_tokens of the section data",
}

_GKD = {
    "lmbda": "student_frac",
    "teacher_model_name_or_path": "teacher.name",
    "max_new_tokens": "sampling.max_new_tokens",
    "seq_kd": "not needed: alignlab sample writes the teacher's samples, and type: sft trains on them",
    "per_device_train_batch_size": "num_prompts, over all ranks",
}

_DISTILL = {
    "teacher_model_name_or_path": "teacher.name",
    "lmbda": "not needed: nothing is sampled; use type: gkd",
    "per_device_train_batch_size": "num_sequences, over all ranks",
    "max_length": "max_prompt_tokens of the section data",
}

# The same corrections under TRL's names. TRL's "mask" also weights the tokens inside its bounds; verl's and ours do
# not.
TRL_CORRECTIONS = {"token_truncate": "token_tis", "sequence_truncate": "sequence_tis"}
_TRL_CORRECTION = (
    "mismatch.correction, where TRL's token_truncate is token_tis, token_mask is icepop, sequence_truncate is "
    "sequence_tis and sequence_mask is sequence_mis"
)
_VERL_CORRECTIONS = (
    "mismatch.correction: token_tis for rollout_is token, sequence_tis for sequence; icepop or sequence_mis with two "
    "thresholds; token_mask, sequence_mask or geometric_mask for rollout_rs token_k1, seq_sum_k1 or seq_mean_k1 alone"
)

VERL_NAMES = {
    "rollout_is": _VERL_CORRECTIONS,
    "rollout_rs": _VERL_CORRECTIONS,
    "rollout_is_threshold": "mismatch.high, and mismatch.low for the lower one of two",
    "rollout_rs_threshold": "mismatch.low and mismatch.high, which bound the inverse of verl's ratio",
}

# By the name of our class: their key -> ours.
PEER_NAMES: dict[str, dict[str, str]] = {
    "GRPOConfig": _SHARED | _GRPO,
    "PPOConfig": _SHARED | _PPO,
    "DPOConfig": _SHARED | _DPO,
    "OnPolicyDistillConfig": _SHARED | _GRPO | _ON_POLICY_DISTILL,
    "GKDConfig": _SHARED | _GKD,
    "DistillConfig": _SHARED | _DISTILL,
    "KTOConfig": _SHARED | _KTO,
    "OnlineDPOConfig": _SHARED | _ONLINE_DPO,
    "SFTConfig": _SHARED | _SFT,
    "RewardConfig": _SHARED | _REWARD,
    "LoraSettings": {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_parameters": "experts"},
    "ModelSettings": {
        "model_name_or_path": "name",
        "torch_dtype": "dtype",
        "peft_config": "lora",
        "use_peft": "lora",
    },
    "DataSettings": {
        "dataset_name": "path",
        "dataset_config": "config_name",
        "dataset_train_split": "split",
        "max_prompt_length": "max_prompt_tokens",
    },
    "RenderSettings": {"max_prompt_length": "max_prompt_tokens"},
    "SamplingSettings": {"max_completion_length": "max_new_tokens", "max_tokens": "max_new_tokens"},
    "KLSettings": {"beta": "coef"},
    "MismatchSettings": {
        "vllm_importance_sampling_correction": "mismatch.correction; none is no correction",
        "vllm_importance_sampling_mode": _TRL_CORRECTION,
        "vllm_importance_sampling_clip_min": "low",
        "vllm_importance_sampling_clip_max": "high",
        "vllm_importance_sampling_cap": "high",
        **VERL_NAMES,
    },
}

_NO_COLLATOR = "not needed: examples are packed by the trainer"
_OWN_OPTIMIZER = "config.optim: its learning_rate, schedule and warmup_steps, and the optimizer is AdamW"

# Arguments of TRL's and transformers' trainers -> what there is here.
PEER_ARGUMENTS = {
    "args": "config",
    "processing_class": "tokenizer",
    "reward_processing_classes": "not needed: a reward model is given by its folder, which holds its tokenizer",
    "reward_model": "reward_funcs, which takes the folder of a reward model",
    "reward_fn": "reward_funcs",
    "ref_model": "not needed: the reference is the starting model, or the base under an adapter",
    "teacher_model": "config.teacher, such as GKDConfig(teacher={'name': ...})",
    "value_model": "not needed: the critic is made from the model; see config.critic",
    "formatting_func": "not needed: rows have the columns prompt and completion, or messages; map the dataset first",
    "data_collator": _NO_COLLATOR,
    "compute_metrics": "callbacks, each called as callback(trainer, step, metrics)",
    "compute_loss_func": "not offered: derive from the trainer, and override its loss",
    "preprocess_logits_for_metrics": "not needed: logits are never kept",
    "optimizers": _OWN_OPTIMIZER,
    "optimizer_cls_and_kwargs": _OWN_OPTIMIZER,
    "model_init": "model, a name or a live model",
    "quantization_config": "not offered: models are trained in bfloat16, float16 or float32",
    "rollout_func": "not offered: config.rollout chooses the engine, and reward_funcs scores its completions",
    "environment_factory": "not offered: a completion is a single turn",
    "tools": "render_settings=RenderSettings(tools=...), or the column tools of the rows",
    "dataset": "train_dataset",
    "lora_config": "peft_config",
    "reward_functions": "reward_funcs",
}
