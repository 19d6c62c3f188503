"""GN-GAN on synthetic data, after "Improving GAN with Neighbors Embedding and Gradient Matching"
(Tran, Bui and Cheung, AAAI 2019): 25 Gaussians in 2D (table 2, figures 3, 4), three in 1D (figure 2).

    python gngan_synthetic.py --epochs 60 --ema 0.999 # a first look: an eighth of the protocol
    python gngan_synthetic.py                         # GN-GAN's row of table 2: 500 epochs, 8 seeds
    python gngan_synthetic.py --method all            # all eight methods: the whole of table 2
    python gngan_synthetic.py --dim 1 --method all    # figure 2 and its video, with four baselines

The networks are tiny, so plain PyTorch spends its time launching operations, not computing. Three
things make this script fast. Seeds train at once: each loss is written for one seed, and
torch.vmap runs it over all of them. One iteration, with its gradients and Adam steps, is one
function that torch.compile turns into one graph. Each core trains a share of the seeds.

A method of your own: its losses, and a line in METHODS. What to expect: docs/synthetic.md.
In brackets behind a flag: where its default comes from.
"""
from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import Callable, Literal, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import UserError, training
from common.training import draw_seed, due

SCRIPT = pathlib.Path(__file__).stem
NUM_SAMPLES = 2000  # generated points that an evaluation registers [paper]
COMPILE_FROM = 1000  # iterations of a method's whole run from which compiling (up to a minute) pays
Params = dict[str, Tensor]  # a network's weights: w0 [in, out], b0 [out], w1, ...; of S seeds [S, ...]
Networks = dict[str, Params]  # of S seeds, by name: generator, encoder, discriminator, generator_ema
Terms = dict[str, Tensor]  # scalars by name, which go to TensorBoard; with or without a gradient
# trains from an iteration to before another; returns the state after that
TrainShare = Callable[[int, int], dict]


# ---------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    # used most
    method: MethodName = "gngan"
    """What to train; all: each in turn, in 1D those whose D sees points alone: GAN, VAE-GAN, WGAN-GP,
    Dist-GAN, GN-GAN."""
    dim: Literal[2, 1] = 2
    """2: 25 Gaussians on a grid (table 2, figures 3, 4). 1: three Gaussians on a line (figure 2)."""
    num_seeds: int = 8
    """How many runs to train at once, with the seeds seed, seed + 1, ..."""
    epochs: Optional[int] = None
    """Passes over the data. Default: 500 in 2D (195,500 iterations) [paper], 100 in 1D (10,000)
    [authors' code]."""
    resume: Optional[str] = None
    """A run folder or its checkpoint.pt: go on there, with its arguments unless given anew.
    auto: go on in --run-name's folder if it has a checkpoint, else start it."""

    # run
    seed: int = 1
    """The first seed, of initial weights and all draws. Each seed's run is what it would be alone."""
    processes: Optional[int] = None
    """Processes that share the seeds, of one thread each, at most one a seed; on a GPU always 1.
    Default: one a core, or OMP_NUM_THREADS; on macOS 1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    compile: bool = True
    """torch.compile the step of a run of 1,000 iterations or more (up to a minute; then cached)."""
    run_dir: str = "runs"
    """The folder for run folders."""
    run_name: Optional[str] = None
    """The run folder's name. Default: {dim}d-{script}-{seed}-{month, day}-{hour, minute}."""

    # model
    hidden_dim: Optional[int] = None
    """Neurons a hidden layer. Default: 64 in 2D, 4 in 1D [paper]."""
    hidden_layers: int = 2
    """Hidden layers of E, G and D; in 1D D has one less [paper for 1D; 2D: our reading]."""
    ema: float = 0.0
    """Decay of a moving average of G's weights, evaluated beside G, and drawn; 0: off [paper]."""

    # loss
    lambda_p: float = 0.1
    """GN-GAN, Dist-GAN, WGAN-GP: weight of the gradient penalty V_P [paper; WGAN-GP: tuned]."""
    lambda_m1: float = 0.1
    """GN-GAN: weight of the gradient norms' term of Eq. 13 [paper]."""
    lambda_m2: float = 0.1
    """GN-GAN: weight of the inner products' term of Eq. 13 [paper]."""
    lambda_r: float = 0.1
    """Dist-GAN: weight of the latent-data distance [authors' code; tuned]."""
    alpha: float = 0.05
    """GN-GAN: share of the reconstructions among the reals of Eq. 7 [paper]."""
    penalty: Literal["l2", "rms", "score"] = "l2"
    """Whose gradient V_P holds at norm 1.
    score: the sigmoid score's.
    l2: the logit's.
    rms: the logit's by root mean square over coordinates, as in the authors' code."""
    autoencoder_updates: Literal["both", "separate", "encoder"] = "separate"
    """What the autoencoder's update trains in GN-GAN and Dist-GAN.
    both: E and G, with one Adam for both updates of G.
    separate: E and G, with an Adam of its own for this update of G [authors' 2D code].
    encoder: E alone."""
    critic_steps: Optional[int] = None
    """D updates an iteration, each on its own mini-batch.
    Default: distgan 5 in 2D, distgan and wgangp 3 in 1D [authors' code]; wgangp 5 in 2D, gan 2,
    ali 5 [tuned]; others 1."""
    label_smoothing: Optional[float] = None
    """GAN, ALI: one-sided, the real label is 1 - this. Default: gan 0.1, ali 0 [tuned]."""
    vae_sigma: float = 0.02
    """VAE, beta-VAE: the likelihood's fixed standard deviation, for data in [0, 1] [tuned]."""
    vae_beta: float = 2.0
    """beta-VAE: weight of the Kullback-Leibler term [tuned]."""
    vaegan_gamma: float = 1.0
    """VAE-GAN: weight of the feature reconstruction in G's loss (Larsen et al. 2016) [tuned]."""
    vaegan_kl: float = 1.0
    """VAE-GAN: weight of the Kullback-Leibler term in E's loss [tuned]."""

    # optimisation
    batch_size: Optional[int] = None
    """Points a mini-batch. Default: 128 in 2D [paper], 64 in 1D [authors' code]."""
    lr: float = 1e-3
    """Adam's learning rate [paper]."""
    lr_decay: Optional[float] = None
    """The learning rate is multiplied by this every 10,000 updates of any network [authors' code].
    Default: 0.99 in 2D [paper], 1 in 1D [authors' code]."""
    beta1: Optional[float] = None
    """Adam's first decay. Default: 0.8 in 2D [paper], 0.5 in 1D [authors' code]."""
    beta2: Optional[float] = None
    """Adam's second decay. Default: 0.999 in 2D [Adam's own], 0.9 in 1D [authors' code]."""

    # logging
    checkpoint_every: int = 10
    """Epochs between checkpoints; 0: only at the start, at the end and on a signal."""


def resolve(args: Args, name: str) -> Args:
    """The arguments of one method: a copy, with each default filled in that depends on another flag.
    For `all`, those that depend on the method stay None."""
    args = dataclasses.replace(args, method=name)
    defaults = {"hidden_dim": (64, 4), "epochs": (500, 100), "batch_size": (128, 64),
                "lr_decay": (0.99, 1.0), "beta1": (0.8, 0.5), "beta2": (0.999, 0.9)}  # 2D, 1D
    if name != "all":
        smoothing = METHODS[name].label_smoothing
        defaults["critic_steps"] = METHODS[name].critic_steps
        defaults["label_smoothing"] = (smoothing, smoothing)
    for field, (in_2d, in_1d) in defaults.items():
        if getattr(args, field) is None:
            setattr(args, field, in_2d if args.dim == 2 else in_1d)
    return args


# --------------------------------------------------------------------------------------------- data
Prior = Callable[..., Tensor]  # prior(*shape, rng=torch.Generator): draws of that shape


def uniform(*shape: int, rng: torch.Generator) -> Tensor:
    """U(-1, 1) of the given shape."""
    return torch.rand(*shape, generator=rng) * 2 - 1


def normal(*shape: int, rng: torch.Generator) -> Tensor:
    """N(0, 1) of the given shape."""
    return torch.randn(*shape, generator=rng)


@dataclass(frozen=True)
class Problem:
    """A data set, the same for every seed and run, and what belongs to it."""
    points: Tensor  # the data, [N, dim]
    centers: Tensor  # the modes' centres, [M, dim]
    radius: float  # a sample this close to a centre counts as the mode's
    prior: Prior  # of z, unless the method has its own
    output: Callable[[Tensor], Tensor]  # the last operation of G


@functools.cache
def make_problem(dim: int) -> Problem:
    """The data set of --dim 2 or 1. The radius is 2 sqrt(2) standard deviations [2D: authors' code].

    2D: 25 modes of 2,000 points each, standard deviation 0.05, scaled into [0, 1] by the largest
    coordinate [authors' data file]. 98.1% of the points lie within the radius.
    1D: 6,400 points of three equally likely modes of standard deviation 0.5 at -4, 0, 4 [ours].
    """
    rng = torch.Generator().manual_seed(0)
    if dim == 1:
        centers = torch.tensor([[-4.0], [0.0], [4.0]])
        points = centers[torch.arange(6400) % 3] + 0.5 * torch.randn(6400, 1, generator=rng)
        radius = 2 * math.sqrt(2) * 0.5
        return Problem(points, centers, radius, prior=normal, output=lambda x: x)
    axis = torch.arange(-4.0, 5.0, 2.0)
    centers = torch.cartesian_prod(axis, axis)
    points = centers.repeat_interleave(2000, 0) + 0.05 * torch.randn(50000, 2, generator=rng)
    scale = points.abs().max()
    radius = float(2 * math.sqrt(2) * 0.05 / scale / 2)
    points = (points / scale + 1) / 2
    centers = (centers / scale + 1) / 2
    return Problem(points, centers, radius, prior=uniform, output=torch.sigmoid)


def epoch_length(args: Args) -> int:
    """Iterations an epoch."""
    return math.ceil(len(make_problem(args.dim).points) / args.batch_size)


class Draws(NamedTuple):
    """A mini-batch and its random numbers. Of an iteration each is [K, S, B, ...], of an epoch
    [I, K, S, B, ...], with S seeds, K updates of D an iteration and I iterations."""
    x: Tensor  # real points, [B, dim]
    z: Tensor  # from the prior, [B, dim]
    mix: Tensor  # mu of V_P, U(0, 1), [B, 1]
    noise: Tensor  # a stochastic encoder's, N(0, 1), [B, dim]; of another encoder [B, 0]


def draw_epoch(args: Args, epoch: int) -> Draws:
    """All draws of an epoch (counted from 0) of args.method: functions of each seed and the epoch alone.

    An epoch is ceil(N / B) mini-batches of B points; the last is filled from another permutation.
    D's updates beyond the first of an iteration get mini-batches of their own, drawn with replacement.
    """
    problem = make_problem(args.dim)
    method = METHODS[args.method]
    prior = method.prior or problem.prior
    n, iterations, batch = len(problem.points), epoch_length(args), args.batch_size
    shape = (iterations, args.critic_steps, batch)
    seeds = []
    for seed in range(args.seed, args.seed + args.num_seeds):
        rng = torch.Generator().manual_seed(draw_seed(seed, epoch))
        passes = [torch.randperm(n, generator=rng) for _ in range(1 + math.ceil(batch / n))]
        index = torch.randint(n, shape, generator=rng)
        index[:, 0] = torch.cat(passes)[: iterations * batch].view(iterations, batch)
        seeds.append(Draws(
            x=problem.points[index],
            z=prior(*shape, args.dim, rng=rng),
            mix=torch.rand(*shape, 1, generator=rng),
            noise=normal(*shape, args.dim if method.stochastic_encoder else 0, rng=rng)))
    return Draws(*(torch.stack(values, 2) for values in zip(*seeds)))


# ----------------------------------------------------------------------------------------- networks
def product(x: Tensor, w: Tensor) -> Tensor:
    """x [B, in] @ w [in, out].

    A product with only a few inputs or outputs is written as a sum over them. The compiler fuses it
    with its neighbours, where a library call takes longer than the arithmetic.
    """
    if w.shape[0] <= 4:
        return sum(x[:, k : k + 1] * w[k] for k in range(w.shape[0]))
    if w.shape[1] <= 4:
        return torch.stack([(x * w[:, k]).sum(-1) for k in range(w.shape[1])], -1)
    return x @ w


@dataclass
class MLP:
    """A fully connected network of one seed, ReLUs between its layers: [B, in] -> output([B, out])."""
    params: Params
    output: Callable[[Tensor], Tensor] = lambda x: x

    def hidden(self, x: Tensor) -> list[Tensor]:
        """The hidden layers' activations after ReLU, each [B, H]."""
        activations = []
        for k in range(len(self.params) // 2 - 1):
            x = F.relu(product(x, self.params[f"w{k}"]) + self.params[f"b{k}"])
            activations.append(x)
        return activations

    def last(self, activation: Tensor) -> Tensor:
        """The last layer, linear: [B, H] -> [B, out]."""
        k = len(self.params) // 2 - 1
        return product(activation, self.params[f"w{k}"]) + self.params[f"b{k}"]

    def __call__(self, x: Tensor) -> Tensor:
        return self.output(self.last(self.hidden(x)[-1]))


def to_logits(x: Tensor) -> Tensor:
    """The last operation of D: [B, 1] -> [B]."""
    return x[:, 0]


def init_mlp(sizes: list[int], inputs: Tensor, rng: torch.Generator) -> Params:
    """Weights N(0, 2 / fan_in) [authors' 2D code], biases U(-1, 1) / sqrt(fan_in) [ours].

    In the first layer each unit switches on at one of `inputs` [H, in], so that its kinks lie all over
    them [ours]. With small biases they lie around (0, 0), a corner of the 2D data: the far end comes last.
    """
    params = {}
    for k, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        params[f"w{k}"] = torch.randn(fan_in, fan_out, generator=rng) * math.sqrt(2 / fan_in)
        params[f"b{k}"] = uniform(fan_out, rng=rng) * (1 / math.sqrt(fan_in))
    params["b0"] = -(inputs * params["w0"].mT).sum(-1)
    return params


def init_networks(args: Args) -> Networks:
    """The networks of args.method, on the CPU, so that every device starts from the same weights."""
    problem, method = make_problem(args.dim), METHODS[args.method]
    low, high = problem.points.amin(0), problem.points.amax(0)
    hidden = [args.hidden_dim] * args.hidden_layers

    def init_seed(seed: int) -> Networks:
        rng = torch.Generator().manual_seed(seed)

        def x() -> Tensor:
            return low + (high - low) * torch.rand(args.hidden_dim, args.dim, generator=rng)

        def z() -> Tensor:
            return (method.prior or problem.prior)(args.hidden_dim, args.dim, rng=rng)

        networks = {"generator": init_mlp([args.dim, *hidden, args.dim], z(), rng)}
        if "autoencoder" in method.objectives or "encoder" in method.objectives:
            outputs = 2 * args.dim if method.stochastic_encoder else args.dim
            networks["encoder"] = init_mlp([args.dim, *hidden, outputs], x(), rng)
            if not method.stochastic_encoder:  # codes spread from 0; random ones may stay folded [ours]
                networks["encoder"][f"w{args.hidden_layers}"].zero_()
                networks["encoder"][f"b{args.hidden_layers}"].zero_()
        if "discriminator" in method.objectives:
            inputs = torch.cat([x(), z()], -1) if method.judges_pairs else x()
            layers = hidden if args.dim == 2 else hidden[1:]
            networks["discriminator"] = init_mlp([inputs.shape[-1], *layers, 1], inputs, rng)
        return networks

    seeds = [init_seed(seed) for seed in range(args.seed, args.seed + args.num_seeds)]
    networks = {name: {k: torch.stack([seed[name][k] for seed in seeds]) for k in params}
                for name, params in seeds[0].items()}
    if args.ema:
        networks["generator_ema"] = {k: v.clone() for k, v in networks["generator"].items()}
    return networks


# ------------------------------------------------------------------------------------------- losses
def l2_norm(v: Tensor) -> Tensor:
    """L2 norm of each row of v [B, dim], [B]; the small constant keeps its gradient finite at 0."""
    return (v.square().sum(-1) + 1e-12).sqrt()


def logit_and_gradient(discriminator: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B] of x [B, dim] and each one's gradient with respect to its x [B, dim].

    A ReLU network is linear around x: its gradient is the product W_1 M_1 W_2 M_2 ... w of the weights,
    masked by which units are on. Written out, it is differentiated once more like any expression.
    That is exact, since the masks' derivative is 0 almost everywhere, and saves a double backward.
    """
    params = discriminator.params
    hidden = discriminator.hidden(x)
    gradient = params[f"w{len(hidden)}"].mT
    for k in reversed(range(len(hidden))):
        gradient = product(torch.where(hidden[k] > 0, gradient, 0.0), params[f"w{k}"].mT)
    logit = discriminator.output(discriminator.last(hidden[-1]))
    return logit, gradient


def score_and_gradient(discriminator: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid score D(x) [B] and its gradient [B, dim] = D (1 - D) times the logit's."""
    logit, gradient = logit_and_gradient(discriminator, x)
    score = torch.sigmoid(logit)
    return score, (score * (1 - score))[:, None] * gradient


def real_loss(logit: Tensor, smoothing: float = 0.0) -> Tensor:
    """-E log D for logits [B], scalar; with label smoothing s: -(1 - s) E log D - s E log(1 - D)."""
    return (F.softplus(-logit) + smoothing * logit).mean()


def fake_loss(logit: Tensor) -> Tensor:
    """-E log(1 - D) for logits [B], scalar."""
    return F.softplus(logit).mean()


def squared_error(real: Tensor, reconstruction: Tensor) -> Tensor:
    """E ||x - y||^2 of x, y [B, d]: the sum over coordinates, the mean over the batch. Scalar."""
    return (real - reconstruction).square().sum(-1).mean()


def gradient_penalty(discriminator: MLP, real: Tensor, fake: Tensor, mix: Tensor,
                     penalty: str = "l2") -> Tensor:
    """V_P = E(||grad D(x^)|| - 1)^2 at x^ = mix real + (1 - mix) fake (below Eq. 7); scalar.

    real, fake [B, dim]; mix [B, 1] from U(0, 1). penalty: score, the norm of the sigmoid score's
    gradient; l2, of the logit's; rms, of the logit's over sqrt(dim).
    """
    point = mix * real + (1 - mix) * fake
    differentiate = score_and_gradient if penalty == "score" else logit_and_gradient
    _, gradient = differentiate(discriminator, point)
    slope = l2_norm(gradient)
    if penalty == "rms":
        slope = slope / math.sqrt(point.shape[-1])
    return (slope - 1).square().mean()


def gradient_matching(discriminator: MLP, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of V_G (Eq. 13) before their weights, scalars, for points [B, dim].

    |E D(x) - E D(G)|, (E ||grad D(x)|| - E ||grad D(G)||)^2 and (E |grad D(x)'x| - E |grad D(G)'G|)^2.
    D here is the sigmoid score.
    """
    score_real, gradient_real = score_and_gradient(discriminator, real)
    score_fake, gradient_fake = score_and_gradient(discriminator, fake)
    inner_real = (gradient_real * real).sum(-1).abs()
    inner_fake = (gradient_fake * fake).sum(-1).abs()
    score_term = (score_real.mean() - score_fake.mean()).abs()
    norm_term = (l2_norm(gradient_real).mean() - l2_norm(gradient_fake).mean()).square()
    inner_term = (inner_real.mean() - inner_fake.mean()).square()
    return score_term, norm_term, inner_term


def kl_divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """E KL(N(mean, exp(log_var)) || N(0, I)) of [B, d] (Kingma and Welling 2014, app. B); scalar."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1).mean()


def feature_error(discriminator: MLP, real: Tensor, reconstruction: Tensor) -> Tensor:
    """VAE-GAN: -log N(D's last hidden layer of x; that of G(E(x)), I) but for a constant, scalar."""
    features = discriminator.hidden(torch.cat([real, reconstruction]))[-1]
    features_real, features_reconstruction = features.chunk(2)
    return 0.5 * squared_error(features_real, features_reconstruction)


def encode_sample(encoder: MLP, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A sample of q(z|x) = N(mean, exp(log_var)) with its mean and log-variance, each [B, dim].

    The log-variance is kept below 20: of 1D data it begins at up to 66, where a loss overflows.
    """
    mean, log_var = encoder(x).chunk(2, -1)
    log_var = log_var.clamp(max=20)
    return mean + noise * (0.5 * log_var).exp(), mean, log_var


# ------------------------------------------------------------------------------------------ methods
# A method is its objectives, one an update. Each is a function of E, G and D of one seed and a
# mini-batch's draws. It returns the loss that is minimised, a scalar, and terms to watch.
Result = tuple[Tensor, Terms]


def gngan_autoencoder(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """Eq. 1 as its mean over coordinates [authors' code]; no neighbour embedding here [paper]."""
    return squared_error(draws.x, G(E(draws.x))) / args.dim, {}


def reconstructing_discriminator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """-V_D of Eq. 7 with its penalty. Dist-GAN's reconstructions are labelled real [paper]."""
    alpha = 0.5 if args.method == "distgan" else args.alpha
    fake = G(draws.z)
    real, generated, reconstructed = D(torch.cat([draws.x, fake, G(E(draws.x))])).chunk(3)
    loss = (1 - alpha) * real_loss(real) + alpha * real_loss(reconstructed) + fake_loss(generated)
    penalty = gradient_penalty(D, draws.x, fake, draws.mix, args.penalty)
    return loss + args.lambda_p * penalty, {"gradient_penalty": penalty}


def gngan_generator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """Eq. 13, on the x and z of the other two updates (Algorithm 1)."""
    score_term, norm_term, inner_term = gradient_matching(D, draws.x, G(draws.z))
    loss = score_term + args.lambda_m1 * norm_term + args.lambda_m2 * inner_term
    terms = {"score_matching": score_term, "norm_matching": norm_term, "inner_matching": inner_term}
    return loss, terms


def distgan_autoencoder(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """Tran, Bui and Cheung 2018, as in their toy code; the means are over batch and coordinates."""
    latent = E(draws.x)
    logit = G.last(G.hidden(latent)[-1])
    if args.dim == 2:  # x lies in [0, 1]: cross-entropy
        error = F.binary_cross_entropy_with_logits(logit, draws.x)
        reconstruction = torch.sigmoid(logit)
    else:  # x in place of its reconstruction in the distance
        error = squared_error(draws.x, logit)
        reconstruction = draws.x
    distance = ((reconstruction - G(draws.z)).mean() - (latent - draws.z).mean()).square()
    return error + args.lambda_r * distance, {"reconstruction": error, "latent_data_distance": distance}


def distgan_generator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    score_real, score_fake = torch.sigmoid(D(torch.cat([draws.x, G(draws.z)]))).chunk(2)
    return (score_real.mean() - score_fake.mean()).abs(), {}


def gan_discriminator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """Goodfellow et al. 2014."""
    real, generated = D(torch.cat([draws.x, G(draws.z)])).chunk(2)
    return real_loss(real, args.label_smoothing) + fake_loss(generated), {}


def gan_generator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """Non-saturating."""
    return real_loss(D(G(draws.z))), {}


def wgangp_discriminator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """Gulrajani et al. 2017; the critic is the logit."""
    fake = G(draws.z)
    critic_real, critic_fake = D(torch.cat([draws.x, fake])).chunk(2)
    penalty = gradient_penalty(D, draws.x, fake, draws.mix, args.penalty)
    loss = critic_fake.mean() - critic_real.mean() + args.lambda_p * penalty
    return loss, {"gradient_penalty": penalty}


def wgangp_generator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    return -D(G(draws.z)).mean(), {}


def judge_pairs(E: MLP, G: MLP, D: MLP, draws: Draws) -> tuple[Tensor, Tensor]:
    """ALI: logits of the pairs (x, E(x)) and (G(z), z), each [B]."""
    latent, _, _ = encode_sample(E, draws.x, draws.noise)
    encoded = torch.cat([draws.x, latent], -1)
    generated = torch.cat([G(draws.z), draws.z], -1)
    return D(torch.cat([encoded, generated])).chunk(2)


def ali_discriminator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """Dumoulin et al. 2017."""
    encoded, generated = judge_pairs(E, G, D, draws)
    return real_loss(encoded, args.label_smoothing) + fake_loss(generated), {}


def ali_autoencoder(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """D's loss with the labels swapped, so non-saturating."""
    encoded, generated = judge_pairs(E, G, D, draws)
    return fake_loss(encoded) + real_loss(generated), {}


def vaegan_encoder(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """Larsen et al. 2016."""
    latent, mean, log_var = encode_sample(E, draws.x, draws.noise)
    divergence = kl_divergence(mean, log_var)
    loss = args.vaegan_kl * divergence + feature_error(D, draws.x, G(latent))
    return loss, {"kl_divergence": divergence}


def vaegan_generator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    latent, _, _ = encode_sample(E, draws.x, draws.noise)
    reconstruction = G(latent)
    generated, reconstructed = D(torch.cat([G(draws.z), reconstruction])).chunk(2)
    error = feature_error(D, draws.x, reconstruction)
    loss = args.vaegan_gamma * error + real_loss(reconstructed) + real_loss(generated)
    return loss, {"feature_reconstruction": error}


def vaegan_discriminator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    latent, _, _ = encode_sample(E, draws.x, draws.noise)
    real, generated, reconstructed = D(torch.cat([draws.x, G(draws.z), G(latent)])).chunk(3)
    return real_loss(real) + fake_loss(reconstructed) + fake_loss(generated), {}


def vae_autoencoder(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    """Kingma and Welling 2014; beta-VAE: Higgins et al. 2017."""
    beta = args.vae_beta if args.method == "betavae" else 1.0
    latent, mean, log_var = encode_sample(E, draws.x, draws.noise)
    error = squared_error(draws.x, G(latent)) / (2 * args.vae_sigma**2)
    divergence = kl_divergence(mean, log_var)
    return error + beta * divergence, {"reconstruction": error, "kl_divergence": divergence}


@dataclass(frozen=True)
class Method:
    """What --method trains, and how it differs from the other methods."""
    title: str
    # in the order of updates, by what is trained: encoder, generator, discriminator, autoencoder (E and G)
    objectives: dict[str, Callable[..., Result]]
    paper: Optional[list[tuple[float, float]]] = None  # table 2: modes, points
    critic_steps: tuple[int, int] = (1, 1)  # default of --critic-steps in 2D, in 1D
    label_smoothing: float = 0.0  # default of --label-smoothing
    prior: Optional[Prior] = None  # of z in training and sampling, instead of the problem's
    stochastic_encoder: bool = False  # E gives mean and log-variance
    judges_pairs: bool = False  # D's input is (x, z)
    critic: bool = False  # D's output is a critic's, not a logit

    @property
    def judges_points(self) -> bool:
        """Whether there is a D over the data's space, which pictures can show."""
        return "discriminator" in self.objectives and not self.judges_pairs


METHODS = {
    "gan": Method(
        "GAN", {"discriminator": gan_discriminator, "generator": gan_generator},
        paper=[(14.25, 2.49), (1013.38, 171.73)],
        critic_steps=(2, 2), label_smoothing=0.1),
    "ali": Method(
        "ALI", {"discriminator": ali_discriminator, "autoencoder": ali_autoencoder},
        paper=[(17.81, 1.80), (1281.43, 117.84)],
        critic_steps=(5, 5), stochastic_encoder=True, judges_pairs=True),
    "vaegan": Method(
        "VAE-GAN",
        {"encoder": vaegan_encoder, "generator": vaegan_generator, "discriminator": vaegan_discriminator},
        paper=[(12.75, 3.20), (1042.38, 170.17)],
        prior=normal, stochastic_encoder=True),
    "vae": Method(
        "VAE", {"autoencoder": vae_autoencoder},
        paper=[(13.48, 2.31), (1265.45, 72.47)],
        prior=normal, stochastic_encoder=True),
    "betavae": Method(
        "β-VAE", {"autoencoder": vae_autoencoder},
        paper=[(18.00, 2.33), (1321.17, 95.61)],
        prior=normal, stochastic_encoder=True),
    "wgangp": Method(
        "WGAN-GP", {"discriminator": wgangp_discriminator, "generator": wgangp_generator},
        paper=[(21.71, 1.35), (1180.25, 158.63)],
        critic_steps=(5, 3), critic=True),
    "distgan": Method(
        "Dist-GAN", {"autoencoder": distgan_autoencoder, "discriminator": reconstructing_discriminator,
                     "generator": distgan_generator},
        paper=[(20.71, 4.42), (1188.62, 311.91)],
        critic_steps=(5, 3)),
    "gngan": Method(
        "GN-GAN", {"autoencoder": gngan_autoencoder, "discriminator": reconstructing_discriminator,
                   "generator": gngan_generator},
        paper=[(24.39, 0.44), (1461.83, 222.86)]),
}
MethodName = Literal[*METHODS, "all"]  # the choices of --method


# --------------------------------------------------------------------------------------- train step
def optimizers_of(args: Args, update: str) -> dict[str, str]:
    """The networks that an update of args.method trains, each with the name of its optimiser."""
    if update != "autoencoder":
        return {update: update}
    both = {"encoder": "encoder", "generator": "generator"}
    if "generator" not in METHODS[args.method].objectives:  # G has no other update
        return both
    return {"both": both, "separate": {"encoder": "encoder", "generator": "reconstruction"},
            "encoder": {"encoder": "encoder"}}[args.autoencoder_updates]


def init_optimizers(args: Args, networks: Networks) -> dict[str, dict]:
    """Adam's state of each optimiser: the number of steps, and m and v of every weight.

    Adam normalises gradients. With moments of its own (`reconstruction`) the autoencoder's update moves
    G as far as the generator's, however small its gradient is.
    """
    optimizers = {}
    for update in METHODS[args.method].objectives:
        for network, name in optimizers_of(args, update).items():
            params = networks[network]
            optimizers[name] = {"step": torch.zeros(()),
                                "m": {k: torch.zeros_like(v) for k, v in params.items()},
                                "v": {k: torch.zeros_like(v) for k, v in params.items()}}
    return optimizers


def adam_step(args: Args, params: Params, gradients: Params, optimizer: dict, lr: Tensor) -> None:
    """One step of Adam on a network, all seeds, in place. (torch.optim's breaks a compiled graph.)"""
    optimizer["step"] += 1
    step_size = lr / (1 - args.beta1 ** optimizer["step"])
    correction = (1 - args.beta2 ** optimizer["step"]).sqrt()
    for k, weight in params.items():
        g, m, v = gradients[k], optimizer["m"][k], optimizer["v"][k]
        m.lerp_(g, 1 - args.beta1)
        v.lerp_(g * g, 1 - args.beta2)
        weight.sub_(step_size * m / (v.sqrt() / correction + 1e-8))


def make_train_step(args: Args, networks: Networks, optimizers: dict[str, dict],
                    lr: Tensor) -> Callable[[Draws], Terms]:
    """`train_step(draws)`: one iteration of args.method, in place; its losses and terms, each [S]."""
    output = make_problem(args.dim).output

    def differentiate(objective: Callable[..., Result], trained: list[str], batch: Draws) -> tuple:
        """Loss and terms of every seed, each [S], and gradients of the networks named in `trained`."""
        def of_one_seed(trained: Networks, networks: Networks, batch: Draws) -> Result:
            params = {**networks, **trained}
            E = MLP(params.get("encoder", {}))  # what the method does not train is empty
            G = MLP(params["generator"], output)
            D = MLP(params.get("discriminator", {}), to_logits)
            loss, terms = objective(args, E, G, D, batch)
            return loss, training.scalars(terms)

        gradients, (loss, terms) = torch.vmap(torch.func.grad_and_value(of_one_seed, has_aux=True))(
            {name: networks[name] for name in trained}, networks, batch)
        return loss, terms, gradients

    def train_step(draws: Draws) -> Terms:
        losses = {}
        for update, objective in METHODS[args.method].objectives.items():  # GN-GAN's: Algorithm 1
            optimizer_of = optimizers_of(args, update)
            for k in range(args.critic_steps if update == "discriminator" else 1):
                batch = Draws(*(values[k] for values in draws))
                loss, terms, gradients = differentiate(objective, list(optimizer_of), batch)
                for network, name in optimizer_of.items():
                    adam_step(args, networks[network], gradients[network], optimizers[name], lr)
            losses |= {update: loss, **terms}
        if args.ema:
            for k, average in networks["generator_ema"].items():
                average.lerp_(networks["generator"][k], 1 - args.ema)
        return losses

    return train_step


def learning_rate(args: Args, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0. Every update of a network counts."""
    updates = 0
    for update in METHODS[args.method].objectives:
        updates += args.critic_steps if update == "discriminator" else 1
    return args.lr * args.lr_decay ** (iteration * updates // 10000)


# --------------------------------------------------------------------------------------- evaluation
AXIS = torch.linspace(-6.95, 6.95, 140)  # the middles of figure 2's bins


def register(samples: Tensor, centers: Tensor, radius: float) -> dict[str, Tensor]:
    """Table 2's columns for samples [S, n, dim], one value a seed, [S].

    A sample registers to a mode within `radius` of its centre. A mode is covered when a quarter of its
    fair share of the samples registers to it: 20 of 2,000 for 25 modes [paper].

    With p_i mode i's share of the registered samples, tv_true = sum_i |p_i - 1/M| and tv_diff =
    sum_i |p_{i+1} - p_i| in the grid's order [ours]. The paper does not define these two columns, and
    one of its values (VAE: 2.16) is out of our definitions' range.
    """
    num_modes = len(centers)
    fair_share = samples.shape[1] / num_modes
    differences = [samples[..., None, k] - centers[:, k] for k in range(centers.shape[1])]
    near = sum(difference.square() for difference in differences) <= radius**2  # [S, n, M]
    counts = near.sum(1).double()
    points = counts.sum(1)
    share = counts / points.clamp_min(1)[:, None]
    return {"modes": (counts >= fair_share / 4).sum(1).double(), "points": points,
            "tv_true": (share - 1 / num_modes).abs().sum(1), "tv_diff": share.diff(dim=1).abs().sum(1)}


def wasserstein_1d(samples: Tensor, data: Tensor) -> Tensor:
    """Wasserstein-1 distance, [S], of samples [S, n, 1] to data [N, 1]: mean distance of quantiles."""
    levels = (torch.arange(samples.shape[1]) + 0.5) / samples.shape[1]
    return (samples[..., 0].sort(1).values - torch.quantile(data[:, 0], levels)).abs().mean(1)


def density(samples: Tensor) -> Tensor:
    """Histogram density of samples [S, n, 1] over figure 2's bins, [S, 140]."""
    counts = torch.stack([torch.histc(of_seed.float(), 140, -7, 7) for of_seed in samples[..., 0]])
    return counts / (samples.shape[1] * 0.1)


def shown_variant(args: Args) -> str:
    """The ending of the scores that are shown where one variant is: with --ema the averaged G's."""
    return "_ema" if args.ema else ""


def sample_points(args: Args, networks: Networks, epoch: int, count: int, variant: str = "") -> Tensor:
    """G(z) of every seed, [S, count, dim] on the CPU: a function of weights, seed and epoch."""
    problem = make_problem(args.dim)
    prior = METHODS[args.method].prior
    if prior is None or variant == "_uniform":
        prior = problem.prior
    params = networks["generator_ema" if variant == "_ema" else "generator"]
    seeds = range(args.seed, args.seed + args.num_seeds)
    rngs = [torch.Generator().manual_seed(draw_seed(seed, epoch, 1)) for seed in seeds]
    z = torch.stack([prior(count, args.dim, rng=rng) for rng in rngs]).to(params["w0"].device)
    return torch.vmap(lambda params, z: MLP(params, problem.output)(z))(params, z).cpu()


def evaluate(args: Args, networks: Networks, epoch: int) -> dict[str, list[float]]:
    """One evaluation: table 2's columns, in 1D with the Wasserstein distance, a number a seed.

    Variants are evaluated too, under keys with their ending. _ema: with --ema, the averaged G.
    _uniform: in 2D, a method with a prior of its own on the paper's uniform one.
    """
    problem = make_problem(args.dim)
    variants = [""]
    if args.ema:
        variants.append("_ema")
    if args.dim == 2 and METHODS[args.method].prior:
        variants.append("_uniform")
    scores = {}
    for variant in variants:
        samples = sample_points(args, networks, epoch, NUM_SAMPLES, variant)
        values = register(samples, problem.centers, problem.radius)
        if args.dim == 1:
            values["w1"] = wasserstein_1d(samples, problem.points)
        for key, value in values.items():
            scores[key + variant] = value.tolist()
    return scores


def density_and_score(args: Args, networks: Networks, epoch: int) -> Tensor:
    """Figure 2's two curves over AXIS, [S, 2, 140]: density of generated points, and D's score."""
    params = networks["discriminator"]
    x = AXIS[:, None].to(params["w0"].device)
    score = torch.vmap(lambda params: MLP(params, to_logits)(x))(params).cpu()
    if METHODS[args.method].critic:  # it has no scale
        score = score - score.amin(-1, keepdim=True)
        score = score / score.amax(-1, keepdim=True).clamp_min(1e-12)
    else:
        score = torch.sigmoid(score)
    samples = sample_points(args, networks, epoch, 5 * NUM_SAMPLES, shown_variant(args))
    return torch.stack([density(samples), score], 1)


# --------------------------------------------------------------------------------------------- loop
def make_share(args: Args, state: dict, device: torch.device, compiled: bool) -> TrainShare:
    """`train_share(first, last)`: trains args' seeds, which are one process's share of a run's, from
    iteration `first` to before `last`. It returns the state after that, with the last losses.

    state: {"networks": ..., "optimizers": ...} to begin with, of these seeds.
    """
    state = map_state(state, lambda value: value.to(device))
    lr = torch.tensor(args.lr, device=device)
    train_step = make_train_step(args, state["networks"], state["optimizers"], lr)
    if compiled:
        train_step = torch.compile(train_step, fullgraph=True, dynamic=False)
    length = epoch_length(args)
    drawn: tuple[int, list] = (-1, [])  # an epoch and its draws

    def train_share(first: int, last: int) -> dict:
        nonlocal drawn
        for iteration in range(first, last):
            epoch, position = divmod(iteration, length)
            if drawn[0] != epoch:
                drawn = epoch, [values.to(device).unbind(0) for values in draw_epoch(args, epoch)]
            lr.fill_(learning_rate(args, iteration))
            losses = train_step(Draws(*(values[position] for values in drawn[1])))
        return map_state({**state, "losses": losses}, lambda value: value.numpy(force=True))

    return train_share


def make_shares(args: Args, state: dict, device: torch.device, compiled: bool) -> list[TrainShare]:
    """The seeds' shares, at most args.processes many, equally large, so that one graph serves all.
    Spare places of the last hold copies of other seeds, which nobody looks at."""
    size = math.ceil(args.num_seeds / args.processes)
    shares = []
    for first in range(0, args.num_seeds, size):
        seeds = [seed % args.num_seeds for seed in range(first, first + size)]
        own_state = map_state(
            state, lambda value, seeds=seeds: value[seeds] if value.ndim else value.clone())
        own_args = dataclasses.replace(args, seed=args.seed + first, num_seeds=size)
        shares.append(make_share(own_args, own_state, device, compiled))
    return shares


def map_state(state: dict, convert: Callable) -> dict:
    """Nested dictionaries with each value converted."""
    return {key: map_state(value, convert) if isinstance(value, dict) else convert(value)
            for key, value in state.items()}


def join_shares(shares: list[dict], num_seeds: int) -> dict:
    """The state of all seeds from that of each share. Adam's count of steps is the same in all."""
    first = shares[0]
    if isinstance(first, dict):
        return {key: join_shares([share[key] for share in shares], num_seeds) for key in first}
    return torch.tensor(np.concatenate(shares)[:num_seeds] if first.ndim else first)


def train(args: Args, device: torch.device, folder: pathlib.Path, checkpoint: Optional[dict],
          header: dict, signals: list[int]) -> dict:
    """Train args.method from the checkpoint, or the start, to its end or a signal in `signals`.

    header: what a checkpoint of the run holds beside this method's state. Returns what table and
    pictures need: {"iteration", "seconds", "networks": weights, "frames": figure 2's, one an epoch}.
    """
    # Networks and optimisers of all seeds
    networks = init_networks(args)
    state = {"networks": networks, "optimizers": init_optimizers(args, networks)}
    start, begin = 0, time.perf_counter()
    frames: list[Tensor] = []
    if checkpoint is not None:
        training.restore_tensors(checkpoint, state)
        start, begin = checkpoint["iteration"], begin - checkpoint["seconds"]
        frames = checkpoint["frames"]
    length = epoch_length(args)
    total = args.epochs * length
    compiled = args.compile and total >= COMPILE_FROM  # the whole length: a resumed run computes the same
    if compiled:
        torch.compiler.reset()  # the methods share one code object; its cache holds eight variants
    shares = make_shares(args, state, device, compiled)

    def prepare() -> None:  # once, for all processes that are forked then
        importlib.import_module("torch._dynamo")  # torch.func needs it, too: two seconds
        if compiled:
            make_shares(args, state, device, compiled)[0](start, start + 1)  # of copies

    # What is shown
    # each of several methods has a TensorBoard folder of its own, so that their curves share a chart
    events = folder / args.method if header["args"]["method"] == "all" else folder
    step = math.ceil(start / length)
    writer = training.summary_writer(events, args, step, arguments=start < total)
    bar = common.progress(total=total, initial=start, desc=METHODS[args.method].title, unit="it",
                          postfix="compiling" if compiled else None)

    state["losses"] = checkpoint["losses"] if checkpoint else {}
    iteration, sent, rate = start, [start], None
    with writer, bar, training.Workers(shares, prepare, folder) as train_shares:
        while True:
            epoch, position = divmod(iteration, length)
            last = iteration == total or bool(signals)
            epoch_begins = position == 0
            save = epoch_begins and due(args.checkpoint_every, epoch, args.epochs)
            save = save or last or iteration == 0
            unwritten = iteration > start or checkpoint is None  # a resumed run's first is saved

            # Checkpoint
            if epoch_begins or last:
                networks = state["networks"]
                when = f"iteration {iteration} (epoch {epoch})"
                training.check_finite(training.flatten(networks), when, folder)
            if unwritten and save:
                writer.flush()
                contents = {**header, "iteration": iteration, "seconds": time.perf_counter() - begin,
                            "method": args.method, **state, "frames": frames}
                common.write_atomically(
                    folder / "checkpoint.pt", functools.partial(training.save, contents),
                    advice=f"make room and go on with --resume {common.quote(folder)}; ")

            # Evaluate (a resumed run first repeats the evaluation that followed its checkpoint)
            if epoch_begins and epoch > 0:
                scores = evaluate(args, networks, epoch)
                if args.dim == 1:
                    frames = [*frames, density_and_score(args, networks, epoch)]
                record = {"method": args.method, "epoch": epoch, "iteration": iteration, **scores}
                with open(folder / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    os.fsync(file.fileno())  # before the next checkpoint: a line that is cut is made again
                for name, value in scores.items():
                    writer.add_scalar(f"metrics/{name}", np.mean(value), epoch)
                for name, value in state["losses"].items():
                    writer.add_scalar(f"losses/{name}", value.mean().item(), epoch)
                if rate is not None:
                    writer.add_scalar("charts/iterations_per_second", rate, epoch)
                writer.add_scalar("charts/learning_rate", learning_rate(args, iteration), epoch)
                shown = shown_variant(args)
                bar.set_postfix(modes=f"{np.mean(scores['modes' + shown]):.1f}",
                                points=f"{np.mean(scores['points' + shown]):.0f}", refresh=False)
                early = epoch & (epoch - 1) == 0 and epoch < args.epochs  # 1, 2, 4, 8, ...
                if early and args.dim == 2:  # something to look at
                    model = {"iteration": iteration, "networks": networks}
                    draw_pictures(args, folder, {args.method: model})
                    bar.unpause()  # the rate is of training alone

            # Train in blocks, which end with an epoch. Four are sent ahead, so that no process waits
            # for another that is slower for a moment. A signal waits for one, about half a second.
            if last:
                break
            block = max(1, int(0.5 * (rate or 0)))
            while sent[-1] < total and len(sent) <= 4:
                stop = min(sent[-1] + block, (sent[-1] // length + 1) * length)
                train_shares.send(sent[-1], stop)
                sent.append(stop)
            state = join_shares(train_shares.receive(), args.num_seeds)
            training.show_iterations(bar, iteration == start, number=sent[1] - iteration)
            sent, iteration = sent[1:], sent[1]
            rate = training.images_per_second(bar, batch_size=1)  # iterations a second

    return {"iteration": iteration, "seconds": time.perf_counter() - begin,
            "networks": state["networks"], "frames": frames}


# ------------------------------------------------------------------------------ arguments and files
RANGES = {"seed": "[0, 2147483648)", "num_seeds": "[1, inf)", "processes": "[1, inf)",
          "hidden_dim": "[1, inf)", "hidden_layers": "[1, inf)", "ema": "[0, 1)",
          "lambda_p": "[0, inf)", "lambda_m1": "[0, inf)", "lambda_m2": "[0, inf)",
          "lambda_r": "[0, inf)", "alpha": "[0, 1)", "critic_steps": "[1, inf)",
          "label_smoothing": "[0, 1)", "vae_sigma": "(0, inf)", "vae_beta": "[0, inf)",
          "vaegan_gamma": "[0, inf)", "vaegan_kl": "[0, inf)", "epochs": "[1, inf)",
          "batch_size": "[1, inf)", "lr": "(0, inf)", "lr_decay": "(0, 1]", "beta1": "[0, 1)",
          "beta2": "[0, 1)", "checkpoint_every": "[0, inf)"}


def parse_args(argv: Optional[list[str]] = None) -> tuple[Args, Optional[pathlib.Path], Optional[dict]]:
    """The arguments, resolved and checked; with --resume also the checkpoint's path and contents."""
    args, file, checkpoint = common.parse(Args, argv, __doc__, SCRIPT)
    args = resolve(args, args.method)
    common.check_ranges(args, RANGES)
    if args.dim == 1 and args.hidden_layers < 2:
        raise UserError("--hidden-layers is 1: in 1D it must be 2 or more, since D has one less")
    choices = [*methods_of(args.dim, "all"), "all"]
    if args.method not in choices:
        raise UserError(f"--method {args.method} is not part of the 1D experiment: choose from {', '.join(choices)}")
    if checkpoint is None:
        return args, None, None

    entries = {"method": str, "finished": dict, "losses": dict, "frames": list}
    if (any(not isinstance(checkpoint.get(name), kind) for name, kind in entries.items())
            or checkpoint["method"] not in METHODS):
        raise UserError(f"{file} is not a checkpoint of {SCRIPT}.py")
    fixed = {"method", "dim", "seed", "batch_size"}  # an epoch, say, stays what it is
    if checkpoint.get("finished"):  # a table's methods are trained alike
        fixed = checkpoint["args"].keys() - {"processes", "device", "compile", "checkpoint_every"}
    for name in sorted(fixed):
        value, saved = getattr(args, name), checkpoint["args"][name]
        if value != saved:
            raise UserError(f"{common.flag(name)} is {value}: the run of {file} has {saved}; "
                            "leave the flag out, or start a new run")
    if args.epochs * epoch_length(args) < checkpoint["iteration"]:
        raise UserError(f"--epochs is {args.epochs}: {file} is already at iteration {checkpoint['iteration']}; "
                        "give more")
    return args, file, checkpoint


def methods_of(dim: int, name: str) -> list[str]:
    """The methods that --method `name` trains. In 1D `all` are those with a D for figure 2 to draw."""
    if name != "all":
        return [name]
    return [key for key, method in METHODS.items() if dim == 2 or method.judges_points]


# ------------------------------------------------------------------------------- table and pictures
def gradients_of_d(name: str, networks: Networks, positions: Tensor) -> Tensor:
    """The gradient of every seed's D, [S, n, 2], at positions [n, 2]; WGAN-GP: of the critic."""
    differentiate = logit_and_gradient if METHODS[name].critic else score_and_gradient
    return torch.vmap(lambda params: differentiate(MLP(params, to_logits), positions)[1])(
        networks["discriminator"])


def draw_pictures(args: Args, folder: pathlib.Path, models: dict[str, dict]) -> None:
    """In 2D generated points, with --ema the averaged G's, and figure 4's gradients; in 1D figure 2.
    models: see `report`."""
    from common import pictures  # imports Matplotlib, which takes a second
    problem = make_problem(args.dim)
    if args.dim == 1:
        ending = pictures.VARIANTS[shown_variant(args)]
        curves = {METHODS[name].title + ending: torch.stack(model["frames"], 1) for name, model in models.items()}
        panels = pictures.choose_panels(curves, args.seed)
        data = density(problem.points[None])[0]
        pictures.plot_density(panels, AXIS, data, folder / "density.png", folder / "training.gif")
        return

    offsets = torch.linspace(-0.09, 0.09, 5)
    positions = (problem.centers[:, None] + torch.cartesian_prod(offsets, offsets)).flatten(0, 1)
    samples, gradients = {}, {}
    for name, model in models.items():
        title, variant = METHODS[name].title, shown_variant(args)
        epoch = model["iteration"] // epoch_length(args)
        points = sample_points(resolve(args, name), model["networks"], epoch, NUM_SAMPLES, variant)
        samples[title + pictures.VARIANTS[variant]] = points
        if METHODS[name].judges_points:
            gradients[title] = gradients_of_d(name, model["networks"], positions)
    panels = []
    for title, points in pictures.choose_panels(samples, args.seed):
        scores = register(points[None], problem.centers, problem.radius)
        modes = int(scores["modes"])
        counts = f"{modes} mode{'s' * (modes != 1)}, {int(scores['points'])} points"
        panels.append((f"{title}\n{counts}", points))
    pictures.plot_points(panels, problem.centers, problem.radius, folder / "samples.png")
    if gradients:
        panels = pictures.choose_panels(gradients, args.seed)
        pictures.plot_arrows(panels, positions, problem.centers, folder / "gradient_map.png")


def report(args: Args, folder: pathlib.Path, models: dict[str, dict]) -> str:
    """Write results.json and the pictures, print the table; returns the figures in words.

    models: of each method what `train` returned, or {"diverged": when}.
    """
    from common import pictures
    diverged = {name: model for name, model in models.items() if "diverged" in model}
    records: dict[str, list[dict]] = {}
    for line in common.read_lines(folder / "metrics.jsonl"):
        if line["method"] in models and line["method"] not in diverged:
            records.setdefault(line["method"], []).append(line)
    ends = [f"{METHODS[name].title} diverged at {model['diverged']}" for name, model in diverged.items()]
    if not records:
        return "; ".join(ends) or "no evaluation yet"

    results = {}
    for name, lines in records.items():
        results[name] = pictures.summarize(lines, models[name]["iteration"], models[name]["seconds"])
    text = json.dumps(results | diverged, indent=2) + "\n"
    common.write_atomically(folder / "results.json", lambda path: path.write_text(text))
    charts = {"modes": ("covered modes", len(make_problem(args.dim).centers)),
              "points": ("registered points", NUM_SAMPLES)}
    curves = {METHODS[name].title: lines for name, lines in records.items()}
    pictures.plot_curves(curves, charts, "GN-GAN", folder / "modes.png")  # figure 3
    draw_pictures(args, folder, {name: models[name] for name in records})
    rows = [(METHODS[name].title, result, METHODS[name].paper) for name, result in results.items()]
    print("\n".join([pictures.table(rows, with_paper=args.dim == 2), *ends]))
    figures = []
    for title, result, _ in rows:
        shown = shown_variant(args)
        figures.append(f"{title}{pictures.VARIANTS[shown]}: {result['modes' + shown]['mean']:.2f} modes, "
                       f"{result['points' + shown]['mean']:.1f} points")
    return "; ".join(figures + ends)


def main() -> int:
    args, file, checkpoint = parse_args()
    if common.started() > 1:
        raise UserError("this script starts its processes itself: leave torchrun out")
    device = training.choose_device(args.device, tf32=False, deterministic=False)
    problem, methods = make_problem(args.dim), methods_of(args.dim, args.method)
    total = args.epochs * epoch_length(args)
    saved = dataclasses.asdict(args)
    cores = torch.get_num_threads() if sys.platform == "linux" else 1  # elsewhere forks may crash
    args.processes = 1 if device.type == "cuda" else args.processes or cores
    if args.compile and total >= COMPILE_FROM:
        args.compile = training.compiles(device)
    name = args.run_name or common.run_name(f"{args.dim}d-{SCRIPT}", args.seed)
    place = file.parent if file else common.expand(os.path.join(args.run_dir, name))

    with common.run_folder(place, resume=file is not None, free_name=not (file or args.run_name)) as folder:
        models: dict[str, dict] = {}  # of the methods that ended, and last of the one that a signal stopped
        if file:
            checkpoint = common.read_checkpoint(file, SCRIPT)[1]  # it may have gone on until now
            models = checkpoint["finished"]
            records = [record for record in common.read_lines(folder / "metrics.jsonl")
                       if record["method"] in models or record["iteration"] < checkpoint["iteration"]]
            common.write_lines(folder / "metrics.jsonl", records)
        finished = file and len(models) == len(methods) - 1 and checkpoint["iteration"] == total
        if not finished:  # a finished run stays as it is, whatever the flags
            common.write_setting(folder, SCRIPT, saved)
        signals: list[int] = []  # the signal, if one came: the iteration is finished and all saved
        common.on_signals(signals.append)
        titles = ", ".join(METHODS[method].title for method in methods)
        print(f"{folder}: {len(problem.points):,} points of {len(problem.centers)} Gaussians in {args.dim}D, "
              f"{args.num_seeds} seeds of {titles}, {math.ceil(args.num_seeds / args.processes)} a process, "
              f"on {training.describe(device)}; to watch: tensorboard --logdir {common.quote(folder)}")

        for method in methods:
            if method in models or signals:
                continue
            header = {"script": SCRIPT, "args": saved, "finished": dict(models)}
            begun = checkpoint if checkpoint and checkpoint["method"] == method else None
            try:
                models[method] = train(resolve(args, method), device, folder, begun, header, signals)
            except training.Diverged as error:
                if len(methods) == 1:
                    raise
                models[method] = {"diverged": error.when}  # the others go on
                print(f"{METHODS[method].title} diverged at {error.when}", file=sys.stderr)
        summary = report(args, folder, models)

    ended = [model for model in models.values() if "diverged" in model or model["iteration"] == total]
    picture = folder / ("samples.png" if args.dim == 2 else "training.gif")
    drawn = picture.exists() and any("networks" in model for model in models.values())
    seen = f"; to see: {common.quote(picture)}" if drawn else ""
    if len(ended) == len(methods):
        print(f"{folder}: {summary}{seen}")
        return 0 if any("networks" in model for model in ended) else 2
    print(f"{folder}: stopped ({summary}){seen}; go on with {common.command('--resume', folder)}")
    return 128 + signals[0]


if __name__ == "__main__":
    common.run(main)
