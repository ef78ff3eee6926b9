"""Tools of this project's tests, shipped so that code built on it can use them, too: comparison, and real processes."""

from nsa_cp.testing.comparison import assert_close, relative_error
from nsa_cp.testing.pool import DistributedPool, RankError, run_distributed

__all__ = ["DistributedPool", "RankError", "assert_close", "relative_error", "run_distributed"]
