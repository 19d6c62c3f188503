"""The pictures and the table of gngan_synthetic.py, of the figures, arrays (or tensors on the CPU) and words that each
function is handed. What draws, draws into a file. Other programs take Matplotlib's `Figure` from here.

Figures are made without pyplot, so that a notebook's own plots and its choice of a backend stay as they are.
"""
from __future__ import annotations

import contextlib
import math
import os
import pathlib
import sys
from typing import Optional

import numpy as np
from PIL import Image

if "MPLBACKEND" in os.environ and "matplotlib" not in sys.modules:
    backend = os.environ.pop("MPLBACKEND")  # a notebook's may be missing here: the import would fail
    import matplotlib
    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from common import write_atomically

VARIANTS = {"": "", "_ema": ", averaged G", "_uniform": ", z uniform"}  # a score's ending, and its title's
COLUMNS = {"modes": "modes", "points": "points", "w1": "Wasserstein-1"}  # of the table


def summarize(records: list[dict], iterations: int, seconds: float) -> dict:
    """A method's entry in results.json, from its evaluations in order.

    Mean and standard deviation (n - 1) are over the runs; a run's figure is the mean of its last ten evaluations.
    """
    result = {}
    for key, value in records[-1].items():
        if isinstance(value, list):
            per_seed = np.mean([record[key] for record in records[-10:]], axis=0)
            std = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else 0.0
            result[key] = {"mean": float(per_seed.mean()), "std": std, "per_seed": per_seed.tolist()}
    return {**result, "epochs": records[-1]["epoch"], "iterations": iterations, "seconds": round(seconds, 2),
            "iterations_per_second": round(iterations / seconds, 2)}


def table(methods: list[tuple[str, dict, Optional[list[tuple[float, float]]]]], with_paper: bool) -> str:
    """Table 2 as text, from each method's title, summary and figures in the paper, if it has any.

    with_paper: the paper's figures stand beside ours; otherwise ours alone.
    """
    columns = {key: heading for key, heading in COLUMNS.items() if key in methods[0][1]}
    rows = [["method"]]
    for heading in columns.values():
        rows[0] += [heading, "paper"] if with_paper else [heading]
    for title, result, paper in methods:
        for variant, words in VARIANTS.items():
            if "modes" + variant not in result:
                continue
            row = [title + words]
            for i, key in enumerate(columns):
                figure, places = result[key + variant], 1 if key == "points" else 2
                row.append(f"{figure['mean']:.{places}f} ± {figure['std']:.{places}f}")
                if with_paper:
                    row.append("{:.2f} ± {:.2f}".format(*paper[i]) if paper else "-")
            rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    note = "means and deviations of the runs; a run's figure is the mean of its last ten evaluations"
    return "\n".join([*lines, note])


def choose_panels(values: dict[str, np.ndarray], first_seed: int) -> list[tuple[str, np.ndarray]]:
    """A picture's panels, title and value, from all seeds' values [S, ...] of each title: of one eight seeds, of
    several one each."""
    panels = []
    for title, of_seeds in values.items():
        for s, value in enumerate(of_seeds[: 8 if len(values) == 1 else 1]):
            panels.append((f"{title}, seed {first_seed + s}", value))
    return panels


def make_panels(titles: list[str], size: float, fontsize: float = 9) -> tuple[Figure, list[Axes]]:
    """A figure of square panels, `size` inches each: one row up to five, rows of four beyond."""
    columns = len(titles) if len(titles) <= 5 else 4
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(size * columns, size * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize=fontsize)
    for ax in axes[len(titles) :]:
        ax.set_axis_off()
    return figure, list(axes[: len(titles)])


def save(figure: Figure, path: pathlib.Path, columns: int = 1) -> None:
    """Write a figure with one legend below it, of its first axes' marks."""
    marks = figure.axes[0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight"))


def plot_points(panels: list[tuple[str, np.ndarray]], centers: np.ndarray, radius: float, path: pathlib.Path) -> None:
    """A title and points [n, 2] in the unit square a panel; around each centre [M, 2] a circle."""
    figure, axes = make_panels([title for title, _ in panels], size=2.4, fontsize=7)
    for ax, (_, points) in zip(axes, panels):
        ax.scatter(*points.T, s=1.2, c="tab:blue", linewidths=0, label=f"{len(points):,} generated points")
        ax.add_collection(EllipseCollection(
            2 * radius, 2 * radius, 0, units="xy", offsets=centers, offset_transform=ax.transData,
            facecolors="none", edgecolors="tab:red", linewidths=0.6))
        ax.plot([], [], "o", mec="tab:red", mfc="none", label="radius around a true mode within which points count")
        ax.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xticks=[], yticks=[], aspect="equal")
    save(figure, path)


def plot_arrows(panels: list[tuple[str, np.ndarray]], positions: np.ndarray, centers: np.ndarray,
                path: pathlib.Path) -> None:
    """A title and D's gradient [n, 2] at positions [n, 2] in the unit square a panel; centres [M, 2] as dots.

    The longest tenth of the arrows is cut to one length: a few steep places must not hide the rest.
    """
    figure, axes = make_panels([title for title, _ in panels], size=3.2)
    label = "gradient of D's output; the longest tenth are cut to one length"
    for ax, (_, gradient) in zip(axes, panels):
        gradient = np.asarray(gradient)
        length = np.linalg.norm(gradient, axis=1)
        arrows = gradient / np.maximum(length, max(np.quantile(length, 0.9), 1e-20))[:, None]
        ax.quiver(*positions.T, *arrows.T, angles="xy", scale_units="xy", scale=26, width=0.0028)
        ax.plot([], [], "k", marker=r"$\rightarrow$", linestyle="", markersize=12, label=label)
        ax.scatter(*centers.T, s=14, c="tab:red", zorder=3, label="centre of a true mode")
        ax.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.12), xticks=[], yticks=[], aspect="equal")
    save(figure, path)


def plot_curves(records: dict[str, list[dict]], charts: dict[str, tuple[str, float]], highlighted: str,
                path: pathlib.Path) -> None:
    """Scores over epochs, from the evaluations of each title: their mean and one standard deviation over the seeds.

    charts: side by side, by a score's key, the axis' name and the highest value possible. With several titles the
    highlighted one is black; of a single one its variants, as of an averaged G, are drawn too.
    """
    figure = Figure(figsize=(5 * len(charts), 3.6), layout="constrained")
    axes = figure.subplots(1, len(charts), squeeze=False)[0]
    for ax, (key, (name, limit)) in zip(axes, charts.items()):
        for title, lines in records.items():
            epochs = [record["epoch"] for record in lines]
            for variant, words in VARIANTS.items():
                if key + variant not in lines[0] or variant and len(records) > 1:
                    continue
                values = [record[key + variant] for record in lines]  # [E, S]
                mean, std = np.mean(values, 1), np.std(values, 1)
                color = "black" if title == highlighted and len(records) > 1 else f"C{len(ax.lines)}"
                marker = "." if len(epochs) <= 10 else None
                ax.plot(epochs, mean, label=title + words, color=color, linewidth=1.1, marker=marker)
                alpha = 0.15 if len(records) <= 3 else 0.06
                ax.fill_between(epochs, mean - std, mean + std, color=color, linewidth=0, alpha=alpha)
        ax.axhline(limit, color="grey", linewidth=0.8, linestyle=":", label="all")
        ax.fill_between([], [], color="grey", alpha=0.3, label="± one standard deviation of the seeds")
        ax.set(xlabel="epoch", ylabel=name, ylim=(0, limit * 1.04))
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, path, columns=5)


def plot_density(panels: list[tuple[str, np.ndarray]], x: np.ndarray, data: np.ndarray, path: pathlib.Path,
                 video: pathlib.Path) -> None:
    """A title and two curves over E epochs a panel, [E, 2, X]: the last epoch as a picture, all as a video.

    The curves are the density of G(z) and D's score. x [X]: where they and `data` [X], the data's density, are known.
    """
    labels = ("density of G(z)", "D's score (a critic: scaled to [0, 1])")
    figure, axes = make_panels([title for title, _ in panels], size=2.4)
    lines = []
    for ax, (_, frames) in zip(axes, panels):
        ax.fill_between(x, data, color="tab:green", alpha=0.35, linewidth=0, label="density of the data")
        lines.append([ax.plot(x, curve, color=color, linewidth=1.2, label=label)[0]
                      for curve, color, label in zip(frames[-1], ("tab:orange", "tab:blue"), labels)])
        ax.set(xlim=(x[0] - 0.05, x[-1] + 0.05), ylim=(0, 1.02), xlabel="x")
    save(figure, path, columns=3)

    figure.set_layout_engine("none")  # it takes most of the time of drawing
    canvas = FigureCanvasAgg(figure)
    total = max(len(frames) for _, frames in panels)
    every = max(1, total // 50)
    images = []
    for epoch in range((total - 1) % every, total, every):
        for pair, (_, frames) in zip(lines, panels):
            for line, curve in zip(pair, frames[min(epoch, len(frames) - 1)]):
                line.set_ydata(curve)
        figure.suptitle(f"epoch {epoch + 1}", fontsize=9, x=0.01, ha="left")
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("P"))
    durations = [125] * (len(images) - 1) + [1500]
    write_atomically(video, lambda temporary: images[0].save(
        temporary, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0))
