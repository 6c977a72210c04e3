"""Places for the activations of our layers as modules of their own, for ``revert``."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from batchnorm.lifecycle.conversion.layers import is_ours
from batchnorm.lifecycle.conversion.transaction import Transaction

MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


@dataclass
class Places:
    """Where each layer's activation goes, or why it has no place."""

    reasons: dict[nn.Module, str] = field(default_factory=dict)
    after: dict[nn.Module, list[tuple[nn.Sequential, str]]] = field(default_factory=dict)
    modules: dict[nn.Module, nn.Module] = field(default_factory=dict)

    def insert(self, changes: Transaction, layers: set[nn.Module]) -> None:
        """The activations of ``layers`` into their places."""
        for layer in layers & set(self.after):
            for parent, name in self.after[layer]:
                children: dict[str, nn.Module | None] = {}
                for key, child in parent._modules.items():
                    children[key] = child
                    if key == name:
                        children[_new_name(parent, name)] = self.modules[layer]
                changes.change(parent, gets={"_modules": children})


def places(model: nn.Module, layers: dict[nn.Module, list[str]]) -> Places:
    """A place for each activation: in an ``nn.Sequential``, after the layer, under a name of its own."""
    found = Places()
    for layer, names in layers.items():
        activation = getattr(layer, "activation", None)
        if not is_ours(layer) or not isinstance(activation, str):
            continue
        holders = [model.get_submodule(name.rpartition(".")[0]) for name in names if name]
        parents = [holder for holder in holders if type(holder) is nn.Sequential]
        if not parents or len(parents) < len(names):
            found.reasons[layer] = (
                f"its activation {activation} has no place as a module: it does not stand in an nn.Sequential"
            )
            continue
        if activation == "leaky_relu":
            found.modules[layer] = nn.LeakyReLU(layer.negative_slope)  # type: ignore[arg-type]
        else:
            found.modules[layer] = MODULES[activation]()
        found.modules[layer].train(layer.training)
        # A Sequential that the model holds under several names is one place.
        where = {(id(p), name.rpartition(".")[2]): p for p, name in zip(parents, names, strict=True)}
        found.after[layer] = [(parent, name) for (_, name), parent in where.items()]
    return found


def _new_name(parent: nn.Sequential, name: str) -> str:
    new = f"{name}_activation"
    while new in parent._modules:
        new += "_"
    return new
