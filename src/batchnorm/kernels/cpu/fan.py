"""Run a kernel on many groups in one launch.

The groups of a batch differ in the addresses of their tensors alone, each by a fixed number of bytes from one group to
the next. So one argument block describes them all, beside a block of steps. A group is run by one thread, or by all
threads together where there are too few groups to go round.

The launch has an argument block of its own:

==========================  ================================================================================
slot                        meaning
==========================  ================================================================================
THREAD, THREADS             as in ``block``
FUNCTION                    address of the compiled kernel
NUMBER                      how many groups
TOGETHER                    1: all threads work on each group; 0: a thread takes whole groups
LENGTH                      slots of the kernel's argument block
BASE                        address of the first group's argument block
STEPS                       address of what is added to each slot from one group to the next, int64
ROOM                        address of one block for each thread to write
WORKSPACE                   the slot of the kernel's working memory
OF_THREAD                   bytes from a thread's working memory to the next one's; 0 with TOGETHER
==========================  ================================================================================
"""

from __future__ import annotations

import struct
from typing import Any, Final

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from batchnorm.kernels.cpu.block import THREAD, THREADS
from batchnorm.kernels.cpu.compiling import Kernel, my_share
from batchnorm.kernels.cpu.scalars import FLOAT32, INTERNAL

FUNCTION: Final = 2
NUMBER: Final = 3
TOGETHER: Final = 4
LENGTH: Final = 5
BASE: Final = 6
STEPS: Final = 7
ROOM: Final = 8
WORKSPACE: Final = 9
OF_THREAD: Final = 10

pack = struct.Struct("11q").pack
"""Pack all slots, in order."""

_WORDS = types.CPointer(types.int64)
_I64 = ir.IntType(64)


@intrinsic
def _words(typing: Any, address: Any) -> Any:
    """The int64 values at an address."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], _I64.as_pointer())

    return _WORDS(types.int64), code


@intrinsic
def _call(typing: Any, function: Any, block: Any) -> Any:
    """Call the kernel at an address."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kernel = ir.FunctionType(ir.VoidType(), [_I64.as_pointer()]).as_pointer()
        builder.call(builder.inttoptr(args[0], kernel), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, _WORDS), code


@njit(**INTERNAL)
def _each(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    number, together, length = block[NUMBER], block[TOGETHER], block[LENGTH]
    base, steps = _words(block[BASE]), _words(block[STEPS])
    own = _words(block[ROOM] + 8 * thread * length)
    first, last = 0, number
    if together == 0:
        # Neighbours in one thread: what they share at their border, and the pages, stay near.
        first, last = number * thread // threads, number * (thread + 1) // threads
    for group in range(first, last):
        for slot in range(length):
            own[slot] = base[slot] + group * steps[slot]
        own[block[WORKSPACE]] += thread * block[OF_THREAD]
        if together != 0:
            own[THREAD], own[THREADS] = thread, threads
        _call(block[FUNCTION], own)


EACH = Kernel("GROUPS", _each, FLOAT32)
