"""The gated sum of the branches and the row sums its backward starts from."""
