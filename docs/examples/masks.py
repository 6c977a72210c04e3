"""Sequences of different lengths in one batch: padding must not count."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

import batchnorm as bn


def main() -> None:
    torch.manual_seed(0)
    lengths = [12, 3, 5, 2]
    sequences = [5 + 2 * torch.randn(length, 4) for length in lengths]  # (time, channels)
    padded = pad_sequence(sequences, batch_first=True).transpose(1, 2)  # (N, channels, time), 0 where padded
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (N, time), True where present
    print(f"{mask.sum().item()} of {mask.numel()} steps are present")

    everything = torch.cat(sequences)
    without = bn.Moments.from_tensor(padded)
    with_mask = bn.Moments.from_tensor(padded, mask=mask)
    print(f"mean of channel 0 without the mask {without.mean[0]:.3f}, with it {with_mask.mean[0]:.3f}")
    assert torch.allclose(with_mask.mean, everything.double().mean(0))
    assert torch.allclose(with_mask.variance(), everything.double().var(0, unbiased=False))

    y = bn.functional.batch_norm(padded, None, None, training=True, mask=mask)
    alone = torch.nn.functional.batch_norm(everything, None, None, training=True)
    present = y.transpose(1, 2)[mask]  # the steps that exist, sequence after sequence
    assert torch.allclose(present, alone, atol=1e-5)
    assert (y.transpose(1, 2)[~mask] == 0).all()
    print("normalized as if the padding were not there; the padding comes out as 0")

    # How far the batch was padded does not matter any more.
    longer = torch.nn.functional.pad(padded, (0, 20))
    longer_mask = torch.nn.functional.pad(mask, (0, 20))
    again = bn.functional.batch_norm(longer, None, None, training=True, mask=longer_mask)
    assert torch.allclose(again[..., : max(lengths)], y, atol=1e-6)
    print("20 more steps of padding change nothing")


if __name__ == "__main__":
    main()
