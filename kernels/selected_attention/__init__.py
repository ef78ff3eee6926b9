"""Attention over the blocks each query chose, tiles of adjacent queries sharing the union of their blocks."""
