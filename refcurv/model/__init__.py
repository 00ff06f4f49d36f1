"""The transformer: pure functions and frozen records; no files, no kernels."""
