"""GN-GAN with SN-GAN's CNN on images, after "Improving GAN with Neighbors Embedding and Gradient Matching"
(Tran, Bui and Cheung, AAAI 2019): table 3's CNN rows, the curves of figures 5 and 7, Dist-GAN.

    python gngan_cnn.py                                     # CIFAR-10, log loss: figure 5's best curve
    python gngan_cnn.py --dataset stl10 --hinge             # table 3, STL-10 at 48x48: the paper's FID of 30.80
    python gngan_cnn.py --dataset folder --data-dir photos --width 0.25 --iterations 20000 --eval-every 0  # photos

An encoder E, a generator G and a discriminator D. Each iteration draws one mini-batch x and one z for three updates:

    E, G   reconstruct x from E(x), and keep neighbours: latents that lie close give images that lie close (Eq. 1)
    D      tells x (and, as a little share of the reals, G(E(x))) from G(z), under a gradient penalty (Eq. 7 or 8)
    G      matches D's mean score of x and G(z), and how steep D is around both (Eq. 13)

What to expect: docs/gngan.md.
"""
from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported ends without a traceback

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Annotated, Callable, Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm

import common
from common import UserError, datasets

SCRIPT = pathlib.Path(__file__).stem
SHOWN = (("AE", "autoencoder"), ("D", "discriminator"), ("G", "generator"))  # the progress bar's losses
Discriminate = Callable[[Tensor], Tensor]  # images [B, C, H, W] -> logits [B]


# ----------------------------------------------------------------------------------------------------- arguments
@dataclass
class RunArgs:
    seed: int = 1
    """Seed of the initial weights, the order of the data and every draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """tf32: on a GPU, matrix products in TF32. bf16: the networks under autocast, also on a CPU; losses in fp32."""
    compile: bool = False
    """torch.compile the losses (a minute or more at the start)."""
    cuda_graph: bool = True
    """On a GPU: capture one iteration as a CUDA graph and replay it. Without effect on a CPU and under torchrun."""
    deterministic: bool = False
    """On a GPU: deterministic algorithms only, so that a resumed run repeats bit for bit (a CPU always does)."""
    run_dir: str = "runs"
    """The folder for run folders."""
    run_name: Optional[str] = None
    """The run folder's name. Default: {dataset}__{script}__{seed}__{time}."""
    resume: Optional[str] = None
    """A run folder or its checkpoint.pt: go on there, with the arguments saved in it. auto: go on in --run-name's
    folder if it has a checkpoint, else start it."""
    evaluate: Optional[str] = None
    """A run folder, checkpoint.pt or generator.pt: print its scores as one line of JSON; train nothing."""
    generate: Optional[str] = None
    """A run folder, checkpoint.pt or generator.pt: write --num-images generated images to --out; train nothing."""
    num_images: int = 64
    """With --generate: how many."""
    out: str = "generated"
    """With --generate: a folder for PNGs, x.png for one grid, or x.npy for one uint8 array [N, H, W, C]."""


@dataclass
class DataArgs:
    dataset: Literal["cifar10", "stl10", "folder"] = "cifar10"
    """folder: a directory (recursive) or .zip of images, centre-cropped to squares and resized to --image-size."""
    data_dir: str = "data"
    """Where data sets are kept and downloaded to; with folder, the directory or .zip itself."""
    image_size: Optional[int] = None
    """Height and width, a multiple of 8; the networks are those for STL-10 unless it is 32. Default: 32; stl10: 48
    as in the paper."""


@dataclass
class ModelArgs:
    width: float = 1.0
    """Factor of the networks' channels: 0.25 makes a run on a CPU possible."""
    latent_dim: int = 128
    """Dimensions of z ~ U(-1, 1) [paper; the distribution: authors' code]."""
    ema: float = 0.0
    """Decay of a moving average of G's weights, used for samples and scores; 0: off [paper]."""


@dataclass
class LossArgs:
    hinge: bool = False
    """Eq. 8 instead of Eq. 7 for D."""
    neighbor_embedding: bool = True
    """V_R (Eq. 2-6) in the autoencoder's loss; without an autoencoder in G's, on z and G(z) alone (figure 7)."""
    gradient_matching: bool = True
    """G's loss is Eq. 13; without: its first term alone, or, without an autoencoder too, GAN's non-saturating loss
    (with --hinge -E D(G(z)) [ours])."""
    autoencoder: bool = True
    """The autoencoder's update and V_C of Eq. 7; without: figure 7's standard GAN."""
    distgan: bool = False
    """The baseline Dist-GAN (Tran, Bui and Cheung 2018): its autoencoder compares D's features; no neighbour embedding,
    no gradient matching."""
    lambda_p: Optional[float] = None
    """Weight of the gradient penalty V_P. Default: 1 [paper]; 0 without an autoencoder [ours]."""
    lambda_r: float = 1.0
    """Weight of V_R [paper]; of Dist-GAN's latent-data distance."""
    lambda_m1: float = 1.0
    """Weight of the gradient norms' term of Eq. 13 [paper]."""
    lambda_m2: float = 1.0
    """Weight of the inner products' term of Eq. 13 [paper]."""
    alpha: float = 0.05
    """Share of the reconstructions among the reals of Eq. 7 [paper]."""
    penalty: Literal["auto", "score", "l2", "rms", "reversed"] = "auto"
    """Whose gradient V_P holds at norm 1. score: the sigmoid score's, D as in the paper. l2: the logit's. rms: the
    logit's by root mean square over pixels, as in the authors' code. reversed: rms with a minus before V_P, as in their
    hinge loss, so that slopes are drawn to 0. auto: rms; with --hinge reversed."""
    autoencoder_updates: Literal["both", "separate", "encoder"] = "both"
    """The autoencoder's update trains E and G (the paper; with one Adam for both updates of G), E and G with moments of
    G's own for it (separate), or E alone (the authors' code for CIFAR-10 and STL-10)."""


@dataclass
class OptimisationArgs:
    iterations: Optional[int] = None
    """Updates of G. Default: 350,000; 200,000 with --hinge [paper]."""
    batch_size: int = 64
    """Images a mini-batch, over all processes of torchrun [paper]."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 2e-4
    """Adam's learning rate [paper]."""
    beta1: float = 0.5
    """Adam's first decay [paper]."""
    beta2: float = 0.9
    """Adam's second decay [paper]."""


@dataclass
class LoggingArgs:
    log_every: int = 100
    """Iterations between lines in TensorBoard; 0: none."""
    gradient_every: int = 1000
    """Iterations between measurements of each term's gradient to G (TensorBoard: gradients/*); 0: none."""
    sample_every: int = 5000
    """Iterations between grids of samples; 0: none."""
    eval_every: int = 10000
    """Iterations between evaluations (and one at the end); 0: none, and no Inception weights needed."""
    checkpoint_every: int = 1000
    """Iterations between checkpoints; 0: only at the start, at the end, before an evaluation and on a signal."""
    num_real: Optional[int] = None
    """Real images for FID. Default: 10,000 [authors' code], or all if there are fewer."""
    num_fake: int = 5000
    """Generated images for FID and the Inception Score [authors' code]."""
    inception_weights: Optional[str] = None
    """A file of torch-fidelity's Inception weights. Default: downloaded once."""


@dataclass
class Args(RunArgs, DataArgs, ModelArgs, LossArgs, OptimisationArgs, LoggingArgs):
    """Every flag, in the groups of --help."""


def resolve(args: Args) -> Args:
    """The arguments with every default filled in that depends on another, and Dist-GAN's switches."""
    defaults = {"iterations": 200_000 if args.hinge else 350_000, "image_size": 48 if args.dataset == "stl10" else 32,
                "lambda_p": 1.0 if args.autoencoder else 0.0, "penalty": "reversed" if args.hinge else "rms"}
    chosen = {k: v for k, v in defaults.items() if getattr(args, k) in (None, "auto")}
    if args.distgan:
        chosen |= {"neighbor_embedding": False, "gradient_matching": False}
    return dataclasses.replace(args, **chosen)


# ------------------------------------------------------------------------------------------------------ networks
def autocast(forward: Callable) -> Callable:
    """A network's method, run in bf16 where its `bf16` is set. Each call is a region of its own, since a region keeps
    bf16 copies of the weights, which an update would leave behind."""
    @functools.wraps(forward)
    def wrapped(network: nn.Module, x: Tensor, *rest) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=network.bf16):
            return forward(network, x, *rest)

    return wrapped


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """Leaky ReLU whose second derivative autograd knows to be zero: F.leaky_relu's would send a gradient of zeros
    through all of D once more whenever a loss holds D's input gradient. (On a CPU sign and clamp take a tenth of the
    time of a comparison and torch.where.)"""
    return x * x.detach().sign().clamp_(min=slope)  # x times 1 or slope


class BatchNorm(nn.Module):
    """Batch norm on [B, C, H, W] that normalises a training batch by its own statistics, but moves the running ones
    only if told to: by G(z), never by G(E(x)), so that they describe what is sampled. The running statistics begin at 0
    and `running_weight` is the weight of all batches in them: evaluation divides by it, as Adam does."""

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.zeros(channels))
        self.register_buffer("running_weight", torch.zeros(()))

    def forward(self, x: Tensor, update: bool) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            if update:
                self.running_weight.mul_(1 - self.momentum).add_(self.momentum)
            return F.batch_norm(x, mean if update else None, var if update else None, self.weight, self.bias, True,
                                self.momentum, self.eps)
        mean, var = (torch.where(self.running_weight > 0, v / self.running_weight, start)
                     for v, start in ((mean, 0.0), (var, 1.0)))  # start: before the first update
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


class Generator(nn.Module):
    """z [B, latent_dim] -> images [B, 3, size, size] in [0, 1]; the notation is for size 32, width 1."""

    def __init__(self, args: Args):
        super().__init__()
        self.side, self.bf16 = args.image_size // 8, args.precision == "bf16"
        widths = [max(1, round(c * args.width)) for c in (1024, 512, 256, 128)]
        self.linear = nn.Linear(args.latent_dim, widths[0] * self.side**2)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(BatchNorm(c) for c in widths[1:])
        self.last = nn.Conv2d(widths[-1], 3, 3, 1, 1)
        init_weights(self)

    @autocast
    def forward(self, z: Tensor, update_statistics: bool = False) -> Tensor:
        x = F.relu(self.linear(z)).unflatten(1, (-1, self.side, self.side))  # [B, 1024, 4, 4]
        x = x.contiguous(memory_format=torch.channels_last)
        for up, norm in zip(self.ups, self.norms):  # [B, 512, 8, 8], [B, 256, 16, 16], [B, 128, 32, 32]
            x = F.relu(norm(up(x), update_statistics))
        return torch.sigmoid(self.last(x).float())  # in fp32: bf16 has 128 steps in [0.5, 1], too few for a sigmoid


class Discriminator(nn.Module):
    """images [B, 3, size, size] -> logits [B]; the score D(x) is their sigmoid. No normalisation."""

    def __init__(self, args: Args):
        super().__init__()
        self.bf16 = args.precision == "bf16"
        widths = [3] + [max(1, round(c * args.width)) for c in (64, 64, 128, 128, 256, 256, 512)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) if i % 2 else nn.Conv2d(a, b, 3, 1, 1)
                                   for i, (a, b) in enumerate(zip(widths, widths[1:])))
        self.linear = nn.Linear(widths[-1] * (args.image_size // 8) ** 2, 1)
        init_weights(self)

    @autocast
    def features(self, x: Tensor) -> Tensor:
        """The last convolution's map, [B, 512, 4, 4]."""
        for conv in self.convs:  # 64 at 32x32, 64 at 16x16, 128, 128 at 8x8, 256, 256 at 4x4, 512
            x = leaky_relu(conv(x), 0.1)
        return x.float()

    @autocast
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).flatten(1))[:, 0].float()


class Encoder(nn.Module):
    """images [B, 3, size, size] -> latents [B, latent_dim]: the authors' encoder for CIFAR-10 at size 32, and theirs
    for STL-10 at others. Its batch norm has no running statistics, since E is of use in training only."""

    def __init__(self, args: Args):
        super().__init__()
        self.bf16 = args.precision == "bf16"

        def block(a: int, b: int, kernel: int, slope: float) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, kernel, 2, (kernel - 1) // 2, bias=False),
                                 nn.BatchNorm2d(b, track_running_stats=False), nn.LeakyReLU(slope))

        if args.image_size == 32:
            widths = [max(1, round(c * args.width)) for c in (128, 256, 512)]  # at 16x16, 8x8, 4x4
            first = [nn.Conv2d(3, widths[0], 5, 2, 2), nn.LeakyReLU(0.2)]
            blocks = [block(a, b, 5, 0.2) for a, b in zip(widths, widths[1:])]
        else:
            widths = [max(1, round(c * args.width)) for c in (128, 256, 512, 1024)]  # at 48x48, 24x24, 12x12, 6x6
            first = [nn.Conv2d(3, widths[0], 3, 1, 1), nn.ReLU()]
            blocks = [block(a, b, 4, 0.1) for a, b in zip(widths, widths[1:])]
        self.convs = nn.Sequential(*first, *blocks)
        self.linear = nn.Linear(widths[-1] * (args.image_size // 8) ** 2, args.latent_dim)
        init_weights(self)

    @autocast
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1)).float()


def init_weights(network: nn.Module) -> None:
    """Xavier's uniform initialisation, zero biases [authors' code]."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# -------------------------------------------------------------------------------------------------------- losses
def l2_norm(v: Tensor) -> Tensor:
    """L2 norm of each sample of v [B, ...] in fp32, [B]; the small constant keeps its gradient finite at 0."""
    return (v.float().flatten(1).square().sum(1) + 1e-12).sqrt()


def logit_and_gradient(discriminator: Discriminate, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B] of images [B, C, H, W] and each one's gradient with respect to its image [B, C, H, W].

    Samples must not depend on each other in D (no batch norm), so the gradient of the sum holds each one's own.
    """
    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        logit = discriminator(x)
        return logit.sum(), logit

    gradient, (_, logit) = torch.func.grad_and_value(total, has_aux=True)(x)
    return logit, gradient


def pairwise_affinities(points: Tensor) -> Tensor:
    """p_ij of Eq. 3 and 4 for points [n, d], [n, n]: symmetric, zero on the diagonal, summing to 1.

    sigma^2 is the variance of the pairwise distances, a constant without gradient [ours: the paper calls sigma the
    variance and squares it].
    """
    points = points.double()  # |a|^2 + |b|^2 - 2 ab takes the difference of large numbers
    squares = points.square().sum(1)
    others = ~torch.eye(len(points), dtype=torch.bool, device=points.device)
    distances = (squares[:, None] + squares - 2 * points @ points.mT).clamp_min(0) * others  # squared
    with torch.no_grad():
        count, lengths = len(points) * (len(points) - 1), distances.sqrt()
        mean = lengths.sum() / count
        variance = ((lengths - mean).square() * others).sum() / count
    similarity = others / (1 + distances / (2 * variance + 1e-12))
    conditional = similarity / similarity.sum(0)  # column i: p_{j|i}
    return ((conditional + conditional.mT) / (2 * len(points))).float()


def neighbor_embedding(latents: Tensor, images: Tensor) -> Tensor:
    """V_R = sum_ij p_ij log(p_ij / q_ij) (Eq. 2-6), scalar in fp32.

    latents [n, d], images [n, C, H, W] generated from them: p over the latents, q over the images. Its gradient
    reaches both. Identical points give finite gradients.
    """
    with torch.autocast(latents.device.type, enabled=False):
        p, q = (pairwise_affinities(x.flatten(1)) for x in (latents, images))
        others = ~torch.eye(len(p), dtype=torch.bool, device=p.device)
        p, q = torch.where(others, p, 1.0), torch.where(others, q, 1.0)  # log 1 = 0 where i = j
        return (p * (p.log() - q.log())).sum()


def reconstruction_error(real: Tensor, reconstruction: Tensor) -> Tensor:
    """||x - G(E(x))||^2 (Eq. 1) as its mean over batch and pixels [authors' code], scalar."""
    return (real - reconstruction).square().mean()


def discriminator_loss(real: Tensor, fake: Tensor, reconstruction: Optional[Tensor] = None, alpha: float = 0.0,
                       hinge: bool = False) -> Tensor:
    """-V_D of Eq. 7 (hinge: Eq. 8) without its penalty, for logits [B] of real, generated and, with an autoencoder,
    reconstructed images; reconstructions count as real. Scalar."""
    if hinge:  # D here is the sigmoid score: it stays inside (-1, 1), so min(0, -1 + D) is never cut, nor -1 - D
        terms = [1 - torch.sigmoid(v).mean() for v in (real, reconstruction) if v is not None]
        fake_term = 1 + torch.sigmoid(fake).mean()
    else:
        terms = [F.softplus(-v).mean() for v in (real, reconstruction) if v is not None]  # -E log D
        fake_term = F.softplus(fake).mean()  # -E log (1 - D)
    return fake_term + (terms[0] if reconstruction is None else (1 - alpha) * terms[0] + alpha * terms[1])


def gradient_penalty(discriminator: Discriminate, real: Tensor, fake: Tensor, mix: Tensor,
                     penalty: str = "rms") -> Tensor:
    """V_P = E(||grad D(x^)|| - 1)^2 at x^ = mix real + (1 - mix) fake (below Eq. 8); scalar.

    real, fake [B, C, H, W]; mix [B, 1, 1, 1] from U(0, 1). penalty: score, the norm of the sigmoid score's gradient;
    l2, of the logit's; rms and reversed, of the logit's over sqrt(C H W).
    """
    point = mix * real + (1 - mix) * fake
    logit, gradient = logit_and_gradient(discriminator, point)
    slope = l2_norm(gradient)
    if penalty == "score":
        slope = slope * torch.sigmoid(logit) * torch.sigmoid(-logit)
    elif penalty != "l2":
        slope = slope / math.sqrt(point[0].numel())
    return (slope - 1).square().mean()


def gradient_matching(discriminator: Discriminate, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of V_G (Eq. 13) before their weights, with the norms inside the expectations: |E D(x) - E D(G)|,
    (E ||grad D(x)|| - E ||grad D(G)||)^2 and (E |grad D(x)'x| - E |grad D(G)'G|)^2; scalars.

    D here is the sigmoid score, whose gradient is D (1 - D) times the logit's. The logit of a piecewise linear D has
    a gradient that does not change with x, so G learns by D (1 - D) and by the x in the product.
    """
    def terms(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logit, gradient = logit_and_gradient(discriminator, x)
        # The same value, but its derivative by x is the gradient at hand: no second backward pass through D.
        logit = logit.detach() + ((x - x.detach()) * gradient.detach()).flatten(1).sum(1)
        score = torch.sigmoid(logit)
        slope = score * (1 - score)
        inner = (gradient.float() * x.float()).flatten(1).sum(1)
        return score.mean(), (slope * l2_norm(gradient)).mean(), (slope * inner.abs()).mean()

    with torch.no_grad():  # the real side has no way to G
        score_real, norm_real, inner_real = terms(real)
    score_fake, norm_fake, inner_fake = terms(fake)
    return (score_real - score_fake).abs(), (norm_real - norm_fake).square(), (inner_real - inner_fake).square()


def latent_data_distance(fake: Tensor, reconstruction: Tensor, z: Tensor, latent: Tensor) -> Tensor:
    """Dist-GAN: (E[f(G(E(x))) - f(G(z))] - w E[E(x) - z])^2 with w = sqrt(d_z / d_f), the means over batch and
    coordinates; fake and reconstruction are D's features [B, ...] of those images. Scalar."""
    weight = math.sqrt(z[0].numel() / fake[0].numel())
    return ((reconstruction - fake).mean() - weight * (latent - z).mean()).square()


# ----------------------------------------------------------------------------------------------------- objectives
# Each returns its loss, which is descended, and then the terms that it is made of, as scalars by name.
def autoencoder_objective(args: Args, networks: nn.ModuleDict, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """V_AE of Eq. 1 (Dist-GAN: its own) for real images x [B, 3, H, W] in [0, 1] and z [B, latent_dim]."""
    E, G, D = (networks[name] for name in ("encoder", "generator", "discriminator"))
    latent = E(x)
    reconstruction = G(latent)
    if args.distgan:
        real_map, fake_map, rebuilt_map = (D.features(v) for v in (x, G(z), reconstruction))
        terms = {"reconstruction": reconstruction_error(real_map, rebuilt_map),
                 "latent_data_distance": latent_data_distance(fake_map, rebuilt_map, z, latent)}
        return {"autoencoder": terms["reconstruction"] + args.lambda_r * terms["latent_data_distance"], **terms}
    terms = {"reconstruction": reconstruction_error(x, reconstruction)}
    loss = terms["reconstruction"]
    if args.neighbor_embedding:
        terms["neighbor_embedding"] = neighbor_embedding(torch.cat([latent, z]), torch.cat([reconstruction, G(z)]))
        loss = loss + args.lambda_r * terms["neighbor_embedding"]
    return {"autoencoder": loss, **terms}


def discriminator_objective(args: Args, networks: nn.ModuleDict, x: Tensor, fake: Tensor,
                            reconstruction: Optional[Tensor], mix: Tensor) -> dict[str, Tensor]:
    """-V_D of Eq. 7 or 8 for images [B, 3, H, W] in [0, 1] and mix [B, 1, 1, 1]."""
    D = networks["discriminator"]
    images = [x, fake] if reconstruction is None else [x, fake, reconstruction]
    logits = D(torch.cat(images)).split(len(x))
    loss = discriminator_loss(*logits, alpha=args.alpha, hinge=args.hinge)
    terms = {"score_real": torch.sigmoid(logits[0]).mean(), "score_fake": torch.sigmoid(logits[1]).mean()}
    if args.lambda_p:
        terms["gradient_penalty"] = gradient_penalty(D, x, fake, mix, args.penalty)
        # reversed: slopes below 1 (at 32x32 an L2 norm of 55), as D's are, are drawn to 0
        loss = loss + (-args.lambda_p if args.penalty == "reversed" else args.lambda_p) * terms["gradient_penalty"]
    return {"discriminator": loss, **terms}


def generator_objective(args: Args, networks: nn.ModuleDict, x: Tensor, z: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """V_G of Eq. 13 and its ablations for real images x, fake = G(z) [B, 3, H, W] and z [B, latent_dim]."""
    D, terms = networks["discriminator"], {}
    if args.gradient_matching:
        score_term, norm_term, inner_term = gradient_matching(D, x, fake)
        loss = score_term + args.lambda_m1 * norm_term + args.lambda_m2 * inner_term
        terms = {"score_matching": score_term, "norm_matching": norm_term, "inner_matching": inner_term}
    elif args.autoencoder:
        with torch.no_grad():
            score_real = torch.sigmoid(D(x)).mean()
        loss = terms["score_matching"] = (score_real - torch.sigmoid(D(fake)).mean()).abs()
    else:
        logit = D(fake)
        loss = terms["adversarial"] = -torch.sigmoid(logit).mean() if args.hinge else F.softplus(-logit).mean()
    if args.neighbor_embedding and not args.autoencoder:
        terms["neighbor_embedding"] = neighbor_embedding(z, fake)
        loss = loss + args.lambda_r * terms["neighbor_embedding"]
    return {"generator": loss, **terms}


def gradient_norms(args: Args, networks: nn.ModuleDict, images: Tensor, z: Tensor) -> dict[str, float]:
    """Norm of the gradient to G's weights of each term of its losses, as weighted there, for images uint8
    [B, 3, H, W] and z [B, latent_dim]; changes nothing."""
    G, x = networks["generator"], to_float(images)
    networks["discriminator"].requires_grad_(False)
    objectives = [generator_objective(args, networks, x, z, G(z))]
    if args.autoencoder:
        objectives.append(autoencoder_objective(args, networks, x, z))
    weights = {"neighbor_embedding": args.lambda_r, "latent_data_distance": args.lambda_r,
               "norm_matching": args.lambda_m1, "inner_matching": args.lambda_m2}
    norms = {}
    for objective in objectives:
        for name, term in list(objective.items())[1:]:
            gradients = torch.autograd.grad(weights.get(name, 1.0) * term, list(G.parameters()), retain_graph=True)
            norms[name] = torch.cat([g.flatten() for g in gradients]).norm().item()
    return norms


# ---------------------------------------------------------------------------------------------------- train step
def init_networks(args: Args, device: torch.device) -> nn.ModuleDict:
    """E, G and D, drawn on the CPU from args.seed, so that every device starts from the same weights."""
    torch.manual_seed(args.seed)
    networks = nn.ModuleDict({"generator": Generator(args), "discriminator": Discriminator(args)})
    if args.autoencoder:
        networks["encoder"] = Encoder(args)
    if args.ema:
        networks["generator_ema"] = copy.deepcopy(networks["generator"]).requires_grad_(False).eval()
    return networks.to(device, memory_format=torch.channels_last)  # the faster layout for most convolutions


def init_optimizers(args: Args, networks: nn.ModuleDict) -> dict[str, torch.optim.Adam]:
    """One Adam a network. Adam normalises gradients: with moments of G's own for it (the optimiser `reconstruction`, of
    --autoencoder-updates separate) the autoencoder's update moves G as far as G's own, however small its gradient."""
    trained = {"discriminator": "discriminator", "generator": "generator"}
    if args.autoencoder:
        trained["encoder"] = "encoder"
        if args.autoencoder_updates == "separate":
            trained["reconstruction"] = "generator"
    capturable = next(networks.parameters()).device.type == "cuda" and args.cuda_graph
    return {name: torch.optim.Adam(networks[network].parameters(), lr=args.lr, betas=(args.beta1, args.beta2),
                                   fused=True, capturable=capturable) for name, network in trained.items()}


def draw_latents(n: int, args: Args, rng: torch.Generator) -> Tensor:
    """z ~ U(-1, 1), [n, latent_dim]."""
    return torch.rand(n, args.latent_dim, generator=rng, device=rng.device) * 2 - 1


def to_float(images: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] as networks take and make them: fp32 in [0, 1]."""
    return images.to(torch.float32, memory_format=torch.channels_last) / 255


def to_bytes(x: Tensor) -> Tensor:
    """Networks' images [B, C, H, W] as uint8."""
    return (x * 255 + 0.5).clamp(0, 255).to(torch.uint8).contiguous()


def own_slice(n: int) -> slice:
    """This process's part of a mini-batch of n, which torchrun's processes split; alone: all of it."""
    rank, world = common.world()
    return slice(rank * n // world, (rank + 1) * n // world)


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over torchrun's processes, in one message; alone: nothing."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / dist.get_world_size()).split([t.numel() for t in tensors])):
            t.copy_(mean.view(t.shape))


def make_train_step(args: Args, networks: nn.ModuleDict, optimizers: dict[str, torch.optim.Adam],
                    rng: torch.Generator) -> Callable[[Tensor], dict[str, Tensor]]:
    """`train_step(images)`: one iteration of Algorithm 1, in place; returns its losses and terms, scalars.

    images: uint8 [B, 3, H, W], this process's share of the mini-batch. z and mix are drawn from `rng`, which is seeded
    anew before each iteration. Nothing in it waits for the device.
    """
    G, D = networks["generator"], networks["discriminator"]
    autoencoder, discriminator, generator = (functools.partial(objective, args, networks) for objective in (
        autoencoder_objective, discriminator_objective, generator_objective))
    generate, reconstruct = G, lambda x: G(networks["encoder"](x))
    if args.compile:  # the losses, not the loop: optimisers and draws stay outside
        autoencoder, discriminator, generator, generate, reconstruct = (
            torch.compile(f, fullgraph=True, dynamic=False)
            for f in (autoencoder, discriminator, generator, generate, reconstruct))

    def descend(terms: dict[str, Tensor], *names: str) -> None:
        """A step of each named optimiser down the first of the terms."""
        parameters = [p for name in names for group in optimizers[name].param_groups for p in group["params"]]
        for p in parameters:
            p.grad = None
        next(iter(terms.values())).backward(inputs=parameters)
        average([p.grad for p in parameters])
        for name in names:
            optimizers[name].step()

    trained_by_autoencoder = {"both": ("encoder", "generator"), "separate": ("encoder", "reconstruction"),
                              "encoder": ("encoder",)}[args.autoencoder_updates]

    # Operations of one iteration at batch 64, counted by torch's FlopCounterMode (2 a multiply-add): 841 GFLOP on
    # CIFAR-10, of them 157 for the G(z) that neighbour embedding needs and 42 for gradient matching; 323 without an
    # autoencoder; 2,238 on STL-10. Each forward pass serves every term that needs it until its network is updated.
    def train_step(images: Tensor) -> dict[str, Tensor]:
        x, part = to_float(images), own_slice(args.batch_size)
        z = draw_latents(args.batch_size, args, rng)[part]
        mix = torch.rand(args.batch_size, 1, 1, 1, generator=rng, device=rng.device)[part]
        losses, reconstruction = {}, None
        D.requires_grad_(False)
        if args.autoencoder:
            losses |= (terms := autoencoder(x, z))
            descend(terms, *trained_by_autoencoder)
            with torch.no_grad():
                reconstruction = reconstruct(x)
        fake = generate(z, True)  # one forward pass for D's update and, its graph kept, for G's
        D.requires_grad_(True)
        losses |= (terms := discriminator(x, fake.detach(), reconstruction, mix))
        descend(terms, "discriminator")
        D.requires_grad_(False)
        losses |= (terms := generator(x, z, fake))
        descend(terms, "generator")
        average(list(G.buffers()))
        if args.ema:
            for averaged, value in zip(networks["generator_ema"].state_dict().values(), G.state_dict().values()):
                averaged.lerp_(value, 1 - args.ema)
        return {name: value.detach() for name, value in losses.items()}

    return train_step


class GraphedStep:
    """train_step captured once as a CUDA graph and replayed: one launch an iteration instead of hundreds.

    The warm-up that a capture needs is undone, so that a run starts from the same weights and moments as without a
    graph. A call copies the images into the buffer that the graph reads. The losses returned are overwritten by the
    next call. The step keeps all that the graph reads and writes alive.
    """

    def __init__(self, train_step: Callable[[Tensor], dict[str, Tensor]], networks: nn.ModuleDict,
                 optimizers: dict[str, torch.optim.Adam], rng: torch.Generator, images: Tensor):
        self.kept, self.images = (train_step, networks, optimizers, rng), images.clone()

        def tensors() -> list[Tensor]:  # Adam makes its moments at the first step
            moments = [v for o in optimizers.values() for state in o.state.values() for v in state.values()]
            return [*networks.state_dict(keep_vars=True).values(), *moments]

        before = {v.data_ptr(): v.detach().clone() for v in tensors()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                train_step(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for v in tensors():
                v.copy_(before[v.data_ptr()]) if v.data_ptr() in before else v.zero_()
        self.graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(action="ignore"):  # from PyTorch 2.12 on no longer needed, and a warning
            self.graph.register_generator_state(rng)
        with torch.cuda.graph(self.graph):
            self.losses = train_step(self.images)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.images.copy_(images)
        self.graph.replay()
        return self.losses


# ---------------------------------------------------------------------------------------------------------- loop
def draw_seed(*key: int) -> int:
    """A seed for a generator (the CPU's takes 32 bits) from numbers such as (seed, iteration)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@functools.lru_cache(2)
def data_order(n: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The order of n images in a pass over the data, int64 [n]."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n)).to(device)


def get_batch(images: Tensor, args: Args, iteration: int, device: torch.device) -> Tensor:
    """This process's share of an iteration's mini-batch, uint8 [B, C, H, W] on the device: a function of args.seed and
    the iteration alone. A pass's last mini-batch is filled up from the next pass."""
    epoch, first = divmod(iteration * args.batch_size, len(images))
    index = data_order(len(images), args.seed, epoch, images.device)[first : first + args.batch_size]
    if missing := args.batch_size - len(index):
        index = torch.cat([index, data_order(len(images), args.seed, epoch + 1, images.device)[:missing]])
    batch = images[index[own_slice(args.batch_size)]]
    if device.type == "cuda" and batch.device.type == "cpu":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True)


@torch.no_grad()
def sample_images(generator: Generator, z: Tensor) -> Tensor:
    """G(z) in evaluation mode as uint8 [n, 3, H, W]."""
    mode = generator.training
    images = to_bytes(generator.eval()(z))
    generator.train(mode)
    return images


def make_sampler(generator: Generator, args: Args, device: torch.device) -> Callable[[int], Tensor]:
    """A function from n to n new images, uint8 [n, 3, H, W]. Its draws are its own: the same for every evaluation, and
    none of training's, so that how often one evaluates changes nothing."""
    rng = torch.Generator(device).manual_seed(draw_seed(args.seed, 0, 1 + own_slice(args.batch_size).start))
    return lambda n: sample_images(generator, draw_latents(n, args, rng))


def train(args: Args, images: Tensor, device: torch.device, folder: pathlib.Path, checkpoint: Optional[dict],
          evaluator, signals: list[int]) -> bool:
    """Train from the checkpoint, or the start, to args.iterations or a signal in `signals`; whether it came to the end.

    images: uint8 [N, 3, H, W]; evaluator: common.metrics.Evaluator, or None for no scores.
    """
    networks = init_networks(args, device)
    optimizers = init_optimizers(args, networks)
    start, seconds, begin = 0, 0.0, time.perf_counter()
    if checkpoint is not None:
        restore(checkpoint, networks, optimizers)
        start, seconds = checkpoint["iteration"], checkpoint["seconds"]
    data = common.fingerprint(images)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        images = images.to(device)  # gathered there; a set too large for it is gathered in the host's memory
    rng = torch.Generator(device)
    train_step = make_train_step(args, networks, optimizers, rng)
    if args.cuda_graph and device.type == "cuda" and start < args.iterations:
        train_step = GraphedStep(train_step, networks, optimizers, rng, get_batch(images, args, start, device))
    generator = networks["generator_ema" if args.ema else "generator"]
    fixed_images = get_batch(images, args, 0, device)[:64]
    fixed_noise = draw_latents(64, args, torch.Generator().manual_seed(draw_seed(args.seed, 0, 1))).to(device)
    first = common.world()[0] == 0  # of torchrun's processes: the one that writes
    records = [r for r in common.read_lines(folder / "metrics.jsonl") if r["iteration"] <= start]
    counted, clock, rate = start, time.perf_counter(), 0.0

    def stopping() -> bool:
        """Whether a signal came, to this process or another."""
        if dist.is_initialized():
            number = torch.tensor(signals[:1] or [0])
            dist.all_reduce(number, dist.ReduceOp.MAX)
            signals.extend([number.item()] if number else [])
        return bool(signals)

    def due(every: int) -> bool:
        return every > 0 and iteration > 0 and (iteration % every == 0 or iteration == args.iterations)

    if first:
        sizes = ", ".join(f"{name} {sum(p.numel() for p in net.parameters()):,}" for name, net in networks.items())
        print(f"{folder}: {args.dataset}, {len(images):,} images of {images.shape[2]}x{images.shape[3]}, on "
              f"{common.describe(device)}; parameters: {sizes}; to watch: tensorboard --logdir {common.quote(folder)}")
    writer = SummaryWriter(str(folder), purge_step=start + 1) if first else None
    if first and start == 0:
        writer.add_text("arguments", "\n".join(f"    {k} = {v}" for k, v in dataclasses.asdict(args).items()))
        writer.add_image("images/real", make_grid(fixed_images, 8).cpu())
    with writer or contextlib.nullcontext(), tqdm(
            total=args.iterations, initial=start, desc=SCRIPT, unit="it", mininterval=0.5, dynamic_ncols=True,
            disable=not first, postfix="compiling" if args.compile else None) as bar:
        for iteration in range(start, args.iterations + 1):
            last = iteration == args.iterations or stopping()
            new = iteration > start or checkpoint is None  # a resumed run's first is saved; its scores may be missing
            log, sample, evaluate = due(args.log_every), due(args.sample_every), due(args.eval_every)
            measure, save = due(args.gradient_every), last or evaluate or due(args.checkpoint_every) or iteration == 0
            pause = log or sample or measure or save  # these wait for the device
            if pause and iteration > counted:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rate = (iteration - counted) * args.batch_size / (time.perf_counter() - clock)
            if first and new:
                if log or save:
                    common.check_finite(networks.state_dict(), f"iteration {iteration}", folder)
                if log:
                    values = dict(zip(losses, torch.stack(list(losses.values())).tolist()))
                    for name, value in values.items():
                        writer.add_scalar(f"losses/{name}", value, iteration)
                    writer.add_scalar("charts/images_per_second", rate, iteration)
                    writer.add_scalar("charts/learning_rate", args.lr, iteration)
                    bar.set_postfix({short: f"{values[name]:.3g}" for short, name in SHOWN if name in values},
                                    refresh=False)
                if measure:
                    norms = gradient_norms(args, networks, fixed_images, fixed_noise[: len(fixed_images)])
                    for name, value in norms.items():
                        writer.add_scalar(f"gradients/{name}", value, iteration)
                if sample:
                    grid = make_grid(sample_images(generator, fixed_noise), 8).cpu()
                    common.to_picture(grid).save(folder / f"samples/{iteration:08d}.png")
                    writer.add_image("images/samples", grid, iteration)
                if save:
                    writer.flush()
                    save_checkpoint(args, folder, networks, {
                        "iteration": iteration, "seconds": seconds + time.perf_counter() - begin, "data": data,
                        "optimizers": {name: o.state_dict()["state"] for name, o in optimizers.items()}})
            if evaluate and all(r["iteration"] != iteration for r in records):
                scores = evaluator.score(make_sampler(generator, args, device), args.num_fake, stop=stopping)
                if scores is None:  # a signal: scored when the run goes on
                    return False
                records.append({"iteration": iteration, **scores, "images_per_second": round(rate, 2),
                                "seconds": round(seconds + time.perf_counter() - begin, 2)})
                if first:
                    common.write_lines(folder / "metrics.jsonl", records)
                    for name, value in scores.items():
                        writer.add_scalar(f"metrics/{name}", value, iteration)
            if last:
                return iteration == args.iterations
            if pause:  # the clock of images a second stands still meanwhile
                counted, clock = iteration, time.perf_counter()
            rng.manual_seed(draw_seed(args.seed, iteration))
            losses = train_step(get_batch(images, args, iteration, device))
            bar.update()


# ------------------------------------------------------------------------------------------ arguments and files
RANGES = {"seed": "[0, 2147483648)", "num_images": "[1, inf)", "image_size": "[16, inf)", "width": "(0, inf)",
          "latent_dim": "[1, inf)", "ema": "[0, 1)", "lambda_p": "[0, inf)", "lambda_r": "[0, inf)",
          "lambda_m1": "[0, inf)", "lambda_m2": "[0, inf)", "alpha": "[0, 1)", "iterations": "[1, inf)",
          "batch_size": "[2, inf)", "lr": "(0, inf)", "beta1": "[0, 1)", "beta2": "[0, 1)", "log_every": "[0, inf)",
          "gradient_every": "[0, inf)", "sample_every": "[0, inf)", "eval_every": "[0, inf)",
          "checkpoint_every": "[0, inf)", "num_real": "[2, inf)", "num_fake": "[10, inf)"}
# What may differ from a checkpoint's run: where things are and how often one looks, nothing that training computes.
FREE = {f.name for group in (RunArgs, LoggingArgs) for f in dataclasses.fields(group)} - {"seed", "precision"}
FREE |= {"data_dir", "iterations"}  # iterations: without a schedule a run can be made longer


def parse_args(argv: Optional[list[str]] = None) -> tuple[Args, Optional[pathlib.Path], Optional[dict]]:
    """The arguments, resolved and checked; with --resume, --evaluate or --generate also the checkpoint's path and
    contents."""
    args, file, checkpoint = common.parse(Args, argv, __doc__, SCRIPT, FREE)
    if file and args.resume and args.iterations < checkpoint["iteration"]:
        raise UserError(f"--iterations is {args.iterations}: {file} is already at {checkpoint['iteration']}")
    args = resolve(dataclasses.replace(args, resume=None))
    common.check_ranges(args, RANGES)
    used = {"out": args.generate, "num_images": args.generate,
            "lambda_m1": args.gradient_matching, "lambda_m2": args.gradient_matching, "alpha": args.autoencoder,
            "lambda_r": args.neighbor_embedding or args.distgan, "autoencoder_updates": args.autoencoder}
    for name in used:
        if not used[name] and not file and getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name.replace('_', '-')} has no effect here: leave it out")
    if args.distgan and not args.autoencoder:
        raise UserError("--distgan needs its autoencoder: leave --no-autoencoder out")
    if args.image_size % 8:
        raise UserError(f"--image-size is {args.image_size}: it must be a multiple of 8")
    return args, file, checkpoint


def save_checkpoint(args: Args, folder: pathlib.Path, networks: nn.ModuleDict, state: dict) -> None:
    """checkpoint.pt: all that training goes on from; generator.pt: the G that is sampled, alone."""
    origin = {"script": SCRIPT, "args": dataclasses.asdict(args), "iteration": state["iteration"]}
    weights, sampled = networks.state_dict(), "generator_ema." if args.ema else "generator."
    generator = {name: value for name, value in weights.items() if name.startswith(sampled)}
    advice = f"make room and go on with --resume {common.quote(folder)}; "
    for name, contents in (("checkpoint.pt", {**origin, **state, "networks": weights}),
                           ("generator.pt", {**origin, "networks": generator})):
        common.write_atomically(folder / name, functools.partial(torch.save, contents), advice)


def restore(checkpoint: dict, networks: nn.ModuleDict, optimizers: dict[str, torch.optim.Adam]) -> None:
    """Load a checkpoint's weights and moments into networks and optimisers, which keep their own settings."""
    try:
        networks.load_state_dict({k: v for k, v in checkpoint["networks"].items() if k.split(".")[0] in networks})
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["optimizers"][name]})
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"the checkpoint does not fit this {SCRIPT}.py (has it changed since?): "
                        f"{common.reason(error)}") from None


def load_generator(args: Args, checkpoint: dict, device: torch.device) -> Generator:
    """The G that is sampled (its average with --ema) of a checkpoint.pt or generator.pt."""
    name = "generator_ema" if args.ema else "generator"
    networks = nn.ModuleDict({name: init_networks(args, device)[name]})
    restore(checkpoint, networks, {})
    return networks[name]


def main() -> int:
    args, file, checkpoint = parse_args()
    device = common.choose_device(args.device, tf32=args.precision != "fp32", deterministic=args.deterministic)
    rank, world = common.world()
    first = rank == 0
    if args.generate:
        if first:
            sample = make_sampler(load_generator(args, checkpoint, device), args, device)
            common.write_images(sample, args.num_images, args.out)
        return 0
    if args.batch_size % world or args.batch_size < 2 * world:
        raise UserError(f"--batch-size {args.batch_size} must be divisible by {world} processes, with 2 images each")
    name = args.run_name or f"{args.dataset}__{SCRIPT}__{args.seed}__{int(time.time())}"
    place = file.parent if file else pathlib.Path(args.run_dir, name).expanduser()
    with (common.run_folder(place, resume=file is not None, free_name=args.run_name is None)
          if first and not args.evaluate else contextlib.nullcontext(place)) as folder:
        images = datasets.load(args.dataset, args.data_dir, args.image_size)
        args = dataclasses.replace(args, num_real=min(args.num_real or 10_000, len(images)))
        evaluator = None
        if args.evaluate or args.eval_every:
            from common import metrics  # its Inception takes seconds to import
            evaluator = metrics.Evaluator(images, args.num_real, args.inception_weights, device)
            if args.num_real < 10_000 and first:
                print(f"{SCRIPT}.py: FID of {args.num_real:,} real images is biased, and comparable only with FIDs of "
                      "as many: look at KID", file=sys.stderr)
        if args.evaluate:
            sample = make_sampler(load_generator(args, checkpoint, device), args, device)
            scores = evaluator.score(sample, args.num_fake)
            if first:
                print(json.dumps({"iteration": checkpoint["iteration"], **scores}))
            return 0
        if len(images) < args.batch_size:
            raise UserError(f"{args.data_dir} has {len(images)} images, too few for --batch-size {args.batch_size}")
        if checkpoint is not None:
            checkpoint = common.read_checkpoint(file, SCRIPT)[1]  # it may have gone on until now
            if checkpoint["data"] != common.fingerprint(images):
                raise UserError(f"the images in {args.data_dir} are not those that the run began with: give its "
                                "--data-dir, or start a new run")
        if args.compile and not common.compiles(device):
            args = dataclasses.replace(args, compile=False)
        if args.cuda_graph and device.type == "cuda" and world > 1:
            print(f"{SCRIPT}.py: under torchrun iterations are launched eagerly, not as a CUDA graph", file=sys.stderr)
            args = dataclasses.replace(args, cuda_graph=False)
        if first:
            (folder / "samples").mkdir(exist_ok=True)
            common.write_setting(folder, SCRIPT, args)
        signals: list[int] = []  # the signal, if one came: the iteration is finished and everything saved
        common.on_signals(signals.append)
        finished = train(args, images, device, folder, checkpoint, evaluator, signals)
        records = common.read_lines(folder / "metrics.jsonl")
    scores = "no scores" + (" yet" if args.eval_every else ", --eval-every 0")
    if records:
        scores = "FID {fid:.2f}, KID {kid_mean:.4f}, IS {is_mean:.2f} at iteration {iteration}".format(**records[-1])
    if first and finished:
        print(f"{folder}: {args.iterations} iterations, {scores}")
    elif first:
        print(f"{folder}: stopped ({scores}); go on with --resume {common.quote(folder)}")
    return 0 if finished else 128 + signals[0]


if __name__ == "__main__":
    common.run(main)
