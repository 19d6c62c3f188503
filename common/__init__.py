"""What every script shares that is neither a method nor training: the command line, errors in one line, files that stay
whole, run folders."""
from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import gc
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
import uuid
from typing import Callable, Iterator, NoReturn, Optional, TextIO

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: a script prints it as one line and ends with exit status 2."""


class WriteError(UserError):
    """A file that cannot be written: no permission, a full disk."""


def reason(error: BaseException) -> str:
    """An error's message as one line, cut where it is long, or its type's name where it has none."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def run(main: Callable[[], int]) -> NoReturn:
    """Call `main` as a program: its result is the exit status, an error is one line, a signal ends it with 128 + n."""
    atexit.register(gc.freeze)  # else the interpreter's exit looks through all of PyTorch once more, for two seconds
    before = {number: signal.getsignal(number) for number in SIGNALS}
    notebook = "IPython" in sys.modules
    received.clear()
    threading.excepthook = report_of_thread
    on_signals(lambda number: sys.exit(128 + number))
    status = 2
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        try:
            sys.exit(main())
        except torch.OutOfMemoryError:
            error = "out of GPU memory: lower --batch-size, --width or --num-seeds (which of them there are: --help)"
        except (UserError, OSError) as caught:
            error = caught
        except Exception as caught:
            error = caught
            if received and type(caught).__module__.startswith(("torch._dynamo", "torch._inductor")):
                # Ctrl-C in a terminal ends the C++ compiler, too, that torch.compile waits for
                error, status = f"ended by a signal: {reason(caught)}", 128 + received[0]
            elif isinstance(caught, dist.DistNetworkError) or "gloo/transport" in str(caught):
                error = f"no connection to another of torchrun's processes: {reason(caught)}"
            elif reports():
                raise
        finally:
            threading.excepthook = threading.__excepthook__
            for number, handler in before.items():  # a notebook goes on; a program that hangs at its exit can be ended
                signal.signal(number, handler if notebook or handler == signal.SIG_IGN else signal.SIG_DFL)
        if reports():
            print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(status)


def report_of_thread(failed: threading.ExceptHookArgs) -> None:
    """A full disk is no news from TensorBoard's thread: its writer raises the error once more."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def reports() -> bool:
    """Whether this process is the one that prints its error: without torchrun, always.

    Of torchrun's processes it is the first that fails. Others have the same error, or fail because it has ended.
    """
    if started() == 1 or not stores and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True  # the second: torchrun itself keeps no store, and the processes have not joined yet
    try:
        rank = os.environ["RANK"]
        return shared_store().compare_set("failed", "", rank) == rank.encode()
    except dist.DistError:  # who kept the store has ended
        return True


def started() -> int:
    """How many processes torchrun started, on all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


stores: list[dist.Store] = []


def shared_store(seconds: float = 10) -> dist.Store:
    """What torchrun's processes share. Raises dist.DistError: it is not to be had within `seconds`."""
    if not stores:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # on this machine; torchrun may keep its store
        stores.append(dist.PrefixStore(f"attempt {attempt}", store))
    return stores[0]


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # Ctrl-C, Slurm's two, a closed terminal
received: list[int] = []  # those that came, in their order


def on_signals(handle: Callable[[int], object]) -> None:
    """Call handle(number) on each of SIGNALS, but those that nohup, or a shell's background job, ignores."""
    def note_and_handle(number: int, frame) -> None:
        received.append(number)
        handle(number)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note_and_handle)


class Output:
    """A text stream whose writes never raise.

    One that nobody can read any more, such as a pipe whose reader died or a closed terminal, is dropped. On a full disk
    text is lost. A character that the stream lacks becomes a ?.
    """

    def __init__(self, stream: Optional[TextIO]):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed when Python started

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.attempt(self.stream.write, text.encode(encoding, "replace").decode(encoding))
        if "\n" in text:
            self.flush()  # a log shows a line at once
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, call: Callable, *given: str) -> None:
        try:
            call(*given)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO):
                return
            nowhere = open(os.devnull, "w")
            with contextlib.suppress(OSError, ValueError):  # what waits in its buffer must not fail at the exit
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self.stream = nowhere

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


class Lines:
    """What a progress bar writes, as lines of a log: the first, one now and then, the last."""

    def __init__(self):
        self.text, self.shown = "", -math.inf

    def write(self, text: str) -> None:
        if text.strip():
            self.text = text.strip()
        if self.text and (text == "\n" or time.monotonic() > self.shown + LOG_SECONDS):  # a bar ends by this \n
            print(self.text, file=sys.stderr)
            self.text, self.shown = "", time.monotonic()

    def flush(self) -> None:
        sys.stderr.flush()


LOG_SECONDS = 30.0


def progress(*given, **named) -> tqdm:
    """A progress bar; in a log, a line now and then."""
    where = dict(dynamic_ncols=True) if sys.stderr.isatty() else dict(file=Lines(), ascii=True, position=0)
    return tqdm(*given, mininterval=0.5, **where, **named)


# ------------------------------------------------------------------------------------------------- command line
def parse(cls: type, argv: Optional[list[str]], description: str, script: str
          ) -> tuple[object, Optional[pathlib.Path], Optional[dict]]:
    """The command line as an instance of the dataclass `cls`, read by tyro.

    With --resume, --evaluate or --generate also the checkpoint's path and contents, else None twice. The checkpoint's
    arguments are then the defaults. A flag that replaces one of them, or is new, is printed beside the saved value.

    Raises UserError: two of these three flags, a checkpoint that is missing, damaged or of other flags, a run folder
    that another process has.
    """
    def read(**default) -> object:
        if started() == 1 or os.environ["LOCAL_RANK"] == "0":
            return command_line(cls, argv, description, **default)
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            return command_line(cls, argv, **default)  # of torchrun's processes on a machine one prints

    args = read()
    if args.resume is not None:
        auto = os.path.join(args.run_dir, args.run_name or "")
        wait_until_free(expand(auto if args.resume == "auto" else args.resume))
    paths = [getattr(args, name, None) for name in ("resume", "evaluate", "generate")]
    paths = [path for path in paths if path is not None]  # an empty path is refused below
    if len(paths) > 1:
        raise UserError("--resume, --evaluate and --generate exclude each other")
    if args.resume == "auto":
        if args.run_name is None:
            raise UserError("--resume auto needs the --run-name of the folder to go on in")
        folder = expand(os.path.join(args.run_dir, args.run_name))
        paths = [folder] if (folder / "checkpoint.pt").exists() else []
    if not paths:
        args.resume = None
        return args, None, None

    file, checkpoint = read_checkpoint(paths[0], script)
    saved = checkpoint["args"]
    unknown = saved.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise UserError(f"{file} has flags that this {script}.py has not: {', '.join(sorted(unknown))}; go on with the "
                        f"{script}.py that wrote it")
    if args.resume and "optimizers" not in checkpoint:
        raise UserError(f"{file} holds G alone: give --resume the run folder or its checkpoint.pt")
    began = cls(**saved)
    args = read(default=began)
    if args.resume and (args.run_dir, args.run_name) != (began.run_dir, began.run_name):
        named = expand(os.path.join(args.run_dir, args.run_name or file.parent.name))
        if os.path.realpath(named) != os.path.realpath(file.parent):
            raise UserError(f"the run of {file} goes on where it is, not in {named}: to branch it off, copy its folder "
                            "and --resume the copy")
    args.run_dir, args.run_name = began.run_dir, began.run_name
    for name, value in vars(args).items():
        differs = name not in OF_ONE_CALL and (name not in saved or value != saved[name])
        if differs and (started() == 1 or os.environ["RANK"] == "0"):
            print(f"{script}.py: {flag(name)} {value} (saved: {saved.get(name, 'not there')})", file=sys.stderr)
    args.resume = None  # what a checkpoint holds is the run's, however it was begun
    return args, file, checkpoint


def command_line(cls: type, argv: Optional[list[str]], description: str = "", **given) -> object:
    """The command line as tyro reads it.

    Its help begins with the description, which tyro would not wrap to the terminal. It shows {None}|INT as INT, and no
    default of None: to ask for a flag's default, at --resume, by None is for those who know.
    """
    if not {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        return tyro.cli(cls, args=argv, **given)
    columns = shutil.get_terminal_size().columns - 1
    for line in re.sub(r"(?<=\S)\n(?=\S)", " ", description).splitlines():  # a paragraph is one line
        if line.startswith("    python "):  # left to the terminal, so that it can be copied
            command, _, comment = line.partition("#")
            if comment:
                print(textwrap.fill(comment.strip(), columns, initial_indent="    # ", subsequent_indent="    # "))
            print(command.rstrip())
        else:
            print(textwrap.fill(line, columns, subsequent_indent=" " * 11 if line.startswith(" ") else ""))
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(cls, args=argv, description="", config=(tyro.conf.DisallowNone,), **given)
    print("\n" + re.sub(r"\s*\(default:\s+None\)| +(?=\n)", "", page.getvalue()))
    sys.exit(0)


OF_ONE_CALL = ("resume", "evaluate", "generate", "num_images", "out")  # flags that say what to do, not what a run is


def flag(name: str) -> str:
    """A field's name as it is typed: lambda_p, --lambda-p."""
    return f"--{name.replace('_', '-')}"


def check_ranges(args, ranges: dict[str, str]) -> None:
    """Refuse a value outside its range, written as in mathematics: {"ema": "[0, 1)"}; None passes. nan is in no range,
    and refused for every flag."""
    for name, interval in ranges.items():
        value = getattr(args, name)
        low, high = map(float, interval[1:-1].split(","))
        if value is None:
            continue
        above = value > low or interval[0] == "[" and value == low
        below = value < high or interval[-1] == "]" and value == high
        if not (above and below):
            raise UserError(f"{flag(name)} is {value}: it must be in {interval}")
    for name, value in vars(args).items():
        if value != value:
            raise UserError(f"{flag(name)} is {value}: it must be a number")


# -------------------------------------------------------------------------------------------------------- files
def expand(path: str | os.PathLike) -> pathlib.Path:
    """A path as it is typed, with a home folder's ~ or ~user replaced; a Path, which has passed here, stays as it is.
    Raises UserError: there is no such home."""
    expanded = os.path.expanduser(path) if isinstance(path, str) else path
    if isinstance(path, str) and expanded.startswith("~"):
        raise UserError(f"{path}: no such home folder is known (is HOME set?): write the path out")
    return pathlib.Path(expanded)


def write_atomically(path: pathlib.Path, write: Callable[[pathlib.Path], object], advice: str = "") -> None:
    """Write a file through a temporary one in the same folder, so that a crash or a full disk leaves the old one whole.

    `write` is handed the temporary path. A failure raises WriteError: what happened and `advice`. The temporary name is
    random, since processes on several machines may share the folder; leftovers are removed. A link stays, and what it
    leads to is written; a pipe or device is written as it is.
    """
    target = pathlib.Path(os.path.realpath(path))
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            write(path)
            return
        if os.path.dirname(os.path.abspath(path)) in ("/dev", "/dev/fd"):  # /dev/stdout, say: to replace is to lose it
            raise OSError("give the file itself")
        remove_leftovers(target.parent, target.name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {reason(error)}; {advice}a file that was there before is unchanged"
                        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: pathlib.Path, prefix: str) -> None:
    """Remove what processes that were killed more than a day ago left of files that begin with `prefix`."""
    pattern = re.compile(re.escape(prefix) + r".*\.[0-9a-f]{12}\.tmp.*")  # PyTorch's downloads add an ending
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            with contextlib.suppress(OSError):  # another process may have renamed it just now
                if pattern.fullmatch(file.name) and file.stat().st_mtime < time.time() - 86400:
                    file.unlink()


def cache_folder() -> pathlib.Path:
    """Where features of real images go, and decoded images that cannot lie beside their data: gan-reference in
    $XDG_CACHE_HOME or ~/.cache. One that cannot be made raises UserError."""
    try:
        folder = expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gan-reference"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, UserError) as error:
        raise UserError(f"no place for cached data: {reason(error)}; set XDG_CACHE_HOME to a folder") from None
    return folder


@contextlib.contextmanager
def lock(file: pathlib.Path, wait: float) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is made with its folder, within the context.

    On NFS it holds between machines too. A file system may have no locks: then nobody waits. The system lets go of a
    lock when the process ends, however it ends.
    Raises BlockingIOError: another process has it for `wait` seconds from now, or, without a wait, had it and has
    removed it; OSError: no such file can be made.
    """
    begin, told = time.monotonic(), False
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # a file: NFS has no locks of folders
        except PermissionError:
            if not file.exists():
                raise
            descriptor = os.open(file, os.O_RDONLY)  # another user's: enough where it is not NFS
        try:
            with contextlib.suppress(OSError):  # several users may share a data folder; only its owner may do this
                os.fchmod(descriptor, 0o666)
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waited = time.monotonic() - begin
                    if waited >= wait:
                        raise
                    if waited > 1 and not told:
                        print(f"waiting for another process, which has {file}", file=sys.stderr)
                        told = True
                    time.sleep(0.1)
                except OSError:
                    break  # a file system without locks
            if file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file)):
                yield
                return
            if not wait:
                raise BlockingIOError  # who had it has removed it
        finally:
            os.close(descriptor)


def missing_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Those of a folder and the ones above it that are not there."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_unused(folders: list[pathlib.Path], lock_file: pathlib.Path) -> None:
    """Remove folders that were made, from the lowest on, where nothing but a lock's file was put into them. For a
    process that holds this lock."""
    with contextlib.suppress(OSError):
        if folders and os.listdir(lock_file.parent) == [lock_file.name]:
            lock_file.unlink()
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def run_folder(folder: pathlib.Path, resume: bool, free_name: bool = False) -> Iterator[pathlib.Path]:
    """A run folder that no other process trains in until this context ends. One that is made and left empty is removed.

    resume: go on in it. Otherwise it must not hold a run's checkpoint.pt or results.json; free_name: then, or if
    another process has it, take its name with -2, -3, ... instead.
    """
    for number in itertools.count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        problem = None
        with contextlib.ExitStack() as held:
            try:
                new = [] if place.exists() else [place]  # not --run-dir: another process may be about to use it
                held.enter_context(lock(place / ".lock", wait=0))
            except BlockingIOError:
                problem = f"another process is training in {place}"
            except OSError as error:
                raise UserError(f"cannot make the run folder {place}: {error.strerror}; choose another --run-dir"
                                ) from None
            if not problem and not resume and any((place / n).exists() for n in ("checkpoint.pt", "results.json")):
                problem = f"{place} has a run in it: choose another --run-name, or go on with --resume {quote(place)}"
            if not problem:
                try:
                    for file in place.glob("samples/*.png.*.tmp"):  # left by a kill; nobody else writes there
                        file.unlink()
                    yield place
                except OSError as error:  # a full disk, of which TensorBoard and pictures do not say more
                    begun = (place / "checkpoint.pt").exists()
                    advice = f"go on with --resume {quote(place)}" if begun else "give another --run-dir"
                    raise UserError(f"{reason(error)}, in the run of {place}; {advice}") from None
                finally:
                    remove_unused(new, place / ".lock")
                return
        if not free_name:
            raise UserError(problem)


TAKEOVER = 60.0  # seconds


def wait_until_free(path: pathlib.Path) -> None:
    """Wait for the process that trains in a run folder: a scheduler may start a job again before its previous process
    has ended. path: the folder or a file in it. Raises UserError: that process goes on for `TAKEOVER` seconds."""
    folder = path if path.is_dir() else path.parent
    try:
        if (folder / ".lock").exists():
            with lock(folder / ".lock", wait=TAKEOVER):
                pass
    except BlockingIOError:
        raise UserError(f"another process is training in {folder}") from None


def quote(path: str | os.PathLike) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def command(flag: str, path: pathlib.Path) -> str:
    """This program's command line with one flag; under torchrun, which has flags of its own, the flag alone."""
    program = f"python {quote(sys.argv[0])} " if started() == 1 else ""
    return f"{program}{flag} {quote(path)}"


def run_name(what: str, seed: int) -> str:
    """A run folder's default name: what is trained, the seed, month and day, hour and minute."""
    return f"{what}-{seed}-{time.strftime('%m%d-%H%M')}"


def read_checkpoint(path: str | os.PathLike, script: str) -> tuple[pathlib.Path, dict]:
    """The file and the contents of a script's checkpoint.pt or generator.pt, given the file or its run folder. One that
    is missing, damaged or another script's raises UserError; nothing in it is executed."""
    file = expand(path)
    file = file / "checkpoint.pt" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}: give a run folder or its checkpoint.pt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a cut or foreign file makes PyTorch raise
        raise UserError(f"cannot read {file}: it is cut off or no checkpoint ({reason(error)})") from None
    entries = {"script": str, "args": dict, "iteration": int, "seconds": float, "networks": dict}
    if not (isinstance(checkpoint, dict)
            and all(isinstance(checkpoint.get(name), kind) for name, kind in entries.items())):
        raise UserError(f"{file} is not a checkpoint of {script}.py")
    if checkpoint["script"] != script:
        raise UserError(f"{file} is a checkpoint of {checkpoint['script']}.py, not of {script}.py")
    return file, checkpoint


def write_setting(folder: pathlib.Path, script: str, args: dict) -> None:
    """args.json: the script, every argument, the versions of what it runs on and the CPU's threads."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "threads": torch.get_num_threads()}
    setting = {"script": script, "args": args, "versions": versions}
    write_atomically(folder / "args.json", lambda path: path.write_text(json.dumps(setting, indent=2) + "\n"))


def read_lines(path: pathlib.Path) -> list[dict]:
    """The records of a file with one JSON object a line; none where there is no file.

    A last line that a full disk or a power loss cut is left out. Raises UserError: another line is damaged.
    """
    lines = path.read_bytes().rstrip().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no record")
            records.append(record)
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path} is damaged in line {number} ({reason(error)}): remove that line") from None
    return records


def write_lines(path: pathlib.Path, records: list[dict]) -> None:
    """Write records as one JSON object a line."""
    write_atomically(path, lambda p: p.write_text("".join(json.dumps(record) + "\n" for record in records)))
