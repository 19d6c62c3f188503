"""MMGAN's Algorithm 1 and its baselines in plain PyTorch, every forward pass made anew."""
import torch
import torch.nn.functional as F
from scripts import model
from steps import descend


def scaled(script, pictures):
    """The images that the networks see."""
    return pictures.float() / 127.5 - 1 if model(script) == "mmgan_dcgan" else (pictures.float() - 127.5) / 128


def features(networks, x, noise=()):
    """The features [B, d] that are matched: D's last map, flattened."""
    return networks["discriminator"].features(x, *noise).flatten(1)


def squared_distance(args, a, b, w):
    """|phi(a) - phi(b)|^2 of two points."""
    k = {"linear": lambda u, v: u @ v, "poly": lambda u, v: (u @ v / w + 1) ** 3,
         "rbf": lambda u, v: torch.exp(-(u - v).square().sum() / (2 * w)),
         "exp": lambda u, v: torch.exp(-((u - v).square().sum() + 1e-12).sqrt() / (2 * w))}[args.kernel]
    return k(a, a) - 2 * k(a, b) + k(b, b)


def averaged(args, history, y, f):
    """Spheres of the history with this mini-batch, and the kernel's width."""
    def take_in(name, value):
        return args.delta * history[name].detach() + (1 - args.delta) * value if name in history else value

    def spread(points):
        lengths = (points - points.mean(0)).norm(dim=1)
        return {"rbf": lengths.square().mean(), "exp": lengths.mean(), "poly": points.square().sum(1).mean()}

    width = torch.tensor(args.kernel_width or 1.0)
    if args.kernel_width is None and args.kernel in ("rbf", "exp", "poly"):
        spreads = [spread(points.detach())[args.kernel] for points in (y, torch.cat([y, f]))]
        width = take_in("kernel_width", sum(spreads) / 2)
    new = {"kernel_width": width}
    for side, s in (("real", y), ("fake", f)):
        c = s.mean(0)
        if args.kernel == "none":
            r = (s - c).norm(dim=1).mean()
        else:
            r = torch.stack([squared_distance(args, c, v, width) for v in s]).mean()
        new[f"{side}_centroid"] = take_in(f"{side}_centroid", c)
        new[f"{side}_radius"] = take_in(f"{side}_radius", r)
    return new


def final(args, new, f):
    """L_G of Eq. 10, and its R_G part."""
    gap = (new["real_radius"] - new["fake_radius"]).abs()
    if args.kernel == "none":
        loss = (new["real_centroid"] - new["fake_centroid"]).norm() + gap
    else:
        loss = squared_distance(args, new["real_centroid"], new["fake_centroid"], new["kernel_width"])
        loss = loss + args.alpha * gap
    return loss, args.beta * (torch.eye(len(f)) - torch.corrcoef(f)).square().sum().sqrt()


def reference_step(script, args, networks, optimizers, rng, pictures, history):
    """One iteration, in place; `history` holds the averages, and for Improved GAN the weights so far."""
    G, D = networks["generator"], networks["discriminator"]
    x = scaled(script, pictures)
    igan = model(script) == "mmgan_igan"

    def latents():
        return script.draw_latents(len(x), args, rng)

    def draw():
        return [script.draw_noise(len(x), args, rng)] if igan else []

    def discriminate(real, fake):
        results = []
        for images in (real, fake):
            noise = draw()
            results += [D(images, *noise), features(networks, images, noise)]
        return results

    def drift(name):
        """Historical averaging: lambda |theta - mean of all theta so far|^2."""
        if not (igan and args.baseline == "minibatch"):
            return 0
        now = list(networks[name].parameters())
        before = history.setdefault(name, [])
        before.append([p.detach().clone() for p in now])
        return args.historical_averaging * sum((p - sum(values) / len(before)).square().sum()
                                               for p, values in zip(now, zip(*before)))

    z = latents()
    real, y, fake, f = discriminate(x, G(z, True).detach())
    loss = -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()
    if igan:  # half of it; smoothed, the real images' target is 0.9
        smoothing = args.label_smoothing if args.baseline == "minibatch" else 0
        targets = torch.full_like(real, 1 - smoothing)
        loss = (F.binary_cross_entropy_with_logits(real, targets) - F.logsigmoid(-fake).mean()) / 2
    if not args.baseline:
        match, penalty = final(args, averaged(args, history, y, f), f)
        loss = loss - (match if args.manifold_in_discriminator else 0)
        loss = loss - (penalty if args.correlation_in_discriminator else 0)
    descend(loss + drift("discriminator"), optimizers["discriminator"])
    if args.baseline:
        minibatch = args.baseline == "minibatch"
        for step in range((3 if minibatch else 1) if igan else args.generator_steps):
            if minibatch:  # log(1 - D) = -softplus, maximised by D and minimised by G
                z = latents() if step else z
                loss = F.logsigmoid(-D(G(z), *draw())).mean()
            elif igan:
                maps = [D.features(images, *draw()) for images in (x, G(z))]
                real_mean, fake_mean = (m.mean((0, 2, 3)) for m in maps)
                loss = (real_mean.detach() - fake_mean).abs().mean()
            else:
                loss = -F.logsigmoid(D(G(z))).mean()
            descend(loss + drift("generator"), optimizers["generator"])
        return
    _, y, _, f = discriminate(x, G(z))
    new = averaged(args, history, y.detach(), f)
    match, penalty = final(args, new, f)
    scale = new["kernel_width"].detach() if args.manifold_scale == "width" else 1
    descend(scale * match + penalty, optimizers["generator"])
    history.update({k: v.detach() for k, v in new.items()})
