"""Native Sparse Attention (arXiv 2502.11089) under context parallelism, for PyTorch and Megatron-Core.

Importing this package is cheap: the names below are loaded on first use, and Megatron-Core only by `nsa_cp.megatron`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_cp.attention import NativeSparseAttention
    from nsa_cp.config import NSAConfig, RotaryConfig
    from nsa_cp.context_parallel import SequenceLayout
    from nsa_cp.ops import native_sparse_attention

__version__ = "0.1.0"

__all__ = ["NSAConfig", "NativeSparseAttention", "RotaryConfig", "SequenceLayout", "native_sparse_attention"]

_HOME = {
    "NSAConfig": "nsa_cp.config",
    "RotaryConfig": "nsa_cp.config",
    "SequenceLayout": "nsa_cp.context_parallel",
    "NativeSparseAttention": "nsa_cp.attention",
    "native_sparse_attention": "nsa_cp.ops",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The package's names, the lazy ones included."""
    return sorted({*globals(), *__all__})
