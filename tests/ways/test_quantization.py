"""Quantization: by an exported graph (PT2E, torchao), which shows norms; by module types, which do not show ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn

way = pytest.mark.way
WHERE = "Quantization"


@way(WHERE, "PT2E (torchao), a convolution before the layer", "the layer is folded into it, as torch's")
@pytest.mark.filterwarnings("ignore")  # what torchao says about itself
def test_quantization_finds_the_norms_behind_convolutions_and_folds_them() -> None:
    """PT2E as torchao does it: a converted network's exported norms go into its convolutions."""
    pt2e: Any = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")
    quantizer: Any = pytest.importorskip(
        "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", reason="torchao has no x86 quantizer"
    )
    net = nn.Sequential(nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 8, 3), bn.BatchNorm2d(8))
    x = torch.randn(16, 3, 10, 10)
    net(x)
    net.eval()
    exported = torch.export.export(net, (x,)).module()
    chosen = quantizer.X86InductorQuantizer().set_global(quantizer.get_default_x86_inductor_quantization_config())
    prepared_model = pt2e.prepare_pt2e(exported, chosen)
    prepared_model(x)
    quantized = pt2e.convert_pt2e(prepared_model)
    targets = [str(node.target) for node in quantized.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if "batch_norm" in target]
    assert [target for target in targets if "quantize" in target]
    with torch.no_grad():
        expected = net(x)
        error = (quantized(x) - expected).pow(2).mean().sqrt() / expected.std()
    assert error < 0.05  # eight bits


@way(WHERE, "`torch.ao.quantization.fuse_modules`", "an error that names `revert`: it looks for torch's own types")
def test_fusing_for_quantization_is_an_error_that_names_the_way_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3)).eval()
    with pytest.raises(bn.BatchNormError) as caught:
        torch.ao.quantization.fuse_modules(model, ["0", "1"])
    assert str(caught.value) == (
        "fuse_modules: expected torch.nn's own layers, which it knows by type, got batchnorm.BatchNorm2d. "
        "Call batchnorm.revert(model) first."
    )
