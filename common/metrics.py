"""FID (Heusel et al. 2017), KID (Binkowski et al. 2018), Inception Score (Salimans et al. 2016), precision and recall
(Kynkaanniemi et al. 2019), of the features of torch-fidelity's Inception network.

    evaluator = Evaluator(images, num_real=10_000, weights=None, device="cuda")
    evaluator.score(sample, num_fake=5_000)          # {"fid": ..., "kid_mean": ..., ...}

As a program it draws a score of runs against iterations; runs of one NAME become one line with a band:

    python -m common.metrics GAN=runs/a GAN=runs/b GN-GAN=runs/c --key fid --out figure7.png
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from typing import Annotated, Callable, Iterator, Optional

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm import tqdm

from common import UserError, cache_folder, reason, run, world, write_atomically
from common.datasets import download, process_zero_first


class Evaluator:
    """Scores generated images against real ones.

    real: uint8 [N, C, H, W], C = 1 or 3; the same num_real of them (or all, if there are fewer), drawn without
    replacement, serve every evaluation. weights: torch-fidelity's Inception weights; None: downloaded once into
    PyTorch's hub folder. The real images' features are kept in `cache_folder()` under a key of images and weights.

    Raises UserError: fewer than two images, weights that cannot be had or read.
    """

    @process_zero_first()
    def __init__(self, real: Tensor, num_real: int, weights: Optional[str], device: torch.device | str):
        num_real = min(num_real, len(real))
        if num_real < 2:
            raise UserError("scores need two real images or more: the data set or --num-real has fewer")
        self.device = torch.device(device)
        path = pathlib.Path(os.path.expanduser(weights)) if weights else download_weights()
        self.inception = load_inception(path, downloaded=weights is None).to(self.device)
        if self.device.type == "cpu":
            self.inception = self.inception.to(memory_format=torch.channels_last)
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:num_real].sort().values
        images = real[order]
        key = hashlib.sha256(path.read_bytes())
        key.update(images.numpy())
        cached = cache_folder() / f"inception-{num_real}-{key.hexdigest()[:16]}.f32"
        try:
            features = torch.from_numpy(np.fromfile(cached, np.float32).reshape(num_real, 2048))
        except (OSError, ValueError):  # not there, or cut
            features = torch.empty(num_real, 2048)
            for start in tqdm(range(0, num_real, 100), "features of real images", dynamic_ncols=True):
                batch = images[start : start + 100].to(self.device)
                features[start : start + len(batch)] = self.features(batch)[0].cpu()
            write_atomically(cached, features.numpy().tofile, "make room, or set XDG_CACHE_HOME; ")
        self.real = features.to(self.device)
        self.mean, self.covariance = moments(self.real)
        self.root = matrix_root(self.covariance)  # half of every distance's work, done once

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pool features [n, 2048] and class logits without bias [n, 1008] of uint8 images [n, C, H, W]."""
        with torch.autocast(self.device.type, enabled=False), exact_products():
            return self.inception(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)

    def score(self, sample: Callable[[int], Tensor], num_fake: int, num_is: Optional[int] = None,
              stop: Optional[Callable[[], bool]] = None, batch_size: int = 100) -> Optional[dict[str, float]]:
        """Scores of num_fake generated images; the Inception Score of num_is of them, in ten splits. The larger number
        is drawn, and the other scores take the first of them.

        sample: maps a number n to n new images, uint8 [n, C, H, W]. num_is: default num_fake. stop: asked before each
        batch; once it says True, None is returned. Under torchrun each process samples its share of the images.
        """
        processes, num_is = world()[1], num_is or num_fake
        fake_share, is_share = -(-num_fake // processes), -(-num_is // processes)
        features, logits, total = [], [], max(fake_share, is_share)
        for start in tqdm(range(0, total, batch_size), "scoring", leave=False, dynamic_ncols=True,
                          disable=world()[0] > 0):
            if stop is not None and stop():
                return None
            batch = self.features(sample(min(batch_size, total - start)).to(self.device))
            features.append(batch[0][: max(0, fake_share - start)])
            logits.append(batch[1][: max(0, is_share - start)])
        fake, logits = gather(torch.cat(features))[:num_fake], gather(torch.cat(logits))[:num_is]
        smaller = min(len(fake), len(self.real))
        fid = frechet_distance(self.mean, self.covariance, *moments(fake), self.root)
        kid = kid_features_to_metric(fake, self.real, kid_subset_size=min(1000, smaller), verbose=False)
        inception = isc_features_to_metric(logits.cpu(), splits=min(10, num_is))
        with exact_products():  # in blocks, or 50,000 images would need 10 GB
            near = prc_features_to_metric(fake, self.real, prc_neighborhood=min(3, smaller - 1), prc_batch_size=1000,
                                          save_cpu_ram=True, verbose=False)
        return {"fid": fid, "kid_mean": kid["kernel_inception_distance_mean"],
                "kid_std": kid["kernel_inception_distance_std"], "is_mean": inception["inception_score_mean"],
                "is_std": inception["inception_score_std"], "precision": near["precision"], "recall": near["recall"]}


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, which all have as many."""
    if world()[1] == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world()[1])]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Without TF32, whatever training uses, so that scores of different runs compare."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] (n - 1) of features [n, d], in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.mT)


def matrix_root(covariance: Tensor) -> Tensor:
    """R with R R' = covariance, [d, d]."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, root1: Optional[Tensor] = None) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (Heusel et al. 2017, Eq. 6) of means [d] and covariances [d, d].

    S1 = R R' makes S1 S2 similar to R' S2 R, whose eigenvalues are those of a symmetric matrix: real, not negative but
    for rounding, and several times faster to find than a product's. root1: R, where it is known.
    """
    root1 = matrix_root(cov1) if root1 is None else root1
    values = torch.linalg.eigvalsh(root1.mT @ cov2 @ root1)
    trace = cov1.trace() + cov2.trace() - 2 * values.clamp_min(0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + trace).item()


def load_inception(path: pathlib.Path, downloaded: bool = False) -> FeatureExtractorInceptionV3:
    """torch-fidelity's Inception with the weights of a file. One that cannot be used raises UserError and is, if it was
    downloaded, removed, so that the next start fetches it anew."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run a malicious pickle
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                           feature_extractor_weights_path=str(path))
    except Exception as error:  # whatever a cut or foreign file makes PyTorch raise
        if downloaded:
            path.unlink(missing_ok=True)
        what = "was damaged and is removed; start again" if downloaded else "is not torch-fidelity's Inception weights"
        raise UserError(f"{path} {what}: {reason(error)}") from None


def download_weights() -> pathlib.Path:
    """The path of the Inception weights, downloaded into PyTorch's hub folder where they are not there yet."""
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    if not os.path.isfile(path):
        download("the Inception weights", URL_INCEPTION_V3, path,
                 lambda: torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path)),
                 "fetch that file on another machine and give --inception-weights FILE (training alone can go without "
                 "scores: --eval-every 0)")
    return path


# ------------------------------------------------------------------------------------------ the figure of a score
def read_scores(run: str, key: str) -> dict[int, float]:
    """Iteration -> score of a run folder."""
    path = pathlib.Path(run, "metrics.jsonl")
    if not path.exists():
        raise UserError(f"{run} has no scores: metrics.jsonl is not there")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {line["iteration"]: float(line[key]) for line in lines}
    except KeyError as error:
        raise UserError(f"{path} has no {error}; it has {', '.join(lines[0])}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


def draw(runs: Annotated[list[str], tyro.conf.Positional], out: pathlib.Path, key: str = "fid") -> None:
    """Draw a score of runs against iterations.

    Args:
        runs: run folders, each RUN or NAME=RUN; runs of one name become one line, their mean, in a band, their range
        out: the picture: .png, .pdf or .svg
        key: a score in metrics.jsonl: fid, kid_mean, is_mean, precision, recall
    """
    if not runs:
        raise UserError("give the folders of runs to draw")
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {out}: a picture's name ends in .png, .pdf or .svg")
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, whose module is missing here, makes the import fail
    from matplotlib.figure import Figure
    groups: dict[str, list[dict[int, float]]] = {}
    for path in runs:
        label, equals, folder = path.partition("=")
        if not equals or os.path.exists(path):  # a path may hold a = too
            label, folder = pathlib.Path(path).resolve().name, path
        groups.setdefault(label, []).append(read_scores(folder, key))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel=key.upper() if key == "fid" else key)
    for label, scores in groups.items():
        steps = sorted(set.intersection(*map(set, scores)))
        if not steps:
            raise UserError(f"the runs of {label} have no scored iteration in common")
        values = np.array([[s[i] for i in steps] for s in scores])
        note = f" (mean and range of {len(scores)} runs)" if len(scores) > 1 else ""
        line, = axes.plot(steps, values.mean(0), marker=".", label=label + note)
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.legend()
    write_atomically(out, lambda path: figure.savefig(path, format=out.suffix[1:], dpi=150))


if __name__ == "__main__":
    run(lambda: tyro.cli(draw))
