"""Speed and memory of gngan_synthetic.py against a plain eager loop, in one sitting:

    python tests/benchmarks/synthetic.py             # of a fork: with its name, e.g. my_gan

The plain loop (tests/helpers/reference_synthetic.py: nn.Sequential, autograd with double backward, torch.optim.Adam)
trains one seed. Eight of its runs one after the other give the time that the script's eight seeds at once are compared
with. The two take turns, so that a machine whose speed drifts favours neither.
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

script = importlib.import_module((sys.argv[1:] or ["gngan_synthetic"])[0].removesuffix(".py"))

SEEDS, ROUNDS = 8, 5
PROTOCOL = 500 * 391


def rate(step, batches):
    """Iterations a second."""
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    return len(batches) / (time.perf_counter() - start)


def main():
    args = script.resolve(script.Args(num_seeds=SEEDS), "gngan")
    networks = script.init_networks(args, torch.device("cpu"))
    optimizers, lr = script.init_optimizers(args, networks), torch.tensor(args.lr)
    batches = [script.Draws(*batch) for batch in zip(*script.draw_epoch(args, 0))]
    single = [[values[:, 0] for values in batch] for batch in batches[:150]]  # the first seed's
    plain = Reference(args, {name: {k: v[0] for k, v in params.items()} for name, params in networks.items()})
    eager = script.make_train_step(args, networks, optimizers, lr)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    start = time.perf_counter()
    compiled(batches[0])
    first = time.perf_counter() - start

    def plain_step(batch):
        plain.step(*batch)

    rate(plain_step, single[:10])
    rows = []
    for _ in range(ROUNDS):
        rows.append((rate(plain_step, single), rate(eager, batches[:100]), rate(compiled, batches)))
    ratios = sorted(compiled_rate * SEEDS / plain_rate for plain_rate, _, compiled_rate in rows)
    plain_rate, eager_rate, compiled_rate = (sorted(column)[ROUNDS // 2] for column in zip(*rows))

    def minutes(rate):
        return PROTOCOL / rate / 60

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {ROUNDS} rounds")
    print(f"plain eager loop, 1 seed        {plain_rate:8.1f} it/s   8 full runs in turn "
          f"{SEEDS * minutes(plain_rate):7.1f} min")
    print(f"this script, eager, 8 seeds     {eager_rate:8.1f} it/s   8 full runs at once "
          f"{minutes(eager_rate):7.1f} min")
    print(f"this script, compiled, 8 seeds  {compiled_rate:8.1f} it/s   8 full runs at once "
          f"{minutes(compiled_rate):7.1f} min")
    print(f"compiled against plain, seed for seed: {ratios[ROUNDS // 2]:.1f} times "
          f"(from {ratios[0]:.1f} to {ratios[-1]:.1f}); the first compiled step took {first:.1f} s")
    with tempfile.TemporaryDirectory() as folder:  # memory of the script as it is run
        subprocess.run([sys.executable, script.__file__, "--epochs", "15", "--run-dir", folder], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak memory of a run of 15 epochs, compiling included: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
