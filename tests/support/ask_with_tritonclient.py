"""Asks the examples through tritonclient (ADDRESS FOLDER-OF-REFERENCES); prints what it saw as JSON.

Runs in an environment that has tritonclient and nothing of hasgpu.
"""

import json
import pathlib
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def main() -> None:
    address, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    client = triton.InferenceServerClient(address)
    minilm, resnet18 = np.load(folder / "minilm.npz"), np.load(folder / "resnet18.npz")

    texts = minilm["input"].astype(object)
    embeddings = []
    for at in range(0, len(texts), 4):
        part = texts[at : at + 4]
        text = triton.InferInput("text", [len(part)], "BYTES")
        text.set_data_from_numpy(part)
        embeddings.append(client.infer("minilm", [text]).as_numpy("embedding"))
    embedding = np.concatenate(embeddings)

    logits = []
    for image in resnet18["input"][:4]:
        tensor = triton.InferInput("image", [1, 3, 224, 224], "FP32")
        tensor.set_data_from_numpy(image[None])
        wanted = [triton.InferRequestedOutput("logits")]
        logits.append(client.infer("resnet18", [tensor], outputs=wanted, request_id="r1").as_numpy("logits")[0])

    try:
        client.get_model_metadata("nobody")
        unknown = "no error"
    except InferenceServerException as error:
        unknown = error.status()
    metadata = client.get_model_metadata("resnet18")
    assert metadata.inputs[0].shape == [-1, 3, 224, 224], metadata
    print(
        json.dumps(
            {
                "live": client.is_server_live(),
                "ready": client.is_server_ready(),
                "models_ready": [client.is_model_ready(name) for name in ("minilm", "resnet18")],
                "minilm_max_error": float(np.abs(embedding - minilm["output"]).max()),
                "resnet18_max_error": float(np.abs(np.stack(logits) - resnet18["output"][:4]).max()),
                "paraphrase": float(embedding[0] @ embedding[1]),
                "unrelated": float(embedding[0] @ embedding[2]),
                "unknown_model": unknown,
            }
        )
    )


if __name__ == "__main__":
    main()
