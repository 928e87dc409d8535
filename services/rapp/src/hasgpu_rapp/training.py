"""Trainings: in a thread, one at a time, owned by the process so that no caller's leaving cuts one in half."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hasgpu_core.errors import HasgpuError, NotFoundError
from hasgpu_core.ports import Clock
from hasgpu_predictor import (
    FunctionTransfer,
    Known,
    LatencyModel,
    ModelCard,
    Profile,
    TrainingSettings,
    data_sheet,
    fit_transfer,
)
from hasgpu_predictor.transfer import MODELS_MIN
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.telemetry import Attribute, Telemetry

from hasgpu_rapp.adapters.repository import Repository
from hasgpu_rapp.predictions import Predictions, Transfer, data_sha256
from hasgpu_rapp.world import DeviceModel

_log = logging.getLogger(__name__)


class Trainer:
    """Fits predictors to profiles and serves them.

    Args:
        tasks: Owns the trainings.
        trained: Told after each that succeeded.
    """

    def __init__(
        self,
        *,
        predictions: Predictions,
        repository: Repository,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        settings: TrainingSettings,
        telemetry: Telemetry,
        trained: Callable[[], None],
    ) -> None:
        self._predictions = predictions
        self._repository = repository
        self._clock = clock
        self._tasks = tasks
        self._settings = settings
        self._telemetry = telemetry
        self._trained = trained
        self._lock = asyncio.Lock()
        self._failed_on: dict[str, Mapping[str, Profile]] = {}
        self._coming: Counter[str] = Counter()
        """Trainings begun, or about to begin, by device model."""
        self._transferring: set[str] = set()
        self.versions: dict[str, Sequence[Mapping[str, Any]]] = {}
        """Cards of the newest models by device model, oldest first, each with `data_sha256`."""

    def refresh(self, device_model: str) -> None:
        """Trains in the background when the served model has not learnt the newest profiles.

        Profiles that a training failed on are not tried again until they change.
        """
        if self._lock.locked() or self._coming[device_model] or not self._predictions.stale(device_model):
            return
        if self._failed_on.get(device_model) == self._predictions.profiles.get(device_model):
            return
        self._start(device_model, lambda _text: None)

    def refresh_transfer(self, device: DeviceModel) -> None:
        """Fits what predicts functions without a profile, in the background, when there is something new to learn."""
        data = self._predictions.known(device.name)
        before = self._predictions.transfers.get(device.name)
        if device.name in self._transferring or (before is not None and before.data == data):
            return
        if len(data) < MODELS_MIN:
            reason = (
                f"{len(data)} of the {MODELS_MIN} functions that are needed were profiled on {device.name} with "
                "operators known"
            )
            self._predictions.transfers[device.name] = Transfer(data, None, reason)
            return
        self._transferring.add(device.name)
        self._tasks.create_task(self._transfer(device, data), name=f"transfer {device.name}")

    async def _transfer(self, device: DeviceModel, data: Mapping[str, Known]) -> None:
        def fit() -> FunctionTransfer:
            began_s = self._clock.now_s()
            found = fit_transfer(
                list(data.values()),
                device_model=device.name,
                sheet=data_sheet(device.name, device.backend),
                seed=self._settings.seed,
                threads_count=self._settings.threads_count,
            )
            return replace(found, card=replace(found.card, train_s=self._clock.now_s() - began_s))

        try:
            with self._telemetry.span("rapp.train", attributes={"device_model": device.name, "transfer": True}):
                model = await asyncio.to_thread(fit)
        except HasgpuError as error:
            before = self._predictions.transfers.get(device.name)
            _log.error("learning to transfer between functions of %s failed: %s", device.name, error)
            self._predictions.transfers[device.name] = Transfer(data, before.model if before else None, str(error))
        else:
            self._predictions.transfers[device.name] = Transfer(data, model)
            card = model.card
            text = "%s: %d functions tell of others; error %.0f %% from operators alone, %.0f %% with five points"
            _log.info(text, device.name, len(card.models), card.static_mape_pct, card.probed_mape_pct)
        finally:
            self._transferring.discard(device.name)
        self._trained()

    @contextmanager
    def reserved(self, device_model: str) -> Iterator[None]:
        """Keeps `refresh` from training on what is being learnt: who does that calls `train` right afterwards."""
        self._coming[device_model] += 1
        try:
            yield
        finally:
            self._coming[device_model] -= 1

    async def train(self, device_model: str, progress: Callable[[str], None] = lambda _text: None) -> ModelCard:
        """Fits the device model's predictor to its profiles and serves it.

        `progress` is called in the event loop, in words. Raises NotFoundError when nothing was measured on the device
        model, ModelError when the data can't be fitted: the model served then stays, beside the newest points.
        """
        result = await asyncio.shield(self._start(device_model, progress))
        if isinstance(result, HasgpuError):
            raise result
        return result

    def _start(self, device_model: str, progress: Callable[[str], None]) -> asyncio.Task[ModelCard | HasgpuError]:
        self._coming[device_model] += 1
        task = self._tasks.create_task(self._guarded(device_model, progress), name=f"train {device_model}")
        task.add_done_callback(lambda _task: self._coming.subtract([device_model]))
        return task

    async def _guarded(self, device_model: str, progress: Callable[[str], None]) -> ModelCard | HasgpuError:
        async with self._lock:
            profiles = dict(self._predictions.profiles.get(device_model, {}))
            try:
                model = await self._fit(device_model, profiles, progress)
            except HasgpuError as error:
                _log.error("the training for %s failed: %s", device_model, error)
                if profiles:  # the physical estimate knows the new points, with what was learnt before
                    self._failed_on[device_model] = profiles
                    self._predictions.serve(self._predictions.model(device_model), profiles)
                    self._trained()
                return error
            self._predictions.serve(model, profiles)
        self._trained()
        card = model.card
        error_text = f"{card.mape_pct:.1f} %" if card.mape_pct is not None else "not measured"
        _log.info("%s: version %d of %d rows, error %s", device_model, card.version, card.rows_count, error_text)
        return card

    async def _fit(
        self, device_model: str, profiles: Mapping[str, Profile], progress: Callable[[str], None]
    ) -> LatencyModel:
        if not profiles:
            raise NotFoundError("profile on device model", device_model, "nothing was measured on it yet")
        loop = asyncio.get_running_loop()
        version = self._predictions.next_version(device_model)

        def tell(text: str) -> None:
            loop.call_soon_threadsafe(progress, text)

        def fit() -> LatencyModel:
            began_s = self._clock.now_s()
            model = LatencyModel.train(
                list(profiles.values()),
                device_model=device_model,
                version=version,
                settings=self._settings,
                progress=tell,
            ).stamped(train_s=self._clock.now_s() - began_s, trained_unix_ns=self._clock.unix_ns())
            try:
                kept = self._repository.save_model(model, data_sha256(profiles))
                self.versions[device_model] = kept
            except OSError as error:
                _log.error("the model of %s could not be kept; a restart will train anew: %s", device_model, error)
            return model

        attributes: dict[str, Attribute] = {names.DEVICE_MODEL: device_model, names.VERSION: version}
        with self._telemetry.span("rapp.train", attributes=attributes):
            return await asyncio.to_thread(fit)
