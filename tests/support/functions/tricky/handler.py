"""Echoes text, or raises, hangs, dies or burns time when the text says so."""

import os
import signal
import time

import numpy as np


def infer(batch):
    texts = list(batch["text"])
    for text in texts:
        if text == b"raise":
            raise ValueError("the handler was told to raise")
        if text == b"hang":
            time.sleep(3600)
        if text == b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == b"wrong-shape":
            return {"text": np.array(texts, dtype=object), "length": np.zeros((len(texts), 7), dtype=np.int64)}
        if text.startswith(b"burn:"):
            until = time.thread_time() + float(text[5:]) / 1e3
            while time.thread_time() < until:
                pass
    return {
        "text": np.array(texts, dtype=object),
        "length": np.array([len(text) for text in texts], dtype=np.int64),
    }
