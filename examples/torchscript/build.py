"""Writes model.pt: a small network with seeded weights, as TorchScript."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch


def build() -> torch.nn.Module:
    """Returns the network that is saved."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()


if __name__ == "__main__":
    target = Path(__file__).with_name("model.pt")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch deprecates TorchScript; the format stays
    torch.jit.script(build()).save(str(target))
    print(f"wrote {target}")
