"""The machine that Numba compiles for: this one, unless ``NUMBA_CPU_NAME``, ``NUMBA_CPU_FEATURES`` or
``NUMBA_ENABLE_AVX`` say otherwise.
"""

from __future__ import annotations

from functools import lru_cache

import llvmlite.binding as llvm
from numba.core.registry import cpu_target

_TRIPLE, _NAME, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
_HAS = frozenset(_FEATURES.split(","))

ROUNDS_TO_BFLOAT16 = "+avx512bf16" in _HAS
"""Whether there is an instruction for it; without, LLVM would call a function for each value."""

VECTOR_BYTES = 64 if "+avx512f" in _HAS else 32
"""Size of a vector. LLVM cuts vectors in two where registers are smaller."""

_WIDENING = """
define void @widen(ptr %from, ptr %to) {
  %half = load <8 x half>, ptr %from
  %float = fpext <8 x half> %half to <8 x float>
  store <8 x float> %float, ptr %to
  ret void
}
"""


@lru_cache(maxsize=1)
def converts_float16() -> bool:
    """Whether the machine has instructions for it: else LLVM calls a function of the C runtime, ``__extendhfsf2``,
    which a process need not have. LLVM itself is asked, since a name and a list of features do not tell.
    """
    module = llvm.parse_assembly(_WIDENING)
    module.triple = _TRIPLE
    machine = llvm.Target.from_triple(_TRIPLE).create_target_machine(cpu=_NAME, features=_FEATURES, opt=3)
    return "__extendhfsf2" not in machine.emit_assembly(module)
