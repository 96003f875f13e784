"""SAM-ON: which parameters are perturbed, and that nothing else is."""

import pytest
import torch
from torch import nn

import fastsam


class RMSNormOfTheirs(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.scale * x / x.square().mean(-1, keepdim=True).sqrt()


class PreNorm(nn.Module):
    """A block that is named after the layer inside it."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(self.norm(x))


class NormalizedLinear(nn.Linear):
    pass


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), PreNorm(), RMSNormOfTheirs(), NormalizedLinear(4, 3))


def test_the_first_group_has_what_normalisation_layers_hold_themselves_and_the_second_the_rest():
    model = network()
    names = {id(p): name for name, p in model.named_parameters()}
    norms, others = fastsam.norm_only_groups(model, rho=0.5, weight_decay=0.0)
    assert [names[id(p)] for p in norms.pop("params")] == [
        "1.weight",
        "1.bias",
        "2.norm.weight",
        "2.norm.bias",
        "3.scale",
    ]
    assert norms == {"rho": 0.5, "weight_decay": 0.0}
    rest = ["0.weight", "0.bias", "2.inner.weight", "2.inner.bias", "4.weight", "4.bias"]
    assert [names[id(p)] for p in others.pop("params")] == rest
    assert others == {"perturb": False}


@pytest.mark.parametrize("method", ["SAM", "GSAM"])
def test_only_they_move_between_the_passes_by_a_radius_of_their_own(backend, method):
    model = network()
    groups = fastsam.norm_only_groups(model)
    optimizer = getattr(fastsam, method)(groups, torch.optim.SGD, rho=0.3, lr=0.1, backend=backend)
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    before = [[p.detach().clone() for p in group["params"]] for group in groups]
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = torch.cat([p.grad for p in groups[0]["params"]])
    optimizer.first_step(zero_grad=True)
    moved = torch.cat([p.detach() - w for p, w in zip(groups[0]["params"], before[0], strict=True)])
    torch.testing.assert_close(moved, 0.3 * gradient / gradient.norm(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, w) for p, w in zip(groups[1]["params"], before[1], strict=True))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.second_step()
    updated = [not torch.equal(p, w) for p, w in zip(groups[1]["params"], before[1], strict=True) if p.dim() == 2]
    assert updated == [True] * 3  # a bias before a BatchNorm has no gradient


def test_a_model_of_normalisation_layers_has_one_group():
    assert len(fastsam.norm_only_groups(nn.LayerNorm(4))) == 1


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (
            nn.Linear(2, 2),
            ValueError,
            "Linear has no parameters of normalisation layers to perturb, as it has no normal",
        ),
        (nn.BatchNorm1d(2, affine=False), ValueError, "its 1 normalisation layers have none: perturb all"),
        ([torch.ones(2)], TypeError, "must be a torch.nn.Module"),
    ],
    ids=["no layer", "no parameters", "no module"],
)
def test_nothing_to_perturb_is_refused(model, error, words):
    with pytest.raises(error, match=words):
        fastsam.norm_only_groups(model)
