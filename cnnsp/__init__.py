"""CNN_SP, the flower and tea classifier with stochastic pooling, and what trains it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .network import CNN_SP

__all__ = ["CNN_SP", "UserError"]

POOLINGS = ("stochastic", "max", "avg")
IMAGE_SIZE = 256


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import: neither --help nor a wrong folder should wait for it.
    if name == "CNN_SP":
        from .network import CNN_SP

        return CNN_SP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
