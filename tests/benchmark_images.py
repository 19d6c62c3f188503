"""Speed of an image script's training step: iterations and images a second, operations a second, peak memory.

    python tests/benchmark_images.py gngan_cnn.py --width 0.25

Each row is a process of its own, so that its peak memory is its own; the rows run one after the other, so that their
ratios are those of one sitting. Operations are counted by torch's FlopCounterMode (2 a multiply-add). On a GPU the
rows are eager, graph and compile+graph in TF32 and bf16, and the floor is the time that the operations would take at
the rate of a large matrix product.
"""
import contextlib
import dataclasses
import importlib
import json
import pathlib
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

CPU_ROWS = {
    "eager": {"precision": "fp32", "channels_last": False},
    "channels_last": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "compile": {"precision": "fp32", "compile": True},
    "compile bf16": {"precision": "bf16", "compile": True},
}
CUDA_ROWS = {f"{name} {precision}": {"precision": precision, **switches} for precision in ("tf32", "bf16")
             for name, switches in {"eager": {"cuda_graph": False}, "graph": {},
                                    "compile+graph": {"compile": True}}.items()}


@dataclass
class Args:
    script: tyro.conf.Positional[str]
    """An image script, such as gngan_cnn.py."""
    width: float = 1.0
    batch_size: int = 64
    dataset: str = "cifar10"
    """Its image size is what counts; the images are noise."""
    seconds: float = 15.0
    """How long each row is timed, after a warm-up of three iterations."""
    row: str = ""
    """Used by the command itself: one row, as JSON."""


class NoModules:
    """FlopCounterMode's module tracker cannot follow torch.func.grad; only the total is wanted."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def setup(args, **switches):
    """One iteration as a function of nothing, the script's module and its arguments."""
    script = importlib.import_module(pathlib.Path(args.script).stem)
    wanted = script.Args(width=args.width, batch_size=args.batch_size, dataset=args.dataset, **switches)
    resolved = script.resolve(wanted)
    device = script.choose_device(resolved)
    networks = script.init_networks(resolved, device)
    optimizers = script.init_optimizers(resolved, networks)
    rng = torch.Generator(device).manual_seed(1)
    step = script.make_train_step(resolved, networks, optimizers, rng)
    shape = (args.batch_size, 1 if args.dataset == "mnist" else 3, resolved.image_size, resolved.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(device)
    given = (images, torch.tensor(True, device=device))  # and what a script's train_step takes between the two
    if args.script.startswith("gngan"):
        given = (images, torch.tensor(resolved.alpha, device=device), given[1])
    if device.type == "cuda" and resolved.cuda_graph:
        step = script.GraphedStep(step, networks, optimizers, rng, *given)
    return lambda: step(*given), device


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(args, **switches):
    step, device = setup(args, **switches)
    begin = time.perf_counter()
    for _ in range(3):
        step()
    synchronize(device)
    first = time.perf_counter() - begin
    count, begin = 0, time.perf_counter()
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


def operations(args, **switches):
    """Floating-point operations of one iteration."""
    step, _ = setup(args, cuda_graph=False, **switches)
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


def generator_update(args, device):
    """Seconds of G's update by scores alone and by Eq. 13, eager in fp32."""
    script = importlib.import_module(pathlib.Path(args.script).stem)
    resolved = script.resolve(script.Args(width=args.width, batch_size=args.batch_size, dataset=args.dataset))
    networks = script.init_networks(resolved, device)
    G, D = networks["generator"], networks["discriminator"].requires_grad_(False)
    optimizer = script.init_optimizers(resolved, networks)["generator"]
    x = torch.rand(args.batch_size, 3, resolved.image_size, resolved.image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    z = torch.rand(args.batch_size, resolved.latent_dim, device=device)

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


def main():
    args = tyro.cli(Args, description=__doc__)
    cuda = torch.cuda.is_available()
    rows = CUDA_ROWS if cuda else CPU_ROWS
    if args.row:
        return print(json.dumps(measure(args, **json.loads(args.row))))
    device = torch.device("cuda" if cuda else "cpu")
    total = operations(args)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.script}, {args.dataset}, width {args.width}, batch {args.batch_size}: "
          f"{total / 1e9:.1f} GFLOP an iteration; {name}, PyTorch {torch.__version__}")
    floor = {}
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        floor = {p: matrix_rate(device, d) for p, d in (("tf32", torch.float32), ("bf16", torch.bfloat16))}
        print(", ".join(f"matrix product in {p}: {r / 1e12:.0f} TFLOP/s" for p, r in floor.items()))
    heads = ("it/s", "images/s", "GFLOP/s", "of floor", "peak GiB", "first 3, s")
    print(" " * 16 + "".join(f"{h:>12s}" for h in heads))
    given = [v for f in dataclasses.fields(args) if f.name not in ("script", "row")
             for v in (f"--{f.name.replace('_', '-')}", str(getattr(args, f.name)))]
    for row, switches in rows.items():
        done = subprocess.run([sys.executable, __file__, args.script, *given, "--row", json.dumps(switches)],
                              capture_output=True, text=True)
        with contextlib.suppress(json.JSONDecodeError, IndexError):
            result = json.loads(done.stdout.splitlines()[-1])
            rate = result["rate"]
            share = f"{total * rate / floor[switches['precision']]:.0%}" if floor else "-"
            print(f"{row:16s}{rate:12.2f}{rate * args.batch_size:12.1f}{total * rate / 1e9:12.1f}{share:>12s}"
                  f"{result['memory']:12.2f}{result['first']:12.1f}", flush=True)
            continue
        print(f"{row:16s}failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
    if args.script.startswith("gngan"):
        plain, matching = generator_update(args, device)
        print(f"G's update: {plain * 1e3:.1f} ms without gradient matching, {matching * 1e3:.1f} ms with: "
              f"{matching / plain:.2f} times (the paper's: 53 / 43 = 1.23)")
    else:
        base, step = in_turn([setup(args, baseline=True)[0], setup(args)[0]], device)
        print(f"Step: {base * 1e3:.1f} ms of the baseline with one step of G, {step * 1e3:.1f} ms of MMGAN: "
              f"{step / base:.2f} times")


if __name__ == "__main__":
    main()
