"""The folders of a node.

```
<state dir>/<node>/
├── artifacts/<sha256>/           unpacked artifacts
├── instances/<id>/
│   ├── worker.log, worker.log.1  stdout and stderr of all its workers; the older part
│   └── worker-<generation>/      one worker process: config.json, status.json, record.json
├── profiles/<id>/                the same, while a profiling run lasts
└── mps/<gpu>/                    its MPS daemon: sockets, logs, daemon.json

/dev/shm/hasgpu-<user>-<node>/    what processes share page by page, away from any disk: writing a disk back can stop
├── <gpu>-row-<n>.gate            whoever touches a page of it, and with the gate's holder its whole row
├── <gpu>.ledger                  SMs in use while rows of the device may overlap
└── <id>.worker-<n>.control       (<state dir>/<node>/pages/ where there is no /dev/shm)
```
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from hasgpu_core.errors import UnavailableError
from hasgpu_core.resources import Allocation

from hasgpu_node_agent.ports import WorkerRecord
from hasgpu_node_agent.row_guard import WorkerKey

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  a private folder is made in it and its owner checked
LOG_LIMIT_BYTES = 4 << 20
"""A log that is larger when a worker starts is set aside; the one set aside before is deleted."""


@dataclass(frozen=True, slots=True)
class WorkerFolder:
    """The folder of one worker process."""

    path: Path
    pages: Path
    """Where shared pages lie."""

    @property
    def config(self) -> Path:
        """`hasgpu_device.worker_config.WorkerConfig`."""
        return self.path / "config.json"

    @property
    def status(self) -> Path:
        """Written by the worker."""
        return self.path / "status.json"

    @property
    def control(self) -> Path:
        """The control block."""
        return self._page("control")

    @property
    def gate(self) -> Path:
        """A gate of its own, for a profiling run."""
        return self._page("gate")

    def _page(self, kind: str) -> Path:
        group, instance, worker = self.path.parts[-3:]
        return self.pages / f"{group}.{instance}.{worker}.{kind}"

    @property
    def record(self) -> Path:
        """The agent's own note of the worker."""
        return self.path / "record.json"

    @property
    def log(self) -> Path:
        """Shared by all workers of the instance."""
        return self.path.parent / "worker.log"

    def write_record(self, record: WorkerRecord) -> None:
        """Writes the record; a reader sees the former or the new one, whole. Raises OSError."""
        draft = self.record.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(record)), encoding="utf-8")
        draft.replace(self.record)

    def read_record(self) -> WorkerRecord | None:
        """Returns the record; None: there is none that can be read."""
        try:
            raw = json.loads(self.record.read_text(encoding="utf-8"))
            raw["key"] = WorkerKey(**raw["key"])
            raw["allocation"] = Allocation(**raw["allocation"])
            return WorkerRecord(**raw)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def open_log(self) -> IO[bytes]:
        """Opens the instance's log for appending, after setting a long one aside. Raises OSError."""
        if self.log.exists() and self.log.stat().st_size > LOG_LIMIT_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        return self.log.open("ab")

    def remove(self) -> None:
        """Deletes the folder and its pages; the log stays with the instance."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.control.unlink(missing_ok=True)
        self.gate.unlink(missing_ok=True)


class NodeFolders:
    """Where things lie below one node's folder."""

    def __init__(self, root: Path) -> None:
        # Workers are found again by the paths on their command lines, whatever the working folder is then.
        root = root.resolve()
        self.root = root
        self.artifacts = root / "artifacts"
        self.pages = _shared_memory(root) or root / "pages"
        self.instances = root / "instances"
        self.profiles = root / "profiles"
        for folder in (self.artifacts, self.pages, self.instances, self.profiles):
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second agent of the same node away; the lock falls with its holder. Raises UnavailableError."""
        with (self.root / "agent.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UnavailableError(f"another node agent runs on {self.root}") from error
            yield

    def worker(self, key: WorkerKey, *, profiling: bool = False) -> WorkerFolder:
        """Returns a worker's folder; it may not exist yet."""
        parent = self.profiles if profiling else self.instances
        return self.at(parent / key.instance / f"worker-{key.generation}")

    def at(self, path: Path) -> WorkerFolder:
        """Returns the worker's folder that lies there."""
        return WorkerFolder(path, self.pages)

    def gate(self, gpu: str, row: int) -> Path:
        """Returns the file of a row's gate."""
        return self.pages / f"{gpu}-row-{row}.gate"

    def ledger(self, gpu: str) -> Path:
        """Returns the file of a device's ledger of SMs in use."""
        return self.pages / f"{gpu}.ledger"

    def mps(self, gpu: str) -> Path:
        """Returns the private folder of a GPU's MPS daemon."""
        return self.root / "mps" / gpu

    def drop_pages(self) -> None:
        """Deletes the shared pages; only when no worker runs any more."""
        shutil.rmtree(self.pages, ignore_errors=True)

    def clear_pages(self) -> None:
        """Empties the folder of the shared pages, on the same condition: another version may have made them."""
        for page in self.pages.iterdir():
            page.unlink(missing_ok=True)

    def stale(self, live: set[Path]) -> list[Path]:
        """Returns the workers' folders under `instances` and `profiles` that are not among the live ones."""
        found = [p for parent in (self.instances, self.profiles) for p in parent.glob("*/worker-*")]
        return [path for path in found if path not in live]

    def forget(self, instance: str, *, profiling: bool = False) -> None:
        """Deletes all that is left of an instance."""
        shutil.rmtree((self.profiles if profiling else self.instances) / instance, ignore_errors=True)

    def drop_empty(self) -> None:
        """Deletes the instance folders that have no worker's folder any more."""
        for parent in (self.instances, self.profiles):
            for folder in parent.iterdir():
                if not any(folder.glob("worker-*")):
                    shutil.rmtree(folder, ignore_errors=True)


def _shared_memory(root: Path) -> Path | None:
    """A node's private folder in shared memory; None where there is none, or somebody else has taken the name."""
    name = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    folder = SHARED_MEMORY / f"hasgpu-{os.getuid()}-{name}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    return folder if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() else None
