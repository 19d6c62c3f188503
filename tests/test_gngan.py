"""GN-GAN's image scripts: equations against slow references, networks, defaults."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import each
from steps import CPU, TINY, build, conv, count, noise, shapes
from torch import nn

from common import UserError, training

every = each("gngan_cnn", "gngan_resnet")


def smooth_discriminator(dtype=torch.float64, seed=0):
    """[B, 1, 3, 3] -> [B], smooth, so that its gradient varies with x."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(9, 7, generator=g).to(dtype), torch.randn(7, generator=g).to(dtype)
    return lambda x: torch.tanh(x.flatten(1) @ a) @ b


def images(count=5, seed=1, dtype=torch.float32):
    return torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----------------------------------------------------------------------------------------------------- equations
def slow_neighbor_embedding(latents, pictures):
    """Eq. 2-6 by loops over i and j."""
    def conditional(points):
        n = len(points)
        distance = [[np.sqrt(((points[i] - points[j]) ** 2).sum()) for j in range(n)] for i in range(n)]
        variance = np.var([distance[i][j] for i in range(n) for j in range(n) if i != j])
        kernel = [[1 / (1 + distance[i][j] ** 2 / (2 * variance)) for j in range(n)] for i in range(n)]
        # p[j][i] is p_{j|i}
        return [[kernel[i][j] / sum(kernel[i][k] for k in range(n) if k != i) if i != j else 0 for i in range(n)]
                for j in range(n)]

    n = len(latents)
    p, q = conditional(latents.reshape(n, -1)), conditional(pictures.reshape(n, -1))
    total = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                p_ij, q_ij = (p[i][j] + p[j][i]) / (2 * n), (q[i][j] + q[j][i]) / (2 * n)
                total += p_ij * math.log(p_ij / q_ij)
    return total


@every
def test_neighbor_embedding(script):
    rng = np.random.default_rng(0)
    latents, pictures = rng.normal(size=(7, 4)), rng.uniform(size=(7, 3, 4, 4))
    value = script.neighbor_embedding(torch.tensor(latents).float(), torch.tensor(pictures).float())
    assert value.item() == pytest.approx(slow_neighbor_embedding(latents, pictures), rel=1e-4)
    assert script.neighbor_embedding(*[torch.tensor(latents).float()] * 2).item() == pytest.approx(0, abs=1e-6)
    # distances in units of their own deviation: the scale of either side does not matter
    scaled = script.neighbor_embedding(torch.tensor(100 * latents).float(), torch.tensor(pictures / 9).float())
    assert scaled.item() == pytest.approx(value.item(), rel=1e-3)


@every
def test_affinities_are_probabilities(script):
    p = script.pairwise_affinities(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
    assert p.sum().item() == pytest.approx(1) and torch.equal(p, p.mT) and not p.diag().any() and (p >= 0).all()


@every
def test_neighbor_embedding_gradient(script):
    """Against finite differences with sigma held fixed; it reaches latents and images."""
    rng = np.random.default_rng(1)
    latents, pictures = (torch.tensor(rng.normal(size=s)).float().requires_grad_() for s in ((6, 3), (6, 1, 2, 2)))
    gradients = torch.autograd.grad(script.neighbor_embedding(latents, pictures), (latents, pictures))

    def affinities(points, variance):
        squares = (points[:, None] - points[None]).square().sum(-1)
        kernel = (1 / (1 + squares / (2 * variance))) * ~torch.eye(len(points), dtype=torch.bool)
        conditional = kernel / kernel.sum(0)
        return (conditional + conditional.T) / (2 * len(points))

    def value(a, b):
        p, q = (affinities(v.flatten(1), s) for v, s in zip((a, b), variances))
        mask = ~torch.eye(len(p), dtype=torch.bool)
        return (p[mask] * (p[mask] / q[mask]).log()).sum()

    points = [v.detach().double() for v in (latents, pictures)]
    off_diagonal = ~torch.eye(6, dtype=torch.bool)
    variances = [torch.cdist(v.flatten(1), v.flatten(1))[off_diagonal].var(correction=0) for v in points]
    for k, gradient in enumerate(gradients):
        for index in ((0,) * points[k].ndim, (4,) + (1,) * (points[k].ndim - 1)):
            index = tuple(min(i, s - 1) for i, s in zip(index, points[k].shape))
            shifted = []
            for step in (1e-5, -1e-5):
                moved = [p.clone() for p in points]
                moved[k][index] += step
                shifted.append(value(*moved))
            slope = (shifted[0] - shifted[1]).item() / 2e-5
            assert gradient[index].item() == pytest.approx(slope, rel=1e-2, abs=1e-6)


class Differentiated:
    """A discriminator's function, with the gradient to its images from autograd."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)

    def logit_and_gradient(self, x):
        def total(x):
            logit = self.function(x)
            return logit.sum(), logit

        gradient, (_, logit) = torch.func.grad_and_value(total, has_aux=True)(x)
        return logit, gradient


def per_sample_gradients(discriminator, x):
    """Each sample's gradient of its own logit, one at a time."""
    rows = []
    for sample in x:
        sample = sample[None].clone().requires_grad_()
        rows.append(torch.autograd.grad(discriminator(sample)[0], sample)[0][0])
    return torch.stack(rows)


@pytest.mark.parametrize("penalty", ["score", "rms", "reversed"])
@every
def test_gradient_penalty(script, penalty):
    discriminator = Differentiated(smooth_discriminator(torch.float32))
    real, fake, mix = images(seed=1), images(seed=2), torch.rand(5, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    total = 0.0
    for i in range(5):
        point = mix[i] * real[i] + (1 - mix[i]) * fake[i]
        slope = per_sample_gradients(discriminator, point[None]).norm()
        score = torch.sigmoid(discriminator(point[None]))[0]
        unit = 1 / (score * (1 - score)) if penalty == "score" else 3  # 9 pixels
        total += (slope / unit - 1) ** 2 / 5
    value = script.gradient_penalty(discriminator, real, fake, mix, penalty)
    assert value.item() == pytest.approx(total.item(), rel=1e-4)


@every
def test_the_default_penalty_keeps_the_hinge_loss_alive(script):
    """D alone on images that it can tell apart: the sigmoid's slope, through which all of Eq. 13 reaches G, stays; with
    the logit's gradient and the formula's sign it goes."""
    def slope(penalty):
        args = script.resolve(script.Args(hinge=True, penalty=penalty, width=0.05, image_size=16, latent_dim=8))
        networks = script.init_networks(args, CPU)
        g = torch.Generator().manual_seed(0)
        x = torch.rand(16, 3, 1, 1, generator=g) / 2 + 0.25 + torch.randn(16, 3, 16, 16, generator=g) / 10
        fake = torch.rand(16, 3, 16, 16, generator=g)
        optimizer = torch.optim.Adam(networks["discriminator"].parameters(), 4e-3, (0.5, 0.9))
        for _ in range(100):
            optimizer.zero_grad()
            mix = torch.rand(16, 1, 1, 1, generator=g)
            loss, _ = script.discriminator_objective(args, networks, x, fake, None, mix)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            score = torch.sigmoid(networks["discriminator"](torch.cat([x, fake])))
        return (score * (1 - score)).mean().item()

    alive = slope("auto")
    assert alive > 0.01 and alive > 3 * slope("rms")


@every
def test_gradient_penalty_trains_the_discriminator(script):
    """Its gradient to D's weights, through the second derivative, against finite differences."""
    weight = torch.randn(9, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def value(w):
        discriminator = Differentiated(lambda x: torch.sin(2 * x.flatten(1)) @ w)
        return script.gradient_penalty(discriminator, images(seed=1), images(seed=2), torch.full((5, 1, 1, 1), 0.3))

    gradient, = torch.autograd.grad(value(weight), weight)
    for i in range(9):
        step = torch.zeros(9)
        step[i] = 1e-3
        slope = (value(weight + step) - value(weight - step)).item() / 2e-3
        assert gradient[i].item() == pytest.approx(slope, rel=0.02, abs=1e-3)


def slow_gradient_matching(discriminator, real, fake):
    sides = []
    for x in (real, fake):
        score = torch.sigmoid(discriminator(x))
        gradient = (score * (1 - score))[:, None, None, None] * per_sample_gradients(discriminator, x)
        sides.append((score.mean(), sum(g.norm() for g in gradient) / len(x),
                      sum((g * v).sum().abs() for g, v in zip(gradient, x)) / len(x)))
    (a, b, c), (d, e, f) = sides
    return abs(a - d), (b - e) ** 2, (c - f) ** 2


@every
def test_gradient_matching(script):
    discriminator = Differentiated(smooth_discriminator(torch.float32))
    values = script.gradient_matching(discriminator, images(seed=1), 2 * images(seed=2))
    for ours, theirs in zip(values, slow_gradient_matching(discriminator, images(seed=1), 2 * images(seed=2))):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


@pytest.mark.parametrize("term", [0, 1, 2])
@every
def test_gradient_matching_reaches_the_generator(script, term):
    """Each term's gradient against finite differences through a smooth D, where second derivatives count."""
    discriminator, real = Differentiated(smooth_discriminator(torch.float32)), images(seed=1)
    fake = (2 * images(seed=2)).requires_grad_()
    gradient, = torch.autograd.grad(script.gradient_matching(discriminator, real, fake)[term], fake)
    assert gradient.abs().sum() > 1e-6
    double = smooth_discriminator(torch.float64)
    for index in ((0, 0, 0, 0), (3, 0, 1, 2), (4, 0, 2, 2)):
        values = []
        for step in (1e-5, -1e-5):
            moved = fake.detach().double().clone()
            moved[index] += step
            values.append(slow_gradient_matching(double, real.double(), moved)[term].item())
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("size", [32, 40, 48])
@every
def test_the_discriminator_differentiates_itself(script, size):
    """Its gradient, Eq. 13's terms with theirs to G, V_P with its to D: as by differentiating twice, and none zero."""
    args = script.resolve(script.Args(width=1 / 16, image_size=size))
    torch.manual_seed(0)
    discriminator = script.Discriminator(args).to(memory_format=torch.channels_last)
    for module in discriminator.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.bias, std=0.1)
    real, fake = torch.rand(4, 3, size, size), torch.rand(4, 3, size, size).requires_grad_()

    def results(discriminator, parameters):
        found = [*discriminator.logit_and_gradient(real)]
        for term in script.gradient_matching(discriminator, real, fake):
            found += [term, *torch.autograd.grad(term, fake, retain_graph=True)]
        for penalty in ("score", "rms"):
            value = script.gradient_penalty(discriminator, real, fake.detach(), torch.full((4, 1, 1, 1), 0.3), penalty)
            found += [value, *torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)]
        return found

    weights = [v for v in discriminator.parameters() if v.ndim > 1]  # a bias reaches a gradient by the score alone
    for a, b in zip(results(discriminator, weights), results(Differentiated(discriminator), weights), strict=True):
        assert a.ndim == 0 or a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@every
def test_a_discriminator_with_another_gradient_is_refused(script):
    """Where layers were changed and the gradient was not, and where images depend on each other."""
    discriminator, x = script.Discriminator(script.resolve(script.Args(width=1 / 16))), torch.rand(2, 3, 32, 32)
    training.check_gradient(discriminator, x)

    class Longer(script.Discriminator):
        def features(self, x, slopes=None):
            return super().features(x, slopes).relu().sqrt()

    class Joint(script.Discriminator):
        def features(self, x, slopes=None):
            return F.batch_norm(super().features(x, slopes), None, None, training=True)

        def logit_and_gradient(self, x):
            return Differentiated(self).logit_and_gradient(x)

    for changed in (Longer, Joint):
        with pytest.raises(UserError, match="logit_and_gradient is .*% off"):
            training.check_gradient(changed(script.resolve(script.Args(width=1 / 16))), x)


@every
def test_a_run_begins_by_a_look_at_the_gradient(script, tmp_path, monkeypatch):
    right = script.Discriminator.logit_and_gradient
    monkeypatch.setattr(script.Discriminator, "logit_and_gradient", lambda D, x: [2 * v for v in right(D, x)])
    args = script.resolve(script.Args(**TINY, dataset="folder", iterations=1, eval_every=0))
    with pytest.raises(UserError, match="logit_and_gradient is .*% off"):
        script.train(args, noise(args), CPU, tmp_path, None, None, [])


@every
def test_leaky_relu(script):
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    slopes = [None]
    ours, theirs = script.leaky_relu(x, 0.1, slopes), script.leaky_relu(x, 0.1, None)
    torch.testing.assert_close(ours, theirs)
    for v in (ours, theirs):
        torch.testing.assert_close(torch.autograd.grad(v.sum(), x)[0], slopes[1])
    assert slopes[1].tolist() == pytest.approx(5 * [0.1] + 4 * [1.0])
    assert script.leaky_relu(x.bfloat16(), 0.1, []).dtype == torch.bfloat16


@every
def test_discriminator_loss(script):
    real, fake, rebuilt = (torch.randn(6, generator=torch.Generator().manual_seed(s)) for s in range(3))
    d_real, d_fake, d_rebuilt = (torch.sigmoid(v).double().numpy() for v in (real, fake, rebuilt))
    log = -0.9 * np.log(d_real).mean() - 0.1 * np.log(d_rebuilt).mean() - np.log(1 - d_fake).mean()
    assert script.discriminator_loss(real, fake, rebuilt, 0.1).item() == pytest.approx(log, rel=1e-5)
    hinge = -0.9 * np.minimum(0, d_real - 1).mean() - 0.1 * np.minimum(0, d_rebuilt - 1).mean() \
        - np.minimum(0, -1 - d_fake).mean()
    assert script.discriminator_loss(real, fake, rebuilt, 0.1, hinge=True).item() == pytest.approx(hinge, rel=1e-5)
    plain = F.binary_cross_entropy_with_logits(real, torch.ones(6)) \
        + F.binary_cross_entropy_with_logits(fake, torch.zeros(6))
    assert script.discriminator_loss(real, fake).item() == pytest.approx(plain.item(), rel=1e-5)
    assert script.discriminator_loss(torch.tensor([200.0]), torch.tensor([-200.0])).item() == pytest.approx(0, abs=1e-6)


@every
def test_latent_data_distance(script):
    x, y, latent, z = (torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in
                       enumerate([(4, 5, 2, 2), (4, 5, 2, 2), (4, 3), (4, 3)]))
    expected = ((x - y).mean() - math.sqrt(3 / 20) * (latent - z).mean()) ** 2
    assert script.latent_data_distance(x, y, latent, z).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["identical", "dead", "collapsed"])
@every
def test_gradients_are_finite(script, kind):
    """Identical real and generated images, a D of dead units, a batch of one image repeated."""
    args = script.resolve(script.Args(width=1 / 16))
    torch.manual_seed(0)
    discriminator = script.Discriminator(args)
    real = torch.rand(4, 3, 32, 32)
    fake = real.clone()
    if kind == "dead":
        for module in discriminator.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
    if kind == "collapsed":
        fake = real[:1].expand(4, -1, -1, -1).clone()
    fake.requires_grad_()
    latents = torch.zeros(4, 8, requires_grad=True)
    loss = (sum(script.gradient_matching(discriminator, real, fake)) + script.neighbor_embedding(latents, fake)
            + script.gradient_penalty(discriminator, real, fake, torch.full((4, 1, 1, 1), 0.5)))
    gradients = torch.autograd.grad(loss, [fake, latents, *discriminator.parameters()], allow_unused=True)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients if g is not None)


# ------------------------------------------------------------------------------------------------------ networks
@each("gngan_cnn")
@pytest.mark.parametrize("size", [32, 48])
def test_cnn_networks(script, size):
    """The notes' layers; parameters counted from them (a convolution before batch norm has no bias)."""
    args = script.resolve(script.Args(dataset="cifar10" if size == 32 else "stl10"))
    s = size // 8
    generator, discriminator, encoder = script.Generator(args), script.Discriminator(args), script.Encoder(args)
    assert shapes(generator, torch.zeros(2, 128)) == [
        (s * s * 1024,), (512, 2 * s, 2 * s), (256, 4 * s, 4 * s), (128, 8 * s, 8 * s), (3, size, size)]
    assert count(generator) == 129 * s * s * 1024 + sum(conv(a, b, 4, False) + 2 * b for a, b in
                                                        ((1024, 512), (512, 256), (256, 128))) + conv(128, 3, 3)
    x = torch.zeros(2, 3, size, size)
    assert shapes(discriminator, x) == [(64, size, size), (64, 4 * s, 4 * s), (128, 4 * s, 4 * s), (128, 2 * s, 2 * s),
                                        (256, 2 * s, 2 * s), (256, s, s), (512, s, s), (1,)]
    widths = [3, 64, 64, 128, 128, 256, 256, 512]
    assert count(discriminator) == sum(conv(a, b, 4 if i % 2 else 3) for i, (a, b) in enumerate(zip(widths, widths[1:]))
                                       ) + 512 * s * s + 1
    assert discriminator.features(x).shape == (2, 512, s, s)
    if size == 32:
        assert shapes(encoder, x) == [(128, 16, 16), (256, 8, 8), (512, 4, 4), (128,)]
        assert count(encoder) == conv(3, 128, 5) + sum(conv(a, b, 5, False) + 2 * b for a, b in
                                                       ((128, 256), (256, 512))) + 128 * (16 * 512 + 1)
    else:
        assert shapes(encoder, x) == [(128, 48, 48), (256, 24, 24), (512, 12, 12), (1024, 6, 6), (128,)]
        assert count(encoder) == conv(3, 128, 3) + sum(conv(a, b, 4, False) + 2 * b for a, b in
                                                       ((128, 256), (256, 512), (512, 1024))) + 128 * (36 * 1024 + 1)


@each("gngan_resnet")
@pytest.mark.parametrize("size", [32, 48])
def test_resnet_networks(script, size):
    """The notes' layers; parameters counted from them (a convolution right before batch norm has no bias)."""
    args = script.resolve(script.Args(dataset="cifar10" if size == 32 else "stl10"))
    s = size // 8
    generator, discriminator, encoder = script.Generator(args), script.Discriminator(args), script.Encoder(args)
    seen = shapes(generator, torch.zeros(2, 128))
    widths = [256] * 4 if size == 32 else [512, 256, 128, 64]
    assert seen[0] == (s * s * widths[0],) and seen[-1] == (3, size, size) and len(seen) == 11
    for i, b in enumerate(widths[1:]):
        assert seen[3 * i + 1 : 3 * i + 4] == [(b, 2 * s * 2**i,) + (2 * s * 2**i,)] * 2 + [(b,) + (s * 2**i,) * 2]
    assert count(generator) == 129 * s * s * widths[0] + sum(
        2 * a + conv(a, b, 3, False) + 2 * b + conv(b, b, 3) + conv(a, b, 1) for a, b in zip(widths, widths[1:])
    ) + 2 * widths[-1] + conv(widths[-1], 3, 3)
    x = torch.zeros(2, 3, size, size)
    widths = [3] + ([128] * 4 if size == 32 else [64, 128, 256, 512, 1024])
    halving, side = (2, 8) if size == 32 else (4, 3)
    total = widths[-1] + 1
    for i, (a, b) in enumerate(zip(widths, widths[1:])):
        total += conv(a, b, 3) + conv(b, b, 3)
        if i < halving:
            total += conv(b, b, 1) + conv(a, b, 1) + (conv(a, a, 1) if i == 0 else conv(b, b, 1))
        elif a != b:
            total += conv(a, b, 1)
    assert count(discriminator) == total
    assert discriminator.features(x).shape == (2, widths[-1], side, side)
    features = discriminator.features(x + 1)
    torch.testing.assert_close(discriminator(x + 1), discriminator.linear(features.sum((2, 3)))[:, 0])
    widths = [256] * 4 if size == 32 else [64, 128, 256, 512]
    assert shapes(encoder, x)[-1] == (128,)
    assert encoder.convs(x).shape == (2, widths[-1], s, s)
    assert count(encoder) == conv(3, widths[0], 3) + sum(
        2 * a + conv(a, b, 3, False) + 2 * b + conv(b, b, 3) + conv(a, b, 1) for a, b in zip(widths, widths[1:])
    ) + 2 * widths[-1] + 128 * (s * s * widths[-1] + 1)


@every
def test_initial_weights(script):
    args = script.resolve(script.Args(width=0.25))
    torch.manual_seed(0)
    for network in (script.Generator(args), script.Discriminator(args), script.Encoder(args)):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
                bound = math.sqrt(6 / (fan_in + fan_out))
                assert module.weight.abs().max() <= bound
                if module.weight.numel() > 1000:
                    assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
                assert module.bias is None or not module.bias.any()


@each("gngan_resnet")
def test_resnet_blocks_in_the_authors_order(script):
    """Up-sampling before the shortcut's convolution, strides and pooling after: the same function, computed whole."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8, 8)

    def weighted(layer, v):  # at every position
        return F.conv2d(v, layer.weight, layer.bias, padding=layer.padding)

    up = script.UpBlock(4, 5)
    y = up.norm2(up.conv1(F.interpolate(F.relu(up.norm1(x, False)), scale_factor=2)), False)
    expected = up.conv2(F.relu(y)) + up.shortcut(F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(up(x, False), expected)
    down = script.DownBlock(4, 5)
    y = down.conv2(F.leaky_relu(down.norm2(down.conv1(F.leaky_relu(down.norm1(x), 0.2))), 0.2))
    torch.testing.assert_close(down(x), F.avg_pool2d(y + down.shortcut(x), 2))
    first = script.Block(4, 5, halve=True, first=True)
    y = weighted(first.conv2, F.relu(first.conv1(x)))
    shortcut = F.conv2d(x, first.shortcut[0].weight, first.shortcut[0].bias, 2)
    expected = F.conv2d(y, first.halve.weight, first.halve.bias, 2) + first.shortcut[1](shortcut)
    torch.testing.assert_close(first(x), expected)
    for a in (4, 5):
        block, v = script.Block(a, 5, halve=True, first=False), torch.randn(3, a, 8, 8)
        y = weighted(block.conv2, F.relu(block.conv1(F.relu(v))))
        expected = F.conv2d(y, block.halve.weight, block.halve.bias, 2) \
            + F.conv2d(weighted(block.shortcut[0], v), block.shortcut[1].weight, block.shortcut[1].bias, 2)
        torch.testing.assert_close(block(v), expected)
        plain = script.Block(a, 5, halve=False, first=False)
        expected = plain.conv2(F.relu(plain.conv1(F.relu(v)))) + (v if a == 5 else plain.shortcut[0](v))
        torch.testing.assert_close(plain(v), expected)


# ---------------------------------------------------------------------------------------- updates and defaults
@pytest.mark.parametrize("updates", ["both", "encoder"])
@every
def test_what_the_autoencoder_update_trains(script, updates):
    """One Adam a network; the reconstruction moves G unless E alone is trained."""
    args = script.resolve(script.Args(width=1 / 32, latent_dim=8, batch_size=6, autoencoder_updates=updates))
    networks, optimizers, _, step = build(script, args, CPU)
    names = {id(p): n.split(".")[0] for n, p in networks.named_parameters()}
    trained = {k: {names[id(p)] for p in o.param_groups[0]["params"]} for k, o in optimizers.items()}
    assert trained == {"discriminator": {"discriminator"}, "generator": {"generator"}, "encoder": {"encoder"}}
    step(noise(args))
    steps = {k: int(next(iter(o.state.values()))["step"]) for k, o in optimizers.items()}
    assert steps == {"generator": 2 if updates == "both" else 1, "encoder": 1, "discriminator": 1}


@every
def test_defaults(script):
    resolved = script.resolve(script.Args())
    assert (resolved.batch_size, resolved.lr, resolved.alpha, resolved.latent_dim) == (64, 2e-4, 0.05, 128)
    assert (resolved.lambda_p, resolved.lambda_r, resolved.lambda_m1, resolved.lambda_m2) == (1, 1, 1, 1)
    assert script.resolve(script.Args(dataset="stl10")).image_size == 48
    assert script.resolve(script.Args(autoencoder=False)).lambda_p == 0
    assert not script.resolve(script.Args(distgan=True)).gradient_matching
    for hinge, given, penalty in ((False, "auto", "rms"), (True, "auto", "reversed"), (True, "rms", "rms")):
        assert script.resolve(script.Args(hinge=hinge, penalty=given)).penalty == penalty


@each("gngan_cnn")
def test_cnn_defaults(script):
    assert script.resolve(script.Args()).iterations == 350_000
    assert script.resolve(script.Args(hinge=True)).iterations == 200_000
    assert (script.Args().beta1, script.Args().beta2) == (0.5, 0.9)


@each("gngan_resnet")
def test_resnet_defaults(script):
    resolved = script.resolve(script.Args())
    assert resolved.iterations == 200_000 and resolved.hinge and resolved.lr_schedule == "second-half"
    assert (resolved.beta1, resolved.beta2) == (0, 0.9)
    rates = [script.learning_rate(resolved, t) for t in (0, 100_000, 150_000, 199_999)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 1e-9])
    assert script.learning_rate(script.Args(lr_schedule="constant"), 199_999) == 2e-4
