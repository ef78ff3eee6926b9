"""What this project's tests stand on, shipped so that code built on it can use the same: comparison and real processes."""

from nsa_cp.testing.comparison import assert_close, relative_error
from nsa_cp.testing.pool import DistributedPool, RankError, run_distributed

__all__ = ["DistributedPool", "RankError", "assert_close", "relative_error", "run_distributed"]
