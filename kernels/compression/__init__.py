"""Compression of every l adjacent tokens into one, every d tokens: mean, linear and MLP."""
