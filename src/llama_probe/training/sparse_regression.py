"""Linear models with few nonzero weights: a smooth convex loss plus an L1 penalty, for a path of strengths.

Accelerated proximal gradient (FISTA: Beck and Teboulle, 2009) with restarts (O'Donoghue and Candes, arXiv 1204.3982), on the
few features alone that matter, a working set that grows (as in Massias et al., arXiv 1802.07481): far more features than
rows cost little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


_GROWTH = 64
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
        """Weight and bias for features as they were before `standardize`."""
        weight = self.weight / scale
        return weight, (self.bias.double() - weight.double() @ mean.double()).float()


def standardize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the columns of `[rows, features]` mean 0 and standard deviation 1, in place; constant ones become 0.

    Returns:
        Mean and standard deviation of each, `[features]`; 1 for constant ones.
    """
    mean = x.mean(dim=0)
    x -= mean
    scale = x.square().mean(dim=0).sqrt()
    # what rounding leaves of a constant is no feature
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
    """The minima of `loss(x weight^T + bias) + l1 * sum |weight|`, the biases free of the penalty.

    Args:
        x (`torch.FloatTensor` of shape `[rows, features]`): standardised.
        loss: mean loss over the rows of fp64 outputs `[rows, outputs]`; smooth and convex.
        strengths: of the penalty, descending: each starts from the one before.
        tolerance: the gradient of every weight meets the conditions of a minimum to this share of the strength, where
            `max_iterations` suffice: of features that hardly differ they may not.
        max_iterations: of each strength and set of features.

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
            # Of the features that would lower the loss by more than they cost, the steepest are taken in.
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
    """The smallest strength at which all weights are zero, for `fit_path`'s arguments."""
    weight, bias = x.new_zeros(outputs, x.shape[1]), x.new_zeros(outputs)
    _, bias = _minimize(x[:, :0], loss, weight[:, :0], bias, 0.0, 1e-4, 1000)
    return float(_slope(x, loss, weight, bias).abs().max())


def _value_and_gradient(loss: Loss, z: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Of the loss in the outputs `[rows, outputs]`."""
    z = z.double().requires_grad_()
    with torch.enable_grad():
        value = loss(z)
        (gradient,) = torch.autograd.grad(value, z)
    return float(value.detach()), gradient


def _slope(x: torch.Tensor, loss: Loss, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Gradient of the loss in each weight: `[outputs, features]`."""
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
    """FISTA from a starting point, over all columns of `x`.

    In fp64: in fp32 the steps are lost in rounding where the features are alike and the penalty is weak, far from a minimum.
    """
    dtype = x.dtype
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1).double()  # the last weight is the bias
    current = torch.cat([weight, bias[:, None]], dim=1).double()
    limit = torch.full((x.shape[1],), l1, dtype=x.dtype)
    limit[-1] = 0.0
    # Logistic losses curve by at most 1/4 an output and 1/2 a softmax. Where that is too little, steps get shorter.
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
            still = not float(step.abs().max()) > 1e-12 * (1 + float(point.abs().max()))  # or not a number
            if still or float(loss(z_new)) <= bound + 1e-6 * abs(value):
                break
            curvature *= 2
        # at a minimum, or as close as fp64 goes
        done = still or float(step.abs().max()) * curvature <= enough
        if float((step * (new - current)).sum()) < 0:  # the momentum leads away from the minimum
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
    """Of `x^T x`, by power iteration from a fixed start: close from below."""
    vector = torch.randn(x.shape[1], dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    value = 1.0
    for _ in range(iterations):
        vector = x.T @ (x @ vector)
        value = float(vector.norm())
        vector = vector / max(value, 1e-30)
    return value
