"""The pictures of gngan_synthetic.py. Each function draws the arrays (or tensors on the CPU) and words that it is
handed, into a file.

Figures are made without pyplot, so that a notebook's own plots and its choice of a backend stay as they are.
"""
from __future__ import annotations

import contextlib
import math
import os
import pathlib
import sys
from typing import Sequence

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
    figure.savefig(path, dpi=150, bbox_inches="tight")


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


def plot_arrows(panels: list[tuple[str, np.ndarray]], positions: np.ndarray, centers: np.ndarray, label: str,
                path: pathlib.Path) -> None:
    """A title and arrows [n, 2] at positions [n, 2] in the unit square a panel; centres [M, 2] as dots."""
    figure, axes = make_panels([title for title, _ in panels], size=3.2)
    for ax, (_, arrows) in zip(axes, panels):
        ax.quiver(*positions.T, *arrows.T, angles="xy", scale_units="xy", scale=26, width=0.0028)
        ax.plot([], [], "k", marker=r"$\rightarrow$", linestyle="", markersize=12, label=label)
        ax.scatter(*centers.T, s=14, c="tab:red", zorder=3, label="centre of a true mode")
        ax.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.12), xticks=[], yticks=[], aspect="equal")
    save(figure, path)


def plot_curves(charts: list[tuple[str, float, list[tuple[str, str, Sequence, Sequence]]]], path: pathlib.Path) -> None:
    """Charts side by side over epochs. Each: the axis' name, the highest value possible and its curves.

    A curve: label, colour, epochs [E] and values [E, S]; drawn are the mean and one standard deviation over S.
    """
    figure = Figure(figsize=(5 * len(charts), 3.6), layout="constrained")
    axes = figure.subplots(1, len(charts), squeeze=False)[0]
    for ax, (name, limit, curves) in zip(axes, charts):
        for label, color, epochs, values in curves:
            mean, std = np.mean(values, 1), np.std(values, 1)
            marker = "." if len(epochs) <= 10 else None
            ax.plot(epochs, mean, label=label, color=color, linewidth=1.1, marker=marker)
            alpha = 0.15 if len(curves) <= 3 else 0.06
            ax.fill_between(epochs, mean - std, mean + std, color=color, linewidth=0, alpha=alpha)
        ax.axhline(limit, color="grey", linewidth=0.8, linestyle=":", label="all")
        ax.fill_between([], [], color="grey", alpha=0.3, label="± one standard deviation of the seeds")
        ax.set(xlabel="epoch", ylabel=name, ylim=(0, limit * 1.04))
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, path, columns=5)


def plot_density(panels: list[tuple[str, list[np.ndarray]]], x: np.ndarray, data: np.ndarray, labels: tuple[str, str],
                 path: pathlib.Path, video: pathlib.Path) -> None:
    """A title and two curves over training a panel, one pair [2, X] an epoch: the last as a picture, all as a video.

    x [X]: where the curves and `data` [X], the data's density, are known. labels: of the two curves.
    """
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
    images[0].save(video, save_all=True, append_images=images[1:], duration=durations, loop=0)
