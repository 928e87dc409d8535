"""A profile file that grows by a point at a time and is a valid profile after each."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from hasgpu_core.errors import AlreadyExistsError, InvalidError
from hasgpu_core.profile import Profile, ProfileFileError, ProfileHeader, ProfileModel, ProfileRow
from hasgpu_core.resources import WHOLE_PERMILLE

from hasgpu_cli.profiling.axes import Cell

Rows = Mapping[tuple[str, int, int, int], ProfileRow]


class ProfileFile:
    """The rows of one function in a file that may hold those of others.

    Args:
        path: The file; read if it is there.
        header: Of what is about to be measured; `models` holds the function alone.
        resume: Keep the function's rows that the file has; else its first new row takes the place of all of them.

    Raises:
        InvalidError: The path can't be written, or the file is no profile.
        AlreadyExistsError: It is the profile of another device or, when resuming, of another state of the model.
    """

    def __init__(self, path: Path, header: ProfileHeader, *, resume: bool) -> None:
        self.path = path
        ((self.function, self._model),) = header.models.items()
        self._header = header
        self._models: dict[str, ProfileModel] = {}
        self._rows: dict[tuple[str, int, int, int], ProfileRow] = {}
        if (kept := _read(path)) is not None:
            self._take(kept, resume=resume)
        _prove_writable(path)

    def _take(self, kept: Profile, *, resume: bool) -> None:
        theirs, ours = kept.header, self._header
        for what, got, wanted in (
            ("device model", theirs.device_model, ours.device_model),
            ("backend", theirs.backend, ours.backend),
            ("basis", theirs.basis.value, ours.basis.value),
            ("driver", theirs.driver, ours.driver),
        ):
            if got != wanted:
                raise AlreadyExistsError(
                    "profile file",
                    str(self.path),
                    f"it is of {what} {got!r}, this run of {wanted!r}: name another --out",
                )
        known = theirs.models.get(self.function)
        if resume and known is not None and known.digest != self._model.digest:
            raise AlreadyExistsError(
                "profile file",
                str(self.path),
                f"its {self.function} has digest {known.digest[:12]}, the one deployed {self._model.digest[:12]}: "
                "--no-resume measures it anew, or name another --out",
            )
        self._models = {name: model for name, model in theirs.models.items() if resume or name != self.function}
        self._rows = {row.cell: row for row in kept.rows if row.model in self._models}

    def cells(self) -> set[Cell]:
        """Returns the configurations of the function that are measured."""
        return {row.cell[1:] for row in self._rows.values() if row.model == self.function}

    def rows(self) -> list[ProfileRow]:
        """Returns the function's rows, sorted."""
        return sorted((row for row in self._rows.values() if row.model == self.function), key=lambda row: row.cell)

    def add(self, row: ProfileRow, *, missing: Collection[Cell]) -> None:
        """Takes a row in (in place of one for the same configuration) and writes the file, atomically.

        Args:
            row: Of the function.
            missing: Configurations of the sweep that are still to be measured; the file tells how many.

        Raises:
            InvalidError: The file can't be written.
        """
        self._rows[row.cell] = row
        self._write(missing)

    def settle(self, missing: Collection[Cell]) -> None:
        """Writes the file if what is missing is not what it tells, as after a run with nothing left to measure."""
        if self.function in self._models and self._models[self.function].note != _note(missing):
            self._write(missing)

    def _write(self, missing: Collection[Cell]) -> None:
        whole = any(r.model == self.function and r.quota_permille == WHOLE_PERMILLE for r in self._rows.values())
        if not whole:
            # The agent measures whole quotas first; until one is there the rows would be no profile.
            return
        self._models[self.function] = replace(self._model, note=_note(missing))
        header = replace(self._header, models=self._models, complete=_is_complete(self._models, self._rows))
        _write_atomically(self.path, Profile(header, tuple(self._rows.values())).format())


_PARTIAL = "interrupted, configurations still to be measured: "


def _note(missing: Collection[Cell]) -> str:
    return f"{_PARTIAL}{len(missing)}" if missing else ""


def _is_complete(models: Mapping[str, ProfileModel], rows: Rows) -> bool:
    if any(model.note.startswith(_PARTIAL) for model in models.values()):
        return False
    return all(_is_full({row.cell for row in rows.values() if row.model == name}) for name in models)


def _is_full(cells: Iterable[tuple[str, int, int, int]]) -> bool:
    cells = set(cells)
    whole = {(batch, sm_pct) for _, batch, sm_pct, quota in cells if quota == WHOLE_PERMILLE}
    return len(whole) == len({cell[1] for cell in cells}) * len({cell[2] for cell in cells})


def _read(path: Path) -> Profile | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"--out {path}", expected="a profile file or none", got=_words(error)) from error
    try:
        return Profile.parse(text)
    except ProfileFileError as error:
        raise InvalidError(
            f"--out {path} is there and is no profile that this run could add to", got=str(error)
        ) from error


def _prove_writable(path: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InvalidError(f"--out {path}", expected="a file that can be written", got=_words(error)) from error


def _write_atomically(path: Path, text: str) -> None:
    """A reader, and whoever comes after a crash, finds the old file or the new one."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise InvalidError(f"--out {path}", expected="a file that can be written", got=_words(error)) from error


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
