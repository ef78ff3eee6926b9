"""The gated sum of the branches, and the per-row statistics from which the branches' backward starts."""
