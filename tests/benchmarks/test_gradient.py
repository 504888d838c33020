import pytest
import torch

from benchmarks.gradient import noise_and_signal


def test_trace_of_the_covariance_and_squared_mean_by_hand():
    noise, signal = noise_and_signal([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])])
    assert noise == pytest.approx(2.0)
    assert signal == pytest.approx(4.0 - 2.0 / 2)


def test_both_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    found = [
        noise_and_signal(list(torch.randn(4, 3, generator=generator) * 2 + torch.tensor([1.0, 0.0, 0.0])))
        for _ in range(4000)
    ]
    noise = sum(pair[0] for pair in found) / len(found)
    signal = sum(pair[1] for pair in found) / len(found)
    # standard errors about 0.09 and 0.06; 5 of them
    assert noise == pytest.approx(12.0, abs=0.45)
    assert signal == pytest.approx(1.0, abs=0.3)
