"""Builds the gate's core: `python -m hasgpu_device.native`."""

from __future__ import annotations

import sys

from hasgpu_device import native

if __name__ == "__main__":
    try:
        print(native.build())  # noqa: T201  a command
    except native.BuildError as error:
        sys.exit(f"the native gate was not built, the Python one is used: {error}")
