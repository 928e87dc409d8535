"""Makes an installation's volumes ready: `python -m hasgpu_runtime.volumes`, before the brokers and services start.

Below HASGPU_VOLUMES (default /var/lib/hasgpu): `secrets` gets the brokers' passwords, made up once and never printed,
and the pieces of configuration that carry them; `nats`, `redis`, `scaler`, `rapp` and `node` (and where they are
mounted, `prometheus` and `grafana`) are marked with the layout of their state, so that another version's is refused
here, before anything runs on it. It may be run as often as one likes.

`python -m hasgpu_runtime.volumes --wait` waits until both brokers take these passwords; `--new-passwords` makes up new
ones for them, which brokers and services read when they start again.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from hasgpu_core.errors import HasgpuError, InvalidError

from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.layout import claim_folder
from hasgpu_runtime.settings import environment, load_common, text
from hasgpu_runtime.store.redis import RedisStore

DEFAULT_VOLUMES = "/var/lib/hasgpu"
STATES = ("nats", "redis", "scaler", "rapp", "node")
MOUNTED_STATES = ("prometheus", "grafana")
"""Of installations that have them: marked where a volume is mounted there."""
PASSWORD_BYTES = 24
_SECRETS_MODE = 0o640


def prepare(root: Path) -> None:
    """Writes what is missing, repairs what was derived, and checks the marks.

    Raises:
        UnsupportedError: A volume holds the state of another version's layout.
        InvalidError: One can't be written.
    """
    try:
        _prepare_secrets(root / "secrets")
    except OSError as error:
        raise InvalidError(f"volume {root / 'secrets'}", expected="a folder to write to", got=str(error)) from error
    for name in (*STATES, *(name for name in MOUNTED_STATES if (root / name).is_mount())):
        claim_folder(root / name)


def _prepare_secrets(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    nats, redis = _password(folder / "nats-password"), _password(folder / "redis-password")
    _password(folder / "grafana-password")
    _write(folder / "nats-auth.conf", f'authorization {{ user: hasgpu, password: "{nats}" }}\n')
    _write(folder / "redis-auth.conf", f"requirepass {redis}\n")


def new_passwords(root: Path) -> None:
    """Replaces the passwords of NATS and Redis; Grafana keeps its own, which it has read on its first start for good.

    Raises:
        InvalidError: The volume can't be written.
    """
    folder = root / "secrets"
    try:
        for name in ("nats-password", "redis-password"):
            _write(folder / name, _made_up())
        _prepare_secrets(folder)
    except OSError as error:
        raise InvalidError(f"volume {folder}", expected="a folder to write to", got=str(error)) from error


def _made_up() -> str:
    return secrets.token_urlsafe(PASSWORD_BYTES) + "\n"


def _password(file: Path) -> str:
    """What the file holds; what it is to hold from now on when it is not there."""
    if not file.exists():
        _write(file, _made_up())
    return file.read_text(encoding="utf-8").strip()


def _write(file: Path, content: str) -> None:
    """Whole or not at all, and readable for the owner and the group only."""
    draft = file.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    draft.touch(mode=_SECRETS_MODE)
    draft.write_text(content, encoding="utf-8")
    draft.replace(file)


async def wait_for_brokers(environ: Mapping[str, str]) -> None:
    """Returns when NATS with JetStream and Redis answer; raises HasgpuError when they don't."""
    common = load_common(environ)
    clock = SystemClock()
    async with (
        NatsBus.connect(common.nats_url, name="volumes", clock=clock),
        RedisStore.connect(common.redis_url, clock=clock),
    ):
        pass


def main() -> int:
    """Returns the exit status: 0; 1 with one line about what is wrong; 2 for a wrong call."""
    environ = environment()
    root = Path(text(environ, "HASGPU_VOLUMES", DEFAULT_VOLUMES))
    try:
        match sys.argv[1:]:
            case []:
                prepare(root)
            case ["--wait"]:
                asyncio.run(wait_for_brokers(environ))
            case ["--new-passwords"]:
                new_passwords(root)
                sys.stderr.write("hasgpu: NATS and Redis have new passwords once `docker compose restart` is done\n")
            case other:
                sys.stderr.write(f"hasgpu: expected nothing, --wait or --new-passwords, got {' '.join(other)}\n")
                return 2
    except HasgpuError as error:
        sys.stderr.write(f"hasgpu: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
