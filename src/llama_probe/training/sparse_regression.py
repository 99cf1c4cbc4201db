"""Linear models with few nonzero weights: a smooth convex loss plus an L1 penalty, for a path of strengths.

The solver is accelerated proximal gradient (FISTA: Beck and Teboulle, 2009) with restarts (O'Donoghue and Candes, arXiv
1204.3982) on a growing working set of features (Massias et al., arXiv 1802.07481). Features far outnumber rows here.
scikit-learn has no such solver for a loss with class weights, label smoothing or several labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


_GROWTH = 64  # features that join the working set at least
Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class SparseModel:
    """outputs = x weight^T + bias, for standardised features x.

    Attributes:
        l1: strength of the penalty.
        weight (`torch.FloatTensor` of shape `[outputs, features]`), bias (`[outputs]`).
    """

    l1: float
    weight: torch.Tensor
    bias: torch.Tensor

    def unstandardized(self, mean: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias for features before `standardize`."""
        weight = self.weight / scale
        return weight, (self.bias.double() - weight.double() @ mean.double()).float()


def standardize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the columns of `[rows, features]` mean 0 and standard deviation 1, in place. Constant columns become 0.

    Returns:
        Mean and standard deviation `[features]`; the latter is 1 for constant columns.
    """
    mean = x.mean(dim=0)
    x -= mean
    scale = x.square().mean(dim=0).sqrt()
    # Rounding makes a constant column look as if it varied.
    constant = scale <= 1e-6 * mean.abs().clamp_min(1.0)
    scale[constant] = 1.0
    x[:, constant] = 0.0
    x /= scale
    return mean, scale


def fit_path(
    x: torch.Tensor,
    loss: Loss,
    outputs: int,
    strengths: Sequence[float],
    tolerance: float = 1e-3,
    max_iterations: int = 2000,
) -> list[SparseModel]:
    """Minimise `loss(x weight^T + bias) + l1 * sum |weight|` for each strength. Biases have no penalty.

    Args:
        x (`torch.FloatTensor` of shape `[rows, features]`): standardised features.
        loss: mean loss over the rows of fp64 outputs `[rows, outputs]`; smooth and convex.
        strengths: strengths of the penalty, descending: each fit starts from the one before.
        tolerance: allowed error of the conditions of a minimum, as a share of the strength. Nearly equal features may need
            more than `max_iterations`.
        max_iterations: iterations for each strength and working set.

    Returns:
        One model a strength.
    """
    weight, bias = x.new_zeros(outputs, x.shape[1]), x.new_zeros(outputs)
    _, bias = _minimize(x[:, :0], loss, weight[:, :0], bias, 0.0, tolerance, max_iterations)
    steepest = _slope(x, loss, weight, bias).abs().amax(dim=0)  # [features]
    found = []
    for l1 in strengths:
        active = (weight != 0).any(dim=0)
        solved = False
        while True:
            # Add the steepest of the features that would lower the loss by more than their penalty.
            missed = torch.where(active, 0.0, steepest)
            count = int((missed > l1 * (1 + tolerance)).sum())
            if solved and not count:
                break
            active[missed.topk(min(count, max(_GROWTH, int(active.sum())))).indices] = True
            columns = active.nonzero().flatten()
            weight[:, columns], bias = _minimize(
                x[:, columns], loss, weight[:, columns], bias, l1, tolerance, max_iterations
            )
            steepest = _slope(x, loss, weight, bias).abs().amax(dim=0)
            solved = True
        found.append(SparseModel(l1, weight.clone(), bias.clone()))
    return found


def largest_strength(x: torch.Tensor, loss: Loss, outputs: int) -> float:
    """Return the smallest strength at which all weights are zero. The arguments are those of `fit_path`."""
    weight, bias = x.new_zeros(outputs, x.shape[1]), x.new_zeros(outputs)
    _, bias = _minimize(x[:, :0], loss, weight[:, :0], bias, 0.0, 1e-4, 1000)
    return float(_slope(x, loss, weight, bias).abs().max())


def _value_and_gradient(loss: Loss, z: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the loss of outputs `[rows, outputs]` and its gradient."""
    z = z.double().requires_grad_()
    with torch.enable_grad():
        value = loss(z)
        (gradient,) = torch.autograd.grad(value, z)
    return float(value.detach()), gradient


def _slope(x: torch.Tensor, loss: Loss, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the loss in each weight: `[outputs, features]`."""
    used = (weight != 0).any(dim=0)
    _, gradient = _value_and_gradient(loss, x[:, used] @ weight[:, used].T + bias)
    return gradient.T.to(x.dtype) @ x


def _minimize(
    x: torch.Tensor,
    loss: Loss,
    weight: torch.Tensor,
    bias: torch.Tensor,
    l1: float,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run FISTA over all columns of `x`, from a starting point.

    It runs in fp64: with similar features and a weak penalty, steps in fp32 vanish in rounding far from a minimum.
    """
    dtype = x.dtype
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1).double()  # the last weight is the bias
    current = torch.cat([weight, bias[:, None]], dim=1).double()
    limit = torch.full((x.shape[1],), l1, dtype=x.dtype)
    limit[-1] = 0.0
    # The curvature of a logistic loss is at most 1/4, of a softmax 1/2. Backtracking below raises it.
    curvature = 0.25 * _largest_eigenvalue(x) / len(x)
    enough = tolerance * (l1 or 1e-2)
    z = x @ current.T
    point, z_point, momentum = current, z, 1.0
    for _ in range(max_iterations):
        value, gradient = _value_and_gradient(loss, z_point)
        slope = gradient.T @ x
        while True:
            moved = point - slope / curvature
            new = moved.sign() * (moved.abs() - limit / curvature).clamp_min(0.0)
            step = new - point
            z_new = x @ new.T
            bound = value + float((slope * step).sum() + curvature / 2 * step.square().sum())
            still = not float(step.abs().max()) > 1e-12 * (1 + float(point.abs().max()))  # or NaN
            if still or float(loss(z_new)) <= bound + 1e-6 * abs(value):
                break
            curvature *= 2
        # A minimum, or as close as fp64 gets.
        done = still or float(step.abs().max()) * curvature <= enough
        if float((step * (new - current)).sum()) < 0:  # the momentum points away from the minimum
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = (momentum - 1) / following
        point, z_point = new + ahead * (new - current), z_new + ahead * (z_new - z)
        current, z, momentum = new, z_new, following
        if done:
            break
    current = current.to(dtype)
    return current[:, :-1], current[:, -1]


def _largest_eigenvalue(x: torch.Tensor, iterations: int = 15) -> float:
    """Estimate the largest eigenvalue of `x^T x` from below, by power iteration from a fixed start."""
    vector = torch.randn(x.shape[1], dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    value = 1.0
    for _ in range(iterations):
        vector = x.T @ (x @ vector)
        value = float(vector.norm())
        vector = vector / max(value, 1e-30)
    return value
