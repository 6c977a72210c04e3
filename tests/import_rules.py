"""Which file of the package may import what: the house's rules, read off the syntax tree.

A room is a top-level module or folder of the package. A room may import from itself and from the rooms before
it in ROOMS; a few libraries may be imported in certain folders only. Imports under `if TYPE_CHECKING`, inside
functions, and by `import_module("...")` with a literal name count like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "batchnorm"

# `batchnorm` stands for __init__.py, which gathers the public names of the rooms before it: none of those may
# use it.
ROOMS = (
    "errors",
    "moments",
    "kernels",
    "autograd",
    "checks",
    "functional",
    "nn",
    "lifecycle",
    "diagnose",
    PACKAGE,
    "report",
    "experiments",
    "bench",
    "cli",
)

# Read by students, used as the oracle: it stands beside the rooms, and only experiments may use it.
REFERENCE = "reference"
READERS_OF_REFERENCE = frozenset({"experiments"})

EVERYWHERE = frozenset({"torch", "numpy"})
TOOLS = ("report/", "experiments/", "bench/", "cli.py")
# Library -> paths inside the package, each a file or a folder ending in a slash, where it may be imported.
CONFINED: dict[str, tuple[str, ...]] = {
    "numba": ("kernels/cpu/",),
    "llvmlite": ("kernels/cpu/",),
    "triton": ("kernels/gpu/",),
    "matplotlib": TOOLS,
    "rich": (*TOOLS, "lifecycle/progress.py"),
    "typer": TOOLS,
    "jinja2": TOOLS,
    "sklearn": TOOLS,
    "PIL": ("experiments/",),
    "torch.distributed": ("nn/distributed.py",),
}


@dataclass(frozen=True)
class Import:
    """One imported name: `target` is the dotted module, as deep as the syntax tells."""

    line: int
    target: str


def violations(package: Path) -> list[str]:
    """Every breach of the rules under `package`, each as `file:line: what is wrong`."""
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).as_posix()
        where = f"{package.name}/{inside}"
        if room_of(inside) not in (*ROOMS, REFERENCE):
            found.append(f"{where}:1: no room has this name; the rooms are {', '.join(ROOMS)} and {REFERENCE}")
            continue
        for each in imports(path, package):
            complaint = judge(inside, each.target)
            if complaint:
                found.append(f"{where}:{each.line}: {complaint}")
    return found


def room_of(inside: str) -> str:
    """The room of a path inside the package: `nn` for `nn/running.py`, `moments` for `moments.py`."""
    head = inside.split("/")[0].removesuffix(".py")
    return {"__init__": PACKAGE, "__main__": "cli"}.get(head, head)


def judge(inside: str, target: str) -> str | None:
    """Why the file at `inside` may not import `target`, or None if it may."""
    room, library = room_of(inside), target.split(".")[0]
    if library == PACKAGE:
        return judge_room(room, target)
    if room == REFERENCE:
        alone = library == "numpy" or library in sys.stdlib_module_names
        return None if alone else f"{room} → {library}: {room}.py imports NumPy alone"
    for confined, places in CONFINED.items():
        if target == confined or target.startswith(confined + "."):
            allowed = any(inside == place or (place[-1] == "/" and inside.startswith(place)) for place in places)
            return None if allowed else f"{room} → {confined}: {confined} belongs in {', '.join(places)} only"
    if library in EVERYWHERE or library in sys.stdlib_module_names:
        return None
    return f"{room} → {library}: {library} is not a dependency of this package"


def judge_room(room: str, target: str) -> str | None:
    """Why `room` may not import the package's own module `target`, or None if it may."""
    other = target.split(".")[1] if "." in target else PACKAGE
    if room == other:
        return None
    if room == REFERENCE:
        return f"{room} → {other}: {room}.py imports NumPy alone"
    if other == REFERENCE:
        allowed = room in READERS_OF_REFERENCE
        return None if allowed else f"{room} → {other}: only {', '.join(READERS_OF_REFERENCE)} may import it"
    if other not in ROOMS:
        return f"{room} → {other}: there is no such room"
    if ROOMS.index(other) > ROOMS.index(room):
        return f"{room} → {other}: {other} comes after {room}"
    return None


def imports(path: Path, package: Path) -> Iterator[Import]:
    """Every import of the file at `path`, own modules named from the package's root."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    folder = [PACKAGE, *path.relative_to(package).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = absolute("." * node.level + (node.module or ""), folder)
            for alias in node.names:
                yield Import(node.lineno, refine(base, alias.name, package))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield Import(node.lineno, "torch.distributed")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(node.lineno, absolute(name.value, folder))


def absolute(name: str, folder: list[str]) -> str:
    """`name` with leading dots resolved against the dotted path of the folder it is written in."""
    bare = name.lstrip(".")
    level = len(name) - len(bare)
    if not level:
        return bare
    return ".".join([*folder[: len(folder) - level + 1], *filter(None, [bare])])


def refine(base: str, name: str, package: Path) -> str:
    """`from base import name` as `base.name` where that names a module rather than something inside one.

    In the package that is looked up in the tree; outside, only `from torch import distributed` matters.
    """
    longer = f"{base}.{name}"
    if longer in CONFINED:
        return longer
    if base.split(".")[0] != PACKAGE:
        return base
    module = package.joinpath(*longer.split(".")[1:])
    return longer if module.is_dir() or module.with_suffix(".py").is_file() else base
