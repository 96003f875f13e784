"""SAM, ASAM, F-SAM and Eigen-SAM as their authors' training loops have them.

Every loop does the same three things: find the perturbation e from the gradients of the first pass, move the
weights to w + e, and after the second pass put w back and let a plain torch optimizer step. They differ in
`perturbations` alone.
"""

import torch

TINY = 1e-12  # added to every norm before it divides


def total_norm(tensors):
    """The Euclidean norm of all the tensors laid end to end."""
    return torch.sqrt(sum((t.square().sum() for t in tensors), torch.zeros((), dtype=torch.float64)))


class ReferenceSAM:
    """e = rho g / |g| (Foret et al. 2021), or with `adaptive` e = rho w^2 g / ||w| g| (Kwon et al. 2021)."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **base_kwargs):
        self.base_optimizer = base_optimizer(params, **base_kwargs)
        self.hyper = {"rho": rho, "adaptive": adaptive, "perturb": True}
        self.backup = {}

    def setting(self, group, name):
        """A group's own value of a hyper-parameter, or the one that the loop was built with.

        What the base optimizer calls by the same name (RMSprop's alpha) belongs to the base optimizer.
        """
        return self.hyper[name] if name in self.base_optimizer.defaults else group.get(name, self.hyper[name])

    @property
    def param_groups(self):
        return self.base_optimizer.param_groups

    def zero_grad(self):
        self.base_optimizer.zero_grad()

    @torch.no_grad()
    def first_step(self):
        climbing = [
            (group, p)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and self.setting(group, "perturb")
        ]
        for (group, p), e in zip(climbing, self.perturbations(climbing), strict=True):
            self.backup[p] = p.detach().clone()
            p.add_(e, alpha=-1 if group.get("maximize") else 1)  # the worst point of the other objective

    @torch.no_grad()
    def second_step(self):
        for p, weight in self.backup.items():
            p.copy_(weight)
        self.backup.clear()
        self.base_optimizer.step()

    def directions(self, climbing):
        return [p.grad for _, p in climbing]

    def perturbations(self, climbing):
        directions = self.directions(climbing)
        scaled = [
            d * p.abs() if self.setting(group, "adaptive") else d
            for (group, p), d in zip(climbing, directions, strict=True)
        ]
        norm = total_norm(scaled) + TINY
        return [
            d * (p.square() if self.setting(group, "adaptive") else 1.0) * (self.setting(group, "rho") / norm)
            for (group, p), d in zip(climbing, directions, strict=True)
        ]


class ReferenceFriendlySAM(ReferenceSAM):
    """SAM along d = g - sigma * m, with m the running mean of the gradients so far (Li et al. 2024).

    A parameter's first gradient starts its m and is used whole as its direction.
    """

    def __init__(self, params, base_optimizer, rho=0.05, sigma=1.0, lmbda=0.9, adaptive=False, **base_kwargs):
        super().__init__(params, base_optimizer, rho, adaptive, **base_kwargs)
        self.hyper.update(sigma=sigma, lmbda=lmbda)
        self.momentum = {}

    def directions(self, climbing):
        directions = []
        for group, p in climbing:
            sigma, lmbda = self.setting(group, "sigma"), self.setting(group, "lmbda")
            g, m = p.grad, self.momentum.get(p)
            directions.append(g.clone() if m is None else g - sigma * m)
            self.momentum[p] = g.clone() if m is None else lmbda * m + (1 - lmbda) * g
        return directions


class ReferenceEigenSAM(ReferenceSAM):
    """SAM whose unit direction is bent towards the Hessian's leading eigenvector v (Luo et al. 2024).

    With u = g / |g| and s = sign<g, v>, the perturbation is rho * (u + alpha * s * (v - <u, v> u)). Its
    length is left as it comes out, and `adaptive` multiplies it by w^2. Until a v is known the step is SAM's.
    """

    def __init__(self, params, base_optimizer, rho=0.05, alpha=0.2, freq=100, adaptive=False, **base_kwargs):
        super().__init__(params, base_optimizer, rho, adaptive, **base_kwargs)
        self.hyper.update(alpha=alpha)
        self.freq, self.steps, self.eigenvector = freq, 0, None

    def eigenvector_due(self):
        return self.steps > 0 and self.steps % self.freq == 0

    def second_step(self):
        super().second_step()
        self.steps += 1

    def perturbations(self, climbing):
        if self.eigenvector is None:
            return super().perturbations(climbing)
        directions = self.directions(climbing)
        place = {p: i for i, p in enumerate(q for group in self.param_groups for q in group["params"])}
        v = [self.eigenvector[place[p]] for _, p in climbing]
        norm = total_norm(directions) + TINY
        alignment = sum((a * b).sum() for a, b in zip(directions, v, strict=True))
        result = []
        for (group, p), d, v_part in zip(climbing, directions, v, strict=True):
            u = d / norm
            orthogonal = v_part - (alignment / norm) * u
            alpha, rho = self.setting(group, "alpha"), self.setting(group, "rho")
            e = rho * (u + alpha * alignment.sign() * orthogonal)
            result.append(e * p.square() if self.setting(group, "adaptive") else e)
        return result

    def update_eigenvector(self, loss_fn, model, power_steps=5):
        """Power iteration on the Hessian in eval mode, from the previous vector or from normal noise."""
        params = [p for group in self.param_groups for p in group["params"]]
        v = self.eigenvector or [torch.randn_like(p) for p in params]
        model.eval()
        gradients = torch.autograd.grad(loss_fn(), params, create_graph=True)
        for _ in range(power_steps):
            product = torch.autograd.grad(gradients, params, grad_outputs=v, retain_graph=True)
            length = torch.sqrt(sum(h.square().sum() for h in product) + TINY)
            v = [h / length for h in product]
        model.train()
        self.eigenvector = v


class ReferenceFriendlyEigenSAM(ReferenceEigenSAM, ReferenceFriendlySAM):
    """Eigen-SAM along F-SAM's direction: a combination without authors."""

    def __init__(self, params, base_optimizer, rho=0.05, sigma=1.0, lmbda=0.9, alpha=0.2, freq=100, **kwargs):
        ReferenceFriendlySAM.__init__(self, params, base_optimizer, rho, sigma, lmbda, **kwargs)
        self.hyper.update(alpha=alpha)
        self.freq, self.steps, self.eigenvector = freq, 0, None
