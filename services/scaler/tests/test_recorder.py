"""What the scaler keeps of what it saw and decided."""

from __future__ import annotations

import gzip

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.recording import RecordedInput, RecordedTick, parse
from hasgpu_scaler.adapters import recording_files
from hasgpu_scaler.adapters.recording_files import RecordingFiles
from hasgpu_sim.recording import apply, read_recording, read_recording_bytes


def seen_at_the_end(load) -> ClusterObserver:
    """An observer that was shown all inputs, and what was decided."""
    observer = ClusterObserver()
    for entry in load.entries:
        if isinstance(entry, RecordedInput):
            apply(observer, entry.event, entry.at_s)
            continue
        for decision in entry.decisions:
            observer.set_desired(decision.function, decision.desired, decision.next_ordinal)
    return observer


async def test_any_segment_alone_tells_what_was_seen(world, tmp_path, monkeypatch):
    """The oldest ones may be thrown away: each begins with all that is known."""
    monkeypatch.setattr(recording_files, "SEGMENT_S", 4.0)
    files = RecordingFiles(tmp_path, 1 << 30)
    async with world.scaler(files=files) as app:
        await world.ready(app)
        await world.load(app, 60.0, 13.0)
        paths = files.segments(0, 0)
        assert len(paths) >= 3
        live = app.core.observer.snapshot(world.clock.now_s())
        for path in (paths[0], paths[-1]):
            load = read_recording_bytes(b"".join(p.read_bytes() for p in paths[paths.index(path) :]))
            assert seen_at_the_end(load).snapshot(world.clock.now_s()) == live
        acted = [d for tick in read_recording(paths[0]).ticks for d in tick.decisions if d.actions]
        assert acted
        assert load.unix_offset_ns == world.clock.unix_ns() - round(world.clock.now_s() * 1e9)
        middle = world.clock.unix_ns() - 6 * 10**9
        assert len(files.segments(middle, middle)) == 1
        assert files.segments(world.clock.unix_ns(), 0) == [paths[-1]]


async def test_what_is_set_by_hand_and_what_goes_is_recorded(world, tmp_path, make_spec):
    from hasgpu_scaler.manual import ManualRequest

    files = RecordingFiles(tmp_path, 1 << 30)
    async with world.scaler(files=files) as app:
        await world.ready(app)
        await app.scale_by_hand(ManualRequest("f", "", 700, None, None, 30))
        await app.run_pass()
        load = read_recording(files.segments(0, 0)[0])
        view = seen_at_the_end(load).snapshot(world.clock.now_s()).functions[0]
        assert view.held
        assert [i.allocation.request_permille for i in view.instances] == [700]
        await world.undeploy("f")
        await world.bus.delete("node.a")
        await world.settle()
        world.clock.advance(1.0)
        await app.run_pass()
        snapshot = seen_at_the_end(read_recording(files.segments(0, 0)[0])).snapshot(world.clock.now_s())
        assert snapshot == app.core.observer.snapshot(world.clock.now_s())
        assert not snapshot.functions
        assert not snapshot.devices


async def test_only_the_leader_writes(world, tmp_path):
    files = RecordingFiles(tmp_path, 1 << 30)
    async with world.scaler(files=files) as app:
        await world.ready(app)
        await world.load(app, 10.0, 2.0)
        app.held[0] = None
        await app.run_pass()
        count = len(list(read_recording(files.segments(0, 0)[0]).ticks))
        await world.load(app, 10.0, 2.0)
        assert len(list(read_recording(files.segments(0, 0)[0]).ticks)) == count


def test_old_segments_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(recording_files, "SEGMENT_BYTES", 1_000)
    files = RecordingFiles(tmp_path, 3_000)
    for second in range(20):
        files.begin("{}", ["x" * 50 + str(second)], second * 10**9)
        files.write([gzip.compress(str(i).encode()).hex() for i in range(40)], second * 10**9)
    files.close()
    names = [path.name for path in files.segments(0, 0)]
    assert names[-1].startswith("00000000019000")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3_000


def test_a_disk_that_can_not_be_written_stops_no_decision(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    files = RecordingFiles(tmp_path / "file", 1 << 30)
    files.begin("{}", [], 0)
    files.write(["{}"], 0)
    files.close()
    assert "not recorded" in caplog.text


def test_recordings_that_can_not_be_are_named():
    with pytest.raises(InvalidError, match="format hasgpu-recording"):
        parse(["x,y", ""], "f")
    head = '{"format": "hasgpu-recording", "version": 1, "unix_offset_ns": 5, "policy": "p", "fresh": true}'
    with pytest.raises(InvalidError, match=r"line 2.*an input or a pass"):
        parse([head, '{"at": 1, "k": "nothing", "v": {}}'], "f")
    with pytest.raises(InvalidError, match="version 2"):
        parse([head.replace('"version": 1', '"version": 2')], "f")
    cut = parse([head, '{"at": 1, "k": "tick", "v": []}', '{"at": 2, "k": "ti'], "f")
    assert cut.entries == (RecordedTick(1.0, ()),)
    assert cut.unix_offset_ns == 5
