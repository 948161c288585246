"""Code in C++ that is compiled where it runs: built once, checked, and called by addresses of tensors.

    build       compilation, once for each source, compiler and processor, into a private folder of the user's
    processor   instructions of this machine's processor
    binding     structures of addresses, each of a tensor that was checked and is held
    source/     vectors of 16 numbers, in float32 or bfloat16
"""
