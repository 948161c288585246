"""Layers that keep a state of each sequence, whatever its length: Gated DeltaNet and Kimi Delta Attention.

`chunk_plan` cuts packed sequences into chunks, `chunk_products` computes within chunks, `delta_rule` carries states
from chunk to chunk, `convolution` mixes each channel with its last values, and `layer` joins them.
"""
