"""What only a GPU can show: graphs, streams, devices, compilers, autocast, and that it is the same bits each time.

``make test-gpu`` runs these and the conformance suite on the device.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.kernels import gpu
from batchnorm.kernels.gpu import plan, tuning

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((8, 16, 14, 14), (32, 64, 56, 56), (128, 33))


@pytest.fixture(autouse=True)
def served() -> None:
    if torch.cuda.is_available() and (why := gpu.supports(torch.ones(2, 2, device="cuda"))) is not None:
        pytest.skip(why)


def layer(shape: tuple[int, ...], **options: object) -> nn.Module:
    kind = bn.BatchNorm1d if len(shape) == 2 else bn.BatchNorm2d
    return kind(shape[1], device="cuda", **options)  # type: ignore[arg-type]


def step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, every gradient and every buffer after a training step."""
    x = x.detach().requires_grad_()
    y = module(x)
    grads = torch.autograd.grad(y, [x, *module.parameters()], dy)
    return [y.detach(), *grads, *(b.clone() for b in module.buffers())]


def test_the_kernels_are_chosen() -> None:
    assert bn.explain(torch.randn(8, 3, device="cuda")).backend == "gpu"
    assert bn.explain(torch.randn(8, 3, device="cuda", dtype=torch.float64)).backend == "eager"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_each_time(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dy = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    first = step(layer(shape, activation="relu"), x, dy)
    for _ in range(5):
        again = step(layer(shape, activation="relu"), x, dy)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_a_cuda_graph(shape: tuple[int, ...]) -> None:
    """Captured once, replayed on new values: results, gradients, running statistics and the counter follow."""
    captured, eager = layer(shape, activation="relu"), layer(shape, activation="relu")
    x, dy = (torch.randn(shape, device="cuda") for _ in range(2))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # compiles, which a capture must not
            step(captured, x, dy)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(captured, x, dy)
    captured.load_state_dict(eager.state_dict())
    for _ in range(3):
        x.normal_()
        dy.normal_()
        graph.replay()
        for a, b in zip(results, step(eager, x, dy), strict=True):
            assert torch.equal(a, b)
    assert captured.num_batches_tracked.item() == 3  # type: ignore[operator]


def test_on_several_streams() -> None:
    """Each on its own stream, all at once: as one after the other."""
    shape = (32, 64, 56, 56)
    inputs = [(torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda")) for _ in range(4)]
    alone = [step(layer(shape), x, dy) for x, dy in inputs]
    torch.cuda.synchronize()
    streams, together = [torch.cuda.Stream() for _ in inputs], []
    for stream, (x, dy) in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            together.append(step(layer(shape), x, dy))
    torch.cuda.synchronize()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_on_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(8, 3, 5, 5, device="cuda:1")
    y = bn.BatchNorm2d(3, device="cuda:1")(x)
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y, nn.BatchNorm2d(3, device="cuda:1")(x), rtol=0, atol=1e-5)


def test_the_host_does_not_wait() -> None:
    shape = (8, 16, 14, 14)
    module, x, dy = (
        layer(shape, activation="relu"),
        torch.randn(shape, device="cuda"),
        torch.randn(shape, device="cuda"),
    )
    step(module, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(module, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_under_torch_compile() -> None:
    shape = (8, 16, 14, 14)
    network, compiled = (nn.Sequential(layer(shape), nn.ReLU()) for _ in range(2))
    x, dy = (torch.randn(shape, device="cuda") for _ in range(2))
    by_compiler = step(torch.compile(compiled, fullgraph=True), x, dy)  # type: ignore[arg-type]
    for a, b in zip(step(network, x, dy), by_compiler, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_under_autocast_and_with_a_grad_scaler() -> None:
    torch.manual_seed(0)
    networks = [
        nn.Sequential(nn.Conv2d(3, 8, 3), kind(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).cuda()
        for kind in (bn.BatchNorm2d, nn.BatchNorm2d)
    ]
    networks[0].load_state_dict(networks[1].state_dict())
    x, target = torch.randn(16, 3, 8, 8, device="cuda"), torch.randint(4, (16,), device="cuda")
    losses = []
    for network in networks:
        optimizer, scaler = torch.optim.SGD(network.parameters(), lr=0.05), torch.amp.GradScaler("cuda")
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = nn.functional.cross_entropy(network(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_ddp_with_one_rank() -> None:
    code = """
        import torch, torch.distributed as dist, batchnorm as bn
        dist.init_process_group("nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8, activation="relu")).cuda()
        net = torch.nn.parallel.DistributedDataParallel(net, device_ids=[0])
        before = net.module[0].weight.detach().clone()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.randn(4, 3, 9, 9, device="cuda")).square().mean().backward()
            optimizer.step()
        assert net.module[1].num_batches_tracked.item() == 2
        assert not torch.equal(before, net.module[0].weight)
        dist.destroy_process_group()
    """
    if not torch.distributed.is_nccl_available():
        pytest.skip("torch.distributed has no NCCL here")
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_compute_sanitizer_finds_nothing() -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    code = """
        import torch, batchnorm as bn
        for shape in ((5, 33, 7, 9), (70, 3), (2, 3, 130, 67)):
            kind = bn.BatchNorm1d if len(shape) == 2 else bn.BatchNorm2d
            x = torch.randn(shape, device="cuda", requires_grad=True)
            kind(shape[1], device="cuda", activation="relu")(x, residual=x).sum().backward()
        torch.cuda.synchronize()
    """
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--error-exitcode=9", sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]


def test_tuning_measures_and_remembers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On tensors of its own; the results stay right, and a second process would read them from the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plan, "TUNE", True)
    monkeypatch.setattr(plan, "measured", measured := {})
    monkeypatch.setattr(tuning, "measured", measured)
    shape = (16, 48, 9, 9)
    x, dy = (torch.randn(shape, device="cuda") for _ in range(2))
    tuned, module = layer(shape), layer(shape)
    found = step(tuned, x, dy)
    assert tuned.num_batches_tracked.item() == 1  # type: ignore[operator]
    assert {problem.operation for problem in measured} >= {"forward", "backward"}
    (file,) = (tmp_path / "batchnorm").glob("*.json")
    assert tuning.read(file)
    monkeypatch.setattr(plan, "TUNE", False)
    measured.clear()
    for a, b in zip(found, step(module, x, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
