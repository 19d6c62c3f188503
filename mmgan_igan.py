"""MMGAN on Improved GAN, after "MMGAN: Manifold-Matching Generative Adversarial Network" (Park et al. 2018): figure
3 (f) and (g), with every kernel, without kernel, without correlation regulariser, and the two originals of Salimans et
al. 2016, whose feature matching MMGAN generalises.

    python mmgan_igan.py                                 # CIFAR-10, EXP kernel: the paper's Inception Score of 7.8
    python mmgan_igan.py --beta 0                        # without R_G
    python mmgan_igan.py --baseline minibatch            # Improved GAN: 6.86
    python mmgan_igan.py --baseline feature-matching     # its semi-supervised variant, here without labels
    python mmgan_igan.py --dataset folder --data-dir photos --width 0.25 --iterations 20000 --eval-every 0  # photos

A generator G and a discriminator D. D gives each image a feature vector, and MMGAN takes those of real and of generated
images for two manifolds. Each is a sphere, in a kernel's Hilbert space, with a centroid and a radius (Eq. 3, 4, 7). An
iteration draws one mini-batch x and one z:

    D      tells x from G(z) (Eq. 10 as printed also has it keep the two spheres apart: --manifold-in-discriminator)
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
from common import UserError, datasets, training
from common.training import autocast, draw_seed, due

SCRIPT = pathlib.Path(__file__).stem
Terms = dict[str, Tensor]  # by name, what goes to TensorBoard: scalars, or a number, or what has a mean
Noise = list[Tensor]  # what disturbs a training batch of D, see `draw_noise`


# ------------------------------------------------------------------------------ arguments
@dataclass
class Args:
    # used most
    dataset: Literal["cifar10", "folder"] = "cifar10"
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
    image_size: int = 32
    """Height and width, a multiple of 8 [Improved GAN's code]."""

    # model
    latent_dim: int = 100
    """Dimensions of z ~ U(0, 1) [Improved GAN's code]."""
    ema: float = 0.0
    """Decay of a moving average of G's weights, used for samples and scores; 0: off [paper]."""
    minibatch_discrimination: bool = False
    """Minibatch discrimination before D's last layer; --baseline minibatch always has it."""

    # loss
    kernel: Literal["none", "linear", "poly", "rbf", "exp"] = "exp"
    """The kernel in whose space the features' two spheres lie (K of Eq. 7, 8) [paper, figure 3].
    none: the features' own space (Eq. 4, 5)."""
    kernel_width: Optional[float] = None
    """The kernel's width w [the paper gives none].
    Default: a moving average of the mean of two spreads, the real features' and all features' [ours].
    So K stays above 0 even where the centroids lie far apart."""
    alpha: float = 1.0
    """Weight of the spheres' difference of radii, beside their centres' distance (Eq. 8) [paper]."""
    beta: float = 0.1
    """Weight of the correlation regulariser R_G, which keeps generated images different (Eq. 9) [paper].
    0: the paper's "No R_G"."""
    delta: float = 0.9
    """Decay of the moving averages of the spheres' centres and radii [paper: 0.9 or greater]."""
    manifold_scale: Literal["one", "width"] = "width"
    """Factor of the spheres' distance L_G (Eq. 8) in G's loss. one: 1 [paper].
    width: the kernel's width, so that distances have the features' unit, as in feature matching [ours]."""
    manifold_in_discriminator: bool = False
    """D's loss keeps the spheres apart: it has -L_G, whatever --manifold-scale [paper: Eq. 6, 10].
    Without: L_G is G's alone [ours]."""
    correlation_in_discriminator: bool = False
    """D's loss has -R_G too [Eq. 10]. Not advised: D then learns only to see all generated images as equal.
    Without: G's alone [paper: section V]."""
    baseline: Optional[Literal["minibatch", "feature-matching"]] = None
    """Improved GAN instead of manifolds.
    minibatch: minibatch discrimination; three updates of G an iteration, by E log(1 - D(G(z))).
    feature-matching: G's loss is the mean absolute difference of D's mean features."""
    historical_averaging: float = 1.0
    """With --baseline minibatch: weight of the weights' squared distance from their mean so far.
    0: off [Improved GAN's paper has no weight]. The losses that are logged are without it."""
    label_smoothing: float = 0.1
    """With --baseline minibatch: real images' target in D's loss is 1 minus this [Improved GAN's paper]."""

    # optimisation
    epochs: Optional[int] = None
    """Passes over the data set, where --iterations is not given. Default: 1,200 [original's code]."""
    batch_size: int = 100
    """Images a mini-batch, over all processes of torchrun [original's code]."""
    lr: float = 3e-4
    """Adam's learning rate [original's code]."""
    lr_schedule: Literal["constant", "last-third"] = "last-third"
    """last-third: --lr times min(3 (1 - t/T), 1) at iteration t of T [original's code].
    That is --lr, and falls linearly to 0 over the last third."""
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
        args.epochs = 1200
    if args.num_is is None and args.dataset == "cifar10":
        args.num_is = 50_000
    return args


# ------------------------------------------------------------------------------- networks
class BatchNorm(nn.Module):
    """Batch norm without gain on [B, C, H, W]; of a training batch by its own statistics.

    The running statistics are moved only if told to: once an iteration, however often G is run.
    They begin at 0, and evaluation divides them by `running_weight`, the weight of all batches so
    far (bias correction, as in Adam).
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-6):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("weight", torch.ones(channels))
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


class VirtualBatchNorm(nn.Module):
    """Batch norm without gain by the statistics of a reference batch. It has no running statistics.

    The first `references` samples are normalised by their own statistics, every other by those of
    the reference and of itself.
    """

    def __init__(self, channels: int, references: int):
        super().__init__()
        self.references = references
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, update: bool) -> Tensor:
        x = x.float()
        moments = torch.stack([x, x.square()]).mean((3, 4))  # of each sample, [2, n, C]
        reference = moments[:, : self.references].mean(1, keepdim=True)
        weight = 1 / (self.references + 1)
        with_reference = weight * moments[:, self.references :] + (1 - weight) * reference
        mean, square = torch.cat([reference.expand(-1, self.references, -1), with_reference], 1)
        scale = (square - mean.square()).clamp_min(0).add(1e-6).rsqrt()
        return (x - mean[..., None, None]) * scale[..., None, None] + self.bias[:, None, None]


def weight_norm(layer: nn.Module, init_std: float = 1.0, train_scale: bool = False) -> nn.Module:
    """A convolution or linear layer with weight g v / |v|, one g an output channel, trained on demand.

    `init_by_data` gives its output the deviation init_std.
    """
    nn.init.normal_(layer.weight, std=0.05)
    nn.init.zeros_(layer.bias)
    dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    torch.nn.utils.parametrizations.weight_norm(layer, dim=dim)
    nn.init.ones_(layer.parametrizations.weight.original0)
    layer.init_std = init_std
    layer.frozen = not train_scale
    return layer


class Generator(nn.Module):
    """z [B, latent_dim] -> images [B, 3, size, size] in [-1, 1]; the notation is for size 32, width 1."""

    def __init__(self, args: Args):
        super().__init__()
        self.bf16 = args.precision == "bf16"
        self.side = args.image_size // 8
        widths = [max(1, round(c * args.width)) for c in (512, 256, 128)]
        references = args.batch_size if args.baseline == "minibatch" else 0
        norm = BatchNorm
        if references:
            norm = functools.partial(VirtualBatchNorm, references=references)
        self.linear = nn.Linear(args.latent_dim, widths[0] * self.side**2, bias=False)
        double = dict(kernel_size=5, stride=2, padding=2, output_padding=1)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, bias=False, **double)
                                 for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList([norm(widths[0] * self.side**2), *map(norm, widths[1:])])
        for layer in (self.linear, *self.ups):
            nn.init.normal_(layer.weight, std=0.05)
        self.last = weight_norm(nn.ConvTranspose2d(widths[-1], 3, **double), init_std=0.1, train_scale=True)
        self.register_buffer("reference", torch.rand(references, args.latent_dim))

    @autocast
    def forward(self, z: Tensor, update_statistics: bool = False) -> Tensor:
        x = self.linear(torch.cat([self.reference, z]))[..., None, None]  # [B, 8192, 1, 1]
        x = F.relu(self.norms[0](x, update_statistics))
        x = x.flatten(1).unflatten(1, (-1, self.side, self.side))  # [B, 512, 4, 4]
        x = x.contiguous(memory_format=torch.channels_last)
        for up, norm in zip(self.ups, self.norms[1:]):  # to [B, 256, 8, 8], [B, 128, 16, 16]
            x = F.relu(norm(up(x), update_statistics))
        x = self.last(x[len(self.reference) :])  # [B, 3, 32, 32]
        return torch.tanh(x.float())  # in fp32: bf16 has too few steps near 1


class MinibatchDiscrimination(nn.Module):
    """features [B, d] -> [B, d + kernels], with each sample's closeness to the others of its batch.

    That is, by kernel, the sum over j of exp(-|M_i - M_j|_1), where M_i are the 5 coordinates of
    sample i (Salimans et al. 2016, section 3.2).
    """

    def __init__(self, features: int, kernels: int, dim: int = 5):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(features, kernels, dim) * 0.05)
        self.log_scale = nn.Parameter(torch.zeros(kernels, dim))
        self.bias = nn.Parameter(torch.full((kernels,), -1.0))

    def distances(self, x: Tensor) -> Tensor:
        """L1 distances, [B, B, kernels]; a sample's from itself is so large that it adds nothing."""
        weight = self.theta * (self.log_scale.exp() / self.theta.norm(dim=0))
        points = torch.einsum("bf,fkd->bkd", x, weight)
        itself = torch.eye(len(x), device=x.device)[..., None]
        return (points[:, None] - points).abs().sum(3) + 1e6 * itself

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a layer: its product may be in TF32
            x = x.float()
            return torch.cat([x, torch.exp(-self.distances(x)).sum(1) + self.bias], 1)


class Discriminator(nn.Module):
    """images [B, 3, size, size] -> logits [B]; the score D(x) is their sigmoid.

    The logit is the logsumexp of ten classes' (Salimans et al. 2016, section 5). `noise`, from
    `draw_noise`, is what disturbs a training batch.
    """

    def __init__(self, args: Args):
        super().__init__()
        self.bf16 = args.precision == "bf16"
        a, b = (max(1, round(c * args.width)) for c in (96, 192))
        widths = [3, a, a, a, b, b, b, b, b, b]
        kernels = [3, 3, 3, 3, 3, 3, 3, 1, 1]
        strides = [1, 1, 2, 1, 1, 2, 1, 1, 1]
        paddings = [1, 1, 1, 1, 1, 1, 0, 0, 0]
        self.convs = nn.ModuleList(weight_norm(nn.Conv2d(*shape)) for shape in zip(
            widths, widths[1:], kernels, strides, paddings))
        self.additive = args.baseline == "minibatch"  # Gaussian noise on the images, else dropout
        closeness = 0
        if self.additive or args.minibatch_discrimination:
            closeness = max(1, round(100 * args.width))
        self.minibatch = MinibatchDiscrimination(b, closeness) if closeness else nn.Identity()
        self.linear = weight_norm(nn.Linear(b + closeness, 10), init_std=0.1, train_scale=True)

    @autocast
    def features(self, x: Tensor, noise: Optional[Noise] = None) -> Tensor:
        """The last convolution's map after its activation, [B, 192, 6, 6]."""
        if noise is not None:
            x = x + noise[0] if self.additive else x * noise[0]
        for i, conv in enumerate(self.convs):  # 3 to 96 at 16x16, 3 to 192 at 8x8, 3 to 192 at 6x6
            x = F.leaky_relu(conv(x), 0.2)
            if noise is not None and i in (2, 5):
                x = x * noise[1 + i // 3]
        return x.float()

    @autocast
    def logit(self, features: Tensor) -> Tensor:
        """Logits [B] of the maps from `features`."""
        return torch.logsumexp(self.linear(self.minibatch(features.mean((2, 3)))).float(), 1)

    def forward(self, x: Tensor, noise: Optional[Noise] = None) -> Tensor:
        return self.logit(self.features(x, noise))


def draw_noise(n: int, args: Args, rng: torch.Generator) -> Noise:
    """What disturbs n training images in D: noise on them, dropout masks of 0.5 after each stride.

    On the images, [n, 3, 32, 32]: Gaussian noise of deviation 0.2 (minibatch) or a dropout mask of
    0.2. The other masks are [n, 96, 16, 16] and [n, 192, 8, 8].
    """
    def mask(keep: float, *shape: int) -> Tensor:
        drawn = torch.empty(n, *shape, device=rng.device).bernoulli_(keep, generator=rng) / keep
        return drawn.contiguous(memory_format=torch.channels_last)

    side = args.image_size
    a, b = (max(1, round(c * args.width)) for c in (96, 192))
    if args.baseline == "minibatch":
        on_images = torch.randn(n, 3, side, side, generator=rng, device=rng.device) * 0.2
    else:
        on_images = mask(0.8, 3, side, side)
    return [on_images, mask(0.5, a, side // 2, side // 2), mask(0.5, b, side // 4, side // 4)]


@torch.no_grad()
def init_by_data(args: Args, networks: nn.ModuleDict, images: Tensor, rng: torch.Generator) -> None:
    """Data-dependent initialisation of weight norm's scales and biases, never in bf16.

    On uint8 images [n, 3, H, W] and as many z every weight-normed layer's output gets mean 0 and
    deviation init_std. Minibatch discrimination's nearest sample gets a mean distance of 2, and its
    output mean 0.
    """
    def normalise(layer: nn.Module, _, output: Tensor) -> Tensor:
        axes = [i for i in range(output.ndim) if i != 1]
        mean = output.mean(axes)
        variance = output.square().mean(axes) - mean.square()
        scale = layer.init_std / variance.clamp_min(1e-12).sqrt()
        layer.bias.copy_(-mean * scale)
        g = layer.parametrizations.weight.original0
        g.mul_(scale.view_as(g))
        shape = [-1] + [1] * (output.ndim - 2)
        return (output - mean.view(shape)) * scale.view(shape)

    def spread(layer: MinibatchDiscrimination, inputs: tuple[Tensor]) -> None:
        nearest = 0.5 * layer.distances(inputs[0]).amin(1).mean(0)
        layer.log_scale.sub_(nearest.log()[:, None])
        layer.bias.copy_(-torch.exp(-layer.distances(inputs[0])).sum(1).mean(0))

    handles = []
    for module in networks.modules():
        if hasattr(module, "init_std"):
            handles.append(module.register_forward_hook(normalise))
        elif isinstance(module, MinibatchDiscrimination):
            handles.append(module.register_forward_pre_hook(spread))
    G, D = networks["generator"], networks["discriminator"]
    G.bf16 = D.bf16 = False
    G(draw_latents(len(images), args, rng))
    D(to_float(images), draw_noise(len(images), args, rng))
    G.bf16 = D.bf16 = args.precision == "bf16"
    for handle in handles:
        handle.remove()
    training.average(networks.parameters())  # GPUs may round differently; all processes need the same
    if args.ema:
        networks["generator_ema"].load_state_dict(G.state_dict())


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


def feature_matching(real: Tensor, fake: Tensor) -> Tensor:
    """Mean absolute difference of the mean features, of [n, d] (Improved GAN's code); scalar."""
    return (real.mean(0) - fake.mean(0)).abs().mean()


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


class History(nn.Module):
    """Historical averaging: the mean of a network's weights over its updates so far, in a copy of it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.mean = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))

    def take_in(self, network: nn.Module) -> Tensor:
        """Take the network's weights into the mean; |weights - mean|^2 over all of them, scalar."""
        pairs = list(zip(network.parameters(), self.mean.parameters()))
        with torch.no_grad():
            self.count.add_(1)
            for weight, mean in pairs:
                mean.add_((weight - mean) / self.count)
        return sum((weight - mean).square().sum() for weight, mean in pairs)


# Each returns the loss that is minimised, and by name what to watch of it, with or without a gradient.
# A loss that begins as a term is a copy of it, so that a `loss += ...` cannot change the term.
def discriminator_objective(args: Args, networks: nn.ModuleDict, x: Tensor, fake: Tensor,
                            real_noise: Noise, fake_noise: Noise) -> tuple[Tensor, Terms]:
    """L_D of Eq. 10 for images [B, 3, H, W] in [-1, 1]; cross-entropy halved, as in the original."""
    D = networks["discriminator"]
    real_map, fake_map = D.features(x, real_noise), D.features(fake, fake_noise)
    real_logit, fake_logit = D.logit(real_map), D.logit(fake_map)
    entropy = cross_entropy(real_logit, fake_logit) / 2
    if args.baseline == "minibatch":  # one-sided: the target of real images alone
        entropy = entropy + args.label_smoothing * real_logit.mean() / 2
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


def generator_objective(args: Args, networks: nn.ModuleDict, x: Tensor, fake: Tensor,
                        real_noise: Noise, fake_noise: Noise
                        ) -> tuple[Tensor, Terms, Optional[Averages]]:
    """L_G^final of Eq. 10, or a baseline's loss, for images [B, 3, H, W] in [-1, 1].

    Its third result is the averages to store, None in a baseline.
    """
    D = networks["discriminator"]
    if args.baseline == "minibatch":
        loss = -F.softplus(D(fake, fake_noise)).mean()
        return loss, {}, None
    real_map, fake_map = D.features(x, real_noise), D.features(fake, fake_noise)
    if args.baseline == "feature-matching":
        loss = feature_matching(real_map.mean((2, 3)), fake_map.mean((2, 3)))
        return loss, {}, None
    real_features, fake_features = real_map.flatten(1), fake_map.flatten(1)
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
    """G and D, drawn on the CPU from args.seed: every device starts from the same weights (but for
    `init_by_data`); the averages; the history of historical averaging."""
    torch.manual_seed(args.seed)
    networks = nn.ModuleDict({"generator": Generator(args), "discriminator": Discriminator(args)})
    if not args.baseline:
        d = networks["discriminator"].convs[-1].out_channels * (args.image_size // 4 - 2) ** 2
        networks["averages"] = MovingAverages(d)
    if args.baseline == "minibatch" and args.historical_averaging:
        networks["history"] = nn.ModuleDict({n: History(network) for n, network in networks.items()})
    if args.ema:
        networks["generator_ema"] = copy.deepcopy(networks["generator"]).requires_grad_(False)
    return networks.to(device, memory_format=torch.channels_last)  # the layout of fast convolutions


def init_optimizers(args: Args, networks: nn.ModuleDict) -> dict[str, torch.optim.Adam]:
    """One Adam a network, of all its weights but weight norm's scales that stay as initialised.

    Improved GAN's code has its epsilon inside the root: 1e-8 there is 1e-4 here, but for gradients
    near 1e-4. MMGAN's G has 1e-8: with --manifold-scale one its gradients are far below 1e-4 [ours].
    """
    capturable = next(networks.parameters()).device.type == "cuda" and args.cuda_graph
    settings = dict(lr=args.lr, betas=(args.beta1, args.beta2), fused=True, capturable=capturable)
    layers = [m for m in networks.modules() if getattr(m, "frozen", False)]
    frozen = {id(layer.parametrizations.weight.original0) for layer in layers}
    optimizers = {}
    for name, eps in (("generator", 1e-4 if args.baseline else 1e-8), ("discriminator", 1e-4)):
        trained = [p for p in networks[name].parameters() if id(p) not in frozen]
        optimizers[name] = torch.optim.Adam(trained, eps=eps, **settings)
    return optimizers


def learning_rate(args: Args, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0."""
    if args.lr_schedule == "constant":
        return args.lr
    return args.lr * min(3 * (1 - iteration / args.iterations), 1.0)


def draw_latents(n: int, args: Args, rng: torch.Generator) -> Tensor:
    """z ~ U(0, 1), [n, latent_dim]."""
    return torch.rand(n, args.latent_dim, generator=rng, device=rng.device)


def to_float(images: Tensor) -> Tensor:
    """uint8 images [B, 3, H, W] as networks take and make them: fp32 in [-1, 1]."""
    return images.to(torch.float32, memory_format=torch.channels_last) / 128 - 127.5 / 128


def to_bytes(x: Tensor) -> Tensor:
    """Networks' images [B, 3, H, W] as uint8."""
    return (x * 128 + 127.5 + 0.5).clamp(0, 255).to(torch.uint8).contiguous()


def make_train_step(args: Args, networks: nn.ModuleDict, optimizers: dict[str, torch.optim.Adam],
                    rng: torch.Generator) -> training.TrainStep:
    """`train_step(images)`: one iteration of Algorithm 1, in place; returns losses and terms.

    images: uint8 [B, 3, H, W], this process's share of the mini-batch. z and D's noise are of
    `rng`, which is seeded anew before each iteration. Nothing in the step waits for the device.
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

        def latents() -> Tensor:
            return draw_latents(args.batch_size, args, rng)[own]

        def noise() -> Noise:
            return [v[own] for v in draw_noise(args.batch_size, args, rng)]

        # D: tell x from G(z), and with --manifold-in-discriminator keep the two spheres apart
        fake = generate(latents(), True)  # one pass for D's update and, its graph kept, for G's
        D.requires_grad_(True)
        loss, terms = d_objective(x, fake.detach(), noise(), noise())
        losses = {"discriminator": loss, **terms}
        if "history" in networks:
            drift = networks["history"]["discriminator"].take_in(D)
            loss = loss + args.historical_averaging * drift
        networks.zero_grad()
        loss.backward()
        training.average_gradients(networks)
        optimizers["discriminator"].step()

        # G: bring the averaged spheres together, keep its images' features uncorrelated
        D.requires_grad_(False)  # its features are taken anew, since it has just learnt [Algorithm 1]
        for step in range(3 if args.baseline == "minibatch" else 1):
            if step > 0:
                fake = generate(latents())  # the original's code draws new z for the first update too
            real_noise = [] if args.baseline == "minibatch" else noise()
            loss, terms, averages = g_objective(x, fake, real_noise, noise())
            losses |= {"generator": loss, **terms}
            if "history" in networks:
                drift = networks["history"]["generator"].take_in(G)
                loss = loss + args.historical_averaging * drift
            networks.zero_grad()
            loss.backward()
            training.average_gradients(networks)
            optimizers["generator"].step()
        if averages is not None:
            networks["averages"].store(averages, args.delta)

        training.average(G.norms.buffers())
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
    """This process's share of an iteration's mini-batch, uint8 [B, 3, H, W] on the device.

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
    if checkpoint is None:  # on 500 images, as in Improved GAN's code
        some = images[data_order(len(images), args.seed, 0, images.device)[:500]].to(device)
        init_by_data(args, networks, some, rng.manual_seed(draw_seed(args.seed, 0, 0, 1)))
    lr = torch.tensor(args.lr, device=device)  # filled in place: a captured graph reads it
    for optimizer in optimizers.values():
        optimizer.param_groups[0]["lr"] = lr
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
                points["charts/learning_rate"] = lr.item()
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
            lr.fill_(learning_rate(args, iteration))
            losses = train_step(get_batch(images, args, iteration, device))
            training.show_iterations(bar, first=iteration == start)


# -------------------------------------------------------------------- arguments and files
RANGES = {"seed": "[0, 2147483648)", "num_images": "[1, inf)", "image_size": "[16, inf)", "width": "(0, inf)",
          "latent_dim": "[1, inf)", "ema": "[0, 1)", "kernel_width": "(0, inf)", "alpha": "[0, inf)",
          "beta": "[0, inf)", "delta": "[0, 1)", "historical_averaging": "[0, inf)", "label_smoothing": "[0, 1)",
          "iterations": "[1, inf)", "epochs": "[1, inf)", "batch_size": "[2, inf)", "lr": "(0, inf)",
          "beta1": "[0, 1)", "beta2": "[0, 1)", "log_every": "[0, inf)", "sample_every": "[0, inf)",
          "eval_every": "[0, inf)", "checkpoint_every": "[0, inf)", "num_real": "[4, inf)",
          "num_fake": "[10, inf)", "num_is": "[10, inf)"}


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
