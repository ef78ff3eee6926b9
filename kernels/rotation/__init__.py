"""Rotary position embedding (half-split form), forward and backward in one kernel."""
