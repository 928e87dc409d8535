"""Builds the images of the services, one at a time, and prints their sizes: `python tools/compose_images.py`.

Needs a Docker engine and its command. pip's settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS,
PIP_TRUSTED_HOST) are taken from the environment, the base image and the version from deploy/compose/.env.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ("gateway", "scaler", "scheduler", "rapp", "node-agent", "cli")
PIP_SETTINGS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_TRUSTED_HOST")


@dataclass(frozen=True, slots=True)
class Size:
    """How large an image is."""

    image: str
    total_mb: float
    """In 1e6 bytes, as Docker counts them: the base included, unpacked."""
    beyond_base_mb: float


def read_settings(file: Path = ROOT / "deploy/compose/.env") -> Mapping[str, str]:
    """Returns what .env sets, overridden by the environment, as Compose does."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: os.environ.get(name, value) for name, _, value in pairs}


def tag(service: str, variant: str, settings: Mapping[str, str]) -> str:
    """Returns an image's name and tag, as the Compose files have it."""
    suffix = "-cuda" if service == "node-agent" and variant == "cuda" else ""
    return f"hasgpu/{service}:{settings['HASGPU_VERSION']}{suffix}"


def build(service: str, variant: str, settings: Mapping[str, str], *, quiet: bool) -> str:
    """Builds one and returns its tag; raises subprocess.CalledProcessError."""
    image = tag(service, variant, settings)
    arguments = {
        "PYTHON_IMAGE": settings["PYTHON_IMAGE"],
        "VERSION": settings["HASGPU_VERSION"],
        "REVISION": _revision(),
        **{name: os.environ[name] for name in PIP_SETTINGS if os.environ.get(name)},
        **({"VARIANT": variant} if service == "node-agent" else {}),
    }
    command = ["docker", "build", "--file", f"deploy/docker/{service}.Dockerfile", "--tag", image]
    command += [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    command += ["--quiet", "."] if quiet else ["."]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return image


def measure(image: str, base: str) -> Size:
    """Returns the sizes of an image that is there; raises subprocess.CalledProcessError."""
    total, below = (_size_bytes(name) for name in (image, base))
    return Size(image, round(total / 1e6, 1), round((total - below) / 1e6, 1))


def _size_bytes(image: str) -> int:
    inspected = subprocess.run(
        ["docker", "image", "inspect", "--format", "{{.Size}}", image], capture_output=True, text=True, check=True
    )
    return int(inspected.stdout)


def _revision() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the images of the services and print their sizes.")
    parser.add_argument("services", nargs="*", metavar="SERVICE", help=f"of {', '.join(SERVICES)} [all]")
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu", help="of the node agent [cpu]")
    parser.add_argument("--no-build", action="store_true", help="print the sizes of those that are there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verbose", action="store_true", help="show the builds")
    options = parser.parse_args(arguments)
    if unknown := set(options.services) - set(SERVICES):
        parser.error(f"expected services of {', '.join(SERVICES)}, got {', '.join(sorted(unknown))}")
    if shutil.which("docker") is None:
        parser.error("there is no command `docker`: install Docker Engine")
    settings = read_settings()
    sizes = []
    try:
        for service in options.services or SERVICES:
            if not options.no_build:
                sys.stderr.write(f"building {tag(service, options.variant, settings)} ...\n")
                build(service, options.variant, settings, quiet=not options.verbose)
            sizes.append(measure(tag(service, options.variant, settings), settings["PYTHON_IMAGE"]))
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"{' '.join(error.cmd[:3])} ... failed: {error.stderr or 'see above'}\n")
        return 1
    if options.json:
        print(json.dumps([asdict(size) for size in sizes], indent=1))
        return 0
    print(f"{'image':<28} {'MB':>8} {'beyond ' + settings['PYTHON_IMAGE']:>40}")
    for size in sizes:
        print(f"{size.image:<28} {size.total_mb:>8.0f} {size.beyond_base_mb:>40.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
