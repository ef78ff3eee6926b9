"""The gradient of the queries, summed over the three branches on chip."""
