"""Block selection: the importance of key blocks from the compressed scores, and the choice of the best n."""
