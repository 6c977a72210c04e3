"""Every case of the benchmark, and the few of them that ``make bench`` has time for.

ResNet-50 and MobileNetV2 for the shapes that networks have, matrices for the other common use, and extremes for what
kernels stumble over: few channels and many, odd numbers, maps of one value. torch.compile takes seconds to compile
each case and is measured on some only.
"""

from __future__ import annotations

from batchnorm.bench.cases import EXTRAS, LAYOUTS, MODES, Case, product
from batchnorm.bench.run import Entry

Shape = tuple[int, ...]

RESNET50 = (
    (64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7),
)  # fmt: skip
MOBILENETV2 = (
    (32, 112), (96, 112), (144, 56), (192, 28), (576, 14), (960, 7), (1280, 7),
)  # fmt: skip
BATCHES = (1, 8, 32)
DTYPES = ("float32", "bfloat16", "float16")

MATRICES: tuple[Shape, ...] = ((60, 100), (128, 256), (1024, 1024), (8192, 4096), (65536, 64))
EXTREMES: tuple[Shape, ...] = (
    (8, 3, 512, 512),  # fewer channels than some machines have cores
    (6, 65536),  # almost no values a channel
    (32, 256, 1, 1),
    (32, 256, 7, 7),
    (32, 768, 197),  # tokens of a vision transformer: no multiple of any vector
    (32, 37, 13, 13),  # odd everywhere
)
VOLUMES: tuple[Shape, ...] = ((4, 32, 16, 56, 56),)

PEERS = ("torch", "onednn", "copy", "clone", "memmove")
WITH_COMPILE = ("torch", "compile", "onednn", "copy", "clone", "memmove")


def images(sizes: tuple[tuple[int, int], ...], batch: int) -> list[Shape]:
    """(batch, channels, side, side) for each (channels, side)."""
    return [(batch, channels, side, side) for channels, side in sizes]


def full(threads: tuple[int, ...]) -> list[Entry]:
    """The whole registry."""
    compiled = {case for case in _resnet(32) if case.dtype != "float16"}
    compiled |= set(_whole(MATRICES, "matrices"))
    return [Entry(case, WITH_COMPILE if case in compiled else PEERS, threads, memory=True) for case in everything()]


def everything() -> list[Case]:
    """Every case, by family."""
    return [
        *(case for batch in BATCHES for case in _resnet(batch)),
        *(case for batch in BATCHES for case in _whole(images(MOBILENETV2, batch), f"mobilenetv2 N={batch}")),
        *_whole(MATRICES, "matrices"),
        *_whole(EXTREMES, "extremes"),
        *_whole(VOLUMES, "volumes"),
    ]


def short(threads: tuple[int, ...]) -> list[Entry]:
    """What three minutes allow: every kind of kernel at least once, and where the promises are made, all shapes.

    All of ResNet-50 at batch 32 in float32; of the other dtypes, layouts and fusions, shapes that stand for long,
    middle and short rows, with the last number of ``threads`` only.
    """
    training = ("forward", "forward+backward")
    shapes = images(RESNET50, 32)
    some = images(((64, 56), (512, 28), (1024, 14), (512, 7)), 32)
    few = images(((128, 28), (512, 7)), 32)
    family = "resnet50 N=32"
    last = threads[-1:]
    promised = product(shapes, modes=training, family=family)
    compiled = product(images(((128, 28), (512, 7)), 32), modes=training, family=family)
    return [
        *(Entry(case, WITH_COMPILE if case in compiled else PEERS, threads) for case in promised),
        *_entries(product(some, layouts=LAYOUTS[1:], modes=training, family=family), last),
        *_entries(product(some, ("bfloat16",), LAYOUTS, modes=training, family=family), last),
        *_entries(product(some, extras=("relu",), modes=training, family=family), last, memory=True),
        *_entries(product(few, extras=("residual+relu",), modes=training, family=family), last, memory=True),
        *_entries(product(few, ("float16",), modes=training, family=family), last),
        *_entries(product(few, layouts=LAYOUTS, modes=("inference",), family=family), last),
        *_entries(product(MATRICES[:3], family="matrices"), threads),
        *_entries(product(EXTREMES[:1] + EXTREMES[2:5], modes=training, family="extremes"), last),
    ]  # fmt: skip


def _entries(cases: list[Case], threads: tuple[int, ...], *, memory: bool = False) -> list[Entry]:
    return [Entry(case, PEERS, threads, memory=memory) for case in cases]


def _resnet(batch: int) -> list[Case]:
    return _whole(images(RESNET50, batch), f"resnet50 N={batch}")


def _whole(shapes: list[Shape] | tuple[Shape, ...], family: str) -> list[Case]:
    """In every dtype, layout and mode, and with all that may follow. One value a channel is for inference only."""
    return [case for shape in shapes for case in product([shape], DTYPES, LAYOUTS, EXTRAS, MODES, family=family)]
