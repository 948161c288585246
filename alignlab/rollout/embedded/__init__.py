"""The embedded engine: a paged cache and continuous batching, on the weights of the model in training.

    engine           generates, streams, and scores given completions
    scheduler        chooses the tokens of each step
    sequence         the state of one completion
    block_manager    blocks of the cache: users, shared prefixes
    truncation       floors of top-k and top-p
    step_plan        the place of every token of a step
    runner           the forward pass of a step
    paged_cache      the tensors that the layers keep
    paged_attention  attention over the cache
    sampler          next tokens of sequences, log-probs of given tokens
    sampling         tokens from logits
    weights          copies of weights that the engine runs on
"""
