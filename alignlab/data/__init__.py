"""From rows to packs of tokens.

    sources, files, tasks                   rows of a file, a Hub dataset or a task's generator
    file_limits, packed_files               bounds of unpacked files
    rows, nesting, messages                 one form for rows and chat messages
    bad_row, notices                        errors and warnings about rows
    rendering, chat/                        text and tokens of a row, without a loss
    prompts, examples                       items for rollouts and for supervised fine-tuning
    preferences, unpaired, common_prompt    items for DPO, reward models and KTO
    dataset, sampler, packing               items in order, batches of them, packs for a forward pass
    token_alignment                         one text under two tokenizers, for distillation
    tokenizer_training, vocabulary          tokenizers, and checks of their ids against a model
"""
