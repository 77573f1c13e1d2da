"""S2-Attn, dual chunk attention, their kernels; bound to transformers in binding.py."""
