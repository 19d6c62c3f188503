"""Speed of image scripts' training steps: iterations and images a second, operations a second, peak memory.

    python tests/benchmarks/images.py --tests --seconds 3   # on a GPU: its tests and all four scripts
    python tests/benchmarks/images.py --script gngan_cnn --width 0.25
    python tests/benchmarks/images.py --script gngan_cnn my_gan=gngan_cnn     # a fork beside its model

Each row is a process of its own, so that its peak memory is its own; the rows run one after the other, so that their
ratios are those of one sitting. Operations are counted by torch's FlopCounterMode (2 a multiply-add). On a GPU the
rows are eager, graph and compile+graph in TF32 and bf16, and the floor is the time that the operations would take at
the rate of a large matrix product; what is compiled is compiled beforehand, all at once, and kept in PyTorch's cache.
Meanwhile --tests runs tests/test_cuda.py, a process for each script. The four scripts with --tests take more than
nine minutes; two take less.
"""
import contextlib
import importlib
import json
import pathlib
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Optional

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers")]
import torch
import tyro
from scripts import IMAGES
from steps import noise, parts
from torch.utils.flop_counter import FlopCounterMode

import common

CPU_ROWS = {
    "eager": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "compile": {"precision": "fp32", "compile": True},
    "compile bf16": {"precision": "bf16", "compile": True},
}
CUDA_ROWS = {f"{name} {precision}": {"precision": precision, **switches} for precision in ("tf32", "bf16")
             for name, switches in {"eager": {"cuda_graph": False}, "graph": {},
                                    "compile+graph": {"compile": True}}.items()}


@dataclass
class Args:
    script: tuple[str, ...] = tuple(IMAGES)
    """Image scripts, a fork as FORK=MODEL."""
    width: float = 1.0
    batch_size: Optional[int] = None
    """Default: the script's own."""
    dataset: Optional[str] = None
    """Its image size is what counts; the images are noise. Default: the script's own."""
    seconds: float = 15.0
    """How long each row is timed, after a warm-up of three iterations."""
    tests: bool = False
    """Run the tests for a CUDA GPU as well; the exit status is theirs."""
    limit: float = 520.0
    """No row is begun later than this many seconds after the start."""
    row: str = ""
    """Used by the command itself: one row, as JSON."""


def script_args(script, args, **switches):
    """The module of a script and its arguments for a benchmark."""
    module = importlib.import_module(script.partition("=")[0])
    given = {k: getattr(args, k) for k in ("batch_size", "dataset") if getattr(args, k) is not None}
    return module, module.resolve(module.Args(width=args.width, **given, **switches))


class NoModules:
    """FlopCounterMode's module tracker cannot follow torch.func.grad; only the total is wanted."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def setup(script, args, **switches):
    """One iteration as a function of nothing, and its device."""
    script, resolved = script_args(script, args, **switches)
    device = common.choose_device("auto", resolved.precision != "fp32", deterministic=False)
    networks, optimizers, rng, step = parts(script, resolved, device)
    images = noise(resolved).to(device)
    if device.type == "cuda" and resolved.cuda_graph:
        step = script.GraphedStep(step, networks, optimizers, rng, images)
    return lambda: step(images), device


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(script, args, **switches):
    step, device = setup(script, args, **switches)
    begin = time.perf_counter()
    for _ in range(3):
        step()
    synchronize(device)
    first = time.perf_counter() - begin
    count, rate, begin = 0, 0.0, time.perf_counter()
    while time.perf_counter() < begin + args.seconds:
        for _ in range(1 if device.type == "cpu" else 50):
            step()
            count += 1
        synchronize(device)
        rate = count / (time.perf_counter() - begin)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"rate": rate, "memory": memory, "first": first}


def operations(script, args, **switches):
    """Floating-point operations of one iteration."""
    step, _ = setup(script, args, cuda_graph=False, **switches)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        step()
    return counter.get_total_flops()


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


def generator_update(script, args, device):
    """Seconds of G's update by scores alone and by Eq. 13, eager in fp32."""
    script, resolved = script_args(script, args)
    networks = script.init_networks(resolved, device)
    G, D = networks["generator"], networks["discriminator"].requires_grad_(False)
    optimizer = script.init_optimizers(resolved, networks)["generator"]
    x = torch.rand(resolved.batch_size, 3, resolved.image_size, resolved.image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    z = torch.rand(resolved.batch_size, resolved.latent_dim, device=device)

    def update(matching):
        fake = G(z)
        if matching:
            loss = sum(script.gradient_matching(D, x, fake))
        else:
            with torch.no_grad():
                real = torch.sigmoid(D(x)).mean()
            loss = (real - torch.sigmoid(D(fake)).mean()).abs()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return in_turn([lambda: update(False), lambda: update(True)], device)


def matrix_rate(device, dtype):
    """Operations a second of a product of two large matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    for repeat in (3, 20):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeat):
            a @ a
        synchronize(device)
    return 2 * n**3 * 20 / (time.perf_counter() - begin)


def start(script, args, switches, seconds):
    """A process for one row, which prints its result as JSON."""
    given = [v for name in ("width", "batch_size", "dataset") if getattr(args, name) is not None
             for v in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return subprocess.Popen([sys.executable, __file__, "--script", script, *given, "--seconds", str(seconds), "--row",
                             json.dumps(switches)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_tests(script):
    """A process for the tests of one script on a GPU."""
    script = script if "=" in script else f"{script}={script}"
    command = [sys.executable, "-m", "pytest", TESTS / "test_cuda.py", "--script", script, "-rfE", "--tb=short"]
    return subprocess.Popen(command, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def table(script, args, rows, device, floor, end):
    total = operations(script, args)
    resolved = script_args(script, args)[1]
    print(f"{script}, {resolved.dataset}, width {args.width}, batch {resolved.batch_size}: "
          f"{total / 1e9:.1f} GFLOP an iteration")
    heads = ("it/s", "images/s", "GFLOP/s", "of floor", "peak GiB", "first 3, s")
    print(" " * 20 + "".join(f"{h:>12s}" for h in heads))
    for row, switches in rows.items():
        if time.perf_counter() > end:
            print(f"{row:20s}left out: --limit {args.limit:.0f}", flush=True)
            continue
        out, err = start(script, args, switches, args.seconds).communicate()
        with contextlib.suppress(json.JSONDecodeError, IndexError):
            result = json.loads(out.splitlines()[-1])
            rate = result["rate"]
            share = f"{total * rate / floor[switches['precision']]:.0%}" if floor else "-"
            print(f"{row:20s}{rate:12.2f}{rate * resolved.batch_size:12.1f}{total * rate / 1e9:12.1f}{share:>12s}"
                  f"{result['memory']:12.2f}{result['first']:12.1f}", flush=True)
            continue
        print(f"{row:20s}failed: {err.strip().splitlines()[-1]}", flush=True)
    if time.perf_counter() > end:
        return
    model = script.partition("=")[2] or script
    if model.startswith("gngan"):
        plain, matching = generator_update(script, args, device)
        print(f"G's update: {plain * 1e3:.1f} ms without gradient matching, {matching * 1e3:.1f} ms with: "
              f"{matching / plain:.2f} times (the paper's: 53 / 43 = 1.23)")
    else:
        baseline = True if model == "mmgan_dcgan" else "feature-matching"
        base, step = in_turn([setup(script, args, baseline=baseline)[0], setup(script, args)[0]], device)
        print(f"Step: {base * 1e3:.1f} ms of the baseline with one step of G, {step * 1e3:.1f} ms of MMGAN: "
              f"{step / base:.2f} times")


def main():
    args = tyro.cli(Args, description=__doc__)
    cuda = torch.cuda.is_available()
    rows = CUDA_ROWS if cuda else CPU_ROWS
    if args.row:
        return print(json.dumps(measure(args.script[0], args, **json.loads(args.row))))
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, PyTorch {torch.__version__}")
    floor, begin = {}, time.perf_counter()
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        floor = {p: matrix_rate(device, d) for p, d in (("tf32", torch.float32), ("bf16", torch.bfloat16))}
        print(", ".join(f"matrix product in {p}: {r / 1e12:.0f} TFLOP/s" for p, r in floor.items()), flush=True)
    tests = [start_tests(script) for script in args.script if args.tests]  # after the floor, which they would disturb
    if cuda:
        compiling = [start(script, args, switches, 0) for script in args.script for switches in rows.values()
                     if switches.get("compile")]
        for process in compiling:
            process.communicate()
    for script, process in zip(args.script, tests):
        print(f"tests of {script} on a GPU: {process.communicate()[0].strip()}", flush=True)
    for script in args.script:
        table(script, args, rows, device, floor, begin + args.limit)
    return max((abs(process.returncode) for process in tests), default=0)


if __name__ == "__main__":
    sys.exit(main())
