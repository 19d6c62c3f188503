"""Speed and memory of gngan_synthetic.py against a plain eager loop, in one sitting:

    python tests/benchmarks/synthetic.py             # of a fork: with its name, e.g. my_gan
    taskset -c 0,1 python tests/benchmarks/synthetic.py --busy     # on two cores, beside a process that is busy on one

The plain loop (tests/helpers/reference_synthetic.py: nn.Sequential, autograd with double backward, torch.optim.Adam)
trains one seed. Eight of its runs one after the other give the time that the script's eight seeds at once are compared
with. All take turns, so that a machine whose speed drifts favours none.
"""
import importlib
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]
from reference_synthetic import Reference

from common import training

busy = "--busy" in sys.argv
names = [argument for argument in sys.argv[1:] if argument != "--busy"] or ["gngan_synthetic"]
script = importlib.import_module(names[0].removesuffix(".py"))

SEEDS, ROUNDS, ITERATIONS = 8, 5, 782
PROTOCOL = 500 * 391
CPU = torch.device("cpu")


def rate(train, iterations):
    """Iterations a second of train(first, last), or of Workers."""
    start = time.perf_counter()
    if isinstance(train, training.Workers):
        train.send(0, iterations)
        train.receive()
    else:
        train(0, iterations)
    return iterations / (time.perf_counter() - start)


def plain_loop(args):
    """One seed's train(first, last), with as many threads as PyTorch takes."""
    threads = torch.get_num_threads()
    batches = [script.Draws(*batch) for batch in zip(*script.draw_epoch(args, 0))]
    single = [[values[:, 0] for values in batch] for batch in batches[:150]]
    plain = Reference(args, {name: {k: v[0] for k, v in params.items()}
                             for name, params in script.init_networks(args).items()})

    def train(first, last):
        torch.set_num_threads(threads)
        for batch in single[first:last]:
            plain.step(*batch)
        torch.set_num_threads(1)

    return train


def main():
    with tempfile.TemporaryDirectory() as folder:  # first: a child's peak is never below this process's
        subprocess.run([sys.executable, script.__file__, "--epochs", "15", "--run-dir", folder], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    cores = torch.get_num_threads()
    args = script.resolve(script.Args(num_seeds=SEEDS), "gngan")
    args.processes = cores
    networks = script.init_networks(args)
    state = {"networks": networks, "optimizers": script.init_optimizers(args, networks)}
    plain = plain_loop(args)
    torch.set_num_threads(1)

    def shares(compiled):
        return script.make_shares(args, state, CPU, compiled)

    with (training.Workers(shares(compiled=False), lambda: None, ROOT) as eager,
          training.Workers(shares(compiled=True), lambda: None, ROOT) as compiled):
        rate(eager, 10)  # forks, before this process uses autograd
        start = time.perf_counter()
        shares(compiled=True)[0](0, 1)
        first = time.perf_counter() - start
        rate(compiled, 10)
        rate(plain, 10)
        other = subprocess.Popen([sys.executable, "-c", "while True: pass" if busy else ""])
        try:
            rows = [(rate(plain, 150), rate(eager, 100), rate(compiled, ITERATIONS)) for _ in range(ROUNDS)]
        finally:
            other.kill()
    ratios = sorted(compiled_rate * SEEDS / plain_rate for plain_rate, _, compiled_rate in rows)
    plain_rate, eager_rate, compiled_rate = (sorted(column)[ROUNDS // 2] for column in zip(*rows))

    def minutes(rate):
        return PROTOCOL / rate / 60

    print(f"torch {torch.__version__}, {len(compiled.functions)} processes of {-(-SEEDS // cores)} seeds"
          f"{', beside a busy process' if busy else ''}; medians of {ROUNDS} rounds")
    print(f"plain eager loop, 1 seed        {plain_rate:8.1f} it/s   8 full runs in turn "
          f"{SEEDS * minutes(plain_rate):7.1f} min")
    print(f"this script, eager, 8 seeds     {eager_rate:8.1f} it/s   8 full runs at once "
          f"{minutes(eager_rate):7.1f} min")
    print(f"this script, compiled, 8 seeds  {compiled_rate:8.1f} it/s   8 full runs at once "
          f"{minutes(compiled_rate):7.1f} min")
    print(f"compiled against plain, seed for seed: {ratios[ROUNDS // 2]:.1f} times "
          f"(from {ratios[0]:.1f} to {ratios[-1]:.1f}); the first compiled step took {first:.1f} s")
    print(f"peak memory of the largest process of a run of 15 epochs, compiling included: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
