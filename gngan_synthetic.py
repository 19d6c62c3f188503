"""GN-GAN on synthetic data, after "Improving GAN with Neighbors Embedding and Gradient Matching"
(Tran, Bui and Cheung, AAAI 2019): table 2 and figures 3 and 4 (25 Gaussians in 2D), figure 2 (3 Gaussians in 1D).

    python gngan_synthetic.py --epochs 50              # a first look: a tenth of the protocol
    python gngan_synthetic.py                          # GN-GAN's row of table 2: 500 epochs, 8 seeds
    python gngan_synthetic.py --method all             # all eight methods: the whole of table 2
    python gngan_synthetic.py --dim 1 --method all     # figure 2 and its video, with four baselines

The networks are tiny, so plain PyTorch spends its time launching operations, not computing. Two things make this script
fast. All seeds train at once: each loss is written for one seed, and torch.vmap runs it over all of them. One
iteration, with its gradients and Adam steps, is one function that torch.compile turns into one graph.

What to expect: docs/synthetic.md.
"""
from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported ends without a traceback

import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from dataclasses import dataclass
from typing import Annotated, Callable, Literal, Optional

os.environ["MPLBACKEND"] = "agg"  # a notebook's own backend may be missing here, and importing matplotlib would fail
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.collections import EllipseCollection
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
from common import UserError

SCRIPT = pathlib.Path(__file__).stem
NUM_SAMPLES = 2000  # generated samples an evaluation registers [paper]
COMPILE_FROM = 5000  # iterations of a method's whole run from which compiling (about half a minute, once) pays
Params = dict[str, Tensor]  # one network's weights: w0 [in, out], b0 [out], w1, ...; of S seeds: [S, in, out], ...


# ----------------------------------------------------------------------------------------------------- arguments
@dataclass
class RunArgs:
    seed: int = 1
    """The first seed, of initial weights and every draw. Each seed's run is what it would be alone."""
    num_seeds: int = 8
    """How many runs to train at once, with the seeds seed, seed + 1, ..."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    compile: bool = True
    """torch.compile the training step of a run of 5,000 iterations or more (half a minute, once; then cached)."""
    run_dir: str = "runs"
    """The folder for run folders."""
    run_name: Optional[str] = None
    """The run folder's name. Default: synthetic{dim}d__{script}__{seed}__{time}."""
    resume: Optional[str] = None
    """A run folder or its checkpoint.pt: go on there, with the arguments saved in it. auto: go on in --run-name's
    folder if it has a checkpoint, else start it."""


@dataclass
class DataArgs:
    dim: Literal[2, 1] = 2
    """2: 25 Gaussians on a grid (table 2, figures 3 and 4). 1: three Gaussians on a line (figure 2)."""


@dataclass
class ModelArgs:
    method: Literal["gngan", "distgan", "gan", "wgangp", "ali", "vaegan", "vae", "betavae", "all"] = "gngan"
    """What to train; all: each in turn. In 1D: gngan, distgan, gan, wgangp, vaegan."""
    hidden_dim: Optional[int] = None
    """Neurons a hidden layer. Default: 64 in 2D, 4 in 1D [paper]."""
    hidden_layers: int = 2
    """Hidden layers of E, G and D; in 1D D has one less [paper for 1D; 2D: our reading]."""
    ema: float = 0.0
    """Decay of a moving average of G's weights, evaluated beside the raw ones; 0: off [paper]."""


@dataclass
class LossArgs:
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
    """Whose gradient V_P holds at norm 1. score: the sigmoid score's. l2: the logit's. rms: the logit's by root mean
    square over coordinates, as in the authors' code."""
    autoencoder_updates: Literal["both", "separate", "encoder"] = "separate"
    """GN-GAN, Dist-GAN: the autoencoder's update trains E and G with one Adam for both updates of G (both), E and G
    with moments of G's own for it, as the authors' 2D code does and our table 2 was made (separate), or E alone."""
    critic_steps: Optional[int] = None
    """D updates an iteration, each on its own mini-batch. Default: gngan 1; distgan 5 in 2D, 3 in 1D [authors' code];
    wgangp 5 in 2D, 3 in 1D [authors' code]; gan 2 and ali 5 [tuned]; vaegan 1."""
    label_smoothing: Optional[float] = None
    """GAN, ALI: one-sided, the real label is 1 - this. Default: gan 0.1, ali 0 [tuned]."""
    vae_sigma: float = 0.02
    """VAE, beta-VAE: the likelihood's fixed standard deviation, in units of the data in [0, 1] [tuned]."""
    vae_beta: float = 2.0
    """beta-VAE: weight of the Kullback-Leibler term [tuned]."""
    vaegan_gamma: float = 1.0
    """VAE-GAN: weight of the feature reconstruction in G's loss (Larsen et al. 2016) [tuned]."""
    vaegan_kl: float = 1.0
    """VAE-GAN: weight of the Kullback-Leibler term in E's loss [tuned]."""


@dataclass
class OptimisationArgs:
    epochs: Optional[int] = None
    """Passes over the data. Default: 500 in 2D (195,500 iterations), 100 in 1D (10,000 iterations) [paper]."""
    batch_size: Optional[int] = None
    """Points a mini-batch. Default: 128 in 2D [paper], 64 in 1D [authors' code]."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 1e-3
    """Adam's learning rate [paper]."""
    lr_decay: Optional[float] = None
    """The learning rate is multiplied by this every 10,000 updates of any network [authors' code]. Default: 0.99 in 2D
    [paper], 1 in 1D [authors' code]."""
    beta1: Optional[float] = None
    """Adam's first decay. Default: 0.8 in 2D [paper], 0.5 in 1D [authors' code]."""
    beta2: Optional[float] = None
    """Adam's second decay. Default: 0.999 in 2D [paper], 0.9 in 1D [authors' code]."""


@dataclass
class LoggingArgs:
    checkpoint_every: int = 10
    """Epochs between checkpoints; 0: only at the start, at the end and on a signal."""


@dataclass
class Args(RunArgs, DataArgs, ModelArgs, LossArgs, OptimisationArgs, LoggingArgs):
    """Every flag, in the groups of --help."""


def resolve(args: Args, method: str) -> Args:
    """The arguments of one method, with every default filled in that depends on --dim or on the method; for the method
    `all` the latter stay None."""
    defaults = dict(make_problem(args.dim).defaults)
    if method != "all":
        two = args.dim == 2
        defaults |= {"critic_steps": {"wgangp": 5 if two else 3, "distgan": 5 if two else 3, "ali": 5, "gan": 2}.get(
            method, 1), "label_smoothing": 0.1 if method == "gan" else 0.0}
    return dataclasses.replace(args, method=method, **{k: v for k, v in defaults.items() if getattr(args, k) is None})


# ---------------------------------------------------------------------------------------------------------- data
@dataclass(frozen=True)
class Problem:
    """A data set, the same for every seed and run, and what belongs to it."""
    name: str
    points: Tensor  # the data, [N, dim]
    centers: Tensor  # the modes' centres, [M, dim]
    radius: float  # a sample this close to a centre counts as the mode's
    prior: Callable[..., Tensor]  # of z, unless the method has its own; called like torch.rand
    output: Callable[[Tensor], Tensor]  # the last operation of G
    discriminator_layers: int  # hidden layers of D beyond those of E and G
    defaults: dict[str, float]  # of flags left out


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """U(-1, 1) of the given shape."""
    return torch.rand(*shape, generator=generator) * 2 - 1


@functools.cache
def make_problem(dim: int) -> Problem:
    """2D: 25 modes of 2,000 points each, standard deviation 0.05, scaled into [0, 1] by the largest coordinate
    [authors' data file]. 1D: 6,400 points of three equally likely modes of standard deviation 0.5 at -4, 0, 4 [ours].

    The radius is 2 sqrt(2) standard deviations: in 2D sqrt(2) 0.1 in the original coordinates [authors' code], which
    98.1% of the real points satisfy.
    """
    generator = torch.Generator().manual_seed(0)
    if dim == 1:
        centers = torch.tensor([[-4.0], [0.0], [4.0]])
        points = centers[torch.arange(6400) % 3] + 0.5 * torch.randn(6400, 1, generator=generator)
        return Problem("3 Gaussians in 1D", points, centers, 2 * math.sqrt(2) * 0.5, torch.randn, lambda v: v, -1, {
            "hidden_dim": 4, "epochs": 100, "batch_size": 64, "lr_decay": 1.0, "beta1": 0.5, "beta2": 0.9})
    axis = torch.arange(-4.0, 5.0, 2.0)
    centers = torch.cartesian_prod(axis, axis)
    points = centers.repeat_interleave(2000, 0) + 0.05 * torch.randn(50000, 2, generator=generator)
    scale = points.abs().max()
    points, centers, radius = (points / scale + 1) / 2, (centers / scale + 1) / 2, 2 * math.sqrt(2) * 0.05 / scale / 2
    return Problem("25 Gaussians in 2D", points, centers, float(radius), uniform, torch.sigmoid, 0, {
        "hidden_dim": 64, "epochs": 500, "batch_size": 128, "lr_decay": 0.99, "beta1": 0.8, "beta2": 0.999})


def draw_seed(*key: int) -> int:
    """A seed for a generator (the CPU's takes 32 bits) from numbers such as (seed, epoch)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def epoch_length(args: Args) -> int:
    """Iterations an epoch."""
    return math.ceil(len(make_problem(args.dim).points) / args.batch_size)


def draw_epoch(args: Args, epoch: int) -> dict[str, Tensor]:
    """Every random number of one epoch (counted from 0) of args.method: a function of each seed and the epoch alone.

    An epoch is ceil(N / B) mini-batches of B points; the last is filled from another permutation. D updates beyond
    the first of an iteration get mini-batches of their own, drawn with replacement. With I iterations, K D updates an
    iteration and S seeds: x [I, K, S, B, dim], z [I, K, S, B, dim] from the prior, mix [I, K, S, B, 1] ~ U(0, 1)
    (mu of V_P) and noise [I, K, S, B, dim] ~ N(0, 1) (the stochastic encoders').
    """
    problem, method = make_problem(args.dim), METHODS[args.method]
    n, batch, steps, iterations = len(problem.points), args.batch_size, args.critic_steps, epoch_length(args)
    draws = {"x": [], "z": [], "mix": [], "noise": []}
    for seed in range(args.seed, args.seed + args.num_seeds):
        g = torch.Generator().manual_seed(draw_seed(seed, epoch))
        order = torch.cat([torch.randperm(n, generator=g) for _ in range(1 + math.ceil(batch / n))])
        index = torch.randint(n, (iterations, steps, batch), generator=g)
        index[:, 0] = order[: iterations * batch].view(iterations, batch)
        draws["x"].append(problem.points[index])
        draws["z"].append((method.prior or problem.prior)(iterations, steps, batch, args.dim, generator=g))
        draws["mix"].append(torch.rand(iterations, steps, batch, 1, generator=g))
        if method.stochastic_encoder:
            draws["noise"].append(torch.randn(iterations, steps, batch, args.dim, generator=g))
    return {k: torch.stack(v, 2) for k, v in draws.items() if v}


# ------------------------------------------------------------------------------------------------------ networks
def product(x: Tensor, w: Tensor) -> Tensor:
    """x [B, in] @ w [in, out]. Products with only a few inputs or outputs are written as sums over them, which the
    compiler fuses with their neighbours; a library call for each takes longer than the arithmetic."""
    if w.shape[0] <= 4:
        return sum(x[:, k : k + 1] * w[k] for k in range(w.shape[0]))
    if w.shape[1] <= 4:
        return torch.stack([(x * w[:, k]).sum(-1) for k in range(w.shape[1])], -1)
    return x @ w


@dataclass
class MLP:
    """A fully connected network of one seed, [B, in] -> output of [B, out], with ReLUs between its layers."""
    params: Params
    output: Callable[[Tensor], Tensor] = lambda v: v

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


def init_mlp(sizes: list[int], generator: torch.Generator) -> Params:
    """Weights N(0, 2 / fan_in) [authors' 2D code], biases U(-1, 1) / sqrt(fan_in) [ours]: zero biases would start the
    kinks of a first layer's ReLUs all at (0, 0), a corner of the 2D data."""
    params = {}
    for k, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        params[f"w{k}"] = torch.randn(fan_in, fan_out, generator=generator) * math.sqrt(2 / fan_in)
        params[f"b{k}"] = uniform(fan_out, generator=generator) * (1 / math.sqrt(fan_in))
    return params


def init_networks(args: Args, device: torch.device) -> dict[str, Params]:
    """The weights of args.method's networks, drawn on the CPU, of all seeds: {network: {w0: [S, in, out], ...}}."""
    d, hidden, updates = args.dim, [args.hidden_dim] * args.hidden_layers, METHODS[args.method].losses(args)
    sizes = {"generator": [d, *hidden, d]}
    if {"autoencoder", "encoder"} & updates.keys():
        sizes["encoder"] = [d, *hidden, 2 * d if METHODS[args.method].stochastic_encoder else d]
    if "discriminator" in updates:  # ALI's judges pairs (x, z)
        hidden = hidden[: len(hidden) + make_problem(d).discriminator_layers]
        sizes["discriminator"] = [2 * d if args.method == "ali" else d, *hidden, 1]
    seeds = []
    for seed in range(args.seed, args.seed + args.num_seeds):
        generator = torch.Generator().manual_seed(seed)
        seeds.append({name: init_mlp(widths, generator) for name, widths in sizes.items()})
    networks = {name: {k: torch.stack([s[name][k] for s in seeds]).to(device) for k in seeds[0][name]}
                for name in sizes}
    if args.ema:
        networks["generator_ema"] = {k: v.clone() for k, v in networks["generator"].items()}
    return networks


# -------------------------------------------------------------------------------------------------------- losses
def l2_norm(v: Tensor) -> Tensor:
    """L2 norm of each sample of v [B, dim], [B]; the small constant keeps its gradient finite at 0."""
    return (v.square().sum(-1) + 1e-12).sqrt()


def logit_and_gradient(discriminator: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B] of x [B, dim] and each one's gradient with respect to its x [B, dim].

    A ReLU network is linear around x: its gradient is the product W_1 M_1 W_2 M_2 ... w of the weights, masked by
    which units are on. Written out, it is differentiated once more like any other expression. That is exact, since
    the masks' derivative is 0 almost everywhere, and saves the second-order graph of a double backward.
    """
    hidden, params = discriminator.hidden(x), discriminator.params
    gradient = params[f"w{len(hidden)}"].mT
    for k in reversed(range(len(hidden))):
        gradient = product(torch.where(hidden[k] > 0, gradient, 0.0), params[f"w{k}"].mT)
    return discriminator.output(discriminator.last(hidden[-1])), gradient


def score_and_gradient(discriminator: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid score D(x) [B] and its gradient [B, dim] = D (1 - D) times the logit's."""
    logit, gradient = logit_and_gradient(discriminator, x)
    score = torch.sigmoid(logit)
    return score, (score * (1 - score))[:, None] * gradient


def real_loss(logit: Tensor, smoothing: float = 0.0) -> Tensor:
    """-E log D for logits [B]; with one-sided label smoothing s: -(1 - s) E log D - s E log(1 - D). Scalar."""
    return (F.softplus(-logit) + smoothing * logit).mean()


def fake_loss(logit: Tensor) -> Tensor:
    """-E log(1 - D) for logits [B], scalar."""
    return F.softplus(logit).mean()


def squared_error(real: Tensor, reconstruction: Tensor) -> Tensor:
    """E ||x - y||^2 of x, y [B, d]: the sum over coordinates, the mean over the batch. Scalar."""
    return (real - reconstruction).square().sum(-1).mean()


def discriminator_loss(real: Tensor, fake: Tensor, reconstruction: Tensor, alpha: float = 0.05) -> Tensor:
    """-V_D of Eq. 7 without its penalty, for logits [B] of real, generated and reconstructed points;
    reconstructions count as real. Scalar."""
    return (1 - alpha) * real_loss(real) + alpha * real_loss(reconstruction) + fake_loss(fake)


def gradient_penalty(discriminator: MLP, real: Tensor, fake: Tensor, mix: Tensor, penalty: str = "l2") -> Tensor:
    """V_P = E(||grad D(x^)|| - 1)^2 at x^ = mix real + (1 - mix) fake (below Eq. 8); scalar.

    real, fake [B, dim]; mix [B, 1] from U(0, 1). penalty: score, the norm of the sigmoid score's gradient; l2, of the
    logit's; rms, of the logit's over sqrt(dim).
    """
    point = mix * real + (1 - mix) * fake
    gradient = (score_and_gradient if penalty == "score" else logit_and_gradient)(discriminator, point)[1]
    slope = l2_norm(gradient) / math.sqrt(point.shape[-1]) if penalty == "rms" else l2_norm(gradient)
    return (slope - 1).square().mean()


def gradient_matching(discriminator: MLP, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of V_G (Eq. 13) before their weights, with the norms inside the expectations: |E D(x) - E D(G)|,
    (E ||grad D(x)|| - E ||grad D(G)||)^2 and (E |grad D(x)'x| - E |grad D(G)'G|)^2; scalars. D: the sigmoid score."""
    (score_real, grad_real), (score_fake, grad_fake) = (score_and_gradient(discriminator, x) for x in (real, fake))
    norm_term = (l2_norm(grad_real).mean() - l2_norm(grad_fake).mean()).square()
    inner_real, inner_fake = (grad_real * real).sum(-1).abs(), (grad_fake * fake).sum(-1).abs()
    return ((score_real.mean() - score_fake.mean()).abs(), norm_term,
            (inner_real.mean() - inner_fake.mean()).square())


def latent_data_distance(fake: Tensor, reconstruction: Tensor, z: Tensor, latent: Tensor) -> Tensor:
    """Dist-GAN: (E[G(E(x)) - G(z)] - E[E(x) - z])^2, the means over batch and coordinates. Scalar."""
    return ((reconstruction - fake).mean() - (latent - z).mean()).square()


def kl_divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """E KL(N(mean, exp(log_var)) || N(0, I)) of [B, d] (Kingma and Welling 2014, appendix B); scalar."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1).mean()


def encode_sample(encoder: MLP, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A sample of q(z|x) = N(mean, exp(log_var)) with its mean and log-variance, each [B, dim]."""
    mean, log_var = encoder(x).chunk(2, -1)
    return mean + noise * (0.5 * log_var).exp(), mean, log_var


# ------------------------------------------------------------------------------------------------------- methods
# A method is its losses, one an update, in the order of the updates. Each maps the networks of one seed and one
# mini-batch's draws (x, z [B, dim], mix [B, 1], noise [B, dim]) to a scalar; vmap runs it over the seeds. Its key
# names the network that it trains; "autoencoder" trains E and G.
Draws = dict[str, Tensor]
Loss = Callable[[MLP, MLP, MLP, Draws], Tensor]


def gngan(args: Args) -> dict[str, Loss]:
    """Algorithm 1: one mini-batch x and one z for all three updates; no neighbour embedding in 1D and 2D [paper]."""
    def autoencoder(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:  # Eq. 1, mean over coordinates [authors' code]
        return squared_error(draws["x"], G(E(draws["x"]))) / args.dim

    def discriminator(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:  # Eq. 7; Dist-GAN: reconstructions are half
        x, fake = draws["x"], G(draws["z"])
        logits = D(torch.cat([x, fake, G(E(x))])).chunk(3)
        penalty = gradient_penalty(D, x, fake, draws["mix"], args.penalty)
        alpha = args.alpha if args.method == "gngan" else 0.5
        return discriminator_loss(*logits, alpha) + args.lambda_p * penalty

    def generator(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:  # Eq. 13
        score_term, norm_term, inner_term = gradient_matching(D, draws["x"], G(draws["z"]))
        return score_term + args.lambda_m1 * norm_term + args.lambda_m2 * inner_term

    return {"autoencoder": autoencoder, "discriminator": discriminator, "generator": generator}


def distgan(args: Args) -> dict[str, Loss]:
    """Tran, Bui and Cheung 2018, as in the authors' toy code; reconstructions are labelled real, as in its paper."""
    def autoencoder(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:
        x, z, latent = draws["x"], draws["z"], E(draws["x"])
        logit = G.last(G.hidden(latent)[-1])
        if args.dim == 2:  # x lies in [0, 1]: cross-entropy
            error, reconstruction = F.binary_cross_entropy_with_logits(logit, x), torch.sigmoid(logit)
        else:  # x in place of its reconstruction in the distance
            error, reconstruction = squared_error(x, logit), x
        return error + args.lambda_r * latent_data_distance(G(z), reconstruction, z, latent)

    def generator(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:
        score_real, score_fake = torch.sigmoid(D(torch.cat([draws["x"], G(draws["z"])]))).chunk(2)
        return (score_real.mean() - score_fake.mean()).abs()

    return {**gngan(args), "autoencoder": autoencoder, "generator": generator}


def gan(args: Args) -> dict[str, Loss]:
    """Goodfellow et al. 2014, non-saturating."""
    def discriminator(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:
        real, fake = D(torch.cat([draws["x"], G(draws["z"])])).chunk(2)
        return real_loss(real, args.label_smoothing) + fake_loss(fake)

    return {"discriminator": discriminator, "generator": lambda E, G, D, draws: real_loss(D(G(draws["z"])))}


def wgangp(args: Args) -> dict[str, Loss]:
    """Gulrajani et al. 2017; the critic is the logit."""
    def discriminator(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:
        x, fake = draws["x"], G(draws["z"])
        critic_real, critic_fake = D(torch.cat([x, fake])).chunk(2)
        penalty = gradient_penalty(D, x, fake, draws["mix"], args.penalty)
        return critic_fake.mean() - critic_real.mean() + args.lambda_p * penalty

    return {"discriminator": discriminator, "generator": lambda E, G, D, draws: -D(G(draws["z"])).mean()}


def ali(args: Args) -> dict[str, Loss]:
    """Dumoulin et al. 2017: D tells pairs (x, E(x)) from (G(z), z)."""
    def judge(E: MLP, G: MLP, D: MLP, draws: Draws) -> tuple[Tensor, Tensor]:
        encoded = torch.cat([draws["x"], encode_sample(E, draws["x"], draws["noise"])[0]], -1)
        generated = torch.cat([G(draws["z"]), draws["z"]], -1)
        return D(torch.cat([encoded, generated])).chunk(2)

    def discriminator(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:
        encoded, generated = judge(E, G, D, draws)
        return real_loss(encoded, args.label_smoothing) + fake_loss(generated)

    def autoencoder(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:  # against D: labels swapped, so non-saturating
        encoded, generated = judge(E, G, D, draws)
        return fake_loss(encoded) + real_loss(generated)

    return {"discriminator": discriminator, "autoencoder": autoencoder}


def vaegan(args: Args) -> dict[str, Loss]:
    """Larsen et al. 2016: the reconstruction is judged at D's last hidden layer, a Gaussian of unit deviation."""
    def feature_error(D: MLP, real: Tensor, reconstruction: Tensor) -> Tensor:
        return 0.5 * squared_error(*D.hidden(torch.cat([real, reconstruction]))[-1].chunk(2))

    def encoder(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:
        latent, mean, log_var = encode_sample(E, draws["x"], draws["noise"])
        return args.vaegan_kl * kl_divergence(mean, log_var) + feature_error(D, draws["x"], G(latent))

    def generator(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:
        reconstruction = G(encode_sample(E, draws["x"], draws["noise"])[0])
        fake, rebuilt = D(torch.cat([G(draws["z"]), reconstruction])).chunk(2)
        error = feature_error(D, draws["x"], reconstruction)
        return args.vaegan_gamma * error + real_loss(rebuilt) + real_loss(fake)

    def discriminator(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:
        reconstruction = G(encode_sample(E, draws["x"], draws["noise"])[0])
        real, fake, rebuilt = D(torch.cat([draws["x"], G(draws["z"]), reconstruction])).chunk(3)
        return real_loss(real) + fake_loss(rebuilt) + fake_loss(fake)

    return {"encoder": encoder, "generator": generator, "discriminator": discriminator}


def vae(args: Args) -> dict[str, Loss]:
    """Kingma and Welling 2014, and beta-VAE, Higgins et al. 2017."""
    def autoencoder(E: MLP, G: MLP, D: MLP, draws: Draws) -> Tensor:
        latent, mean, log_var = encode_sample(E, draws["x"], draws["noise"])
        error = squared_error(draws["x"], G(latent)) / (2 * args.vae_sigma**2)
        return error + (args.vae_beta if args.method == "betavae" else 1.0) * kl_divergence(mean, log_var)

    return {"autoencoder": autoencoder}


@dataclass(frozen=True)
class Method:
    """A method, and its row of table 2: mean and standard deviation of modes, points, TV (true), TV (differential)."""
    title: str
    losses: Callable[[Args], dict[str, Loss]]
    paper: list[tuple[float, float]]
    stochastic_encoder: bool = False  # E gives mean and log-variance
    prior: Optional[Callable[..., Tensor]] = None  # of z in training and sampling, instead of the problem's
    in_1d: bool = True  # figure 2 draws D(x) along the axis: these have one


METHODS = {
    "gan": Method("GAN", gan, [(14.25, 2.49), (1013.38, 171.73), (1.00, 0.00), (0.90, 0.22)]),
    "ali": Method("ALI", ali, [(17.81, 1.80), (1281.43, 117.84), (0.99, 0.01), (0.72, 0.19)], True, in_1d=False),
    "vaegan": Method("VAE-GAN", vaegan, [(12.75, 3.20), (1042.38, 170.17), (1.35, 0.70), (1.34, 0.98)], True,
                     torch.randn),
    "vae": Method("VAE", vae, [(13.48, 2.31), (1265.45, 72.47), (1.81, 0.71), (2.16, 0.72)], True, torch.randn, False),
    "betavae": Method("β-VAE", vae, [(18.00, 2.33), (1321.17, 95.61), (1.17, 0.24), (1.47, 0.28)], True, torch.randn,
                      False),
    "wgangp": Method("WGAN-GP", wgangp, [(21.71, 1.35), (1180.25, 158.63), (0.90, 0.07), (0.51, 0.06)]),
    "distgan": Method("Dist-GAN", distgan, [(20.71, 4.42), (1188.62, 311.91), (0.82, 0.19), (0.43, 0.12)]),
    "gngan": Method("GN-GAN", gngan, [(24.39, 0.44), (1461.83, 222.86), (0.57, 0.17), (0.31, 0.12)]),
}


# ---------------------------------------------------------------------------------------------------- train step
def trained_by(args: Args, update: str) -> dict[str, str]:
    """The optimisers that an update of args.method steps, each with the network that it trains."""
    if update != "autoencoder":
        return {update: update}
    if "generator" not in METHODS[args.method].losses(args):  # G has no other update
        return {"encoder": "encoder", "generator": "generator"}
    return {"both": {"encoder": "encoder", "generator": "generator"}, "encoder": {"encoder": "encoder"},
            "separate": {"encoder": "encoder", "reconstruction": "generator"}}[args.autoencoder_updates]


def init_optimizers(args: Args, networks: dict[str, Params]) -> dict[str, dict]:
    """Adam's moments, one set an optimiser: the number of steps, m and v. Adam normalises gradients: with moments of
    its own (`reconstruction`) the autoencoder's update moves G as far as the generator's, however small its gradient.
    """
    trained = {k: v for update in METHODS[args.method].losses(args) for k, v in trained_by(args, update).items()}
    return {name: {"step": torch.zeros((), device=networks[network]["w0"].device),
                   **{moment: {k: torch.zeros_like(v) for k, v in networks[network].items()} for moment in "mv"}}
            for name, network in trained.items()}


def make_train_step(args: Args, networks: dict[str, Params], optimizers: dict[str, dict],
                    lr: Tensor) -> Callable[[Draws], dict[str, Tensor]]:
    """`train_step(draws)`: one iteration of args.method, in place; returns each update's loss, [S].

    draws: one iteration's, each [K, S, B, ...]. lr: the learning rate, a tensor that is filled in place.
    """
    losses, output = METHODS[args.method].losses(args), make_problem(args.dim).output

    def descend(update: str, draws: Draws) -> Tensor:
        """One Adam step of the networks that the update trains. (torch.optim's step breaks a compiled graph in two,
        hence Adam written out.)"""
        optimizer_of = {network: optimizers[name] for name, network in trained_by(args, update).items()}
        trained = {network: networks[network] for network in optimizer_of}
        frozen = {name: params for name, params in networks.items() if name not in trained}

        def loss_of_one_seed(trained: dict[str, Params], frozen: dict[str, Params], draws: Draws) -> Tensor:
            params = {**frozen, **trained}
            E, G, D = (params.get(name, {}) for name in ("encoder", "generator", "discriminator"))
            return losses[update](MLP(E), MLP(G, output), MLP(D, lambda v: v[:, 0]), draws)

        gradients, loss = torch.vmap(torch.func.grad_and_value(loss_of_one_seed))(trained, frozen, draws)
        for network, adam in optimizer_of.items():
            adam["step"] += 1
            step_size = lr / (1 - args.beta1 ** adam["step"])
            correction = (1 - args.beta2 ** adam["step"]).sqrt()
            for k, weight in trained[network].items():
                g, m, v = gradients[network][k], adam["m"][k], adam["v"][k]
                m.lerp_(g, 1 - args.beta1)
                v.lerp_(g * g, 1 - args.beta2)
                weight.sub_(step_size * m / (v.sqrt() / correction + 1e-8))
        return loss

    def train_step(draws: Draws) -> dict[str, Tensor]:
        values = {}
        for update in losses:  # D may take several steps, each on its own mini-batch; the others take the first
            for i in range(args.critic_steps if update == "discriminator" else 1):
                values[update] = descend(update, {k: v[i] for k, v in draws.items()})
        if args.ema:
            for k, v in networks["generator_ema"].items():
                v.lerp_(networks["generator"][k], 1 - args.ema)
        return values

    return train_step


def learning_rate(args: Args, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0; every update of a network counts as a step of the decay."""
    updates = sum(args.critic_steps if name == "discriminator" else 1 for name in METHODS[args.method].losses(args))
    return args.lr * args.lr_decay ** (iteration * updates // 10000)


# --------------------------------------------------------------------------------------------------- evaluation
METRICS = {"modes": "modes", "points": "points", "tv_true": "TV true *", "tv_diff": "TV diff *"}
VARIANTS = {"": "", "_ema": ", averaged G", "_uniform": ", z uniform"}  # of an evaluation: key's ending, title's
AXIS = torch.linspace(-6.95, 6.95, 140)  # the middles of figure 2's bins


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


def density(samples: Tensor) -> Tensor:
    """Histogram density of samples [S, n, 1] over figure 2's bins, [S, 140]."""
    return torch.stack([torch.histc(s.float(), 140, -7, 7) for s in samples[..., 0]]) / (samples.shape[1] * 0.1)


def sample(args: Args, networks: dict[str, Params], epoch: int, count: int, variant: str = "") -> Tensor:
    """G(z) of every seed, [S, count, dim] on the CPU: a function of the weights, each seed and the epoch."""
    problem = make_problem(args.dim)
    prior = problem.prior if variant == "_uniform" else METHODS[args.method].prior or problem.prior
    params = networks["generator_ema" if variant == "_ema" else "generator"]
    z = torch.stack([prior(count, args.dim, generator=torch.Generator().manual_seed(draw_seed(seed, epoch, 1)))
                     for seed in range(args.seed, args.seed + args.num_seeds)])
    return torch.vmap(lambda p, z: MLP(p, problem.output)(z))(params, z.to(params["w0"].device)).cpu()


def evaluate(args: Args, networks: dict[str, Params], epoch: int) -> tuple[dict[str, list], Optional[Tensor]]:
    """One evaluation: table 2's columns, a number a seed, and in 1D figure 2's two curves [S, 2, 140].

    With --ema the averaged G is evaluated too, and of the 2D VAEs, whose prior is normal, also G on the uniform prior
    that the paper names.
    """
    problem, scores = make_problem(args.dim), {}
    for variant in ["", *["_ema"] * bool(args.ema), *["_uniform"] * bool(args.dim == 2 and METHODS[args.method].prior)]:
        samples = sample(args, networks, epoch, NUM_SAMPLES, variant)
        values = register(samples, problem.centers, problem.radius)
        if args.dim == 1:
            values["w1"] = wasserstein_1d(samples, problem.points)
        scores |= {k + variant: v.tolist() for k, v in values.items()}
    if args.dim == 2:
        return scores, None
    discriminator = networks["discriminator"]
    score = torch.vmap(lambda p: MLP(p)(AXIS[:, None].to(p["w0"].device))[:, 0])(discriminator).cpu()
    if args.method == "wgangp":  # a critic has no scale
        score = score - score.amin(-1, keepdim=True)
        score = score / score.amax(-1, keepdim=True).clamp_min(1e-12)
    else:
        score = torch.sigmoid(score)
    return scores, torch.stack([density(sample(args, networks, epoch, 5 * NUM_SAMPLES)), score], 1)


# ---------------------------------------------------------------------------------------------------------- loop
def train(args: Args, device: torch.device, folder: pathlib.Path, checkpoint: Optional[dict], head: dict,
          signals: list[int]) -> dict:
    """Train args.method from the checkpoint, or the start, to its end or a signal in `signals`.

    head: what a checkpoint of the run holds beside this method's state. Returns what table and pictures need:
    {"iteration", "seconds", "networks", "frames": figure 2's curves, one an epoch}.
    """
    networks = init_networks(args, device)
    optimizers = init_optimizers(args, networks)
    start, seconds, begin, frames = 0, 0.0, time.perf_counter(), []
    if checkpoint is not None:
        restore(checkpoint, {"networks": networks, "optimizers": optimizers})
        start, seconds, frames = checkpoint["iteration"], checkpoint["seconds"], checkpoint["frames"]
    lr, losses, length = torch.tensor(args.lr, device=device), {}, epoch_length(args)
    total, title = args.epochs * length, METHODS[args.method].title
    train_step = make_train_step(args, networks, optimizers, lr)
    if args.compile and total >= COMPILE_FROM:  # by the whole length: a resumed run must compute the same
        torch.compiler.reset()  # the methods share one code object; its cache holds eight variants
        train_step = torch.compile(train_step, fullgraph=True, dynamic=False)
    sizes = ", ".join(f"{name} {sum(v[0].numel() for v in params.values()):,}" for name, params in networks.items())
    print(f"{title}: {total:,} iterations; parameters a seed: {sizes}")
    # of several methods each has a TensorBoard folder of its own, so that their curves share a chart
    writer = SummaryWriter(str(folder / (args.method if head["args"]["method"] == "all" else "")),
                           purge_step=math.ceil(start / length))
    if start == 0:
        writer.add_text("arguments", "\n".join(f"    {k} = {v}" for k, v in dataclasses.asdict(args).items()))
    with writer, tqdm(total=total, initial=start, desc=title, unit="it", mininterval=0.5, dynamic_ncols=True) as bar:
        for iteration in range(start, total + 1):
            epoch, position = divmod(iteration, length)
            last = iteration == total or bool(signals)
            state = {"iteration": iteration, "seconds": seconds + time.perf_counter() - begin, "networks": networks,
                     "frames": frames}
            if position == 0 or last:
                common.check_finite(flatten(networks), f"iteration {iteration} (epoch {epoch})", folder)
                if last or epoch == 0 or args.checkpoint_every and epoch % args.checkpoint_every == 0:
                    writer.flush()
                    contents = {**head, **state, "method": args.method, "optimizers": optimizers}
                    common.write_atomically(folder / "checkpoint.pt", functools.partial(torch.save, contents),
                                            f"make room and go on with --resume {common.quote(folder)}; ")
            if position == 0 and epoch > 0:  # a resumed run first repeats the evaluation that followed its checkpoint
                scores, frame = evaluate(args, networks, epoch)
                frames = state["frames"] = [*frames, frame] if frame is not None else []
                with open(folder / "metrics.jsonl", "ab", buffering=0) as file:  # a line whole or not at all
                    record = {"method": args.method, "epoch": epoch, "iteration": iteration, **scores}
                    file.write((json.dumps(record) + "\n").encode())
                for name, value in [*((f"metrics/{k}", np.mean(v)) for k, v in scores.items()),
                                    *((f"losses/{k}", v.mean().item()) for k, v in losses.items()),
                                    ("charts/iterations_per_second", bar.format_dict["rate"] or 0.0),
                                    ("charts/learning_rate", learning_rate(args, iteration))]:
                    writer.add_scalar(name, value, epoch)
                bar.set_postfix(modes=f"{np.mean(scores['modes']):.1f}", points=f"{np.mean(scores['points']):.0f}",
                                refresh=False)
            if last:
                return {**state, "networks": {n: {k: v.cpu() for k, v in p.items()} for n, p in networks.items()}}
            if iteration == start or position == 0:
                draws = {k: v.to(device).unbind(0) for k, v in draw_epoch(args, epoch).items()}
            lr.fill_(learning_rate(args, iteration))
            losses = train_step({k: v[position] for k, v in draws.items()})
            bar.update()


# ------------------------------------------------------------------------------------------ arguments and files
RANGES = {"seed": "[0, 2147483648)", "num_seeds": "[1, inf)", "hidden_dim": "[1, inf)", "hidden_layers": "[1, inf)",
          "ema": "[0, 1)", "lambda_p": "[0, inf)", "lambda_m1": "[0, inf)", "lambda_m2": "[0, inf)",
          "lambda_r": "[0, inf)", "alpha": "[0, 1)", "critic_steps": "[1, inf)", "label_smoothing": "[0, 1)",
          "vae_sigma": "(0, inf)", "vae_beta": "[0, inf)", "vaegan_gamma": "[0, inf)", "vaegan_kl": "[0, inf)",
          "epochs": "[1, inf)", "batch_size": "[1, inf)", "lr": "(0, inf)", "lr_decay": "(0, 1]", "beta1": "[0, 1)",
          "beta2": "[0, 1)", "checkpoint_every": "[0, inf)"}
# What may differ from a checkpoint's run: where things are and how often one looks, nothing that training computes.
FREE = {f.name for group in (RunArgs, LoggingArgs) for f in dataclasses.fields(group)} - {"seed", "num_seeds"}


def parse_args(argv: Optional[list[str]] = None) -> tuple[Args, Optional[pathlib.Path], Optional[dict]]:
    """The arguments, resolved and checked; with --resume also the checkpoint's path and contents."""
    args, file, checkpoint = common.parse(Args, argv, __doc__, SCRIPT, FREE)
    args = resolve(dataclasses.replace(args, resume=None), args.method)
    common.check_ranges(args, RANGES)
    if args.method not in (*methods_of(args.dim), "all"):
        raise UserError(f"--method {args.method} is not part of the 1D experiment: choose from "
                        f"{', '.join(methods_of(1))}, all")
    if args.dim == 1 and args.hidden_layers < 2:
        raise UserError("--hidden-layers is 1: in 1D it must be 2 or more, since D has one less")
    return args, file, checkpoint


def methods_of(dim: int) -> list[str]:
    """The methods that are compared in 2D or 1D."""
    return [name for name, method in METHODS.items() if dim == 2 or method.in_1d]


def flatten(tree: dict, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dictionaries, by path: {"generator.w0": ...}."""
    return {path: v for k, value in tree.items() for path, v in (
        flatten(value, f"{prefix}{k}.") if isinstance(value, dict) else {prefix + k: value}).items()}


def restore(checkpoint: dict, state: dict) -> None:
    """Copy a checkpoint's tensors into those of `state`, in place."""
    tensors, saved = flatten(state), flatten({name: checkpoint[name] for name in state})
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in saved.items()}:
        raise UserError(f"the checkpoint does not fit this {SCRIPT}.py (has it changed since?)")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


# ------------------------------------------------------------------------------------------- table and pictures
Models = dict[str, dict]  # what `train` returned of each method


def summarize(records: list[dict], model: dict) -> dict:
    """A method's entry in results.json: a run's figure is the mean of its last ten evaluations [ours]; mean and
    standard deviation (n - 1) are over the runs."""
    result = {}
    for key in (k for k, v in records[-1].items() if isinstance(v, list)):
        per_seed = np.mean([r[key] for r in records[-10:]], axis=0)
        std = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else 0.0
        result[key] = {"mean": float(per_seed.mean()), "std": std, "per_seed": per_seed.tolist()}
    return {**result, "epochs": records[-1]["epoch"], "iterations": model["iteration"],
            "seconds": round(model["seconds"], 2),
            "iterations_per_second": round(model["iteration"] / model["seconds"], 2)}


def table(results: dict[str, dict], dim: int) -> str:
    """Table 2, ours beside the paper's; in 1D, where the paper has none, ours alone."""
    columns = METRICS if dim == 2 else {**METRICS, "w1": "W1"}
    rows = [["method", *(head for name in columns.values() for head in (name, "paper")[: dim])]]
    for method, variant in ((m, v) for m in results for v in VARIANTS if "modes" + v in results[m]):
        row = [METHODS[method].title + VARIANTS[variant]]
        for key, paper in zip(columns, METHODS[method].paper + [(0.0, 0.0)]):
            mean, std = (results[method][key + variant][k] for k in ("mean", "std"))
            places = 1 if key == "points" else 2
            row += [f"{mean:.{places}f} ± {std:.{places}f}", f"{paper[0]:.2f} ± {paper[1]:.2f}"][: dim]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
    note = "a run's figure is the mean of its last ten evaluations; " + {
        2: "* our definitions; the paper's two columns are not defined there and not comparable",
        1: "* as in 2D; W1: the Wasserstein-1 distance between generated and real points"}[dim]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], note])


def make_panels(args: Args, models: Models, size: float) -> tuple[plt.Figure, list[tuple[plt.Axes, str, int, str]]]:
    """A figure of square panels, `size` inches each, and (axes, method, index of the seed, title) a panel: the first
    eight seeds of one method, or the first of several. One row up to five, rows of four beyond."""
    chosen = [(m, s) for m in models for s in range(min(8, args.num_seeds) if len(models) == 1 else 1)]
    columns = len(chosen) if len(chosen) <= 5 else 4
    rows = math.ceil(len(chosen) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, size * rows), squeeze=False, sharex=True,
                                sharey=True, layout="constrained", dpi=150)
    for ax in axes.flat[len(chosen):]:
        ax.set_axis_off()
    return figure, [(ax, m, s, f"{METHODS[m].title}, seed {args.seed + s}") for ax, (m, s) in zip(axes.flat, chosen)]


def save_figure(figure: plt.Figure, path: pathlib.Path, columns: int = 1) -> None:
    """Write a picture, with a legend of the first axes' marks below it."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8,
                  frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def plot_samples(args: Args, models: Models, path: pathlib.Path) -> None:
    """Generated points and, around each mode's centre, the radius that registers them."""
    problem = make_problem(2)
    figure, panels = make_panels(args, models, 2.4)
    for ax, method, s, title in panels:
        epoch = models[method]["iteration"] // epoch_length(args)
        samples = sample(resolve(args, method), models[method]["networks"], epoch, NUM_SAMPLES)[s]
        scores = register(samples[None], problem.centers, problem.radius)
        ax.scatter(*samples.T, s=1.2, c="tab:blue", linewidths=0, label=f"{NUM_SAMPLES:,} generated points")
        ax.add_collection(EllipseCollection(
            2 * problem.radius, 2 * problem.radius, 0, units="xy", offsets=problem.centers, facecolors="none",
            edgecolors="tab:red", linewidths=0.6, offset_transform=ax.transData))
        ax.plot([], [], "o", mec="tab:red", mfc="none", label="radius around a true mode within which points count")
        ax.set_title(f"{title}: {int(scores['modes'])} modes, {int(scores['points'])} points", fontsize=7)
        ax.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xticks=[], yticks=[], aspect="equal")
    save_figure(figure, path)


def plot_gradient_map(args: Args, models: Models, path: pathlib.Path) -> None:
    """Figure 4: D's gradient around the true centres. ALI's D judges pairs and the VAEs have none; among several
    methods the figure keeps to the paper's four."""
    without = ("ali", "vae", "betavae", *(("vaegan",) if len(models) > 1 else ()))
    models = {m: model for m, model in models.items() if m not in without}
    if not models:
        return
    centers = make_problem(2).centers
    points = (centers[:, None] + torch.cartesian_prod(*[torch.linspace(-0.09, 0.09, 5)] * 2)).reshape(-1, 2)
    figure, panels = make_panels(args, models, 3.2)
    for ax, method, s, title in panels:
        D = MLP({k: v[s] for k, v in models[method]["networks"]["discriminator"].items()}, lambda v: v[:, 0])
        gradient = (logit_and_gradient if method == "wgangp" else score_and_gradient)(D, points)[1]
        length = l2_norm(gradient)
        # arrows are as long as the gradient, up to the 90th percentile, so that a few steep places do not hide the rest
        arrows = gradient / length.clamp_min(torch.quantile(length, 0.9))[:, None].clamp_min(1e-20)
        ax.quiver(*points.T, *arrows.T, angles="xy", scale_units="xy", scale=26, width=0.0028)
        ax.plot([], [], "k", marker=r"$\rightarrow$", linestyle="", markersize=12,
                label="gradient of D (WGAN-GP: of the critic), the longest tenth cut to one length")
        ax.scatter(*centers.T, s=14, c="tab:red", zorder=3, label="centre of a true mode")
        ax.set_title(title, fontsize=9)
        ax.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.12), xticks=[], yticks=[], aspect="equal")
    save_figure(figure, path)


def plot_modes(args: Args, models: Models, records: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Figure 3: modes and points over training, mean and one standard deviation of the seeds, a band a method; of one
    method its other evaluations too."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    curves = [(m, v) for m in models for v in VARIANTS if "modes" + v in records[m][0] and (not v or len(models) == 1)]
    for ax, key, limit in zip(axes, ("modes", "points"), (len(make_problem(args.dim).centers), NUM_SAMPLES)):
        for i, (method, variant) in enumerate(curves):
            epochs, values = [r["epoch"] for r in records[method]], [r[key + variant] for r in records[method]]
            mean, std = np.mean(values, 1), np.std(values, 1)
            color = "black" if method == "gngan" and len(models) > 1 else f"C{i}"
            ax.plot(epochs, mean, label=METHODS[method].title + VARIANTS[variant], color=color, linewidth=1.1,
                    marker="." if len(epochs) <= 10 else None)
            ax.fill_between(epochs, mean - std, mean + std, color=color, linewidth=0,
                            alpha=0.15 if len(models) == 1 else 0.06)
        ax.axhline(limit, color="grey", linewidth=0.8, linestyle=":", label="all")
        ax.fill_between([], [], color="grey", alpha=0.3, label="± one standard deviation of the seeds")
        ax.set(xlabel="epoch", ylabel=f"{'covered' if key == 'modes' else 'registered'} {key}", ylim=(0, limit * 1.04))
        ax.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, columns=5)


def plot_density(args: Args, models: Models, path: pathlib.Path, video: pathlib.Path) -> None:
    """Figure 2: density of real and generated points and D's score along the axis, last frame and video."""
    figure, panels = make_panels(args, models, 2.4)
    total, curves = max(len(model["frames"]) for model in models.values()), []
    for ax, method, s, title in panels:
        ax.fill_between(AXIS, density(make_problem(1).points[None])[0], color="tab:green", alpha=0.35, linewidth=0,
                        label="density of the data")
        last = models[method]["frames"][-1][s]
        generated, = ax.plot(AXIS, last[0], color="tab:orange", linewidth=1.2, label="density of G(z)")
        score, = ax.plot(AXIS, last[1], color="tab:blue", linewidth=1.2,
                         label="D's score (WGAN-GP: the critic, scaled to [0, 1])")
        ax.set_title(title, fontsize=9)
        ax.set(xlim=(-7, 7), ylim=(0, 1.02), xlabel="x")
        curves.append((generated, score, models[method]["frames"], s))
    save_figure(figure, path, columns=3)
    figure.set_layout_engine("none")  # what takes most of the time of drawing
    images = []
    for frame in range((total - 1) % max(1, total // 50), total, max(1, total // 50)):
        for generated, score, frames, s in curves:
            for line, values in zip((generated, score), frames[min(frame, len(frames) - 1)][s]):
                line.set_ydata(values)
        figure.suptitle(f"epoch {frame + 1}", fontsize=9, x=0.01, ha="left")
        figure.canvas.draw()
        images.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("P"))
    images[0].save(video, save_all=True, append_images=images[1:], duration=[125] * (len(images) - 1) + [1500], loop=0)


def report(args: Args, folder: pathlib.Path, models: Models) -> str:
    """Write results.json and the pictures, print the table; returns the figures in words."""
    lines = common.read_lines(folder / "metrics.jsonl")
    records = {m: [r for r in lines if r["method"] == m] for m in models}
    models = {m: model for m, model in models.items() if records[m]}
    if not models:
        return "no evaluation yet"
    results = {m: summarize(records[m], model) for m, model in models.items()}
    text = json.dumps(results, indent=2) + "\n"
    common.write_atomically(folder / "results.json", lambda path: path.write_text(text))
    plot_modes(args, models, records, folder / "modes.png")
    if args.dim == 1:
        plot_density(args, models, folder / "density.png", folder / "training.gif")
    else:
        plot_samples(args, models, folder / "samples.png")
        plot_gradient_map(args, models, folder / "gradient_map.png")
    plt.close("all")
    print(table(results, args.dim))
    return ", ".join(f"{METHODS[m].title} {r['modes']['mean']:.2f} modes {r['points']['mean']:.1f} points"
                     for m, r in results.items())


def main() -> int:
    args, file, checkpoint = parse_args()
    device = common.choose_device(args.device, tf32=False, deterministic=False)
    total, problem = args.epochs * epoch_length(args), make_problem(args.dim)
    methods = methods_of(args.dim) if args.method == "all" else [args.method]
    if args.compile and total >= COMPILE_FROM and not common.compiles(device):
        args = dataclasses.replace(args, compile=False)
    name = args.run_name or f"synthetic{args.dim}d__{SCRIPT}__{args.seed}__{int(time.time())}"
    place = file.parent if file else pathlib.Path(args.run_dir, name).expanduser()
    with common.run_folder(place, resume=file is not None, free_name=args.run_name is None) as folder:
        models, current, records = {}, None, folder / "metrics.jsonl"
        if file:
            checkpoint = common.read_checkpoint(file, SCRIPT)[1]  # it may have gone on until now
            models, current, begin = checkpoint["finished"], checkpoint["method"], checkpoint["iteration"]
            common.write_lines(records, [r for r in common.read_lines(records) if r["method"] in models
                                         or r["method"] == current and r["iteration"] < begin])
        common.write_setting(folder, SCRIPT, args)
        signals: list[int] = []  # the signal, if one came: the iteration is finished and everything saved
        common.on_signals(signals.append)
        print(f"{folder}: {problem.name}, {len(problem.points):,} points, {args.num_seeds} seeds of "
              f"{', '.join(METHODS[m].title for m in methods)}, on {common.describe(device)}; to watch: tensorboard "
              f"--logdir {common.quote(folder)}")
        head = {"script": SCRIPT, "args": dataclasses.asdict(args)}
        for method in methods:
            if method not in models and not signals:
                models[method] = train(resolve(args, method), device, folder, checkpoint if method == current else None,
                                       {**head, "finished": dict(models)}, signals)
        summary = report(args, folder, models)
    if len(models) == len(methods) and models[methods[-1]]["iteration"] == total:
        print(f"{folder}: {summary}")
        return 0
    print(f"{folder}: stopped ({summary}); go on with --resume {common.quote(folder)}")
    return 128 + signals[0]


if __name__ == "__main__":
    common.run(main)
