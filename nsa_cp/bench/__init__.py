"""Benchmarks: what is measured, on which inputs, and the CSV files and plots that result."""
