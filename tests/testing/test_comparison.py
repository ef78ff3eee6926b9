"""assert_close catches what it must: values, NaN, infinities, shapes, missing gradients."""

from __future__ import annotations

import math

import pytest
import torch

from nsa_cp.testing import assert_close, relative_error

INF, NAN = math.inf, math.nan


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_relative_error_is_the_quotient_of_norms():
    assert relative_error(doubles(3.0, 4.5), doubles(3.0, 4.0)) == pytest.approx(0.1, rel=1e-15)
    assert relative_error(doubles(0.0), doubles(0.0)) == 0.0
    assert relative_error(doubles(1e-30), doubles(0.0)) == INF
    assert relative_error(doubles(-INF, 1.0), doubles(-INF, 2.0)) == 0.5
    assert math.isnan(relative_error(doubles(NAN), doubles(1.0)))
    with pytest.raises(ValueError, match="one shape"):
        relative_error(doubles(1.0), doubles(1.0, 1.0))


def test_agreement_passes():
    assert_close(doubles(1.0, -INF, INF), doubles(1.0, -INF, INF))
    assert_close(torch.tensor([3, -1], dtype=torch.int32), torch.tensor([3, -1]))
    assert_close(doubles(1.0 + 1e-11), doubles(1.0), atol=1e-10)
    assert_close(doubles(100.0, 1e-3), doubles(100.0, 0.0), max_relative_error=1e-4)
    assert_close(torch.ones(2, dtype=torch.bfloat16), doubles(1.0, 1.0))
    assert_close({"q": doubles(1.0), "gate": None}, {"q": doubles(1.0), "gate": None})
    assert_close(torch.empty(0, 3), torch.empty(0, 3))


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "message"),
    [
        (doubles(1.0, 2.0), doubles(1.0, 2.5), {}, r"out \(2,\): largest difference 5\.000e-01 at \(1,\) \(2, expected 2\.5\)"),
        (doubles(1.0, 2.0), doubles(1.0, 2.5), {"atol": 0.4}, "1 of 2 elements outside"),
        (doubles(1.0, 2.0), doubles(1.0, 2.5), {"max_relative_error": 0.1}, "relative error above 0.1"),
        # the norm alone would pass: the elementwise tolerance must still be looked at, and the other way round
        (doubles(1e6, 1.0), doubles(1e6, 0.0), {"atol": 1e-3, "max_relative_error": 1e-3}, "outside"),
        (doubles(1.0, 1.0), doubles(1.1, 1.1), {"atol": 0.2, "max_relative_error": 1e-3}, "above"),
        (doubles(0.0, 1e-3), doubles(0.0, 0.0), {"max_relative_error": 1e-3}, "above"),
        (doubles(NAN), doubles(NAN), {"atol": 1.0}, "1 of 1 elements of the actual tensor are NaN"),
        (doubles(1.0), doubles(NAN), {"max_relative_error": 1.0}, "expected tensor are NaN"),
        (doubles(INF), doubles(-INF), {"atol": 1e9}, "largest difference inf"),
        (doubles(1.0), doubles(INF), {"rtol": 1.0}, "largest difference inf"),
        (doubles(1.0), doubles(1.0, 1.0), {"atol": 1.0}, r"shape \(1,\), expected \(2,\)"),
        (torch.tensor([2**53 + 1]), torch.tensor([2**53]), {}, "largest difference 1"),
        (torch.tensor([True]), torch.tensor([False]), {}, "largest difference 1"),
        (None, doubles(1.0), {"atol": 1.0}, "got NoneType, expected Tensor"),
        ([doubles(1.0)], [doubles(1.0), None], {}, "1 entries, expected 2"),
        ({"q": None}, {"k": None}, {}, "the keys differ; only on one side: k, q"),
    ],
)
def test_disagreement_fails_with_the_figures(actual, expected, tolerance, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected, name="out", **tolerance)


def test_every_entry_of_a_structure_is_reported():
    actual = {"q": doubles(1.0), "kv": (doubles(2.0), doubles(3.0))}
    expected = {"q": doubles(1.5), "kv": (doubles(2.0), doubles(3.5))}
    with pytest.raises(AssertionError) as info:
        assert_close(actual, expected, name="gradient")
    assert [line.split(" ")[0] for line in str(info.value).splitlines()] == ["gradient[q]", "gradient[kv][1]"]
