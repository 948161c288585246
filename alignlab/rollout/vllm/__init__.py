"""Rollouts by vLLM, in this process or on servers. Nothing here is imported unless a config asks for vLLM.

    verified_engine   the engine: sends weights, verifies them, generates
    backend           the protocol between the engine and vLLM
    in_process, sync  vLLM in this process, and how it takes over weights
    rank_groups       ranks that share one vLLM in their processes
    sleep             its sleep between calls, which frees memory of a GPU
    servers           vLLM on servers
    pool, client      all servers as one; one server
    slots             room for requests on servers
    weight_delivery   gives a server the present weights by a file
    weight_broadcast  gives all servers the present weights by a process group
    policy_weights    the policy's weights on their way to vLLM
    completions       requests and answers
    answers           checks of servers' answers
    access            the token of requests to servers
    abandonable_loop  asynchronous work that any thread can abandon
    ranks             the first rank before the others
    options           the options that vLLM is started with
    installation      tested versions of vLLM
    launch            server processes, started and kept running

Shared with the code inside vLLM:

    protocol          names, paths and versions that both sides agree on
    serialization     weights and expert choices as bytes
    packed_weights    tensors in buffers, as they are broadcast
    weight_group      the process group of a broadcast

    inside            code that vLLM loads into its own processes
"""
