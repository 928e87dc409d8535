"""The ctypes binding and the rungs, on a fake libcuda."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from hasgpu_core.errors import InvalidError, UnsupportedError
from hasgpu_device.backends.cuda import faults, sharing
from hasgpu_device.backends.cuda.driver import CudaDriver, DevResource, find_device
from hasgpu_device.backends.cuda.rungs import Rung, RungSet, covering, layout
from hasgpu_device.errors import DeviceFaultError
from hypothesis import given
from hypothesis import strategies as st


def test_the_resource_has_the_drivers_layout() -> None:
    assert ctypes.sizeof(DevResource) == 144
    assert DevResource.resource.offset == 96
    resource = DevResource()
    ctypes.memmove(ctypes.addressof(resource) + 96, (132).to_bytes(4, "little") + (8).to_bytes(4, "little"), 8)
    assert (resource.sm_count, resource.min_partition_size) == (132, 8)


def test_a_device_is_described(fake_cuda: Any) -> None:
    fake_cuda.set("devices", 2)
    driver = CudaDriver(fake_cuda.path)
    assert driver.version() == (13, 0)
    assert driver.has_green_contexts
    second = "GPU-00000000-0000-0000-0000-000000000002"
    assert find_device(driver, second) == (1, 1)
    assert find_device(driver, "") == (0, 0)
    assert (driver.name(0), driver.multiprocessors(0)) == ("Fake H100", 132)
    assert driver.total_memory_bytes(0) == 80 << 30
    with pytest.raises(DeviceFaultError, match=f"no CUDA device GPU-x: expected it among those visible.*{second}"):
        find_device(driver, "GPU-x")
    with pytest.raises(DeviceFaultError, match="GPU-x"):
        find_device(driver, "GPU-x", is_alone=True)
    fake_cuda.set("devices", 1)
    assert find_device(driver, "GPU-x", is_alone=True) == (0, 0)
    with pytest.raises(DeviceFaultError, match="GPU-x"):
        find_device(driver, "GPU-x")


def test_mps_is_asked_of_the_driver(fake_cuda: Any) -> None:
    driver = CudaDriver(fake_cuda.path)
    assert driver.is_mps_client(0)
    fake_cuda.set("mps", 0)
    assert not driver.is_mps_client(0)
    # A driver that does not know the attribute: not proven, hence not claimed.
    fake_cuda.set("mps", -1)
    assert not driver.is_mps_client(0)


def test_errors_have_names(fake_cuda: Any) -> None:
    driver = CudaDriver(fake_cuda.path)
    fake_cuda.set("fail_call", "cuStreamSynchronize")
    fake_cuda.set("fail_code", 719)
    driver.device_count()
    with pytest.raises(DeviceFaultError) as caught:
        driver.synchronize_stream(1)
    assert (caught.value.code, caught.value.name) == (719, "CUDA_ERROR_LAUNCH_FAILED")
    assert str(caught.value) == "CUDA_ERROR_LAUNCH_FAILED (719): unspecified launch failure, in cuStreamSynchronize"
    fake_cuda.set("fail_call", "")
    fake_cuda.set("fail_code", 807)
    # The library's own names come first; those that it lacks come from the table.
    with pytest.raises(DeviceFaultError, match="CUDA_ERROR_MPS_SERVER_NOT_READY \\(807\\)"):
        driver.device_count()
    with pytest.raises(DeviceFaultError, match="cuStreamQuery"):
        driver.is_stream_idle(1)
    fake_cuda.set("fail_code", 600)
    assert not driver.is_stream_idle(1)
    fake_cuda.set("fail_code", 0)
    assert driver.is_stream_idle(1)


def test_no_driver_and_no_device_are_told(fake_cuda: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no CUDA device: the driver's library can't be loaded"):
        CudaDriver(str(tmp_path / "libnothing.so"))
    with pytest.raises(UnsupportedError, match="is not a CUDA driver"):
        CudaDriver("libc.so.6")
    fake_cuda.set("devices", 0)
    with pytest.raises(DeviceFaultError, match=r"CUDA_ERROR_NO_DEVICE \(100\)"):
        CudaDriver(fake_cuda.path)


def test_an_old_driver_says_what_it_lacks(fake_cuda_libraries: dict[str, Path]) -> None:
    driver = CudaDriver(str(fake_cuda_libraries["old"]))
    assert not driver.has_green_contexts
    with pytest.raises(UnsupportedError, match="too old"):
        driver.sm_resource(0)
    with pytest.raises(UnsupportedError, match="no green contexts"):
        RungSet(driver, 0, (50,))
    assert not driver.upload_graph(1, 1)


def test_a_split_gives_groups_and_what_is_left(fake_cuda: Any) -> None:
    driver = CudaDriver(fake_cuda.path)
    split = driver.split(0)
    assert (split.count, split.group_sms, split.rest_sms) == (16, 8, 4)
    assert driver.split(0, 33).group_sms == 40
    with pytest.raises(UnsupportedError, match="132 SMs can't be split into groups of 200"):
        driver.split(0, 200)
    assert driver.descriptor(split.resources, 3, 4)
    with pytest.raises(ValueError, match="of 17"):
        driver.descriptor(split.resources, 15, 3)


def test_groups_of_two_splits_are_not_joined(fake_cuda: Any) -> None:
    driver = CudaDriver(fake_cuda.path)
    one, other = driver.split(0), driver.split(0)
    mixed = (DevResource * 2)(one.resources[0], other.resources[1])
    with pytest.raises(DeviceFaultError, match="CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"):
        driver.descriptor(mixed, 0, 2)


def test_rungs_are_made_at_once(fake_cuda: Any) -> None:
    driver = CudaDriver(fake_cuda.path)
    rungs = RungSet(driver, 0, (25, 50, 75, 100))
    assert len(rungs.live) == 10
    assert (fake_cuda.get("green"), fake_cuda.get("streams"), fake_cuda.get("splits")) == (10, 10, 1)
    live = rungs.find(50, 25)
    assert [fake_cuda.green(live.context, what) for what in ("first", "count", "sms")] == [4, 8, 64]
    whole = rungs.find(100, 0)
    assert fake_cuda.green(whole.context, "sms") == whole.rung.sms_count == 132
    assert len({live.stream for live in rungs.live.values()}) == 10
    with pytest.raises(UnsupportedError, match="50 % begins at 0 %, 25 %, 50 %"):
        rungs.find(50, 10)
    with pytest.raises(UnsupportedError, match="widths are 25 %, 50 %, 75 %, 100 %"):
        rungs.find(30, 0)
    rungs.destroy()
    assert (fake_cuda.get("green"), fake_cuda.get("streams")) == (0, 0)


def test_a_layout_tells_what_is_rounded_up() -> None:
    rungs = layout((5, 100), 16, 8, 4)
    assert len(rungs) == 21
    assert rungs[0] == Rung(0, 100, 0, 16, 132, has_rest=True)
    rounded = [rung for rung in rungs if rung.rounded_up]
    assert [rung.first_pct for rung in rounded] == [20, 45, 70, 95]
    assert rounded[-1].describe() == "5 % at 95 %: 8 SMs (rounded up to the smallest group)"
    assert covering(rungs, 5, 45).first_group == 7


@given(
    st.lists(st.sampled_from([5, 10, 20, 25, 50]), min_size=1, unique=True),
    st.integers(1, 40),
)
def test_ranges_that_do_not_overlap_share_no_group(widths: list[int], groups: int) -> None:
    rungs = layout(widths, groups, 8, 4)
    for rung in rungs:
        assert rung.first_group >= 0
        assert rung.groups_count >= 1
        assert rung.first_group + rung.groups_count <= groups
    exact = [rung for rung in rungs if not rung.rounded_up]
    for one in exact:
        for other in exact:
            if one.first_pct + one.sm_pct <= other.first_pct:
                assert one.first_group + one.groups_count <= other.first_group


@pytest.mark.parametrize(
    ("widths", "groups", "message"),
    [((), 16, "at least one width"), ((0, 50), 16, "1..100, got 0"), ((50,), 0, "SM groups")],
)
def test_a_layout_refuses_what_can_not_be(widths: tuple[int, ...], groups: int, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        layout(widths, groups, 8)


class TorchLikeError(RuntimeError):
    error_code = 719


def test_faults_are_found_in_what_torch_raises() -> None:
    fault = faults.fault_in(TorchLikeError("CUDA error: unspecified launch failure\nhints"), "running")
    assert fault is not None
    assert str(fault) == "CUDA_ERROR_LAUNCH_FAILED (719): CUDA error: unspecified launch failure, while running"
    by_text = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    outer = ValueError("loading failed")
    outer.__cause__ = by_text
    found = faults.fault_in(outer, "loading")
    assert found is not None
    assert found.name == "CUDA_ERROR_ILLEGAL_ADDRESS"
    for code in range(805, 811):
        assert faults.name_of(code).startswith("CUDA_ERROR_MPS_")
        assert code in faults.FATAL
    assert faults.fault_in(RuntimeError("CUDA error: out of memory"), "running") is None
    assert faults.fault_in(RuntimeError("shapes do not match"), "running") is None
    assert faults.code_of(RuntimeError("CUDA driver error: MPS client terminated")) == 810
    assert faults.name_of(12345) == "CUDA_ERROR_12345"


@pytest.mark.parametrize(
    ("mode", "mps", "environ", "name"),
    [
        (sharing.GREEN, 1, {}, ""),
        (sharing.GREEN, 0, {"CUDA_MPS_PIPE_DIRECTORY": "/run/x"}, "MPS_NOT_IN_USE"),
        (sharing.PERCENTAGE, 0, {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50"}, "MPS_NOT_IN_USE"),
        (sharing.GREEN, 1, {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50"}, "SM_LIMIT_MISSING"),
        (sharing.PERCENTAGE, 1, {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50"}, ""),
        (sharing.PERCENTAGE, 1, {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "half"}, "SM_LIMIT_MISSING"),
        (sharing.STATIC, 1, {}, "SM_LIMIT_MISSING"),
        (sharing.STATIC, 1, {"CUDA_MPS_SM_PARTITION": "GPU-1/x"}, ""),
        (sharing.TIMESHARE, 0, {}, ""),
    ],
)
def test_a_limit_that_is_not_in_force_is_refused(
    fake_cuda: Any, mode: str, mps: int, environ: dict[str, str], name: str
) -> None:
    fake_cuda.set("mps", mps)
    driver = CudaDriver(fake_cuda.path)
    if not name:
        sharing.check(mode, driver, 0, environ)
        return
    with pytest.raises(DeviceFaultError) as caught:
        sharing.check(mode, driver, 0, environ)
    assert caught.value.name == name


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InvalidError, match="expected mps\\+green or mps\\+pct or mps\\+static or timeshare, got 'mig'"):
        sharing.check_mode("mig")
