"""What the training steps of all image scripts have in common: precision, compiling, averages, the order of data."""
import contextlib
import functools
import importlib
import math

import pytest
import torch
from steps import setup, weights

SCRIPTS = ["gngan_cnn", "gngan_resnet", "mmgan_dcgan", "mmgan_igan"]


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


def test_batch_norm_statistics(script):
    """A pass moves the running statistics only when told to; both normalise by the batch's own."""
    torch.manual_seed(0)
    norm, x = script.BatchNorm(4), torch.randn(8, 4, 5, 5) * 3 + 1
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    gain = norm.weight if norm.weight is not None else torch.ones(4)
    shift = norm.bias if norm.bias is not None else norm.shift

    def expected(mean, var):
        mean, var, g, b = (v.detach()[:, None, None] for v in (mean, var, gain, shift))
        return (x - mean) / (var + norm.eps).sqrt() * g + b

    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm(x, False), expected(mean, var))
    assert not norm.running_mean.any()
    torch.testing.assert_close(norm(x, True), expected(mean, var))
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    norm.eval()  # of the first values, 0 and 1, nothing is left
    torch.testing.assert_close(norm(x, False), expected(mean, x.var((0, 2, 3))), rtol=1e-5, atol=1e-5)
    norm.num_batches_tracked.zero_()
    torch.testing.assert_close(norm(x, False), expected(norm.running_mean, norm.running_var))


def test_moving_average(script):
    _, networks, step, _ = setup(script, ema=0.75)
    expected = networks["generator"].linear.weight.detach().clone()
    for _ in range(3):
        step()
        expected = 0.75 * expected + 0.25 * networks["generator"].linear.weight.detach()
    torch.testing.assert_close(networks["generator_ema"].linear.weight, expected)


def test_bf16_sees_fresh_weights(script, monkeypatch):
    """bf16 copies of the weights never outlive an update: as with no such copies kept at all, but for rounding (which
    turns Adam's step around where a gradient is about zero), and unlike with copies kept throughout."""
    def two_steps(region=contextlib.nullcontext(), precision="bf16"):
        _, networks, step, finite = setup(script, precision=precision, lr=0.01)
        with region:
            for _ in range(2):
                losses = step()
        assert finite
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


def test_a_loss_that_is_not_finite_is_remembered(script):
    _, networks, step, finite = setup(script)
    step()
    assert finite
    with torch.no_grad():
        networks["discriminator"].linear.bias[0] = math.nan
    step()
    assert not finite


@pytest.mark.parametrize("through_cpp", [False, True])
def test_compiled_is_eager(script, through_cpp, monkeypatch, setting=None):
    """Each loss in one graph, double backward and all; once also through the C++ compiler, which takes a minute for an
    autoencoder's part alone and so does without."""
    setting = setting or {}
    if through_cpp:
        if script.SCRIPT != SCRIPTS[0]:
            pytest.skip("the C++ compiler is tried on the first script")
        setting = {"autoencoder": False, "lambda_p": 1.0}
    else:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        _, networks, step, _ = setup(script, compile=compiled, **setting)
        for _ in range(2):
            losses = step()
        results.append((weights(networks), losses))
    for name, value in results[0][1].items():
        assert results[1][1][name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    eager, compiled = (torch.cat([v.flatten() for v in w.values() if v.is_floating_point()]) for w, _ in results)
    assert ((compiled - eager).abs() < 1e-4).float().mean() > 0.98  # Adam turns around where a gradient is about zero


def test_improved_gan_compiled(monkeypatch):
    """Historical averaging, virtual batch norm and minibatch discrimination in the graphs."""
    test_compiled_is_eager(importlib.import_module("mmgan_igan"), False, monkeypatch, {"baseline": "minibatch"})


def test_samples_are_a_seeds_own(script):
    """The same images every time for a seed, others for another, and no draw of training's among them."""
    args, networks, _, _ = setup(script)
    generator = networks["generator"]
    with torch.no_grad():
        for _ in range(100):  # running statistics like those of a trained network
            generator(script.draw_latents(16, args, torch.Generator().manual_seed(0), torch.device("cpu")), True)
    first, again, other = (script.make_sampler(generator, script.dataclasses.replace(args, seed=s), torch.device("cpu"))
                           for s in (1, 1, 9))
    images = first(5)
    assert images.dtype == torch.uint8 and images.shape[0] == 5 and len(images.flatten(1).unique(dim=0)) == 5
    assert torch.equal(images, again(5)) and not torch.equal(images, other(5)) and not torch.equal(images, first(5))
    assert generator.training


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
