"""One word, two meanings: bring a momentum over from Keras, Flax or the note, and see a wrong one."""

from __future__ import annotations

import torch

import batchnorm as bn

TRUE_MEAN = 3.0
KERAS = 0.99  # Keras and Flax: the weight of the OLD value


def ours_from(weight_of_the_old_value: float) -> float:
    """Ours, as PyTorch's, is the weight of the NEW batch."""
    return 1.0 - weight_of_the_old_value


def keras_rule(batches: list[torch.Tensor], momentum: float) -> float:
    mean = 0.0
    for batch in batches:
        mean = momentum * mean + (1 - momentum) * batch.mean().item()
    return mean


def follow(batches: list[torch.Tensor], momentum: float | None) -> list[float]:
    """The running mean after each batch."""
    layer = bn.BatchNorm1d(1, momentum=momentum)
    seen = []
    for batch in batches:
        layer(batch)
        assert layer.running_mean is not None
        seen.append(layer.running_mean.item())
    return seen


def main() -> None:
    torch.manual_seed(0)
    batches = [TRUE_MEAN + torch.randn(16, 1) for _ in range(500)]

    right, wrong, cumulative = follow(batches, ours_from(KERAS)), follow(batches, KERAS), follow(batches, None)
    print(f"true mean {TRUE_MEAN}; each batch of 16 has a mean of its own, with a standard deviation of 0.25")
    print(f"{'':34}  after 500  spread of the last 100")
    for name, means in (
        (f"momentum={ours_from(KERAS):.2f}, that is 1 - {KERAS}", right),
        (f"momentum={KERAS}, copied as it was", wrong),
        ("momentum=None, cumulative", cumulative),
    ):
        print(f"{name:34}  {means[-1]:9.3f}  {torch.tensor(means[-100:]).std():22.3f}")

    assert abs(right[-1] - keras_rule(batches, KERAS)) < 1e-4
    # Copied unconverted, it forgets everything but the last batch.
    assert abs(wrong[-1] - batches[-1].mean().item()) < 0.02
    assert torch.tensor(wrong[-100:]).std() > 5 * torch.tensor(right[-100:]).std()
    # Cumulative is the plain average of all batches.
    assert abs(cumulative[-1] - torch.cat(batches).mean().item()) < 1e-4


if __name__ == "__main__":
    main()
