"""GN-GAN on synthetic data, after "Improving GAN with Neighbors Embedding and Gradient Matching"
(Tran, Bui and Cheung, AAAI 2019): table 2 and figures 3 and 4 (25 Gaussians in 2D), figure 2 (3 Gaussians in 1D).

    python gngan_synthetic.py --epochs 50              # a first look: a tenth of the protocol
    python gngan_synthetic.py                          # GN-GAN's row of table 2: 500 epochs, 8 seeds
    python gngan_synthetic.py --method all             # all eight methods: the whole of table 2
    python gngan_synthetic.py --dim 1 --method all     # figure 2 and its video, with four baselines

The networks are tiny, so plain PyTorch spends its time launching operations, not computing. Two things make this script
fast: all seeds train at once (every weight has a leading seed dimension [S, ...] and every product is a batched
one), and one iteration, with its gradients and Adam steps, is one function that torch.compile turns into one graph.
What to expect: see README.md, "Synthetic data".
"""
from __future__ import annotations

import dataclasses
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
from dataclasses import dataclass
from typing import Callable, Literal, Optional

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.collections import EllipseCollection
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import UserError, reason, write_atomically

SCRIPT = pathlib.Path(__file__).stem
Params = dict[str, Tensor]  # one network: w0 [S, in, out], b0 [S, 1, out], w1, b1, ...
Networks = dict[str, Params]

TITLES = {"gan": "GAN", "ali": "ALI", "vaegan": "VAE-GAN", "vae": "VAE", "betavae": "β-VAE", "wgangp": "WGAN-GP",
          "distgan": "Dist-GAN", "gngan": "GN-GAN"}
METHODS_1D = ("gan", "vaegan", "wgangp", "distgan", "gngan")  # figure 2 draws D(x) along the axis: these have one
STOCHASTIC_ENCODER = ("ali", "vaegan", "vae", "betavae")
NORMAL_PRIOR = ("vaegan", "vae", "betavae")  # their Kullback-Leibler term is against N(0, I)
PAPER = {  # table 2: mean and standard deviation of modes, points, TV (true), TV (differential)
    "gan": [(14.25, 2.49), (1013.38, 171.73), (1.00, 0.00), (0.90, 0.22)],
    "ali": [(17.81, 1.80), (1281.43, 117.84), (0.99, 0.01), (0.72, 0.19)],
    "vaegan": [(12.75, 3.20), (1042.38, 170.17), (1.35, 0.70), (1.34, 0.98)],
    "vae": [(13.48, 2.31), (1265.45, 72.47), (1.81, 0.71), (2.16, 0.72)],
    "betavae": [(18.00, 2.33), (1321.17, 95.61), (1.17, 0.24), (1.47, 0.28)],
    "wgangp": [(21.71, 1.35), (1180.25, 158.63), (0.90, 0.07), (0.51, 0.06)],
    "distgan": [(20.71, 4.42), (1188.62, 311.91), (0.82, 0.19), (0.43, 0.12)],
    "gngan": [(24.39, 0.44), (1461.83, 222.86), (0.57, 0.17), (0.31, 0.12)],
}
METRICS = {"modes": "modes", "points": "points", "tv_true": "TV true *", "tv_diff": "TV diff *"}
NUM_SAMPLES = 2000  # generated samples an evaluation registers [paper]
COMPILE_FROM = 5000  # iterations of a whole run from which compiling (about half a minute, once) pays


# ----------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    # run
    dim: Literal[2, 1] = 2
    """2: 25 Gaussians on a grid (table 2, figures 3 and 4). 1: three Gaussians on a line (figure 2)."""
    method: Literal["gngan", "distgan", "gan", "wgangp", "ali", "vaegan", "vae", "betavae", "all"] = "gngan"
    """What to train; all: each in turn. In 1D: gngan, distgan, gan, wgangp, vaegan."""
    num_seeds: int = 8
    """How many runs to train at once, with the seeds seed, seed + 1, ..."""
    seed: int = 1
    """The first seed: initial weights and draws. Each seed's run is what it would be alone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    compile: bool = True
    """torch.compile the training step of a run of 5,000 iterations or more (half a minute, once; then cached)."""
    run_dir: str = "runs"
    """The folder for run folders."""
    run_name: Optional[str] = None
    """The run folder's name. Default: synthetic{dim}d__gngan_synthetic__{seed}__{time}."""
    resume: Optional[str] = None
    """A run folder or its checkpoint.pt: goes on there, with the arguments saved in it."""
    # model
    hidden_dim: Optional[int] = None
    """Neurons a hidden layer. Default: 64 in 2D, 4 in 1D [paper]."""
    hidden_layers: int = 2
    """Hidden layers of E, G and D; in 1D D has one less [paper for 1D; 2D: our reading]."""
    init_biases: Literal["uniform", "zero"] = "uniform"
    """Initial biases: U(-1, 1) / sqrt(fan_in), which spreads the ReLUs' kinks over the data, or 0 (the authors' code),
    where every kink of a first layer starts at the corner (0, 0) of the data."""
    # loss
    lambda_p: float = 0.1
    """GN-GAN, Dist-GAN, WGAN-GP: weight of the gradient penalty V_P [paper; WGAN-GP: tuned, README]."""
    lambda_m1: float = 0.1
    """GN-GAN: weight of the gradient norms' term of Eq. 13 [paper]."""
    lambda_m2: float = 0.1
    """GN-GAN: weight of the inner products' term of Eq. 13 [paper]."""
    alpha: float = 0.05
    """GN-GAN: share of the reconstructions among the reals of Eq. 7 [paper]."""
    alpha_schedule: Literal["constant", "falling"] = "constant"
    """GN-GAN: falling: alpha goes linearly to 0 between T/2 and 3T/4, as in the authors' image code."""
    reconstruction: Literal["mean", "sum"] = "mean"
    """GN-GAN: squared error of Eq. 1, mean over coordinates (the authors' code) or their sum (the formula)."""
    penalty: Literal["l2", "rms", "score"] = "l2"
    """V_P's norm: the L2 norm of the logit's gradient (the formula), its root mean square over coordinates (the
    authors' code), or the L2 norm of the sigmoid score's gradient."""
    autoencoder_updates: Literal["both", "encoder"] = "both"
    """GN-GAN, Dist-GAN: the autoencoder step trains E and G (the paper) or E alone (the authors' image code)."""
    critic_steps: Optional[int] = None
    """D updates an iteration, each on its own mini-batch. Default: gngan 1; distgan 5 in 2D, 1 in 1D [authors' code];
    wgangp 5; tuned (README): gan 2 and ali 5; vaegan 1."""
    label_smoothing: Optional[float] = None
    """GAN, ALI: one-sided, the real label is 1 - this. Default, tuned (README): gan 0.1, ali 0."""
    lambda_r: float = 0.1
    """Dist-GAN: weight of the latent-data distance term [authors' code; tuned, README]."""
    distgan_reconstruction: Literal["real", "fake"] = "real"
    """Dist-GAN: how D labels reconstructions: real (the paper) or fake (the authors' 2D code) [tuned, README]."""
    vae_sigma: float = 0.02
    """VAE, beta-VAE: the likelihood's fixed standard deviation, in units of the data in [0, 1] [tuned, README]."""
    vae_beta: float = 2.0
    """beta-VAE: weight of the Kullback-Leibler term [tuned, README]."""
    vaegan_gamma: float = 1.0
    """VAE-GAN: weight of the feature reconstruction in G's loss (Larsen et al. 2016) [tuned, README]."""
    vaegan_kl: float = 1.0
    """VAE-GAN: weight of the Kullback-Leibler term in E's loss [tuned, README]."""
    # optimisation
    epochs: Optional[int] = None
    """Passes over the data. Default: 500 in 2D (195,500 iterations), 100 in 1D (10,000 iterations) [paper]."""
    batch_size: Optional[int] = None
    """Points a mini-batch. Default: 128 in 2D [paper], 64 in 1D [authors' code]."""
    lr: float = 1e-3
    """Adam's learning rate [paper]."""
    lr_decay: float = 0.99
    """2D: the learning rate is multiplied by this every 10,000 steps [paper]. In 1D it is constant."""
    lr_decay_steps: Literal["updates", "iterations"] = "updates"
    """What counts as a step there: each update (the authors' Dist-GAN code; GN-GAN has three an iteration), or an
    iteration."""
    beta1: Optional[float] = None
    """Adam's first decay. Default: 0.8 in 2D [paper], 0.5 in 1D [authors' code]."""
    beta2: Optional[float] = None
    """Adam's second decay. Default: 0.999 in 2D, 0.9 in 1D [authors' code]."""
    ema: float = 0.0
    """Decay of a moving average of G's weights, evaluated beside the raw ones; 0: off [paper]."""
    # logging
    checkpoint_every: int = 10
    """Epochs between checkpoints; 0: only at the end and on SIGINT or SIGTERM."""


def resolve(args: Args, method: str) -> Args:
    """The arguments of one method, with every default filled in that depends on --dim or on the method."""
    two = args.dim == 2
    defaults = {
        "hidden_dim": 64 if two else 4, "epochs": 500 if two else 100, "batch_size": 128 if two else 64,
        "beta1": 0.8 if two else 0.5, "beta2": 0.999 if two else 0.9,
        "critic_steps": {"wgangp": 5, "ali": 5, "gan": 2, "distgan": 5 if two else 1}.get(method, 1),
        "label_smoothing": 0.1 if method == "gan" else 0.0,
    }
    return dataclasses.replace(args, method=method, **{k: v for k, v in defaults.items() if getattr(args, k) is None})


# ---------------------------------------------------------------------------------------------------------- data
def make_data(dim: int) -> tuple[Tensor, Tensor, float]:
    """The data set, the same for every seed and run.

    Returns points [N, dim], the modes' centres [M, dim] and the radius within which a sample counts as a mode's.
    2D: 25 modes of 2,000 points each, standard deviation 0.05, scaled into [0, 1] by the largest coordinate
    [authors' data file]. 1D: 6,400 points of three equally likely modes of standard deviation 0.5 at -4, 0, 4 [ours].
    The radius is 2 sqrt(2) standard deviations: in 2D sqrt(2) 0.1 in the original coordinates [authors' code], which
    98.1% of the real points satisfy.
    """
    generator = torch.Generator().manual_seed(0)
    if dim == 1:
        centers = torch.tensor([[-4.0], [0.0], [4.0]])
        points = centers[torch.arange(6400) % 3] + 0.5 * torch.randn(6400, 1, generator=generator)
        return points, centers, 2 * math.sqrt(2) * 0.5
    axis = torch.arange(-4.0, 5.0, 2.0)
    centers = torch.cartesian_prod(axis, axis)
    points = centers.repeat_interleave(2000, 0) + 0.05 * torch.randn(50000, 2, generator=generator)
    scale = points.abs().max()
    return (points / scale + 1) / 2, (centers / scale + 1) / 2, float(2 * math.sqrt(2) * 0.05 / scale / 2)


def make_generators(args: Args) -> tuple[list[torch.Generator], list[torch.Generator]]:
    """One generator a seed for weights and draws, and one for evaluation, so that measuring does not change training.
    A generator takes 32 bits of its seed; the two differ in the highest."""
    seeds = range(args.seed, args.seed + args.num_seeds)
    return tuple([torch.Generator().manual_seed(start + s) for s in seeds] for start in (0, 2**31))


def draw_epoch(data: Tensor, generators: list[torch.Generator], args: Args) -> dict[str, Tensor]:
    """Every random number of one epoch's training, seed by seed from that seed's own generator.

    An epoch is ceil(N / B) mini-batches of B points; the last is filled from another permutation. D updates beyond
    the first of an iteration get mini-batches of their own, drawn with replacement. With I iterations, K D updates an
    iteration and S seeds: x [I, K, S, B, dim], z [I, K, S, B, dim] from the prior, mix [I, K, S, B, 1] ~ U(0, 1)
    (mu of V_P) and noise [I, K, S, B, dim] ~ N(0, 1) (the stochastic encoders').
    """
    n, dim = data.shape
    batch, steps = args.batch_size, args.critic_steps
    iterations = math.ceil(n / batch)
    draws = {"x": [], "z": [], "mix": [], "noise": []}
    for g in generators:
        order = torch.cat([torch.randperm(n, generator=g) for _ in range(1 + math.ceil(batch / n))])
        index = torch.randint(n, (iterations, steps, batch), generator=g)
        index[:, 0] = order[: iterations * batch].view(iterations, batch)
        draws["x"].append(data[index])
        draws["z"].append(draw_prior((iterations, steps, batch, dim), g, args.method))
        draws["mix"].append(torch.rand(iterations, steps, batch, 1, generator=g))
        if args.method in STOCHASTIC_ENCODER:
            draws["noise"].append(torch.randn(iterations, steps, batch, dim, generator=g))
    return {k: torch.stack(v, 2) for k, v in draws.items() if v}


def draw_prior(shape: tuple[int, ...], generator: torch.Generator, method: str) -> Tensor:
    """z of the given shape: U(-1, 1) in 2D [paper]; N(0, 1) in 1D [authors' code] and for the VAEs."""
    if shape[-1] == 1 or method in NORMAL_PRIOR:
        return torch.randn(shape, generator=generator)
    return torch.rand(shape, generator=generator) * 2 - 1


# ------------------------------------------------------------------------------------------------------ networks
def init_mlp(sizes: list[int], generators: list[torch.Generator], biases: str) -> Params:
    """A fully connected network a seed: weights N(0, 2 / fan_in) [authors' code], biases as in Args."""
    params = {}
    for k, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        weights = [torch.randn(fan_in, fan_out, generator=g) for g in generators]
        params[f"w{k}"] = torch.stack(weights) * math.sqrt(2 / fan_in)
        bound = 1 / math.sqrt(fan_in) if biases == "uniform" else 0.0
        params[f"b{k}"] = torch.stack([torch.rand(1, fan_out, generator=g) * 2 - 1 for g in generators]) * bound
    return params


def init_networks(args: Args, generators: list[torch.Generator]) -> Networks:
    """E, G and D of one method; which of them it has is in its training step."""
    d, hidden = args.dim, [args.hidden_dim] * args.hidden_layers
    networks = {"generator": init_mlp([d, *hidden, d], generators, args.init_biases)}
    if args.method not in ("gan", "wgangp"):
        outputs = 2 * d if args.method in STOCHASTIC_ENCODER else d  # mean and log-variance, or the latent itself
        networks["encoder"] = init_mlp([d, *hidden, outputs], generators, args.init_biases)
    if args.method not in ("vae", "betavae"):
        inputs = 2 * d if args.method == "ali" else d  # ALI's D judges pairs (x, z)
        hidden = hidden if d == 2 else hidden[1:]
        networks["discriminator"] = init_mlp([inputs, *hidden, 1], generators, args.init_biases)
    if args.ema:
        networks["generator_ema"] = {k: v.clone() for k, v in networks["generator"].items()}
    return networks


def product(x: Tensor, w: Tensor) -> Tensor:
    """x [S, B, in] @ w [S, in, out]. Products with only a few inputs or outputs are written as sums over them, which
    the compiler fuses with their neighbours; a library call for each takes longer than the arithmetic."""
    if w.shape[1] <= 4:
        return sum(x[..., k : k + 1] * w[:, k : k + 1] for k in range(w.shape[1]))
    if w.shape[2] <= 4:
        return torch.stack([(x * w[:, None, :, k]).sum(-1) for k in range(w.shape[2])], -1)
    return torch.bmm(x, w)


def hidden_layers(params: Params, x: Tensor) -> list[Tensor]:
    """The hidden layers' activations after ReLU, each [S, B, H]."""
    activations = []
    for k in range(len(params) // 2 - 1):
        x = F.relu(product(x, params[f"w{k}"]) + params[f"b{k}"])
        activations.append(x)
    return activations


def mlp(params: Params, x: Tensor) -> Tensor:
    """x [S, B, in] -> [S, B, out], linear at the end."""
    last = len(params) // 2 - 1
    return product(hidden_layers(params, x)[-1], params[f"w{last}"]) + params[f"b{last}"]


def generate(generator: Params, z: Tensor) -> Tensor:
    """z [S, B, dim] -> x [S, B, dim]: sigmoid at the end in 2D, where the data lie in [0, 1]; linear in 1D [paper]."""
    return torch.sigmoid(mlp(generator, z)) if z.shape[-1] == 2 else mlp(generator, z)


def encode_sample(encoder: Params, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A sample of q(z|x) = N(mean, exp(log_var)) with its mean and log-variance, each [S, B, dim]."""
    mean, log_var = mlp(encoder, x).chunk(2, -1)
    return mean + noise * (0.5 * log_var).exp(), mean, log_var


def discriminate(discriminator: Params, x: Tensor) -> Tensor:
    """x [S, B, in] -> logits [S, B]; the score D(x) is their sigmoid."""
    return mlp(discriminator, x)[..., 0]


def logit_and_gradient(discriminator: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [S, B] and their gradients with respect to x [S, B, dim].

    A ReLU network is linear around x: its gradient is the product W_1 M_1 W_2 M_2 ... w of the weights, masked by
    which units are on. Written out, it is differentiated once more like any other expression, exactly (the masks'
    derivative is 0 almost everywhere) and without the second-order graph that double backward would build.
    """
    last = len(discriminator) // 2 - 1
    hidden = hidden_layers(discriminator, x)
    logit = (product(hidden[-1], discriminator[f"w{last}"]) + discriminator[f"b{last}"])[..., 0]
    gradient = discriminator[f"w{last}"].mT
    for k in range(last - 1, -1, -1):
        gradient = product(torch.where(hidden[k] > 0, gradient, 0.0), discriminator[f"w{k}"].mT)
    return logit, gradient


def score_and_gradient(discriminator: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid score D(x) [S, B] and its gradient [S, B, dim] = D (1 - D) times the logit's."""
    logit, gradient = logit_and_gradient(discriminator, x)
    score = torch.sigmoid(logit)
    return score, (score * (1 - score))[..., None] * gradient


# -------------------------------------------------------------------- losses: one value a seed, [S], unless said
def norm(v: Tensor) -> Tensor:
    """L2 norm over the last dimension; the small constant keeps its gradient finite at 0."""
    return (v.square().sum(-1) + 1e-12).sqrt()


def real_loss(logit: Tensor, smoothing: float = 0.0) -> Tensor:
    """-E log D for logits [S, B]; with one-sided label smoothing s: -(1 - s) E log D - s E log(1 - D)."""
    return (F.softplus(-logit) + smoothing * logit).mean(-1)


def fake_loss(logit: Tensor) -> Tensor:
    """-E log(1 - D) for logits [S, B]."""
    return F.softplus(logit).mean(-1)


def reconstruction_error(x: Tensor, y: Tensor) -> Tensor:
    """E ||x - y||^2 (Eq. 1) of x, y [S, B, d]: summed over coordinates, mean over the batch."""
    return (x - y).square().sum(-1).mean(-1)


def discriminator_loss(real: Tensor, reconstruction: Tensor, fake: Tensor, alpha: Tensor | float) -> Tensor:
    """-V_D of Eq. 7 without its penalty: logits [S, B] of real, reconstructed (counted as real) and generated x."""
    return (1 - alpha) * real_loss(real) + alpha * real_loss(reconstruction) + fake_loss(fake)


def gradient_penalty(discriminator: Params, real: Tensor, fake: Tensor, mix: Tensor, penalty: str = "l2") -> Tensor:
    """V_P = E(||grad D(x^)|| - 1)^2 at x^ = mix real + (1 - mix) fake (below Eq. 8). `penalty` as in Args."""
    point = mix * real + (1 - mix) * fake
    gradient = (score_and_gradient if penalty == "score" else logit_and_gradient)(discriminator, point)[1]
    slope = norm(gradient) / math.sqrt(gradient.shape[-1]) if penalty == "rms" else norm(gradient)
    return (slope - 1).square().mean(-1)


def gradient_matching(discriminator: Params, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of V_G (Eq. 13) before their weights, with the norms inside the expectations: |E D(x) - E D(G)|,
    (E ||grad D(x)|| - E ||grad D(G)||)^2 and (E |grad D(x)'x| - E |grad D(G)'G|)^2."""
    (score_real, grad_real), (score_fake, grad_fake) = (score_and_gradient(discriminator, x) for x in (real, fake))
    score_term = (score_real.mean(-1) - score_fake.mean(-1)).abs()
    norm_term = (norm(grad_real).mean(-1) - norm(grad_fake).mean(-1)).square()
    inner_real, inner_fake = (grad_real * real).sum(-1).abs(), (grad_fake * fake).sum(-1).abs()
    return score_term, norm_term, (inner_real.mean(-1) - inner_fake.mean(-1)).square()


def latent_data_distance(x: Tensor, y: Tensor, latent: Tensor, z: Tensor) -> Tensor:
    """Dist-GAN: (E[x - y] - E[E(x) - z])^2, the means over batch and coordinates."""
    return ((x - y).mean((-1, -2)) - (latent - z).mean((-1, -2))).square()


def kl_divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """E KL(N(mean, exp(log_var)) || N(0, I)) (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1).mean(-1)


# ------------------------------------------------------------------------------------------------------- methods
# A method is its losses, one an update, in the order of the updates; each maps the networks and one mini-batch's
# draws (x, z [S, B, dim], mix [S, B, 1], noise [S, B, dim], alpha) to one value a seed, [S].
Loss = Callable[[Networks, dict[str, Tensor]], Tensor]


def gngan(args: Args) -> dict[str, Loss]:
    """Algorithm 1: one mini-batch x and one z for all three updates; no neighbour embedding in 1D and 2D [paper]."""

    def autoencoder(nets, batch):  # Eq. 1
        error = reconstruction_error(batch["x"], generate(nets["generator"], mlp(nets["encoder"], batch["x"])))
        return error / args.dim if args.reconstruction == "mean" else error

    def discriminator(nets, batch):  # Eq. 7
        x = batch["x"]
        reconstruction, fake = (generate(nets["generator"], z) for z in (mlp(nets["encoder"], x), batch["z"]))
        logits = discriminate(nets["discriminator"], torch.cat([x, reconstruction, fake], 1)).chunk(3, 1)
        penalty = gradient_penalty(nets["discriminator"], x, fake, batch["mix"], args.penalty)
        return discriminator_loss(*logits, batch["alpha"]) + args.lambda_p * penalty

    def generator(nets, batch):  # Eq. 13
        fake = generate(nets["generator"], batch["z"])
        score_term, norm_term, inner_term = gradient_matching(nets["discriminator"], batch["x"], fake)
        return score_term + args.lambda_m1 * norm_term + args.lambda_m2 * inner_term

    return {"autoencoder": autoencoder, "discriminator": discriminator, "generator": generator}


def distgan(args: Args) -> dict[str, Loss]:
    """Tran, Bui and Cheung 2018, as in the authors' toy code: cross-entropy of x in [0, 1] in 2D, squares in 1D."""

    def autoencoder(nets, batch):
        x, z = batch["x"], batch["z"]
        latent = mlp(nets["encoder"], x)
        output, fake = mlp(nets["generator"], latent), generate(nets["generator"], z)
        if args.dim == 2:
            error = F.binary_cross_entropy_with_logits(output, x, reduction="none").mean((-1, -2))
            distance = latent_data_distance(torch.sigmoid(output), fake, latent, z)
        else:
            error, distance = reconstruction_error(x, output), latent_data_distance(x, fake, latent, z)
        return error + args.lambda_r * distance

    def discriminator(nets, batch):
        x = batch["x"]
        reconstruction, fake = (generate(nets["generator"], z) for z in (mlp(nets["encoder"], x), batch["z"]))
        real, rebuilt, faked = discriminate(nets["discriminator"], torch.cat([x, reconstruction, fake], 1)).chunk(3, 1)
        label = real_loss if args.distgan_reconstruction == "real" else fake_loss
        penalty = gradient_penalty(nets["discriminator"], x, fake, batch["mix"], args.penalty)
        return 0.5 * real_loss(real) + 0.5 * label(rebuilt) + fake_loss(faked) + args.lambda_p * penalty

    def generator(nets, batch):
        inputs = torch.cat([batch["x"], generate(nets["generator"], batch["z"])], 1)
        real, fake = torch.sigmoid(discriminate(nets["discriminator"], inputs)).chunk(2, 1)
        return (real.mean(-1) - fake.mean(-1)).abs()

    return {"autoencoder": autoencoder, "discriminator": discriminator, "generator": generator}


def gan(args: Args) -> dict[str, Loss]:
    """Goodfellow et al. 2014, non-saturating."""

    def discriminator(nets, batch):
        inputs = torch.cat([batch["x"], generate(nets["generator"], batch["z"])], 1)
        real, fake = discriminate(nets["discriminator"], inputs).chunk(2, 1)
        return real_loss(real, args.label_smoothing) + fake_loss(fake)

    def generator(nets, batch):
        return real_loss(discriminate(nets["discriminator"], generate(nets["generator"], batch["z"])))

    return {"discriminator": discriminator, "generator": generator}


def wgangp(args: Args) -> dict[str, Loss]:
    """Gulrajani et al. 2017; the critic is the logit."""

    def discriminator(nets, batch):
        x, fake = batch["x"], generate(nets["generator"], batch["z"])
        real_logit, fake_logit = discriminate(nets["discriminator"], torch.cat([x, fake], 1)).chunk(2, 1)
        penalty = gradient_penalty(nets["discriminator"], x, fake, batch["mix"], args.penalty)
        return fake_logit.mean(-1) - real_logit.mean(-1) + args.lambda_p * penalty

    def generator(nets, batch):
        return -discriminate(nets["discriminator"], generate(nets["generator"], batch["z"])).mean(-1)

    return {"discriminator": discriminator, "generator": generator}


def ali(args: Args) -> dict[str, Loss]:
    """Dumoulin et al. 2017: D tells pairs (x, E(x)) from (G(z), z)."""

    def judge(nets, batch):
        encoded = torch.cat([batch["x"], encode_sample(nets["encoder"], batch["x"], batch["noise"])[0]], -1)
        generated = torch.cat([generate(nets["generator"], batch["z"]), batch["z"]], -1)
        return discriminate(nets["discriminator"], torch.cat([encoded, generated], 1)).chunk(2, 1)

    def discriminator(nets, batch):
        encoded, generated = judge(nets, batch)
        return real_loss(encoded, args.label_smoothing) + fake_loss(generated)

    def autoencoder(nets, batch):  # E and G against D: the labels swapped, so non-saturating
        encoded, generated = judge(nets, batch)
        return fake_loss(encoded) + real_loss(generated)

    return {"discriminator": discriminator, "autoencoder": autoencoder}


def vaegan(args: Args) -> dict[str, Loss]:
    """Larsen et al. 2016: the reconstruction is judged at D's last hidden layer, a Gaussian of unit deviation."""

    def feature_error(nets, x, reconstruction):
        features = hidden_layers(nets["discriminator"], torch.cat([x, reconstruction], 1))[-1]
        return 0.5 * reconstruction_error(*features.chunk(2, 1))

    def encoder(nets, batch):
        latent, mean, log_var = encode_sample(nets["encoder"], batch["x"], batch["noise"])
        error = feature_error(nets, batch["x"], generate(nets["generator"], latent))
        return args.vaegan_kl * kl_divergence(mean, log_var) + error

    def generator(nets, batch):
        latent = encode_sample(nets["encoder"], batch["x"], batch["noise"])[0]
        reconstruction, fake = (generate(nets["generator"], z) for z in (latent, batch["z"]))
        rebuilt, faked = discriminate(nets["discriminator"], torch.cat([reconstruction, fake], 1)).chunk(2, 1)
        error = feature_error(nets, batch["x"], reconstruction)
        return args.vaegan_gamma * error + real_loss(rebuilt) + real_loss(faked)

    def discriminator(nets, batch):
        latent = encode_sample(nets["encoder"], batch["x"], batch["noise"])[0]
        reconstruction, fake = (generate(nets["generator"], z) for z in (latent, batch["z"]))
        inputs = torch.cat([batch["x"], reconstruction, fake], 1)
        real, rebuilt, faked = discriminate(nets["discriminator"], inputs).chunk(3, 1)
        return real_loss(real) + fake_loss(rebuilt) + fake_loss(faked)

    return {"encoder": encoder, "generator": generator, "discriminator": discriminator}


def vae(args: Args) -> dict[str, Loss]:
    """Kingma and Welling 2014, and beta-VAE, Higgins et al. 2017."""

    def autoencoder(nets, batch):
        latent, mean, log_var = encode_sample(nets["encoder"], batch["x"], batch["noise"])
        error = reconstruction_error(batch["x"], generate(nets["generator"], latent)) / (2 * args.vae_sigma**2)
        return error + (args.vae_beta if args.method == "betavae" else 1.0) * kl_divergence(mean, log_var)

    return {"autoencoder": autoencoder}


LOSSES = {"gan": gan, "ali": ali, "vaegan": vaegan, "vae": vae, "betavae": vae, "wgangp": wgangp, "distgan": distgan,
          "gngan": gngan}


# ---------------------------------------------------------------------------------------------------- train step
def init_state(args: Args, generators: list[torch.Generator], device: torch.device) -> dict:
    """Everything a training step reads and writes in place: networks, Adam's moments, learning rate, alpha."""
    networks = to_device(init_networks(args, generators), device)
    encoder_only = args.autoencoder_updates == "encoder" and args.method in ("gngan", "distgan")
    trains = {"autoencoder": ["encoder"] if encoder_only else ["encoder", "generator"]}

    def zeros(names: list[str]) -> Networks:
        return {n: {k: torch.zeros_like(v) for k, v in networks[n].items()} for n in names}

    # moments belong to updates, not networks: G has two sets where the autoencoder's update trains it too, as in the
    # authors' code
    adam = {}
    for update in LOSSES[args.method](args):
        names = trains.get(update, [update])
        adam[update] = {"step": torch.zeros((), device=device), "m": zeros(names), "v": zeros(names)}
    return {"networks": networks, "adam": adam, "lr": torch.tensor(args.lr, device=device),
            "alpha": torch.tensor(args.alpha, device=device)}


def to_device(tree, device: torch.device):
    """A copy of nested dictionaries of tensors on a device."""
    return {k: to_device(v, device) for k, v in tree.items()} if isinstance(tree, dict) else tree.to(device)


def learning_rate(args: Args, iteration: int, updates: int) -> float:
    """The learning rate of an iteration (counted from 0) of `updates` updates: in steps in 2D, else constant."""
    steps = iteration * (updates if args.lr_decay_steps == "updates" else 1)
    return args.lr * args.lr_decay ** (steps // 10000) if args.dim == 2 else args.lr


def reconstruction_share(args: Args, iteration: int, total: int) -> float:
    """Eq. 7's alpha in an iteration of `total`: constant, or falling to 0 between T/2 and 3T/4 [authors' code]."""
    return args.alpha * (min(max(3 - 4 * iteration / total, 0.0), 1.0) if args.alpha_schedule == "falling" else 1.0)


def make_train_step(args: Args) -> Callable[[dict, dict[str, Tensor]], dict[str, Tensor]]:
    """`train_step(state, draws)` of args.method: one iteration, in place; returns each update's loss, [S].

    `draws` holds one iteration's: x, z, mix and, for stochastic encoders, noise, each [K, S, B, ...].
    """
    losses = LOSSES[args.method](args)

    def update(state: dict, name: str, batch: dict[str, Tensor]) -> Tensor:
        """One Adam step of the networks that the update trains. Seeds share no weight, so the gradient of the sum over
        seeds is each seed's own. (torch.optim's step breaks a compiled graph in two, hence Adam written out.)"""
        adam = state["adam"][name]
        trained = {n: state["networks"][n] for n in adam["m"]}

        def total(trained: Networks) -> tuple[Tensor, Tensor]:
            loss = losses[name]({**state["networks"], **trained}, batch)
            return loss.sum(), loss

        gradients, (_, loss) = torch.func.grad_and_value(total, has_aux=True)(trained)
        adam["step"] += 1
        step_size = state["lr"] / (1 - args.beta1 ** adam["step"])
        correction = (1 - args.beta2 ** adam["step"]).sqrt()
        for n in trained:
            for k, weight in trained[n].items():
                g, m, v = gradients[n][k], adam["m"][n][k], adam["v"][n][k]
                m.lerp_(g, 1 - args.beta1)
                v.lerp_(g * g, 1 - args.beta2)
                weight.sub_(step_size * m / (v.sqrt() / correction + 1e-8))
        return loss

    def train_step(state: dict, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        batches = [{**{k: v[i] for k, v in draws.items()}, "alpha": state["alpha"]} for i in range(args.critic_steps)]
        values = {}
        for name in losses:  # D may take several steps, each on its own mini-batch; the others take the first
            for batch in batches if name == "discriminator" else batches[:1]:
                values[name] = update(state, name, batch)
        if args.ema:
            for k, v in state["networks"]["generator_ema"].items():
                v.lerp_(state["networks"]["generator"][k], 1 - args.ema)
        return values

    return train_step


# --------------------------------------------------------------------------------------------------- evaluation
def register(samples: Tensor, centers: Tensor, radius: float) -> dict[str, Tensor]:
    """Table 2's columns for samples [S, n, dim], one value a seed, [S].

    A sample registers to a mode within `radius` of its centre; a mode is covered when a quarter of its fair share
    of the samples registers to it: 20 of 2,000 for 25 modes [paper]. With p_i mode i's share of the registered
    samples, tv_true = sum_i |p_i - 1/M| and tv_diff = sum_i |p_{i+1} - p_i| in the grid's order [ours: the paper
    does not define its two columns, and its values are out of these definitions' range].
    """
    num_modes, fair_share = len(centers), samples.shape[1] / len(centers)
    near = sum((samples[..., None, k] - centers[:, k]).square() for k in range(centers.shape[1])) <= radius**2
    counts = near.sum(1).double()  # [S, M]
    points = counts.sum(1)
    share = counts / points.clamp_min(1)[:, None]
    return {"modes": (counts >= fair_share / 4).sum(1).double(), "points": points,
            "tv_true": (share - 1 / num_modes).abs().sum(1), "tv_diff": share.diff(dim=1).abs().sum(1)}


def wasserstein_1d(samples: Tensor, data: Tensor) -> Tensor:
    """Wasserstein-1 distance of samples [S, n, 1] to the data [N, 1]: the mean distance of their quantiles, [S]."""
    levels = (torch.arange(samples.shape[1]) + 0.5) / samples.shape[1]
    return (samples[..., 0].sort(1).values - torch.quantile(data[:, 0], levels)).abs().mean(1)


AXIS_1D = torch.linspace(-7, 7, 141)  # the bins' edges of figure 2


def density(samples: Tensor) -> Tensor:
    """Histogram density of samples [S, n, 1] over AXIS_1D's bins, [S, 140]."""
    counts = torch.stack([torch.histc(s.float(), 140, -7, 7) for s in samples[..., 0].cpu()])
    return counts / (samples.shape[1] * 0.1)


def score_map(networks: Networks, points: Tensor, method: str) -> Tensor:
    """D at points [n, 1] for every seed, [S, n]: the sigmoid score; WGAN-GP's critic is scaled to span [0, 1]."""
    seeds = len(networks["generator"]["w0"])
    logit = discriminate(networks["discriminator"], points.expand(seeds, *points.shape))
    if method != "wgangp":
        return torch.sigmoid(logit)
    low, high = logit.amin(-1, keepdim=True), logit.amax(-1, keepdim=True)
    return (logit - low) / (high - low).clamp_min(1e-12)


def summarize(records: list[dict], method: str, seconds: float) -> dict:
    """A method's entry in results.json: a run's figure is the mean of its last ten evaluations [ours]; mean and
    standard deviation (n - 1) are over the runs."""
    records = [r for r in records if r["method"] == method]
    result = {}
    for key in (k for k in records[-1] if isinstance(records[-1][k], list)):
        per_seed = np.mean([r[key] for r in records[-10:]], axis=0)
        std = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else 0.0
        result[key] = {"mean": float(per_seed.mean()), "std": std, "per_seed": per_seed.tolist()}
    iterations = records[-1]["iteration"]
    return {**result, "epochs": records[-1]["epoch"], "iterations": iterations, "seconds": round(seconds, 2),
            "iterations_per_second": round(iterations / seconds, 2)}


def table(results: dict[str, dict], args: Args) -> str:
    """Table 2, ours beside the paper's; in 1D, where the paper has none, ours alone."""
    def cell(mean: float, std: float, places: int) -> str:
        return f"{mean:.{places}f} ± {std:.{places}f}"

    heads = ["method"] + [h for name in METRICS.values() for h in (name, "paper")]
    if args.dim == 1:
        heads = ["method", *METRICS.values(), "W1"]
    rows = []
    for method, result in results.items():
        for suffix in ("", "_ema") if args.ema else ("",):
            row = [TITLES[method] + (", averaged G" if suffix else "")]
            for k, places, paper in zip((*METRICS, "w1"), (2, 1, 2, 2, 2), PAPER.get(method, [None] * 4) + [None]):
                if k + suffix in result:
                    row.append(cell(result[k + suffix]["mean"], result[k + suffix]["std"], places))
                if args.dim == 2 and k in METRICS:
                    row.append(cell(*paper, 2) if paper else "")
            rows.append(row)
    widths = [max(len(r[i]) for r in [heads, *rows]) for i in range(len(heads))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in [heads, *rows]]
    note = "* our definitions; the paper's two columns are not defined there and not comparable"
    note = note if args.dim == 2 else "* as in 2D; W1: the Wasserstein-1 distance between generated and real points"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], note])


# ------------------------------------------------------------------------------------------------------ figures
def panels(count: int, size: float, **kwargs) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure of `count` square panels, `size` inches each: one row up to five, rows of four beyond."""
    columns = count if count <= 5 else 4
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, size * rows), squeeze=False,
                                layout="constrained", **kwargs)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:count])


def save(figure: plt.Figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def which_panels(models: dict[str, dict], seed: int) -> list[tuple[str, int, str]]:
    """(method, index of the seed, title) a panel: the first eight seeds of one method, or the first of several."""
    if len(models) > 1:
        return [(m, 0, TITLES[m]) for m in models]
    method = next(iter(models))
    return [(method, s, f"{TITLES[method]}, seed {seed + s}") for s in range(min(8, len(models[method]["samples"])))]


def plot_samples(models: dict[str, dict], args: Args, centers: Tensor, radius: float, path: pathlib.Path) -> None:
    """The last evaluation's generated points and, around each mode's centre, the radius that registers them."""
    chosen = which_panels(models, args.seed)
    figure, axes = panels(len(chosen), 2.6, sharex=True, sharey=True)
    for ax, (method, s, title) in zip(axes, chosen):
        samples = models[method]["samples"][s]
        figures = register(samples[None], centers, radius)
        ax.scatter(*samples.T, s=1.2, c="tab:blue", linewidths=0, rasterized=True)
        ax.add_collection(EllipseCollection(2 * radius, 2 * radius, 0, units="xy", offsets=centers, facecolors="none",
                                            edgecolors="tab:red", linewidths=0.6, offset_transform=ax.transData))
        ax.set_title(f"{title}: {int(figures['modes'])} modes, {int(figures['points'])} points", fontsize=8)
        ax.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xticks=[], yticks=[], aspect="equal")
    save(figure, path)


def plot_gradient_map(models: dict[str, dict], args: Args, centers: Tensor, path: pathlib.Path) -> None:
    """Figure 4: D's gradient around the true centres. ALI's D judges pairs and the VAEs have none; among several
    methods the figure keeps to the paper's four."""
    without = ("ali", "vae", "betavae", *(("vaegan",) if len(models) > 1 else ()))
    chosen = [c for c in which_panels(models, args.seed) if c[0] not in without]
    if not chosen:
        return
    offsets = torch.cartesian_prod(*[torch.linspace(-0.09, 0.09, 5)] * 2)
    points = (centers[:, None] + offsets).reshape(-1, 2)
    figure, axes = panels(len(chosen), 3.2, sharex=True, sharey=True)
    for ax, (method, s, title) in zip(axes, chosen):
        discriminator = {k: v[s : s + 1].cpu() for k, v in models[method]["networks"]["discriminator"].items()}
        function = logit_and_gradient if method == "wgangp" else score_and_gradient
        gradient = function(discriminator, points[None])[1][0]
        length = norm(gradient)
        # arrows are as long as the gradient, up to the 90th percentile, so that a few steep places do not hide the rest
        arrows = gradient / length.clamp_min(torch.quantile(length, 0.9))[:, None].clamp_min(1e-20)
        ax.quiver(*points.T, *arrows.T, angles="xy", scale_units="xy", scale=26, width=0.0028)
        ax.scatter(*centers.T, s=14, c="tab:red", zorder=3)
        ax.set_title(title, fontsize=9)
        ax.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.12), xticks=[], yticks=[], aspect="equal")
    save(figure, path)


def plot_modes(records: list[dict], args: Args, num_modes: int, path: pathlib.Path) -> None:
    """Figure 3: modes and points over training, mean and one standard deviation of the seeds, a band a method; of one
    method the averaged weights too."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    methods = list(dict.fromkeys(r["method"] for r in records))
    suffixes = ("", "_ema") if args.ema and len(methods) == 1 else ("",)
    for i, (method, suffix) in enumerate((m, x) for m in methods for x in suffixes):
        for ax, key in zip(axes, ("modes", "points")):
            epochs = [r["epoch"] for r in records if r["method"] == method]
            values = np.array([r[key + suffix] for r in records if r["method"] == method])
            mean, std = values.mean(1), values.std(1)
            label = TITLES[method] + (", averaged G" if suffix else "")
            color = "black" if method == "gngan" and len(methods) > 1 else f"C{i}"
            ax.plot(epochs, mean, label=label, color=color, linewidth=1.1, linestyle=":" if suffix else "-",
                    marker="." if len(epochs) <= 10 else None)
            ax.fill_between(epochs, mean - std, mean + std, alpha=0.15 if len(methods) == 1 else 0.06, color=color,
                            linewidth=0)
    for ax, limit, label in zip(axes, (num_modes, NUM_SAMPLES), ("covered modes", "registered points")):
        ax.set(xlabel="epoch", ylabel=label, ylim=(0, limit * 1.04))
        ax.axhline(limit, color="grey", linewidth=0.8, linestyle=":")
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].legend(fontsize=8, frameon=False, loc="lower right")
    save(figure, path)


def plot_density(models: dict[str, dict], args: Args, data: Tensor, path: pathlib.Path, video: pathlib.Path) -> None:
    """Figure 2: density of real and generated points and D's score along the axis, last frame and video."""
    chosen = which_panels(models, args.seed)
    middle = (AXIS_1D[1:] + AXIS_1D[:-1]) / 2
    real = density(data[None])[0]
    figure, axes = panels(len(chosen), 3.0, sharex=True, sharey=True)
    lines = []
    for ax, (method, s, title) in zip(axes, chosen):
        ax.fill_between(middle, real, color="tab:green", alpha=0.35, linewidth=0, label="real density")
        generated, = ax.plot(middle, middle * 0, color="tab:orange", linewidth=1.2, label="generated density")
        score, = ax.plot(middle, middle * 0, color="tab:blue", linewidth=1.2, label="D's score")
        ax.set_title(title, fontsize=9)
        ax.set(xlim=(-7, 7), ylim=(0, 1.02), xlabel="x")
        lines.append((generated, score))
    axes[0].legend(fontsize=7, frameon=False, loc="upper left")
    axes[0].set_ylabel("density, score")
    total = max(len(models[m]["frames"]) for m in models)
    heading = figure.suptitle("", fontsize=9)

    def draw(frame: int) -> None:
        for (method, s, _), (generated, score) in zip(chosen, lines):
            frames = models[method]["frames"]
            curves = frames[min(frame, len(frames) - 1)]
            generated.set_ydata(curves[s, 0])
            score.set_ydata(curves[s, 1])
        heading.set_text(f"epoch {min(frame, total - 1) + 1}")

    shown = list(range(0, total, max(1, total // 50))) + [total - 1] * 12  # hold the last frame
    FuncAnimation(figure, draw, frames=shown).save(video, writer=PillowWriter(fps=8), dpi=70)
    draw(total - 1)
    save(figure, path)


def plot_figures(run: pathlib.Path, models: dict[str, dict], records: list[dict], args: Args) -> None:
    """Every figure of the run, of what there is so far."""
    data, centers, radius = make_data(args.dim)
    plot_modes(records, args, len(centers), run / "modes.png")
    if args.dim == 1:
        plot_density(models, args, data, run / "density.png", run / "training.gif")
    else:
        plot_samples(models, args, centers, radius, run / "samples.png")
        plot_gradient_map(models, args, centers, run / "gradient_map.png")


# --------------------------------------------------------------------------------------------------- checkpoint
def load_checkpoint(path: str) -> tuple[pathlib.Path, dict]:
    """The run folder and the contents of a checkpoint, given the folder or the file."""
    file = pathlib.Path(path)
    file = file / "checkpoint.pt" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}: give --resume a run folder or its checkpoint.pt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes torch.load raise
        raise UserError(f"cannot read the checkpoint {file}: {reason(error)}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("script") != SCRIPT or "args" not in checkpoint:
        raise UserError(f"{file} is not a checkpoint of {SCRIPT}.py")
    return file.parent, checkpoint


def parse_args(argv: Optional[list[str]] = None) -> tuple[Args, Optional[pathlib.Path], Optional[dict]]:
    """Arguments, checked; with --resume the run folder and the checkpoint too.

    A resumed run takes the saved arguments; one given by hand that would change the run must agree with them.
    """
    args = tyro.cli(Args, args=argv, description=__doc__)
    run, checkpoint = None, None
    if args.resume is not None:
        run, checkpoint = load_checkpoint(args.resume)
        names = {f.name for f in dataclasses.fields(Args)}
        saved = Args(**{k: v for k, v in checkpoint["args"].items() if k in names})
        given = tyro.cli(Args, args=argv, default=saved, description=__doc__)
        free = ("resume", "device", "run_dir", "run_name", "checkpoint_every")
        differing = [f"--{k.replace('_', '-')} ({getattr(saved, k)} in the checkpoint, {getattr(given, k)} here)"
                     for k in sorted(names.difference(free)) if getattr(given, k) != getattr(saved, k)]
        if differing:
            raise UserError(f"{args.resume} is of another setting: {', '.join(differing)}; "
                            "leave these flags out to go on, or start a new run without --resume")
        args = dataclasses.replace(given, run_dir=saved.run_dir, run_name=saved.run_name)
    if args.dim == 1 and args.method not in (*METHODS_1D, "all"):
        raise UserError(f"--method {args.method} is not part of the 1D experiment: "
                        f"choose from {', '.join(METHODS_1D)}, all")
    for name, low in (("num_seeds", 1), ("seed", 0), ("epochs", 1), ("batch_size", 1), ("hidden_dim", 1),
                      ("critic_steps", 1), ("checkpoint_every", 0), ("hidden_layers", 1 if args.dim == 2 else 2)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {low} or more")
    if not 0 <= args.ema < 1:
        raise UserError(f"--ema is {args.ema}: it must be at least 0 and below 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    return args, run, checkpoint


def can_compile() -> bool:
    """Whether torch.compile finds what it needs on a CPU: a C++ compiler and Python's headers."""
    compilers = [c for c in (os.environ.get("CXX"), "g++", "clang++") if c]
    headers = pathlib.Path(sysconfig.get_path("include")) / "Python.h"
    return any(map(shutil.which, compilers)) and headers.exists()


# --------------------------------------------------------------------------------------------------------- main
class Run:
    """A run folder and what a resumed run takes up: finished methods, evaluations so far, the method in progress."""

    def __init__(self, args: Args, folder: Optional[pathlib.Path], checkpoint: Optional[dict]):
        self.args = args
        every = [m for m in TITLES if args.dim == 2 or m in METHODS_1D]
        self.methods = every if args.method == "all" else [args.method]
        self.models: dict[str, dict] = {}  # a finished method's networks, last samples, frames and seconds
        self.records: list[dict] = []  # the lines of metrics.jsonl
        self.progress: Optional[dict] = None
        self.resolved = {m: resolve(args, m) for m in self.methods}
        if checkpoint is None:
            name = args.run_name or f"synthetic{args.dim}d__{SCRIPT}__{args.seed}__{int(time.time())}"
            self.folder = pathlib.Path(args.run_dir) / name
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError:
                raise UserError(f"{self.folder} exists: choose another --run-name, or go on with it by "
                                f"--resume {self.folder}") from None
            except OSError as error:
                raise UserError(f"cannot make the run folder {self.folder}: {error.strerror}; "
                                "choose another --run-dir") from None
            versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
            setting = {"script": SCRIPT, "args": dataclasses.asdict(args), "versions": versions,
                       "resolved": {m: dataclasses.asdict(a) for m, a in self.resolved.items()}}
            self.write("args.json", lambda p: p.write_text(json.dumps(setting, indent=2) + "\n"))
        else:
            self.folder, self.models, self.records = folder, checkpoint["models"], checkpoint["records"]
            self.progress = checkpoint["progress"]
            # the saved values, so that a default changed since does not change a run half-way
            self.resolved = {m: Args(**values) for m, values in checkpoint["resolved"].items()}
        lines = "".join(json.dumps(r) + "\n" for r in self.records)  # drops lines after the checkpoint
        self.write("metrics.jsonl", lambda p: p.write_text(lines))
        self.metrics_file = open(self.folder / "metrics.jsonl", "a", buffering=1)

    def write(self, name: str, write: Callable[[pathlib.Path], None]) -> None:
        write_atomically(self.folder / name, write, f"make room and go on with --resume {self.folder}; ")

    def save(self, progress: Optional[dict]) -> None:
        """Write checkpoint.pt, unless training has diverged: then the old one is the last good one."""
        if progress is not None:
            check_finite(progress["state"], progress["epoch"], self)
        contents = {"script": SCRIPT, "args": dataclasses.asdict(self.args), "progress": progress,
                    "resolved": {m: dataclasses.asdict(a) for m, a in self.resolved.items()},
                    "models": self.models, "records": self.records}
        self.write("checkpoint.pt", lambda p: torch.save(contents, p))

    def finish(self, current: dict[str, dict]) -> str:
        """Write results.json and the figures, print the table; `current`: a method that was interrupted."""
        models = {**self.models, **{m: v for m, v in current.items() if any(r["method"] == m for r in self.records)}}
        if not models:
            return "no evaluation yet"
        results = {m: summarize(self.records, m, models[m]["seconds"]) for m in models}
        self.write("results.json", lambda p: p.write_text(json.dumps(results, indent=2) + "\n"))
        plot_figures(self.folder, models, self.records, self.args)
        print(table(results, self.args))
        return ", ".join(f"{TITLES[m]} {r['modes']['mean']:.2f} modes {r['points']['mean']:.1f} points"
                         for m, r in results.items())


def check_finite(state: dict, epoch: int, run: Run) -> None:
    """Stop with one line if a weight is not finite; the checkpoint on disk stays as it is."""
    if not all(bool(v.isfinite().all()) for params in state["networks"].values() for v in params.values()):
        saved = run.folder / "checkpoint.pt"
        last = f"the last good checkpoint is {saved}" if saved.exists() else "no checkpoint was written yet"
        iteration = int(next(iter(state["adam"].values()))["step"])
        raise UserError(f"training diverged: weights are not finite at iteration {iteration} (epoch {epoch}); {last}; "
                        "try a smaller --lr")


def evaluate(networks: Networks, generators: list[torch.Generator], args: Args, data: tuple[Tensor, Tensor, float]
             ) -> tuple[dict[str, list], Tensor, Optional[Tensor]]:
    """One evaluation: table 2's columns (for --ema also with the averaged weights), the samples [S, 2000, dim] and in
    1D figure 2's two curves [S, 2, 140]."""
    points, centers, radius = data
    device = networks["generator"]["w0"].device
    count = NUM_SAMPLES if args.dim == 2 else 5 * NUM_SAMPLES  # the surplus smooths figure 2's density
    z = torch.stack([draw_prior((count, args.dim), g, args.method) for g in generators]).to(device)
    scores, frame = {}, None
    for suffix in ("", "_ema") if args.ema else ("",):
        x = generate(networks["generator" + suffix], z).cpu()
        values = register(x[:, :NUM_SAMPLES], centers, radius)
        if args.dim == 1:
            values["w1"] = wasserstein_1d(x[:, :NUM_SAMPLES], points)
        scores.update({k + suffix: v.tolist() for k, v in values.items()})
        if suffix == "":
            samples = x[:, :NUM_SAMPLES].clone()
            if args.dim == 1:
                middle = ((AXIS_1D[1:] + AXIS_1D[:-1]) / 2)[:, None].to(device)
                frame = torch.stack([density(x), score_map(networks, middle, args.method).cpu()], 1)
    return scores, samples, frame


def train(run: Run, method: str, device: torch.device, data: tuple[Tensor, Tensor, float], stop: list[int]) -> bool:
    """Train one method to its end, or until a signal is in `stop`: then save everything and return False."""
    args = run.resolved[method]
    iterations = math.ceil(len(data[0]) / args.batch_size)  # an epoch
    generators, evaluation = make_generators(args)
    state = init_state(args, generators, device)
    start_epoch, start_position, seconds, frames, samples = 0, 0, 0.0, [], None
    if run.progress is not None:
        saved, run.progress = run.progress, None
        for g, before in zip(generators + evaluation, saved["generators"] + saved["evaluation"]):
            g.set_state(before)  # the training ones as before the draws of the epoch in progress
        state, frames, samples = to_device(saved["state"], device), saved["frames"], saved["samples"]
        start_epoch, start_position, seconds = saved["epoch"], saved["position"], saved["seconds"]
    updates = sum(args.critic_steps if name == "discriminator" else 1 for name in state["adam"])  # an iteration
    total = args.epochs * iterations
    train_step = make_train_step(args)
    compiled = run.args.compile and total >= COMPILE_FROM  # by the whole length: a resumed run must compute the same
    if compiled:
        torch.compiler.reset()  # the methods share one code object; its cache holds eight variants
        train_step = torch.compile(train_step, fullgraph=True, dynamic=False)
    single = len(run.methods) == 1
    # of several methods each has a TensorBoard folder of its own, so that their curves share a chart
    writer = SummaryWriter(str(run.folder if single else run.folder / method), purge_step=start_epoch + 1)
    clock = time.perf_counter()

    def in_progress(epoch: int, position: int, before: list[Tensor]) -> dict:
        return {"method": method, "epoch": epoch, "position": position, "state": state, "generators": before,
                "evaluation": [g.get_state() for g in evaluation], "frames": frames, "samples": samples,
                "networks": state["networks"], "seconds": seconds + time.perf_counter() - clock}

    with writer, tqdm(total=total, initial=start_epoch * iterations + start_position, desc=TITLES[method], unit="it",
                      mininterval=0.5, dynamic_ncols=True, postfix="compiling" if compiled else None) as bar:
        for epoch in range(start_epoch, args.epochs):
            before = [g.get_state() for g in generators]
            draws = {k: v.to(device).unbind(0) for k, v in draw_epoch(data[0], generators, args).items()}
            for position in range(start_position, iterations):
                iteration = epoch * iterations + position
                state["lr"].fill_(learning_rate(args, iteration, updates))
                state["alpha"].fill_(reconstruction_share(args, iteration, total))
                losses = train_step(state, {k: v[position] for k, v in draws.items()})
                bar.update()
                if stop and position + 1 < iterations:
                    progress = in_progress(epoch, position + 1, before)
                    break
            else:
                start_position = 0
                check_finite(state, epoch + 1, run)
                scores, samples, frame = evaluate(state["networks"], evaluation, args, data)
                frames += [frame] if frame is not None else []
                record = {"method": method, "epoch": epoch + 1, "iteration": (epoch + 1) * iterations, **scores}
                run.records.append(record)
                run.metrics_file.write(json.dumps(record) + "\n")
                for key, values in scores.items():
                    writer.add_scalar(f"metrics/{key}", np.mean(values), epoch + 1)
                for key, value in losses.items():
                    writer.add_scalar(f"losses/{key}", value.mean().item(), epoch + 1)
                writer.add_scalar("charts/iterations_per_second", bar.format_dict["rate"] or 0.0, epoch + 1)
                bar.set_postfix(modes=f"{np.mean(scores['modes']):.1f}", points=f"{np.mean(scores['points']):.0f}",
                                refresh=False)
                progress = in_progress(epoch + 1, 0, [g.get_state() for g in generators])
                due = run.args.checkpoint_every and (epoch + 1) % run.args.checkpoint_every == 0
                if due and not stop and epoch + 1 < args.epochs:
                    writer.flush()
                    run.save(progress)
            if stop and (progress["epoch"], progress["position"]) != (args.epochs, 0):
                run.save(progress)
                bar.close()
                summary = run.finish({method: progress})
                print(f"{run.folder}: stopped in epoch {epoch + 1} of {TITLES[method]} ({summary}); "
                      f"go on with --resume {run.folder}")
                return False
    run.models[method] = {k: progress[k] for k in ("networks", "samples", "frames", "seconds")}
    run.save(None)
    return True


def main() -> int:
    args, folder, checkpoint = parse_args()
    if args.compile and not can_compile():
        print(f"{SCRIPT}.py: no C++ compiler or no Python headers: training uncompiled, several times slower "
              "(Debian, Ubuntu: apt install g++ python3-dev)", file=sys.stderr)
        args = dataclasses.replace(args, compile=False)
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    data = make_data(args.dim)
    run = Run(args, folder, checkpoint)
    stop: list[int] = []  # the signal, if one came: the iteration is finished and everything saved
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    for method in run.methods:
        if method not in run.models and not train(run, method, device, data, stop):
            return 128 + stop[0]
        if stop and any(m not in run.models for m in run.methods):  # it came while the method was being finished
            print(f"{run.folder}: stopped after {TITLES[method]} ({run.finish({})}); go on with --resume {run.folder}")
            return 128 + stop[0]
    print(f"{run.folder}: {run.finish({})}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
