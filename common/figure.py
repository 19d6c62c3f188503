"""The figure of a score of runs against iterations, or the grids of one run in motion. Runs of one NAME become one line
with a band:

    python -m common.figure GAN=runs/a GAN=runs/b GN-GAN=runs/c --key fid --out figure7.png
    python -m common.figure runs/a --out training.gif
"""
from __future__ import annotations

import os
import pathlib
import sys
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw

from common import UserError, expand, read_lines, reason, run, write_atomically

COMPARED = ("fid", "kid_mean", "kid_std", "precision", "recall")  # scores of real and generated images


def read_scores(folder: pathlib.Path, key: str) -> dict[int, tuple[float, tuple]]:
    """Iteration -> score, and the numbers of images that it was made with, of a run folder.
    Raises UserError: no scores, no such `key`, a damaged file."""
    path = folder / "metrics.jsonl"
    names = ("num_is",) if key.startswith("is_") else ("num_real", "num_fake") if key in COMPARED else ()
    try:
        records = [record for record in read_lines(path) if record[key] is not None]
        if not records:
            raise UserError(f"{folder} has no scores: its metrics.jsonl is not there (as with --eval-every 0), or has "
                            f"no {key}")
        if isinstance(records[0][key], list):
            raise UserError(f"{path} has {key} of each seed: gngan_synthetic.py's figures are in its run folder")
        return {r["iteration"]: (float(r[key]), tuple((name, r[name]) for name in names if name in r)) for r in records}
    except KeyError as error:
        raise UserError(f"{path} has no {error}; it has {', '.join(read_lines(path)[0])}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


def film(folder: pathlib.Path, out: pathlib.Path) -> None:
    """The grids in a run folder's samples/ as a GIF, at most 60 of them. Raises UserError: none, or a damaged one."""
    grids = sorted((folder / "samples").glob("*.png"))
    if not grids:
        raise UserError(f"{folder} has no grids in samples/: give the folder of an image script's run")
    chosen = [grids[i] for i in sorted(set(np.linspace(0, len(grids) - 1, 60).round().astype(int).tolist()))]
    frames = []
    for file in chosen:
        try:
            grid, iteration = Image.open(file).convert("RGB"), int(file.stem)
        except Exception as error:  # whatever a cut or foreign file makes Pillow raise
            raise UserError(f"cannot read {file}: {reason(error)}; remove it") from None
        frame = Image.new("RGB", (grid.width, grid.height + 24), "white")
        frame.paste(grid, (0, 24))
        ImageDraw.Draw(frame).text((6, 4), f"iteration {iteration:,}", "black", font_size=15)
        frames.append(frame.quantize(128).resize((frames or [frame])[0].size))  # GIFs have one size
    durations = [200] * (len(frames) - 1) + [2000]  # ms
    write_atomically(out, lambda path: frames[0].save(path, "GIF", save_all=True, append_images=frames[1:],
                                                      duration=durations, loop=0))


def split(argument: str) -> tuple[str, pathlib.Path]:
    """Name and folder of NAME=RUN or RUN, whose name is the folder's."""
    name, equals, folder = argument.partition("=")
    if not equals or os.path.exists(argument):  # a folder's name may hold a = too
        name, folder = pathlib.Path(argument).resolve().name, argument
    return name, expand(folder)


def draw(runs: Annotated[list[str], tyro.conf.Positional], out: pathlib.Path, key: str = "fid") -> None:
    """Draw a score of runs against iterations, or show the grids of one run in motion.

    Args:
        runs: folders, each RUN or NAME=RUN; runs of one name are drawn as one line, their mean, in a band, their range
        out: the picture: .png, .pdf or .svg; .gif: the grids of a single run, one after the other
        key: a score in metrics.jsonl: fid, kid_mean, is_mean, precision, recall
    """
    if not runs:
        raise UserError("give the folders of runs to draw")
    if out.suffix == ".gif" and len(runs) == 1:
        return film(split(runs[0])[1], expand(str(out)))
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {out}: a picture's name ends in .png, .pdf or .svg, of the grids of one run in .gif")
    from common.pictures import Figure  # Matplotlib, which takes a second
    groups: dict[str, list[dict[int, tuple]]] = {}  # name -> scores of its runs
    for argument in runs:
        name, folder = split(argument)
        groups.setdefault(name, []).append(read_scores(folder, key))
    numbers = {made_with for scores in sum(groups.values(), []) for _, made_with in scores.values() if made_with}
    if len(numbers) > 1:
        found = "; ".join(", ".join(f"{name} {n}" for name, n in made_with) for made_with in sorted(numbers, key=str))
        print(f"scores of different numbers of images do not compare: {found}", file=sys.stderr)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel=key.upper() if key == "fid" else key)
    for name, scores in groups.items():
        iterations = sorted(set.intersection(*map(set, scores)))
        if not iterations:
            raise UserError(f"the runs of {name} have no scored iteration in common")
        values = np.array([[score[i][0] for i in iterations] for score in scores])  # [runs, iterations]
        note = f" (mean and range of {len(scores)} runs)" if len(scores) > 1 else ""
        line, = axes.plot(iterations, values.mean(0), marker=".", label=name + note)
        low, high = values.min(0), values.max(0)
        axes.fill_between(iterations, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.legend()
    write_atomically(expand(str(out)), lambda path: figure.savefig(path, format=out.suffix[1:], dpi=150))


if __name__ == "__main__":
    run(lambda: tyro.cli(draw, prog="python -m common.figure"))
