"""The L1 path beside scikit-learn's, and the conditions that every minimum meets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from llama_probe.training.sparse_regression import fit_path, largest_strength, standardize, unstandardize


def problem(rows=120, features=30, classes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator) * torch.linspace(0.5, 3, features) + 5
    x[:, 1] = x[:, 0] + 0.5 * x[:, 1]
    true = torch.zeros(classes, features)
    true[torch.arange(classes), torch.arange(classes) * 3] = 2.0
    scores = (x - 5) @ true.T + torch.randn(rows, classes, generator=generator)
    return x, scores.argmax(dim=1)


def binary(y):
    return lambda z: F.binary_cross_entropy_with_logits(z[:, 0], y.double())


def softmax(y):
    return lambda z: F.cross_entropy(z, y)


def check_minimum(x, loss, l1, weight, bias, error):
    """The conditions of a minimum, in fp64, up to an error in the slopes."""
    x, weight = x.double(), weight.double()
    z = (x @ weight.T + bias).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z)
    slope = gradient.T @ x
    assert (slope.abs() <= l1 + error).all()
    assert ((slope + l1 * weight.sign()).abs()[weight != 0] <= error).all()
    assert (gradient.sum(0).abs() <= error).all(), "the bias pays nothing"


@pytest.mark.parametrize("l1", [0.1, 0.003])
@pytest.mark.parametrize("classes", [2, 4])
def test_it_agrees_with_scikit_learn(classes, l1):
    x, y = problem(classes=classes)
    standardize(x)
    loss, outputs = (binary(y), 1) if classes == 2 else (softmax(y), classes)
    ((weight, bias),) = fit_path(x, loss, outputs, [l1], tolerance=1e-4)
    theirs = LogisticRegression(C=1 / (len(x) * l1), l1_ratio=1.0, solver="saga", max_iter=20_000, tol=1e-6)
    theirs.fit(x.numpy(), y.numpy())

    def objective(weight, bias):
        weight, bias = torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
        return float(loss(x.double() @ weight.T + bias) + l1 * weight.abs().sum())

    reached = objective(theirs.coef_, theirs.intercept_)
    assert objective(weight, bias) == pytest.approx(reached, rel=1e-3)
    if classes == 2:  # among softmax regressions, others are as good within rounding
        np.testing.assert_allclose(weight, theirs.coef_, atol=3e-3)
        np.testing.assert_allclose(bias, theirs.intercept_, atol=3e-3)


@settings(max_examples=12, deadline=None)
@given(st.integers(5, 60), st.integers(1, 200), st.integers(1, 4), st.integers(0, 1000))
def test_every_model_of_a_path_is_a_minimum(rows, features, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    standardize(x)
    y = torch.randint(0, 2, (rows, outputs), generator=generator).double()
    y[0], y[1] = 0, 1  # each label occurs

    def loss(z):
        return F.binary_cross_entropy_with_logits(z, y)

    top = largest_strength(x, loss, outputs)
    strengths = [top * share for share in (1.01, 0.5, 0.2, 0.1)]
    models = fit_path(x, loss, outputs, strengths)
    assert not models[0][0].any()
    for l1, model in zip(strengths, models, strict=True):
        check_minimum(x, loss, l1, *model, 0.02 * l1 + 1e-6)


def test_a_weak_penalty_on_features_that_are_alike():
    """As log odds of next tokens are: the promise holds where steps are smaller than fp32 can tell."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(120, 10, generator=generator)
    x = base @ torch.randn(10, 800, generator=generator) + 0.3 * torch.randn(120, 800, generator=generator)
    standardize(x)
    y = (base[:, 0] + 0.5 * torch.randn(120, generator=generator) > 0.5).double()
    strengths = [largest_strength(x, binary(y), 1) * share for share in (0.3, 0.1, 0.05, 0.03)]
    for l1, model in zip(strengths, fit_path(x, binary(y), 1, strengths), strict=True):
        check_minimum(x, binary(y), l1, *model, 1.5e-3 * l1)


def test_standardisation_can_be_undone():
    x, y = problem()
    x[:, 7] = 3.7
    raw = x.clone()
    mean, scale = standardize(x)
    torch.testing.assert_close(x.mean(0), torch.zeros(30), atol=1e-5, rtol=0)
    assert not x[:, 7].any() and scale[7] == 1
    (model,) = fit_path(x, binary(y), 1, [0.01])
    weight, bias = unstandardize(*model, mean, scale)
    torch.testing.assert_close(raw @ weight.T + bias, x @ model[0].T + model[1], atol=1e-4, rtol=1e-4)
    assert not model[0][:, 7].any()
