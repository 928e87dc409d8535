"""Writes model.pt2: a small network with seeded weights, as a torch.export program with a free batch dimension."""

from __future__ import annotations

from pathlib import Path

import torch


def build() -> torch.nn.Module:
    """Returns the network that is exported."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()


if __name__ == "__main__":
    target = Path(__file__).with_name("model.pt2")
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(build(), (torch.zeros(2, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(program, target)
    print(f"wrote {target}")
