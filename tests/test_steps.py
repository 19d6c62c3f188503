"""The training steps of the image scripts: every setting's iteration against plain autograd, compiled against eager,
degenerate batches, precision, averages, the order of the data."""
import contextlib
import dataclasses
import functools

import pytest
import reference_gngan
import reference_mmgan
import scripts
import torch
from steps import CPU, TINY, assert_same_course, build, noise, plain_descent, setup, vector, weights

from common import training

GNGAN = [*({"neighbor_embedding": ne, "gradient_matching": gm, "autoencoder": ae}
           for ne in (True, False) for gm in (True, False) for ae in (True, False)),
         {"lambda_m1": 2.0, "lambda_m2": 3.0, "alpha": 0.3}, {"distgan": True},
         {"hinge": True, "lambda_p": 0.5}, {"hinge": False}, {"autoencoder_updates": "encoder"},
         {"penalty": "score", "hinge": False},
         {"hinge": True, "penalty": "rms"}, {"hinge": True, "autoencoder": False, "gradient_matching": False},
         {"hinge": False, "autoencoder": False, "lambda_p": 1.0}]
MMGAN = [*({"kernel": k} for k in ("none", "linear", "poly", "rbf", "exp")), {"kernel": "rbf", "kernel_width": 3.0},
         {"kernel": "exp", "beta": 0.0, "delta": 0.5}, {"kernel": "rbf", "correlation_in_discriminator": True},
         {"kernel": "poly", "alpha": 0.0},
         {"kernel": "exp", "manifold_scale": "one", "manifold_in_discriminator": True},
         {"kernel": "exp", "manifold_scale": "width", "manifold_in_discriminator": False}]
SETTINGS = {"gngan_cnn": GNGAN, "gngan_resnet": GNGAN,
            "mmgan_dcgan": MMGAN + [{"baseline": True}, {"baseline": True, "generator_steps": 2}],
            "mmgan_igan": MMGAN + [{"minibatch_discrimination": True},
                                   {"baseline": "feature-matching"},
                                   {"baseline": "minibatch", "historical_averaging": 100.0},
                                   {"baseline": "minibatch", "label_smoothing": 0.0, "historical_averaging": 0.0}]}


@scripts.each_case(SETTINGS)
def test_an_iteration_is_algorithm_1(script, case, monkeypatch):
    """Two iterations, so that averages count, against the plain reference: gradients of every update, shared forward
    passes and all."""
    monkeypatch.setattr(script, "init_optimizers", plain_descent(script))
    args, networks, step = setup(script, **case)
    start = weights(networks)
    for _ in range(2):
        losses = step()
    assert all(v.isfinite() for v in losses.values())
    ours = weights(networks)
    networks.load_state_dict(start)
    networks.requires_grad_(True)
    optimizers, rng, history = script.init_optimizers(args, networks), torch.Generator().manual_seed(args.seed), {}
    for _ in range(2):
        if scripts.is_gngan(script):
            reference_gngan.reference_step(script, args, networks, optimizers, rng, noise(args))
        else:
            reference_mmgan.reference_step(script, args, networks, optimizers, rng, noise(args), history)
    theirs = weights(networks)
    for name in ("real_centroid", "real_radius", "fake_centroid", "fake_radius"):
        if name in history:
            torch.testing.assert_close(ours[f"averages.{name}"], history[name], rtol=1e-2, atol=1e-4)
    ours, theirs = ({k: v for k, v in w.items() if not k.startswith(("averages.", "history."))}
                    for w in (ours, theirs))
    assert_same_course(start, ours, theirs, optimizers["generator"].param_groups[0]["lr"])


KERNELS = [{"kernel": k} for k in ("none", "linear", "poly", "rbf", "exp")]


@scripts.each_case({"gngan_cnn": [{}, {"distgan": True}], "gngan_resnet": [{}, {"hinge": False}],
                    "mmgan_dcgan": [*KERNELS, {"baseline": True}],
                    "mmgan_igan": [*KERNELS, {"baseline": "minibatch"}, {"baseline": "feature-matching"}]})
def test_degenerate_batches(script, case):
    """A batch of one image, a black batch, a D whose units are dead: weights stay finite."""
    for kind in ("one image", "black", "dead"):
        args, networks, step = setup(script, **case)
        images = noise(args)
        images = {"one image": images[:1].expand_as(images), "black": images * 0, "dead": images}[kind].contiguous()
        if kind == "dead":
            with torch.no_grad():
                for name, p in networks["discriminator"].named_parameters():
                    p.mul_(name.endswith(("original1", "theta")))  # weight norm keeps its directions
        for _ in range(3):
            losses = step(images)
        for name, value in [*losses.items(), *networks.state_dict().items()]:
            assert value.isfinite().all(), (kind, name)


@scripts.each_case({"gngan_cnn": [{}], "mmgan_igan": [{"minibatch_discrimination": True}]} | (
    {"gngan_resnet": [{}], "mmgan_dcgan": [{}]} if scripts.forks else {}))
def test_compiled_is_eager(script, case, monkeypatch):
    """Each loss in one graph."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compare_compiled(script, case)


@scripts.each("gngan_cnn")
def test_compiled_by_the_cpp_compiler_is_eager(script):
    """The same through the C++ compiler, with the parts that it compiles fastest."""
    compare_compiled(script, {"autoencoder": False, "neighbor_embedding": False, "gradient_matching": False,
                              "lambda_p": 1.0})


def compare_compiled(script, setting):
    if not training.compiles(CPU):
        pytest.skip("no C++ compiler")
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        _, networks, step = setup(script, compile=compiled, **setting)
        for _ in range(2):
            losses = step()
        results.append((vector(networks.state_dict()).clone(), losses))
    for name, value in results[0][1].items():
        assert results[1][1][name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    difference = (results[1][0] - results[0][0]).abs()
    assert (difference < 1e-4).float().mean() > 0.98  # Adam turns around where a gradient is about zero


@scripts.each()
def test_batch_norm_statistics(script):
    """A pass moves the running statistics only when told to; both normalise by the batch's own."""
    torch.manual_seed(0)
    norm, x = script.BatchNorm(4), torch.randn(8, 4, 5, 5) * 3 + 1
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    gain = getattr(norm, "weight", torch.ones(4))

    def expected(mean, var):
        mean, var, g, b = (v.detach()[:, None, None] for v in (mean, var, gain, norm.bias))
        return (x - mean) / (var + norm.eps).sqrt() * g + b

    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm(x, False), expected(mean, var))
    assert not norm.running_mean.any() and norm.running_weight == 0
    norm.eval()  # before the first update there is nothing but the initial statistics
    torch.testing.assert_close(norm(x, False), expected(torch.zeros(4), torch.ones(4)))
    norm.train()
    torch.testing.assert_close(norm(x, True), expected(mean, var))
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    norm.eval()  # of the initial statistics nothing is left
    torch.testing.assert_close(norm(x, False), expected(mean, x.var((0, 2, 3))), rtol=1e-5, atol=1e-5)


@scripts.each()
def test_moving_average(script):
    _, networks, step = setup(script, ema=0.75)
    start = expected = vector(networks["generator"].state_dict()).clone()
    for _ in range(3):
        step()
        expected = 0.75 * expected + 0.25 * vector(networks["generator"].state_dict())
    torch.testing.assert_close(vector(networks["generator_ema"].state_dict()), expected)
    assert not torch.equal(expected, start)


@scripts.each()
def test_the_averaged_generator_forgets_the_initial_statistics(script):
    """With weights and z that stand still, the averaged G gives the images of the raw one, however few updates its
    running statistics have had."""
    args = script.resolve(script.Args(width=1 / 32, latent_dim=8, batch_size=6, ema=0.9, lr=0.0))
    networks, _, rng, step = build(script, args, CPU)
    for _ in range(10):
        rng.manual_seed(1)
        step(noise(args))
    z = script.draw_latents(16, args, torch.Generator().manual_seed(0))
    raw, averaged = (networks[name].eval()(z) for name in ("generator", "generator_ema"))
    torch.testing.assert_close(averaged, raw, rtol=0, atol=1e-2)
    assert all(0 < v < 0.5 for k, v in networks["generator_ema"].state_dict().items() if k.endswith("running_weight"))


@scripts.each()
def test_bf16_sees_fresh_weights(script, monkeypatch):
    """bf16 copies of the weights never outlive an update: as with no such copies kept at all, but for rounding (which
    turns Adam's step around where a gradient is about zero), and unlike with copies kept throughout."""
    def two_steps(region=None, precision="bf16"):
        _, networks, step = setup(script, precision=precision, lr=0.01)
        with region or contextlib.nullcontext():
            losses = step()
            step()
        return torch.cat([p.detach().flatten() for p in networks.parameters()]), losses

    kept, losses = two_steps()
    exact = two_steps(precision="fp32")[1]
    stale, _ = two_steps(torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(torch, "autocast", functools.partial(torch.autocast, cache_enabled=False))
    fresh, _ = two_steps()
    shares = [((v - fresh).abs() < 1e-3).float().mean().item() for v in (kept, stale)]
    assert shares[0] > 0.8 and shares[1] < 0.5, shares  # weight-normed layers make no copies
    for name in losses:
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.25, abs=0.05)


@scripts.each()
def test_a_value_that_is_only_watched(script, monkeypatch):
    """Whatever an objective adds to its terms is returned by the step, with or without a gradient, and changes nothing:
    numbers, a tensor without gradient, one with, one of several numbers."""
    _, networks, step = setup(script)
    step()
    plain = weights(networks)
    objective = script.generator_objective

    def watching(args, networks, *given):
        loss, terms, *averages = objective(args, networks, *given)
        weight = next(networks["generator"].parameters())
        terms |= {"number": 1.5, "whole": 2, "true": True, "constant": torch.ones((), dtype=torch.int64),
                  "norm": weight.norm(), "several": torch.arange(3)}
        return loss, terms, *averages

    monkeypatch.setattr(script, "generator_objective", watching)
    _, networks, step = setup(script)
    losses = step()
    assert [losses[name].item() for name in ("number", "whole", "true", "constant", "several")] == [1.5, 2, 1, 1, 1]
    assert losses["norm"] > 0
    assert all(v.dtype == torch.float32 and v.shape == () and not v.requires_grad for v in losses.values())
    assert all(torch.equal(value, plain[name]) for name, value in weights(networks).items())


@scripts.each()
def test_flags_of_networks_and_optimisers(script):
    """--seed draws the initial weights; every Adam has --lr, --beta1 and --beta2."""
    args = script.resolve(script.Args(**TINY, lr=0.01, beta1=0.3, beta2=0.7))
    networks = script.init_networks(args, CPU)
    for optimizer in script.init_optimizers(args, networks).values():
        group, = optimizer.param_groups
        assert (group["lr"], *group["betas"]) == (0.01, 0.3, 0.7)
    other = script.init_networks(dataclasses.replace(args, seed=2), CPU)
    assert all((networks[n].state_dict()[k] != v).any() for n in ("generator", "discriminator")
               for k, v in other[n].state_dict().items() if k.endswith(("linear.weight", "ups.0.weight")))


@scripts.each()
def test_samples_are_a_seeds_own(script):
    """The same images every time for a seed, others for another, and no draw of training's among them."""
    args, networks, _ = setup(script)
    generator = networks["generator"]
    with torch.no_grad():
        for _ in range(100):  # running statistics like those of a trained network
            generator(script.draw_latents(16, args, torch.Generator().manual_seed(0)), True)
    first, again, other = (script.make_sampler(generator, dataclasses.replace(args, seed=s), CPU) for s in (1, 1, 9))
    images = first(5)
    assert images.dtype == torch.uint8 and images.shape[0] == 5 and len(images.flatten(1).unique(dim=0)) == 5
    assert torch.equal(images, again(5)) and not torch.equal(images, other(5)) and not torch.equal(images, first(5))
    assert generator.training


@scripts.each()
def test_mini_batches_are_functions_of_seed_and_iteration(script, monkeypatch):
    """Each pass visits every image once, in an order of its own; a process's share is that part of the whole."""
    args = script.resolve(script.Args(batch_size=4))
    pictures = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)

    def batch(iteration, args=args):
        return script.get_batch(pictures, args, iteration, CPU).flatten().tolist()

    seen = [v for t in range(5) for v in batch(t)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert [batch(t) for t in (3, 0, 2)] == [seen[12:16], seen[:4], seen[8:12]]  # whatever came before
    other = dataclasses.replace(args, seed=7)
    assert [v for t in range(5) for v in batch(t, other)] != seen
    whole = batch(2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(training, "world", lambda rank=rank: (rank, 2))
        halves += batch(2)
    assert halves == whole
