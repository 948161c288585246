"""The embedded engine: a paged cache and continuous batching, on the weights of the model in training.

    engine           generates, streams, and scores given completions
    scheduler        chooses the tokens of each step
    sequence         the state of one completion
    block_manager    blocks of the cache: users, shared prefixes
    prefixes         which blocks sequences share
    evictions        when a sequence drops tokens over its budget
    swapping         pre-empted sequences on the host
    block_pools      blocks of the layers by their window; those that it has left are released
    step_plan        the place of every token of a step
    tile_plan        the same on a GPU: rows, tiles, visited blocks, few shapes
    runner           the forward pass of a step
    replays          decoding steps of few shapes, recorded as CUDA graphs
    paged_cache      the tensors that the layers keep
    cache_kinds      the table of caches that approximate: rounded, grouped, evicting, sparse, low_rank
    mapped_cache     the tensors in a file, and attention that reads it in parts; mapped_file: the file
    paged_attention  attention over the gathered cache
    tile_attention   attention that reads the cache in place, on a GPU
    sampler          next tokens of sequences, log-probs of given tokens
    sampling         tokens from logits
    truncation       floors under probabilities: top-k and top-p
    weights          copies of weights that the engine runs on
    native/          steps on a CPU by kernels in C++
"""
