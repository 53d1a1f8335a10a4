"""wanfast's Triton kernels, each with its torch reference: one file per kernel, imported as `wanfast.kernels`."""
