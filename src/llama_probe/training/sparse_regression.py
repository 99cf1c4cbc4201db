"""Linear models with few nonzero weights: a smooth convex loss plus an L1 penalty, for a path of strengths.

The solver is L-BFGS-B on a growing working set of features (Massias et al., arXiv 1802.07481). Features far outnumber rows here.
scikit-learn has no such solver for a loss with class weights, label smoothing or several labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, minimize


_GROWTH = 64  # features that join the working set at least
_ITERATIONS = 2000  # for each strength and working set
Loss = Callable[[torch.Tensor], torch.Tensor]


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


def unstandardize(
    weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias for features before `standardize`, which has returned `mean` and `scale`."""
    weight = weight / scale
    return weight, (bias.double() - weight.double() @ mean.double()).float()


def fit_path(
    x: torch.Tensor, loss: Loss, outputs: int, strengths: Sequence[float], tolerance: float = 1e-3
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Minimise `loss(x weight^T + bias) + l1 * sum |weight|` for each strength. Biases have no penalty.

    Args:
        x (`torch.FloatTensor` of shape `[rows, features]`): standardised features.
        loss: mean loss over the rows of fp64 outputs `[rows, outputs]`; smooth and convex.
        strengths: strengths of the penalty, descending: each fit starts from the one before.
        tolerance: allowed error of the conditions of a minimum, as a share of the strength. Nearly equal features may need
            more than `_ITERATIONS`.

    Returns:
        Weight `[outputs, features]` and bias `[outputs]` for each strength.
    """
    weight, bias = x.new_zeros(outputs, x.shape[1]), x.new_zeros(outputs)
    _, bias = _minimize(x[:, :0], loss, weight[:, :0], bias, 0.0, tolerance)
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
            weight[:, columns], bias = _minimize(x[:, columns], loss, weight[:, columns], bias, l1, tolerance)
            steepest = _slope(x, loss, weight, bias).abs().amax(dim=0)
            solved = True
        found.append((weight.clone(), bias.clone()))
    return found


def largest_strength(x: torch.Tensor, loss: Loss, outputs: int) -> float:
    """Return the smallest strength at which all weights are zero. The arguments are those of `fit_path`."""
    weight, bias = x.new_zeros(outputs, x.shape[1]), x.new_zeros(outputs)
    _, bias = _minimize(x[:, :0], loss, weight[:, :0], bias, 0.0, 1e-4)
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
    x: torch.Tensor, loss: Loss, weight: torch.Tensor, bias: torch.Tensor, l1: float, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run L-BFGS-B over all columns of `x`, from a starting point, in fp64.

    A weight is the difference of two numbers of at least 0, so that the penalty is linear.
    """
    x64, shape, count = x.double(), weight.shape, weight.numel()

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        positive, negative, biases = torch.from_numpy(values).split([count, count, len(bias)])
        value, gradient = _value_and_gradient(loss, x64 @ (positive - negative).view(shape).T + biases)
        slope = (gradient.T @ x64).flatten()
        penalty = l1 * float(values[: 2 * count].sum())
        return value + penalty, torch.cat([l1 + slope, l1 - slope, gradient.sum(dim=0)]).numpy()

    given = torch.cat([weight.clamp_min(0.0).flatten(), (-weight).clamp_min(0.0).flatten(), bias])
    lowest = np.where(np.arange(len(given)) < 2 * count, 0.0, -np.inf)
    enough = tolerance * (l1 or 1e-2)
    options = {"gtol": enough, "ftol": 0.0, "maxiter": _ITERATIONS}
    found = minimize(
        objective, given.double().numpy(), jac=True, method="L-BFGS-B", bounds=Bounds(lowest), options=options
    )
    positive, negative, biases = torch.from_numpy(found.x).to(x.dtype).split([count, count, len(bias)])
    slopes = torch.from_numpy(found.jac)
    # At a minimum these weights are 0; the solver may leave a trace of them.
    is_zero = (slopes[:count] > enough) & (slopes[count : 2 * count] > enough)
    return torch.where(is_zero, 0.0, positive - negative).view(shape), biases
