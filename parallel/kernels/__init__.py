"""Compiled CPU kernels: how they are built and started, vectors of floats, and those of products and collectives."""
