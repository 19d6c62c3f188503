"""Speed of image scripts' training steps: iterations and images a second, operations a second, peak memory, set-up.

    python tests/benchmarks/images.py --tests --seconds 3   # on a GPU: its tests and all four scripts
    python tests/benchmarks/images.py --script gngan_cnn --width 0.25
    python tests/benchmarks/images.py --script gngan_cnn my_gan=gngan_cnn     # a fork beside its model

Each row is a process of its own, so that its peak memory is its own. The rows run one after the other, those that
compile last. Operations are counted by torch's FlopCounterMode (2 a multiply-add). The set-up lasts until the first
four iterations are done: compilation and the capture of a CUDA graph are in it, the import of PyTorch is not. What was
compiled before is found in PyTorch's cache.

On a GPU the rows are graph in fp32, and eager, graph and compile+graph in TF32 and bf16. The floor is the time that the
operations would take at the rate of a large matrix product. --tests first runs tests/test_cuda.py, a process for each
script.
"""
import contextlib
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Optional

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/helpers")]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the scripts do
import torch
import tyro
from scripts import IMAGES
from steps import build, noise
from torch.utils.flop_counter import FlopCounterMode

from common import training

CPU_ROWS = {
    "eager": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "compile": {"precision": "fp32", "compile": True},
    "compile bf16": {"precision": "bf16", "compile": True},
}
CUDA_ROWS = {
    "graph fp32": {"precision": "fp32"},
    "eager tf32": {"precision": "tf32", "cuda_graph": False},
    "graph tf32": {"precision": "tf32"},
    "eager bf16": {"precision": "bf16", "cuda_graph": False},
    "graph bf16": {"precision": "bf16"},
    "compile+graph tf32": {"precision": "tf32", "compile": True},
    "compile+graph bf16": {"precision": "bf16", "compile": True},
}
# seconds after which a process is ended, beside --seconds
ROW_LIMIT = 120
COMPILE_LIMIT = 300
TESTS_LIMIT = 400
# an end without PyTorch's compile workers, which can hold it up for minutes
PYTEST = "import os, sys, pytest; status = pytest.main(sys.argv[1:]); sys.stdout.flush(); os._exit(status)"


@dataclass
class Args:
    script: tuple[str, ...] = tuple(IMAGES)
    """Image scripts, a fork as FORK=MODEL."""
    width: float = 1.0
    """Factor of the networks' channels."""
    batch_size: Optional[int] = None
    """Default: the script's own."""
    dataset: Optional[str] = None
    """Its image size is what counts; the images are noise. Default: the script's own."""
    seconds: float = 15.0
    """How long each row is timed, after its set-up."""
    tests: bool = False
    """Run the tests for a CUDA GPU as well; the exit status is theirs."""
    limit: float = 520.0
    """No row is begun later than this many seconds after the start."""
    row: str = ""
    """Used by the command itself: one row, as JSON."""


# ------------------------------------------------------------------------------ processes
def start(*command):
    """A Python process in a process group of its own, and the file that it writes to.

    Not a pipe: what the process leaves behind could keep that open.
    """
    output = tempfile.TemporaryFile("w+", errors="replace")
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                               start_new_session=True)
    return process, output


def finish(process, output, limit):
    """The lines that it printed, at least one. After `limit` seconds it is ended, and in any case its children."""
    note = None
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        note = f"ended after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    output.seek(0)
    lines = [line for line in output.read().splitlines() if line.strip()]
    if note is None and not lines:
        note = f"exit status {process.returncode}"
    if note is not None:
        lines.append(note)
    return lines


def start_row(script, args, switches):
    """A process for one row, which prints its result as JSON."""
    command = [__file__, "--script", script, "--seconds", str(args.seconds), "--row", json.dumps(switches)]
    for name in ("width", "batch_size", "dataset"):
        value = getattr(args, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return start(*command)


def start_tests(script):
    """A process for the tests of one script on a GPU."""
    fork = script if "=" in script else f"{script}={script}"
    return start("-c", PYTEST, "tests/test_cuda.py", "--script", fork, "-rfE", "--tb=short")


# ----------------------------------------------------------------------------- one script
def script_args(script, args, **switches):
    """The module of a script and its arguments for a benchmark."""
    module = importlib.import_module(script.partition("=")[0])
    given = {k: getattr(args, k) for k in ("batch_size", "dataset") if getattr(args, k) is not None}
    return module, module.resolve(module.Args(width=args.width, **given, **switches))


def setup(script, args, first=4, **switches):
    """One iteration as a function of nothing, and its device. The first iterations are done: a graph is captured."""
    module, resolved = script_args(script, args, **switches)
    device = training.choose_device("auto", tf32=resolved.precision != "fp32", deterministic=False)
    networks, optimizers, rng, step = build(module, resolved, device)
    images = noise(resolved).to(device)
    if device.type == "cuda" and resolved.cuda_graph:
        step = training.GraphedStep(step, rng)
    for _ in range(first):
        step(images)
    synchronize(device)
    return lambda: step(images), device


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(script, args, **switches):
    """A row: iterations a second, peak memory in GiB, seconds of the set-up."""
    begin = time.perf_counter()
    step, device = setup(script, args, **switches)
    seconds = time.perf_counter() - begin
    count, rate = 0, 0.0
    begin = time.perf_counter()
    while time.perf_counter() < begin + args.seconds:
        for _ in range(1 if device.type == "cpu" else 50):
            step()
            count += 1
        synchronize(device)
        rate = count / (time.perf_counter() - begin)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would be the starting process's, if larger
        memory = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    return {"rate": rate, "memory": memory, "setup": seconds}


def operations(script, args):
    """Floating-point operations of one iteration."""
    step, _ = setup(script, args, first=0, cuda_graph=False)
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def matrix_rate(device, dtype):
    """Operations a second of a product of two large matrices."""
    n = 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    for repeat in (3, 20):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeat):
            a @ a
        synchronize(device)
    return 2 * n**3 * repeat / (time.perf_counter() - begin)


# ---------------------------------------------------------------------------- comparisons
def in_turn(functions, device):
    """Seconds a call of each of several functions, in turn three calls of each: medians of five rounds."""
    times = [[] for _ in functions]
    for _ in range(6):
        for function, seconds in zip(functions, times):
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(3):
                function()
            synchronize(device)
            seconds.append((time.perf_counter() - begin) / 3)
    return [sorted(seconds[1:])[2] for seconds in times]


def compare_generator_updates(script, args, device):
    """GN-GAN: G's update by scores alone and by Eq. 13, eager, in the default precision."""
    module, resolved = script_args(script, args)
    networks = module.init_networks(resolved, device)
    G, D = networks["generator"], networks["discriminator"].requires_grad_(False)
    optimizer = module.init_optimizers(resolved, networks)["generator"]
    x = torch.rand(resolved.batch_size, 3, resolved.image_size, resolved.image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    z = torch.rand(resolved.batch_size, resolved.latent_dim, device=device)

    def update(matching):
        fake = G(z)
        if matching:
            loss = sum(module.gradient_matching(D, x, fake))
        else:
            with torch.no_grad():
                real = torch.sigmoid(D(x)).mean()
            loss = (real - torch.sigmoid(D(fake)).mean()).abs()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    plain, matching = in_turn([lambda: update(False), lambda: update(True)], device)
    print(f"G's update: {plain * 1e3:.1f} ms without gradient matching, {matching * 1e3:.1f} ms with: "
          f"{matching / plain:.2f} times (the paper's: 53 / 43 = 1.23)", flush=True)


def compare_with_baseline(script, args, baseline):
    """MMGAN: its step and the baseline's."""
    plain, device = setup(script, args, baseline=baseline)
    manifolds, _ = setup(script, args)
    base, step = in_turn([plain, manifolds], device)
    print(f"Step: {base * 1e3:.1f} ms of the baseline with one step of G, {step * 1e3:.1f} ms of MMGAN: "
          f"{step / base:.2f} times", flush=True)


# --------------------------------------------------------------------------------- tables
def table(script, args, rows, total, floor, end):
    """A line a row. total: operations of an iteration; floor: those a second of a matrix product, by precision."""
    batch_size = script_args(script, args)[1].batch_size
    heads = ("it/s", "images/s", "GFLOP/s", "of floor", "peak GiB", "set-up, s")
    print(" " * 20 + "".join(f"{h:>12s}" for h in heads))
    for row, switches in rows.items():
        if time.perf_counter() > end:
            print(f"{row:20s}left out: --limit {args.limit:g}", flush=True)
            continue
        limit = args.seconds + (COMPILE_LIMIT if switches.get("compile") else ROW_LIMIT)
        lines = finish(*start_row(script, args, switches), limit)
        results = [line for line in lines if line.startswith('{"rate"')]
        if not results:
            print(f"{row:20s}failed: {lines[-1]}", flush=True)
            continue
        result = json.loads(results[-1])
        rate = result["rate"]
        share = f"{total * rate / floor[switches['precision']]:.0%}" if floor else "-"
        print(f"{row:20s}{rate:12.2f}{rate * batch_size:12.1f}{total * rate / 1e9:12.1f}{share:>12s}"
              f"{result['memory']:12.2f}{result['setup']:12.1f}", flush=True)


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.row:
        print(json.dumps(measure(args.script[0], args, **json.loads(args.row))), flush=True)
        os._exit(0)  # see PYTEST
    end = time.perf_counter() + args.limit
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, PyTorch {torch.__version__}", flush=True)
    floor = {}
    if cuda:
        floor = {"fp32": matrix_rate(device, torch.float32)}
        torch.backends.cuda.matmul.allow_tf32 = True
        floor |= {"tf32": matrix_rate(device, torch.float32), "bf16": matrix_rate(device, torch.bfloat16)}
        print(", ".join(f"matrix product in {p}: {r / 1e12:.0f} TFLOP/s" for p, r in floor.items()), flush=True)

    tests = [start_tests(script) for script in args.script if args.tests]
    tests_end = time.perf_counter() + TESTS_LIMIT
    for script, (process, output) in zip(args.script, tests):
        lines = finish(process, output, max(0, tests_end - time.perf_counter()))
        print(f"tests of {script} on a GPU:", *lines, sep="\n", flush=True)

    rows = CUDA_ROWS if cuda else CPU_ROWS
    compiled = {row: switches for row, switches in rows.items() if "compile" in switches}
    uncompiled = {row: switches for row, switches in rows.items() if row not in compiled}
    totals = {}
    for script in args.script:
        totals[script] = operations(script, args)
        resolved = script_args(script, args)[1]
        print(f"{script}, {resolved.dataset}, width {args.width}, batch {resolved.batch_size}: "
              f"{totals[script] / 1e9:.1f} GFLOP an iteration")
        table(script, args, uncompiled, totals[script], floor, end)
        if time.perf_counter() > end:
            continue
        model = script.partition("=")[2] or script
        if model.startswith("gngan"):
            compare_generator_updates(script, args, device)
        else:
            compare_with_baseline(script, args, True if model == "mmgan_dcgan" else "feature-matching")
    for script in args.script:
        print(f"{script}, compiled")
        table(script, args, compiled, totals[script], floor, end)
    return max((abs(process.returncode) for process, _ in tests), default=0)


if __name__ == "__main__":
    sys.exit(main())
