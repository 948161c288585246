"""The native step: all layers over the tokens of a step in one call of kernels in C++.

    choice       the native or the Python step, and the reason
    coverage     models and settings that the kernels cover
    binding      their C interface: checked addresses
    packing      weights in their order
    slabs        memory in large pages
    model        a policy in their order
    weights      packed copies of a policy's weights
    step_memory  places of a step's tokens, and its memory
    runner       steps computed by them
    sampling     tokens drawn by them
    source/      the kernels
"""
