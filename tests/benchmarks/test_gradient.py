import pytest
import torch

from benchmarks.gradient import Moments


def test_moments_of_two_groups_by_hand():
    moments = Moments()
    moments.add(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]))
    moments.add(torch.tensor([3.0, 1.0]), torch.tensor([3.0, 1.0]))
    assert moments.squares == [3, 10]
    assert moments.added == 1  # the first group's two differ by (0, 2): half of 4, and 0 for the second
    assert moments.squared_mean == pytest.approx(3 + 1)  # (1, 1) . (3, 1)
    assert moments.trace == pytest.approx(6.5 - 4)
    assert moments.crossed_trace == pytest.approx((1 + 10) / 2 - 4)


def test_moments_tell_the_noise_of_the_groups_from_that_of_valuing_them():
    generator = torch.Generator().manual_seed(0)
    moments = Moments()
    for _ in range(8000):
        of_group = torch.tensor([2.0, 0.0, 0.0]) + torch.randn(3, generator=generator)
        moments.add(*(of_group + 0.5 * torch.randn(3, generator=generator) for _ in range(2)))
    assert moments.added == pytest.approx(3 * 0.25, rel=0.05)
    assert moments.squared_mean == pytest.approx(4, rel=0.05)
    assert moments.crossed_trace == pytest.approx(3, rel=0.05)
    assert moments.trace == pytest.approx(3 + 3 * 0.25, rel=0.05)


def test_the_interval_of_a_ratio_is_as_wide_as_the_groups_differ():
    one, twice, rare = Moments(), Moments(), Moments()
    for index in range(40):
        of_group = torch.tensor([1.0 + index % 2])
        one.add(of_group, of_group)
        twice.add(of_group * 2**0.5, of_group * 2**0.5)
        rare.add(*(torch.tensor([12.0 if index == 0 else 1.0]),) * 2)
    assert twice.over(one) == pytest.approx((2, 2))
    low, high = rare.over(one)
    assert low < 0.6 < (144 + 39) / 100 < high
