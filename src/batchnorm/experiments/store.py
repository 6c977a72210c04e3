"""Where a run keeps what it needs to go on: a folder beside its results, removed when the run is complete."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from batchnorm.errors import ArgumentError, DataError, expected
from batchnorm.report.files import write_whole

_SETTINGS = "settings.json"


class Store:
    """States of a run's parts by name, each written whole or not at all.

    Arguments:
        folder: of the results; the states go into ``resume`` there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "resume"

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> bool:
        """Start a run with these settings, or go on with one.

        Args:
            settings: all that decides the results, as JSON holds it.
            resume: go on with what is there; without anything there, start.

        Returns:
            Whether there is a run to go on with.

        Raises:
            ArgumentError: there is an unfinished run but ``resume`` is False, or it has other settings.
            DataError: what is there cannot be read.
        """
        path = self.folder / _SETTINGS
        if not any(self.folder.glob("*.pt")):
            self._write(_SETTINGS, json.dumps(settings, indent=1).encode())
            return False
        if not resume:
            raise ArgumentError(
                expected(
                    "reproduce",
                    "a folder without an unfinished run",
                    f"one in {self.folder}",
                    f"Go on with it by --resume, choose another --out, or remove {self.folder}.",
                )
            )
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                expected("reproduce", f"the settings of a run in {path}", str(error), f"Remove {self.folder}.")
            ) from error
        different = [name for name in settings if before.get(name) != settings[name]]
        if different:
            raise ArgumentError(
                expected(
                    "reproduce",
                    "the settings of the unfinished run, " + ", ".join(f"{n} {before.get(n)}" for n in different),
                    ", ".join(str(settings[n]) for n in different),
                    f"Give the same options, or remove {self.folder} to start anew.",
                )
            )
        return True

    def load(self, name: str) -> Any | None:
        """The state of this name; None where there is none.

        Raises:
            DataError: the file is damaged.
        """
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the unpickler and the archive raise
            todo = "Remove it to train that network anew."
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(expected("reproduce", f"a state to go on from in {path}", reason, todo)) from error

    def save(self, name: str, state: Any) -> None:
        """Replace the state of this name.

        Raises:
            OSError: it cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._write(f"{name}.pt", buffer.getvalue())

    def clear(self) -> None:
        """Remove all states: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, content: bytes) -> None:
        write_whole(self.folder, {name: content})
