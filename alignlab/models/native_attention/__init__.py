"""Packed attention by compiled kernels, on a CPU: forward and backward, without copies of the keys.

    choice      when they compute
    function    the autograd function
    binding     their C interface
    source/     the kernels
"""
