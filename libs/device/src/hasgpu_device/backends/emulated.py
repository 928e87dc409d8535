"""An emulated device: time passes as a profile's table says, outputs are made up, everything says so.

Many GPUs on a small host: gate, rows, shares, routes and scaling are the live ones, only the work is not done. A batch
holds the device for the device time that the profile gives for its size and SM share. That time passes by sleeping, a
segment is charged the time of the table and not the host's lateness, and what a sleep took too long is taken off the
next one. torch is not imported.

Which model of the profile: the function's parameter `hasgpu.emulate` where it is given, else the one of the function's
name. The parameter `hasgpu.jitter_pct` lets each batch take up to so much more or less, drawn from a generator that is
seeded with the instance's name; without it equal batches take equal time.

Outputs have the declared types and shapes; each row's values come from a digest of that row's inputs, so equal rows get
equal answers.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from hasgpu_core.device_times import DeviceTimes
from hasgpu_core.errors import HasgpuError, NotFoundError
from hasgpu_core.function import TensorSpec
from hasgpu_core.profile import Profile
from hasgpu_core.resources import DeviceInfo

from hasgpu_device import models, tensors
from hasgpu_device.errors import LoadError
from hasgpu_device.segments import SEGMENT_NS
from hasgpu_device.tensors import Array
from hasgpu_device.worker_config import WorkerConfig

EMULATE_PARAMETER = "hasgpu.emulate"
JITTER_PARAMETER = "hasgpu.jitter_pct"
MODEL_PREFIX = "emulated-"
"""Of an emulated device's model name, before that of the profile."""
STEP_NS = SEGMENT_NS
"""A batch may be interrupted after each such part of its device time: where the segment has to end, and no oftener."""
MAX_LATE_NS = 10_000_000
"""Lateness beyond it is the host's being overloaded, and is not made up for."""
_HASHED_BYTES = 65_536
"""Of larger rows an even sample of so many bytes goes into the digest."""
_MAX_JITTER_PCT = 50


class EmulatedBackend:
    """Device time that passes by waiting.

    Args:
        profile_path: The profile file; read by `load`.

    Attributes:
        sm_pct: Share in force.
    """

    name = "emulated"

    def __init__(self, profile_path: str = "") -> None:
        self._profile_path = profile_path
        self.sm_pct = 100
        self._spent_ns = 0
        self._began_ns = 0
        self._late_ns = 0

    def setup_loader(self) -> None:
        """Nothing to prepare."""

    def setup(self) -> None:
        """Nothing to prepare."""

    def load(self, config: WorkerConfig, boundary: Callable[[], None]) -> models.Model:
        """Finds the function's model in the profile; raises LoadError, naming what the profile has."""
        path = Path(self._profile_path)
        try:
            profile = read_profile(path)
        except HasgpuError as error:
            raise LoadError(str(error)) from error
        wanted = config.parameters.get(EMULATE_PARAMETER, config.function)
        try:
            times = profile.device_times(wanted)
        except NotFoundError as error:
            given = f"parameter {EMULATE_PARAMETER}" if EMULATE_PARAMETER in config.parameters else "function's name"
            raise LoadError(
                f"the profile {path} has no model {wanted!r} (the {given}), it has "
                f"{', '.join(sorted(profile.header.models))}; name one in the parameter {EMULATE_PARAMETER}"
            ) from error
        max_batch = profile.header.models[wanted].max_batch
        if max_batch is not None and config.max_batch > max_batch:
            raise LoadError(
                f"on {profile.header.device_model} {wanted} takes batches of at most {max_batch} (profile {path}), "
                f"the function's max_batch is {config.max_batch}"
            )
        note = f"emulated from {path.name} ({profile.header.basis.value}) as {wanted}"
        if not times.covers(config.max_batch, self.sm_pct):
            note += "; device times beyond its cells are extrapolated"
        run = _Run(self, times, boundary, _jitter(config), config.outputs)
        return models.Model(run, config.outputs, boundaries_count=-1, note=note, emulated=True)

    def apply_sm(self, sm_pct: int, first_pct: int = 0) -> None:
        """Notes the share; the table says what it buys."""
        del first_pct
        self.sm_pct = sm_pct

    def occupy(self, device_ns: int) -> None:
        """Does work that takes so much device time on the share in force; `stop_segment` waits for it."""
        self._spent_ns += device_ns

    def start_segment(self) -> None:
        """Starts timing."""
        self._spent_ns = 0
        self._began_ns = time.monotonic_ns()

    def running_ns(self) -> int:
        """Returns the device time of the work given to the segment so far."""
        return self._spent_ns

    def stop_segment(self) -> int:
        """Sleeps until the work is done on the emulated device and returns its device time."""
        done_ns = self._began_ns + self._spent_ns - self._late_ns
        now_ns = time.monotonic_ns()
        if done_ns > now_ns:
            time.sleep((done_ns - now_ns) / 1e9)
            now_ns = time.monotonic_ns()
        self._late_ns = min(max(0, now_ns - done_ns), MAX_LATE_NS)
        return self._spent_ns


class _Run:
    """The model's call."""

    def __init__(
        self,
        backend: EmulatedBackend,
        times: DeviceTimes,
        boundary: Callable[[], None],
        jitter: Callable[[], float],
        outputs: Sequence[TensorSpec],
    ) -> None:
        self._backend = backend
        self._times = times
        self._boundary = boundary
        self._jitter = jitter
        self._outputs = tuple(outputs)
        self._known_us: dict[tuple[int, int], float] = {}

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        rows = len(next(iter(batch.values())))
        answer = made_up_outputs(batch, self._outputs, rows)
        factor = self._jitter()
        whole_ns = left_ns = self._device_ns(rows, factor)
        while True:
            step_ns = min(left_ns, STEP_NS)
            self._backend.occupy(step_ns)
            left_ns -= step_ns
            if not left_ns:
                return answer
            self._boundary()
            before_ns, whole_ns = whole_ns, self._device_ns(rows, factor)
            if whole_ns != before_ns:  # the segments that follow have another share
                left_ns = max(1, left_ns * whole_ns // before_ns)

    def _device_ns(self, rows: int, factor: float) -> int:
        key = rows, self._backend.sm_pct
        if key not in self._known_us:
            self._known_us[key] = self._times.device_time_us(*key)
        return max(1, round(self._known_us[key] * factor * 1e3))


def _jitter(config: WorkerConfig) -> Callable[[], float]:
    text = config.parameters.get(JITTER_PARAMETER, "0")
    try:
        jitter_pct = float(text)
    except ValueError:
        jitter_pct = -1.0
    if not 0 <= jitter_pct <= _MAX_JITTER_PCT:
        raise LoadError(f"parameter {JITTER_PARAMETER}: expected 0..{_MAX_JITTER_PCT}, got {text!r}")
    if not jitter_pct:
        return lambda: 1.0
    rng = random.Random(config.instance)  # noqa: S311  made-up time, not a secret
    return lambda: 1.0 + rng.uniform(-jitter_pct, jitter_pct) / 100


def made_up_outputs(batch: dict[str, Array], outputs: Sequence[TensorSpec], rows: int) -> dict[str, Array]:
    """Returns outputs of the declared types and shapes; equal rows of inputs give equal rows of outputs.

    Floats are in [0, 1), integers in 0..9, BYTES say "emulated" and a number; variable dimensions are 16.
    """
    digests = [_digest(batch, row) for row in range(rows)]
    return {
        spec.name: np.stack([_values(digest, spec) for digest in digests]).astype(tensors.DTYPE[spec.datatype])
        for spec in outputs
    }


def _digest(batch: dict[str, Array], row: int) -> bytes:
    digest = hashlib.blake2b()
    for name, array in batch.items():
        digest.update(name.encode())
        part = array[row : row + 1]
        if part.dtype == object:
            for element in part.reshape(-1):
                digest.update(len(element).to_bytes(4, "little"))
                digest.update(element)
            continue
        flat = part.reshape(-1)
        stride = 1 + flat.nbytes // _HASHED_BYTES
        digest.update(np.ascontiguousarray(flat[::stride]).tobytes())
    return digest.digest()


def _values(digest: bytes, spec: TensorSpec) -> Array:
    shape = tuple(tensors.VARIABLE_DIMENSION if dim == -1 else dim for dim in spec.shape[1:])
    pattern = np.frombuffer(digest, dtype="u1")
    if spec.datatype == "BYTES":
        words = np.array([b"emulated-%d" % byte for byte in digest], dtype=object)
        return np.resize(words, shape)
    values = np.resize(pattern, shape)
    if spec.datatype == "BOOL":
        return values & 1
    return values / 256 if tensors.DTYPE[spec.datatype].kind == "f" else values % 10


def read_profile(path: Path) -> Profile:
    """Reads a profile file. Raises HasgpuError: it can't be read, or is not one; the message names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"the profile {path} can't be read: {error}") from error
    try:
        return Profile.parse(text)
    except HasgpuError as error:
        raise LoadError(f"the profile {path} can't be used: {error}") from error


def probe(node: str, gpu: str, profile: Profile, *, source: str) -> DeviceInfo:
    """Describes an emulated device.

    Args:
        node: Name of the node.
        gpu: Name of the device within the node.
        profile: What it is emulated from.
        source: Name of the profile's file, for the words.
    """
    header = profile.header
    return DeviceInfo(
        node,
        gpu,
        MODEL_PREFIX + header.device_model,
        "emulated",
        header.memory_bytes,
        header.sm_rungs_pct,
        (
            f"emulated: device times from {source}, {header.basis.value} on {header.device_model}; outputs are made up",
            "sm: emulated, as the profile's table says",
            "live sm change: yes, at the next segment",
            "time: token gate on emulated device time",
            "live quota change: yes, at the next segment",
            "memory: not enforced",
        ),
    )
