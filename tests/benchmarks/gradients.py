"""The norm of each term's gradient to G's weights, as weighted in the loss, at a run's checkpoint.

    python tests/benchmarks/gradients.py runs/NAME                  # a line a term; --batches 10: their mean
    python tests/benchmarks/gradients.py runs/a runs/b              # a column a run

It takes training steps from the checkpoint, without saving anything. Meanwhile each objective of the script (each
function whose name ends in _objective) is asked for its loss and terms. First comes the whole loss, then each term. A
term's weight is the loss's derivative by the term, so that an edited loss shows its own weights. A value that the loss
is not made of has no line. A part of a term stands beside the term, so the lines do not add up. The script that the
checkpoint names is taken, a fork too.
"""
import importlib
import inspect
import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[2])]
import torch
import tyro

import common
from common import UserError, datasets, training


@dataclass
class Args:
    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]
    """Run folders, or their checkpoint.pt."""
    batches: int = 5
    """Mini-batches whose norms are averaged."""


def gradient_norm(value, parameters):
    """L2 norm of a scalar's gradient to all parameters together; None where there is none."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    gradients = [g.flatten() for g in gradients if g is not None]
    return torch.cat(gradients).norm().item() if gradients else None


def measured(name, objective, parameters, norms):
    """The objective, which also adds its loss's and each term's norm to norms[name]."""
    def call(*arguments):
        loss, terms, *more = objective(*arguments)
        norm = gradient_norm(loss, parameters)
        if norm is not None:
            norms.setdefault(f"{name} loss", []).append(norm)
        for term_name, term in terms.items():
            if not isinstance(term, torch.Tensor) or not term.requires_grad:
                continue
            weight, = torch.autograd.grad(loss, term, retain_graph=True, allow_unused=True)
            norm = None if weight is None else gradient_norm(weight * term, parameters)
            if norm is not None:
                norms.setdefault(term_name, []).append(norm)
        return loss, terms, *more

    return call


def norms_of(run, batches):
    """{term: norm} of a run."""
    path = run / "checkpoint.pt" if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    name = torch.load(path, map_location="cpu", weights_only=True)["script"]
    script = importlib.import_module(name)
    if not hasattr(script, "generator_objective"):
        raise UserError(f"{name}.py has no objectives of images: give runs of an image script")
    _, checkpoint = common.read_checkpoint(path, name)
    args = script.Args(**checkpoint["args"])
    args.compile = args.cuda_graph = False
    device = training.choose_device(args.device, tf32=args.precision != "fp32", deterministic=args.deterministic)
    networks = script.init_networks(args, device)
    optimizers = script.init_optimizers(args, networks)
    training.restore(checkpoint, networks, optimizers)
    images = datasets.load(args.dataset, args.data_dir, args.image_size)
    parameters, norms = list(networks["generator"].parameters()), {}
    for name, function in inspect.getmembers(script, inspect.isfunction):
        if name.endswith("_objective"):
            setattr(script, name, measured(name.removesuffix("_objective"), function, parameters, norms))
    rng = torch.Generator(device)
    step = script.make_train_step(args, networks, optimizers, rng)
    for iteration in range(checkpoint["iteration"], checkpoint["iteration"] + batches):
        rng.manual_seed(training.draw_seed(args.seed, iteration))
        step(script.get_batch(images, args, iteration, device))
    importlib.reload(script)  # without the measured objectives, for the next run
    return {term: sum(values) / len(values) for term, values in norms.items()}


def main():
    args = tyro.cli(Args, description=__doc__)
    columns = [norms_of(run, args.batches) for run in args.runs]
    widths = [max(12, len(run.name) + 2) for run in args.runs]
    print(" " * 24 + "".join(f"{run.name:>{width}s}" for run, width in zip(args.runs, widths)))
    for term in dict.fromkeys(term for column in columns for term in column):
        values = [column.get(term, float("nan")) for column in columns]
        print(f"{term:24s}" + "".join(f"{value:{width}.4g}" for value, width in zip(values, widths)))
    return 0


if __name__ == "__main__":
    common.run(main)
