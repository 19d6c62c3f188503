"""Frechet Inception Distance (Heusel et al. 2017) and Inception Score (Salimans et al. 2016).

    evaluator = Evaluator(images, num_real=10_000, weights=None, device="cuda")
    evaluator.score(sample, num_fake=5_000)          # {"fid": ..., "is_mean": ..., "is_std": ...}

The Inception network is torch-fidelity's: the TensorFlow graph that both scores are defined by, with its resizing.
"""
from __future__ import annotations

import contextlib
import hashlib
import pathlib
import socket
from typing import Callable, Iterator, Optional

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from tqdm import tqdm

from common import UserError, cache_folder, reason, write_atomically


class Evaluator:
    """Scores generated images against real ones.

    real: uint8 [N, C, H, W], C = 1 or 3; the same num_real of them, drawn without replacement, serve every evaluation.
    weights: torch-fidelity's Inception weights; None: downloaded once into PyTorch's hub folder. The real images'
    features are kept in `cache_folder()` under a key of the images, their number and the weights.

    Raises UserError: too few real images, weights that cannot be had or read.
    """

    def __init__(self, real: Tensor, num_real: int, weights: Optional[str], device: torch.device | str):
        if num_real > len(real):
            raise UserError(f"--num-real {num_real}: the data set has {len(real)} images; lower it, or --eval-every 0")
        self.device = torch.device(device)
        path = pathlib.Path(weights) if weights else download_weights()
        self.inception = load_inception(path, downloaded=weights is None).to(self.device)
        if self.device.type == "cpu":
            self.inception = self.inception.to(memory_format=torch.channels_last)
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:num_real].sort().values
        images = real[order]
        key = hashlib.sha256(file_digest(path))
        key.update(images.numpy())
        cached = cache_folder() / f"inception-{num_real}-{key.hexdigest()[:16]}.npy"
        features = read_features(cached, num_real)
        if features is None:
            features = torch.empty(num_real, 2048)
            for start in tqdm(range(0, num_real, 100), "features of real images", dynamic_ncols=True):
                batch = images[start : start + 100].to(self.device)
                features[start : start + len(batch)] = self.features(batch)[0].cpu()
            write_atomically(cached, lambda p: save_array(p, features.numpy()), "make room, or set XDG_CACHE_HOME; ")
        self.mean, self.covariance = moments(features.to(self.device))
        self.root = matrix_root(self.covariance)  # half of every distance's work, done once

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pool features [n, 2048] and class logits without bias [n, 1008] of uint8 images [n, C, H, W]."""
        with torch.autocast(self.device.type, enabled=False), exact_products():
            return self.inception(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)

    def score(self, sample: Callable[[int], Tensor], num_fake: int, num_is: Optional[int] = None,
              batch_size: int = 100) -> dict[str, float]:
        """FID of num_fake generated images, and the Inception Score's mean and standard deviation over ten splits of
        num_is of them; the larger number is drawn, and the other score takes the first of them.

        sample: maps a number n to n new images, uint8 [n, C, H, W]. num_is: default num_fake.
        """
        num_is = num_is or num_fake
        features, logits, total = [], [], max(num_fake, num_is)
        for start in tqdm(range(0, total, batch_size), "scoring", leave=False, dynamic_ncols=True):
            batch = self.features(sample(min(batch_size, total - start)).to(self.device))
            features.append(batch[0][: max(0, num_fake - start)])
            logits.append(batch[1][: max(0, num_is - start)])
        fid = frechet_distance(self.mean, self.covariance, *moments(torch.cat(features)), self.root)
        inception = isc_features_to_metric(torch.cat(logits).cpu(), splits=10)
        return {"fid": fid, "is_mean": inception["inception_score_mean"], "is_std": inception["inception_score_std"]}


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Without TF32, whatever training uses, so that scores of different runs compare."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [s.allow_tf32 for s in switches]
    try:
        for s in switches:
            s.allow_tf32 = False
        yield
    finally:
        for s, value in zip(switches, before):
            s.allow_tf32 = value


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
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # a connection that stands still that long is broken
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path))  # through a temporary file
        except Exception as error:  # urllib, http and ssl each have their own
            raise UserError(f"cannot download the Inception weights for FID from {URL_INCEPTION_V3}: {reason(error)}; "
                            "fetch that file on another machine and give --inception-weights FILE, or train without "
                            "scores: --eval-every 0") from None
        finally:
            socket.setdefaulttimeout(patience)
    return path


def file_digest(path: pathlib.Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_features(path: pathlib.Path, count: int) -> Optional[Tensor]:
    """Features kept earlier, [count, 2048], or None."""
    try:
        array = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return torch.from_numpy(array) if array.shape == (count, 2048) else None


def save_array(path: pathlib.Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
