"""A transfer model on disk: arrays, two CatBoost binaries, and a card that names the digest of each."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from hasgpu_core.errors import IntegrityError, InvalidError

from hasgpu_predictor.curves import BatchSteps, CurveBank
from hasgpu_predictor.device_times import DeviceTimeModel
from hasgpu_predictor.intervals import Intervals
from hasgpu_predictor.operators import COLUMNS, SUMMARY, DataSheet
from hasgpu_predictor.profile import write_atomically
from hasgpu_predictor.transfer import TRANSFER_FEATURES, TransferModel, TransferParts

FORMAT = "hasgpu-transfer-model-2"
_REGRESSORS = ("probed", "static")


def save_transfer(folder: Path, model: TransferModel) -> None:
    """Writes the model; the card last, so that a crash leaves the old one or the whole new one."""
    arrays = {
        f"device_{f.name}": getattr(model.parts.device, f.name) for f in fields(DeviceTimeModel) if f.name != "sheet"
    }
    arrays |= {f"bank_{f.name}": getattr(model.parts.bank, f.name) for f in fields(CurveBank)}
    arrays["steps_weights"] = model.parts.steps.weights
    held = io.BytesIO()
    np.savez_compressed(held, **arrays)
    parts = {"arrays": held.getvalue()}
    parts |= {name: bytes(getattr(model, name)._serialize_model()) for name in _REGRESSORS}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    for name, data in parts.items():
        write_atomically(folder / f"{digests[name]}.bin", data)
    card = {
        "format": FORMAT,
        "features": [*TRANSFER_FEATURES, *SUMMARY, *COLUMNS],
        "sheet": asdict(model.parts.device.sheet),
        "digests": digests,
        "cross_validated_mape_pct": model.cross_validated_mape_pct,
        "static_mape_pct": model.static_mape_pct,
        "intervals": {
            name: asdict(found) if (found := getattr(model, f"{name}_intervals")) is not None else None
            for name in _REGRESSORS
        },
    }
    write_atomically(folder / "transfer.json", json.dumps(card, indent=1).encode())
    for old in folder.glob("*.bin"):
        if old.stem not in digests.values():
            old.unlink(missing_ok=True)


def load_transfer(folder: Path) -> TransferModel:
    """Reads what `save_transfer` wrote.

    Raises InvalidError when a file is missing, foreign or of other features, IntegrityError when it is not the card's.
    """
    from catboost import CatBoostError, CatBoostRegressor

    path = folder / "transfer.json"
    try:
        card: dict[str, Any] = json.loads(path.read_bytes())
        if card["format"] != FORMAT:
            raise InvalidError(f"model card {path}", expected=FORMAT, got=repr(card["format"]))
        if card["features"] != [*TRANSFER_FEATURES, *SUMMARY, *COLUMNS]:
            raise InvalidError(f"model card {path}", expected="the present features", got="a model of other features")
        parts = {name: _read(folder, card["digests"][name]) for name in ("arrays", *_REGRESSORS)}
        arrays = dict(np.load(io.BytesIO(parts["arrays"]), allow_pickle=False))
        device = {f.name: arrays[f"device_{f.name}"] for f in fields(DeviceTimeModel) if f.name != "sheet"}
        bank = CurveBank(**{f.name: arrays[f"bank_{f.name}"] for f in fields(CurveBank)})
        regressors = []
        for name in _REGRESSORS:
            regressors.append(CatBoostRegressor())
            regressors[-1].load_model(blob=parts[name])
        bounds = [
            None if (found := card["intervals"][name]) is None else Intervals(**{k: tuple(v) for k, v in found.items()})
            for name in _REGRESSORS
        ]
        return TransferModel(
            TransferParts(
                DeviceTimeModel(DataSheet(**card["sheet"]), **device), bank, BatchSteps(arrays["steps_weights"])
            ),
            regressors[0],
            regressors[1],
            bounds[0],
            bounds[1],
            float(card["cross_validated_mape_pct"]),
            float(card["static_mape_pct"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, CatBoostError) as error:
        raise InvalidError(f"model in {folder}", expected="a transfer model", got=repr(error)) from error


def _read(folder: Path, sha256: str) -> bytes:
    data = (folder / f"{sha256}.bin").read_bytes()
    if (got := hashlib.sha256(data).hexdigest()) != sha256:
        raise IntegrityError(expected_sha256=sha256, got_sha256=got)
    return data
