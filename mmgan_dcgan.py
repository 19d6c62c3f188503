"""MMGAN on DCGAN, after "MMGAN: Manifold-Matching Generative Adversarial Network" (Park et al. 2018): table I and
figure 3 (a)-(e) and (g), with every kernel, without kernel, without correlation regulariser, and plain DCGAN.

    python mmgan_dcgan.py                                # MNIST, RBF kernel: table I, the paper's 32.4%
    python mmgan_dcgan.py --dataset cifar10              # figure 3 (g): the paper's Inception Score of 6.96
    python mmgan_dcgan.py --dataset celeba --beta 0      # table I, CelebA without R_G
    python mmgan_dcgan.py --baseline --generator-steps 2 # table I: DCGAN on the same networks
    python mmgan_dcgan.py --dataset folder --data-dir photos --width 0.25 --iterations 20000 --eval-every 0  # photos

A generator G and a discriminator D. D gives each image a feature vector, and MMGAN takes those of real and of generated
images for two manifolds. Each is a sphere, in a kernel's Hilbert space, with a centroid and a radius (Eq. 3, 4, 7). An
iteration draws one mini-batch x and one z:

    D      tells x from G(z), and keeps the two spheres apart (Eq. 10)
           moving averages of both spheres take in the mini-batch's (Algorithm 1)
    G      brings the two averaged spheres together (Eq. 5, 8), and keeps its images' features uncorrelated (R_G, Eq. 9)

What to expect: docs/mmgan.md. In brackets behind a flag: where its default comes from.
"""
from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import pathlib
import time
from dataclasses import dataclass
from typing import Callable, Literal, NamedTuple, Optional

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread of PyTorch's that waits leaves its core to others

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import datasets, training
from common.training import autocast, draw_seed, due

SCRIPT = pathlib.Path(__file__).stem
Terms = dict[str, Tensor]  # by name, what goes to TensorBoard: scalars, or a number, or what has a mean


# ------------------------------------------------------------------------------ arguments
@dataclass
class Args:
    # used most
    dataset: Literal["mnist", "celeba", "cifar10", "folder"] = "mnist"
    """What to train on. folder: images of your own, cut to squares and resized to --image-size."""
    data_dir: str = "data"
    """Where data sets are kept and downloaded to.
    With --dataset folder: the directory of the images, which may have subfolders, or their .zip."""
    width: float = 1.0
    """Factor of the networks' channels: 0.25 makes a run on a CPU possible."""
    iterations: Optional[int] = None
    """Mini-batches trained on. Default: --epochs passes over the data set."""
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
    """Height and width. Default: mnist 28, celeba 64 [DCGAN's code], else 32 [ours]."""

    # model
    latent_dim: int = 100
    """Dimensions of z ~ U(-1, 1) [DCGAN's code]."""
    ema: float = 0.0
    """Decay of a moving average of G's weights, used for samples and scores; 0: off [paper]."""

    # loss
    kernel: Literal["auto", "none", "linear", "poly", "rbf", "exp"] = "auto"
    """The kernel in whose space the features' two spheres lie (K of Eq. 7, 8).
    none: the features' own space (Eq. 4, 5). auto: rbf; celeba: exp [paper, figure 3]."""
    kernel_width: Optional[float] = None
    """The kernel's width w [the paper gives none].
    Default: a moving average of the mean of two spreads, the real features' and all features' [ours].
    So K stays above 0 even where the centroids lie far apart."""
    alpha: float = 1.0
    """Weight of the spheres' difference of radii, beside their centres' distance (Eq. 8) [paper]."""
    beta: Optional[float] = None
    """Weight of the correlation regulariser R_G, which keeps generated images different (Eq. 9).
    0: the paper's "No R_G". Default: 1; cifar10: 0.1 [paper]; folder: 0.1 [ours]."""
    delta: float = 0.9
    """Decay of the moving averages of the spheres' centres and radii [paper: 0.9 or greater]."""
    manifold_scale: Literal["one", "width"] = "one"
    """Factor of the spheres' distance L_G (Eq. 8) in G's loss. one: 1 [paper].
    width: the kernel's width, so that distances have the features' unit, as in feature matching [ours]."""
    manifold_in_discriminator: bool = True
    """D's loss keeps the spheres apart: it has -L_G, whatever --manifold-scale [paper: Eq. 6, 10].
    Without: L_G is G's alone."""
    correlation_in_discriminator: bool = False
    """D's loss has -R_G too [Eq. 10]. Not advised: D then learns only to see all generated images as equal.
    Without: G's alone [paper: section V]."""
    baseline: bool = False
    """Plain DCGAN: no manifolds, G's loss is -E log D(G(z))."""
    generator_steps: int = 1
    """Updates of G an iteration: Algorithm 1 has 1, DCGAN's code 2."""

    # optimisation
    epochs: Optional[int] = None
    """Passes over the data set, where --iterations is not given. Default: 25 [original's code]."""
    batch_size: int = 64
    """Images a mini-batch, over all processes of torchrun [original's code]."""
    lr: float = 2e-4
    """Adam's learning rate [original's code]."""
    beta1: float = 0.5
    """Adam's first decay [original's code]."""
    beta2: float = 0.999
    """Adam's second decay [original's code]."""

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
    """Real images for FID. Default: 10,000 [ours, as in GN-GAN], or all if there are fewer."""
    num_fake: int = 5000
    """Generated images for FID [ours, as in GN-GAN]."""
    num_is: Optional[int] = None
    """Generated images for the Inception Score. Default: --num-fake; cifar10: 50,000 [Improved GAN's paper]."""
    inception_weights: Optional[str] = None
    """A file of torch-fidelity's Inception weights. Default: downloaded once."""


def resolve(args: Args) -> Args:
    """Fill in, in place, each default that depends on another flag; iterations by epochs: see `main`."""
    if args.iterations is None and args.epochs is None:
        args.epochs = 25
    if args.image_size is None:
        args.image_size = {"mnist": 28, "celeba": 64}.get(args.dataset, 32)
    if args.num_is is None and args.dataset == "cifar10":
        args.num_is = 50_000
    if args.kernel == "auto":
        args.kernel = "exp" if args.dataset == "celeba" else "rbf"
    if args.beta is None:
        args.beta = 1.0 if args.dataset in ("mnist", "celeba") else 0.1
    return args


# ------------------------------------------------------------------------------- networks
class BatchNorm(nn.Module):
    """Batch norm on [B, C, H, W]. A training batch is normalised by its own statistics.

    The running statistics are moved only if told to: once an iteration, however often G is run.
    They begin at 0, and evaluation divides them by `running_weight`, the weight of all batches so
    far (bias correction, as in Adam).
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


def sides(args: Args) -> list[int]:
    """Sides of the maps from the smallest to the image's, each half of the next, rounded up: 2, 4, 7, 14, 28."""
    found = [args.image_size]
    for _ in range(4):
        found.insert(0, -(-found[0] // 2))
    return found


class Generator(nn.Module):
    """z [B, latent_dim] -> images [B, C, size, size] in [-1, 1]; the notation is for size 32, width 1."""

    def __init__(self, args: Args):
        super().__init__()
        self.bf16 = args.precision == "bf16"
        self.side, *larger = sides(args)
        widths = [max(1, round(c * args.width)) for c in (512, 256, 128, 64)]
        channels = 1 if args.dataset == "mnist" else 3
        self.linear = nn.Linear(args.latent_dim, widths[0] * self.side**2, bias=False)
        self.norms = nn.ModuleList(BatchNorm(c) for c in widths)
        self.ups = nn.ModuleList()
        for i, (a, b) in enumerate(zip(widths, [*widths[1:], channels])):
            last = i == len(widths) - 1  # the others come before batch norm, which has a bias
            odd = larger[i] % 2
            self.ups.append(nn.ConvTranspose2d(a, b, 5, stride=2, padding=2, output_padding=1 - odd, bias=last))
        init_weights(self)

    @autocast
    def forward(self, z: Tensor, update_statistics: bool = False) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, self.side, self.side))  # [B, 512, 2, 2]
        x = x.contiguous(memory_format=torch.channels_last)
        for norm, up in zip(self.norms, self.ups):  # to 256 at 4x4, 128 at 8x8, 64 at 16x16, C at 32x32
            x = up(F.relu(norm(x, update_statistics)))
        return torch.tanh(x.float())  # in fp32: bf16 has too few steps near 1


class Discriminator(nn.Module):
    """images [B, C, size, size] -> logits [B]; the score D(x) is their sigmoid.

    Its batch norm always takes the batch's own statistics.
    """

    def __init__(self, args: Args):
        super().__init__()
        self.bf16 = args.precision == "bf16"
        widths = [max(1, round(c * args.width)) for c in (64, 128, 256, 512)]
        channels = 1 if args.dataset == "mnist" else 3
        self.first = nn.Conv2d(channels, widths[0], 5, stride=2, padding=2)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, stride=2, padding=2, bias=False)
                                   for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, track_running_stats=False) for c in widths[1:])
        self.linear = nn.Linear(widths[-1] * sides(args)[0] ** 2, 1)
        init_weights(self)

    @autocast
    def features(self, x: Tensor) -> Tensor:
        """The last convolution's map after its activation, [B, 512, 2, 2]."""
        x = F.leaky_relu(self.first(x), 0.2)  # [B, 64, 16, 16]
        for conv, norm in zip(self.convs, self.norms):  # 128 at 8x8, 256 at 4x4, 512 at 2x2
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return x.float()

    @autocast
    def logit(self, features: Tensor) -> Tensor:
        """Logits [B] of the maps from `features`."""
        return self.linear(features.flatten(1))[:, 0].float()

    def forward(self, x: Tensor) -> Tensor:
        return self.logit(self.features(x))


def init_weights(network: nn.Module) -> None:
    """Weights N(0, 0.02^2), zero biases [DCGAN's code, which cuts D's convolutions at two deviations]."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------- losses
def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of points a and b [..., d], [...]; finite gradient where they coincide."""
    return ((a - b).square().sum(-1) + 1e-12).sqrt()


def kernel(a: Tensor, b: Tensor, name: str, width: Tensor | float) -> Tensor:
    """K(a, b) of points a and b [..., d], [...] [offset and degree of poly: ours].

    Distances are norms of differences: inner products would lose the last digits of near points.
    """
    if name == "linear":  # no matrix product, which could be in TF32
        return (a * b).sum(-1)
    if name == "poly":
        return ((a * b).sum(-1) / width + 1) ** 3
    if name == "rbf":
        return torch.exp(-(a - b).square().sum(-1) / (2 * width))
    if name == "exp":
        return torch.exp(-distance(a, b) / (2 * width))
    raise ValueError(f"no kernel {name}")


def squared_kernel_distance(a: Tensor, b: Tensor, name: str, width: Tensor | float) -> Tensor:
    """|phi(a) - phi(b)|^2 of points a and b [..., d], [...]; phi maps to the Hilbert space of K."""
    if name == "rbf":  # K(a, a) = 1
        return 2 - 2 * kernel(a, b, name, width)
    return kernel(a, a, name, width) - 2 * kernel(a, b, name, width) + kernel(b, b, name, width)


class Manifold(NamedTuple):
    """The sphere that stands for a set of features [n, d]: a centroid [d] and a radius, a scalar."""
    centroid: Tensor
    radius: Tensor


def manifold(features: Tensor, name: str, width: Tensor | float = 1.0) -> Manifold:
    """The sphere of features [n, d]: c = mean_i s_i (Eq. 3), and the mean over i of |c - s_i| (no
    kernel: Eq. 4) or of |phi(c) - phi(s_i)|^2 (Eq. 7)."""
    centroid = features.mean(0)
    if name == "none":
        return Manifold(centroid, distance(features, centroid).mean())
    return Manifold(centroid, squared_kernel_distance(features, centroid, name, width).mean())


def manifold_distance(real: Manifold, fake: Manifold, alpha: float, name: str,
                      width: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The two terms of L_G, scalars: how far the centroids are from each other, and the radii.

    |c_Y - c_X| and |l_Y - l_X| (no kernel: Eq. 5, which has no alpha), or |phi(c_Y) - phi(c_X)|^2
    and alpha |l_Y - l_X| (Eq. 8).
    """
    radius_difference = (real.radius - fake.radius).abs()
    if name == "none":
        return distance(real.centroid, fake.centroid), radius_difference
    centroid_distance = squared_kernel_distance(real.centroid, fake.centroid, name, width)
    return centroid_distance, alpha * radius_difference


def correlation_penalty(features: Tensor) -> Tensor:
    """R_G = |I - A|_F (Eq. 9), scalar; A: the correlations between samples of features [n, d] over d.

    A sample that is constant over its features, and so has no correlation, counts as uncorrelated.
    """
    features = features.double()  # as everywhere, no matrix product in TF32
    centred = features - features.mean(1, keepdim=True)
    unit = centred / (centred.square().sum(1, keepdim=True) + 1e-12).sqrt()
    others = ~torch.eye(len(features), dtype=torch.bool, device=features.device)  # diagonal of I - A: 0
    return ((unit @ unit.mT * others).square().sum() + 1e-12).sqrt().float()


def typical_width(features: Tensor, name: str) -> Tensor:
    """The spread of features [n, d], without gradient; scalar.

    Their mean squared distance (rbf) or distance (exp) from their centroid, or their mean squared
    norm (poly). With this width K at the typical distance is e^-1/2 = 0.61 (rbf, exp).
    """
    features = features.detach()
    if name == "poly":
        return features.square().sum(1).mean() + 1e-12  # dead units: K stays finite
    lengths = distance(features, features.mean(0))
    if name == "rbf":
        return lengths.square().mean()
    if name == "exp":
        return lengths.mean()
    raise ValueError(f"no width for kernel {name}")


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))) (Eq. 1) of logits [B]; scalar."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


# ----------------------------------------------------------------------------- objectives
class Averages(NamedTuple):
    """What L_G is of: both manifolds, averaged over mini-batches, and the kernel's width, scalar."""
    real: Manifold
    fake: Manifold
    kernel_width: Tensor


class MovingAverages(nn.Module):
    """Algorithm 1's moving averages for features [n, d]: buffers, which a checkpoint holds."""

    def __init__(self, d: int):
        super().__init__()
        self.register_buffer("real_centroid", torch.zeros(d))
        self.register_buffer("real_radius", torch.zeros(()))
        self.register_buffer("fake_centroid", torch.zeros(d))
        self.register_buffer("fake_radius", torch.zeros(()))
        self.register_buffer("kernel_width", torch.zeros(()))
        self.register_buffer("decay", torch.zeros(()))  # delta, but 0 at the first mini-batch

    def blend(self, average: Tensor, value: Tensor) -> Tensor:
        """delta average + (1 - delta) value. Gradient goes to the value; the average is a constant."""
        return self.decay * average + (1 - self.decay) * value

    def with_batch(self, args: Args, real: Tensor, fake: Tensor) -> Averages:
        """The averages with a mini-batch's features [n, d] blended in; nothing is stored, see `store`."""
        width = torch.full((), args.kernel_width or 1.0, device=real.device)
        if args.kernel_width is None and args.kernel not in ("none", "linear"):
            of_real = typical_width(real, args.kernel)
            of_all = typical_width(torch.cat([real, fake]), args.kernel)
            width = self.blend(self.kernel_width, (of_real + of_all) / 2)
        # under torchrun the spheres are of a process's share of the mini-batch
        real_batch = manifold(real, args.kernel, width)
        fake_batch = manifold(fake, args.kernel, width)
        return Averages(Manifold(self.blend(self.real_centroid, real_batch.centroid),
                                 self.blend(self.real_radius, real_batch.radius)),
                        Manifold(self.blend(self.fake_centroid, fake_batch.centroid),
                                 self.blend(self.fake_radius, fake_batch.radius)), width)

    @torch.no_grad()
    def store(self, averages: Averages, delta: float) -> None:
        """Store what `with_batch` made, as its mean over torchrun's processes."""
        self.real_centroid.copy_(averages.real.centroid)
        self.real_radius.copy_(averages.real.radius)
        self.fake_centroid.copy_(averages.fake.centroid)
        self.fake_radius.copy_(averages.fake.radius)
        self.kernel_width.copy_(averages.kernel_width)
        training.average(self.buffers())
        self.decay.fill_(delta)


# Each returns the loss that is minimised, and by name what to watch of it, with or without a gradient.
# A loss that begins as a term is a copy of it, so that a `loss += ...` cannot change the term.
def discriminator_objective(args: Args, networks: nn.ModuleDict, x: Tensor,
                            fake: Tensor) -> tuple[Tensor, Terms]:
    """L_D of Eq. 10 for images [B, C, H, W] in [-1, 1]."""
    D = networks["discriminator"]
    real_map, fake_map = D.features(x), D.features(fake)  # two batches to batch norm [DCGAN's code]
    real_logit, fake_logit = D.logit(real_map), D.logit(fake_map)
    entropy = cross_entropy(real_logit, fake_logit)
    loss = entropy.clone()
    terms = {"cross_entropy": entropy, "score_real": torch.sigmoid(real_logit).mean(),
             "score_fake": torch.sigmoid(fake_logit).mean()}
    if args.baseline:
        return loss, terms
    real_features, fake_features = real_map.flatten(1), fake_map.flatten(1)
    if args.manifold_in_discriminator:
        averages = networks["averages"].with_batch(args, real_features, fake_features)
        centroids, radii = manifold_distance(averages.real, averages.fake, args.alpha, args.kernel,
                                             averages.kernel_width)
        loss = loss - (centroids + radii)
    if args.correlation_in_discriminator:
        loss = loss - args.beta * correlation_penalty(fake_features)
    return loss, terms


def generator_objective(args: Args, networks: nn.ModuleDict, x: Tensor,
                        fake: Tensor) -> tuple[Tensor, Terms, Optional[Averages]]:
    """L_G^final of Eq. 10, or a baseline's loss, for images [B, C, H, W] in [-1, 1].

    Its third result is the averages to store, None in a baseline.
    """
    D = networks["discriminator"]
    if args.baseline:
        loss = F.softplus(-D(fake)).mean()
        return loss, {}, None
    real_features, fake_features = D.features(x).flatten(1), D.features(fake).flatten(1)
    averages = networks["averages"].with_batch(args, real_features, fake_features)
    centroids, radii = manifold_distance(averages.real, averages.fake, args.alpha, args.kernel,
                                         averages.kernel_width)
    manifolds = centroids + radii
    correlation = correlation_penalty(fake_features)
    # by the width a kernel's distances, which have no unit, get the features' own
    scale = averages.kernel_width if args.manifold_scale == "width" else 1.0
    loss = scale * manifolds + args.beta * correlation
    terms = {"manifold_distance": manifolds, "centroid_distance": centroids,
             "radius_difference": radii, "correlation_penalty": correlation,
             "radius_real": averages.real.radius, "radius_fake": averages.fake.radius,
             "kernel_width": averages.kernel_width}
    return loss, terms, averages


# ----------------------------------------------------------------------------- train step
def init_networks(args: Args, device: torch.device) -> nn.ModuleDict:
    """G and D, drawn on the CPU from args.seed: every device starts from the same weights; the averages."""
    torch.manual_seed(args.seed)
    networks = nn.ModuleDict({"generator": Generator(args), "discriminator": Discriminator(args)})
    if not args.baseline:
        networks["averages"] = MovingAverages(networks["discriminator"].linear.in_features)
    if args.ema:
        networks["generator_ema"] = copy.deepcopy(networks["generator"]).requires_grad_(False)
    return networks.to(device, memory_format=torch.channels_last)  # the layout of fast convolutions


def init_optimizers(args: Args, networks: nn.ModuleDict) -> dict[str, torch.optim.Adam]:
    """One Adam a network."""
    capturable = next(networks.parameters()).device.type == "cuda" and args.cuda_graph
    settings = dict(lr=args.lr, betas=(args.beta1, args.beta2), fused=True, capturable=capturable)
    return {name: torch.optim.Adam(networks[name].parameters(), **settings)
            for name in ("generator", "discriminator")}


def draw_latents(n: int, args: Args, rng: torch.Generator) -> Tensor:
    """z ~ U(-1, 1), [n, latent_dim]."""
    return torch.rand(n, args.latent_dim, generator=rng, device=rng.device) * 2 - 1


def to_float(images: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] as networks take and make them: fp32 in [-1, 1]."""
    return images.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1


def to_bytes(x: Tensor) -> Tensor:
    """Networks' images [B, C, H, W] as uint8."""
    return ((x + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8).contiguous()


def make_train_step(args: Args, networks: nn.ModuleDict, optimizers: dict[str, torch.optim.Adam],
                    rng: torch.Generator) -> training.TrainStep:
    """`train_step(images)`: one iteration of Algorithm 1, in place; returns losses and terms.

    images: uint8 [B, C, H, W], this process's share of the mini-batch. z is drawn from `rng`, which
    is seeded anew before each iteration. Nothing in the step waits for the device.
    """
    G, D = networks["generator"], networks["discriminator"]

    def prepare(function: Callable) -> Callable:  # the losses; optimisers and draws are not compiled
        return torch.compile(function, fullgraph=True, dynamic=False) if args.compile else function

    d_objective = prepare(functools.partial(discriminator_objective, args, networks))
    g_objective = prepare(functools.partial(generator_objective, args, networks))
    generate = prepare(G)

    def train_step(images: Tensor) -> dict[str, Tensor]:
        x = to_float(images)
        own = training.own_slice(args.batch_size)
        z = draw_latents(args.batch_size, args, rng)[own]

        # D: tell x from G(z), keep the two spheres apart
        fake = generate(z, True)  # one pass for D's update and, its graph kept, for G's
        D.requires_grad_(True)
        loss, terms = d_objective(x, fake.detach())
        networks.zero_grad()
        loss.backward()
        training.average_gradients(networks)
        optimizers["discriminator"].step()
        losses = {"discriminator": loss, **terms}

        # G: bring the averaged spheres together, keep its images' features uncorrelated
        D.requires_grad_(False)  # its features are taken anew, since it has just learnt [Algorithm 1]
        for step in range(args.generator_steps):
            if step > 0:
                fake = generate(z)
            loss, terms, averages = g_objective(x, fake)
            networks.zero_grad()
            loss.backward()
            training.average_gradients(networks)
            optimizers["generator"].step()
        losses |= {"generator": loss, **terms}
        if averages is not None:
            networks["averages"].store(averages, args.delta)

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
    """G(z) in evaluation mode as uint8 [n, C, H, W]."""
    images = to_bytes(generator.eval()(z))
    generator.train()
    return images


def make_sampler(generator: Generator, args: Args, device: torch.device) -> Callable[[int], Tensor]:
    """A function from n to n new images, uint8 [n, C, H, W].

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
    images: uint8 [N, C, H, W]; evaluator: common.metrics.Evaluator, or None for no scores.
    """
    header = {"script": SCRIPT, "args": dataclasses.asdict(args), "data": training.fingerprint(images)}
    training.check_start(args, images, device, checkpoint)

    # Networks, optimisers, draws, the step
    networks = init_networks(args, device)
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
                shown = ("discriminator", "generator")
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
                                         args.num_is, stop=lambda: training.stopping(signals))
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
          "latent_dim": "[1, inf)", "ema": "[0, 1)", "kernel_width": "(0, inf)", "alpha": "[0, inf)",
          "beta": "[0, inf)", "delta": "[0, 1)", "generator_steps": "[1, inf)", "iterations": "[1, inf)",
          "epochs": "[1, inf)", "batch_size": "[2, inf)", "lr": "(0, inf)", "beta1": "[0, 1)",
          "beta2": "[0, 1)", "log_every": "[0, inf)", "sample_every": "[0, inf)", "eval_every": "[0, inf)",
          "checkpoint_every": "[0, inf)", "num_real": "[4, inf)", "num_fake": "[10, inf)",
          "num_is": "[10, inf)"}


def parse_args(argv: Optional[list[str]] = None
               ) -> tuple[Args, Optional[pathlib.Path], Optional[dict]]:
    """The arguments, resolved and checked; with --resume, --evaluate or --generate also the
    checkpoint's path and contents."""
    args, file, checkpoint = common.parse(Args, argv, __doc__, SCRIPT)
    saved = checkpoint["args"] if checkpoint else vars(args)
    if args.epochs != saved.get("epochs") and args.iterations == saved["iterations"]:
        args.iterations = None  # counted anew
    resolve(args)
    common.check_ranges(args, RANGES)
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
        args.iterations = args.iterations or max(1, args.epochs * len(images) // args.batch_size)
        evaluator = None
        if args.evaluate or args.eval_every:
            from common import metrics  # its Inception takes seconds to import
            evaluator = metrics.Evaluator(images, args.num_real, args.inception_weights, device)
        if args.evaluate:
            sampler = make_sampler(load_generator(args, checkpoint, device), args, device)
            scores = evaluator.score(sampler, args.num_fake, args.num_is)
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
