"""The eight methods of table 2 as plain eager PyTorch for one seed: nn.Sequential, autograd with double backward,
torch.optim.Adam. Written from the papers and independent of gngan_synthetic.py: slow, and meant to be obviously
right. The tests compare the script's steps with these; the benchmark compares its speed with `gngan`."""
import torch
from torch import nn
from torch.nn import functional as F


class Reference:
    """Networks and optimisers of one seed, starting from the script's weights ({network: {"w0": [in, out], ...}})."""

    def __init__(self, args, networks):
        self.args = args
        self.nets = {name: self.build(params) for name, params in networks.items()}
        self.optimisers = {}

    def weights(self):
        """The networks' weights as the script lays them out, averages left out."""
        layers = {name: [m for m in net if isinstance(m, nn.Linear)] for name, net in self.nets.items()
                  if name != "generator_ema"}
        return {name: {**{f"w{k}": linear.weight.T for k, linear in enumerate(linears)},
                       **{f"b{k}": linear.bias for k, linear in enumerate(linears)}}
                for name, linears in layers.items()}

    @staticmethod
    def build(params):
        layers = []
        for k in range(len(params) // 2):
            linear = nn.Linear(*params[f"w{k}"].shape, dtype=params[f"w{k}"].dtype)
            with torch.no_grad():
                linear.weight.copy_(params[f"w{k}"].T)
                linear.bias.copy_(params[f"b{k}"])
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def G(self, z):
        out = self.nets["generator"](z)
        return torch.sigmoid(out) if self.args.dim == 2 else out

    def E(self, x):
        return self.nets["encoder"](x)

    def logit(self, x):
        return self.nets["discriminator"](x)[:, 0]

    def D(self, x):
        return torch.sigmoid(self.logit(x))

    def log_D(self, x):
        return F.logsigmoid(self.logit(x))

    def log_not_D(self, x):  # log(1 - D(x))
        return F.logsigmoid(-self.logit(x))

    def features(self, x):
        return self.nets["discriminator"][:-1](x)

    def posterior(self, x, noise):
        mean, log_var = self.E(x).chunk(2, 1)
        return mean + torch.exp(log_var / 2) * noise, mean, log_var

    def penalty(self, x, fake, mix):
        point = (mix * x + (1 - mix) * fake).detach().requires_grad_()
        out = self.D(point) if self.args.penalty == "score" else self.logit(point)
        grad, = torch.autograd.grad(out.sum(), point, create_graph=True)
        slope = grad.norm(dim=1)  # its derivative at 0, where units are dead, is 0
        if self.args.penalty == "rms":
            slope = slope / x.shape[1] ** 0.5
        return ((slope - 1) ** 2).mean()

    def score_gradient(self, x):
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        score = self.D(x)
        grad, = torch.autograd.grad(score.sum(), x, create_graph=True)
        return score, grad

    def minimise(self, loss, *names):
        """A step of each named Adam; each has its network's name, but for `reconstruction`, G's second."""
        nets = [self.nets["generator" if name == "reconstruction" else name] for name in names]
        parameters = [p for net in nets for p in net.parameters()]
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.grad = g
        for name, net in zip(names, nets):
            if name not in self.optimisers:
                betas = (self.args.beta1, self.args.beta2)
                self.optimisers[name] = torch.optim.Adam(net.parameters(), self.args.lr, betas)
            self.optimisers[name].step()

    def autoencoder_step(self, loss):
        self.minimise(loss, *{"both": ["encoder", "generator"], "encoder": ["encoder"],
                              "separate": ["encoder", "reconstruction"]}[self.args.autoencoder_updates])

    def step(self, x, z, mix, noise):
        """One iteration; x, z, noise [K, B, dim], mix [K, B, 1], with K updates of D."""
        methods = {"gngan": self.gngan, "distgan": self.distgan, "gan": self.gan, "wgangp": self.wgangp,
                   "ali": self.ali, "vaegan": self.vaegan, "vae": self.vae, "betavae": self.betavae}
        methods[self.args.method](x, z, mix, noise)

    # each method

    def gngan(self, x, z, mix, noise):
        a = self.args
        self.autoencoder_step(((x[0] - self.G(self.E(x[0]))) ** 2).mean())
        for xk, zk, mk in zip(x, z, mix):
            with torch.no_grad():
                reconstruction, fake = self.G(self.E(xk)), self.G(zk)
            v_d = ((1 - a.alpha) * self.log_D(xk).mean() + a.alpha * self.log_D(reconstruction).mean()
                   + self.log_not_D(fake).mean() - a.lambda_p * self.penalty(xk, fake, mk))
            self.minimise(-v_d, "discriminator")
        x, z = x[0], z[0]
        fake = self.G(z)
        (score_x, grad_x), (score_f, grad_f) = self.score_gradient(x), self.score_gradient(fake)
        v_g = (score_x.mean() - score_f.mean()).abs()
        v_g = v_g + a.lambda_m1 * (grad_x.norm(dim=1).mean() - grad_f.norm(dim=1).mean()) ** 2
        v_g = v_g + a.lambda_m2 * ((grad_x * x).sum(1).abs().mean() - (grad_f * fake).sum(1).abs().mean()) ** 2
        self.minimise(v_g, "generator")

    def distgan(self, x, z, mix, noise):
        a = self.args
        code, fake = self.E(x[0]), self.G(z[0])
        reconstruction = self.G(code)
        if a.dim == 2:
            error = F.binary_cross_entropy(reconstruction, x[0])
            data = (reconstruction - fake).mean()
        else:
            error = ((x[0] - reconstruction) ** 2).sum(1).mean()
            data = (x[0] - fake).mean()
        self.autoencoder_step(error + a.lambda_r * (data - (code - z[0]).mean()) ** 2)
        for xk, zk, mk in zip(x, z, mix):
            with torch.no_grad():
                reconstruction, fake = self.G(self.E(xk)), self.G(zk)
            reals = 0.5 * self.log_D(xk).mean() + 0.5 * self.log_D(reconstruction).mean()
            loss = -reals - self.log_not_D(fake).mean() + a.lambda_p * self.penalty(xk, fake, mk)
            self.minimise(loss, "discriminator")
        self.minimise((self.D(x[0]).mean() - self.D(self.G(z[0])).mean()).abs(), "generator")

    def gan(self, x, z, mix, noise):
        s = self.args.label_smoothing
        for xk, zk in zip(x, z):
            fake = self.G(zk).detach()
            loss = -(1 - s) * self.log_D(xk).mean() - s * self.log_not_D(xk).mean() - self.log_not_D(fake).mean()
            self.minimise(loss, "discriminator")
        self.minimise(-self.log_D(self.G(z[0])).mean(), "generator")

    def wgangp(self, x, z, mix, noise):
        for xk, zk, mk in zip(x, z, mix):
            fake = self.G(zk).detach()
            loss = self.logit(fake).mean() - self.logit(xk).mean() + self.args.lambda_p * self.penalty(xk, fake, mk)
            self.minimise(loss, "discriminator")
        self.minimise(-self.logit(self.G(z[0])).mean(), "generator")

    def ali(self, x, z, mix, noise):
        s = self.args.label_smoothing
        for xk, zk, nk in zip(x, z, noise):
            encoded, generated = torch.cat([xk, self.posterior(xk, nk)[0]], 1), torch.cat([self.G(zk), zk], 1)
            loss = -(1 - s) * self.log_D(encoded).mean() - s * self.log_not_D(encoded).mean()
            loss = loss - self.log_not_D(generated).mean()
            self.minimise(loss, "discriminator")
        encoded, generated = torch.cat([x[0], self.posterior(x[0], noise[0])[0]], 1), torch.cat([self.G(z[0]), z[0]], 1)
        loss = -self.log_not_D(encoded).mean() - self.log_D(generated).mean()
        self.minimise(loss, "encoder", "generator")

    def kl(self, mean, log_var):
        variance = torch.exp(log_var)
        return (0.5 * (variance + mean**2 - 1 - torch.log(variance))).sum(1).mean()

    def vaegan(self, x, z, mix, noise):
        a = self.args
        code, mean, log_var = self.posterior(x[0], noise[0])

        def feature(y):
            return 0.5 * ((self.features(x[0]) - self.features(y)) ** 2).sum(1).mean()

        self.minimise(a.vaegan_kl * self.kl(mean, log_var) + feature(self.G(code)), "encoder")
        reconstruction = self.G(self.posterior(x[0], noise[0])[0])
        loss = a.vaegan_gamma * feature(reconstruction)
        loss = loss - self.log_D(reconstruction).mean() - self.log_D(self.G(z[0])).mean()
        self.minimise(loss, "generator")
        for xk, zk, nk in zip(x, z, noise):
            reconstruction, fake = self.G(self.posterior(xk, nk)[0]).detach(), self.G(zk).detach()
            loss = -self.log_D(xk).mean() - self.log_not_D(reconstruction).mean() - self.log_not_D(fake).mean()
            self.minimise(loss, "discriminator")

    def vae(self, x, z, mix, noise, beta=1.0):
        code, mean, log_var = self.posterior(x[0], noise[0])
        likelihood = torch.distributions.Normal(self.G(code), self.args.vae_sigma)
        negative = -likelihood.log_prob(x[0]).sum(1).mean()
        self.minimise(negative + beta * self.kl(mean, log_var), "encoder", "generator")

    def betavae(self, x, z, mix, noise):
        self.vae(x, z, mix, noise, self.args.vae_beta)
