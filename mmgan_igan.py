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

What to expect: docs/mmgan.md.
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
import os
import pathlib
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Annotated, Callable, Literal, Optional, Union

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
SHOWN = (("D", "discriminator"), ("G", "generator"))  # the progress bar's losses
Manifold = tuple[Tensor, Tensor]  # centroid [d], radius []
Noise = tuple[Optional[list[Tensor]], Optional[list[Tensor]]]  # for real and for generated images, see `draw_noise`


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
    dataset: Literal["cifar10", "folder"] = "cifar10"
    """folder: a directory (recursive) or .zip of images, centre-cropped to squares and resized to --image-size."""
    data_dir: str = "data"
    """Where data sets are kept and downloaded to; with folder, the directory or .zip itself."""
    image_size: int = 32
    """Height and width, a multiple of 8 [Improved GAN's code]."""


@dataclass
class ModelArgs:
    width: float = 1.0
    """Factor of the networks' channels: 0.25 makes a run on a CPU possible."""
    latent_dim: int = 100
    """Dimensions of z ~ U(0, 1) [Improved GAN's code]."""
    ema: float = 0.0
    """Decay of a moving average of G's weights, used for samples and scores; 0: off [paper]."""
    minibatch_discrimination: bool = False
    """Minibatch discrimination before D's last layer; in --baseline minibatch always [Improved GAN's code]."""


@dataclass
class LossArgs:
    kernel: Literal["auto", "none", "linear", "poly", "rbf", "exp"] = "auto"
    """K of Eq. 7 and 8; none: Eq. 4 and 5. auto: exp [paper, figure 3]."""
    kernel_width: Union[Literal["auto", "real"], float] = "auto"
    """The kernel's width w [the paper gives none]. real: a moving average of the real features' spread, that is, their
    mean squared distance (rbf) or distance (exp) from their centroid, or their squared norm (poly). auto: the mean of
    that and of all features' spread, real and generated, so that K between the centroids cannot vanish."""
    alpha: float = 1.0
    """Weight of the difference of radii in Eq. 8 [paper]."""
    beta: Optional[float] = None
    """Weight of the correlation regulariser R_G; 0: "No R_G". Default: 0.1 [paper]."""
    delta: float = 0.9
    """Decay of the moving averages of centroids and radii [paper: 0.9 or greater]."""
    manifold_scale: Literal["one", "width", "undamped"] = "width"
    """Factor of L_G in G's loss. one: 1 [paper]. width: the kernel's width, in which distances have the features' own
    unit, as in feature matching [ours]. undamped: 1 / (1 - delta), since the moving averages pass only 1 - delta of
    L_G's gradient [ours]."""
    manifold_in_discriminator: bool = False
    """D's loss has L_G, with a minus and unscaled [paper: Eq. 6, 10]; without: it is G's alone [ours]."""
    correlation_in_discriminator: bool = False
    """D's loss has R_G, with a minus [Eq. 10]; D then learns only to see all generated images as the same. Without: it
    is G's alone [paper: section V]."""
    features: Literal["map", "pooled"] = "map"
    """What the spheres are of. map: D's last map, flattened [paper, figure 2]. pooled: its 192 channels averaged over
    the image, as feature matching takes them; by these even real images look much alike."""
    baseline: Optional[Literal["minibatch", "feature-matching"]] = None
    """Improved GAN instead of manifolds. minibatch: minibatch discrimination, G's loss is E log(1 - D(G(z))).
    feature-matching: G's loss is the mean absolute difference of D's mean features."""
    generator_steps: Optional[int] = None
    """With --baseline: updates of G an iteration. Default: minibatch 3, else 1 [Improved GAN's code]."""
    historical_averaging: float = 1.0
    """With --baseline minibatch: weight of each network's squared distance from its weights' mean so far; 0: off
    [Improved GAN's paper, without a weight]. The losses that are logged are without it."""
    label_smoothing: float = 0.1
    """With --baseline minibatch: real images' target in D's loss is 1 minus this; 0: off [Improved GAN's paper]."""


@dataclass
class OptimisationArgs:
    iterations: Optional[int] = None
    """Mini-batches trained on. Default: --epochs passes over the data set."""
    epochs: int = 1200
    """Passes over the data set, where --iterations is not given [original's code]."""
    batch_size: int = 100
    """Images a mini-batch, over all processes of torchrun [original's code]."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 3e-4
    """Adam's learning rate [original's code]."""
    lr_schedule: Literal["constant", "last-third"] = "last-third"
    """last-third: --lr, falling linearly to 0 over the last third of the T iterations, i.e. --lr times
    min(3 (1 - t/T), 1) [original's code]."""
    beta1: float = 0.5
    """Adam's first decay [original's code]."""
    beta2: float = 0.999
    """Adam's second decay [original's code]."""
    adam_eps: float = 1e-4
    """Adam's epsilon [original's code, where it is 1e-8 inside the root]. MMGAN's G always has 1e-8,
    since the moving averages make its gradients small [ours]."""


@dataclass
class LoggingArgs:
    log_every: int = 100
    """Iterations between lines in TensorBoard; 0: none."""
    gradient_every: int = 1000
    """Iterations between measurements of each term's gradient to G (TensorBoard: gradients/*); 0: none."""
    sample_every: int = 1000
    """Iterations between grids of samples; 0: none."""
    eval_every: int = 10000
    """Iterations between evaluations (and one at the end); 0: none, and no Inception weights needed."""
    checkpoint_every: int = 1000
    """Iterations between checkpoints; 0: only at the start, at the end, before an evaluation and on a signal."""
    num_real: Optional[int] = None
    """Real images for FID. Default: 10,000 [ours, as in GN-GAN], or all if there are fewer."""
    num_fake: int = 5000
    """Generated images for FID [ours, as in GN-GAN]."""
    num_is: Optional[int] = None
    """Generated images for the Inception Score. Default: --num-fake; cifar10: 50,000 [paper]."""
    inception_weights: Optional[str] = None
    """A file of torch-fidelity's Inception weights. Default: downloaded once."""


@dataclass
class Args(RunArgs, DataArgs, ModelArgs, LossArgs, OptimisationArgs, LoggingArgs):
    """Every flag, in the groups of --help."""


def resolve(args: Args) -> Args:
    """The arguments with every default filled in that depends on another. The baseline has no kernel and no beta, MMGAN
    no steps of G; iterations counted in epochs wait for the data set, see `main`."""
    defaults = {}
    if args.dataset == "cifar10":
        defaults["num_is"] = 50_000
    if not args.baseline:
        defaults |= {"kernel": "exp", "beta": 0.1}
    else:
        defaults["generator_steps"] = 3 if args.baseline == "minibatch" else 1
    return dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) in (None, "auto")})


# ------------------------------------------------------------------------------------------------------ networks
def autocast(forward: Callable) -> Callable:
    """A network's method, run in bf16 where its `bf16` is set. Each call is a region of its own, since a region keeps
    bf16 copies of the weights, which an update would leave behind."""
    @functools.wraps(forward)
    def wrapped(network: nn.Module, x: Tensor, *rest) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=network.bf16):
            return forward(network, x, *rest)

    return wrapped


class BatchNorm(nn.Module):
    """Batch norm without gain, which normalises a training batch by its own statistics, but moves the running ones
    only if told to: once an iteration, however often G is run. The running statistics begin at 0 and `running_weight`
    is the weight of all batches in them: evaluation divides by it, as Adam does."""

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-6):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("weight", torch.ones(channels))
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


class VirtualBatchNorm(nn.Module):
    """Batch norm without gain. The first `references` samples are normalised by their own statistics, every other by
    those of the reference and of itself. It has no running statistics."""

    def __init__(self, channels: int, references: int):
        super().__init__()
        self.references = references
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, update: bool) -> Tensor:
        x = x.float()
        moments = torch.stack([x, x.square()]).mean((3, 4))  # [2, n, C]
        reference = moments[:, : self.references].mean(1, keepdim=True)
        weight = 1 / (self.references + 1)
        mean, square = torch.cat([reference.expand(-1, self.references, -1),
                                  weight * moments[:, self.references :] + (1 - weight) * reference], 1)
        scale = (square - mean.square()).clamp_min(0).add(1e-6).rsqrt()
        return (x - mean[..., None, None]) * scale[..., None, None] + self.bias[:, None, None]


def weight_norm(layer: nn.Module, init_std: float = 1.0, train_scale: bool = False) -> nn.Module:
    """A convolution or linear layer with weight g v / |v|, one g an output channel; g is trained only on demand.
    `init_by_data` gives its output the deviation init_std."""
    nn.init.normal_(layer.weight, std=0.05)
    nn.init.zeros_(layer.bias)
    torch.nn.utils.parametrizations.weight_norm(layer, dim=1 if isinstance(layer, nn.ConvTranspose2d) else 0)
    nn.init.ones_(layer.parametrizations.weight.original0)
    layer.init_std, layer.frozen = init_std, not train_scale
    return layer


class Generator(nn.Module):
    """z [B, latent_dim] -> images [B, C, size, size] in [-1, 1]; the notation is for size 32, width 1."""

    def __init__(self, args: Args):
        super().__init__()
        self.side, self.bf16 = args.image_size // 8, args.precision == "bf16"
        widths = [max(1, round(c * args.width)) for c in (512, 256, 128)]
        references = args.batch_size if args.baseline == "minibatch" else 0
        norm = functools.partial(VirtualBatchNorm, references=references) if references else BatchNorm
        self.linear = nn.Linear(args.latent_dim, widths[0] * self.side**2, bias=False)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 5, 2, 2, output_padding=1, bias=False)
                                 for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList([norm(widths[0] * self.side**2), *map(norm, widths[1:])])
        for layer in (self.linear, *self.ups):
            nn.init.normal_(layer.weight, std=0.05)
        self.last = weight_norm(nn.ConvTranspose2d(widths[-1], 3, 5, 2, 2, output_padding=1), 0.1, train_scale=True)
        self.register_buffer("reference", torch.rand(references, args.latent_dim))

    @autocast
    def forward(self, z: Tensor, update_statistics: bool = False) -> Tensor:
        x = self.linear(torch.cat([self.reference, z]))[..., None, None]  # [B, 8192, 1, 1]
        x = F.relu(self.norms[0](x, update_statistics)).flatten(1).unflatten(1, (-1, self.side, self.side))
        x = x.contiguous(memory_format=torch.channels_last)  # [B, 512, 4, 4]
        for up, norm in zip(self.ups, self.norms[1:]):  # to [B, 256, 8, 8], [B, 128, 16, 16]
            x = F.relu(norm(up(x), update_statistics))
        x = self.last(x[len(self.reference) :])  # [B, 3, 32, 32]
        return torch.tanh(x.float())  # in fp32: bf16 has too few steps near 1


class MinibatchDiscrimination(nn.Module):
    """features [B, d] -> [B, d + kernels]: with each sample's closeness to the others of its batch, sum over j of
    exp(-|M_i - M_j|_1), where M_i are a kernel's 5 coordinates of sample i (Salimans et al. 2016, section 3.2)."""

    def __init__(self, features: int, kernels: int, dim: int = 5):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(features, kernels, dim) * 0.05)
        self.log_scale = nn.Parameter(torch.zeros(kernels, dim))
        self.bias = nn.Parameter(torch.full((kernels,), -1.0))

    def distances(self, x: Tensor) -> Tensor:
        """L1 distances, [B, B, kernels]; those of a sample from itself so large that they add nothing."""
        weight = self.theta * (self.log_scale.exp() / self.theta.norm(dim=0))
        points = torch.einsum("bf,fkd->bkd", x, weight)
        itself = torch.eye(len(x), device=x.device)[..., None]
        return (points[:, None] - points).abs().sum(3) + 1e6 * itself

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a layer: its product may be in TF32
            x = x.float()
            return torch.cat([x, torch.exp(-self.distances(x)).sum(1) + self.bias], 1)


class Discriminator(nn.Module):
    """images [B, 3, size, size] -> logits [B], the logsumexp of ten classes' (Salimans et al. 2016, section 5); the
    score D(x) is their sigmoid. `noise`, from `draw_noise`, is what disturbs a training batch."""

    def __init__(self, args: Args):
        super().__init__()
        self.bf16 = args.precision == "bf16"
        a, b = (max(1, round(c * args.width)) for c in (96, 192))
        shapes = [(3, a, 3, 1, 1), (a, a, 3, 1, 1), (a, a, 3, 2, 1), (a, b, 3, 1, 1), (b, b, 3, 1, 1), (b, b, 3, 2, 1),
                  (b, b, 3, 1, 0), (b, b, 1, 1, 0), (b, b, 1, 1, 0)]
        self.convs = nn.ModuleList(weight_norm(nn.Conv2d(*shape)) for shape in shapes)
        self.additive = args.baseline == "minibatch"  # Gaussian noise on the images, else dropout
        kernels = max(1, round(100 * args.width)) if self.additive or args.minibatch_discrimination else 0
        self.minibatch = MinibatchDiscrimination(b, kernels) if kernels else nn.Identity()
        self.linear = weight_norm(nn.Linear(b + kernels, 10), 0.1, train_scale=True)

    @autocast
    def features(self, x: Tensor, noise: Optional[list[Tensor]] = None) -> Tensor:
        """The last convolution's map after its activation, [B, 192, 6, 6]."""
        if noise is not None:
            x = x + noise[0] if self.additive else x * noise[0]
        for i, conv in enumerate(self.convs):  # three to [B, 96, 16, 16], three to [B, 192, 8, 8], [B, 192, 6, 6]
            x = F.leaky_relu(conv(x), 0.2)
            if noise is not None and i in (2, 5):
                x = x * noise[1 + i // 3]
        return x.float()

    @autocast
    def logit(self, features: Tensor) -> Tensor:
        """Logits [B] of the maps from `features`."""
        return torch.logsumexp(self.linear(self.minibatch(features.mean((2, 3)))).float(), 1)

    def forward(self, x: Tensor, noise: Optional[list[Tensor]] = None) -> Tensor:
        return self.logit(self.features(x, noise))


def draw_noise(n: int, args: Args, rng: torch.Generator) -> list[Tensor]:
    """What D disturbs n training images by: on the images Gaussian noise of deviation 0.2 (minibatch) or a dropout mask
    of 0.2, [n, 3, 32, 32]; dropout masks of 0.5 after each stride, [n, 96, 16, 16] and [n, 192, 8, 8]."""
    def mask(keep: float, *shape: int) -> Tensor:
        drawn = torch.empty(n, *shape, device=rng.device).bernoulli_(keep, generator=rng) / keep
        return drawn.contiguous(memory_format=torch.channels_last)

    side, (a, b) = args.image_size, (max(1, round(c * args.width)) for c in (96, 192))
    gaussian = args.baseline == "minibatch"
    first = (torch.randn(n, 3, side, side, generator=rng, device=rng.device) * 0.2 if gaussian
             else mask(0.8, 3, side, side))
    return [first, mask(0.5, a, side // 2, side // 2), mask(0.5, b, side // 4, side // 4)]


@torch.no_grad()
def init_by_data(args: Args, networks: nn.ModuleDict, images: Tensor, rng: torch.Generator) -> None:
    """Data-dependent initialisation of weight norm's scales and biases by uint8 images [n, 3, H, W] and as many z, in
    fp32. On them every weight-normed layer's output gets mean 0 and deviation init_std. Minibatch discrimination's
    nearest sample gets a mean distance of 2, and its output mean 0."""
    def normalise(layer: nn.Module, _, output: Tensor) -> Tensor:
        axes = [i for i in range(output.ndim) if i != 1]
        mean = output.mean(axes)
        scale = layer.init_std / (output.square().mean(axes) - mean.square()).clamp_min(1e-12).sqrt()
        layer.bias.copy_(-mean * scale)
        layer.parametrizations.weight.original0.mul_(scale.view_as(layer.parametrizations.weight.original0))
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
    average(list(networks.parameters()))  # GPUs may round differently, and all processes need the same
    if args.ema:
        networks["generator_ema"].load_state_dict(G.state_dict())


# -------------------------------------------------------------------------------------------------------- losses
def point_distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of points a [..., d] and b [..., d], in fp32; finite gradient where they coincide."""
    return ((a - b).square().sum(-1) + 1e-12).sqrt()


def kernel(a: Tensor, b: Tensor, name: str, width: Tensor | float) -> Tensor:
    """K(a_i, b_j) for points a [..., n, d] and b [..., m, d], [..., n, m].

    linear a'b; poly (a'b / w + 1)^3; rbf exp(-|a - b|^2 / 2w); exp exp(-|a - b| / 2w) [offset, degree: ours]. Distances
    are norms of differences: from inner products they would lose the last digits of near points.
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
    """The sphere around features [n, d]: its centroid [d] (Eq. 3) and radius []. That is the mean distance from the
    centroid (none: Eq. 4) or the mean squared distance in the kernel's Hilbert space (Eq. 7)."""
    centroid = features.mean(0)
    if name == "none":
        return centroid, point_distance(features, centroid).mean()
    return centroid, squared_distance(features, centroid, name, width).mean()


def manifold_distance(real: Manifold, fake: Manifold, alpha: float, name: str,
                      width: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The two terms of L_G as weighted, of the centroids and of the radii: |c_Y - c_X| and |l_Y - l_X| (none: Eq. 5,
    which has no alpha), or Eq. 8's. Scalars."""
    radii = (real[1] - fake[1]).abs()
    if name == "none":
        return point_distance(real[0], fake[0]), radii
    return squared_distance(real[0], fake[0], name, width), alpha * radii


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
    """The spread of features [n, d] that --kernel-width averages, without gradient: at the typical distance K is then
    e^-1/2 = 0.61 (rbf, exp). Scalar."""
    features = features.detach()
    if name == "poly":
        return features.square().sum(1).mean() + 1e-12  # dead units: K stays finite
    lengths = point_distance(features, features.mean(0))
    return lengths.square().mean() if name == "rbf" else lengths.mean()


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))) (Eq. 1) of logits [B]; scalar."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def feature_matching(real: Tensor, fake: Tensor) -> Tensor:
    """Mean absolute difference of real and generated images' mean features, of [n, d] (Improved GAN's code); scalar."""
    return (real.mean(0) - fake.mean(0)).abs().mean()


# ----------------------------------------------------------------------------------------------------- objectives
class Spheres(nn.Module):
    """Moving averages of both spheres and of the kernel's width: buffers, which a checkpoint holds like weights."""

    def __init__(self, args: Args):
        super().__init__()
        dim = max(1, round(192 * args.width)) * ((args.image_size // 4 - 2) ** 2 if args.features == "map" else 1)
        for name, shape in (("centroid_real", (dim,)), ("radius_real", ()), ("centroid_fake", (dim,)),
                            ("radius_fake", ()), ("kernel_width", ())):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("decay", torch.zeros(()))  # 0 until the first mini-batch has come, so that it starts them

    def blend(self, name: str, value: Tensor) -> Tensor:
        """delta average + (1 - delta) value: gradient goes to the value, the history is a constant."""
        return self.decay * getattr(self, name) + (1 - self.decay) * value

    @torch.no_grad()
    def commit(self, blended: dict[str, Tensor], delta: float) -> None:
        """Keep the averages that `match_manifolds` made."""
        for name, value in blended.items():
            getattr(self, name).copy_(value)
        average(list(self.buffers()))
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


def match_manifolds(args: Args, spheres: Spheres, real: Tensor, fake: Tensor
                    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """L_G, its terms and R_G for D's maps [B, C, h, w] of real and generated images, scalars by name; then the averages
    that L_G is of: those in `spheres` with this mini-batch taken in."""
    # under torchrun spheres and R_G are of a process's share of the mini-batch
    real, fake = (v.flatten(1) if args.features == "map" else v.mean((2, 3)) for v in (real, fake))
    width = torch.ones((), device=real.device)
    if not isinstance(args.kernel_width, str):
        width = width * args.kernel_width
    elif args.kernel in ("rbf", "exp", "poly"):
        typical = typical_width(real, args.kernel)
        if args.kernel_width == "auto":
            typical = (typical + typical_width(torch.cat([real, fake]), args.kernel)) / 2
        width = spheres.blend("kernel_width", typical)
    blended = {"kernel_width": width}
    for side, features in (("real", real), ("fake", fake)):
        centroid, radius = manifold(features, args.kernel, width)
        blended[f"centroid_{side}"] = spheres.blend(f"centroid_{side}", centroid)
        blended[f"radius_{side}"] = spheres.blend(f"radius_{side}", radius)
    centroids, radii = manifold_distance(*((blended[f"centroid_{side}"], blended[f"radius_{side}"])
                                           for side in ("real", "fake")), args.alpha, args.kernel, width)
    terms = {"manifold_distance": centroids + radii, "centroid_distance": centroids, "radius_difference": radii,
             "correlation_penalty": correlation_penalty(fake), "radius_real": blended["radius_real"],
             "radius_fake": blended["radius_fake"]}
    if args.kernel != "none":
        with torch.no_grad():
            terms["kernel_mean"] = kernel(real, real.mean(0, keepdim=True), args.kernel, width).mean()
        terms["kernel_width"] = width
    return terms, blended


def manifold_scale(args: Args, spheres: Spheres, blended: dict[str, Tensor]) -> Tensor | float:
    """What --manifold-scale multiplies L_G by in G's loss."""
    return {"one": 1.0, "width": blended["kernel_width"], "undamped": 1 / (1 - spheres.decay)}[args.manifold_scale]


# Each objective returns its loss, which is descended, and then the terms that it is made of, as scalars by name.
def discriminator_objective(args: Args, networks: nn.ModuleDict, x: Tensor, fake: Tensor,
                            noise: Noise) -> dict[str, Tensor]:
    """L_D of Eq. 10 for images [B, C, H, W] in [-1, 1]; its cross-entropy is halved, as in Improved GAN's code."""
    D = networks["discriminator"]
    real_features, fake_features = D.features(x, noise[0]), D.features(fake, noise[1])
    real_logit, fake_logit = D.logit(real_features), D.logit(fake_features)
    loss = cross_entropy(real_logit, fake_logit) / 2
    if args.baseline == "minibatch":  # one-sided: the target of real images alone
        loss = loss + args.label_smoothing * real_logit.mean() / 2
    terms = {"score_real": torch.sigmoid(real_logit).mean(), "score_fake": torch.sigmoid(fake_logit).mean()}
    if not args.baseline and (args.manifold_in_discriminator or args.correlation_in_discriminator):
        terms["cross_entropy"] = loss
        matching, _ = match_manifolds(args, networks["spheres"], real_features, fake_features)
        if args.manifold_in_discriminator:
            loss = loss - matching["manifold_distance"]
        if args.correlation_in_discriminator:
            loss = loss - args.beta * matching["correlation_penalty"]
    return {"discriminator": loss, **terms}


def generator_objective(args: Args, networks: nn.ModuleDict, x: Tensor, fake: Tensor,
                        noise: Noise = (None, None)) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """L_G^final of Eq. 10 for images [B, C, H, W] in [-1, 1]; then the averages to keep, see `match_manifolds`."""
    D = networks["discriminator"]
    if args.baseline == "minibatch":
        return {"generator": -F.softplus(D(fake, noise[1])).mean()}, {}
    real_features, fake_features = D.features(x, noise[0]), D.features(fake, noise[1])
    if args.baseline == "feature-matching":
        return {"generator": feature_matching(real_features.mean((2, 3)), fake_features.mean((2, 3)))}, {}
    terms, blended = match_manifolds(args, networks["spheres"], real_features, fake_features)
    loss = manifold_scale(args, networks["spheres"], blended) * terms["manifold_distance"]
    loss = loss + args.beta * terms["correlation_penalty"]
    return {"generator": loss, **terms}, blended


def gradient_norms(args: Args, networks: nn.ModuleDict, images: Tensor, z: Tensor) -> dict[str, float]:
    """Norm of the gradient to G's weights of each term of its loss, as weighted there, for images uint8 [B, C, H, W]
    and z [B, latent_dim], with D undisturbed; changes nothing. R_G's grows with B."""
    G, x = networks["generator"], to_float(images)
    networks["discriminator"].requires_grad_(False)
    terms, blended = generator_objective(args, networks, x, G(z))
    weights = {"generator": 1.0}
    if not args.baseline:
        scale = manifold_scale(args, networks["spheres"], blended)
        weights = {"centroid_distance": scale, "radius_difference": scale, "correlation_penalty": args.beta}
    norms = {}
    for name, weight in weights.items():
        gradients = torch.autograd.grad(weight * terms[name], list(G.parameters()), retain_graph=True)
        norms[name] = torch.cat([g.flatten() for g in gradients]).norm().item()
    return norms


# ---------------------------------------------------------------------------------------------------- train step
def init_networks(args: Args, device: torch.device) -> nn.ModuleDict:
    """G and D, drawn on the CPU from args.seed, so that every device starts from the same weights (but for
    `init_by_data`); the spheres; the history of historical averaging."""
    torch.manual_seed(args.seed)
    networks = nn.ModuleDict({"generator": Generator(args), "discriminator": Discriminator(args)})
    if not args.baseline:
        networks["spheres"] = Spheres(args)
    if args.baseline == "minibatch" and args.historical_averaging:
        networks["history"] = nn.ModuleDict({name: History(network) for name, network in networks.items()})
    if args.ema:
        networks["generator_ema"] = copy.deepcopy(networks["generator"]).requires_grad_(False).eval()
    return networks.to(device, memory_format=torch.channels_last)  # the faster layout for most convolutions


def init_optimizers(args: Args, networks: nn.ModuleDict) -> dict[str, torch.optim.Adam]:
    """One Adam a network, of all its weights but the scales of weight norm that stay as initialised. Improved GAN's
    code has its epsilon inside the root: 1e-8 there is 1e-4 here, but for gradients near 1e-4."""
    frozen = {id(m.parametrizations.weight.original0) for m in networks.modules() if getattr(m, "frozen", False)}
    capturable = next(networks.parameters()).device.type == "cuda" and args.cuda_graph
    epsilons = {"discriminator": args.adam_eps, "generator": args.adam_eps if args.baseline else 1e-8}
    return {name: torch.optim.Adam([p for p in networks[name].parameters() if id(p) not in frozen], lr=args.lr,
                                   betas=(args.beta1, args.beta2), eps=eps, fused=True, capturable=capturable)
            for name, eps in epsilons.items()}


def learning_rate(args: Args, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0."""
    return args.lr * (1.0 if args.lr_schedule == "constant" else min(3 * (1 - iteration / args.iterations), 1.0))


def draw_latents(n: int, args: Args, rng: torch.Generator) -> Tensor:
    """z ~ U(0, 1), [n, latent_dim]."""
    return torch.rand(n, args.latent_dim, generator=rng, device=rng.device)


def to_float(images: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] as networks take and make them: fp32 in [-1, 1]."""
    return images.to(torch.float32, memory_format=torch.channels_last) / 128 - 127.5 / 128


def to_bytes(x: Tensor) -> Tensor:
    """Networks' images [B, C, H, W] as uint8."""
    return (x * 128 + 127.5 + 0.5).clamp(0, 255).to(torch.uint8).contiguous()


def own_slice(n: int) -> slice:
    """This process's part of a mini-batch of n, which torchrun's processes split; alone: all of it."""
    rank, world = common.world()
    return slice(rank * n // world, (rank + 1) * n // world)


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over torchrun's processes, in one message; alone: nothing."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / dist.get_world_size()).split([t.numel() for t in tensors])):
            t.copy_(mean.view(t.shape))


def make_train_step(args: Args, networks: nn.ModuleDict, optimizers: dict[str, torch.optim.Adam],
                    rng: torch.Generator) -> Callable[[Tensor], dict[str, Tensor]]:
    """`train_step(images)`: one iteration of Algorithm 1, in place; returns its losses and terms, scalars.

    images: uint8 [B, C, H, W], this process's share of the mini-batch. z and D's noise are drawn from `rng`, which is
    seeded anew before each iteration. Nothing in it waits for the device.
    """
    G, D = networks["generator"], networks["discriminator"]
    discriminator, generator = (functools.partial(objective, args, networks) for objective in (
        discriminator_objective, generator_objective))
    generate = G
    if args.compile:  # the losses, not the loop: optimisers and draws stay outside
        discriminator, generator, generate = (torch.compile(f, fullgraph=True, dynamic=False)
                                              for f in (discriminator, generator, generate))

    def descend(terms: dict[str, Tensor], name: str) -> None:
        """A step of the named network down the first of the terms, and by historical averaging towards the mean of its
        weights so far."""
        loss, parameters = next(iter(terms.values())), optimizers[name].param_groups[0]["params"]
        if "history" in networks:
            loss = loss + args.historical_averaging * networks["history"][name].take_in(networks[name])
        for p in parameters:
            p.grad = None
        loss.backward(inputs=parameters)
        average([p.grad for p in parameters])
        optimizers[name].step()

    # G(z) is computed once for both updates. D's features are computed anew after D's update, since the spheres and G's
    # gradient are to come from the D that has just learnt (Algorithm 1).
    def train_step(images: Tensor) -> dict[str, Tensor]:
        x, part = to_float(images), own_slice(args.batch_size)

        def latents() -> Tensor:
            return draw_latents(args.batch_size, args, rng)[part]

        def noise() -> list[Tensor]:
            return [v[part] for v in draw_noise(args.batch_size, args, rng)]

        fake = generate(latents(), True)  # one forward pass for D's update and, its graph kept, for G's
        D.requires_grad_(True)
        losses = discriminator(x, fake.detach(), (noise(), noise()))
        descend(losses, "discriminator")
        D.requires_grad_(False)
        for step in range(args.generator_steps or 1):
            fake = generate(latents()) if step else fake  # new z from the second on; Improved GAN's code: in all
            terms, blended = generator(x, fake, (None if args.baseline == "minibatch" else noise(), noise()))
            losses = {**losses, **terms}
            descend(terms, "generator")
        if not args.baseline:
            networks["spheres"].commit(blended, args.delta)
        average(list(G.norms.buffers()))
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
    """G(z) in evaluation mode as uint8 [n, C, H, W]."""
    mode = generator.training
    images = to_bytes(generator.eval()(z))
    generator.train(mode)
    return images


def make_sampler(generator: Generator, args: Args, device: torch.device) -> Callable[[int], Tensor]:
    """A function from n to n new images, uint8 [n, C, H, W]. Its draws are its own: the same for every evaluation, and
    none of training's, so that how often one evaluates changes nothing."""
    rng = torch.Generator(device).manual_seed(draw_seed(args.seed, 0, 1 + own_slice(args.batch_size).start))
    return lambda n: sample_images(generator, draw_latents(n, args, rng))


def train(args: Args, images: Tensor, device: torch.device, folder: pathlib.Path, checkpoint: Optional[dict],
          evaluator, signals: list[int]) -> bool:
    """Train from the checkpoint, or the start, to args.iterations or a signal in `signals`; whether it came to the end.

    images: uint8 [N, C, H, W]; evaluator: common.metrics.Evaluator, or None for no scores.
    """
    networks = init_networks(args, device)
    optimizers = init_optimizers(args, networks)
    start, seconds, begin = 0, 0.0, time.perf_counter()
    if checkpoint is not None:
        restore(checkpoint, networks, optimizers)
        start, seconds = checkpoint["iteration"], checkpoint["seconds"]
    lr = torch.tensor(args.lr, device=device)  # one tensor for all, filled in place: a captured graph reads it
    for optimizer in optimizers.values():
        optimizer.param_groups[0]["lr"] = lr
    data = common.fingerprint(images)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        images = images.to(device)  # gathered there; a set too large for it is gathered in the host's memory
    rng = torch.Generator(device)
    if checkpoint is None:  # on 500 images, as in Improved GAN's code
        some = images[data_order(len(images), args.seed, 0, images.device)[:500]].to(device)
        init_by_data(args, networks, some, rng.manual_seed(draw_seed(args.seed, 0, 0, 1)))
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
        sizes = ", ".join(f"{name} {sum(p.numel() for p in net.parameters()):,}" for name, net in networks.items()
                          if name in optimizers)
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
                    writer.add_scalar("charts/learning_rate", lr, iteration)
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
                scores = evaluator.score(make_sampler(generator, args, device), args.num_fake, args.num_is, stopping)
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
            lr.fill_(learning_rate(args, iteration))
            losses = train_step(get_batch(images, args, iteration, device))
            bar.update()


# ------------------------------------------------------------------------------------------ arguments and files
RANGES = {"seed": "[0, 2147483648)", "num_images": "[1, inf)", "image_size": "[16, inf)", "width": "(0, inf)",
          "latent_dim": "[1, inf)", "ema": "[0, 1)", "alpha": "[0, inf)", "beta": "[0, inf)", "delta": "[0, 1)",
          "generator_steps": "[1, inf)", "iterations": "[1, inf)", "epochs": "[1, inf)", "batch_size": "[2, inf)",
          "lr": "(0, inf)", "beta1": "[0, 1)", "beta2": "[0, 1)", "log_every": "[0, inf)", "gradient_every": "[0, inf)",
          "sample_every": "[0, inf)", "eval_every": "[0, inf)", "checkpoint_every": "[0, inf)", "num_real": "[2, inf)",
          "num_fake": "[10, inf)", "num_is": "[10, inf)", "historical_averaging": "[0, inf)",
          "label_smoothing": "[0, 1)", "adam_eps": "(0, inf)"}
# What may differ from a checkpoint's run: where things are and how often one looks, nothing that training computes.
FREE = {f.name for group in (RunArgs, LoggingArgs) for f in dataclasses.fields(group)} - {"seed", "precision"}
FREE |= {"data_dir", "iterations"}  # iterations: without a schedule a run can be made longer


def parse_args(argv: Optional[list[str]] = None) -> tuple[Args, Optional[pathlib.Path], Optional[dict]]:
    """The arguments, resolved and checked; with --resume, --evaluate or --generate also the checkpoint's path and
    contents."""
    args, file, checkpoint = common.parse(Args, argv, __doc__, SCRIPT, FREE)
    if file and args.resume and args.lr_schedule != "constant" and args.iterations != checkpoint["args"]["iterations"]:
        raise UserError(f"--iterations is {args.iterations}: --lr-schedule {args.lr_schedule} was begun for "
                        f"{checkpoint['args']['iterations']}; leave --iterations out, or start a new run")
    if file and args.resume and args.iterations < checkpoint["iteration"]:
        raise UserError(f"--iterations is {args.iterations}: {file} is already at {checkpoint['iteration']}")
    args = resolve(dataclasses.replace(args, resume=None))
    common.check_ranges(args, RANGES if isinstance(args.kernel_width, str) else RANGES | {"kernel_width": "(0, inf)"})
    manifolds, minibatch = not args.baseline, args.baseline == "minibatch"
    has_width = manifolds and args.kernel in ("poly", "rbf", "exp")
    used = {"out": args.generate, "num_images": args.generate,
            "kernel": manifolds, "kernel_width": has_width, "alpha": manifolds and args.kernel != "none",
            "beta": manifolds, "delta": manifolds, "manifold_in_discriminator": manifolds,
            "manifold_scale": has_width or manifolds and args.manifold_scale == "undamped",
            "correlation_in_discriminator": manifolds and args.beta > 0, "generator_steps": args.baseline,
            "features": manifolds, "minibatch_discrimination": not minibatch, "historical_averaging": minibatch,
            "label_smoothing": minibatch}
    for name in used:
        if not used[name] and not file and getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name.replace('_', '-')} has no effect here: leave it out")
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
        args = dataclasses.replace(args, num_real=min(args.num_real or 10_000, len(images)),
                                   iterations=args.iterations or max(1, args.epochs * len(images) // args.batch_size))
        evaluator = None
        if args.evaluate or args.eval_every:
            from common import metrics  # its Inception takes seconds to import
            evaluator = metrics.Evaluator(images, args.num_real, args.inception_weights, device)
            if args.num_real < 10_000 and first:
                print(f"{SCRIPT}.py: FID of {args.num_real:,} real images is biased, and comparable only with FIDs of "
                      "as many: look at KID", file=sys.stderr)
        if args.evaluate:
            sample = make_sampler(load_generator(args, checkpoint, device), args, device)
            scores = evaluator.score(sample, args.num_fake, args.num_is)
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
