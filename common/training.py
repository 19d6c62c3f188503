"""What every training has and no paper names: the device, torchrun's processes, seeds of draws, bf16, the captured
step, checkpoints, the first and the last line."""
from __future__ import annotations

import atexit
import contextlib
import copy
import datetime
import functools
import io
import logging
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import time
import traceback
import zlib
from multiprocessing.connection import Connection, wait
from typing import Callable, Iterable, Iterator, Optional

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import UserError, expand, quote, read_lines, reason, run_folder, write_atomically

TrainStep = Callable[[Tensor], dict[str, Tensor]]  # uint8 images [B, C, H, W] -> losses and watched values, scalars


# ------------------------------------------------------------------------------------------------------- device
def choose_device(name: str, tf32: bool, deterministic: bool) -> torch.device:
    """The device, with PyTorch's switches set. Under torchrun each process joins the others and takes its own GPU.
    Raises UserError: no such device, fewer GPUs than processes, processes that do not come."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    several = common.started() > 1
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if several and int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
            raise UserError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes on this machine, which has "
                            f"{gpus} GPUs: lower --nproc-per-node")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if several else 0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
    if several and not dist.is_initialized():
        # two backends: a flag from the host must not wait for the device
        join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    for tasks, number in (("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
                          ("WORLD_SIZE", "RANK")):
        alone = os.environ.get(tasks, "") in ("", "1") or os.environ.get(number) != "0"
        if not alone and "TORCHELASTIC_RUN_ID" not in os.environ:
            print(f"{os.environ[tasks]} processes were started without torchrun: each does the whole work by itself",
                  file=sys.stderr)
            break
    return device


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return "the CPU" if torch.cuda.is_available() else "the CPU (PyTorch sees no CUDA GPU)"


def compiles(device: torch.device) -> bool:
    """Whether torch.compile works here; if not, one line says why."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a CUDA compiler without a GPU
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # no C++ compiler, no Python headers, no Triton: each raises its own
        print(f"training uncompiled, since torch.compile fails here: {reason(error)} (a CPU needs a C++ compiler and "
              "Python's headers; Debian, Ubuntu: apt install g++ python3-dev)", file=sys.stderr)
        return False


def autocast(forward: Callable) -> Callable:
    """Make a network's method run in bf16 where the network's attribute `bf16` is set.

    Each call is a region of its own. A region keeps bf16 copies of the weights, which an update would leave behind.
    """
    @functools.wraps(forward)
    def wrapped(network: nn.Module, x: Tensor, *rest) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=network.bf16):
            return forward(network, x, *rest)

    return wrapped


# ------------------------------------------------------------------------------------------ forked processes
class Workers:
    """Functions that are called at once, each in a process of its own with one thread; one alone in this process.

    `send` calls them with the same arguments, `receive` returns their results. Calls may be sent ahead: then none waits
    for the slowest of each. The processes are forked at the first call, after `prepare`: what it imports and compiles
    they have. They hear no signals, and end with this process, however it ends. PyTorch refuses autograd in a process
    that is forked after its parent's: functions that use it must be compiled by `prepare`, or this process must not
    have used it. folder: what an error says to --resume.
    """

    def __init__(self, functions: list[Callable], prepare: Callable[[], object], folder: pathlib.Path):
        self.functions, self.prepare, self.folder = functions, prepare, folder
        self.processes: list[int] = []
        self.pipes: list[Connection] = []
        self.results: list[list] = [[] for _ in functions]  # of each, those that have come

    def __enter__(self) -> Workers:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def send(self, *given) -> None:
        """Call the functions. Raises UserError: a process was killed, or cannot start."""
        if len(self.functions) == 1:
            self.results[0].append(functools.partial(self.functions[0], *given))
            return
        if not self.processes:
            self.prepare()
            for function in self.functions:
                self.fork(function)
        with self.seeing_their_end():
            for pipe in self.pipes:
                pipe.send(given)

    def receive(self) -> list:
        """The results of the earliest call that has not been received. Raises UserError: a process was killed."""
        if len(self.functions) == 1:
            return [self.results[0].pop(0)()]
        with self.seeing_their_end():
            while not all(self.results):
                for pipe in wait(self.pipes):
                    self.results[self.pipes.index(pipe)].append(pipe.recv())
        results = [of_function.pop(0) for of_function in self.results]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    @contextlib.contextmanager
    def seeing_their_end(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            raise UserError("one of the run's processes was killed (out of memory?): go on with --resume "
                            f"{quote(self.folder)}") from None

    def fork(self, function: Callable) -> None:
        """Start a process that calls the function with what comes through a pipe, and sends the result."""
        pipe, end = multiprocessing.Pipe()
        try:
            process = os.fork()
        except OSError as error:
            raise UserError(f"no process could be started: {reason(error)}; lower --processes") from None
        self.pipes.append(pipe)
        if process > 0:
            end.close()
            self.processes.append(process)
            return
        try:
            for number in common.SIGNALS:  # a terminal's Ctrl-C goes to all its processes
                signal.signal(number, signal.SIG_IGN)
            for pipe in self.pipes:  # while a copy of this process's ends is open, nobody sees it end
                pipe.close()
            while True:
                given = end.recv()
                try:
                    end.send(function(*given))
                except Exception:
                    end.send(RuntimeError(traceback.format_exc()))
        finally:
            os._exit(0)  # whatever happened: most likely the parent has ended

    def __exit__(self, *error) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        for pipe in self.pipes:
            pipe.close()
        torch.set_num_threads(self.threads)


# ----------------------------------------------------------------------------------------- torchrun's processes
JOINING = 300.0  # seconds in which all must come


def join(backend: str) -> None:
    """Meet torchrun's other processes. Raises UserError: some do not come.

    PyTorch connects them in C++, where Python hears no signal: so until all have joined, one ends the process at once.
    """
    handlers = {number: signal.getsignal(number) for number in common.SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    rank, processes = int(os.environ["RANK"]), common.started()
    try:
        try:
            store = common.shared_store(JOINING)
            store.set(f"process {rank} is here with {backend}", "")
            wait_for([f"process {other} is here with {backend}" for other in range(processes)], JOINING)
        except (dist.DistError, TimeoutError) as error:
            raise UserError(f"not all of torchrun's {processes} processes have come within {JOINING:g} seconds "
                            f"({reason(error)})") from None
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes,
                                timeout=datetime.timedelta(minutes=30))  # for a message
        dist.barrier()  # all have read the checkpoint before one writes
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    atexit.register(dist.destroy_process_group)


def wait_for(keys: list[str], seconds: float = math.inf) -> None:
    """Wait until torchrun's other processes have set these keys in the store; in Python, where signals are heard.
    Raises TimeoutError; UserError: one of them has failed."""
    store, end = common.shared_store(), time.monotonic() + seconds
    while not store.check(keys):
        if store.check(["failed"]):
            raise UserError("another of torchrun's processes has failed")
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.1)


def world() -> tuple[int, int]:
    """This process's rank and how many processes torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_slice(n: int) -> slice:
    """This process's part of a mini-batch of n, which torchrun's processes split; alone: all of it."""
    rank, processes = world()
    return slice(rank * n // processes, (rank + 1) * n // processes)


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over torchrun's processes, in one message; alone: nothing."""
    if not dist.is_initialized():
        return
    tensors = list(tensors)
    if not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    means = (flat / dist.get_world_size()).split([t.numel() for t in tensors])
    for t, mean in zip(tensors, means):
        t.copy_(mean.view(t.shape))


def average_gradients(networks: nn.Module) -> None:
    """Replace the gradients of the last backward pass by their means over torchrun's processes; alone: nothing."""
    average(p.grad for p in networks.parameters() if p.grad is not None)


@torch.no_grad()
def update_ema(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    """averaged <- decay averaged + (1 - decay) network, of weights and buffers."""
    for mean, value in zip(averaged.state_dict().values(), network.state_dict().values()):
        mean.lerp_(value, 1 - decay)


def agree(value: object) -> bool:
    """Whether torchrun's processes all have this value, compared by its repr."""
    if not dist.is_initialized():
        return True
    number = zlib.crc32(repr(value).encode())
    extremes = torch.tensor([number, -number])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return extremes.sum().item() == 0


def stopping(signals: list[int]) -> bool:
    """Whether a signal came, to this process or another; another's is added to `signals`."""
    if dist.is_initialized():
        number = torch.tensor(signals[:1] or [0])
        dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            signals.append(number.item())
    return bool(signals)


# --------------------------------------------------------------------------------------------------- iterations
def draw_seed(*key: int) -> int:
    """A seed for a generator of draws (the CPU's takes 32 bits) from numbers such as (seed, iteration)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def due(every: int, iteration: int, iterations: int, early: bool = False) -> bool:
    """Whether what happens every `every` iterations, and after the last of `iterations`, happens at this one.
    Never at iteration 0, before training; every = 0: never.
    early: also at 1, 2, 4, 8, ..., so that a slow machine soon has something to look at."""
    double = early and iteration < every and iteration & (iteration - 1) == 0
    return every > 0 and iteration > 0 and (iteration % every == 0 or iteration == iterations or double)


def scalars(values: dict[str, Tensor | float]) -> dict[str, Tensor]:
    """Losses and watched values as a step returns them: in fp32, without gradient, of several numbers the mean."""
    tensors = {name: torch.as_tensor(value).detach().float() for name, value in values.items()}
    return {name: tensor.mean() if tensor.ndim else tensor for name, tensor in tensors.items()}


class GraphedStep:
    """A train_step that is captured once as a CUDA graph and replayed: one launch an iteration instead of hundreds.

    The first calls run it as it is: a capture needs such a warm-up, on a stream of its own. A replay reads the images
    from one buffer, and draws from `rng`. A replay's losses are overwritten by the next one.
    """

    def __init__(self, train_step: TrainStep, rng: torch.Generator, warm_up: int = 3):
        self.train_step, self.rng, self.warm_up = train_step, rng, warm_up  # kept alive as long as the graph
        self.stream = torch.cuda.Stream()
        self.graph = None

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        if self.warm_up > 0:
            self.warm_up -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = self.train_step(images)
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses
        if self.graph is None:
            self.images = images.clone()
            self.graph = torch.cuda.CUDAGraph()
            if torch.__version__ < (2, 14):  # later ones register by themselves, and warn here
                self.graph.register_generator_state(self.rng)
            with torch.cuda.graph(self.graph):
                self.losses = self.train_step(self.images)
        self.images.copy_(images)
        self.graph.replay()
        return self.losses


# -------------------------------------------------------------------------------------------------- checkpoints
def fingerprint(images: Tensor | np.ndarray) -> list[int]:
    """The number of images and a checksum of about a thousand of them, to know a data set again."""
    return [len(images), zlib.crc32(np.ascontiguousarray(images[:: max(1, len(images) // 1000)]))]


class Diverged(UserError):
    """Weights are not finite. when: the iteration in words."""

    def __init__(self, when: str, folder: pathlib.Path):
        super().__init__(f"training diverged: weights are not finite at {when}; the last good checkpoint is "
                         f"{folder / 'checkpoint.pt'}; try a smaller --lr")
        self.when = when


def check_finite(tensors: dict[str, Tensor], when: str, folder: pathlib.Path) -> None:
    """Refuse to go on with weights that are not finite: a loss that is not spoils those that it trains, for good.
    Raises Diverged."""
    if not torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all():
        raise Diverged(when, folder)


def save(contents: dict, path: pathlib.Path) -> None:
    """torch.save by way of memory, since it does not say that a disk is full."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    path.write_bytes(buffer.getbuffer())


def save_checkpoint(folder: pathlib.Path, header: dict, networks: nn.ModuleDict,
                    optimizers: dict[str, torch.optim.Optimizer], sampled: str) -> None:
    """Write checkpoint.pt, all that training goes on from, and generator.pt, the network `sampled` alone.

    header: what both hold beside weights: script, args, iteration, seconds, points (TensorBoard's
    of that iteration, by name), data (the images' fingerprint).
    """
    moments = {name: optimizer.state_dict()["state"] for name, optimizer in optimizers.items()}
    # checkpoint.pt last: a run that goes on from it has the generator.pt that belongs to it, or a newer one
    contents = {"generator.pt": {**header, "networks": nn.ModuleDict({sampled: networks[sampled]}).state_dict()},
                "checkpoint.pt": {**header, "networks": networks.state_dict(), "optimizers": moments}}
    for name, checkpoint in contents.items():
        write_atomically(folder / name, functools.partial(save, checkpoint),
                         f"make room and go on with --resume {quote(folder)}; ")


def restore(checkpoint: dict, networks: nn.ModuleDict, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Load a checkpoint's weights and moments into networks and optimisers, which keep their own settings.

    What the checkpoint holds of other networks is passed over. Raises UserError: it does not fit.
    """
    try:
        networks.load_state_dict({k: v for k, v in checkpoint["networks"].items() if k.split(".")[0] in networks})
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["optimizers"][name]})
    except Exception as error:  # whatever PyTorch raises of entries that are not there, or of another kind
        raise unfit(checkpoint, reason(error)) from None


def unfit(checkpoint: dict, why: str) -> UserError:
    return UserError(f"the checkpoint does not fit {checkpoint['script']}.py with these flags (has one of them changed "
                     f"since?): {why}")


# --------------------------------------------------------------------------------------------- start and end of a run
def open_run(args, file: Optional[pathlib.Path], default_name: str) -> contextlib.AbstractContextManager[pathlib.Path]:
    """The context in which a run has its folder for itself, see `common.run_folder`.

    file: the checkpoint that the run goes on from. --evaluate, and of torchrun's processes all but the first, get the
    path alone.
    """
    local = ("data_dir", "inception_weights")  # each machine may have its own
    if not agree([value for flag, value in vars(args).items() if flag not in local]):
        raise UserError("torchrun's processes have different flags: start all with the same command")
    name = args.run_name or common.run_name(default_name, args.seed)
    place = file.parent if file else expand(os.path.join(args.run_dir, name))
    rank, processes = world()
    if args.evaluate:
        return contextlib.nullcontext(place)
    if args.batch_size % processes or args.batch_size < 2 * processes:
        fits = max(2, args.batch_size // processes) * processes
        raise UserError(f"--batch-size {args.batch_size} must be divisible by {processes} processes, with 2 images "
                        f"each: give --batch-size {fits}")
    if rank > 0:
        return contextlib.nullcontext(place)
    return run_folder(place, resume=file is not None, free_name=file is None and args.run_name is None)


def check_start(args, images: Tensor, device: torch.device, checkpoint: Optional[dict]) -> None:
    """Refuse what does not go with the images or the checkpoint; switch off, with a line, what does not work here.

    Refused: other images or checkpoints than torchrun's other processes have; other images than the run began with;
    fewer images than a mini-batch has; fewer iterations than the checkpoint has or, where the learning rate follows a
    schedule, others than it was begun for.
    """
    rank, processes = world()
    data = fingerprint(images)
    if not agree((data, checkpoint and checkpoint["iteration"])):
        raise UserError("torchrun's processes have different images or checkpoints: give all the same data set, and a "
                        "--run-dir on a file system that they share")
    if checkpoint is not None:
        planned, done = checkpoint["args"]["iterations"], checkpoint["iteration"]
        if getattr(args, "lr_schedule", "constant") != "constant" and args.iterations != planned:
            raise UserError(f"--iterations is {args.iterations}: --lr-schedule {args.lr_schedule} was begun for "
                            f"{planned}; leave --iterations (and --epochs) out, or start a new run")
        if args.iterations < done:
            raise UserError(f"--iterations is {args.iterations}: the run is already at {done}; give more")
        began = checkpoint.get("data") or ["none"]
        if began != data:
            raise UserError(f"the images in {args.data_dir} ({data[0]}) are not those that the run began with "
                            f"({began[0]}): give its --data-dir, or start a new run")
    if len(images) < args.batch_size:
        fits = len(images) // processes * processes
        advice = f"give --batch-size {fits}" if fits >= 2 * processes else f"{2 * processes} are needed at least"
        raise UserError(f"{args.data_dir} has {len(images)} images, too few for --batch-size {args.batch_size}: "
                        f"{advice}")
    if args.compile:
        args.compile = compiles(device)
    if args.cuda_graph and device.type == "cuda" and processes > 1:
        args.cuda_graph = False
        if rank == 0:
            print("under torchrun iterations are launched eagerly, not as a CUDA graph", file=sys.stderr)


def check_gradient(discriminator: nn.Module, x: Tensor) -> None:
    """Refuse a D whose `logit_and_gradient` has not the gradient of each image's own logit. x: images [B, C, H, W].
    Raises UserError: it is off by more than 5%, in fp32."""
    discriminator, x = copy.deepcopy(discriminator).cpu(), x.cpu()
    discriminator.bf16 = False
    _, found = discriminator.logit_and_gradient(x)
    images = [image.requires_grad_() for image in x.split(1)]
    own = torch.cat([torch.autograd.grad(discriminator(image).sum(), image)[0] for image in images])
    error = (found - own).norm() / own.norm()
    if error > 0.05:
        raise UserError(f"the discriminator's logit_and_gradient is {error:.0%} off the gradient of its logits: change "
                        "it with the layers, and let no image depend on others, as in batch norm (docs/gngan.md)")


def begin_log(folder: pathlib.Path, args, header: dict, images: Tensor, networks: nn.ModuleDict, device: torch.device,
              checkpoint: Optional[dict]):
    """TensorBoard's writer of a run that begins, or goes on from a checkpoint; of torchrun's processes the first alone
    has one. args.json is written, and a line printed: where, what, how large, and how to watch.
    header: see `save_checkpoint`."""
    if world()[0] > 0:
        return contextlib.nullcontext()
    start = checkpoint["iteration"] if checkpoint else 0
    if start < args.iterations:  # a finished run stays as it is, whatever the flags
        common.write_setting(folder, header["script"], header["args"])
    counts = {name: sum(p.numel() for p in network.parameters() if p.requires_grad)
              for name, network in networks.items()}
    sizes = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    on = f", from iteration {start:,} on" if start else ""
    if start == args.iterations:
        on = f", all {start:,} iterations done before: more by --iterations"
    print(f"{folder}: {args.dataset}, {len(images):,} images of {images.shape[2]}x{images.shape[3]}, on "
          f"{describe(device)}{on}; parameters: {sizes}; to watch: tensorboard --logdir {quote(folder)}")
    (folder / "samples").mkdir(exist_ok=True)
    writer = summary_writer(folder, args, start, arguments=start < args.iterations)
    if start == 0:
        from common import datasets
        spread = images[:: max(1, len(images) // 64)][:64]
        show_picture(writer, "images/real", datasets.encode_grid(spread), 0)
    if checkpoint:  # show its iteration again
        for name, value in checkpoint.get("points", {}).items():
            writer.add_scalar(name, value, start)
        grid = folder / f"samples/{start:08d}.png"
        if grid.exists():
            show_picture(writer, "images/samples", grid.read_bytes(), start)
        for record in read_lines(folder / "metrics.jsonl"):
            if record["iteration"] == start:
                show_scores(writer, record)
    return writer


def summary_writer(folder: pathlib.Path, args, step: int, arguments: bool):
    """TensorBoard's writer of a run that begins, or goes on, at `step`. What a killed run has shown from there on is
    dropped. arguments: write them as text, anew when a run goes on, since flags may have changed.
    Those that it began with are in HPARAMS, too."""
    from torch.utils.tensorboard import SummaryWriter  # a second to import
    from torch.utils.tensorboard.summary import hparams
    earlier = sorted(folder.glob("events.out.tfevents.*"))
    writer = SummaryWriter(str(folder), purge_step=step)
    if arguments:
        writer.add_text("arguments", "\n".join(f"    {name} = {value}" for name, value in vars(args).items()), step)
    if step == 0:  # of several TensorBoard takes the first
        plain = {name: value if isinstance(value, (bool, int, float)) else str(value)
                 for name, value in vars(args).items()}
        writer.file_writer.add_summary(hparams(plain, {})[1])  # of its summaries the one on this run
    writer.flush()  # the file is there
    if earlier and earlier[-1] == max(folder.glob("events.out.tfevents.*")):
        # TensorBoard reads files in the order of their names, which begin with the time; but the clock has gone back
        for number, file in enumerate(earlier):
            os.replace(file, folder / f"events.out.tfevents.-{number:09d}")  # sorts before all times
    return writer


def show_picture(writer, tag: str, png: bytes, iteration: int) -> None:
    """Write a picture to TensorBoard, whose own writer would encode it once more."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    width, height = Image.open(io.BytesIO(png)).size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), iteration)


def show_grid(writer, folder: pathlib.Path, png: bytes, iteration: int) -> None:
    """Write a grid of generated images to samples/ and TensorBoard."""
    write_atomically(folder / f"samples/{iteration:08d}.png", lambda path: path.write_bytes(png))
    show_picture(writer, "images/samples", png, iteration)


def show_scores(writer, record: dict) -> None:
    """Write the scores of a line of metrics.jsonl to TensorBoard."""
    for name, value in record.items():
        if isinstance(value, float) and name not in ("images_per_second", "seconds"):  # nor numbers of images
            writer.add_scalar(f"metrics/{name}", value, record["iteration"])


def show_iterations(bar: tqdm, first: bool, number: int = 1) -> None:
    """Move the progress bar on. Its rate leaves out the first call's, for which PyTorch prepares much."""
    if first:
        bar.unpause()  # its clock begins here
    bar.update(number)
    if first:
        bar.initial = bar.last_print_n = bar.n


def images_per_second(bar: tqdm, batch_size: int) -> Optional[float]:
    """The progress bar's rate. None: there is no bar, or at most one iteration since the start or a resume."""
    if bar.disable or bar.n == bar.initial:
        return None
    state = bar.format_dict
    iterations_per_second = state["rate"] or (bar.n - bar.initial) / state["elapsed"]
    return round(iterations_per_second * batch_size, 2)


def print_end(folder: pathlib.Path, args, finished: bool) -> None:
    """One line: the scores, the last grid, the command for images or, if a signal ended the run, to go on."""
    records = read_lines(folder / "metrics.jsonl")
    scores = "no scores" + (" yet" if args.eval_every else ", since --eval-every is 0")
    if records:
        scores = "FID {fid:.2f}, KID {kid_mean:.4f}, IS {is_mean:.2f} at iteration {iteration}".format(**records[-1])
    grids = sorted((folder / "samples").glob("*.png"), key=os.path.getmtime)  # a killed part may have left later ones
    grid = f"; to see: {quote(grids[-1])}" if grids else ""
    if finished:
        print(f"{folder}: {args.iterations} iterations, {scores}{grid}; images: {common.command('--generate', folder)}")
    else:
        print(f"{folder}: stopped ({scores}){grid}; go on with {common.command('--resume', folder)}")


# ----------------------------------------------------------------------------------- tensors in nested dictionaries
def flatten(tree: dict, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dictionaries, by path: {"generator.w0": ...}."""
    tensors = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{name}.")
        else:
            tensors[prefix + name] = value
    return tensors


def restore_tensors(checkpoint: dict, state: dict) -> None:
    """Copy a checkpoint's tensors into those of `state`, nested dictionaries, in place.

    Raises UserError: they do not fit.
    """
    tensors = flatten(state)
    saved = flatten({name: checkpoint.get(name, {}) for name in state})
    for path in sorted(tensors.keys() | saved.keys()):
        here, there = (list(t[path].shape) if isinstance(t.get(path), Tensor) else "nothing" for t in (tensors, saved))
        if here != there:
            raise unfit(checkpoint, f"{path} is {there} there, {here} here")
    for path, tensor in tensors.items():
        tensor.copy_(saved[path])
