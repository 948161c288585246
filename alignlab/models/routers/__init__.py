"""Routers: which experts of a mixture compute a token, with what weight, and how evenly they are used.

A mixture layer has one router. A new way to route is a class with the methods of `protocol.Router`: what records,
replays and counts choices (`routing`, `moe`) calls those methods alone.

    protocol         RouterScores, RoutedTokens, Router: what a router is asked
    coded            choices that an expert had no room for, in the same integers as the others
    scoring          scores and gates from logits: softmax, sigmoid, square root of softplus
    topk             the K best experts, of all or of a token's best groups; the base of the other routers
    capacity         which choices are dropped where an expert may take so many tokens alone
    noise            random numbers of a token, the same in whatever pack it lies
    noisy, hashed, base_layer, sinkhorn, expert_choice, reinforce   the other routers, one a file
    auction          the balanced assignment that base_layer takes
    make             make_router: the class that a config names
    uses             where a router cannot be used: rollouts, comparisons of log-probs, vLLM
"""
