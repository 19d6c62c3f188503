"""Speed and memory of gngan_synthetic.py against a plain eager loop, in one sitting:

    python tests/benchmarks/synthetic.py             # of a fork: with its name, e.g. my_gan

The plain loop (tests/helpers/reference_synthetic.py: nn.Sequential, autograd with double backward, torch.optim.Adam) trains
one seed; eight of its runs one after the other give the time that the script's eight seeds at once are compared with.
The two take turns, so that a machine whose speed drifts favours neither.
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
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    return len(batches) / (time.perf_counter() - start)


def main():
    args = script.resolve(script.Args(num_seeds=SEEDS), "gngan")
    networks = script.init_networks(args, torch.device("cpu"))
    optimizers, lr = script.init_optimizers(args, networks), torch.tensor(args.lr)
    draws = script.draw_epoch(args, 0)
    batches = [{k: v[i] for k, v in draws.items()} for i in range(len(draws["x"]))]
    single = [{k: v[:, 0] for k, v in batch.items()} for batch in batches[:150]]
    plain = Reference(args, {n: {k: v[0] for k, v in p.items()} for n, p in networks.items()})
    eager = script.make_train_step(args, networks, optimizers, lr)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    start = time.perf_counter()
    compiled(batches[0])
    first = time.perf_counter() - start
    rate(plain.step, single[:10])
    ratios, rows = [], []
    for _ in range(ROUNDS):
        rows.append((rate(plain.step, single), rate(eager, batches[:100]),
                     rate(compiled, batches)))
        ratios.append(rows[-1][2] * SEEDS / rows[-1][0])
    median = [sorted(column)[ROUNDS // 2] for column in zip(*rows)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {ROUNDS} rounds")
    minutes = PROTOCOL * SEEDS / median[0] / 60, PROTOCOL / median[1] / 60, PROTOCOL / median[2] / 60
    print(f"plain eager loop, 1 seed        {median[0]:8.1f} it/s   8 full runs in turn {minutes[0]:7.1f} min")
    print(f"this script, eager, 8 seeds     {median[1]:8.1f} it/s   8 full runs at once {minutes[1]:7.1f} min")
    print(f"this script, compiled, 8 seeds  {median[2]:8.1f} it/s   8 full runs at once {minutes[2]:7.1f} min")
    print(f"compiled against plain, seed for seed: {sorted(ratios)[ROUNDS // 2]:.1f} times "
          f"(from {min(ratios):.1f} to {max(ratios):.1f}); the first compiled step took {first:.1f} s")
    with tempfile.TemporaryDirectory() as folder:  # memory of the script as it is run
        subprocess.run([sys.executable, script.__file__, "--epochs", "15", "--run-dir", folder], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak memory of a run of 15 epochs, compiling included: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
