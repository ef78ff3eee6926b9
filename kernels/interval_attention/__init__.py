"""Attention in which every query row sees one contiguous range of key rows: window, compressed and dense causal attention."""
