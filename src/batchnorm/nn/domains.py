"""Statistics per domain: several sets of running statistics in one layer, of which one is in use at a time.

The set in use is where a layer always has its statistics, ``running_mean`` and so on. Code that reads or writes them
there does not have to know about domains. That place is the first domain's home. Another domain has its home at
``running_mean__target``; while it is in use, the two sets have changed places. State dicts show every set at its home.
"""

from __future__ import annotations

from typing import Any

from batchnorm.nn.running import BUFFERS, Buffers


def buffers_of(layer: Any) -> dict[str | None, Buffers]:
    """Every set of running statistics by domain. A layer without domains has one, under None; or none at all."""
    if layer._buffers.get("running_mean") is None:
        return {}
    names: tuple[str, ...] = layer._domains
    if not names:
        return {None: _at(layer, "")}
    return {name: _at(layer, _suffix_now(layer, name)) for name in names}


def add(layer: Any, names: tuple[str, ...]) -> None:
    """Give the layer these domains, each with a copy of the statistics that it has."""
    now = _at(layer, "")
    for name in names[1:]:
        layer._buffers.update(zip(_keys(f"__{name}"), now.copy(), strict=True))
    layer.__dict__["_domain"] = names[0]
    layer.__dict__["_domains"] = names


def keep(layer: Any, name: str) -> None:
    """Make the layer plain again, with the statistics of one domain."""
    use(layer, name)
    for other in layer._domains[1:]:
        for key in _keys(f"__{other}"):
            del layer._buffers[key]
    del layer.__dict__["_domain"], layer.__dict__["_domains"]


def use(layer: Any, name: str) -> None:
    """Bring the statistics of a domain to where the layer reads them, and those in use home."""
    sets = buffers_of(layer)
    first: str = layer._domains[0]
    moved: dict[str, Any] = {}
    for each, buffers in sets.items():
        suffix = "" if each == name else f"__{name}" if each == first else f"__{each}"
        moved.update(zip(_keys(suffix), buffers, strict=True))
    layer._buffers.update(moved)  # in one step, as an interrupt may come
    layer.__dict__["_domain"] = name


def bring_home(layer: Any, prefix: str, state: dict[str, Any]) -> None:
    """Change between the keys of a layer's state dict as its buffers lie now and those of every domain at home."""
    used, names = layer._domain, layer._domains
    if not names or used == names[0]:
        return
    for here, there in zip(_keys(""), _keys(f"__{used}"), strict=True):
        pair = {key: state.pop(prefix + key) for key in (here, there) if prefix + key in state}
        state.update({prefix + (there if key == here else here): t for key, t in pair.items()})


def _suffix_now(layer: Any, name: str) -> str:
    """Where a domain's statistics are now: those in use at the first's home, and the first's at theirs."""
    first, used = layer._domains[0], layer._domain
    if name == used:
        return ""
    return f"__{used}" if name == first else f"__{name}"


def _keys(suffix: str) -> list[str]:
    return [key + suffix for key in BUFFERS]


def _at(layer: Any, suffix: str) -> Buffers:
    return Buffers(*(layer._buffers.get(key) for key in _keys(suffix)))
