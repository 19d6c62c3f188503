"""GN-GAN with SN-GAN's ResNet on images, after "Improving GAN with Neighbors Embedding and Gradient Matching"
(Tran, Bui and Cheung, AAAI 2019): table 3's ResNet row, its best on CIFAR-10, and the switches of figures 5 and 7.

    python gngan_resnet.py                                  # CIFAR-10, hinge loss, 200,000 iterations: table 3
    python gngan_resnet.py --dataset stl10                  # STL-10 at 48x48
    python gngan_resnet.py --dataset folder --data-dir photos.zip --width 0.25 --eval-every 0   # any images, on a CPU

An encoder E, a generator G and a discriminator D. Each iteration draws one mini-batch x and one z for three updates:

    E, G   reconstruct x from E(x), and keep neighbours: latents that lie close give images that lie close (Eq. 1)
    D      tells x (and, as a little share of the reals, G(E(x))) from G(z), under a gradient penalty (Eq. 7 or 8)
    G      matches D's mean score of x and G(z), and how steep D is around both (Eq. 13)

It differs from gngan_cnn.py in networks and defaults alone. What to expect: see README.md, "GN-GAN on images".
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import platform
import shutil
import signal
import sys
import sysconfig
import time
import zlib
from dataclasses import dataclass
from typing import Callable, Iterator, Literal, Optional

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm

from common import UserError, datasets, reason, write_atomically

SCRIPT = pathlib.Path(__file__).stem
Discriminate = Callable[[Tensor], Tensor]  # images [B, C, H, W] -> logits [B]


# ----------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    # run
    seed: int = 1
    """Of the initial weights, the order of the data and every draw."""
    iterations: Optional[int] = None
    """Updates of G. Default: 200,000 [paper]."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """tf32: on a GPU, matrix products in TF32. bf16: the networks under autocast, also on a CPU; losses in fp32."""
    compile: bool = False
    """torch.compile the losses (a minute or more at the start)."""
    cuda_graph: bool = True
    """On a GPU: capture one iteration as a CUDA graph and replay it. Without effect on a CPU."""
    channels_last: bool = True
    """Keep images and weights in the channels-last layout, in which most convolutions are faster."""
    deterministic: bool = False
    """On a GPU: deterministic algorithms only, so that a resumed run repeats bit for bit (a CPU always does)."""
    run_dir: str = "runs"
    """The folder for run folders."""
    run_name: Optional[str] = None
    """The run folder's name. Default: {dataset}__{script}__{seed}__{time}."""
    resume: Optional[str] = None
    """A run folder or its checkpoint.pt: goes on there, with the arguments saved in it."""
    evaluate: Optional[str] = None
    """A run folder, checkpoint.pt or generator.pt: print its scores as one line of JSON; train nothing."""
    generate: Optional[str] = None
    """A run folder, checkpoint.pt or generator.pt: write --num-images generated images to --out; train nothing."""
    num_images: int = 64
    """With --generate: how many."""
    out: str = "generated"
    """With --generate: a folder for PNGs, or x.npy for one uint8 array [N, H, W, C]."""
    # data
    dataset: Literal["cifar10", "stl10", "folder"] = "cifar10"
    """folder: a directory (recursive) or .zip of images, centre-cropped to squares and resized to --image-size."""
    data_dir: str = "data"
    """Where data sets are kept and downloaded to; with folder, the directory or .zip itself."""
    image_size: Optional[int] = None
    """Height and width, a multiple of 8; at any but 32 the networks are those for STL-10. Default: 32; stl10: 48
    [paper]."""
    # model
    width: float = 1.0
    """Factor of the networks' channels: 0.25 makes a run on a CPU possible."""
    latent_dim: int = 128
    """Dimensions of z ~ U(-1, 1) [paper; the distribution: authors' code]."""
    # loss
    hinge: bool = True
    """Eq. 8 instead of Eq. 7 for D, by default with V_P's sign reversed, see --penalty [paper: table 3]."""
    neighbor_embedding: bool = True
    """V_R (Eq. 2-6) in the autoencoder's loss; without an autoencoder in G's, on z and G(z) alone (figure 7)."""
    gradient_matching: bool = True
    """G's loss is Eq. 13; without: its first term alone, or, without an autoencoder too, GAN's non-saturating loss
    (with --hinge -E D(G(z)) [ours])."""
    autoencoder: bool = True
    """The autoencoder's update and V_C of Eq. 7; without: figure 7's standard GAN."""
    distgan: bool = False
    """The baseline Dist-GAN (Tran, Bui and Cheung 2018): no neighbour embedding, no gradient matching."""
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
    alpha_schedule: Literal["constant", "falling"] = "constant"
    """falling: alpha goes linearly to 0 between T/2 and 3T/4, as in the authors' Dist-GAN code."""
    penalty: Optional[Literal["l2", "rms", "reversed"]] = None
    """V_P's norm of the logit's gradient: L2 (the formula) or root mean square over pixels (the authors' code). With
    reversed also a minus before V_P, as in the authors' hinge loss, so that D's slopes are drawn to 0, not to 1, at
    which D's scores saturate and all gradients of the hinge loss end. Default: rms; with --hinge reversed."""
    autoencoder_updates: Literal["both", "separate", "encoder"] = "both"
    """The autoencoder's update trains E and G (the paper; with one Adam for both updates of G), E and G with moments of
    G's own for it (separate), or E alone (the authors' code)."""
    # optimisation
    batch_size: int = 64
    """Images a mini-batch [paper]."""
    lr: float = 2e-4
    """Adam's learning rate [paper]."""
    lr_schedule: Literal["constant", "linear"] = "linear"
    """linear: times max(0, min(1 - t/T, 0.5)), as in the authors' ResNet code."""
    beta1: float = 0.0
    """Adam's first decay [authors' ResNet code; the paper has 0.5 for all networks]."""
    beta2: float = 0.9
    """Adam's second decay [paper]."""
    ema: float = 0.0
    """Decay of a moving average of G's weights, used for samples and scores; 0: off [paper]."""
    # logging
    log_every: int = 100
    """Iterations between lines in TensorBoard; 0: none."""
    sample_every: int = 5000
    """Iterations between grids of samples; 0: none."""
    eval_every: int = 10000
    """Iterations between evaluations (and one at the end); 0: none, and no Inception weights needed."""
    checkpoint_every: int = 1000
    """Iterations between checkpoints; 0: only at the end and on SIGINT or SIGTERM."""
    num_real: int = 10000
    """Real images for FID [authors' code]."""
    num_fake: int = 5000
    """Generated images for FID and the Inception Score [authors' code]."""
    inception_weights: Optional[str] = None
    """torch-fidelity's Inception weights; default: downloaded once."""


def resolve(args: Args) -> Args:
    """The arguments with every default filled in that depends on another, and Dist-GAN's switches."""
    if args.distgan:
        args = dataclasses.replace(args, neighbor_embedding=False, gradient_matching=False)
    defaults = {"iterations": 200_000, "image_size": 48 if args.dataset == "stl10" else 32,
                "lambda_p": 1.0 if args.autoencoder else 0.0, "penalty": "reversed" if args.hinge else "rms"}
    return dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})


# ------------------------------------------------------------------------------------------------------ networks
def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """Leaky ReLU whose second derivative autograd knows to be zero: F.leaky_relu's would send a gradient of zeros
    through all of D once more whenever a loss holds D's input gradient. (On a CPU sign and clamp take a tenth of the
    time of a comparison and torch.where.)"""
    return x * x.detach().sign().clamp_(min=slope)  # x times 1 or slope


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that always normalises a training batch by its own statistics, but moves the running ones only when
    told to: by G(z), never by G(E(x)), so that they describe what is sampled."""

    def forward(self, x: Tensor, update: bool) -> Tensor:
        if self.training and update:
            return super().forward(x)
        if self.training:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        count = self.num_batches_tracked  # of a moving average of G 0: that is taken as it is
        left = torch.where(count > 0, (1 - self.momentum) ** count, 0.0)  # of what they began with, 0 and 1
        mean, var = self.running_mean / (1 - left), ((self.running_var - left) / (1 - left)).clamp_min(0)
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


class UpBlock(nn.Module):
    """[B, a, s, s] -> [B, b, 2s, 2s]; nearest-neighbour up-sampling in both branches."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.norm1, self.norm2 = BatchNorm(a, momentum=0.001), BatchNorm(b, momentum=0.001)
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.Conv2d(b, b, 3, 1, 1)
        self.shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor, update_statistics: bool) -> Tensor:
        y = F.interpolate(F.relu(self.norm1(x, update_statistics)), scale_factor=2)
        y = self.conv2(F.relu(self.norm2(self.conv1(y), update_statistics)))
        return y + F.interpolate(self.shortcut(x), scale_factor=2)  # a 1x1 convolution may as well come before


class Generator(nn.Module):
    """z [B, latent_dim] -> images [B, 3, size, size] in [0, 1]; the notation is for size 32, width 1."""

    def __init__(self, args: Args):
        super().__init__()
        self.side = args.image_size // 8
        widths = (256, 256, 256, 256) if args.image_size == 32 else (512, 256, 128, 64)
        widths = [max(1, round(c * args.width)) for c in widths]
        self.linear = nn.Linear(args.latent_dim, widths[0] * self.side**2)
        self.blocks = nn.ModuleList(UpBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.norm = BatchNorm(widths[-1], momentum=0.001)
        self.last = nn.Conv2d(widths[-1], 3, 3, 1, 1)
        init_weights(self)

    def forward(self, z: Tensor, update_statistics: bool = False) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, self.side, self.side))  # [B, 256, 4, 4]
        x = x.contiguous(memory_format=memory_format(self.last.weight))
        for block in self.blocks:  # [B, 256, 8, 8], [B, 256, 16, 16], [B, 256, 32, 32]
            x = block(x, update_statistics)
        x = F.relu(self.norm(x, update_statistics))
        return torch.sigmoid(self.last(x).float())  # in fp32: bf16 has 256 steps in [0.5, 1], too few for a sigmoid


class Block(nn.Module):
    """[B, a, s, s] -> [B, b, s, s] or, with shrink, [B, b, s/2, s/2]: D's residual block, without normalisation.

    The authors shrink by a 1x1 convolution of stride 2 after the 3x3 one (and, in the first block, before the
    shortcut's). It reads every other position, so what comes before it is computed at those alone.
    """

    def __init__(self, a: int, b: int, shrink: bool, first: bool):
        super().__init__()
        self.first, self.stride = first, 2 if shrink else 1
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, 1, 1), nn.Conv2d(b, b, 3, self.stride, 1)
        self.shrink = nn.Conv2d(b, b, 1) if shrink else nn.Identity()
        shortcut = [(a, a), (a, b)] if first else [(a, b), (b, b)] if shrink else [(a, b)] if a != b else []
        self.shortcut = nn.Sequential(*(nn.Conv2d(c, d, 1) for c, d in shortcut))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x if self.first else leaky_relu(x, 0.0))
        y = self.shrink(self.conv2(leaky_relu(y, 0.0)))
        # not by strides: PyTorch 2.15's 1x1 convolution of stride 2 writes past its memory on a CPU (3 channels last)
        return y + self.shortcut(x[:, :, :: self.stride, :: self.stride])


class Discriminator(nn.Module):
    """images [B, 3, size, size] -> logits [B]; the score D(x) is their sigmoid. No normalisation."""

    def __init__(self, args: Args):
        super().__init__()
        widths = (128, 128, 128, 128) if args.image_size == 32 else (64, 128, 256, 512, 1024)
        shrinking = 2 if args.image_size == 32 else 4
        widths = [3] + [max(1, round(c * args.width)) for c in widths]
        self.blocks = nn.ModuleList(Block(a, b, shrink=i < shrinking, first=i == 0)
                                    for i, (a, b) in enumerate(zip(widths, widths[1:])))
        self.linear = nn.Linear(widths[-1], 1)
        init_weights(self)

    def features(self, x: Tensor) -> Tensor:
        """The last block's map after its ReLU, [B, 128, 8, 8]."""
        for block in self.blocks:  # 128 at 16x16, 128 at 8x8, 128, 128
            x = block(x)
        return leaky_relu(x, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).sum((2, 3)))[:, 0]


class DownBlock(nn.Module):
    """[B, a, s, s] -> [B, b, s/2, s/2] by average pooling: E's residual block. Its batch norm has no running
    statistics, since E is of use in training only."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.BatchNorm2d(c, track_running_stats=False) for c in (a, b))
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.Conv2d(b, b, 3, 1, 1)
        self.shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.leaky_relu(self.norm1(x), 0.2))
        y = self.conv2(F.leaky_relu(self.norm2(y), 0.2))
        return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))  # a 1x1 convolution may as well come after


class Encoder(nn.Module):
    """images [B, 3, size, size] -> latents [B, latent_dim]: the authors' encoder for CIFAR-10 at size 32, and theirs
    for STL-10 at others."""

    def __init__(self, args: Args):
        super().__init__()
        widths = (256, 256, 256, 256) if args.image_size == 32 else (64, 128, 256, 512)
        widths = [max(1, round(c * args.width)) for c in widths]
        self.first = nn.Conv2d(3, widths[0], 3, 1, 1)
        self.blocks = nn.Sequential(*(DownBlock(a, b) for a, b in zip(widths, widths[1:])))  # to 16x16, 8x8, 4x4
        self.norm = nn.BatchNorm2d(widths[-1], track_running_stats=False)
        self.linear = nn.Linear(widths[-1] * (args.image_size // 8) ** 2, args.latent_dim)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.blocks(self.first(x))), 0.2)
        return self.linear(x.flatten(1)).float()


def init_weights(network: nn.Module) -> None:
    """Xavier's uniform initialisation, zero biases [authors' code]."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def memory_format(weight: Tensor) -> torch.memory_format:
    """The layout that a network's weights [out, in, k, k] are in."""
    last = weight.shape[1] > 1 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


# -------------------------------------------------------------------------------------------------------- losses
def norm(v: Tensor) -> Tensor:
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
    """V_R = sum_ij p_ij log(p_ij / q_ij) (Eq. 2-6), in fp32.

    latents [n, d], images [n, C, H, W] generated from them: p over the latents, q over the images. Its gradient
    reaches both. Identical points give finite gradients.
    """
    with torch.autocast(latents.device.type, enabled=False):
        p, q = (pairwise_affinities(x.flatten(1)) for x in (latents, images))
        others = ~torch.eye(len(p), dtype=torch.bool, device=p.device)
        p, q = torch.where(others, p, 1.0), torch.where(others, q, 1.0)  # log 1 = 0 where i = j
        return (p * (p.log() - q.log())).sum()


def reconstruction_error(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||^2 (Eq. 1) as its mean over batch and pixels [authors' code], scalar."""
    return (x - y).square().mean()


def discriminator_loss(real: Tensor, fake: Tensor, reconstruction: Optional[Tensor] = None,
                       alpha: Tensor | float = 0.0, hinge: bool = False) -> Tensor:
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
                     penalty: str = "l2") -> Tensor:
    """V_P = E(||grad D(x^)|| - 1)^2 at x^ = mix real + (1 - mix) fake (below Eq. 8), of the logit; scalar.

    real, fake [B, C, H, W]; mix [B, 1, 1, 1] from U(0, 1). penalty: l2, or rms and reversed: the norm over sqrt(C H W).
    """
    point = mix * real + (1 - mix) * fake
    slope = norm(logit_and_gradient(discriminator, point)[1])
    if penalty != "l2":
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
        # The logit's derivative is at hand: this way it depends on x by it, not by going back through D once more.
        logit = logit.detach() + ((x - x.detach()) * gradient.detach()).flatten(1).sum(1)
        score = torch.sigmoid(logit.float())
        slope = score * (1 - score)
        inner = (gradient.float() * x.float()).flatten(1).sum(1)
        return score.mean(), (slope * norm(gradient)).mean(), (slope * inner.abs()).mean()

    with torch.no_grad():  # the real side has no way to G
        score_real, norm_real, inner_real = terms(real)
    score_fake, norm_fake, inner_fake = terms(fake)
    return (score_real - score_fake).abs(), (norm_real - norm_fake).square(), (inner_real - inner_fake).square()


def latent_data_distance(x: Tensor, y: Tensor, latent: Tensor, z: Tensor) -> Tensor:
    """Dist-GAN: (E[x - y] - w E[latent - z])^2 with w = sqrt(d_z / d_x), the means over batch and coordinates; x and y
    [B, ...] are D's features of reconstructed and generated images. Scalar."""
    weight = math.sqrt(z[0].numel() / x[0].numel())
    return ((x - y).mean() - weight * (latent - z).mean()).square()


# ---------------------------------------------------------------------------------------------------- train step
def init_networks(args: Args, device: torch.device) -> nn.ModuleDict:
    """E, G and D, drawn on the CPU from args.seed, so that every device starts from the same weights."""
    torch.manual_seed(args.seed)
    networks = nn.ModuleDict({"generator": Generator(args), "discriminator": Discriminator(args)})
    if args.autoencoder:
        networks["encoder"] = Encoder(args)
    if args.ema:
        networks["generator_ema"] = copy.deepcopy(networks["generator"]).requires_grad_(False).eval()
    return networks.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)


def init_optimizers(args: Args, networks: nn.ModuleDict) -> dict[str, torch.optim.Adam]:
    """One Adam a network. Adam takes a gradient's size away: with moments of its own (`reconstruction`) the
    autoencoder's update would move G as far as the generator's does, however small its gradient."""
    trained = {"discriminator": "discriminator", "generator": "generator"}
    if args.autoencoder:
        trained["encoder"] = "encoder"
        if args.autoencoder_updates == "separate":
            trained["reconstruction"] = "generator"
    device = next(networks.parameters()).device
    return {name: torch.optim.Adam(networks[network].parameters(), lr=torch.tensor(args.lr, device=device),
                                   betas=(args.beta1, args.beta2), fused=True,
                                   capturable=device.type == "cuda" and args.cuda_graph)
            for name, network in trained.items()}


def load_optimizer(optimizer: torch.optim.Adam, state: dict) -> None:
    """The saved moments, with this run's own switches and learning rate: a tensor on the device, as a graph needs."""
    kept = [{k: group[k] for k in ("lr", "capturable", "fused")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, kept):
        group.update(own)


def learning_rate(args: Args, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0."""
    return args.lr * (max(0.0, min(1 - iteration / args.iterations, 0.5)) if args.lr_schedule == "linear" else 1.0)


def reconstruction_share(args: Args, iteration: int) -> float:
    """Eq. 7's alpha in an iteration, counted from 0: constant, or falling to 0 between T/2 and 3T/4."""
    falling = min(max(3 - 4 * iteration / args.iterations, 0.0), 1.0)
    return args.alpha * (falling if args.alpha_schedule == "falling" else 1.0)


def draw_latents(n: int, args: Args, rng: torch.Generator, device: torch.device) -> Tensor:
    """z ~ U(-1, 1), [n, latent_dim]."""
    return torch.rand(n, args.latent_dim, generator=rng, device=device) * 2 - 1


def make_train_step(args: Args, networks: nn.ModuleDict, optimizers: dict[str, torch.optim.Adam],
                    rng: torch.Generator) -> Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """`train_step(images, alpha, finite)`: one iteration of Algorithm 1, in place; returns its losses, scalars.

    images: uint8 [B, 3, H, W]; alpha: scalar; finite: a bool that turns False, and stays so, when a loss is not
    finite. z and mix are drawn from `rng`. Nothing in it waits for the device.
    """
    device = next(networks.parameters()).device
    G, D, E = networks["generator"], networks["discriminator"], networks["encoder"] if args.autoencoder else None
    layout = torch.channels_last if args.channels_last else torch.contiguous_format

    # Autocast around each forward pass alone: losses stay in fp32, and the bf16 copies of the weights that a region
    # keeps end with it, so that none is older than the last update.
    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def generate(z: Tensor, update_statistics: bool = False) -> Tensor:
        with autocast():
            return G(z, update_statistics)

    def encode(x: Tensor) -> Tensor:
        with autocast():
            return E(x)

    def discriminate(x: Tensor) -> Tensor:
        with autocast():
            return D(x).float()

    def features(x: Tensor) -> Tensor:
        with autocast():
            return D.features(x).float()

    def autoencoder_objective(x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # Eq. 1
        latent = encode(x)
        reconstruction = generate(latent)
        if args.distgan:
            fake = generate(z)
            real_map, rebuilt_map, fake_map = (features(v) for v in (x, reconstruction, fake))
            error = reconstruction_error(real_map, rebuilt_map)
            distance = latent_data_distance(rebuilt_map, fake_map, latent, z)
            loss = error + args.lambda_r * distance
            return loss, {"autoencoder": loss, "reconstruction": error, "latent_data_distance": distance}
        error = reconstruction_error(x, reconstruction)
        if not args.neighbor_embedding:
            return error, {"autoencoder": error, "reconstruction": error}
        embedding = neighbor_embedding(torch.cat([latent, z]), torch.cat([reconstruction, generate(z)]))
        loss = error + args.lambda_r * embedding
        return loss, {"autoencoder": loss, "reconstruction": error, "neighbor_embedding": embedding}

    def reconstruct(x: Tensor) -> Tensor:
        return generate(encode(x))

    def discriminator_objective(x: Tensor, fake: Tensor, reconstruction: Optional[Tensor], mix: Tensor,
                                alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # Eq. 7, 8
        parts = [x, fake] if reconstruction is None else [x, fake, reconstruction]
        loss = discriminator_loss(*discriminate(torch.cat(parts)).split(len(x)), alpha=alpha, hinge=args.hinge)
        if not args.lambda_p:
            return loss, {"discriminator": loss}
        penalty = gradient_penalty(discriminate, x, fake, mix, args.penalty)
        # reversed: -V_P grows with slopes up to 1, at 32x32 an L2 norm of 55, which D stays far below
        loss = loss + (-args.lambda_p if args.penalty == "reversed" else args.lambda_p) * penalty
        return loss, {"discriminator": loss, "gradient_penalty": penalty}

    def generator_objective(x: Tensor, z: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # Eq. 13
        terms = {}
        if args.gradient_matching:
            score_term, norm_term, inner_term = gradient_matching(discriminate, x, fake)
            loss = score_term + args.lambda_m1 * norm_term + args.lambda_m2 * inner_term
            terms = {"score_matching": score_term, "norm_matching": norm_term, "inner_matching": inner_term}
        elif args.autoencoder:
            with torch.no_grad():
                real = torch.sigmoid(discriminate(x)).mean()
            loss = (real - torch.sigmoid(discriminate(fake)).mean()).abs()
        else:
            logit = discriminate(fake)
            loss = -torch.sigmoid(logit).mean() if args.hinge else F.softplus(-logit).mean()
        if args.neighbor_embedding and not args.autoencoder:
            embedding = neighbor_embedding(z, fake)
            loss = loss + args.lambda_r * embedding
            terms["neighbor_embedding"] = embedding
        return loss, {"generator": loss, **terms}

    if args.compile:  # the losses, not the loop: optimisers and draws stay outside
        options = {"fullgraph": True, "dynamic": False}
        autoencoder_objective = torch.compile(autoencoder_objective, **options)
        discriminator_objective = torch.compile(discriminator_objective, **options)
        generator_objective = torch.compile(generator_objective, **options)
        generate_fake, reconstruct = torch.compile(generate, **options), torch.compile(reconstruct, **options)
    else:
        generate_fake = generate

    def update(loss: Tensor, *names: str) -> None:
        chosen = [optimizers[name] for name in names]
        for optimizer in chosen:
            optimizer.zero_grad()
        loss.backward(inputs=[p for o in chosen for group in o.param_groups for p in group["params"]])
        for optimizer in chosen:
            optimizer.step()

    autoencoder = {"both": ("encoder", "generator"), "separate": ("encoder", "reconstruction"),
                   "encoder": ("encoder",)}[args.autoencoder_updates]

    # Operations of one iteration at batch 64, counted by torch's FlopCounterMode (2 a multiply-add): 3,227 GFLOP on
    # CIFAR-10, 2,709 on STL-10. Each forward pass serves every term that needs it until its network is updated.
    def train_step(images: Tensor, alpha: Tensor, finite: Tensor) -> dict[str, Tensor]:
        x = images.to(torch.float32, memory_format=layout) / 255
        z = draw_latents(len(x), args, rng, device)
        mix = torch.rand(len(x), 1, 1, 1, generator=rng, device=device)
        losses, reconstruction = {}, None
        D.requires_grad_(False)
        if args.autoencoder:
            loss, terms = autoencoder_objective(x, z)
            update(loss, *autoencoder)
            losses.update(terms)
            with torch.no_grad():
                reconstruction = reconstruct(x)
        fake = generate_fake(z, update_statistics=True)  # one forward pass for D's update and, its graph kept, for G's
        D.requires_grad_(True)
        loss, terms = discriminator_objective(x, fake.detach(), reconstruction, mix, alpha)
        update(loss, "discriminator")
        losses.update(terms)
        D.requires_grad_(False)
        loss, terms = generator_objective(x, z, fake)
        update(loss, "generator")
        losses.update(terms)
        if args.ema:
            averages, weights = (networks[n].state_dict() for n in ("generator_ema", "generator"))
            for name, average in averages.items():
                if average.is_floating_point():
                    average.lerp_(weights[name], 1 - args.ema)
        losses = {name: value.detach() for name, value in losses.items()}
        finite.logical_and_(torch.stack(list(losses.values())).isfinite().all())
        return losses

    return train_step


class GraphedStep:
    """train_step captured once as a CUDA graph and replayed: one launch an iteration instead of hundreds.

    The warm-up that a capture needs is undone, so that a run starts from the same weights, moments and draws as without
    a graph. A call copies the images into the buffer that the graph reads; `fixed`, what else train_step takes, must be
    the very tensors it was captured with. The losses returned are overwritten by the next call.
    """

    def __init__(self, train_step: Callable, networks: nn.ModuleDict, optimizers: dict[str, torch.optim.Adam],
                 rng: torch.Generator, images: Tensor, *fixed: Tensor):
        self.images = images.clone()

        def tensors() -> list[Tensor]:  # Adam makes its moments at the first step
            moments = [v for o in optimizers.values() for state in o.state.values() for v in state.values()]
            return [*networks.state_dict(keep_vars=True).values(), *fixed, *moments]

        before = {v.data_ptr(): v.detach().clone() for v in tensors()}
        draws = rng.get_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                train_step(self.images, *fixed)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for v in tensors():
                v.copy_(before[v.data_ptr()]) if v.data_ptr() in before else v.zero_()
        rng.set_state(draws)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(rng)
        with torch.cuda.graph(self.graph):
            self.losses = train_step(self.images, *fixed)

    def __call__(self, images: Tensor, *fixed: Tensor) -> dict[str, Tensor]:
        self.images.copy_(images)
        self.graph.replay()
        return self.losses


# ---------------------------------------------------------------------------------------------- data and samples
class Batches:
    """An endless stream of mini-batches of a data set, in a new order every pass; a pass's last one is filled up from
    the next pass. `position` and `rng_before` are all that a checkpoint needs."""

    def __init__(self, images: Tensor, batch_size: int, seed: int, device: torch.device):
        if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
            images = images.to(device)  # gathered there; a set too large for it is gathered in the host's memory
        self.images, self.batch_size, self.device = images, batch_size, device
        self.rng = torch.Generator().manual_seed(seed)
        self.shuffle()

    def shuffle(self) -> None:
        self.rng_before, self.position = self.rng.get_state(), 0
        self.order = torch.randperm(len(self.images), generator=self.rng).to(self.images.device)

    def next(self) -> Tensor:
        """uint8 [B, C, H, W]."""
        index = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        if len(index) < self.batch_size:
            missing = self.batch_size - len(index)
            self.shuffle()
            index, self.position = torch.cat([index, self.order[:missing]]), missing
        batch = self.images.index_select(0, index)
        if batch.device == self.device:
            return batch
        return batch.pin_memory().to(self.device, non_blocking=True)

    def state_dict(self) -> dict:
        return {"rng_before": self.rng_before, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.rng.set_state(state["rng_before"])
        self.shuffle()
        self.position = state["position"]


def fingerprint(images: Tensor) -> list[int]:
    """The number of images and a checksum of about a thousand of them, to know a data set again."""
    return [len(images), zlib.crc32(images[:: max(1, len(images) // 1000)].numpy().tobytes())]


@torch.no_grad()
def sample_images(generator: Generator, z: Tensor, precision: str) -> Tensor:
    """G(z) in evaluation mode as uint8 [n, 3, H, W]."""
    mode = generator.training
    generator.eval()
    with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
        x = generator(z)
    generator.train(mode)
    return (x * 255 + 0.5).clamp(0, 255).to(torch.uint8).contiguous()


def make_sampler(generator: Generator, args: Args, device: torch.device) -> Callable[[int], Tensor]:
    """A function from n to n images, uint8 [n, 3, H, W], whose draws are its own: the same for every evaluation of a
    seed, and none of training's (a generator takes 32 bits of its seed; these differ from training's in the highest).
    """
    rng = torch.Generator(device).manual_seed(2**31 + args.seed)

    def sample(n: int) -> Tensor:
        return sample_images(generator, draw_latents(n, args, rng, device), args.precision)

    return sample


# ------------------------------------------------------------------------------------------ arguments and files
def load_checkpoint(path: str | pathlib.Path) -> tuple[pathlib.Path, dict]:
    """The file and the contents of a checkpoint.pt or generator.pt, given the file or its run folder."""
    file = pathlib.Path(path)
    file = file / "checkpoint.pt" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}: give a run folder or its checkpoint.pt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes torch.load raise
        raise UserError(f"cannot read the checkpoint {file}: {reason(error)}") from None
    if not isinstance(checkpoint, dict) or not {"script", "args", "resolved"} <= checkpoint.keys():
        raise UserError(f"{file} is not a checkpoint of {SCRIPT}.py")
    if checkpoint["script"] != SCRIPT:
        raise UserError(f"{file} is a checkpoint of {checkpoint['script']}.py, not of {SCRIPT}.py")
    return file, checkpoint


# What may differ from a checkpoint's run: where things are and how often one looks, nothing that training computes.
FREE = {"device", "compile", "cuda_graph", "deterministic", "run_dir", "run_name", "resume", "evaluate", "generate",
        "num_images", "out", "data_dir", "log_every", "sample_every", "eval_every", "checkpoint_every", "num_real",
        "num_fake", "inception_weights"}


def parse_args(argv: Optional[list[str]] = None) -> tuple[Args, Args, Optional[pathlib.Path], Optional[dict]]:
    """Arguments as given and resolved, checked; with --resume, --evaluate or --generate also the checkpoint's path and
    contents. Such a run takes the saved arguments; one given by hand that would change it must agree with them."""
    def parse(default: Args) -> Args:
        return tyro.cli(Args, args=argv, default=default, description=__doc__)

    args, given, file, checkpoint = parse(Args()), None, None, None
    paths = [p for p in (args.resume, args.evaluate, args.generate) if p is not None]
    if len(paths) > 1:
        raise UserError("--resume, --evaluate and --generate exclude each other")
    if paths:
        file, checkpoint = load_checkpoint(paths[0])
        names = {f.name for f in dataclasses.fields(Args)}
        if args.resume and (odd := sorted(names ^ checkpoint["resolved"].keys())):
            raise UserError(f"{file} is of a {SCRIPT}.py with other arguments ({', '.join(odd)}): go on with that one")
        # the resolved values, so that a default changed since does not change a run half-way
        saved = Args(**{k: v for k, v in checkpoint["resolved"].items() if k in names})
        args = parse(saved)
        free = set(FREE)
        if saved.lr_schedule == "constant" and saved.alpha_schedule == "constant":
            free.add("iterations")  # no schedule depends on the planned number: a run can be made longer
        if not args.resume:
            free |= {"seed", "dataset", "precision", "channels_last"}
        differing = [f"--{k.replace('_', '-')} ({getattr(saved, k)} in the checkpoint, {getattr(args, k)} here)"
                     for k in sorted(names - free) if getattr(args, k) != getattr(saved, k)]
        if differing:
            raise UserError(f"{paths[0]} is of another setting: {', '.join(differing)}; "
                            "leave these flags out, or start a new run without the checkpoint")
        if args.resume and "networks" not in checkpoint:
            raise UserError(f"{file} holds G alone: give --resume the run folder or its checkpoint.pt")
        if args.resume and args.iterations < checkpoint["iteration"]:
            raise UserError(f"--iterations is {args.iterations}: {file} is already at {checkpoint['iteration']}")
        given = Args(**{k: v for k, v in checkpoint["args"].items() if k in names})
        given = dataclasses.replace(given, **{k: getattr(args, k) for k in free
                                              if getattr(args, k) != getattr(saved, k)})
    # a flag was given by hand if turning its default around does not turn its value around
    turned = parse(dataclasses.replace(args, neighbor_embedding=not args.neighbor_embedding,
                                       gradient_matching=not args.gradient_matching))
    for name in ("neighbor_embedding", "gradient_matching"):
        if args.distgan and getattr(turned, name) == getattr(args, name):
            raise UserError(f"--distgan has no {name.replace('_', ' ')}: leave --[no-]{name.replace('_', '-')} out")
    if args.distgan and not args.autoencoder:
        raise UserError("--distgan needs its autoencoder: leave --no-autoencoder out")
    resolved = resolve(args)
    for name, low in (("seed", 0), ("iterations", 1), ("batch_size", 2), ("latent_dim", 1), ("image_size", 16),
                      ("log_every", 0), ("sample_every", 0), ("eval_every", 0), ("checkpoint_every", 0),
                      ("num_real", 2), ("num_fake", 10), ("num_images", 1)):
        if getattr(resolved, name) < low:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(resolved, name)}: it must be {low} or more")
    for name in ("lambda_p", "lambda_r", "lambda_m1", "lambda_m2", "lr", "width"):
        if not (0 <= getattr(resolved, name) < math.inf) or name in ("lr", "width") and not getattr(resolved, name):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(resolved, name)}: it must be a number "
                            f"{'above' if name in ('lr', 'width') else 'from'} 0")
    for name in ("alpha", "ema", "beta1", "beta2"):
        if not 0 <= getattr(resolved, name) < 1:
            raise UserError(f"--{name} is {getattr(resolved, name)}: it must be at least 0 and below 1")
    idle = {"lambda_m1": not resolved.gradient_matching, "lambda_m2": not resolved.gradient_matching,
            "lambda_r": not (resolved.neighbor_embedding or resolved.distgan), "alpha": not resolved.autoencoder,
            "alpha_schedule": not resolved.autoencoder, "autoencoder_updates": not resolved.autoencoder}
    for name, unused in idle.items():
        if unused and not paths and getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name.replace('_', '-')} has no effect on this loss: leave it out")
    if resolved.seed >= 2**31:
        raise UserError(f"--seed is {resolved.seed}: it must be below 2**31")
    if resolved.image_size % 8:
        raise UserError(f"--image-size is {resolved.image_size}: it must be a multiple of 8")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    return given or args, resolved, file, checkpoint


def can_compile() -> bool:
    """Whether torch.compile finds what it needs on a CPU: a C++ compiler and Python's headers."""
    compilers = [c for c in (os.environ.get("CXX"), "g++", "clang++") if c]
    headers = pathlib.Path(sysconfig.get_path("include")) / "Python.h"
    return any(map(shutil.which, compilers)) and headers.exists()


class Run:
    """A run folder: args.json, metrics.jsonl, TensorBoard's events, samples/, checkpoint.pt and generator.pt."""

    def __init__(self, args: Args, resolved: Args, file: Optional[pathlib.Path]):
        given = dataclasses.replace(args, resume=None)  # how this process began is no part of the run
        self.args, self.records = resolved, []  # records: the lines of metrics.jsonl
        self.head = {"script": SCRIPT, "args": dataclasses.asdict(given),
                     "resolved": {**dataclasses.asdict(resolved), "resume": None}}
        if file is None:
            name = args.run_name or f"{args.dataset}__{SCRIPT}__{args.seed}__{int(time.time())}"
            self.folder = pathlib.Path(args.run_dir) / name
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError:
                raise UserError(f"{self.folder} exists: choose another --run-name, or {self.advice()}") from None
            except OSError as error:
                raise UserError(f"cannot make the run folder {self.folder}: {error.strerror}; "
                                "choose another --run-dir") from None
        else:
            self.folder = file.parent
        self.lock = os.open(self.folder, os.O_RDONLY)  # let go by the system when the process ends, however it ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {self.folder}") from None
        except OSError:
            pass  # a file system without locks

    def advice(self) -> str:
        resume = (self.folder / "checkpoint.pt").exists()
        return f"go on with --resume {self.folder}" if resume else "remove the folder: it has no checkpoint yet"

    def start(self, records: list[dict], iteration: int) -> None:
        """Write args.json, bring metrics.jsonl and TensorBoard back to `iteration`."""
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        setting = {**self.head, "versions": versions}
        self.write("args.json", lambda p: p.write_text(json.dumps(setting, indent=2) + "\n"))
        self.records = records
        self.write("metrics.jsonl", lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in records)))
        (self.folder / "samples").mkdir(exist_ok=True)
        self.writer = SummaryWriter(str(self.folder), purge_step=iteration + 1)

    def write(self, name: str, write: Callable[[pathlib.Path], None]) -> None:
        write_atomically(self.folder / name, write, f"make room and {self.advice()}; ")

    def log_scores(self, record: dict) -> None:
        """A line of metrics.jsonl and its points in TensorBoard."""
        self.records.append(record)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        self.writer.add_scalar("metrics/fid", record["fid"], record["iteration"])
        self.writer.add_scalar("metrics/is", record["is_mean"], record["iteration"])

    def save(self, networks: nn.ModuleDict, state: dict) -> None:
        """checkpoint.pt: everything that training goes on from; generator.pt: G (its average with --ema) alone."""
        self.writer.flush()
        contents = {**self.head, **state, "networks": networks.state_dict(), "records": self.records}
        self.write("checkpoint.pt", lambda p: torch.save(contents, p))
        generator = networks["generator_ema" if self.args.ema else "generator"]
        contents = {**self.head, "iteration": state["iteration"], "generator": generator.state_dict()}
        self.write("generator.pt", lambda p: torch.save(contents, p))


# --------------------------------------------------------------------------------------------------------- main
def choose_device(args: Args) -> torch.device:
    """The device, with PyTorch's switches set for args.precision and args.deterministic."""
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        allow = args.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
        torch.backends.cudnn.benchmark = not args.deterministic
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
    return device


def load_generator(args: Args, checkpoint: dict, device: torch.device) -> Generator:
    """G of a checkpoint.pt (its average with --ema) or generator.pt."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    generator = Generator(args).to(device, memory_format=layout)
    if "generator" in checkpoint:
        state = checkpoint["generator"]
    else:
        prefix = "generator_ema." if args.ema else "generator."
        state = {k.removeprefix(prefix): v for k, v in checkpoint["networks"].items() if k.startswith(prefix)}
    with fits():
        generator.load_state_dict(state)
    return generator


@contextlib.contextmanager
def fits() -> Iterator[None]:
    """Whatever loading a checkpoint raises when its contents are not this script's, as one line."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint does not fit this {SCRIPT}.py (has it changed since?): {text}") from None


def write_images(sample: Callable[[int], Tensor], args: Args) -> None:
    """--generate: args.num_images PNGs in the folder args.out, or, if it ends in .npy, one uint8 array [N, H, W, C]."""
    out = pathlib.Path(args.out)
    array = out.suffix == ".npy"
    try:
        (out.parent if array else out).mkdir(parents=True, exist_ok=True)
        if not array and any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another --out")
        if array:
            open(out, "ab").close()  # whether it can be written, before the work
        images = []
        for start in tqdm(range(0, args.num_images, 100), "generating", dynamic_ncols=True):
            batch = sample(min(100, args.num_images - start)).permute(0, 2, 3, 1).cpu().numpy()
            if array:
                images.append(batch)
            else:
                for i, image in enumerate(batch, start):
                    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(out / f"{i:06d}.png")
        if array:
            np.save(out, np.concatenate(images))
    except OSError as error:
        raise UserError(f"cannot write {out}: {reason(error)}; choose another --out") from None
    print(f"{args.num_images} images in {out}")


class Interrupted(Exception):
    """A signal came during an evaluation: it is left, and done when the run goes on."""


def train(run: Run, args: Args, checkpoint: Optional[dict], images: Tensor, evaluator, device: torch.device,
          stop: list[int]) -> tuple[bool, str]:
    """Train to args.iterations, or until a signal is in `stop`; whether that is finished, and the scores in words."""
    networks = init_networks(args, device)
    optimizers = init_optimizers(args, networks)
    batches = Batches(images, args.batch_size, args.seed, device)
    rng = torch.Generator(device).manual_seed(args.seed)
    start, seconds, evaluation_due, records = 0, 0.0, False, []
    if checkpoint is not None:
        if checkpoint["device"] != device.type:
            raise UserError(f"the run began on {checkpoint['device']} and its draws go on only there: "
                            f"give --device {checkpoint['device']}")
        if checkpoint["data"] != fingerprint(images):
            raise UserError(f"{args.data_dir} does not hold the images that the run began with "
                            f"({checkpoint['data'][0]} then, {len(images)} now): give --data-dir")
        with fits():
            networks.load_state_dict(checkpoint["networks"])
            for name, optimizer in optimizers.items():
                load_optimizer(optimizer, checkpoint["optimizers"][name])
            batches.load_state_dict(checkpoint["batches"])
            rng.set_state(checkpoint["rng"])
            start, seconds, records = checkpoint["iteration"], checkpoint["seconds"], checkpoint["records"]
            evaluation_due = checkpoint["evaluation_due"]
    run.start(records, start)
    alpha, finite = torch.tensor(args.alpha, device=device), torch.tensor(True, device=device)
    generator = networks["generator_ema" if args.ema else "generator"]
    noise_rng = torch.Generator().manual_seed(2**31 + args.seed)
    fixed_noise = draw_latents(64, args, noise_rng, torch.device("cpu")).to(device)
    train_step = make_train_step(args, networks, optimizers, rng)
    if args.cuda_graph and device.type == "cuda" and start < args.iterations:
        batch = images[: args.batch_size].to(device)
        train_step = GraphedStep(train_step, networks, optimizers, rng, batch, alpha, finite)

    def check_finite(iteration: int, weights: bool = False) -> None:
        good = finite
        if weights:  # the last update can spoil them after its loss was taken
            good = torch.stack([finite, *(v.isfinite().all() for v in networks.state_dict().values())]).all()
        if not good.item():
            saved = run.folder / "checkpoint.pt"
            last = f"the last good checkpoint is {saved}" if saved.exists() else "no checkpoint was written yet"
            raise UserError(f"training diverged: a loss or weight is not finite by iteration {iteration}; {last}; "
                            "try a smaller --lr")

    def save(iteration: int) -> None:
        check_finite(iteration, weights=True)
        run.save(networks, {"iteration": iteration, "seconds": seconds + time.perf_counter() - begin,
                            "optimizers": {n: o.state_dict() for n, o in optimizers.items()},
                            "batches": batches.state_dict(), "rng": rng.get_state(), "device": device.type,
                            "data": fingerprint(images), "evaluation_due": evaluation_due})

    def evaluate(iteration: int) -> bool:
        """Score G; whether that was left undone for a signal."""
        sample = make_sampler(generator, args, device)

        def sample_or_stop(n: int) -> Tensor:
            if stop:
                raise Interrupted
            return sample(n)

        check_finite(iteration)
        try:
            scores = evaluator.score(sample_or_stop, args.num_fake)
        except Interrupted:
            return True
        run.log_scores({"iteration": iteration, **scores, "seconds": round(seconds + time.perf_counter() - begin, 2),
                        "images_per_second": round(rate, 2)})
        return False

    begin = clock = time.perf_counter()
    counted, rate = start, 0.0

    def measure(iteration: int) -> None:
        """Images a second since the clock was last set; waits for the device."""
        nonlocal counted, clock, rate
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if iteration > counted:
            rate = (iteration - counted) * args.batch_size / max(now - clock, 1e-9)
        counted, clock = iteration, now

    def due(every: int, iteration: int) -> bool:
        return every > 0 and (iteration % every == 0 or iteration == args.iterations)

    with run.writer, tqdm(total=args.iterations, initial=start, desc=SCRIPT, unit="it", mininterval=0.5,
                          dynamic_ncols=True, postfix="compiling" if args.compile else None) as bar:
        if evaluation_due := evaluation_due and evaluator is not None:
            evaluation_due = evaluate(start)
            save(start)
        iteration, last = start, start == args.iterations or evaluation_due
        while not last:
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"].fill_(learning_rate(args, iteration))
            alpha.fill_(reconstruction_share(args, iteration))
            losses = train_step(batches.next(), alpha, finite)
            iteration += 1
            bar.update()
            last = iteration == args.iterations or bool(stop)
            if due(args.log_every, iteration):
                values = dict(zip(losses, torch.stack(list(losses.values())).tolist()))  # waits for the device
                measure(iteration)
                check_finite(iteration)
                for name, value in values.items():
                    run.writer.add_scalar(f"losses/{name}", value, iteration)
                run.writer.add_scalar("charts/images_per_second", rate, iteration)
                bar.set_postfix({short: f"{values[name]:.3f}" for short, name in
                                 (("AE", "autoencoder"), ("D", "discriminator"), ("G", "generator")) if name in values},
                                refresh=False)
            sample, score, keep = (due(every, iteration) for every in
                                   (args.sample_every, args.eval_every, args.checkpoint_every))
            if sample or score or keep or last:  # not training: the clock of images a second stands still
                measure(iteration)
                if sample:
                    grid = make_grid(sample_images(generator, fixed_noise, args.precision), 8).cpu()
                    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
                    picture.save(run.folder / f"samples/{iteration:08d}.png")
                    run.writer.add_image("images/samples", grid, iteration)
                if score:
                    evaluation_due = evaluate(iteration)
                if keep or last or evaluation_due:
                    save(iteration)
                last = last or evaluation_due
                clock = time.perf_counter()
    finished = iteration == args.iterations and not evaluation_due
    if not run.records:
        return finished, "no evaluation yet" if args.eval_every else "no scores, --eval-every 0"
    scores = run.records[-1]
    return finished, (f"FID {scores['fid']:.2f}, IS {scores['is_mean']:.2f} ± {scores['is_std']:.2f} "
                      f"at iteration {scores['iteration']}")


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # until training begins; SIGINT too, which a shell's & has ignored
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    given, args, file, checkpoint = parse_args()
    if args.compile and not can_compile():
        print(f"{SCRIPT}.py: no C++ compiler or no Python headers: training uncompiled "
              "(Debian, Ubuntu: apt install g++ python3-dev)", file=sys.stderr)
        args = dataclasses.replace(args, compile=False)
    device = choose_device(args)
    if args.generate:
        write_images(make_sampler(load_generator(args, checkpoint, device), args, device), args)
        return 0
    run = None if args.evaluate else Run(given, args, file)
    try:
        images = datasets.load(args.dataset, args.data_dir, args.image_size)
        if run and len(images) < args.batch_size:
            raise UserError(f"{args.data_dir} has {len(images)} images, too few for --batch-size {args.batch_size}")
        evaluator = None
        if args.evaluate or args.eval_every:
            from common import metrics  # its Inception takes seconds to import
            evaluator = metrics.Evaluator(images, args.num_real, args.inception_weights, device)
    except BaseException:
        if run and file is None:
            with contextlib.suppress(OSError):
                run.folder.rmdir()  # nothing was trained: leave no empty folder
        raise
    if args.evaluate:
        sample = make_sampler(load_generator(args, checkpoint, device), args, device)
        print(json.dumps({"iteration": checkpoint["iteration"], **evaluator.score(sample, args.num_fake)}))
        return 0
    if checkpoint is not None:
        checkpoint = load_checkpoint(file)[1]  # another process may have written it before this one had the lock
    stop: list[int] = []  # the signal, if one came: the iteration is finished and everything saved
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    finished, scores = train(run, args, checkpoint, images, evaluator, device, stop)
    if not finished:
        print(f"{run.folder}: stopped ({scores}); go on with --resume {run.folder}")
        return 128 + stop[0]
    print(f"{run.folder}: {args.iterations} iterations, {scores}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before main
        sys.exit(128 + signal.SIGINT)
    except torch.OutOfMemoryError:
        print(f"{SCRIPT}.py: error: out of GPU memory: lower --batch-size or --width", file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError) as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
