"""What a run keeps to go on: only with the same settings, and only when that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchnorm.errors import ArgumentError, DataError
from batchnorm.experiments.store import Store

SETTINGS = {"steps": 10, "width": 0.125}


def test_states_come_back_and_are_gone_when_the_run_is_complete(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.begin(SETTINGS, resume=False) is False
    assert store.load("one") is None
    store.save("one", {"step": 3, "weights": torch.arange(4.0)})
    found = Store(tmp_path).load("one")
    assert found["step"] == 3 and torch.equal(found["weights"], torch.arange(4.0))
    store.clear()
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_neither_lost_nor_taken_up_unasked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin(SETTINGS, resume=True)  # nothing there yet: it starts
    store.begin(SETTINGS, resume=False)  # still nothing worth keeping
    store.save("one", {})
    with pytest.raises(ArgumentError) as caught:
        store.begin(SETTINGS, resume=False)
    assert str(caught.value) == (
        f"reproduce: expected a folder without an unfinished run, got one in {store.folder}. "
        f"Go on with it by --resume, choose another --out, or remove {store.folder}."
    )
    assert store.begin(SETTINGS, resume=True) is True


def test_another_runs_settings_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin(SETTINGS, resume=False)
    store.save("one", {})
    with pytest.raises(ArgumentError) as caught:
        store.begin({"steps": 20, "width": 0.125}, resume=True)
    assert str(caught.value) == (
        "reproduce: expected the settings of the unfinished run, steps 10, got 20. Give the same options, or remove "
        f"{store.folder} to start anew."
    )


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("one", {"step": 3})
    path = store.folder / "one.pt"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError) as caught:
        store.load("one")
    assert str(caught.value).startswith(f"reproduce: expected a state to go on from in {path}, got ")
    assert str(caught.value).endswith(". Remove it to train that network anew.")
    (store.folder / "settings.json").write_text("{")
    with pytest.raises(DataError):
        store.begin(SETTINGS, resume=True)
