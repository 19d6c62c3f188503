"""GN-GAN's Algorithm 1 in plain PyTorch: every forward pass made anew, torch.autograd.grad for D's input gradient."""
import math

import torch
import torch.nn.functional as F
from steps import descend


def input_gradient(D, v):
    """Logits and D's gradient with respect to its images."""
    v = v if v.requires_grad else v.clone().requires_grad_()
    logit = D(v)
    return logit, torch.autograd.grad(logit.sum(), v, create_graph=True)[0]


def reference_step(script, args, networks, optimizers, rng, pictures):
    """One iteration, in place."""
    G, D, E = networks["generator"], networks["discriminator"], networks["encoder"] if args.autoencoder else None
    x = pictures.float() / 255
    z = torch.rand(len(x), args.latent_dim, generator=rng) * 2 - 1
    mix = torch.rand(len(x), 1, 1, 1, generator=rng)
    score = torch.sigmoid
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
        trained = {"both": ["encoder", "generator"], "encoder": ["encoder"]}[args.autoencoder_updates]
        descend(loss, *(optimizers[name] for name in trained))
        rebuilt = G(E(x)).detach()
    fake = G(z, True).detach()
    if args.hinge:
        loss = -(1 - args.alpha * args.autoencoder) * score(D(x)).mean() + score(D(fake)).mean()
        if args.autoencoder:
            loss = loss - args.alpha * score(D(rebuilt)).mean()
    else:
        loss = -(1 - args.alpha * args.autoencoder) * F.logsigmoid(D(x)).mean() - F.logsigmoid(-D(fake)).mean()
        if args.autoencoder:
            loss = loss - args.alpha * F.logsigmoid(D(rebuilt)).mean()
    if args.lambda_p:
        logit, gradient = input_gradient(D, mix * x + (1 - mix) * fake)
        slope = gradient.flatten(1).norm(dim=1)
        if args.penalty == "score":
            slope = slope * score(logit) * (1 - score(logit))
        else:
            slope = slope / math.sqrt(x[0].numel())
        loss = loss + args.lambda_p * (-1 if args.penalty == "reversed" else 1) * (slope - 1).pow(2).mean()
    descend(loss, optimizers["discriminator"])
    fake = G(z)
    if args.gradient_matching:
        sides = []
        for v in (x, fake):
            logit, gradient = input_gradient(D, v)
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
    descend(loss, optimizers["generator"])
