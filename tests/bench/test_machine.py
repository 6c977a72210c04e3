"""What is written down about the machine."""

from __future__ import annotations

import json
import platform

import torch

from batchnorm.bench import machine


def test_machine_versions_and_threads_are_there_and_can_be_written() -> None:
    found = json.loads(json.dumps(machine.describe(), allow_nan=False))
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["cores"] >= found["usable"] >= 1
    assert found["processor"] is None or found["processor"]


def test_what_is_not_installed_has_no_version() -> None:
    assert machine._version("no-such-library-anywhere") is None
