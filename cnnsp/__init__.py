"""CNN_SP, the flower and tea classifier with stochastic pooling, and what trains it."""

from .errors import UserError
from .network import CNN_SP

__all__ = ["CNN_SP", "UserError"]
