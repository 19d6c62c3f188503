"""MMGAN's image scripts: equations against numpy, averages against a sequence by hand, networks, defaults."""
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_mmgan import features, scaled
from scripts import each, model
from steps import CPU, conv, count, noise, setup, shapes
from torch import nn

every = each("mmgan_dcgan", "mmgan_igan")
KERNELS = ["linear", "poly", "rbf", "exp"]


def points(n=5, d=7, seed=0, scale=1.0):
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale).requires_grad_()


# ----------------------------------------------------------------------------------------------------- equations
def slow_kernel(a, b, name, w):
    """One pair of numpy vectors."""
    length = np.sqrt(((a - b) ** 2).sum())
    return {"linear": a @ b, "poly": (a @ b / w + 1) ** 3, "rbf": np.exp(-length**2 / (2 * w)),
            "exp": np.exp(-length / (2 * w))}[name]


def slow_manifold(s, name, w):
    """Eq. 3, 4 and 7."""
    c = sum(s) / len(s)
    if name == "none":
        return c, np.mean([np.sqrt(((c - v) ** 2).sum()) for v in s])
    k = slow_kernel
    return c, np.mean([k(c, c, name, w) - 2 * k(c, v, name, w) + k(v, v, name, w) for v in s])


def slow_distance(y, x, alpha, name, w):
    """Eq. 5 and 8."""
    (c_y, l_y), (c_x, l_x) = (slow_manifold(s, name, w) for s in (y, x))
    if name == "none":
        return np.sqrt(((c_y - c_x) ** 2).sum()) + abs(l_y - l_x)
    k = slow_kernel
    return k(c_y, c_y, name, w) - 2 * k(c_y, c_x, name, w) + k(c_x, c_x, name, w) + alpha * abs(l_y - l_x)


@pytest.mark.parametrize("name", KERNELS)
@every
def test_kernel(script, name):
    a, b = points(4, seed=1).detach(), points(4, seed=2).detach()
    values = script.kernel(a, b, name, 1.7)
    expected = [slow_kernel(u, v, name, 1.7) for u, v in zip(a.double().numpy(), b.double().numpy())]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)
    assert torch.equal(script.kernel(a.expand(2, 4, 7), b, name, 1.7), values.expand(2, 4))
    assert script.kernel(a[0], b[0], name, 1.7) == values[0]  # of two points


@every
def test_an_unknown_kernel_is_an_error(script):
    with pytest.raises(ValueError, match="none"):
        script.kernel(points(), points(), "none", 1.0)


@pytest.mark.parametrize("name", ["none", *KERNELS])
@every
def test_manifold_and_distance(script, name):
    y, x = points(5, seed=1).detach(), points(6, seed=2, scale=1.5).detach() + 0.3
    numbers = [v.double().numpy() for v in (y, x)]
    spheres = [script.manifold(v, name, 1.7) for v in (y, x)]
    for (centroid, radius), s in zip(spheres, numbers):
        c, r = slow_manifold(s, name, 1.7)
        np.testing.assert_allclose(centroid.numpy(), c, atol=1e-6)
        assert radius.shape == () and radius.item() == pytest.approx(r, rel=1e-4)
    centroids, radii = script.manifold_distance(*spheres, 0.8, name, 1.7)
    assert centroids.shape == radii.shape == ()
    expected = slow_distance(*numbers, 0.8, name, 1.7)
    assert (centroids + radii).item() == pytest.approx(expected, rel=1e-4)


@every
def test_polynomial_kernel_by_its_features(script):
    """Eq. 7 and 8 in the polynomial kernel's own space, whose coordinates can be written out."""
    w = 1.7
    y, x = points(5, 2, seed=1).detach(), points(6, 2, seed=2).detach()

    def phi(v):  # (a'b / w + 1)^3 = sum over i + j + k = 3 of 3! / i!j!k! (a1 b1 / w)^i (a2 b2 / w)^j
        v = v.double() / math.sqrt(w)
        return torch.stack([math.sqrt(6 / (math.factorial(i) * math.factorial(j) * math.factorial(3 - i - j)))
                            * v[:, 0] ** i * v[:, 1] ** j for i in range(4) for j in range(4 - i)], 1)

    spheres = [script.manifold(v, "poly", w) for v in (y, x)]
    centroids = [phi(v.mean(0, keepdim=True)) for v in (y, x)]
    radii = [(phi(v) - c).square().sum(1).mean() for v, c in zip((y, x), centroids)]
    for sphere, radius in zip(spheres, radii):
        assert sphere[1].item() == pytest.approx(radius.item(), rel=1e-4)
    expected = [(centroids[0] - centroids[1]).square().sum(), 0.8 * (radii[0] - radii[1]).abs()]
    for ours, theirs in zip(script.manifold_distance(*spheres, 0.8, "poly", w), expected):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["none", *KERNELS])
@every
def test_identical_sets_match(script, name):
    y = points(8, 500).detach()
    spheres = [script.manifold(v, name, 1000.0) for v in (y, y.flip(0).clone())]
    assert sum(script.manifold_distance(*spheres, 1.0, name, 1000.0)).item() == pytest.approx(0, abs=1e-4)


@every
def test_correlation_penalty(script):
    x = points(6, 40).detach()
    expected = np.linalg.norm(np.eye(6) - np.corrcoef(x.double().numpy()))
    assert script.correlation_penalty(x).item() == pytest.approx(expected, rel=1e-4)
    collapsed = x[:1].expand(64, -1)
    largest = script.correlation_penalty(collapsed).item()
    assert largest == pytest.approx(math.sqrt(64 * 63), rel=1e-5)
    half = torch.cat([collapsed[:32], points(32, 40, seed=3).detach()])
    assert script.correlation_penalty(half).item() < 0.6 * largest


@pytest.mark.parametrize("name", ["none", *KERNELS])
@pytest.mark.parametrize("kind", ["identical", "matching", "constant", "zero"])
@every
def test_gradients_are_finite(script, name, kind):
    """A collapsed batch, the very real features, features without variance, dead units."""
    y = points(6, 9, seed=1).detach()
    x = {"identical": y[:1].expand(6, -1), "matching": y, "constant": torch.ones(6, 9), "zero": torch.zeros(6, 9)}[kind]
    x = x.clone().requires_grad_()
    width = script.typical_width(x, name if name in ("poly", "exp") else "rbf") if kind == "zero" else 2.0
    width = max(float(width), 1e-3)
    spheres = [script.manifold(v, name, width) for v in (y, x)]
    loss = sum(script.manifold_distance(*spheres, 1.0, name, width)) + script.correlation_penalty(x)
    gradient, = torch.autograd.grad(loss, x)
    assert loss.isfinite() and gradient.isfinite().all()


@every
def test_cross_entropy(script):
    real, fake = points(6, 1).detach()[:, 0], points(6, 1, seed=1).detach()[:, 0]
    expected = F.binary_cross_entropy_with_logits(real, torch.ones(6)) \
        + F.binary_cross_entropy_with_logits(fake, torch.zeros(6))
    assert script.cross_entropy(real, fake).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name,low,high", [("rbf", 0.55, 0.67), ("exp", 0.55, 0.67)])
@every
def test_automatic_width_keeps_the_kernel_from_saturating(script, name, low, high):
    """Whatever the features' scale and number, the mean of K between them and their centroid is about e^-1/2, also by
    default where both sets are alike; between the centroids of sets however far from each other it is at least e^-4."""
    args = script.resolve(script.Args(kernel=name))
    for d, scale in ((4, 0.01), (2000, 30.0)):
        y = points(64, d, scale=scale).detach()
        width = script.typical_width(y, name)
        assert low < script.kernel(y, y.mean(0), name, width).mean() < high
        for distance in (0.0, 1e3 * scale):
            x = points(64, d, seed=1, scale=scale).detach() + distance
            width = script.MovingAverages(d).with_batch(args, y, x).kernel_width
            near = script.kernel(y, y.mean(0), name, width).mean()
            between = script.kernel(y.mean(0), x.mean(0), name, width)
            assert low < near < high if not distance else between > math.exp(-4.1), (near, between)
    assert script.typical_width(y, "poly").item() == pytest.approx(y.square().sum(1).mean().item())


# ------------------------------------------------------------------------------------------------------ networks
@pytest.mark.parametrize("dataset,sides", [("mnist", (2, 4, 7, 14, 28)), ("cifar10", (2, 4, 8, 16, 32)),
                                           ("celeba", (4, 8, 16, 32, 64))])
@each("mmgan_dcgan")
def test_dcgan_networks(script, dataset, sides):
    """The notes' layers; parameters counted from them (a layer right before batch norm has no bias)."""
    args = script.resolve(script.Args(dataset=dataset))
    c = 1 if dataset == "mnist" else 3
    generator, discriminator = script.Generator(args), script.Discriminator(args)
    widths = [512, 256, 128, 64, c]
    assert shapes(generator, torch.zeros(2, 100)) == [(512 * sides[0] ** 2,)] + [
        (w, s, s) for w, s in zip(widths[1:], sides[1:])]
    assert count(generator) == 100 * 512 * sides[0] ** 2 + sum(2 * w for w in widths[:-1]) + sum(
        conv(a, b, 5, bias=b == c) for a, b in zip(widths, widths[1:]))
    x = torch.zeros(2, c, sides[-1], sides[-1])
    widths = [c, 64, 128, 256, 512]
    assert shapes(discriminator, x) == [(w, s, s) for w, s in zip(widths[1:], sides[-2::-1])] + [(1,)]
    assert count(discriminator) == sum(conv(a, b, 5, bias=a == c) for a, b in zip(widths, widths[1:])) + sum(
        2 * w for w in widths[2:]) + 512 * sides[0] ** 2 + 1
    assert discriminator.features(x).shape == (2, 512, sides[0], sides[0])
    images = generator(torch.rand(4, 100))
    assert -1 <= images.min() and images.max() <= 1


@pytest.mark.parametrize("width", [1.0, 1 / 64])
@each("mmgan_dcgan")
def test_the_last_layer_alone_has_a_bias(script, width):
    """However few channels the layers before it have: those come before batch norm."""
    ups = script.Generator(script.resolve(script.Args(width=width))).ups
    assert [up.bias is not None for up in ups] == [False, False, False, True]


@each("mmgan_dcgan")
def test_dcgan_initial_weights(script):
    args = script.resolve(script.Args(width=0.25))
    torch.manual_seed(0)
    for module in [*script.Generator(args).modules(), *script.Discriminator(args).modules()]:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, (nn.BatchNorm2d, script.BatchNorm)):
            assert module.weight.eq(1).all() and module.eps == 1e-5 and module.momentum == 0.1


def undisturbed(monkeypatch, script):
    """Training without noise or dropout in D."""
    if model(script) == "mmgan_igan":
        monkeypatch.setattr(script, "draw_noise", lambda n, args, rng: [torch.ones(n, 1, 1, 1)] * 3)


def igan(script, **kwargs):
    args = script.resolve(script.Args(**{"width": 1 / 32, "batch_size": 6, "latent_dim": 8, **kwargs}))
    return args, script.init_networks(args, CPU)


@pytest.mark.parametrize("size", [32, 48])
@each("mmgan_igan")
def test_igan_networks(script, size):
    """The notes' layers; parameters counted from them: weight norm has a scale an output channel more."""
    args = script.resolve(script.Args(image_size=size))
    generator, discriminator = script.Generator(args), script.Discriminator(args)
    s = size // 8
    assert shapes(generator, torch.zeros(2, 100)) == [(512 * s * s,), (256, 2 * s, 2 * s), (128, 4 * s, 4 * s),
                                                      (3, 8 * s, 8 * s)]
    assert count(generator) == 100 * 512 * s * s + 512 * s * s + conv(512, 256, 5) + conv(256, 128, 5) + conv(
        128, 3, 5) + 3
    x = torch.zeros(2, 3, size, size)
    sides = [size, size, size // 2] + [size // 2, size // 2, size // 4] + [size // 4 - 2] * 3
    assert shapes(discriminator, x) == [(c, v, v) for c, v in zip([96] * 3 + [192] * 6, sides)] + [(10,)]
    layers = conv(3, 96, 3) + 2 * conv(96, 96, 3) + conv(96, 192, 3) + 3 * conv(192, 192, 3) + 2 * conv(192, 192, 1)
    assert count(discriminator) == layers + 3 * 96 + 6 * 192 + conv(192, 10, 1) + 10
    with_layer = script.Discriminator(script.dataclasses.replace(args, baseline="minibatch"))
    assert count(with_layer) - count(discriminator) == 192 * 500 + 500 + 100 + 100 * 10
    assert discriminator.features(x).shape == (2, 192, size // 4 - 2, size // 4 - 2)
    images = generator(torch.rand(4, 100))
    assert -1 <= images.min() and images.max() <= 1
    trained = {n: sum(p.numel() for p in o.param_groups[0]["params"]) for n, o in script.init_optimizers(
        args, nn.ModuleDict({"generator": generator, "discriminator": discriminator})).items()}
    assert trained == {"generator": count(generator), "discriminator": count(discriminator) - 3 * 96 - 6 * 192}


@each("mmgan_igan")
def test_weight_norm(script):
    """g v / |v| over all but the output channel, for convolutions, transposed ones and linear layers."""
    for layer, axis in ((nn.Conv2d(3, 4, 3), 0), (nn.ConvTranspose2d(3, 4, 3), 1), (nn.Linear(3, 4), 0)):
        layer = script.weight_norm(layer, train_scale=True)
        v = layer.parametrizations.weight.original1
        assert v.std().item() == pytest.approx(0.05, rel=0.5) and not layer.bias.any()
        with torch.no_grad():
            layer.parametrizations.weight.original0.copy_(torch.arange(1.0, 5).view_as(
                layer.parametrizations.weight.original0))
        for i in range(4):
            expected = (i + 1) * v.select(axis, i) / v.select(axis, i).square().sum().sqrt()
            torch.testing.assert_close(layer.weight.select(axis, i), expected)


@pytest.mark.parametrize("setting", [{}, {"baseline": "minibatch"}, {"minibatch_discrimination": True, "ema": 0.5}])
@each("mmgan_igan")
def test_data_dependent_initialisation(script, setting):
    """On its own batch and draws every weight-normed layer's output has mean 0 and deviation 1, in the last layers 0.1;
    minibatch discrimination's has mean 0."""
    args, networks = igan(script, **setting)
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    script.init_by_data(args, networks, images, torch.Generator().manual_seed(3))
    seen, closeness = [], []
    for name in ("generator", "discriminator"):
        for module in networks[name].modules():
            if hasattr(module, "init_std"):
                module.register_forward_hook(lambda m, i, o: seen.append((m.init_std, o.transpose(0, 1).flatten(1))))
            elif isinstance(module, script.MinibatchDiscrimination):
                module.register_forward_hook(lambda m, i, o: closeness.append((m, i[0], o[:, i[0].shape[1]:])))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        networks["generator"](script.draw_latents(50, args, rng))
        networks["discriminator"](scaled(script, images), script.draw_noise(50, args, rng))
    assert [std for std, _ in seen] == [0.1] + [1.0] * 9 + [0.1]
    for std, output in seen:
        torch.testing.assert_close(output.mean(1), torch.zeros(len(output)), rtol=0, atol=1e-3 * std)
        torch.testing.assert_close(output.std(1, correction=0), torch.full((len(output),), std), rtol=1e-2, atol=0)
    assert len(closeness) == bool(setting)
    for layer, inputs, output in closeness:
        assert output.mean(0).abs().max() < 1e-3
        torch.testing.assert_close(layer.distances(inputs).amin(1).mean(0), torch.full((output.shape[1],), 2.0))
    if args.ema:
        for a, b in zip(networks["generator"].parameters(), networks["generator_ema"].parameters()):
            assert torch.equal(a, b)


@each("mmgan_igan")
def test_minibatch_discrimination(script):
    torch.manual_seed(0)
    layer, x = script.MinibatchDiscrimination(4, 3, dim=2), torch.randn(5, 4)
    with torch.no_grad():
        layer.log_scale.normal_()
    output = layer(x)
    theta, scale = layer.theta.detach().double().numpy(), np.exp(layer.log_scale.detach().double().numpy())
    expected = np.full((5, 3), -1.0)
    for k in range(3):
        m = np.array([[sum(v[f] * theta[f, k, j] for f in range(4)) * scale[k, j] / np.linalg.norm(theta[:, k, j])
                       for j in range(2)] for v in x.double().numpy()])
        for i in range(5):
            expected[i, k] += sum(np.exp(-np.abs(m[i] - m[j]).sum()) for j in range(5) if j != i)
    np.testing.assert_allclose(output[:, 4:].detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(output[:, :4], x)


@each("mmgan_igan")
def test_virtual_batch_norm(script):
    """Each sample by the moments of the reference batch and itself, whatever else is in the batch."""
    torch.manual_seed(0)
    norm, x = script.VirtualBatchNorm(3, 4), torch.randn(7, 3, 2, 2) * 2 + 1
    with torch.no_grad():
        norm.bias.normal_()
    y = norm(x, True)
    for i in range(7):
        samples = x[:4] if i < 4 else torch.cat([x[:4], x[i : i + 1]])
        mean, var = samples.mean((0, 2, 3)), samples.var((0, 2, 3), correction=0)
        expected = (x[i] - mean[:, None, None]) / (var + 1e-6).sqrt()[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(y[i], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm(x[:5], False)[4], y[4])


@each("mmgan_igan")
def test_logsumexp_logit(script):
    """Half the cross-entropy of the sigmoid of logsumexp is Improved GAN's loss, also at large logits."""
    args, networks = igan(script)
    D, features = networks["discriminator"], torch.rand(6, 6, 4, 4)
    logit = D.logit(features)
    classes = D.linear(features.mean((2, 3)))
    torch.testing.assert_close(logit, classes.exp().sum(1).log())
    with torch.no_grad():
        D.linear.bias.copy_(torch.linspace(-3e4, 3e4, 10))
    large = D.logit(features)
    torch.testing.assert_close(large, torch.full((6,), 3e4), rtol=1e-3, atol=0)
    for real, fake in ((logit, logit - 3), (large, -large), (-large, large)):
        real, fake = real.double(), fake.double()
        expected = (-real.mean() + F.softplus(real).mean() + F.softplus(fake).mean()) / 2
        value = script.cross_entropy(real, fake) / 2
        assert value.isfinite() and value.item() == pytest.approx(expected.item(), abs=1e-6)


@each("mmgan_igan")
def test_noise(script):
    """Gaussian noise or dropout on the images, dropout after each stride; unbiased, drawn from the generator given."""
    for baseline in ("minibatch", None):
        args = script.resolve(script.Args(baseline=baseline, width=0.25))
        first, *masks = script.draw_noise(50, args, torch.Generator().manual_seed(0))
        assert [tuple(v.shape) for v in (first, *masks)] == [(50, 3, 32, 32), (50, 24, 16, 16), (50, 48, 8, 8)]
        if baseline:
            assert first.mean().abs() < 0.01 and first.std().item() == pytest.approx(0.2, rel=0.02)
        else:
            assert set(first.unique().tolist()) == {0.0, 1.25} and first.mean().item() == pytest.approx(1, abs=0.02)
        for mask in masks:
            assert set(mask.unique().tolist()) == {0.0, 2.0} and mask.mean().item() == pytest.approx(1, abs=0.02)
        again = script.draw_noise(50, args, torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip((first, *masks), again))


@each("mmgan_igan")
def test_historical_averaging(script):
    """The mean of the weights that each update began with, and G's and D's distance from it."""
    args, networks = igan(script, baseline="minibatch")
    history = networks["history"]["discriminator"]
    seen = []
    for _ in range(3):
        with torch.no_grad():
            networks["discriminator"].linear.bias.normal_()
        seen.append(networks["discriminator"].linear.bias.detach().clone())
        distance = history.take_in(networks["discriminator"])
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(history.mean.linear.bias.detach(), mean)
    expected = (seen[-1] - mean).square().sum().item()
    assert distance.item() == pytest.approx(expected)
    assert "history" not in igan(script, baseline="minibatch", historical_averaging=0.0)[1]


# ------------------------------------------------------------------------------------------ averages and defaults
@pytest.mark.parametrize("kernel", ["none", "rbf"])
@every
def test_averages_against_a_sequence_by_hand(script, kernel, monkeypatch):
    """With networks that stand still: the first mini-batch starts the averages, each later one has a tenth."""
    undisturbed(monkeypatch, script)
    args, networks, step = setup(script, kernel=kernel, lr=0.0, delta=0.9)
    draws, expected = torch.Generator().manual_seed(args.seed), None
    for seed in range(4):
        step(noise(args, seed))
        z = script.draw_latents(len(noise(args)), args, draws)
        with torch.no_grad():
            y = features(networks, scaled(script, noise(args, seed)))
            x = features(networks, networks["generator"](z))
        width = torch.ones(())
        if kernel == "rbf":
            width = sum((s - s.mean(0)).square().sum(1).mean() for s in (y, torch.cat([y, x]))) / 2
        if expected is not None and kernel == "rbf":
            width = 0.9 * expected["kernel_width"] + 0.1 * width
        mini = {"kernel_width": width}
        for side, s in (("real", y), ("fake", x)):
            c, r = slow_manifold(s.double().numpy(), kernel, width.double().numpy())
            mini |= {f"{side}_centroid": torch.tensor(c), f"{side}_radius": torch.tensor(r)}
        if expected is None:
            expected = mini
        else:
            expected = {k: 0.9 * expected[k] + 0.1 * v if k != "kernel_width" else v for k, v in mini.items()}
        for name, value in expected.items():
            ours = networks["averages"].get_buffer(name).double()
            torch.testing.assert_close(ours, value.double(), rtol=1e-3, atol=1e-5)


@every
def test_only_the_mini_batch_moves_the_generator(script):
    """The gradient to generated features is (1 - delta) of what it would be without a history in the linear kernel's
    radius, and none reaches the history."""
    args, networks, step = setup(script, kernel="linear", delta=0.75)
    step()
    averages = networks["averages"]
    assert averages.decay == 0.75 and not any(b.requires_grad for b in averages.buffers())
    f = points(6, len(averages.fake_centroid)).detach().requires_grad_()
    y = points(6, len(averages.fake_centroid), seed=2).detach()
    gradient, = torch.autograd.grad(averages.with_batch(args, y, f).fake.radius, f)
    alone, = torch.autograd.grad(script.manifold(f, "linear").radius, f)
    torch.testing.assert_close(gradient, 0.25 * alone)


@each("mmgan_dcgan")
def test_dcgan_defaults(script):
    """The paper's setting for each data set; a flag given by hand wins."""
    for dataset, expected in {"mnist": ("rbf", 1.0, 28), "celeba": ("exp", 1.0, 64), "cifar10": ("rbf", 0.1, 32),
                              "folder": ("rbf", 0.1, 32)}.items():
        args = script.resolve(script.Args(dataset=dataset))
        assert (args.kernel, args.beta, args.image_size) == expected and args.alpha == 1 and args.delta == 0.9
        assert args.num_is == (50000 if dataset == "cifar10" else None)  # None: as many as for FID
    args = script.resolve(script.Args(dataset="celeba", kernel="linear", beta=0.0, image_size=32, num_is=77))
    assert (args.kernel, args.beta, args.image_size, args.num_is) == ("linear", 0.0, 32, 77)
    assert (args.batch_size, args.lr, args.beta1, args.beta2, args.epochs) == (64, 2e-4, 0.5, 0.999, 25)


@each("mmgan_igan")
def test_igan_defaults(script):
    """The paper's setting, and the originals'; a flag given by hand wins."""
    for dataset, num_is in (("cifar10", 50000), ("folder", None)):
        args = script.resolve(script.Args(dataset=dataset))
        assert (args.kernel, args.alpha, args.beta, args.num_is) == ("exp", 1, 0.1, num_is)
    args = script.resolve(script.Args(kernel="rbf", beta=0.0, num_is=77))
    assert (args.kernel, args.beta, args.num_is) == ("rbf", 0.0, 77)
    assert (args.batch_size, args.lr, args.beta1, args.beta2, args.epochs) == (100, 3e-4, 0.5, 0.999, 1200)
    assert (args.historical_averaging, args.label_smoothing) == (1.0, 0.1)
    for baseline, eps in ((None, 1e-8), ("minibatch", 1e-4), ("feature-matching", 1e-4)):
        args = script.resolve(script.Args(baseline=baseline))
        assert (args.manifold_scale, args.manifold_in_discriminator) == ("width", False)
        networks = script.init_networks(dataclasses.replace(args, width=0.05), CPU)
        optimizers = script.init_optimizers(args, networks)
        assert {name: o.param_groups[0]["eps"] for name, o in optimizers.items()} == {"discriminator": 1e-4,
                                                                                      "generator": eps}


@each("mmgan_igan")
def test_feature_matching(script):
    y, x = points(5, seed=1).detach(), points(4, seed=2).detach()
    expected = np.mean(np.abs(np.mean(y.numpy(), 0) - np.mean(x.numpy(), 0)))
    assert script.feature_matching(y, x).item() == pytest.approx(expected, rel=1e-5)


@each("mmgan_igan")
def test_learning_rate(script):
    args = script.resolve(script.Args(lr_schedule="last-third", lr=0.1, iterations=1200))
    assert [script.learning_rate(args, t) for t in (0, 800, 1000, 1199)] == pytest.approx([0.1, 0.1, 0.05, 0.00025])
    args = script.resolve(script.Args(lr_schedule="constant", lr=0.1, iterations=1200))
    assert script.learning_rate(args, 1100) == 0.1
