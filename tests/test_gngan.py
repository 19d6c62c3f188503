"""GN-GAN's image scripts: equations against slow references, networks, one iteration of Algorithm 1."""
import dataclasses
import functools
import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

SCRIPTS = ["gngan_cnn"]
ABLATIONS = [{"neighbor_embedding": ne, "gradient_matching": gm, "autoencoder": ae}
             for ne in (True, False) for gm in (True, False) for ae in (True, False)]


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


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


def test_neighbor_embedding(script):
    rng = np.random.default_rng(0)
    latents, pictures = rng.normal(size=(7, 4)), rng.uniform(size=(7, 3, 4, 4))
    value = script.neighbor_embedding(torch.tensor(latents).float(), torch.tensor(pictures).float())
    assert value.item() == pytest.approx(slow_neighbor_embedding(latents, pictures), rel=1e-4)
    assert script.neighbor_embedding(*[torch.tensor(latents).float()] * 2).item() == pytest.approx(0, abs=1e-6)
    # distances in units of their own deviation: the scale of either side does not matter
    scaled = script.neighbor_embedding(torch.tensor(100 * latents).float(), torch.tensor(pictures / 9).float())
    assert scaled.item() == pytest.approx(value.item(), rel=1e-3)


def test_affinities_are_probabilities(script):
    p = script.pairwise_affinities(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
    assert p.sum().item() == pytest.approx(1) and torch.equal(p, p.mT) and not p.diag().any() and (p >= 0).all()


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


def per_sample_gradients(discriminator, x):
    """Each sample's gradient of its own logit, one at a time."""
    rows = []
    for sample in x:
        sample = sample[None].clone().requires_grad_()
        rows.append(torch.autograd.grad(discriminator(sample)[0], sample)[0][0])
    return torch.stack(rows)


@pytest.mark.parametrize("penalty", ["l2", "rms"])
def test_gradient_penalty(script, penalty):
    discriminator = smooth_discriminator(torch.float32)
    real, fake, mix = images(seed=1), images(seed=2), torch.rand(5, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    total = 0.0
    for i in range(5):
        point = mix[i] * real[i] + (1 - mix[i]) * fake[i]
        slope = per_sample_gradients(discriminator, point[None]).norm()
        total += (slope / (3 if penalty == "rms" else 1) - 1) ** 2 / 5  # 9 pixels
    value = script.gradient_penalty(discriminator, real, fake, mix, penalty)
    assert value.item() == pytest.approx(total.item(), rel=1e-4)


def test_gradient_penalty_trains_the_discriminator(script):
    """Its gradient to D's weights, through the second derivative, against finite differences."""
    weight = torch.randn(9, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def value(w):
        return script.gradient_penalty(lambda x: torch.sin(2 * x.flatten(1)) @ w, images(seed=1), images(seed=2),
                                       torch.full((5, 1, 1, 1), 0.3))

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


def test_gradient_matching(script):
    discriminator = smooth_discriminator(torch.float32)
    values = script.gradient_matching(discriminator, images(seed=1), 2 * images(seed=2))
    for ours, theirs in zip(values, slow_gradient_matching(discriminator, images(seed=1), 2 * images(seed=2))):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


@pytest.mark.parametrize("term", [0, 1, 2])
def test_gradient_matching_reaches_the_generator(script, term):
    """Each term's gradient against finite differences through a smooth D, where second derivatives count."""
    discriminator, real = smooth_discriminator(torch.float32), images(seed=1)
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


def test_gradient_matching_of_the_scripts_own_discriminator(script):
    """Piecewise linear: the gradient to G is exactly what double backward gives, and not zero in any term."""
    args = script.resolve(script.Args(width=1 / 16))
    torch.manual_seed(0)
    discriminator = script.Discriminator(args)
    real, fake = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32).requires_grad_()
    ours = [torch.autograd.grad(t, fake, retain_graph=True)[0] for t in
            script.gradient_matching(discriminator, real, fake)]

    def plain(x):  # autograd's own leaky ReLU, whose second derivative it does not know to be zero
        old, script.leaky_relu = script.leaky_relu, F.leaky_relu
        try:
            return discriminator(x)
        finally:
            script.leaky_relu = old

    theirs = [torch.autograd.grad(t, fake, retain_graph=True)[0] for t in script.gradient_matching(plain, real, fake)]
    for a, b in zip(ours, theirs):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-10)


def test_leaky_relu(script):
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    ours, theirs = script.leaky_relu(x, 0.1), F.leaky_relu(x, 0.1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(v.square().sum(), x)[0] for v in (ours, theirs)))
    assert script.leaky_relu(x.bfloat16(), 0.1).dtype == torch.bfloat16


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


def test_latent_data_distance(script):
    x, y, latent, z = (torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in
                       enumerate([(4, 5, 2, 2), (4, 5, 2, 2), (4, 3), (4, 3)]))
    expected = ((x - y).mean() - math.sqrt(3 / 20) * (latent - z).mean()) ** 2
    assert script.latent_data_distance(x, y, latent, z).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["identical", "dead", "collapsed"])
def test_gradients_are_finite(script, kind):
    """Identical real and generated images, a D of dead units, a batch of one image repeated."""
    args = script.resolve(script.Args(width=1 / 16))
    torch.manual_seed(0)
    discriminator = script.Discriminator(args)
    real = torch.rand(4, 3, 32, 32)
    fake = real.clone()
    if kind == "dead":
        nn.init.zeros_(discriminator.convs[2].weight)
    if kind == "collapsed":
        fake = real[:1].expand(4, -1, -1, -1).clone()
    fake.requires_grad_()
    latents = torch.zeros(4, 8, requires_grad=True)
    loss = (sum(script.gradient_matching(discriminator, real, fake)) + script.neighbor_embedding(latents, fake)
            + script.gradient_penalty(discriminator, real, fake, torch.full((4, 1, 1, 1), 0.5)))
    gradients = torch.autograd.grad(loss, [fake, latents, *discriminator.parameters()], allow_unused=True)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients if g is not None)


# ------------------------------------------------------------------------------------------------------ networks
def shapes(module, *inputs):
    """The output shape of every layer with weights, without the batch, in the order of use."""
    seen = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[1:]))) for m in module.modules()
             if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    module(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


def count(module):
    return sum(p.numel() for p in module.parameters())


def conv(a, b, k, bias=True):
    return a * b * k * k + (b if bias else 0)


@pytest.mark.parametrize("size", [32, 48])
def test_cnn_networks(size):
    """The notes' layers; parameters counted from them (a convolution before batch norm has no bias)."""
    import gngan_cnn as script
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


def test_batch_norm_statistics(script):
    """A pass moves the running statistics only when told to; both normalise by the batch's own."""
    torch.manual_seed(0)
    norm, x = script.BatchNorm(4), torch.randn(8, 4, 5, 5) * 3 + 1
    quiet = norm(x, False)
    assert not norm.running_mean.any()
    torch.testing.assert_close(norm(x, True), quiet)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    norm.eval()
    assert not torch.allclose(norm(x, False), quiet)


# ------------------------------------------------------------------------------------------------ one iteration
TINY = {"width": 1 / 32, "latent_dim": 8, "batch_size": 6}


def setup(script, **kwargs):
    args = script.resolve(script.Args(**{**TINY, **kwargs}))
    device = torch.device("cpu")
    networks = script.init_networks(args, device)
    optimizers = script.init_optimizers(args, networks)
    rng = torch.Generator().manual_seed(args.seed)
    step = script.make_train_step(args, networks, optimizers, rng)
    pictures = torch.randint(0, 256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8,
                             generator=torch.Generator().manual_seed(9))
    return args, networks, step, pictures, torch.tensor(args.alpha), torch.tensor(True)


def weights(networks):
    return {k: v.clone() for k, v in networks.state_dict().items()}


def reference_step(script, args, networks, optimizers, rng, pictures):
    """Algorithm 1 in plain PyTorch: every forward pass made anew, torch.autograd.grad for D's input gradient."""
    G, D, E = networks["generator"], networks["discriminator"], networks["encoder"] if args.autoencoder else None
    x = pictures.float() / 255
    z = torch.rand(len(x), args.latent_dim, generator=rng) * 2 - 1
    mix = torch.rand(len(x), 1, 1, 1, generator=rng)

    def input_gradient(v):
        v = v if v.requires_grad else v.clone().requires_grad_()
        logit = D(v)
        return logit, torch.autograd.grad(logit.sum(), v, create_graph=True)[0]

    def update(name, loss):
        parameters = [p for group in optimizers[name].param_groups for p in group["params"]]
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True)):
            p.grad = torch.zeros_like(p)  # in p's layout: fused Adam pairs elements by their place in memory
            if g is not None:
                p.grad.copy_(g)
        optimizers[name].step()

    if args.autoencoder:
        latent = E(x)
        rebuilt, fake = G(latent), G(z)
        if args.distgan:
            a, b, c = (D.features(v).flatten(1) for v in (x, rebuilt, fake))
            w = math.sqrt(args.latent_dim / a.shape[1])
            loss = (a - b).pow(2).mean() + args.lambda_r * ((b - c).mean() - w * (latent - z).mean()).pow(2)
        else:
            loss = (x - rebuilt).pow(2).mean()
            if args.neighbor_embedding:
                embedding = script.neighbor_embedding(torch.cat([latent, z]), torch.cat([rebuilt, fake]))
                loss = loss + args.lambda_r * embedding
        update("autoencoder", loss)
        rebuilt = G(E(x)).detach()
    fake = G(z, update_statistics=True).detach()
    score = torch.sigmoid
    if args.hinge:
        loss = -(1 - args.alpha * args.autoencoder) * score(D(x)).mean() + score(D(fake)).mean()
        if args.autoencoder:
            loss = loss - args.alpha * score(D(rebuilt)).mean()
    else:
        loss = -(1 - args.alpha * args.autoencoder) * F.logsigmoid(D(x)).mean() - F.logsigmoid(-D(fake)).mean()
        if args.autoencoder:
            loss = loss - args.alpha * F.logsigmoid(D(rebuilt)).mean()
    if args.autoencoder:
        slope = input_gradient(mix * x + (1 - mix) * fake)[1].flatten(1).norm(dim=1)
        loss = loss + args.lambda_p * (slope - 1).pow(2).mean()
    update("discriminator", loss)
    fake = G(z)
    if args.gradient_matching:
        sides = []
        for v in (x, fake):
            logit, gradient = input_gradient(v)
            s = score(logit)
            gradient = (s * (1 - s))[:, None, None, None] * gradient
            inner = (gradient * v).flatten(1).sum(1)
            sides.append((s.mean(), gradient.flatten(1).norm(dim=1).mean(), inner.abs().mean()))
        (a, b, c), (d, e, f) = sides
        loss = (a - d).abs() + args.lambda_m1 * (b - e).pow(2) + args.lambda_m2 * (c - f).pow(2)
    elif args.autoencoder:
        loss = (score(D(x)).mean() - score(D(fake)).mean()).abs()
    else:
        loss = -score(D(fake)).mean() if args.hinge else -F.logsigmoid(D(fake)).mean()
    if args.neighbor_embedding and not args.autoencoder:
        loss = loss + args.lambda_r * script.neighbor_embedding(z, fake)
    update("generator", loss)


def plain_descent(script):
    """Optimisers whose steps show the gradients' size; Adam's first ones have the size of lr whatever it is."""
    adam = script.init_optimizers
    return lambda args, networks: {name: torch.optim.SGD(o.param_groups[0]["params"], lr=0.1)
                                   for name, o in adam(args, networks).items()}


@pytest.mark.parametrize("setting", [*ABLATIONS, {"distgan": True}, {"hinge": True}, {"autoencoder_updates": "encoder"},
                                     {"hinge": True, "autoencoder": False, "gradient_matching": False}])
def test_an_iteration_is_algorithm_1(script, setting, monkeypatch):
    """Two iterations against the plain reference: gradients of every update, shared forward passes and all."""
    monkeypatch.setattr(script, "init_optimizers", plain_descent(script))
    args, networks, step, pictures, alpha, finite = setup(script, **setting)
    start = weights(networks)
    for _ in range(2):
        losses = step(pictures, alpha, finite)
    assert finite and all(v.isfinite() for v in losses.values())
    ours = weights(networks)
    networks.load_state_dict(start)
    optimizers, rng = script.init_optimizers(args, networks), torch.Generator().manual_seed(args.seed)
    networks.requires_grad_(True)
    for _ in range(2):
        reference_step(script, args, networks, optimizers, rng, pictures)
    theirs = weights(networks)
    for network in networks:
        keys = [k for k in ours if k.startswith(network + ".") and ours[k].is_floating_point()]
        change, error = (torch.cat([(w[k] - start[k]).flatten() for k in keys]) for w in (ours, theirs))
        error = error - change
        assert change.norm() > 1e-4 and error.norm() < 0.02 * change.norm(), network
    assert ours["generator.norms.0.num_batches_tracked"] == theirs["generator.norms.0.num_batches_tracked"] == 2


def test_what_the_autoencoder_update_trains(script):
    """With encoder alone and lr such that D and G stand still elsewhere, G moves by its own update only."""
    args, networks, _, _, _, _ = setup(script, autoencoder_updates="encoder")
    names = {id(p): n for n, p in networks.named_parameters()}
    trained = {k: {names[id(p)].split(".")[0] for p in o.param_groups[0]["params"]}
               for k, o in script.init_optimizers(args, networks).items()}
    assert trained == {"autoencoder": {"encoder"}, "generator": {"generator"}, "discriminator": {"discriminator"}}
    args = dataclasses.replace(args, autoencoder_updates="both")
    both = script.init_optimizers(args, networks)["autoencoder"]
    assert {names[id(p)].split(".")[0] for p in both.param_groups[0]["params"]} == {"encoder", "generator"}


def test_moving_average(script):
    _, networks, step, pictures, alpha, finite = setup(script, ema=0.75)
    expected = networks["generator"].linear.weight.detach().clone()
    for _ in range(3):
        step(pictures, alpha, finite)
        expected = 0.75 * expected + 0.25 * networks["generator"].linear.weight.detach()
    torch.testing.assert_close(networks["generator_ema"].linear.weight, expected)


def test_bf16_sees_fresh_weights(script, monkeypatch):
    """bf16 copies of the weights never outlive an update: the same as with no such copies kept at all."""
    def two_steps():
        _, networks, step, pictures, alpha, finite = setup(script, precision="bf16", lr=0.01)
        for _ in range(2):
            losses = step(pictures, alpha, finite)
        assert finite
        return weights(networks), losses

    kept, losses = two_steps()
    monkeypatch.setattr(torch, "autocast", functools.partial(torch.autocast, cache_enabled=False))
    fresh, _ = two_steps()
    assert all(torch.equal(kept[k], fresh[k]) for k in kept)
    _, networks, step, pictures, alpha, finite = setup(script, lr=0.01)
    for _ in range(2):
        exact = step(pictures, alpha, finite)
    for name in losses:
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.2, abs=0.05)


def test_a_loss_that_is_not_finite_is_remembered(script):
    _, networks, step, pictures, alpha, finite = setup(script)
    step(pictures, alpha, finite)
    assert finite
    with torch.no_grad():
        networks["discriminator"].linear.weight[0, 0] = math.nan
    step(pictures, alpha, finite)
    assert not finite


def test_compiled_is_eager(script, monkeypatch):
    """Each loss in one graph, double backward and all; the first script's also through the C++ compiler."""
    if script.SCRIPT != SCRIPTS[0]:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        _, networks, step, pictures, alpha, finite = setup(script, compile=compiled)
        for _ in range(2):
            losses = step(pictures, alpha, finite)
        results.append((weights(networks), losses))
    for name, value in results[0][1].items():
        assert results[1][1][name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    for name, value in results[0][0].items():
        if value.is_floating_point():
            assert ((results[1][0][name] - value).abs() < 1e-4).float().mean() > 0.98, name


def test_schedules(script):
    args = script.resolve(script.Args(lr_schedule="linear", lr=0.1, iterations=100, alpha_schedule="falling"))
    assert [script.learning_rate(args, t) for t in (0, 50, 75, 99)] == pytest.approx([0.05, 0.05, 0.025, 0.001])
    shares = [script.reconstruction_share(args, t) for t in (0, 50, 60, 75, 99)]
    assert shares == pytest.approx([0.05, 0.05, 0.03, 0, 0])
    args = dataclasses.replace(args, lr_schedule="constant", alpha_schedule="constant")
    assert script.learning_rate(args, 99) == 0.1 and script.reconstruction_share(args, 99) == 0.05


def test_defaults(script):
    resolved = script.resolve(script.Args())
    assert (resolved.batch_size, resolved.lr, resolved.alpha, resolved.latent_dim) == (64, 2e-4, 0.05, 128)
    assert (resolved.lambda_p, resolved.lambda_r, resolved.lambda_m1, resolved.lambda_m2) == (1, 1, 1, 1)
    assert script.resolve(script.Args(dataset="stl10")).image_size == 48
    assert script.resolve(script.Args(autoencoder=False)).lambda_p == 0
    assert not script.resolve(script.Args(distgan=True)).gradient_matching


def test_cnn_defaults():
    import gngan_cnn as script
    assert script.resolve(script.Args()).iterations == 350_000
    assert script.resolve(script.Args(hinge=True)).iterations == 200_000
    assert (script.Args().beta1, script.Args().beta2) == (0.5, 0.9)


def test_batches_visit_everything_and_resume(script):
    pictures = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    stream = script.Batches(pictures, 4, 1, torch.device("cpu"))
    seen = torch.cat([stream.next().flatten() for _ in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    for steps in range(7):
        first = script.Batches(pictures, 4, 1, torch.device("cpu"))
        for _ in range(steps):
            first.next()
        second = script.Batches(pictures, 4, 7, torch.device("cpu"))
        second.load_state_dict(first.state_dict())
        assert all(torch.equal(first.next(), second.next()) for _ in range(6))
