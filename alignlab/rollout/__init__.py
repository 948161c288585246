"""Rollouts: completions sampled from the policy.

    engine          the protocol of all engines, and the engine that the settings name
    engine_choice   the engine that `auto` takes
    requests        checks of prompts and parameters, random keys, end tokens
    decoding_rules  checks of decoding controls, and the tokens of banned words
    grammars        regular expressions and JSON schemas that completions must match
    memory          the memory that an engine will take, predicted
    policy_version  versions of the weights, and weights that changed without one
    verification    digests and canaries: an engine runs on the trainer's weights
    detokenizer     text of completions
    background      an event loop in a thread
    task_groups     concurrent tasks that fail together

    embedded        our engine, on the weights of the model in training
    vllm            vLLM, in this process or on servers
"""
