"""DeepSpeed's ZeRO: optimizer states, gradients and weights shared out over the ranks of a run.

Rajbhandari et al. (2020), arXiv:1910.02054: stage 1 shares out the optimizer's state (and the float32 weights that it
updates), stage 2 gradients too, stage 3 weights too. The package `deepspeed` is imported when an engine is made.
"""
