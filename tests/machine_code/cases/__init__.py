"""One file for each family of kernels, each with its `CASES`."""
