"""Speed and memory of gngan_synthetic.py against a plain eager loop, in one sitting:

    python tests/benchmark_synthetic.py

The plain loop (tests/reference_synthetic.py: nn.Sequential, autograd with double backward, torch.optim.Adam) trains
one seed; eight of its runs one after the other give the time that the script's eight seeds at once are compared with.
The two take turns, so that a machine whose speed drifts favours neither.
"""
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from reference_synthetic import Reference

import gngan_synthetic as script

SEEDS, ROUNDS = 8, 5
PROTOCOL = 500 * 391


def rate(step, batches):
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    return len(batches) / (time.perf_counter() - start)


def main():
    args = script.resolve(script.Args(), "gngan")
    generators = [torch.Generator().manual_seed(s) for s in range(SEEDS)]
    state = script.init_state(args, generators, torch.device("cpu"))
    draws = script.draw_epoch(script.make_data(2)[0], generators, args)
    batches = [{k: v[i] for k, v in draws.items()} for i in range(len(draws["x"]))]
    single = [{k: v[:, 0] for k, v in batch.items()} for batch in batches[:150]]
    plain = Reference(args, {n: {k: v[0] for k, v in p.items()} for n, p in state["networks"].items()})
    eager = script.make_train_step(args)
    compiled = torch.compile(script.make_train_step(args), fullgraph=True, dynamic=False)
    start = time.perf_counter()
    compiled(state, batches[0])
    first = time.perf_counter() - start
    rate(plain.step, single[:10])
    ratios, rows = [], []
    for _ in range(ROUNDS):
        rows.append((rate(plain.step, single), rate(lambda b: eager(state, b), batches[:100]),
                     rate(lambda b: compiled(state, b), batches)))
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
