"""GN-GAN with SN-GAN's CNN on images, after "Improving GAN with Neighbors Embedding and Gradient Matching"
(Tran, Bui and Cheung, AAAI 2019): table 3's CNN rows, the curves of figures 5 and 7, Dist-GAN.

    python gngan_cnn.py                                     # CIFAR-10, log loss: figure 5's best curve
    python gngan_cnn.py --dataset stl10 --hinge             # table 3, STL-10 at 48x48: the paper's FID of 30.80
    python gngan_cnn.py --dataset folder --data-dir photos --width 0.25 --iterations 20000 --eval-every 0  # photos

An encoder E, a generator G and a discriminator D. Each iteration draws one mini-batch x and one z for three updates:

    E, G   reconstruct x from E(x), and keep neighbours: latents that lie close give images that lie close (Eq. 1)
    D      tells x (and, as a little share of the reals, G(E(x))) from G(z), under a gradient penalty (Eq. 7 or 8)
    G      matches D's mean score of x and G(z), and how steep D is around both (Eq. 13)

What to expect: docs/gngan.md. In brackets behind a flag: where its default comes from.
"""
from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from dataclasses import dataclass
from typing import Callable, Literal, Optional

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread of PyTorch's that waits leaves its core to others

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import UserError, datasets, training
from common.training import autocast, draw_seed, due

SCRIPT = pathlib.Path(__file__).stem
Terms = dict[str, Tensor]  # by name, what goes to TensorBoard: scalars, or a number, or what has a mean


# ------------------------------------------------------------------------------ arguments
@dataclass
class Args:
    # used most
    dataset: Literal["cifar10", "stl10", "folder"] = "cifar10"
    """What to train on. folder: images of your own, cut to squares and resized to --image-size."""
    data_dir: str = "data"
    """Where data sets are kept and downloaded to.
    With --dataset folder: the directory of the images, which may have subfolders, or their .zip."""
    width: float = 1.0
    """Factor of the networks' channels: 0.25 makes a run on a CPU possible."""
    iterations: Optional[int] = None
    """Updates of G. Default: 350,000; 200,000 with --hinge or stl10 [paper]."""
    resume: Optional[str] = None
    """A run folder or its checkpoint.pt: go on there, with its arguments unless given anew.
    auto: go on in --run-name's folder if it has a checkpoint, else start it."""

    # run
    seed: int = 1
    """Seed of the initial weights, the order of the data and every draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """tf32: fp32, but on a GPU convolutions and matrix products in TF32: faster, with fewer digits.
    bf16: networks under autocast, also on a CPU."""
    compile: bool = False
    """torch.compile the losses (a minute or more at the start)."""
    cuda_graph: bool = True
    """On a GPU: capture one iteration as a CUDA graph and replay it. Not under torchrun."""
    deterministic: bool = False
    """On a GPU: deterministic algorithms only; a resumed run then repeats bit for bit, as on a CPU."""
    run_dir: str = "runs"
    """The folder for run folders."""
    run_name: Optional[str] = None
    """The run folder's name. Default: {dataset}-{script}-{seed}-{month, day}-{hour, minute}."""
    evaluate: Optional[str] = None
    """A run folder, checkpoint.pt or generator.pt: print its scores as JSON; train nothing."""
    generate: Optional[str] = None
    """A run folder, checkpoint.pt or generator.pt: write images of it to --out; train nothing."""
    num_images: int = 64
    """With --generate: how many."""
    out: Optional[str] = None
    """With --generate: a folder for PNGs, x.png for a grid, x.npy for a uint8 array [N, H, W, C].
    Default: the folder `generated` beside the checkpoint."""

    # data
    image_size: Optional[int] = None
    """Height and width, a multiple of 8. Default: 32; stl10: 48 [authors' code]. Any but 32 has STL-10's networks."""

    # model
    latent_dim: int = 128
    """Dimensions of z ~ U(-1, 1) [paper; the distribution: authors' code]."""
    ema: float = 0.0
    """Decay of a moving average of G's weights, used for samples and scores; 0: off [paper]."""

    # loss
    hinge: bool = False
    """D's loss is the hinge loss (Eq. 8), not the log loss (Eq. 7)."""
    neighbor_embedding: bool = True
    """Neighbours stay neighbours: latents that lie close give images that lie close (V_R, Eq. 2-6).
    It is part of the autoencoder's loss; with --no-autoencoder of G's, on z and G(z) alone (figure 7)."""
    gradient_matching: bool = True
    """G's loss compares D's scores of real and generated images, and D's gradients there (Eq. 13).
    Without: the scores alone.
    Without autoencoder too: GAN's non-saturating loss, or, with --hinge, -E D(G(z)) [ours]."""
    autoencoder: bool = True
    """Train an encoder, with G as its decoder; D takes reconstructions for real, with the weight
    --alpha (V_C of Eq. 7).
    Without: as in figure 7's runs."""
    distgan: bool = False
    """The baseline Dist-GAN (Tran, Bui and Cheung 2018): reconstructions are compared by D's features.
    It has no neighbour embedding and no gradient matching."""
    lambda_p: Optional[float] = None
    """Weight of the gradient penalty V_P in D's loss. Default: 1 [paper]; 0 without an autoencoder [ours]."""
    lambda_r: float = 1.0
    """Weight of the neighbour embedding V_R [paper]; with --distgan of its latent-data distance."""
    lambda_m1: float = 1.0
    """Weight in G's loss of: D's mean gradient norm, of real against generated (Eq. 13) [paper]."""
    lambda_m2: float = 1.0
    """Weight in G's loss of: D's mean product of gradient and image, likewise (Eq. 13) [paper]."""
    alpha: float = 0.05
    """Of what D is told is real, the share of reconstructions (Eq. 7) [paper]."""
    penalty: Literal["auto", "score", "rms", "reversed"] = "auto"
    """Which gradient of D the penalty V_P holds at norm 1. auto: rms; with --hinge reversed.
    score: the L2 norm of the sigmoid score's gradient, D as in the paper.
    rms: the root mean square over pixels of the logit's gradient [authors' code].
    reversed: rms with the sign of V_P changed, which draws slopes to 0 [authors' hinge loss]."""
    autoencoder_updates: Literal["both", "encoder"] = "both"
    """The autoencoder's update trains E and G [paper] or E alone [authors' code for CIFAR-10 and STL-10]."""

    # optimisation
    batch_size: int = 64
    """Images a mini-batch, over all processes of torchrun [paper]."""
    lr: float = 2e-4
    """Adam's learning rate [paper]."""
    beta1: float = 0.5
    """Adam's first decay [paper]."""
    beta2: float = 0.9
    """Adam's second decay [paper]."""

    # logging
    log_every: int = 100
    """Iterations between lines in TensorBoard; before the first also at 1, 2, 4, 8, ...; 0: none."""
    sample_every: int = 1000
    """Iterations between grids of samples; before the first also at 0, 1, 2, 4, 8, ...; 0: none."""
    eval_every: int = 10000
    """Iterations between scores (FID and others), and at the end.
    0: none, and no Inception weights needed."""
    checkpoint_every: int = 1000
    """Iterations between checkpoints; 0: at the start, at the end, before a score, on a signal."""
    num_real: Optional[int] = None
    """Real images for FID. Default: 10,000 [paper], or all if there are fewer."""
    num_fake: int = 5000
    """Generated images for FID and the Inception Score [paper]."""
    inception_weights: Optional[str] = None
    """A file of torch-fidelity's Inception weights. Default: downloaded once."""


def resolve(args: Args) -> Args:
    """Fill in, in place, each default that depends on another flag, and Dist-GAN's switches."""
    if args.iterations is None:
        args.iterations = 200_000 if args.hinge or args.dataset == "stl10" else 350_000
    if args.image_size is None:
        args.image_size = 48 if args.dataset == "stl10" else 32
    if args.lambda_p is None:
        args.lambda_p = 1.0 if args.autoencoder else 0.0
    if args.penalty == "auto":
        args.penalty = "reversed" if args.hinge else "rms"
    if args.distgan:
        args.neighbor_embedding = args.gradient_matching = False
    return args


# ------------------------------------------------------------------------------- networks
def leaky_relu(x: Tensor, negative_slope: float, slopes: Optional[list[Tensor]]) -> Tensor:
    """Leaky ReLU. Its derivative at each element of x, 1 or `negative_slope`, is appended to `slopes`, if given.

    As a constant: its own derivative is zero, as that of any piecewise linear activation.
    """
    if slopes is None:
        return F.leaky_relu(x, negative_slope)
    slopes.append(x.detach().sign().clamp_(min=negative_slope))  # on a CPU in a tenth of torch.where's time
    return x * slopes[-1]


class BatchNorm(nn.Module):
    """Batch norm on [B, C, H, W]. A training batch is normalised by its own statistics.

    The running statistics are moved only if told to: by G(z), never by G(E(x)), so that they
    describe what is sampled. They begin at 0, and evaluation divides them by `running_weight`, the
    weight of all batches so far (bias correction, as in Adam).
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.zeros(channels))
        self.register_buffer("running_weight", torch.zeros(()))

    def forward(self, x: Tensor, update: bool) -> Tensor:
        mean = var = None  # in training the batch's own statistics normalise
        if self.training and update:
            self.running_weight.mul_(1 - self.momentum).add_(self.momentum)
            mean, var = self.running_mean, self.running_var  # these only take in the batch's own
        elif not self.training:
            begun = self.running_weight > 0
            mean = torch.where(begun, self.running_mean / self.running_weight, 0.0)
            var = torch.where(begun, self.running_var / self.running_weight, 1.0)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=self.training,
                            momentum=self.momentum, eps=self.eps)


class Generator(nn.Module):
    """z [B, latent_dim] -> images [B, 3, size, size] in [0, 1]; the notation is for size 32, width 1."""

    def __init__(self, args: Args):
        super().__init__()
        self.bf16 = args.precision == "bf16"
        self.side = args.image_size // 8
        widths = [max(1, round(c * args.width)) for c in (1024, 512, 256, 128)]
        self.linear = nn.Linear(args.latent_dim, widths[0] * self.side**2)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=False)
                                 for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(BatchNorm(c) for c in widths[1:])
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)
        init_weights(self)

    @autocast
    def forward(self, z: Tensor, update_statistics: bool = False) -> Tensor:
        x = F.relu(self.linear(z)).unflatten(1, (-1, self.side, self.side))  # [B, 1024, 4, 4]
        x = x.contiguous(memory_format=torch.channels_last)
        for up, norm in zip(self.ups, self.norms):  # [B, 512, 8, 8], [B, 256, 16, 16], [B, 128, 32, 32]
            x = F.relu(norm(up(x), update_statistics))
        return torch.sigmoid(self.last(x).float())  # in fp32: bf16 has too few steps near 1


class Discriminator(nn.Module):
    """images [B, 3, size, size] -> logits [B]; the score D(x) is their sigmoid. No normalisation."""

    def __init__(self, args: Args):
        super().__init__()
        self.bf16 = args.precision == "bf16"
        widths = [3] + [max(1, round(c * args.width)) for c in (64, 64, 128, 128, 256, 256, 512)]
        self.convs = nn.ModuleList()
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            halve = i % 2 == 1
            self.convs.append(nn.Conv2d(a, b, 4 if halve else 3, stride=2 if halve else 1, padding=1))
        self.linear = nn.Linear(widths[-1] * (args.image_size // 8) ** 2, 1)
        init_weights(self)

    @autocast
    def features(self, x: Tensor, slopes: Optional[list[Tensor]] = None) -> Tensor:
        """The last convolution's map, [B, 512, 4, 4]. Activations append their slopes to `slopes`."""
        for conv in self.convs:  # 64 at 32x32, 64 at 16x16, 128, 128 at 8x8, 256, 256 at 4x4, 512
            x = leaky_relu(conv(x), 0.1, slopes)
        return x.float()

    @autocast
    def forward(self, x: Tensor, slopes: Optional[list[Tensor]] = None) -> Tensor:
        return self.linear(self.features(x, slopes).flatten(1))[:, 0].float()

    @autocast
    def logit_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B] of images [B, 3, s, s], and each one's gradient to its image, of the images' shape.

        D is piecewise linear: near an image its activations are factors that do not change. So its
        gradient is the product of its layers' transposes, without biases, with these factors between
        them. It is written out, since autograd's own is slow to differentiate again: for a
        convolution's weight by a convolution with a kernel as large as the image.
        """
        slopes: list[Tensor] = []
        logit = self(x, slopes)
        gradient = self.linear.weight.view(1, *slopes[-1].shape[1:])
        for conv, slope in zip(reversed(self.convs), reversed(slopes), strict=True):
            gradient = F.conv_transpose2d(gradient * slope, conv.weight, None, conv.stride, conv.padding)
        return logit, gradient.float()


class Encoder(nn.Module):
    """images [B, 3, size, size] -> latents [B, latent_dim].

    The authors' encoder for CIFAR-10 at size 32, and theirs for STL-10 at others. Its batch norm
    has no running statistics, since E is of use in training only.
    """

    def __init__(self, args: Args):
        super().__init__()
        self.bf16 = args.precision == "bf16"
        if args.image_size == 32:
            widths = [max(1, round(c * args.width)) for c in (128, 256, 512)]  # at 16x16, 8x8, 4x4
            layers = [nn.Conv2d(3, widths[0], 5, stride=2, padding=2), nn.LeakyReLU(0.2)]
            kernel, slope = 5, 0.2
        else:
            widths = [max(1, round(c * args.width)) for c in (128, 256, 512, 1024)]  # at 48x48, 24x24, 12x12, 6x6
            layers = [nn.Conv2d(3, widths[0], 3, padding=1), nn.ReLU()]
            kernel, slope = 4, 0.1
        for a, b in zip(widths, widths[1:]):
            layers.append(nn.Conv2d(a, b, kernel, stride=2, padding=(kernel - 1) // 2, bias=False))
            layers.append(nn.BatchNorm2d(b, track_running_stats=False))
            layers.append(nn.LeakyReLU(slope))
        self.convs = nn.Sequential(*layers)
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


# --------------------------------------------------------------------------------- losses
def l2_norm(v: Tensor) -> Tensor:
    """L2 norm of each sample of v [B, ...] in fp32, [B]; the small constant keeps its gradient finite at 0."""
    return (v.float().flatten(1).square().sum(1) + 1e-12).sqrt()


def pairwise_affinities(points: Tensor) -> Tensor:
    """p_ij of Eq. 3 and 4 for points [n, d], [n, n]: symmetric, zero on the diagonal, summing to 1.

    sigma^2 is the variance of the pairwise distances, a constant without gradient [ours: the paper
    calls sigma the variance and squares it].
    """
    points = points.double()  # |a|^2 + |b|^2 - 2 ab takes the difference of large numbers
    squares = points.square().sum(1)
    others = ~torch.eye(len(points), dtype=torch.bool, device=points.device)  # j != i
    squared_distances = (squares[:, None] + squares - 2 * points @ points.mT).clamp_min(0) * others
    with torch.no_grad():
        distances = squared_distances.sqrt()
        pairs = len(points) * (len(points) - 1)
        mean = distances.sum() / pairs
        variance = ((distances - mean).square() * others).sum() / pairs
    similarity = others / (1 + squared_distances / (2 * variance + 1e-12))
    conditional = similarity / similarity.sum(0)  # column i: p_{j|i}
    return ((conditional + conditional.mT) / (2 * len(points))).float()


def neighbor_embedding(latents: Tensor, images: Tensor) -> Tensor:
    """V_R = sum_ij p_ij log(p_ij / q_ij) (Eq. 2-6), scalar in fp32.

    latents [n, d], images [n, C, H, W] generated from them: p is over the latents, q over the
    images. Its gradient reaches both. Identical points give finite gradients.
    """
    itself = torch.eye(len(latents), device=latents.device)  # log 1 = 0 where i = j
    p = pairwise_affinities(latents) + itself
    q = pairwise_affinities(images.flatten(1)) + itself
    return (p * (p.log() - q.log())).sum()


def reconstruction_error(real: Tensor, reconstruction: Tensor) -> Tensor:
    """||x - G(E(x))||^2 (Eq. 1) as its mean over batch and pixels [authors' code], scalar."""
    return (real - reconstruction).square().mean()


def discriminator_loss(real: Tensor, fake: Tensor, reconstruction: Optional[Tensor] = None,
                       alpha: float = 0.0, hinge: bool = False) -> Tensor:
    """-V_D of Eq. 7 (hinge: Eq. 8) without its penalty, scalar.

    real, fake, reconstruction: logits [B]. Reconstructions, of an autoencoder, count as real.
    """
    def real_loss(logit: Tensor) -> Tensor:
        if hinge:  # -E min(0, -1 + D) is linear here, since the sigmoid score D is inside (0, 1)
            return 1 - torch.sigmoid(logit).mean()
        return F.softplus(-logit).mean()  # -E log D

    def fake_loss(logit: Tensor) -> Tensor:
        if hinge:
            return 1 + torch.sigmoid(logit).mean()
        return F.softplus(logit).mean()  # -E log(1 - D)

    if reconstruction is None:
        return real_loss(real) + fake_loss(fake)
    return (1 - alpha) * real_loss(real) + alpha * real_loss(reconstruction) + fake_loss(fake)


def gradient_penalty(discriminator: Discriminator, real: Tensor, fake: Tensor, mix: Tensor,
                     penalty: str = "rms") -> Tensor:
    """V_P = E(||grad D(x^)|| - 1)^2 at x^ = mix real + (1 - mix) fake (below Eq. 7); scalar.

    real, fake [B, C, H, W]; mix [B, 1, 1, 1] from U(0, 1). penalty: score, the L2 norm of the
    sigmoid score's gradient; rms and reversed, of the logit's over sqrt(C H W).
    """
    point = mix * real + (1 - mix) * fake
    logit, gradient = discriminator.logit_and_gradient(point)
    slope = l2_norm(gradient)
    if penalty == "score":  # its gradient is D (1 - D) times the logit's
        slope = slope * torch.sigmoid(logit) * torch.sigmoid(-logit)
    else:
        slope = slope / math.sqrt(point[0].numel())
    return (slope - 1).square().mean()


def gradient_matching(discriminator: Discriminator, real: Tensor,
                      fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of V_G (Eq. 13) before their weights, of images [B, C, H, W]; scalars.

    |E D(x) - E D(G)|, (E ||grad D(x)|| - E ||grad D(G)||)^2 and (E |grad D(x)'x| - E |grad
    D(G)'G|)^2, the norms inside the expectations. D here is the sigmoid score, whose gradient is D
    (1 - D) times the logit's. The logit of a piecewise linear D has a gradient that does not change
    with x. So G learns by D (1 - D), and by the x in the product.
    """
    images = torch.cat([real, fake])
    logit, gradient = discriminator.logit_and_gradient(images)
    # The same value, with the gradient at hand as its derivative by x: no second pass through D.
    logit = logit.detach() + ((images - images.detach()) * gradient.detach()).flatten(1).sum(1)
    score = torch.sigmoid(logit)
    slope = score * (1 - score)
    inner = (gradient * images).flatten(1).sum(1)
    differences = []
    for values in (score, slope * l2_norm(gradient), slope * inner.abs()):
        of_real, of_fake = values.split([len(real), len(fake)])  # the real side has no way to G
        differences.append(of_real.mean() - of_fake.mean())
    score_difference, norm_difference, inner_difference = differences
    return score_difference.abs(), norm_difference.square(), inner_difference.square()


def latent_data_distance(fake: Tensor, reconstruction: Tensor, z: Tensor, latent: Tensor) -> Tensor:
    """Dist-GAN: (E[f(G(E(x))) - f(G(z))] - w E[E(x) - z])^2 with w = sqrt(d_z / d_f), scalar.

    The means are over batch and coordinates. fake and reconstruction: D's features [B, ...].
    """
    weight = math.sqrt(z[0].numel() / fake[0].numel())
    return ((reconstruction - fake).mean() - weight * (latent - z).mean()).square()


# ----------------------------------------------------------------------------- objectives
# Each returns the loss that is minimised, and by name what to watch of it, with or without a gradient.
# A loss that begins as a term is a copy of it, so that a `loss += ...` cannot change the term.
def autoencoder_objective(args: Args, networks: nn.ModuleDict, x: Tensor,
                          z: Tensor) -> tuple[Tensor, Terms]:
    """V_AE of Eq. 1 (Dist-GAN: its own) for real x [B, 3, H, W] in [0, 1] and z [B, latent_dim]."""
    E, G, D = networks["encoder"], networks["generator"], networks["discriminator"]
    latent = E(x)
    reconstruction = G(latent)
    if args.distgan:
        real_map = D.features(x)
        fake_map = D.features(G(z))
        reconstruction_map = D.features(reconstruction)
        error = reconstruction_error(real_map, reconstruction_map)
        distance = latent_data_distance(fake_map, reconstruction_map, z, latent)
        loss = error + args.lambda_r * distance
        return loss, {"reconstruction": error, "latent_data_distance": distance}
    error = reconstruction_error(x, reconstruction)
    loss = error.clone()
    terms = {"reconstruction": error}
    if args.neighbor_embedding:
        embedding = neighbor_embedding(torch.cat([latent, z]), torch.cat([reconstruction, G(z)]))
        loss = loss + args.lambda_r * embedding
        terms["neighbor_embedding"] = embedding
    return loss, terms


def discriminator_objective(args: Args, networks: nn.ModuleDict, x: Tensor, fake: Tensor,
                            reconstruction: Optional[Tensor], mix: Tensor) -> tuple[Tensor, Terms]:
    """-V_D of Eq. 7 or 8 for images [B, 3, H, W] in [0, 1] and mix [B, 1, 1, 1]."""
    D = networks["discriminator"]
    images = [x, fake] if reconstruction is None else [x, fake, reconstruction]
    logits = D(torch.cat(images)).split(len(x))
    loss = discriminator_loss(*logits, alpha=args.alpha, hinge=args.hinge)
    terms = {"score_real": torch.sigmoid(logits[0]).mean(),
             "score_fake": torch.sigmoid(logits[1]).mean()}
    if args.lambda_p:
        penalty = gradient_penalty(D, x, fake, mix, args.penalty)
        # reversed: the slope is pushed away from 1; D's slopes are below 1, and so fall to 0
        sign = -1 if args.penalty == "reversed" else 1
        loss = loss + sign * args.lambda_p * penalty
        terms["gradient_penalty"] = penalty
    return loss, terms


def generator_objective(args: Args, networks: nn.ModuleDict, x: Tensor, z: Tensor,
                        fake: Tensor) -> tuple[Tensor, Terms]:
    """V_G of Eq. 13 and its ablations for real x, fake = G(z) [B, 3, H, W] and z [B, latent_dim]."""
    D = networks["discriminator"]
    if args.gradient_matching:
        score_term, norm_term, inner_term = gradient_matching(D, x, fake)
        loss = score_term + args.lambda_m1 * norm_term + args.lambda_m2 * inner_term
        terms = {"score_matching": score_term, "norm_matching": norm_term,
                 "inner_matching": inner_term}
    elif args.autoencoder:
        score_term = (torch.sigmoid(D(x)).mean() - torch.sigmoid(D(fake)).mean()).abs()
        loss = score_term.clone()
        terms = {"score_matching": score_term}
    else:
        logit = D(fake)
        adversarial = -torch.sigmoid(logit).mean() if args.hinge else F.softplus(-logit).mean()
        loss = adversarial.clone()
        terms = {"adversarial": adversarial}
    if args.neighbor_embedding and not args.autoencoder:
        embedding = neighbor_embedding(z, fake)
        loss = loss + args.lambda_r * embedding
        terms["neighbor_embedding"] = embedding
    return loss, terms


# ----------------------------------------------------------------------------- train step
def init_networks(args: Args, device: torch.device) -> nn.ModuleDict:
    """E, G and D, drawn on the CPU from args.seed: every device starts from the same weights."""
    torch.manual_seed(args.seed)
    networks = nn.ModuleDict({"generator": Generator(args), "discriminator": Discriminator(args)})
    if args.autoencoder:
        networks["encoder"] = Encoder(args)
    if args.ema:
        networks["generator_ema"] = copy.deepcopy(networks["generator"]).requires_grad_(False)
    return networks.to(device, memory_format=torch.channels_last)  # the layout of fast convolutions


def init_optimizers(args: Args, networks: nn.ModuleDict) -> dict[str, torch.optim.Adam]:
    """One Adam a network: G's makes the steps of both updates that train G (docs/gngan.md says why)."""
    capturable = next(networks.parameters()).device.type == "cuda" and args.cuda_graph
    settings = dict(lr=args.lr, betas=(args.beta1, args.beta2), fused=True, capturable=capturable)
    names = [name for name in ("generator", "discriminator", "encoder") if name in networks]
    return {name: torch.optim.Adam(networks[name].parameters(), **settings) for name in names}


def draw_latents(n: int, args: Args, rng: torch.Generator) -> Tensor:
    """z ~ U(-1, 1), [n, latent_dim]."""
    return torch.rand(n, args.latent_dim, generator=rng, device=rng.device) * 2 - 1


def to_float(images: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] as networks take and make them: fp32 in [0, 1]."""
    return images.to(torch.float32, memory_format=torch.channels_last) / 255


def to_bytes(x: Tensor) -> Tensor:
    """Networks' images [B, C, H, W] as uint8."""
    return (x * 255 + 0.5).clamp(0, 255).to(torch.uint8).contiguous()


def make_train_step(args: Args, networks: nn.ModuleDict, optimizers: dict[str, torch.optim.Adam],
                    rng: torch.Generator) -> training.TrainStep:
    """`train_step(images)`: one iteration of Algorithm 1, in place; returns losses and terms.

    images: uint8 [B, 3, H, W], this process's share of the mini-batch. z and mix are drawn from
    `rng`, which is seeded anew before each iteration. Nothing in the step waits for the device.
    """
    G, D = networks["generator"], networks["discriminator"]

    def prepare(function: Callable) -> Callable:  # the losses; optimisers and draws are not compiled
        return torch.compile(function, fullgraph=True, dynamic=False) if args.compile else function

    ae_objective = prepare(functools.partial(autoencoder_objective, args, networks))
    d_objective = prepare(functools.partial(discriminator_objective, args, networks))
    g_objective = prepare(functools.partial(generator_objective, args, networks))
    generate = prepare(G)
    reconstruct = prepare(lambda x: G(networks["encoder"](x)))

    def train_step(images: Tensor) -> dict[str, Tensor]:
        x = to_float(images)
        own = training.own_slice(args.batch_size)
        z = draw_latents(args.batch_size, args, rng)[own]
        mix = torch.rand(args.batch_size, 1, 1, 1, generator=rng, device=rng.device)[own]
        losses, reconstruction = {}, None

        # E and G: reconstruct x, keep neighbours
        D.requires_grad_(False)
        if args.autoencoder:
            loss, terms = ae_objective(x, z)
            networks.zero_grad()
            loss.backward()
            training.average_gradients(networks)
            optimizers["encoder"].step()
            if args.autoencoder_updates == "both":
                optimizers["generator"].step()
            losses |= {"autoencoder": loss, **terms}
            with torch.no_grad():
                reconstruction = reconstruct(x)

        # D: tell x and G(E(x)) from G(z)
        fake = generate(z, True)  # one pass for D's update and, its graph kept, for G's
        D.requires_grad_(True)
        loss, terms = d_objective(x, fake.detach(), reconstruction, mix)
        networks.zero_grad()
        loss.backward()
        training.average_gradients(networks)
        optimizers["discriminator"].step()
        losses |= {"discriminator": loss, **terms}

        # G: match D's scores and their gradients
        D.requires_grad_(False)
        loss, terms = g_objective(x, z, fake)
        networks.zero_grad()
        loss.backward()
        training.average_gradients(networks)
        optimizers["generator"].step()
        losses |= {"generator": loss, **terms}

        training.average(G.buffers())
        if args.ema:
            training.update_ema(networks["generator_ema"], G, args.ema)
        return training.scalars(losses)

    return train_step


# ----------------------------------------------------------------------------------- loop
@functools.lru_cache(2)
def data_order(n: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The order of n images in a pass over the data, int64 [n]."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n)).to(device)


def get_batch(images: Tensor, args: Args, iteration: int, device: torch.device) -> Tensor:
    """This process's share of an iteration's mini-batch, uint8 [B, C, H, W] on the device.

    A function of args.seed and the iteration alone. A pass's last one is filled up from the next.
    """
    epoch, position = divmod(iteration * args.batch_size, len(images))
    order = functools.partial(data_order, len(images), args.seed, device=images.device)
    index = order(epoch)[position : position + args.batch_size]
    index = torch.cat([index, order(epoch + 1)[: args.batch_size - len(index)]])
    batch = images[index[training.own_slice(args.batch_size)]]
    if device.type == "cuda" and batch.device.type == "cpu":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True)


@torch.no_grad()
def sample_images(generator: Generator, z: Tensor) -> Tensor:
    """G(z) in evaluation mode as uint8 [n, 3, H, W]."""
    images = to_bytes(generator.eval()(z))
    generator.train()
    return images


def make_sampler(generator: Generator, args: Args, device: torch.device) -> Callable[[int], Tensor]:
    """A function from n to n new images, uint8 [n, 3, H, W].

    Its draws are its own: the same for every evaluation, and none of training's (whose keys have no
    third number, which is as 0), so that how often one evaluates changes nothing.
    """
    own = training.own_slice(args.batch_size)
    rng = torch.Generator(device).manual_seed(draw_seed(args.seed, 0, 1 + own.start))
    return lambda n: sample_images(generator, draw_latents(n, args, rng))


def train(args: Args, images: Tensor, device: torch.device, folder: pathlib.Path,
          checkpoint: Optional[dict], evaluator, signals: list[int]) -> bool:
    """Train from the checkpoint, or the start, to args.iterations or a signal in `signals`.

    Returns whether it came to the end.
    images: uint8 [N, 3, H, W]; evaluator: common.metrics.Evaluator, or None for no scores.
    """
    header = {"script": SCRIPT, "args": dataclasses.asdict(args), "data": training.fingerprint(images)}
    training.check_start(args, images, device, checkpoint)

    # Networks, optimisers, draws, the step
    networks = init_networks(args, device)
    training.check_gradient(networks["discriminator"], to_float(images[:2]))
    optimizers = init_optimizers(args, networks)
    start, begin = 0, time.perf_counter()
    if checkpoint is not None:
        training.restore(checkpoint, networks, optimizers)
        start, begin = checkpoint["iteration"], begin - checkpoint["seconds"]
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        images = images.to(device)  # gathered there; a set too large for it in the host's memory
    rng = torch.Generator(device)
    train_step = make_train_step(args, networks, optimizers, rng)
    if args.cuda_graph and device.type == "cuda":
        train_step = training.GraphedStep(train_step, rng)
    sampled = "generator_ema" if args.ema else "generator"
    sample_rng = torch.Generator().manual_seed(draw_seed(args.seed, 0, 1))  # on every device the same
    fixed_noise = draw_latents(64, args, sample_rng).to(device)
    losses: Terms = {}

    # What is shown
    main_process = training.world()[0] == 0  # of torchrun's processes: the one that writes
    records = [r for r in common.read_lines(folder / "metrics.jsonl") if r["iteration"] <= start]
    writer = training.begin_log(folder, args, header, images, networks, device, checkpoint)
    bar = common.progress(total=args.iterations, initial=start, desc=SCRIPT, unit="it",
                          disable=not main_process, postfix="compiling" if args.compile else None)

    with writer, bar:
        for iteration in range(start, args.iterations + 1):
            last = iteration == args.iterations or training.stopping(signals)
            log = due(args.log_every, iteration, args.iterations, early=True)
            evaluate = evaluator is not None and due(args.eval_every, iteration, args.iterations)
            sample = due(args.sample_every, iteration, args.iterations, early=True)
            sample = sample or args.sample_every > 0 and (evaluate or last or iteration == 0)
            save = due(args.checkpoint_every, iteration, args.iterations)
            save = save or evaluate or last or iteration == 0
            # what a resumed run shows of its first iteration, `begin_log` has shown
            unwritten = main_process and (iteration > start or checkpoint is None)

            # Log
            if unwritten and (log or save):
                training.check_finite(networks.state_dict(), f"iteration {iteration}", folder)
            points = {}  # TensorBoard's of this iteration
            if unwritten and log:
                points = {f"losses/{name}": value.item() for name, value in losses.items()}
                rate = training.images_per_second(bar, args.batch_size)
                if rate is not None:
                    points["charts/images_per_second"] = rate
                points["charts/learning_rate"] = args.lr
                for name, value in points.items():
                    writer.add_scalar(name, value, iteration)
                shown = [n for n in ("autoencoder", "discriminator", "generator") if n in losses]
                bar.set_postfix({name[0].upper(): f"{points['losses/' + name]:.3g}" for name in shown}, refresh=False)

            # Samples
            if unwritten and sample:
                grid = datasets.encode_grid(sample_images(networks[sampled], fixed_noise))
                training.show_grid(writer, folder, grid, iteration)

            # Checkpoint
            if unwritten and save:
                writer.flush()
                so_far = {"iteration": iteration, "seconds": time.perf_counter() - begin, "points": points}
                training.save_checkpoint(folder, header | so_far, networks, optimizers, sampled)

            # Scores
            if evaluate and all(r["iteration"] != iteration for r in records):
                scores = evaluator.score(make_sampler(networks[sampled], args, device), args.num_fake,
                                         stop=lambda: training.stopping(signals))
                if scores is None:  # a signal: scored when the run goes on
                    return False
                records.append({"iteration": iteration, **scores,
                                "images_per_second": training.images_per_second(bar, args.batch_size),
                                "seconds": round(time.perf_counter() - begin, 2)})
                if main_process:
                    common.write_lines(folder / "metrics.jsonl", records)
                    training.show_scores(writer, records[-1])
                bar.unpause()  # the rate is of training alone

            # Train
            if last:
                return iteration == args.iterations
            rng.manual_seed(draw_seed(args.seed, iteration))
            losses = train_step(get_batch(images, args, iteration, device))
            training.show_iterations(bar, first=iteration == start)


# -------------------------------------------------------------------- arguments and files
RANGES = {"seed": "[0, 2147483648)", "num_images": "[1, inf)", "image_size": "[16, inf)", "width": "(0, inf)",
          "latent_dim": "[1, inf)", "ema": "[0, 1)", "lambda_p": "[0, inf)", "lambda_r": "[0, inf)",
          "lambda_m1": "[0, inf)", "lambda_m2": "[0, inf)", "alpha": "[0, 1)", "iterations": "[1, inf)",
          "batch_size": "[2, inf)", "lr": "(0, inf)", "beta1": "[0, 1)", "beta2": "[0, 1)",
          "log_every": "[0, inf)", "sample_every": "[0, inf)", "eval_every": "[0, inf)",
          "checkpoint_every": "[0, inf)", "num_real": "[4, inf)", "num_fake": "[10, inf)"}


def parse_args(argv: Optional[list[str]] = None
               ) -> tuple[Args, Optional[pathlib.Path], Optional[dict]]:
    """The arguments, resolved and checked; with --resume, --evaluate or --generate also the
    checkpoint's path and contents."""
    args, file, checkpoint = common.parse(Args, argv, __doc__, SCRIPT)
    resolve(args)
    common.check_ranges(args, RANGES)
    if args.distgan and not args.autoencoder:
        raise UserError("--distgan needs its autoencoder: leave --no-autoencoder out")
    if args.image_size % 8:
        raise UserError(f"--image-size is {args.image_size}: it must be a multiple of 8")
    return args, file, checkpoint


def load_generator(args: Args, checkpoint: dict, device: torch.device) -> Generator:
    """The G that is sampled (its average with --ema) of a checkpoint.pt or generator.pt."""
    sampled = "generator_ema" if args.ema else "generator"
    networks = nn.ModuleDict({sampled: init_networks(args, device)[sampled]})
    training.restore(checkpoint, networks, {})
    return networks[sampled]


def main() -> int:
    args, file, checkpoint = parse_args()
    device = training.choose_device(args.device, tf32=args.precision != "fp32",
                                    deterministic=args.deterministic)
    main_process = training.world()[0] == 0  # of torchrun's processes: the one that writes
    if args.generate:
        if main_process:
            sampler = make_sampler(load_generator(args, checkpoint, device), args, device)
            datasets.write_images(sampler, args.num_images, args.out or file.parent / "generated")
        return 0

    with training.open_run(args, file, default_name=f"{args.dataset}-{SCRIPT}") as folder:
        images = datasets.load(args.dataset, args.data_dir, args.image_size)
        args.num_real = min(args.num_real or 10_000, len(images))
        evaluator = None
        if args.evaluate or args.eval_every:
            from common import metrics  # its Inception takes seconds to import
            evaluator = metrics.Evaluator(images, args.num_real, args.inception_weights, device)
        if args.evaluate:
            sampler = make_sampler(load_generator(args, checkpoint, device), args, device)
            scores = evaluator.score(sampler, args.num_fake)
            if main_process:
                print(json.dumps({"iteration": checkpoint["iteration"], **scores}))
            return 0

        if file:
            checkpoint = common.read_checkpoint(file, SCRIPT)[1]  # it may have gone on until now
        signals: list[int] = []  # one that comes: the iteration is finished and everything saved
        common.on_signals(signals.append)
        finished = train(args, images, device, folder, checkpoint, evaluator, signals)
        if main_process:
            training.print_end(folder, args, finished)
    return 0 if finished else 128 + signals[0]


if __name__ == "__main__":
    common.run(main)
