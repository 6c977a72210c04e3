"""All of a model that a function may have touched, for tests that it did not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def everything(model: nn.Module) -> dict[str, Any]:
    """State to the last bit, modes, flags, hooks, the tensors themselves, and what instances have of their own."""
    return {
        "state": {
            k: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for k, t in model.state_dict().items()
        },
        "modes": [m.training for m in model.modules()],
        "flags": [(getattr(m, "track_running_stats", None), getattr(m, "momentum", None)) for m in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "objects": [id(t) for t in (*model.parameters(), *model.buffers())],
        "gradients": [p.requires_grad for p in model.parameters()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "forwards": [vars(m).get("forward") for m in model.modules()],
    }
