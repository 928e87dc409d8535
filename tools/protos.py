"""Generates proto/gen from proto/**/*.proto, or (--check) tells whether it is up to date."""

from __future__ import annotations

import argparse
import filecmp
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
GEN = PROTO / "gen"


def modules(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the generated modules and stubs below a folder, relative to it."""
    found = (path.relative_to(folder) for path in folder.rglob("*_pb2*.py*"))
    return sorted(path for path in found if "__pycache__" not in path.parts)


def generate(out: pathlib.Path) -> list[pathlib.Path]:
    """Writes the generated modules under `out`; returns their paths relative to it. Refuses an empty result."""
    sources = sorted(PROTO.glob("hasgpu/**/*.proto"))
    if not sources:
        raise SystemExit(f"no .proto file under {PROTO}")
    out.mkdir(parents=True, exist_ok=True)
    plugins = [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
    plugins += [f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")]
    bin_dir = pathlib.Path(sys.executable).parent
    names = [f"--plugin=protoc-gen-{kind}={bin_dir / f'protoc-gen-{kind}'}" for kind in ("mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *names, *plugins, *map(str, sources)]
    subprocess.run(command, check=True)
    made = modules(out)
    if len(made) < 2 * len(sources):
        raise SystemExit(f"protoc made {len(made)} files of {len(sources)} sources")
    return made


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when proto/gen is stale")
    if not parser.parse_args().check:
        print(f"{len(generate(GEN))} files under {GEN.relative_to(ROOT)}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(pathlib.Path(scratch))
        kept = modules(GEN)
        stale = [str(p) for p in fresh if p not in kept or not filecmp.cmp(GEN / p, pathlib.Path(scratch) / p, False)]
        stale += [f"{p} (no source)" for p in kept if p not in fresh]
    if stale:
        raise SystemExit("stale, run make proto:\n  " + "\n  ".join(stale))
    print(f"{len(fresh)} generated files are up to date")


if __name__ == "__main__":
    main()
