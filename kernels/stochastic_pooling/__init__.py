"""Stochastic pooling (Zeiler & Fergus 2013) as fused Triton and compiled CPU kernels."""

from .functional import (
    adaptive_stochastic_pool2d,
    stochastic_pool1d,
    stochastic_pool2d,
    stochastic_pool3d,
)
from .modules import (
    AdaptiveStochasticPool2d,
    StochasticPool,
    StochasticPool1d,
    StochasticPool2d,
    StochasticPool3d,
)

__all__ = [
    "AdaptiveStochasticPool2d",
    "StochasticPool",
    "StochasticPool1d",
    "StochasticPool2d",
    "StochasticPool3d",
    "adaptive_stochastic_pool2d",
    "stochastic_pool1d",
    "stochastic_pool2d",
    "stochastic_pool3d",
]
__version__ = "0.1.0"
