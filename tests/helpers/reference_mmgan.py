"""MMGAN's Algorithm 1 and its baselines in plain PyTorch, every forward pass made anew."""
import torch
import torch.nn.functional as F
from scripts import model
from steps import descend


def scaled(script, pictures):
    """The images that the networks see."""
    return pictures.float() / 127.5 - 1 if model(script) == "mmgan_dcgan" else (pictures.float() - 127.5) / 128


def features(args, networks, x, noise=None):
    """The features [B, d] that are matched."""
    maps = networks["discriminator"].features(x, *noise or [])
    return maps.flatten(1) if getattr(args, "features", "map") == "map" else maps.mean((2, 3))


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

    width = torch.tensor(1.0)
    if isinstance(args.kernel_width, float):
        width = torch.tensor(args.kernel_width)
    elif args.kernel in ("rbf", "exp", "poly"):
        width = spread(y.detach())[args.kernel]
        if args.kernel_width == "auto":
            width = (width + spread(torch.cat([y, f]).detach())[args.kernel]) / 2
        width = take_in("kernel_width", width)
    new = {"kernel_width": width}
    for side, s in (("real", y), ("fake", f)):
        c = s.mean(0)
        if args.kernel == "none":
            r = (s - c).norm(dim=1).mean()
        else:
            r = torch.stack([squared_distance(args, c, v, width) for v in s]).mean()
        new |= {f"centroid_{side}": take_in(f"centroid_{side}", c), f"radius_{side}": take_in(f"radius_{side}", r)}
    return new


def final(args, new, f):
    """L_G of Eq. 10, and its R_G part."""
    gap = (new["radius_real"] - new["radius_fake"]).abs()
    if args.kernel == "none":
        loss = (new["centroid_real"] - new["centroid_fake"]).norm() + gap
    else:
        loss = squared_distance(args, new["centroid_real"], new["centroid_fake"], new["kernel_width"])
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
            results += [D(images, *noise), features(args, networks, images, noise)]
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
        for step in range(args.generator_steps):
            if igan:
                z = latents() if step else z
                if args.baseline == "minibatch":  # log(1 - D) = -softplus, maximised by D and minimised by G
                    loss = F.logsigmoid(-D(G(z), *draw())).mean()
                else:
                    _, y, _, f = discriminate(x, G(z))
                    loss = (y.detach().mean(0) - f.mean(0)).abs().mean()
            else:
                loss = -F.logsigmoid(D(G(z))).mean()
            descend(loss + drift("generator"), optimizers["generator"])
        return
    _, y, _, f = discriminate(x, G(z))
    new = averaged(args, history, y.detach(), f)
    match, penalty = final(args, new, f)
    scale = {"one": 1, "width": new["kernel_width"].detach(), "undamped": 1 / (1 - args.delta) if history else 1}
    descend(scale[args.manifold_scale] * match + penalty, optimizers["generator"])
    history.update({k: v.detach() for k, v in new.items()})
