"""The embedded engine: a paged cache and continuous batching, on the weights of the model in training.

The call, and the sequences in it:

    engine           generates, streams, searches, and scores given completions
    call_guard       one call at a time; closed and abandoned engines
    sequence         the state of one completion
    scheduler        chooses the tokens of each step; admits, forks and pre-empts sequences
    prefixes         which blocks sequences share
    evictions        when a sequence drops tokens over its budget
    swapping         pre-empted sequences on the host

The room that sequences take:

    cache_space      blocks and slots that the free memory holds
    block_pools      blocks of the layers by their window; those that it has left are released
    block_manager    blocks of one pool: users, published blocks
    state_slots      slots of the states of recurrent layers; state_cache: the states

A step through the model:

    step_plan        the place of every token of a step
    tile_plan        the same on a GPU: rows, tiles, visited blocks, few shapes
    runner           the forward pass of a step
    paged_attention  attention over the gathered cache
    tile_attention   attention that reads the cache in place, on a GPU
    replays          decoding steps of few shapes, recorded as CUDA graphs
    native/          steps on a CPU by kernels in C++

What is kept of tokens:

    paged_cache      the tensors that the layers keep
    cache_kinds      the table of caches that approximate: rounded, grouped, evicting, sparse, low_rank
    mapped_cache     the tensors in a file, and attention that reads it in parts; mapped_file: the file

From logits to tokens:

    sample_step      one step that samples; places: the tokens to draw, and what their requests ask for
    sampler          next tokens of sequences, log-probs of given tokens
    sampling         tokens from logits; truncation: top-k and top-p; controls: other changes of logits
    random_numbers   by a completion's key and a token's position
    search           what searches share; beam_search, beams: beam search; contrastive: contrastive search
    speculation      drafted tokens, computed together; payoff: where they pay
    drafts           n-grams; draft_model: a smaller model, mtp_drafts: the policy's own layer (twin_drafter)

The weights:

    weights          the policy's own, merged with adapters, packed or rounded
    rounding         which layers are rounded; rounded_linear: products of them; weight_readers: layers that cannot be
"""
