"""vLLM in processes of its own, spoken to over HTTP.

At the servers' side:
    process    starts them and keeps them running
    endpoints  what they answer beside vLLM's own: who they are, and new weights
    access     the token that every request must bear
    connections, bodies, uploads   how large what arrives may be, and how long it may take
At the trainer's side, where vLLM need not be installed:
    client     one server
    answers    what a server tells, checked before it is believed
    handout    how one comes by the present weights
    pool       all of them: balanced, watched, their losses survived
    engine     the rollout engine
And what both sides must have alike:
    identity   model, vocabulary, dtype
    wire       weights and expert choices as bytes
    private_folders   where files of weights lie
"""
