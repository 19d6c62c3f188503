"""MMGAN's image scripts: equations against numpy, averages against a sequence by hand, networks, one iteration."""
import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steps import assert_same_course, conv, count, descend, noise, plain_descent, setup, shapes, weights
from torch import nn

SCRIPTS = ["mmgan_dcgan"]
KERNELS = ["linear", "poly", "rbf", "exp"]


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


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
def test_kernel(script, name):
    a, b = points(4, seed=1).detach(), points(3, seed=2).detach()
    values = script.kernel(a, b, name, 1.7)
    assert values.shape == (4, 3)
    expected = [[slow_kernel(u, v, name, 1.7) for v in b.double().numpy()] for u in a.double().numpy()]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)
    assert script.kernel(a.expand(2, 4, 7), b, name, 1.7).shape == (2, 4, 3)


def test_an_unknown_kernel_is_an_error(script):
    with pytest.raises(ValueError, match="none"):
        script.kernel(points(), points(), "none", 1.0)


@pytest.mark.parametrize("name", ["none", *KERNELS])
def test_manifold_and_distance(script, name):
    y, x = points(5, seed=1).detach(), points(6, seed=2, scale=1.5).detach() + 0.3
    numbers = [v.double().numpy() for v in (y, x)]
    spheres = [script.manifold(v, name, 1.7) for v in (y, x)]
    for (centroid, radius), s in zip(spheres, numbers):
        c, r = slow_manifold(s, name, 1.7)
        np.testing.assert_allclose(centroid.numpy(), c, atol=1e-6)
        assert radius.shape == () and radius.item() == pytest.approx(r, rel=1e-4)
    value = script.manifold_distance(*spheres, 0.8, name, 1.7)
    assert value.shape == () and value.item() == pytest.approx(slow_distance(*numbers, 0.8, name, 1.7), rel=1e-4)


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
    expected = (centroids[0] - centroids[1]).square().sum() + 0.8 * (radii[0] - radii[1]).abs()
    assert script.manifold_distance(*spheres, 0.8, "poly", w).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["none", *KERNELS])
def test_identical_sets_match(script, name):
    y = points(8, 500).detach()
    spheres = [script.manifold(v, name, 1000.0) for v in (y, y.flip(0).clone())]
    assert script.manifold_distance(*spheres, 1.0, name, 1000.0).item() == pytest.approx(0, abs=1e-4)


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
def test_gradients_are_finite(script, name, kind):
    """A collapsed batch, the very real features, features without variance, dead units."""
    y = points(6, 9, seed=1).detach()
    x = {"identical": y[:1].expand(6, -1), "matching": y, "constant": torch.ones(6, 9), "zero": torch.zeros(6, 9)}[kind]
    x = x.clone().requires_grad_()
    width = script.typical_width(x, name if name in KERNELS else "rbf") if kind == "zero" else 2.0
    width = max(float(width), 1e-3)
    loss = script.manifold_distance(script.manifold(y, name, width), script.manifold(x, name, width), 1.0, name, width)
    gradient, = torch.autograd.grad(loss + script.correlation_penalty(x), x)
    assert loss.isfinite() and gradient.isfinite().all()


def test_cross_entropy(script):
    real, fake = points(6, 1).detach()[:, 0], points(6, 1, seed=1).detach()[:, 0]
    expected = F.binary_cross_entropy_with_logits(real, torch.ones(6)) \
        + F.binary_cross_entropy_with_logits(fake, torch.zeros(6))
    assert script.cross_entropy(real, fake).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name,low,high", [("rbf", 0.55, 0.67), ("exp", 0.55, 0.67)])
def test_automatic_width_keeps_the_kernel_from_saturating(script, name, low, high):
    """Whatever the features' scale and number, the mean of K between them and their centroid is about e^-1/2."""
    for d, scale in ((4, 0.01), (2000, 30.0)):
        y = points(64, d, scale=scale).detach()
        width = script.typical_width(y, name)
        assert low < script.kernel(y, y.mean(0, keepdim=True), name, width).mean() < high
    assert script.typical_width(y, "poly").item() == pytest.approx(y.square().sum(1).mean().item())


# ------------------------------------------------------------------------------------------------------ networks
@pytest.mark.parametrize("dataset,sides", [("mnist", (2, 4, 7, 14, 28)), ("cifar10", (2, 4, 8, 16, 32)),
                                           ("celeba", (4, 8, 16, 32, 64))])
def test_dcgan_networks(dataset, sides):
    """The notes' layers; parameters counted from them (a layer right before batch norm has no bias)."""
    import mmgan_dcgan as script
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


def test_dcgan_initial_weights():
    import mmgan_dcgan as script
    args = script.resolve(script.Args(width=0.25))
    torch.manual_seed(0)
    for module in [*script.Generator(args).modules(), *script.Discriminator(args).modules()]:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.eps == 1e-5 and module.momentum == 0.1


# ------------------------------------------------------------------------------------------------ one iteration
def features(networks, x):
    return networks["discriminator"].features(x).flatten(1)


@pytest.mark.parametrize("kernel", ["none", "rbf"])
def test_averages_against_a_sequence_by_hand(script, kernel):
    """With networks that stand still: the first mini-batch starts the averages, each later one has a tenth."""
    args, networks, _, finite = setup(script, kernel=kernel, lr=0.0, delta=0.9)
    rng = torch.Generator().manual_seed(args.seed)
    step = script.make_train_step(args, networks, script.init_optimizers(args, networks), rng)
    draws, expected = torch.Generator().manual_seed(args.seed), None
    for seed in range(4):
        step(noise(args, seed), finite)
        z = script.draw_latents(len(noise(args)), args, draws, torch.device("cpu"))
        with torch.no_grad():
            y = features(networks, noise(args, seed) / 127.5 - 1)
            x = features(networks, networks["generator"](z))
        c = y.mean(0)
        width = (y - c).square().sum(1).mean() if kernel == "rbf" else torch.ones(())
        if expected is not None and kernel == "rbf":
            width = 0.9 * expected["kernel_width"] + 0.1 * width
        mini = {"kernel_width": width}
        for side, s in (("real", y), ("fake", x)):
            c, r = slow_manifold(s.double().numpy(), kernel, width.double().numpy())
            mini |= {f"centroid_{side}": torch.tensor(c), f"radius_{side}": torch.tensor(r)}
        if expected is None:
            expected = mini
        else:
            expected = {k: 0.9 * expected[k] + 0.1 * v if k != "kernel_width" else v for k, v in mini.items()}
        for name, value in expected.items():
            torch.testing.assert_close(getattr(networks["averages"], name).double(), value.double(), rtol=1e-3,
                                       atol=1e-5)


def reference_step(script, args, networks, optimizers, rng, pictures, history):
    """Algorithm 1 in plain PyTorch, every forward pass made anew; `history` holds the averages."""
    G, D = networks["generator"], networks["discriminator"]
    x = pictures.float() / 127.5 - 1
    z = script.draw_latents(len(x), args, rng, torch.device("cpu"))

    def discriminate(real, fake):
        if args.joint_batch:
            both = D.features(torch.cat([real, fake])).flatten(1)
            logits = D.linear(both)[:, 0]
            return logits[: len(x)], both[: len(x)], logits[len(x) :], both[len(x) :]
        y, f = features(networks, real), features(networks, fake)
        return D.linear(y)[:, 0], y, D.linear(f)[:, 0], f

    def averaged(y, f):
        """Spheres of the history with this mini-batch, and the kernel's width."""
        def take_in(name, value):
            return 0.9 * history[name].detach() + 0.1 * value if name in history else value

        c = y.mean(0)
        lengths = (y - c).norm(dim=1).detach()
        width = {"rbf": lengths.square().mean(), "exp": lengths.mean(), "poly": y.detach().square().sum(1).mean()}
        width = take_in("w", width[args.kernel]) if args.kernel_width == "auto" and args.kernel in width else (
            torch.tensor(float(args.kernel_width)) if args.kernel_width != "auto" else torch.tensor(1.0))
        new = {"w": width}
        for side, s in (("y", y), ("x", f)):
            c = s.mean(0)
            if args.kernel == "none":
                r = (s - c).norm(dim=1).mean()
            else:
                r = torch.stack([hilbert(c, v, width) for v in s]).mean()
            new |= {f"c_{side}": take_in(f"c_{side}", c), f"l_{side}": take_in(f"l_{side}", r)}
        return new

    def hilbert(a, b, w):
        k = {"linear": lambda u, v: u @ v, "poly": lambda u, v: (u @ v / w + 1) ** 3,
             "rbf": lambda u, v: torch.exp(-(u - v).square().sum() / (2 * w)),
             "exp": lambda u, v: torch.exp(-((u - v).square().sum() + 1e-12).sqrt() / (2 * w))}[args.kernel]
        return k(a, a) - 2 * k(a, b) + k(b, b)

    def final(new, f):
        """L_G of Eq. 10, and its R_G part."""
        gap = (new["l_y"] - new["l_x"]).abs()
        if args.kernel == "none":
            loss = (new["c_y"] - new["c_x"]).norm() + gap
        else:
            loss = hilbert(new["c_y"], new["c_x"], new["w"]) + args.alpha * gap
        a = torch.corrcoef(f)
        return loss, args.beta * (torch.eye(len(f)) - a).square().sum().sqrt()

    real, y, fake, f = discriminate(x, G(z, update_statistics=True).detach())
    loss = -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()
    if not args.baseline:
        match, penalty = final(averaged(y, f), f)
        loss = loss - match - (penalty if args.correlation_in_discriminator else 0)
    descend(loss, optimizers["discriminator"])
    if args.baseline:
        for _ in range(args.generator_steps):
            descend(-F.logsigmoid(D(G(z))).mean(), optimizers["generator"])
        return
    _, y, _, f = discriminate(x, G(z))
    new = averaged(y.detach(), f)
    match, penalty = final(new, f)
    descend(match + penalty, optimizers["generator"])
    history.update({k: v.detach() for k, v in new.items()})


@pytest.mark.parametrize("setting", [
    *({"kernel": k} for k in ("none", *KERNELS)), {"kernel": "rbf", "kernel_width": 3.0},
    {"kernel": "exp", "beta": 0.0}, {"kernel": "rbf", "correlation_in_discriminator": False},
    {"kernel": "rbf", "joint_batch": True}, {"kernel": "rbf", "alpha": 0.0}, {"baseline": True},
    {"baseline": True, "generator_steps": 2}])
def test_an_iteration_is_algorithm_1(script, setting, monkeypatch):
    """Two iterations, so that the history counts, against the plain reference."""
    monkeypatch.setattr(script, "init_optimizers", plain_descent(script))
    args, networks, step, finite = setup(script, **setting)
    start = weights(networks)
    for _ in range(2):
        step()
    assert finite
    ours = weights(networks)
    networks.load_state_dict(start)
    networks.requires_grad_(True)
    optimizers, rng, history = script.init_optimizers(args, networks), torch.Generator().manual_seed(args.seed), {}
    for _ in range(2):
        reference_step(script, args, networks, optimizers, rng, noise(args), history)
    theirs = weights(networks)
    for ours_name, name in (("centroid_real", "c_y"), ("radius_real", "l_y"), ("centroid_fake", "c_x"),
                            ("radius_fake", "l_x")):
        if history:
            torch.testing.assert_close(ours[f"averages.{ours_name}"], history[name], rtol=1e-2, atol=1e-4)
    ours, theirs = ({k: v for k, v in w.items() if not k.startswith("averages.")} for w in (ours, theirs))
    assert_same_course(start, ours, theirs, optimizers["generator"].param_groups[0]["lr"])


def test_only_the_mini_batch_moves_the_generator(script):
    """The gradient to generated features is (1 - delta) of what it would be without a history in the linear kernel's
    radius, and none reaches the history."""
    args, networks, step, _ = setup(script, kernel="linear", delta=0.75)
    step()
    averages = networks["averages"]
    assert averages.decay == 0.75 and not any(b.requires_grad for b in averages.buffers())
    f = points(6, len(averages.centroid_fake)).detach().requires_grad_()
    y = points(6, len(averages.centroid_fake), seed=2).detach()
    _, _, _, blended = script.match(args, averages, y, f)
    gradient, = torch.autograd.grad(blended["radius_fake"], f)
    alone, = torch.autograd.grad(script.manifold(f, "linear")[1], f)
    torch.testing.assert_close(gradient, 0.25 * alone)


@pytest.mark.parametrize("kernel", ["rbf", "exp"])
def test_gradient_norms(script, kernel):
    """Each term's, by finite differences of one weight's worth of gradient; nothing is changed by measuring."""
    args, networks, step, _ = setup(script, kernel=kernel)
    step()
    before = weights(networks)
    z = torch.rand(6, args.latent_dim, generator=torch.Generator().manual_seed(3)) * 2 - 1
    norms = script.gradient_norms(args, networks, noise(args), z)
    assert all(torch.equal(v, before[k]) for k, v in weights(networks).items())
    assert set(norms) == {"centroid", "radius", "correlation"} and all(v > 0 for v in norms.values())
    networks["generator"].requires_grad_(True)
    f, y = features(networks, networks["generator"](z)), features(networks, noise(args) / 127.5 - 1).detach()
    gradients = torch.autograd.grad(args.beta * script.correlation_penalty(f), networks["generator"].parameters())
    assert norms["correlation"] == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-4)
    assert y.shape == f.shape


def test_dcgan_defaults():
    """The paper's setting for each data set; a flag given by hand wins."""
    import mmgan_dcgan as script
    for dataset, expected in {"mnist": ("rbf", 1.0, 28), "celeba": ("exp", 1.0, 64), "cifar10": ("rbf", 0.1, 32),
                              "folder": ("rbf", 0.1, 32)}.items():
        args = script.resolve(script.Args(dataset=dataset))
        assert (args.kernel, args.beta, args.image_size) == expected and args.alpha == 1 and args.delta == 0.9
        assert args.num_is == (50000 if dataset == "cifar10" else 5000)
    args = script.resolve(script.Args(dataset="celeba", kernel="linear", beta=0.0, image_size=32, num_is=77))
    assert (args.kernel, args.beta, args.image_size, args.num_is) == ("linear", 0.0, 32, 77)
    args = script.resolve(script.Args(baseline=True))
    assert args.kernel is None and args.beta is None
    assert (args.batch_size, args.lr, args.beta1, args.beta2, args.epochs) == (64, 2e-4, 0.5, 0.999, 25)


def test_learning_rate(script):
    args = script.resolve(script.Args(lr_schedule="linear", lr=0.1, iterations=1200))
    assert [script.learning_rate(args, t) for t in (0, 800, 1000, 1199)] == pytest.approx([0.1, 0.1, 0.05, 0.00025])
    args = script.resolve(script.Args(lr_schedule="constant", lr=0.1, iterations=1200))
    assert script.learning_rate(args, 1100) == 0.1
