"""Smaller models from larger ones, before they are trained again.

    masks          which weights of a matrix stay
    sparsity       weights of linear layers set to zero, by magnitude or by Wanda
    calibration    what linear layers read on some text
    importance     how much heads, neurons and channels say on some text
    width          fewer heads, neurons and channels

Fewer layers: `alignlab.models.layer_pruning`.
"""
