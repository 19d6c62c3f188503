"""What every script shares that is not a method: data sets, scores, the command line, errors in one line, files that
stay whole."""
from __future__ import annotations

import ast
import atexit
import contextlib
import dataclasses
import datetime
import fcntl
import gc
import inspect
import json
import os
import pathlib
import pickle
import platform
import shlex
import signal
import sys
import textwrap
import time
import uuid
import zlib
from typing import Annotated, Callable, Iterator, NoReturn, Optional, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: a script prints it as one line and ends with exit status 2."""


def reason(error: BaseException) -> str:
    """An error's message as one line, cut where it is long, or its type's name where it has none."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def run(main: Callable[[], int]) -> NoReturn:
    """Call `main` as a program: its result is the exit status, an error is one line, a signal ends it with 128 + n."""
    on_signals(lambda number: sys.exit(128 + number))
    atexit.register(gc.freeze)  # else the interpreter's exit looks through all of PyTorch once more, for two seconds
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an output without a character such as ± gets a ?
    try:
        sys.exit(main())
    except torch.OutOfMemoryError:
        error = "out of GPU memory: lower --batch-size or --width"
    except (UserError, OSError) as caught:
        error = caught
    print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    sys.exit(2)


def on_signals(handle: Callable[[int], object]) -> None:
    """Call handle(number) on Ctrl-C, SIGTERM, Slurm's SIGUSR1 and, unless nohup ignores it, a closed terminal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: handle(number))


# ------------------------------------------------------------------------------------------------- command line
def parse(cls: type, argv: Optional[list[str]], description: str, script: str, free: set[str]):
    """The command line as an instance of `cls`; with --resume, --evaluate or --generate also the checkpoint's path and
    contents, else None. Such a run takes the checkpoint's arguments. A flag given by hand that differs from them raises
    UserError, unless it is in `free`."""
    args = read_flags(cls, argv, cls(), description)
    given = {name: getattr(args, name, None) for name in ("resume", "evaluate", "generate")}
    given = {name: value for name, value in given.items() if value is not None}  # an empty path is refused below
    if len(given) > 1:
        raise UserError("--resume, --evaluate and --generate exclude each other")
    if args.resume == "auto":
        if args.run_name is None:
            raise UserError("--resume auto needs the --run-name of the folder to go on in")
        folder = pathlib.Path(args.run_dir, args.run_name).expanduser()
        given = {"resume": folder} if (folder / "checkpoint.pt").exists() else {}
    if not given:
        return args, None, None
    file, checkpoint = read_checkpoint(*given.values(), script)
    names = {f.name for f in dataclasses.fields(cls)}
    if odd := sorted(names ^ checkpoint["args"].keys()):
        raise UserError(f"the checkpoint is of a {checkpoint['script']}.py with other arguments ({', '.join(odd)}): "
                        "go on with that one")
    saved = cls(**checkpoint["args"])
    args = read_flags(cls, argv, saved, description)
    bound = names - free - (set() if args.resume else {"seed", "dataset", "precision"})
    differing = [f"--{name.replace('_', '-')} ({getattr(saved, name)} in the checkpoint, {getattr(args, name)} here)"
                 for name in sorted(bound) if getattr(args, name) != getattr(saved, name)]
    if differing:
        raise UserError(f"the checkpoint is of another setting: {', '.join(differing)}; leave these flags out, or "
                        "start a new run")
    if args.resume and "optimizers" not in checkpoint:
        raise UserError(f"{file} holds G alone: give --resume the run folder or its checkpoint.pt")
    return args, file, checkpoint


def read_flags(cls: type, argv: Optional[list[str]], default, description: str):
    """The command line as an instance of the dataclass `cls`; --help has a group of flags for each of its bases.

    default: the instance whose values serve where a flag is not given.
    """
    groups = {base.__name__.removesuffix("Args").lower(): base for base in cls.__bases__}
    nested = dataclasses.make_dataclass("Args", [
        (name, group := with_help(base, default), dataclasses.field(default_factory=group))
        for name, base in groups.items()])
    parsed = tyro.cli(tyro.conf.OmitArgPrefixes[nested], args=argv, description=description)
    return cls(**{name: value for group in groups for name, value in vars(getattr(parsed, group)).items()})


def with_help(cls: type, default) -> type:
    """A copy of a dataclass with the values of `default`. Its help texts are the docstrings under the fields, without
    their line breaks, at which tyro would break a sentence."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    texts = {field.target.id: " ".join(doc.value.value.split()) for field, doc in zip(body, body[1:])
             if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)}
    return dataclasses.make_dataclass(cls.__name__, [
        (name, Annotated[hint, tyro.conf.arg(help=texts[name], help_behavior_hint=lambda value: (
            "" if value == "None" else f"(default: {value})"))], getattr(default, name))
        for name, hint in get_type_hints(cls, include_extras=True).items()])


def check_ranges(args, ranges: dict[str, str]) -> None:
    """Refuse a value outside its range, written as in mathematics: {"ema": "[0, 1)"}; None passes, nan does not."""
    for name, text in ranges.items():
        value, (low, high) = getattr(args, name), map(float, text[1:-1].split(","))
        above = value is None or value > low or text[0] == "[" and value == low
        if not (above and (value is None or value < high or text[-1] == "]" and value == high)):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be in {text}")


def choose_device(name: str, tf32: bool, deterministic: bool) -> torch.device:
    """The device, with PyTorch's switches set. Under torchrun each process joins the others and takes its own GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():  # set by torchrun
        # two backends: a flag from the host must not wait for the device; data sets may take hours to decode
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))
        atexit.register(dist.destroy_process_group)
        dist.barrier()  # all have read the checkpoint before one writes
    return device


def world() -> tuple[int, int]:
    """This process's rank and how many processes torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return "the CPU" if torch.cuda.is_available() else "the CPU (PyTorch sees no CUDA GPU)"


def compiles(device: torch.device) -> bool:
    """Whether torch.compile works here; if not, one line says why."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # no C++ compiler, no Python headers, no Triton: each raises its own
        print(f"training uncompiled, since torch.compile fails here: {reason(error)} (a CPU needs a C++ compiler and "
              "Python's headers; Debian, Ubuntu: apt install g++ python3-dev)", file=sys.stderr)
        return False


# -------------------------------------------------------------------------------------------------------- files
def write_atomically(path: pathlib.Path, write: Callable[[pathlib.Path], object], advice: str = "") -> None:
    """Write a file through a temporary one in the same folder, so that a crash or a full disk leaves the old one whole.

    `write` is handed the temporary path. A failure raises UserError: what happened and `advice`. The temporary name is
    random, since processes on several machines may share the folder; leftovers older than a day are removed.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        for leftover in path.parent.iterdir():
            if leftover.name.startswith(path.name) and leftover.suffix == ".tmp":
                if leftover.stat().st_mtime < time.time() - 86400:
                    leftover.unlink(missing_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {reason(error)}; {advice}a file that was there before is unchanged"
                        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def cache_folder() -> pathlib.Path:
    """Where features of real images go, and decoded images that cannot lie beside their data: gan-reference in
    $XDG_CACHE_HOME or ~/.cache. One that cannot be made raises UserError."""
    try:
        folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "gan-reference"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"no place for cached data: {reason(error)}; set XDG_CACHE_HOME to a folder") from None
    return folder


@contextlib.contextmanager
def run_folder(folder: pathlib.Path, resume: bool, free_name: bool = False) -> Iterator[pathlib.Path]:
    """A run folder that no other process trains in until this context ends; a folder left empty is removed.

    resume: go on in it. Otherwise it must not hold a run's checkpoint.pt or results.json; free_name: then, or if
    another process has it, take its name with -2, -3, ... instead.
    """
    for number in range(1, 1000):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            place.mkdir(parents=True, exist_ok=True)
            lock = os.open(place, os.O_RDONLY)  # the system lets go of it when the process ends, however it ends
        except OSError as error:
            raise UserError(f"cannot make the run folder {place}: {error.strerror}; choose another --run-dir"
                            ) from None
        problem = None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"another process is training in {place}"
        except OSError:
            pass  # a file system without locks
        if not problem and not resume and any((place / n).exists() for n in ("checkpoint.pt", "results.json")):
            problem = f"{place} has a run in it: choose another --run-name, or go on with --resume {quote(place)}"
        if not problem:
            break
        os.close(lock)
        if not free_name:
            raise UserError(problem)
    try:
        yield place
    finally:
        with contextlib.suppress(OSError):
            place.rmdir()
        os.close(lock)


def quote(path: str | os.PathLike) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def read_checkpoint(path: str | os.PathLike, script: str) -> tuple[pathlib.Path, dict]:
    """The file and the contents of a script's checkpoint.pt or generator.pt, given the file or its run folder. One that
    is missing, damaged or another script's raises UserError; nothing in it is executed."""
    file = pathlib.Path(path).expanduser()
    file = file / "checkpoint.pt" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}: give a run folder or its checkpoint.pt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read {file}: it is cut off or no checkpoint ({reason(error)})") from None
    if not isinstance(checkpoint, dict) or not {"script", "args", "iteration"} <= checkpoint.keys():
        raise UserError(f"{file} is not a checkpoint of {script}.py")
    if checkpoint["script"] != script:
        raise UserError(f"{file} is a checkpoint of {checkpoint['script']}.py, not of {script}.py")
    return file, checkpoint


def write_setting(folder: pathlib.Path, script: str, args) -> None:
    """args.json: the script, every argument, the versions of what it runs on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    setting = {"script": script, "args": dataclasses.asdict(args), "versions": versions}
    write_atomically(folder / "args.json", lambda path: path.write_text(json.dumps(setting, indent=2) + "\n"))


def read_lines(path: pathlib.Path) -> list[dict]:
    """The records of a file with one JSON object a line; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_lines(path: pathlib.Path, records: list[dict]) -> None:
    """Write records as one JSON object a line."""
    write_atomically(path, lambda p: p.write_text("".join(json.dumps(record) + "\n" for record in records)))


def fingerprint(images: torch.Tensor) -> list[int]:
    """The number of images and a checksum of about a thousand of them, to know a data set again."""
    return [len(images), zlib.crc32(images[:: max(1, len(images) // 1000)].numpy().tobytes())]


def check_finite(tensors: dict[str, torch.Tensor], when: str, folder: pathlib.Path) -> None:
    """Refuse to go on with weights that are not finite: a loss that is not spoils those that it trains, for good."""
    if not torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all():
        raise UserError(f"training diverged: weights are not finite at {when}; the last good checkpoint is "
                        f"{folder / 'checkpoint.pt'}; try a smaller --lr")


def write_images(sample: Callable[[int], torch.Tensor], count: int, out: str) -> None:
    """Write `count` generated images: one uint8 array [N, H, W, C] if `out` ends in .npy, one grid if it ends in .png,
    else a PNG each in the folder `out`. sample: maps n to n new images, uint8 [n, C, H, W]."""
    path = pathlib.Path(out).expanduser()
    single = path.suffix in (".npy", ".png")
    if not single and path.suffix.lower() in Image.registered_extensions():
        raise UserError(f"--out {out}: a grid's name ends in .png")
    try:
        (path.parent if single else path).mkdir(parents=True, exist_ok=True)
        if not single and any(path.iterdir()):
            raise UserError(f"{path} is not empty: choose another --out")
        if single:
            open(path, "ab").close()  # whether it can be written, before the work
        images = []
        for start in tqdm(range(0, count, 100), "generating", dynamic_ncols=True):
            batch = sample(min(100, count - start)).cpu()
            if single:
                images.append(batch)
                continue
            for i, image in enumerate(batch, start):
                to_picture(image).save(path / f"{i:06d}.png")
        if path.suffix == ".npy":
            np.save(path, torch.cat(images).permute(0, 2, 3, 1).numpy())
        elif single:
            to_picture(make_grid(torch.cat(images), max(1, round(count**0.5)))).save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; choose another --out") from None
    print(f"{count} images in {path}")


def to_picture(image: torch.Tensor) -> Image.Image:
    """A Pillow image of uint8 [C, H, W], C = 1 or 3."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
