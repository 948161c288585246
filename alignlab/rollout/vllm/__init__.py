"""Rollouts by vLLM. Nothing here is imported unless `rollout.engine` asks for it.

    requirement  which versions were tested, and what to do where there is none
    engine       the engine in this process
    transfer     how new weights reach it, and what of them arrived
    mending      what is put right in vLLM, each with its reason
"""
