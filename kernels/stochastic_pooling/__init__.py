"""Stochastic pooling (Zeiler & Fergus 2013) as fused Triton and compiled CPU kernels."""

from .functional import stochastic_pool1d, stochastic_pool2d
from .modules import StochasticPool1d, StochasticPool2d

__all__ = ["StochasticPool1d", "StochasticPool2d", "stochastic_pool1d", "stochastic_pool2d"]
__version__ = "0.1.0"
