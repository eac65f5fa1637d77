"""Stochastic pooling (Zeiler & Fergus 2013) as fused Triton and compiled CPU kernels."""

from .convert import replace_pooling
from .functional import (
    adaptive_stochastic_pool1d,
    adaptive_stochastic_pool2d,
    adaptive_stochastic_pool3d,
    stochastic_pool1d,
    stochastic_pool2d,
    stochastic_pool3d,
)
from .fusion import fuse
from .modules import (
    AdaptiveStochasticPool1d,
    AdaptiveStochasticPool2d,
    AdaptiveStochasticPool3d,
    StochasticPool,
    StochasticPool1d,
    StochasticPool2d,
    StochasticPool3d,
)
from .monte_carlo import average_draws, sampling

__all__ = [
    "AdaptiveStochasticPool1d",
    "AdaptiveStochasticPool2d",
    "AdaptiveStochasticPool3d",
    "StochasticPool",
    "StochasticPool1d",
    "StochasticPool2d",
    "StochasticPool3d",
    "adaptive_stochastic_pool1d",
    "adaptive_stochastic_pool2d",
    "adaptive_stochastic_pool3d",
    "average_draws",
    "fuse",
    "replace_pooling",
    "sampling",
    "stochastic_pool1d",
    "stochastic_pool2d",
    "stochastic_pool3d",
]
__version__ = "0.1.0"
