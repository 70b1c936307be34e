"""Measuring: an engine in this process, a server under load, single kernels."""
