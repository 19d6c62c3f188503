"""MMGAN on DCGAN, after "MMGAN: Manifold-Matching Generative Adversarial Network" (Park et al. 2018): table I and
figure 3 (a)-(e) and (g), with every kernel, without kernel, without correlation regulariser, and plain DCGAN.

    python mmgan_dcgan.py                                # MNIST, RBF kernel: table I, the paper's 32.4%
    python mmgan_dcgan.py --dataset cifar10              # figure 3 (g): the paper's Inception Score of 6.96
    python mmgan_dcgan.py --dataset celeba --beta 0      # table I, CelebA without R_G
    python mmgan_dcgan.py --baseline                     # DCGAN on the same networks

A discriminator D sees features of real and of generated images. Each set of features is a manifold: a sphere, in the
Hilbert space of a kernel, with a centroid and a radius (Eq. 3, 4, 7). Each iteration:

    D      tells real from generated, and keeps the two spheres apart (Eq. 10: cross-entropy minus their distance; with
           --correlation-in-discriminator also minus R_G, as printed there)
           the moving averages of both centroids and radii take in the mini-batch's (Algorithm 1)
    G      brings the two averaged spheres together (Eq. 5, 8) and keeps its images' features uncorrelated (Eq. 9)

What to expect: see README.md, "MMGAN".
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
from typing import Callable, Iterator, Literal, Optional, Union

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
Manifold = tuple[Tensor, Tensor]  # centroid [d], radius []


# ----------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    # run
    seed: int = 1
    """Of the initial weights, the order of the data and every draw."""
    iterations: Optional[int] = None
    """Mini-batches trained on. Default: --epochs passes over the data set."""
    epochs: int = 25
    """Passes over the data set, where --iterations is not given [DCGAN's code]."""
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
    dataset: Literal["mnist", "celeba", "cifar10", "folder"] = "mnist"
    """folder: a directory (recursive) or .zip of images, centre-cropped to squares and resized to --image-size."""
    data_dir: str = "data"
    """Where data sets are kept and downloaded to; with folder, the directory or .zip itself."""
    image_size: Optional[int] = None
    """Height and width. Default: mnist 28, celeba 64, else 32 [DCGAN's code]."""
    # model
    width: float = 1.0
    """Factor of the networks' channels: 0.25 makes a run on a CPU possible."""
    latent_dim: int = 100
    """Dimensions of z ~ U(-1, 1) [DCGAN's code]."""
    # loss
    kernel: Optional[Literal["none", "linear", "poly", "rbf", "exp"]] = None
    """K of Eq. 7 and 8; none: Eq. 4 and 5. Default: rbf; celeba: exp [paper, figure 3]."""
    kernel_width: Union[Literal["auto", "real"], float] = "auto"
    """The kernel's width w. real: a moving average over real features of their squared distance from their centroid
    (rbf, so that K there is about 0.6), their distance (exp, as much) or their squared norm (poly); the spheres of rbf
    soon lie too far apart for any gradient. auto: the mean of that and of the same over real and generated ones, by
    which K between the two centroids cannot vanish [ours]."""
    alpha: float = 1.0
    """Weight of the difference of radii in Eq. 8 [paper]."""
    beta: Optional[float] = None
    """Weight of the correlation regulariser R_G; 0: "No R_G". Default: 1; cifar10: 0.1 [paper]; folder: 0.1 [ours]."""
    manifold_scale: Literal["one", "width"] = "one"
    """What L_G is multiplied by in G's loss: 1 [paper], or the kernel's width."""
    manifold_in_discriminator: bool = True
    """L_G is part of D's loss, with a minus and unscaled [paper: Eq. 6, 10]; without: it is G's alone."""
    delta: float = 0.9
    """Decay of the moving averages of centroids and radii [paper: 0.9 or greater]."""
    correlation_in_discriminator: bool = False
    """R_G is part of D's loss too, with a minus, as Eq. 10 has it, by which D learns to let all generated images look
    the same and nothing else; without: G's alone, as section V has it."""
    joint_batch: bool = False
    """Real and generated images go through D as one batch, with joint batch-norm statistics, not as two [ours]."""
    baseline: bool = False
    """Plain DCGAN: no manifolds, G's loss is -E log D(G(z))."""
    generator_steps: int = 1
    """With --baseline: updates of G an iteration; DCGAN's code has 2."""
    # optimisation
    batch_size: int = 64
    """Images a mini-batch [DCGAN's code]."""
    lr: float = 2e-4
    """Adam's learning rate [DCGAN's code]."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """linear: times min(3 (1 - t/T), 1) [Improved GAN's code]."""
    beta1: float = 0.5
    """Adam's first decay [DCGAN's code]."""
    beta2: float = 0.999
    """Adam's second decay [DCGAN's code]."""
    adam_eps: float = 1e-8
    """Adam's epsilon [DCGAN's code]."""
    ema: float = 0.0
    """Decay of a moving average of G's weights, used for samples and scores; 0: off [paper]."""
    # logging
    log_every: int = 100
    """Iterations between lines in TensorBoard; 0: none."""
    gradient_every: int = 1000
    """Iterations between measurements of each term's share in G's gradient (TensorBoard: gradients/*); 0: none."""
    sample_every: int = 1000
    """Iterations between grids of samples; 0: none."""
    eval_every: int = 10000
    """Iterations between evaluations (and one at the end); 0: none, and no Inception weights needed."""
    checkpoint_every: int = 1000
    """Iterations between checkpoints; 0: only at the end and on SIGINT or SIGTERM."""
    num_real: int = 10000
    """Real images for FID [ours, as in GN-GAN]."""
    num_fake: int = 5000
    """Generated images for FID [ours, as in GN-GAN]."""
    num_is: Optional[int] = None
    """Generated images for the Inception Score. Default: --num-fake; cifar10: 50,000 [paper]."""
    inception_weights: Optional[str] = None
    """torch-fidelity's Inception weights; default: downloaded once."""


def resolve(args: Args) -> Args:
    """The arguments with every default filled in that depends on another. The baseline has no kernel and no beta;
    iterations counted in epochs wait for the data set, see `main`."""
    defaults = {"image_size": {"mnist": 28, "celeba": 64}.get(args.dataset, 32),
                "num_is": 50_000 if args.dataset == "cifar10" else args.num_fake}
    if not args.baseline:
        defaults |= {"kernel": "exp" if args.dataset == "celeba" else "rbf",
                     "beta": 1.0 if args.dataset in ("mnist", "celeba") else 0.1}
    return dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})


# ------------------------------------------------------------------------------------------------------ networks
class BatchNorm(nn.BatchNorm2d):
    """Batch norm that always normalises a training batch by its own statistics, but moves the running ones only when
    told to: once an iteration, however often G is run."""

    def forward(self, x: Tensor, update: bool) -> Tensor:
        if self.training and update:
            return super().forward(x)
        if self.training:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        count = self.num_batches_tracked  # of a moving average of G 0: that is taken as it is
        left = torch.where(count > 0, (1 - self.momentum) ** count, 0.0)  # of what they began with, 0 and 1
        mean, var = self.running_mean / (1 - left), ((self.running_var - left) / (1 - left)).clamp_min(0)
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


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
        self.side, *larger = sides(args)
        widths = [max(1, round(c * args.width)) for c in (512, 256, 128, 64)]
        channels = 1 if args.dataset == "mnist" else 3
        self.linear = nn.Linear(args.latent_dim, widths[0] * self.side**2, bias=False)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 5, 2, 2, output_padding=1 - side % 2, bias=b == channels)
                                 for a, b, side in zip(widths, [*widths[1:], channels], larger))
        self.norms = nn.ModuleList(BatchNorm(c) for c in widths)
        init_weights(self)

    def forward(self, z: Tensor, update_statistics: bool = False) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, self.side, self.side))  # [B, 512, 2, 2]
        x = x.contiguous(memory_format=memory_format(self.ups[0].weight))
        for up, norm in zip(self.ups, self.norms):  # to [B, 256, 4, 4], [B, 128, 8, 8], [B, 64, 16, 16], [B, C, 32, 32]
            x = up(F.relu(norm(x, update_statistics)))
        return torch.tanh(x.float())  # in fp32: bf16 has too few steps near 1


class Discriminator(nn.Module):
    """images [B, C, size, size] -> logits [B]; the score D(x) is their sigmoid. Its batch norm always takes the batch's
    own statistics."""

    def __init__(self, args: Args):
        super().__init__()
        widths = [max(1, round(c * args.width)) for c in (64, 128, 256, 512)]
        self.first = nn.Conv2d(1 if args.dataset == "mnist" else 3, widths[0], 5, 2, 2)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, 2, 2, bias=False) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, track_running_stats=False) for c in widths[1:])
        self.linear = nn.Linear(widths[-1] * sides(args)[0] ** 2, 1)
        init_weights(self)

    def features(self, x: Tensor) -> Tensor:
        """The last convolution's map after its activation, [B, 512, 2, 2]."""
        x = F.leaky_relu(self.first(x), 0.2)  # [B, 64, 16, 16]
        for conv, norm in zip(self.convs, self.norms):  # [B, 128, 8, 8], [B, 256, 4, 4], [B, 512, 2, 2]
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).flatten(1))[:, 0]


def init_weights(network: nn.Module) -> None:
    """Weights N(0, 0.02^2), zero biases [DCGAN's code]."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def memory_format(weight: Tensor) -> torch.memory_format:
    """The layout that a network's weights [out, in, k, k] are in."""
    last = weight.shape[1] > 1 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


# -------------------------------------------------------------------------------------------------------- losses
def point_distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of points a [..., d] and b [..., d], in fp32; finite gradient where they coincide."""
    return ((a - b).square().sum(-1) + 1e-12).sqrt()


def kernel(a: Tensor, b: Tensor, name: str, width: Tensor | float) -> Tensor:
    """K(a_i, b_j) for points a [..., n, d] and b [..., m, d], [..., n, m].

    linear a'b; poly (a'b / w + 1)^3; rbf exp(-|a - b|^2 / 2w); exp exp(-|a - b| / 2w) [offset, degree: ours]. Distances
    are taken of differences, not of inner products, which would lose the last digits of near points.
    """
    if name in ("linear", "poly"):  # no matrix product, which could be in TF32
        products = (a.unsqueeze(-2) * b.unsqueeze(-3)).sum(-1)
        return products if name == "linear" else (products / width + 1) ** 3
    lengths = point_distance(a.unsqueeze(-2), b.unsqueeze(-3))
    if name == "rbf":
        return torch.exp(-lengths.square() / (2 * width))
    if name == "exp":
        return torch.exp(-lengths / (2 * width))
    raise ValueError(f"no kernel {name}")


def squared_distance(a: Tensor, b: Tensor, name: str, width: Tensor | float) -> Tensor:
    """|phi(a) - phi(b)|^2 = K(a, a) - 2 K(a, b) + K(b, b) of points a, b [..., d], phi mapping to K's Hilbert space."""
    aa, ab, bb = (kernel(v.unsqueeze(-2), w.unsqueeze(-2), name, width)[..., 0, 0] for v, w in ((a, a), (a, b), (b, b)))
    return aa - 2 * ab + bb


def manifold(features: Tensor, name: str, width: Tensor | float = 1.0) -> Manifold:
    """The sphere around features [n, d]: its centroid [d] (Eq. 3) and radius [], the mean distance from it (none:
    Eq. 4) or the mean squared distance in the kernel's Hilbert space (Eq. 7)."""
    centroid = features.mean(0)
    if name == "none":
        return centroid, point_distance(features, centroid).mean()
    return centroid, squared_distance(features, centroid, name, width).mean()


def manifold_distance(real: Manifold, fake: Manifold, alpha: float, name: str, width: Tensor | float = 1.0) -> Tensor:
    """L_G of two spheres: |c_Y - c_X| + |l_Y - l_X| (none: Eq. 5, which has no alpha), or Eq. 8. Scalar."""
    radii = (real[1] - fake[1]).abs()
    if name == "none":
        return point_distance(real[0], fake[0]) + radii
    return squared_distance(real[0], fake[0], name, width) + alpha * radii


def correlation_penalty(features: Tensor) -> Tensor:
    """R_G = |I - A|_F (Eq. 9), A the correlations between the samples of features [n, d] over their d features; scalar.

    A sample that is constant over its features, for which no correlation is defined, counts as uncorrelated.
    """
    features = features.double()  # as everywhere, no matrix product in TF32
    centred = features - features.mean(1, keepdim=True)
    unit = centred / (centred.square().sum(1, keepdim=True) + 1e-12).sqrt()
    others = ~torch.eye(len(features), dtype=torch.bool, device=features.device)  # I - A is zero on the diagonal
    return ((unit @ unit.mT * others).square().sum() + 1e-12).sqrt().float()


def typical_width(features: Tensor, name: str) -> Tensor:
    """What `--kernel-width real` averages over features [n, d], without gradient; see there."""
    features = features.detach()
    if name == "poly":
        return features.square().sum(1).mean()
    lengths = point_distance(features, features.mean(0))
    return lengths.square().mean() if name == "rbf" else lengths.mean()


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))) (Eq. 1) of logits [B]; scalar."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


# ---------------------------------------------------------------------------------------------------- train step
class Averages(nn.Module):
    """Moving averages of both spheres and of the kernel's width: buffers, which a checkpoint holds like weights."""

    def __init__(self, args: Args):
        super().__init__()
        dim = max(1, round(512 * args.width)) * sides(args)[0] ** 2
        for name, shape in (("centroid_real", (dim,)), ("radius_real", ()), ("centroid_fake", (dim,)),
                            ("radius_fake", ()), ("kernel_width", ())):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("decay", torch.zeros(()))  # 0 until the first mini-batch has come, so that it starts them

    def blend(self, name: str, value: Tensor) -> Tensor:
        """delta average + (1 - delta) value: gradient goes to the value, the history is a constant."""
        return self.decay * getattr(self, name) + (1 - self.decay) * value

    @torch.no_grad()
    def commit(self, values: dict[str, Tensor], delta: float) -> None:
        for name, value in values.items():
            getattr(self, name).copy_(value)
        self.decay.fill_(delta)


def match_manifolds(args: Args, averages: Averages, y: Tensor, x: Tensor
                    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """L_G and R_G of real features y and generated ones x [B, d]; what is logged; the averages with both taken in."""
    width = torch.ones((), device=y.device)
    if not isinstance(args.kernel_width, str):
        width = width * args.kernel_width
    elif args.kernel in ("rbf", "exp", "poly"):
        typical = typical_width(y, args.kernel)
        if args.kernel_width == "auto":
            typical = (typical + typical_width(torch.cat([y, x]), args.kernel)) / 2
        width = averages.blend("kernel_width", typical)
    blended = {"kernel_width": width}
    for side, features in (("real", y), ("fake", x)):
        centroid, radius = manifold(features, args.kernel, width)
        blended[f"centroid_{side}"] = averages.blend(f"centroid_{side}", centroid)
        blended[f"radius_{side}"] = averages.blend(f"radius_{side}", radius)
    real, fake = ((blended[f"centroid_{side}"], blended[f"radius_{side}"]) for side in ("real", "fake"))
    distance = manifold_distance(real, fake, args.alpha, args.kernel, width)
    penalty = correlation_penalty(x)
    radii = (real[1] - fake[1]).abs()
    terms = {"radius_real": real[1], "radius_fake": fake[1], "correlation_penalty": penalty,
             "centroid_distance": distance - (1.0 if args.kernel == "none" else args.alpha) * radii}
    if args.kernel != "none":
        terms["kernel_width"] = width
        with torch.no_grad():
            terms["kernel_mean"] = kernel(y, y.mean(0, keepdim=True), args.kernel, width).mean()
    return distance, penalty, terms, blended


def manifold_weight(args: Args, blended: dict[str, Tensor]) -> Tensor | float:
    """What L_G is multiplied by in G's loss, see `--manifold-scale`."""
    return blended["kernel_width"] if args.manifold_scale == "width" else 1.0


def init_networks(args: Args, device: torch.device) -> nn.ModuleDict:
    """G and D, drawn on the CPU from args.seed, so that every device starts from the same weights; the averages."""
    torch.manual_seed(args.seed)
    networks = nn.ModuleDict({"generator": Generator(args), "discriminator": Discriminator(args)})
    if not args.baseline:
        networks["averages"] = Averages(args)
    if args.ema:
        networks["generator_ema"] = copy.deepcopy(networks["generator"]).requires_grad_(False).eval()
    return networks.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)


def init_optimizers(args: Args, networks: nn.ModuleDict) -> dict[str, torch.optim.Adam]:
    """One Adam a network."""
    device = next(networks.parameters()).device
    return {name: torch.optim.Adam(networks[name].parameters(), lr=torch.tensor(args.lr, device=device),
                                   betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True,
                                   capturable=device.type == "cuda" and args.cuda_graph)
            for name in ("discriminator", "generator")}


def load_optimizer(optimizer: torch.optim.Adam, state: dict) -> None:
    """The saved moments, with this run's own switches and learning rate: a tensor on the device, as a graph needs."""
    kept = [{k: group[k] for k in ("lr", "capturable", "fused")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, kept):
        group.update(own)


def learning_rate(args: Args, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0."""
    return args.lr * (min(3 * (1 - iteration / args.iterations), 1.0) if args.lr_schedule == "linear" else 1.0)


def to_float(images: Tensor, layout: torch.memory_format = torch.preserve_format) -> Tensor:
    """uint8 images as D sees them, from -1 to 1."""
    return images.to(torch.float32, memory_format=layout) / 127.5 - 1


def draw_latents(n: int, args: Args, rng: torch.Generator, device: torch.device) -> Tensor:
    """z ~ U(-1, 1), [n, latent_dim]."""
    return torch.rand(n, args.latent_dim, generator=rng, device=device) * 2 - 1


def make_train_step(args: Args, networks: nn.ModuleDict, optimizers: dict[str, torch.optim.Adam],
                    rng: torch.Generator) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """`train_step(images, finite)`: one iteration of Algorithm 1, in place; returns its losses, scalars.

    images: uint8 [B, C, H, W]; finite: a bool that turns False, and stays so, when a loss is not finite. z is drawn
    from `rng`. Nothing in it waits for the device.
    """
    device = next(networks.parameters()).device
    G, D = networks["generator"], networks["discriminator"]
    layout = torch.channels_last if args.channels_last else torch.contiguous_format

    # Autocast around each forward pass alone: losses stay in fp32, and the bf16 copies of the weights that a region
    # keeps end with it, so that none is older than the last update.
    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def generate(z: Tensor, update_statistics: bool = False) -> Tensor:
        with autocast():
            return G(z, update_statistics)

    def discriminate(x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B] and features [B, d]."""
        with autocast():
            features = D.features(x).flatten(1)
            return D.linear(features)[:, 0].float(), features.float()

    def discriminate_both(x: Tensor, fake: Tensor, train_real: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits and features of real, then of generated images; without train_real no gradient to the former."""
        if args.joint_batch:
            logits, features = discriminate(torch.cat([x, fake]))
            (real, fake), (y, x) = logits.chunk(2), features.chunk(2)
            return real, y if train_real else y.detach(), fake, x
        with torch.set_grad_enabled(train_real):
            real, y = discriminate(x)
        return real, y, *discriminate(fake)

    def discriminator_objective(x: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # Eq. 10
        real_logit, real_features, fake_logit, fake_features = discriminate_both(x, fake, train_real=True)
        entropy = cross_entropy(real_logit, fake_logit)
        if args.baseline or not (args.manifold_in_discriminator or args.correlation_in_discriminator):
            return entropy, {"discriminator": entropy}
        distance, penalty, _, _ = match_manifolds(args, networks["averages"], real_features, fake_features)
        loss = entropy
        if args.manifold_in_discriminator:
            loss = loss - distance
        if args.correlation_in_discriminator:
            loss = loss - args.beta * penalty
        return loss, {"discriminator": loss, "cross_entropy": entropy}

    def generator_objective(x: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:  # Eq. 10
        if args.baseline:
            loss = F.softplus(-discriminate(fake)[0]).mean()
            return loss, {"generator": loss}, {}
        _, real_features, _, fake_features = discriminate_both(x, fake, train_real=False)
        distance, penalty, terms, blended = match_manifolds(args, networks["averages"], real_features, fake_features)
        loss = manifold_weight(args, blended) * distance + args.beta * penalty
        return loss, {"generator": loss, **terms}, {name: value.detach() for name, value in blended.items()}

    if args.compile:  # the losses, not the loop: optimisers and draws stay outside
        options = {"fullgraph": True, "dynamic": False}
        discriminator_objective = torch.compile(discriminator_objective, **options)
        generator_objective = torch.compile(generator_objective, **options)
        generate_fake = torch.compile(generate, **options)
    else:
        generate_fake = generate

    def update(loss: Tensor, *names: str) -> None:
        chosen = [optimizers[name] for name in names]
        for optimizer in chosen:
            optimizer.zero_grad()
        loss.backward(inputs=[p for o in chosen for group in o.param_groups for p in group["params"]])
        for optimizer in chosen:
            optimizer.step()

    # G(z) is computed once for both updates; D's features of both sides are computed anew after D's update, since the
    # averages and G's gradient are to come from the D that has just learnt (Algorithm 1).
    def train_step(images: Tensor, finite: Tensor) -> dict[str, Tensor]:
        x = to_float(images, layout)
        z = draw_latents(len(x), args, rng, device)
        losses = {}
        fake = generate_fake(z, update_statistics=True)
        D.requires_grad_(True)
        loss, terms = discriminator_objective(x, fake.detach())
        update(loss, "discriminator")
        losses.update(terms)
        D.requires_grad_(False)
        for step in range(args.generator_steps):
            fake = generate_fake(z) if step else fake
            loss, terms, blended = generator_objective(x, fake)
            update(loss, "generator")
            losses.update(terms)
        if not args.baseline:
            networks["averages"].commit(blended, args.delta)
        if args.ema:
            averages, weights = (networks[n].state_dict() for n in ("generator_ema", "generator"))
            for name, average in averages.items():
                if average.is_floating_point():
                    average.lerp_(weights[name], 1 - args.ema)
        losses = {name: value.detach() for name, value in losses.items()}
        finite.logical_and_(torch.stack(list(losses.values())).isfinite().all())
        return losses

    return train_step


def gradient_norms(args: Args, networks: nn.ModuleDict, images: Tensor, z: Tensor) -> dict[str, float]:
    """Norm of the gradient to G's weights of each term of its loss, as weighted there, on the images given (R_G
    grows with their number); changes nothing."""
    G, D = networks["generator"], networks["discriminator"].requires_grad_(False)
    x = to_float(images)
    with torch.autocast(z.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        fake = G(z)
        if args.joint_batch:
            real_features, fake_features = (f.flatten(1).float() for f in D.features(torch.cat([x, fake])).chunk(2))
        else:
            real_features, fake_features = (D.features(v).flatten(1).float() for v in (x, fake))
    distance, penalty, terms, blended = match_manifolds(args, networks["averages"], real_features.detach(),
                                                        fake_features)
    weight = manifold_weight(args, blended)
    parts = {"centroid": weight * terms["centroid_distance"],
             "radius": weight * (distance - terms["centroid_distance"]), "correlation": args.beta * penalty}
    norms = {}
    for name, part in parts.items():
        gradients = torch.autograd.grad(part, list(G.parameters()), retain_graph=True)
        norms[name] = torch.cat([g.flatten() for g in gradients]).norm().item()
    return norms


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
    return ((x + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8).contiguous()


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
        "num_fake", "num_is", "gradient_every", "inception_weights"}


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
        if checkpoint["args"].get("num_is") is None:
            saved = dataclasses.replace(saved, num_is=None)  # it goes with --num-fake, which may be given anew
        args = parse(saved)
        free = set(FREE)
        if saved.lr_schedule == "constant":
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
    if args.baseline:
        for name in ("kernel", "beta", "kernel_width", "alpha", "delta", "manifold_scale",
                     "manifold_in_discriminator", "correlation_in_discriminator"):
            if getattr(args, name) != getattr(Args, name):
                flag = f"--{'[no-]' if 'discriminator' in name else ''}{name.replace('_', '-')}"
                raise UserError(f"--baseline has no {name.replace('_', ' ')}: leave {flag} out")
    elif args.generator_steps != 1:
        raise UserError("--generator-steps is the baseline's: MMGAN's Algorithm 1 has one; leave it out")
    resolved = resolve(args)
    for flag, kernels in (("alpha", ("none",)), ("kernel_width", ("none", "linear")),
                          ("manifold_scale", ("none", "linear"))):
        if resolved.kernel in kernels and getattr(args, flag) != getattr(Args, flag):
            raise UserError(f"--kernel {resolved.kernel} has no {flag.replace('_', ' ')}: "
                            f"leave --{flag.replace('_', '-')} out")
    if resolved.beta == 0 and args.correlation_in_discriminator:
        raise UserError("--beta 0 leaves nothing of R_G: leave --correlation-in-discriminator out")
    for name, low in (("seed", 0), ("iterations", 1), ("epochs", 1), ("batch_size", 2), ("latent_dim", 1),
                      ("image_size", 16), ("generator_steps", 1), ("log_every", 0), ("gradient_every", 0),
                      ("sample_every", 0), ("eval_every", 0), ("checkpoint_every", 0), ("num_real", 2),
                      ("num_fake", 10), ("num_is", 10), ("num_images", 1)):
        if getattr(resolved, name) is not None and getattr(resolved, name) < low:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(resolved, name)}: it must be {low} or more")
    for name in ("kernel_width", "alpha", "beta", "lr", "width", "adam_eps"):
        value, positive = getattr(resolved, name), name in ("kernel_width", "lr", "width", "adam_eps")
        if value is not None and not isinstance(value, str) and (not 0 <= value < math.inf or positive and not value):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be a number "
                            f"{'above' if positive else 'from'} 0")
    for name in ("delta", "ema", "beta1", "beta2"):
        if not 0 <= getattr(resolved, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(resolved, name)}: "
                            "it must be at least 0 and below 1")
    if resolved.seed >= 2**31:
        raise UserError(f"--seed is {resolved.seed}: it must be below 2**31")
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
    finite = torch.tensor(True, device=device)
    generator = networks["generator_ema" if args.ema else "generator"]
    noise_rng = torch.Generator().manual_seed(2**31 + args.seed)
    fixed_noise = draw_latents(64, args, noise_rng, torch.device("cpu")).to(device)
    train_step = make_train_step(args, networks, optimizers, rng)
    if args.cuda_graph and device.type == "cuda" and start < args.iterations:
        batch = images[: args.batch_size].to(device)
        train_step = GraphedStep(train_step, networks, optimizers, rng, batch, finite)

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
            scores = evaluator.score(sample_or_stop, args.num_fake, args.num_is)
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
            losses = train_step(batches.next(), finite)
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
                                 (("D", "discriminator"), ("G", "generator"))}, refresh=False)
            share, sample, score, keep = (due(every, iteration) for every in (args.gradient_every, args.sample_every,
                                                                              args.eval_every, args.checkpoint_every))
            if share or sample or score or keep or last:  # not training: the clock of images a second stands still
                measure(iteration)
                if share and not args.baseline:
                    norms = gradient_norms(args, networks, images[:64].to(device), fixed_noise)
                    for name, value in norms.items():
                        run.writer.add_scalar(f"gradients/{name}", value, iteration)
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
        if args.iterations is None:  # counted in epochs
            args = dataclasses.replace(args, iterations=max(1, args.epochs * len(images) // args.batch_size))
            run.args, run.head["resolved"]["iterations"] = args, args.iterations
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
        print(json.dumps({"iteration": checkpoint["iteration"], **evaluator.score(sample, args.num_fake, args.num_is)}))
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
