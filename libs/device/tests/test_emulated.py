"""The emulated device: what is charged, what is answered, what is said, and that it is light."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu.node_agent.v1 import node_agent_pb2_grpc
from hasgpu_core.function import TensorSpec
from hasgpu_core.profile import Basis, Profile, ProfileHeader, ProfileModel, ProfileRow
from hasgpu_core.resources import InstanceState
from hasgpu_device import backends, profiles
from hasgpu_device.backends import emulated
from hasgpu_device.backends.emulated import EmulatedBackend, made_up_outputs, read_profile
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.errors import LoadError
from hasgpu_device.gate import GateMember, RowGate
from hasgpu_device.segments import SegmentRunner
from hasgpu_device.status import EXIT_LOAD_FAILED, WorkerStatus
from hasgpu_device.worker_config import WorkerConfig

MS = 1_000_000
US_BY_SM = {25: 40_000.0, 50: 20_000.0, 100: 12_000.0}

MakeConfig = Callable[..., WorkerConfig]


def make_profile() -> Profile:
    header = ProfileHeader(
        device_model="toy-gpu",
        backend="cuda",
        basis=Basis.MODELLED,
        memory_bytes=8 << 30,
        sm_rungs_pct=(25, 50, 100),
        driver="",
        versions={},
        created_unix_s=1,
        source="made up for this test",
        models={"echo": ProfileModel("", 1 << 20, 8), "other": ProfileModel("", 1 << 20)},
    )
    rows = [
        ProfileRow(model, batch, sm_pct, 1000, us, us * (1 + (batch - 1) / 7) * scale, 5_000.0, 1)
        for model, scale in (("echo", 1.0), ("other", 0.01))
        for batch in (1, 8)
        for sm_pct, us in US_BY_SM.items()
    ]
    return Profile(header, tuple(rows))


@pytest.fixture
def profile_path(tmp_path: Path) -> Path:
    path = tmp_path / "toy.csv"
    path.write_text(make_profile().format())
    return path


@pytest.fixture
def emulated_config(make_config: MakeConfig, profile_path: Path) -> MakeConfig:
    def make(**changes: object) -> WorkerConfig:
        values: dict[str, object] = {"backend": "emulated", "profile_path": str(profile_path), "gpu": "gpu0"}
        return make_config("raise RuntimeError('the handler of an emulated function does not run')", **values | changes)

    return make


@pytest.fixture
def runner(emulated_config: MakeConfig) -> Iterator[tuple[SegmentRunner, ControlBlock, WorkerConfig]]:
    config = emulated_config()
    with (
        ControlBlock.create(config.control_path, Shares(1000, 1000)) as control,
        RowGate.create(config.gate_path),
        GateMember(config.gate_path, control.read_shares()) as member,
    ):
        yield SegmentRunner(backends.create(config), member, control), control, config


def batch_of(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array([[value] * 4 for value in values], dtype="f4")}


def test_a_batch_is_charged_what_the_table_says_in_segments_of_five_milliseconds(
    runner: tuple[SegmentRunner, ControlBlock, WorkerConfig],
) -> None:
    segments, control, config = runner
    backend = segments.backend
    model = backend.load(config, segments.boundary)
    outputs, run = segments.run(lambda: model.infer(batch_of(1, 1, 2), 3))
    expected_ns = round(12_000 * (1 + 2 / 7) * 1e3)
    assert run.device_ns == pytest.approx(expected_ns, abs=2)
    assert [segment.device_ns for segment in run.segments[:-1]] == [5 * MS] * 3
    assert control.read_counters().used_ns == run.device_ns
    assert run.execute_ns >= run.device_ns - emulated.MAX_LATE_NS
    np.testing.assert_array_equal(outputs["y"][0], outputs["y"][1])
    assert (outputs["y"][0] != outputs["y"][2]).any()


def test_a_share_that_changes_within_a_batch_holds_for_the_rest_of_it(
    runner: tuple[SegmentRunner, ControlBlock, WorkerConfig],
) -> None:
    segments, control, config = runner
    model = segments.backend.load(config, segments.boundary)

    def work() -> None:
        control.write_shares(Shares(1000, 1000, 25))
        model.infer(batch_of(1), 1)

    _, run = segments.run(work)
    # 5 ms of the 12 ms that it takes on the whole device, then the rest at 40 ms.
    assert run.device_ns == pytest.approx(5 * MS + 40 * MS * 7 / 12, abs=2)
    assert isinstance(segments.backend, EmulatedBackend)
    assert segments.backend.sm_pct == 25


def test_lateness_is_taken_off_the_next_wait_and_never_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = 0
    slept_ns: list[int] = []

    class Host:
        @staticmethod
        def monotonic_ns() -> int:
            return now_ns

        @staticmethod
        def sleep(duration_s: float) -> None:
            nonlocal now_ns
            slept_ns.append(round(duration_s * 1e9))
            now_ns += round(duration_s * 1e9) + 300_000  # this host wakes late

    monkeypatch.setattr(emulated, "time", Host)
    backend = EmulatedBackend()
    for _ in range(3):
        backend.start_segment()
        backend.occupy(2 * MS)
        assert backend.running_ns() == 2 * MS
        assert backend.stop_segment() == 2 * MS
    assert slept_ns == [2 * MS, 2 * MS - 300_000, 2 * MS - 300_000]
    backend.start_segment()
    backend.occupy(MS)
    now_ns += 500 * MS  # the host was away; what is beyond 10 ms is not made up for
    assert backend.stop_segment() == MS
    backend.start_segment()
    backend.occupy(30 * MS)
    assert backend.stop_segment() == 30 * MS
    assert slept_ns[3:] == [30 * MS - emulated.MAX_LATE_NS]


def test_jitter_is_off_by_default_and_repeats_itself(emulated_config: MakeConfig) -> None:
    def times(instance: str, **parameters: str) -> list[int]:
        backend = EmulatedBackend(emulated_config().profile_path)
        config = emulated_config(instance=instance, parameters={"hasgpu.emulate": "other", **parameters})
        model = backend.load(config, lambda: None)
        took = []
        for _ in range(4):
            backend.start_segment()
            model.infer(batch_of(1), 1)
            took.append(backend.running_ns())
        return took

    assert times("a") == [120_000] * 4
    shaken = times("a", **{"hasgpu.jitter_pct": "5"})
    assert shaken == times("a", **{"hasgpu.jitter_pct": "5"})
    assert shaken != times("b", **{"hasgpu.jitter_pct": "5"})
    assert len(set(shaken)) == 4
    assert all(abs(one - 120_000) <= 6_000 for one in shaken)
    with pytest.raises(LoadError, match=r"hasgpu\.jitter_pct: expected 0\.\.50, got 'lots'"):
        times("a", **{"hasgpu.jitter_pct": "lots"})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"function": "third"}, r"no model 'third' \(the function's name\), it has echo, other"),
        ({"parameters": {"hasgpu.emulate": "x"}}, r"no model 'x' \(the parameter hasgpu.emulate\), it has echo, other"),
        ({"max_batch": 9}, r"echo takes batches of at most 8 .*max_batch is 9"),
        ({"profile_path": "/nowhere/p.csv"}, r"the profile /nowhere/p.csv can't be read"),
    ],
)
def test_what_can_not_be_emulated_is_told(emulated_config: MakeConfig, changes: dict[str, object], told: str) -> None:
    config = emulated_config(**changes)
    with pytest.raises(LoadError, match=told):
        backends.create(config).load(config, lambda: None)


def test_a_bad_profile_is_told_by_line_and_column(profile_path: Path) -> None:
    profile_path.write_text(profile_path.read_text().replace("echo,1,25,1000,40000", "echo,1,25,1000,nan"))
    with pytest.raises(LoadError, match=r"toy.csv can't be used: profile file, line 3, latency_us.*'nan'"):
        read_profile(profile_path)


def test_outputs_have_the_declared_types_and_shapes_and_depend_on_their_own_row_alone() -> None:
    specs = [
        TensorSpec("f", "FP16", (-1, 3, -1)),
        TensorSpec("i", "INT64", (-1,)),
        TensorSpec("b", "BOOL", (-1, 2)),
        TensorSpec("t", "BYTES", (-1, 2)),
        TensorSpec("w", "BF16", (-1, 100)),
    ]
    texts = np.array([b"one", b"two", b"one"], dtype=object)
    large = np.zeros((3, 50_000), dtype="f4")
    outputs = made_up_outputs({"text": texts, "large": large}, specs, 3)
    assert outputs["f"].shape == (3, 3, 16)
    assert outputs["i"].shape == (3,)
    assert outputs["t"].shape == (3, 2)
    for spec in specs:
        np.testing.assert_array_equal(outputs[spec.name][0], outputs[spec.name][2])
    assert (outputs["w"][0] != outputs["w"][1]).any()
    assert outputs["t"][0, 0].startswith(b"emulated-")
    assert ((outputs["w"] >= 0) & (outputs["w"] < 1)).all()
    alone = made_up_outputs({"text": texts[1:2], "large": large[1:2]}, specs, 1)
    np.testing.assert_array_equal(alone["w"][0], outputs["w"][1])


def test_the_probe_says_emulated() -> None:
    info = emulated.probe("node0", "gpu3", make_profile(), source="toy.csv")
    assert (info.gpu, info.model, info.backend) == ("gpu3", "emulated-toy-gpu", "emulated")
    assert (info.memory_bytes, info.sm_rungs_pct) == (8 << 30, (25, 50, 100))
    assert info.capabilities[0].startswith("emulated: device times from toy.csv, modelled on toy-gpu")


def test_the_shipped_profile_can_be_emulated() -> None:
    profile = read_profile(profiles.shipped_path())
    assert profile == profiles.shipped()
    for model in profile.header.models:
        assert profile.device_times(model).device_time_us(1, 100) > 0


def serve(config: WorkerConfig, folder: Path) -> subprocess.Popen[bytes]:
    ControlBlock.create(config.control_path, Shares(1000, 1000)).close()
    RowGate.create(config.gate_path).close()
    config.save(folder / "config.json")
    return subprocess.Popen([sys.executable, "-m", "hasgpu_device.worker", "--config", str(folder / "config.json")])


def wait_for(config: WorkerConfig, state: InstanceState) -> WorkerStatus:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        status = WorkerStatus.load(config.status_path)
        if status is not None and status.state is state:
            return status
        time.sleep(0.02)
    raise AssertionError(f"not {state}: {WorkerStatus.load(config.status_path)}")


def test_a_worker_marks_its_answers_says_so_and_never_loads_torch(emulated_config: MakeConfig, tmp_path: Path) -> None:
    config = emulated_config(parameters={"hasgpu.emulate": "other"})
    process = serve(config, tmp_path)
    try:
        status = wait_for(config, InstanceState.READY)
        assert status.reason == "emulated from toy.csv (modelled) as other"
        x = np.ones((2, 4), "f4")
        tensor = pb.Tensor(name="x", datatype="FP32", shape=x.shape, raw=x.tobytes())
        request = pb.ExecuteRequest(batch=1, items=[pb.BatchItem(rows=2, inputs=[tensor])])
        with grpc.insecure_channel(status.address) as channel:
            stub = node_agent_pb2_grpc.WorkerServiceStub(channel)
            (answer,) = stub.Execute(iter([request]), timeout=60)
            measured = stub.Measure(pb.MeasureRequest(batch=1, repetitions_count=3), timeout=60)
        assert answer.emulated
        assert not answer.results[0].HasField("error")
        assert len(answer.results[0].outputs[0].raw) == 2 * 4 * 4
        assert measured.device_time_ns == 120_000
        loaded = Path(f"/proc/{process.pid}/maps")
        if loaded.exists():
            assert "torch" not in loaded.read_text()
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_a_function_that_the_profile_lacks_fails_with_a_reason(emulated_config: MakeConfig, tmp_path: Path) -> None:
    config = emulated_config(function="unheard-of")
    process = serve(config, tmp_path)
    assert process.wait(60) == EXIT_LOAD_FAILED
    assert "no model 'unheard-of'" in wait_for(config, InstanceState.FAILED).reason


def test_nothing_that_an_emulated_worker_imports_imports_torch() -> None:
    code = (
        "import sys; import hasgpu_device.worker, hasgpu_device.backends.emulated, hasgpu_device.profiles\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "False"


def test_parameters_for_the_system_are_not_handed_to_a_handler(make_config: MakeConfig) -> None:
    config = make_config(parameters={"hasgpu.emulate": "resnet50", "size": "3"})
    assert config.handler_parameters == {"size": "3"}
