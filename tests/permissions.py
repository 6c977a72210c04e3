"""Make permissions count for root too, without becoming a user who may not even enter the folder of the clone."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

_VERSION_3 = 0x20080522
_DAC_OVERRIDE = 1  # beside it stands one to read and to enter everything, which root keeps


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def obey_permissions() -> bool:
    """From now on this process may write only where the permissions let its user; whether that is so.

    On Linux root gives up the capability that overrides permissions to write. It cannot take it back.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "capset"):
        header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
        if library.capget(ctypes.byref(header), sets) == 0:
            kept = ~(1 << _DAC_OVERRIDE)
            sets[0].effective &= kept
            sets[0].permitted &= kept
            sets[0].inheritable &= kept
            library.capset(ctypes.byref(header), sets)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        try:
            (Path(folder) / "file").write_text("")
        except PermissionError:
            return True
        finally:
            os.chmod(folder, 0o755)
        return False
