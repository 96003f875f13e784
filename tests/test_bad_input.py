"""Bad input: an error that names the parameter, the value and the remedy, before any weight has changed."""

import re

import pytest
import torch
from reference import build_optimizer, mlp
from reference.scripted import bits, noise, random_gradients, set_gradients, state_bits

import fastsam
from fastsam import kernels

METHODS = ["SAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"]
ERRORS = (ValueError, TypeError, RuntimeError)
NAN, INF = float("nan"), float("inf")


def a_param(shape=(4, 3), dtype=torch.float64, seed=0):
    return torch.nn.Parameter(noise(shape, seed, dtype))


# ---- hyper-parameters ----------------------------------------------------------------------------

BAD_HYPER_PARAMETERS = [
    ("SAM", {"rho": -0.1}),
    ("SAM", {"rho": NAN}),
    ("SAM", {"rho": INF}),
    ("SAM", {"rho": "0.05"}),
    ("SAM", {"rho": None}),
    ("SAM", {"rho": torch.ones(2)}),
    ("SAM", {"adaptive": "yes"}),
    ("SAM", {"perturb": "no"}),
    ("FriendlySAM", {"rho": -1}),
    ("FriendlySAM", {"lmbda": -0.1}),
    ("FriendlySAM", {"lmbda": 1.0}),
    ("FriendlySAM", {"lmbda": 1.5}),
    ("FriendlySAM", {"lmbda": NAN}),
    ("FriendlySAM", {"sigma": -0.5}),
    ("FriendlySAM", {"sigma": NAN}),
    ("FriendlySAM", {"sigma": INF}),
    ("EigenSAM", {"rho": -1}),
    ("EigenSAM", {"alpha": NAN}),
    ("EigenSAM", {"alpha": INF}),
    ("EigenSAM", {"adaptive": None}),
    ("EigenSAM", {"freq": 0}),
    ("EigenSAM", {"freq": -3}),
    ("EigenSAM", {"freq": 2.5}),
]


@pytest.mark.parametrize("where", ["argument", "group", "added group"])
@pytest.mark.parametrize(("name", "bad"), BAD_HYPER_PARAMETERS, ids=str)
def test_a_hyper_parameter_out_of_range(name, bad, where):
    make = getattr(fastsam, name)
    [(key, value)] = bad.items()
    if key == "freq" and where != "argument":
        pytest.skip("freq belongs to the optimizer: an eigenvector spans all the groups")
    if key == "perturb" and where == "argument":
        pytest.skip("perturb belongs to groups")
    param = a_param()
    with pytest.raises((ValueError, TypeError), match=rf"{key}.*{re.escape(str(value))}"):
        if where == "argument":
            make([param], torch.optim.SGD, lr=0.1, **bad)
        elif where == "group":
            make([{"params": [param], **bad}], torch.optim.SGD, lr=0.1)
        else:
            optimizer = make([param], torch.optim.SGD, lr=0.1)
            try:
                optimizer.add_param_group({"params": [a_param()], **bad})
            finally:
                assert len(optimizer.param_groups) == len(optimizer.base_optimizer.param_groups) == 1


@pytest.mark.parametrize(("method", "key", "value"), [
    ("SAM", "rho", NAN), ("SAM", "rho", -1.0), ("F-SAM sigma=0.5 lmbda=0.9", "lmbda", 2.0),
    ("F-SAM sigma=0.5 lmbda=0.9", "sigma", -1.0), ("Eigen-SAM given v", "alpha", NAN), ("SAM", "adaptive", "yes"),
    ("Eigen-SAM given v", "adaptive", 0.5),
])  # fmt: skip
def test_a_group_edited_out_of_range_is_refused_by_the_next_step(backend, method, key, value):
    param = a_param()
    optimizer = build_optimizer(method, "SGD momentum", [param], backend)
    optimizer.param_groups[0][key] = value
    set_gradients([param], random_gradients([param], 1))
    start = bits([param])
    with pytest.raises((ValueError, TypeError), match=rf"{key}.*{value}"):
        optimizer.first_step()
    assert bits([param]) == start and state_bits(optimizer, [param]) == [{}]


@pytest.mark.parametrize("value", [0, 2.5, None])
def test_a_freq_edited_out_of_range_is_refused_by_the_next_step(value):
    problem = mlp()
    optimizer = build_optimizer("Eigen-SAM own v", "SGD momentum", problem.params(), "auto")
    optimizer.step(problem.closure)
    optimizer.param_groups[0]["freq"] = value
    start = bits(problem.params())
    with pytest.raises(ValueError, match=rf"freq={value}"):
        optimizer.step(problem.closure)
    assert bits(problem.params()) == start


def test_zero_rho_is_the_base_optimizer(backend):
    plain, perturbed = mlp(), mlp()
    optimizer = build_optimizer("SAM", "SGD momentum", perturbed.params(), backend, rho=0.0)
    base = torch.optim.SGD(plain.params(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(5):
        optimizer.step(perturbed.closure)
        base.zero_grad()
        base.step(plain.closure)
    torch.testing.assert_close(perturbed.weights(), plain.weights(), rtol=1e-13, atol=1e-13)


# ---- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SAM", "FriendlySAM", "EigenSAM"])
@pytest.mark.parametrize(("params", "says"), [
    (list, "empty"),
    (lambda: iter([]), "empty"),
    (lambda: [torch.zeros(3, dtype=torch.int64)], "int64"),
    (lambda: [torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))], "complex"),
    (lambda: a_param(), "iterable|Tensor"),
], ids=["empty list", "empty iterator", "integers", "complex", "a tensor"])  # fmt: skip
def test_parameters_that_cannot_be_optimised(name, params, says):
    with pytest.raises(ERRORS, match=says):
        getattr(fastsam, name)(params(), torch.optim.SGD, lr=0.1)


def test_an_integer_group_added_later_is_refused():
    optimizer = fastsam.SAM([a_param()], torch.optim.SGD, lr=0.1)
    with pytest.raises(ERRORS, match="int32"):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=torch.int32)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("base", "says"), [
    (lambda: torch.optim.SGD([a_param()], lr=0.1), "class"),
    (lambda: "SGD", "SGD"),
    (lambda: None, "base_optimizer"), (lambda: torch.optim.LBFGS, "LBFGS.*closure"),
], ids=["an instance", "a string", "None", "one that needs a closure"])  # fmt: skip
def test_a_base_optimizer_that_cannot_be_one(base, says):
    with pytest.raises(TypeError, match=says):
        fastsam.SAM([a_param()], base(), lr=0.1)


@pytest.mark.parametrize(("name", "near"), [("momentums", "momentum"), ("roh", "rho"), ("state_type", "state_dtype")])
def test_an_unknown_keyword_suggests_the_nearest_of_method_and_base_optimizer(name, near):
    with pytest.raises(TypeError, match=rf"{name}=0\.9 is an argument neither of SAM .* did you mean {near}\?"):
        fastsam.SAM([a_param()], torch.optim.SGD, lr=0.1, **{name: 0.9})


@pytest.mark.parametrize(("name", "near"), [("cpuu", "cpu"), ("torhc", "torch"), ("atuo", "auto"), ("CPU", "cpu")])
def test_an_unknown_backend_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=name) as error:
        fastsam.SAM([a_param()], torch.optim.SGD, lr=0.1, backend=name)
    assert repr(near) in str(error.value)


@pytest.mark.parametrize("name", [None, 3, ""])
def test_a_backend_that_is_no_name(name):
    with pytest.raises((ValueError, TypeError), match="backend"):
        fastsam.SAM([a_param()], torch.optim.SGD, lr=0.1, backend=name)


def test_a_device_without_float64_is_refused_with_every_backends_reason():
    with pytest.raises(RuntimeError, match=r"cannot serve torch.float32 .* mps: .*cpu: .*torch: .*MPS does not have"):
        kernels.choose("auto", torch.device("mps"), torch.float32)


def test_backends_names_each_one_and_says_why_one_is_missing():
    status = fastsam.backends()
    assert status["torch"] == "available" and "cpu" in status
    for name, reason in status.items():
        assert reason
        if reason != "available":
            with pytest.raises(RuntimeError, match=re.escape(reason)):
                fastsam.SAM([a_param()], torch.optim.SGD, lr=0.1, backend=name)


def test_two_parameters_in_one_memory_are_refused(backend):
    buffer = noise((10,), 0)
    params = [torch.nn.Parameter(buffer[:6]), torch.nn.Parameter(buffer[4:])]
    with pytest.raises(ERRORS, match="share memory"):
        optimizer = build_optimizer("SAM", "SGD", params, backend)
        set_gradients(params, random_gradients(params, 0))
        optimizer.first_step()
    assert torch.equal(buffer, noise((10,), 0))


def test_two_parameters_over_all_of_one_memory_are_refused(backend):
    buffer = noise((10,), 0)
    params = [torch.nn.Parameter(buffer), torch.nn.Parameter(buffer)]
    with pytest.raises(ERRORS, match="share memory"):
        optimizer = build_optimizer("SAM", "SGD", params, backend)
        set_gradients(params, random_gradients(params, 0))
        optimizer.first_step()
    assert torch.equal(buffer, noise((10,), 0))


@pytest.mark.parametrize("weight", [
    lambda: noise((6, 6), 0)[:, ::2], lambda: noise((1, 4), 0).expand(3, 4), lambda: noise((5, 8), 0)[:, :4],
], ids=["every second column", "expanded", "left half"])  # fmt: skip
def test_a_parameter_with_gaps_is_refused(backend, weight):
    param = torch.nn.Parameter(weight())
    start = param.detach().clone()
    with pytest.raises(ERRORS, match=r"stride.*contiguous"):
        optimizer = build_optimizer("SAM", "SGD", [param], backend)
        param.grad = torch.ones(param.shape, dtype=param.dtype)
        optimizer.first_step()
    assert torch.equal(param, start)


# ---- gradients -----------------------------------------------------------------------------------


class Posing(torch.nn.Parameter):
    """A parameter with a gradient that torch itself would not let through, as careless code can arrange."""

    fake = None

    @property
    def grad(self):
        return self.fake

    @grad.setter
    def grad(self, value):
        self.fake = value


BAD_GRADIENTS = {
    "sparse": (lambda: torch.eye(4, 3, dtype=torch.float64).to_sparse(), "sparse"),
    "complex": (lambda: torch.ones(4, 3, dtype=torch.complex128), "complex"),
    "integer": (lambda: torch.ones(4, 3, dtype=torch.int64), "int64"),
    "shape": (lambda: torch.ones(3, 4, dtype=torch.float64), r"\(3, 4\)"),
    "size": (lambda: torch.ones(4, 2, dtype=torch.float64), r"\(4, 2\)"),
    "shape, same strides and size": (lambda: torch.ones(6, 3, dtype=torch.float64)[:, :2], r"\(6, 2\)"),
    "0-dim": (lambda: torch.ones((), dtype=torch.float64), r"\(\)"),
    "dtype": (lambda: torch.ones(4, 3, dtype=torch.float32), "float32"),
    "device": (lambda: torch.ones(4, 3, dtype=torch.float64, device="meta"), "meta"),
}


@pytest.mark.parametrize("bad_pass", ["first pass", "second pass"])
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW", "RMSprop"])
@pytest.mark.parametrize("bad", BAD_GRADIENTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_does_not_fit(backend, method, bad, base, bad_pass):
    gradient, says = BAD_GRADIENTS[bad]
    params = [a_param((7,), seed=1), Posing(noise((4, 3), 0)), a_param((2, 2), seed=2)]
    optimizer = build_optimizer(method, base, params, backend)
    start, state = bits(params), state_bits(optimizer, params)
    good = random_gradients(params, 5)
    bad_gradients = [good[0], gradient(), good[2]]
    if bad_pass == "first pass":
        set_gradients(params, bad_gradients)
        with pytest.raises(ERRORS, match=says):
            optimizer.first_step()
    else:
        set_gradients(params, good)
        optimizer.first_step()
        set_gradients(params, bad_gradients)
        with pytest.raises(ERRORS, match=says):
            optimizer.second_step()
    assert bits(params) == start
    assert state_bits(optimizer, params) == state
    for step in (optimizer.first_step, optimizer.second_step):  # and training goes on
        set_gradients(params, good)
        step()
    assert bits(params) != start


def test_a_real_sparse_gradient_names_the_remedy(backend):
    embedding = torch.nn.Embedding(6, 3, sparse=True)
    optimizer = build_optimizer("SAM", "SGD", embedding.parameters(), backend)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ERRORS, match="sparse=False"):
        optimizer.first_step()


# ---- the order of calls --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_second_step_without_first_step(backend, method):
    params = [a_param()]
    optimizer = build_optimizer(method, "SGD momentum", params, backend)
    start = bits(params)
    for _ in range(2):
        set_gradients(params, random_gradients(params, 0))
        with pytest.raises(RuntimeError, match="first_step"):
            optimizer.second_step()
        assert bits(params) == start
    optimizer.first_step()
    optimizer.second_step()
    start = bits(params)
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.second_step()
    assert bits(params) == start


@pytest.mark.parametrize("method", METHODS)
def test_two_first_steps_in_a_row(backend, method):
    params, twin_params = [a_param()], [a_param()]
    optimizer, twin = (build_optimizer(method, "SGD momentum", p, backend) for p in (params, twin_params))
    for one, members in ((optimizer, params), (twin, twin_params)):
        set_gradients(members, random_gradients(members, 0))
        one.first_step()
    perturbed = bits(params)
    with pytest.raises(RuntimeError, match="second_step"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="second_step"), optimizer.perturbed():
        pass
    assert bits(params) == perturbed, "the step under way goes on"
    for one in (optimizer, twin):
        one.second_step()
    assert bits(params) == bits(twin_params)


def test_adding_a_group_between_the_passes(backend):
    params = [a_param()]
    optimizer = build_optimizer("SAM", "SGD", params, backend)
    set_gradients(params, random_gradients(params, 0))
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="second_step"):
        optimizer.add_param_group({"params": [a_param()]})
    optimizer.second_step()


# ---- the eigenvector -----------------------------------------------------------------------------

BAD_EIGENVECTORS = {
    "too few": (lambda: [noise((4, 3), 0)], "1.*2|2.*1"),
    "too many": (lambda: [noise((4, 3), 0), noise((5,), 1), noise((5,), 2)], "3.*2|2.*3"),
    "wrong shape": (lambda: [noise((3, 4), 0), noise((5,), 1)], r"\(3, 4\).*\(4, 3\)|\(4, 3\).*\(3, 4\)"),
    "flat": (lambda: [noise((12,), 0), noise((5,), 1)], r"\(12,\)"),
    "NaN": (lambda: [noise((4, 3), 0) * NAN, noise((5,), 1)], "finite"),
    "infinite": (lambda: [noise((4, 3), 0), noise((5,), 1) * INF], "finite"),
    "complex": (lambda: [noise((4, 3), 0).to(torch.complex128), noise((5,), 1)], "complex|dtype"),
    "no tensors": (lambda: [1.0, 2.0], "tensor"),
}


@pytest.mark.parametrize("bad", BAD_EIGENVECTORS)
def test_an_eigenvector_that_does_not_fit(backend, bad):
    value, says = BAD_EIGENVECTORS[bad]
    params = [a_param((4, 3)), a_param((5,), seed=1)]
    optimizer = build_optimizer("Eigen-SAM given v", "SGD", params, backend)
    optimizer.eigenvector = [noise(p.shape, 9, p.dtype) for p in params]
    before = bits(optimizer.eigenvector)
    with pytest.raises((ValueError, TypeError), match=says):
        optimizer.eigenvector = value()
    assert bits(optimizer.eigenvector) == before


def test_the_eigenvector_is_a_copy_and_can_be_forgotten(backend):
    params = [a_param((4, 3)), a_param((5,), seed=1)]
    optimizer = build_optimizer("Eigen-SAM given v", "SGD", params, backend)
    assert optimizer.eigenvector is None
    given = [noise(p.shape, 9, p.dtype) for p in params]
    optimizer.eigenvector = given
    given[0].zero_()
    assert bits(optimizer.eigenvector) == bits([noise(p.shape, 9, p.dtype) for p in params])
    optimizer.eigenvector = None
    assert optimizer.eigenvector is None


@pytest.mark.parametrize(("loss_fn", "says"), [
    (lambda p: None, "loss_fn"),
    (lambda p: p[0] * 2, "scalar"),
    (lambda p: p[0].detach().sum(), "graph|grad"),
    (lambda p: p[0].pow(2).sum() * NAN, "finite"),
], ids=["None", "no scalar", "no graph", "NaN"])  # fmt: skip
def test_a_loss_function_without_a_usable_loss(backend, loss_fn, says):
    params = [a_param((4, 3)), a_param((5,), seed=1)]
    model = torch.nn.Dropout()
    optimizer = build_optimizer("Eigen-SAM given v", "SGD", params, backend)
    optimizer.eigenvector = [noise(p.shape, 9, p.dtype) for p in params]
    before = bits(optimizer.eigenvector)
    with pytest.raises((*ERRORS, ArithmeticError), match=says):
        optimizer.update_eigenvector(lambda: loss_fn(params), model)
    assert bits(optimizer.eigenvector) == before and model.training


# ---- weights and state that do not fit -------------------------------------------------------------


def test_parameters_without_memory_are_refused(backend):
    layer = torch.nn.Linear(3, 2, device="meta")
    optimizer = fastsam.SAM(layer.parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    layer(torch.ones(1, 3, device="meta")).sum().backward()
    with pytest.raises(ValueError, match=r"meta device.*to_empty"):
        optimizer.first_step()


@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=0.5 lmbda=0.9"])
def test_the_state_of_a_weight_that_was_given_another_shape_is_refused(backend, method):
    param = a_param((1, 3))
    optimizer = build_optimizer(method, "SGD momentum", [param], backend)

    def closure():
        loss = param.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    param.data = noise((5, 3), 1, torch.float64)
    start = bits([param])
    with pytest.raises(ValueError, match=r"momentum.*\(5, 3\).*\(1, 3\)"):
        optimizer.step(closure)
    assert bits([param]) == start
