"""Compares tensors by largest difference and by relative norm; every failure names the tensor and gives both figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

import torch
from torch import Tensor

Comparable = Union[Tensor, None, Sequence["Comparable"], Mapping[str, "Comparable"]]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64 (Frobenius norm over all elements).

    Args:
        actual, expected: tensors of one shape, any dtype, any device. Infinities that agree count as no difference.

    Returns:
        the quotient; 0 when both are equal, ``inf`` when only ``expected`` is zero, ``nan`` when either holds a NaN.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ: compare tensors of one shape")
    difference, reference = _difference(actual, expected)
    error = difference.norm().item()
    scale = torch.where(reference.isinf(), 0.0, reference).norm().item()
    if error == 0.0 or scale > 0.0:
        return error / scale if error != 0.0 else 0.0
    return error if error != error else float("inf")


def assert_close(
    actual: Comparable,
    expected: Comparable,
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    max_relative_error: float | None = None,
    name: str = "tensor",
) -> None:
    """Fail unless ``actual`` agrees with ``expected``; without any tolerance they must be equal.

    Two criteria, either or both: elementwise ``|a - b| <= atol + rtol * |b|`` (checked when ``rtol`` or ``atol`` is given,
    or when no tolerance is), and ``‖a - b‖ <= max_relative_error * ‖b‖`` over the whole tensor. All arithmetic is in
    float64; dtypes and devices may differ. A NaN on either side fails, infinities must agree in place and sign.

    Args:
        actual: a tensor of any shape, None (a missing gradient), or a list, tuple or mapping of these.
        expected: the same structure.
        rtol, atol: elementwise tolerances.
        max_relative_error: bound on the relative norm of the difference.
        name: what is compared; entries of a structure are named ``name[key]``.

    Raises:
        AssertionError: one line for every tensor that differs, with its largest difference and relative error.
    """
    failures = _compare(actual, expected, rtol, atol, max_relative_error, name)
    if failures:
        raise AssertionError("\n".join(failures))


def _compare(
    actual: Comparable, expected: Comparable, rtol: float, atol: float, max_relative: float | None, name: str
) -> list[str]:
    """Failure lines of a whole structure, so that one report shows everything that is off."""
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        return _compare_tensors(actual, expected, rtol, atol, max_relative, name)
    if actual is None and expected is None:
        return []
    if isinstance(actual, Mapping) and isinstance(expected, Mapping):
        if set(actual) != set(expected):
            only = sorted(map(str, set(actual) ^ set(expected)))
            return [f"{name}: the keys differ; only on one side: {', '.join(only)}"]
        pairs = [(key, actual[key], expected[key]) for key in expected]
    elif isinstance(actual, (list, tuple)) and isinstance(expected, (list, tuple)):
        if len(actual) != len(expected):
            return [f"{name}: {len(actual)} entries, expected {len(expected)}"]
        pairs = [(index, a, b) for index, (a, b) in enumerate(zip(actual, expected))]
    else:
        return [f"{name}: got {type(actual).__name__}, expected {type(expected).__name__}"]
    return [line for key, a, b in pairs for line in _compare(a, b, rtol, atol, max_relative, f"{name}[{key}]")]


def _compare_tensors(
    actual: Tensor, expected: Tensor, rtol: float, atol: float, max_relative: float | None, name: str
) -> list[str]:
    if actual.shape != expected.shape:
        return [f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"]
    if actual.numel() == 0:
        return []
    for side, tensor in (("actual", actual), ("expected", expected)):
        if tensor.is_floating_point() and (nans := int(tensor.isnan().sum())):
            return [f"{name}: {nans} of {tensor.numel()} elements of the {side} tensor are NaN"]
    difference, reference = _difference(actual, expected)
    tolerance = torch.where(reference.isinf(), 0.0, atol + rtol * reference)
    outside = difference > tolerance
    relative = relative_error(actual, expected)
    elementwise = max_relative is None or rtol > 0.0 or atol > 0.0
    too_far = elementwise and bool(outside.any())
    too_much = max_relative is not None and not relative <= max_relative
    if not (too_far or too_much):
        return []
    worst = int(difference.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
    line = (
        f"{name} {tuple(actual.shape)}: largest difference {difference.flatten()[worst].item():.3e} at {where}"
        f" ({actual.flatten()[worst].item():.6g}, expected {expected.flatten()[worst].item():.6g}),"
        f" relative error {relative:.3e}"
    )
    if too_far:
        line += f"; {int(outside.sum())} of {actual.numel()} elements outside rtol={rtol:g}, atol={atol:g}"
    if too_much:
        line += f"; relative error above {max_relative:g}"
    return [line]


def _difference(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """``(|a - b|, |b|)`` on the CPU in float64 (integers beyond 2**53 stay apart: unequal ones differ by at least 1)."""
    a, b = actual.detach().cpu(), expected.detach().cpu()
    equal = a == b
    difference = (a.double() - b.double()).abs()
    if not (a.is_floating_point() or b.is_floating_point()):
        difference = difference.clamp_min(1.0)
    return torch.where(equal, 0.0, difference), b.double().abs()
