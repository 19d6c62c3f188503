"""What every script shares that is not a method: data sets, scores, errors a user can mend, files that stay whole."""
from __future__ import annotations

import os
import pathlib
from typing import Callable


class UserError(Exception):
    """Something the user can mend: a script prints it as one line and ends with exit status 2."""


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def write_atomically(path: pathlib.Path, write: Callable[[pathlib.Path], None], advice: str = "") -> None:
    """Write a file through a temporary one in the same folder, so that a crash or a full disk leaves the old one whole.

    `write` is handed the temporary path. A failure raises UserError: what happened and `advice`. Temporary files of
    processes that were killed while they wrote are removed.
    """
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        if not is_alive(leftover.name.split(".")[-2]):
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {reason(error)}; {advice}a file that was there before is unchanged"
                        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def cache_folder() -> pathlib.Path:
    """Where features of real images go, and decoded images that cannot lie beside their data: gan-reference in
    $XDG_CACHE_HOME or ~/.cache. One that cannot be made raises UserError."""
    try:
        folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "gan-reference"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"no place for cached data: {reason(error)}; set XDG_CACHE_HOME to a folder") from None
    return folder
