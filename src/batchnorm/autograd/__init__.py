"""How batch normalization is differentiated: in eager mode, and as operators that PyTorch's compilers see."""

from batchnorm.autograd import operators, phases
from batchnorm.autograd.function import Call, differentiated

__all__ = ["Call", "differentiated", "operators", "phases"]
