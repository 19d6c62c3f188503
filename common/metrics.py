"""FID (Heusel et al. 2017), KID (Binkowski et al. 2018), Inception Score (Salimans et al. 2016), precision and recall
(Kynkaanniemi et al. 2019), of the features of torch-fidelity's Inception network.

    evaluator = Evaluator(images, num_real=10_000, weights=None, device="cuda")
    evaluator.score(sample, num_fake=5_000)          # {"fid": ..., "kid_mean": ..., ...}
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import pathlib
import sys
from typing import Callable, Iterator, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from common import UserError, cache_folder, expand, progress, reason, write_atomically
from common.datasets import download, process_zero_first
from common.training import world


class Evaluator:
    """Scores generated images against real ones.

    real: uint8 [N, C, H, W], C = 1 or 3. num_real of them (all, if there are fewer), drawn once without
    replacement, serve every evaluation. Their features are kept in `cache_folder()`.
    weights: torch-fidelity's Inception weights; None: downloaded once into PyTorch's hub folder.

    Raises UserError: fewer than four images, weights that cannot be had or read.
    """

    @process_zero_first()
    def __init__(self, real: Tensor, num_real: int, weights: Optional[str], device: torch.device | str):
        rank, _ = world()
        num_real = min(num_real, len(real))
        if num_real < 4:
            raise UserError("scores need four real images or more: the data set or --num-real has fewer")
        self.device = torch.device(device)
        path = expand(weights) if weights else download_weights()
        self.inception = load_inception(path).to(self.device)
        if self.device.type == "cpu":
            self.inception = self.inception.to(memory_format=torch.channels_last)
        if num_real < 10_000 and rank == 0:
            print(f"FID of {num_real:,} real images is biased, and comparable only with FIDs of as many: look at KID",
                  file=sys.stderr)
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(real), generator=generator)[:num_real].sort().values
        images = real[chosen]
        key = hashlib.sha256(path.read_bytes())  # of the weights and the images
        key.update(images.numpy())
        cached = cache_folder() / f"inception-{num_real}-{key.hexdigest()[:16]}.f32"
        try:
            features = torch.from_numpy(np.fromfile(cached, np.float32).reshape(num_real, 2048))
            if not features.isfinite().all():
                raise ValueError
        except (OSError, ValueError):  # not there, cut, or spoilt
            features = torch.empty(num_real, 2048)
            for start in progress(range(0, num_real, 100), "features of real images"):
                batch = images[start : start + 100].to(self.device)
                features[start : start + len(batch)] = self.features(batch)[0].cpu()
            contents = features.numpy().tobytes()  # NumPy itself would not say that a disk is full
            write_atomically(cached, lambda path: path.write_bytes(contents), "make room, or set XDG_CACHE_HOME; ")
        self.real_features = features.to(self.device)
        self.mean, self.covariance = moments(self.real_features)
        self.root = matrix_root(self.covariance)  # half of the work of every FID, done once

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pool features [n, 2048] and class logits without bias [n, 1008] of uint8 images [n, C, H, W]."""
        with torch.autocast(self.device.type, enabled=False), exact_products():
            return self.inception(images.expand(-1, 3, -1, -1))  # grey as RGB

    def score(self, sample: Callable[[int], Tensor], num_fake: int, num_is: Optional[int] = None,
              stop: Optional[Callable[[], bool]] = None, batch_size: int = 100) -> Optional[dict[str, float]]:
        """Scores of num_fake generated images; the Inception Score, in ten splits, of num_is of them.

        The numbers that they are made with are beside them, as integers. KID's deviation is over 100 subsets of
        kid_subset_size images: 1,000, or half of the images where these are few, as subsets must differ.
        num_is: default num_fake. The larger number is drawn; the scores of fewer take the first of them.
        Under torchrun each process draws equally many. sample: maps n to n new images, uint8 [n, C, H, W].
        stop: asked before each batch; once it says True, None is returned.
        """
        rank, processes = world()
        num_is = num_is or num_fake
        own_fake = math.ceil(num_fake / processes)  # this process's
        own_is = math.ceil(num_is / processes)
        drawn = max(own_fake, own_is)
        features, logits = [], []
        for start in progress(range(0, drawn, batch_size), "scoring", leave=False, disable=rank > 0):
            if stop is not None and stop():
                return None
            images = sample(min(batch_size, drawn - start)).to(self.device)
            batch_features, batch_logits = self.features(images)
            features.append(batch_features[: max(0, own_fake - start)])
            logits.append(batch_logits[: max(0, own_is - start)])
        fake_features = gather(torch.cat(features))[:num_fake]
        fake_logits = gather(torch.cat(logits))[:num_is].cpu()

        smaller = min(len(fake_features), len(self.real_features))
        mean, covariance = moments(fake_features)
        fid = frechet_distance(self.mean, self.covariance, mean2=mean, cov2=covariance, root1=self.root)
        subset_size = min(1000, smaller // 2)
        kid = kid_features_to_metric(
            fake_features, self.real_features, kid_subset_size=subset_size, verbose=False)
        inception_score = isc_features_to_metric(fake_logits, splits=min(10, num_is))
        with exact_products():  # in blocks, or 50,000 images would need 10 GB
            precision_recall = prc_features_to_metric(
                fake_features, self.real_features, prc_neighborhood=min(3, smaller - 1), prc_batch_size=1000,
                save_cpu_ram=True, verbose=False)
        return {"fid": fid,
                "kid_mean": kid["kernel_inception_distance_mean"],
                "kid_std": kid["kernel_inception_distance_std"],
                "is_mean": inception_score["inception_score_mean"],
                "is_std": inception_score["inception_score_std"],
                "precision": precision_recall["precision"],
                "recall": precision_recall["recall"],
                "num_real": len(self.real_features), "num_fake": num_fake, "num_is": num_is,
                "kid_subset_size": subset_size}


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, which all have as many, in the order of ranks."""
    _, processes = world()
    if processes == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(processes)]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """A region without TF32, so that scores of runs with and without it compare."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = False
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] (n - 1) of features [n, d], in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.mT)


def by_eigenvalues(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function of a matrix's eigenvalues try the CPU too, and raise UserError where they are not found.

    A GPU's routine may fail on a matrix with many equal eigenvalues, as the covariance of few images has.
    """
    @functools.wraps(function)
    def wrapped(matrix: Tensor) -> Tensor:
        for device in (matrix.device, torch.device("cpu")):
            try:
                return function(matrix.to(device)).to(matrix.device)
            except torch.linalg.LinAlgError as caught:
                error = reason(caught)
        raise UserError(f"no FID: {error} (training alone can go without scores: --eval-every 0)")

    return wrapped


@by_eigenvalues
def matrix_root(covariance: Tensor) -> Tensor:
    """R with R R' = covariance, [d, d]."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


@by_eigenvalues
def trace_of_root(matrix: Tensor) -> Tensor:
    """tr M^1/2 of M [d, d], symmetric but for rounding; eigenvalues below 0 are rounding too."""
    return torch.linalg.eigvalsh(matrix).clamp_min(0).sqrt().sum()


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor,
                     root1: Optional[Tensor] = None) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (Heusel et al. 2017, Eq. 6) of means [d] and covariances [d, d].

    With S1 = R R', S1 S2 has the eigenvalues of R' S2 R, which is symmetric. They are real, negative by
    rounding alone, and found several times faster than a product's. root1: R, if it is known.
    """
    root1 = matrix_root(cov1) if root1 is None else root1
    trace = cov1.trace() + cov2.trace() - 2 * trace_of_root(root1.mT @ cov2 @ root1)
    return ((mean1 - mean2).square().sum() + trace).item()


def load_inception(path: pathlib.Path) -> FeatureExtractorInceptionV3:
    """torch-fidelity's Inception with the weights of a file. Raises UserError: a file that cannot be used."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run a malicious pickle
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                           feature_extractor_weights_path=str(path))
    except Exception as error:  # whatever a cut or foreign file makes PyTorch raise
        raise UserError(f"{path} is not torch-fidelity's Inception weights: {reason(error)}; if it was downloaded, "
                        "remove it, and the next start downloads it anew") from None


def download_weights() -> pathlib.Path:
    """The path of the Inception weights in PyTorch's hub folder, downloaded if they are not there yet."""
    def fetch(path: pathlib.Path) -> None:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path))
        torch.load(path, map_location="cpu", weights_only=True)  # fails if it was cut off

    file = expand(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    download("the Inception weights", url=URL_INCEPTION_V3, file=file, fetch=fetch,
             advice="fetch that file on another machine and give --inception-weights FILE "
                    "(training alone can go without scores: --eval-every 0)")
    return file
