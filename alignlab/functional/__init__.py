"""Pure math on tensors: each function takes tensors first and numbers by keyword, writes nothing in place, computes in
float32 (float64 stays float64), and returns one value a token or a sequence. Averaging is `reduction`'s alone.

    reduction        sums and means of sequences and steps; weights that turn a per-token loss into the step's loss
    logprobs         head_logits, chunked_logprobs: log-probs and entropy without the full logits
    cross_entropy    chunked_cross_entropy: cross-entropy under smoothed labels, and z-loss
    kl               kl_k1, kl_k2, kl_k3, kl_loss, adapt_kl_coef
    advantages       group_normalized, group_centered, leave_one_out, batch_whitened, rewards_to_go, mixed_groups
    values           token_rewards, gae, value_loss, whitened, explained_variance
    mismatch         importance weights between engine and trainer: truncated, masked, masks alone
    policy_losses    ppo_clip, gspo_clip, cispo, reinforce, clip_acts
    preference_losses DPO and its family, SimPO, ORPO, KTO
    reward_losses    bradley_terry, reward_centring, calibration of a reward model
    distillation     divergences between teacher and student, chunk by chunk
    reverse_kl       reverse KL to a teacher as advantages
    moe_losses       load balance per expert, sequence and device, router z-loss, router bias, REINFORCE of routers
    shaping          overlong_penalty
    statistics       pass_at_k, and tests of the difference between two policies; numbers, no tensors
    precision        float32 inside, the exponent's limit
    products         products of many rows in the dtype that the processor multiplies fastest

Shapes: N tokens of one pack, M tokens whose log-prob is wanted, B sequences of the optimizer step, P prompts, G group,
V vocabulary, D hidden. A loss of a pack is `(loss * weights).sum()`; the step's loss is the sum over packs and ranks.
"""
