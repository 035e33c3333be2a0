"""The numbers of one tensor, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mergekit_sd as mk
from mergekit_sd.errors import MissingTensors

CASES = {
    "half": torch.linspace(-3, 5, 999).half(),
    "long": torch.randn(600_001, generator=torch.Generator().manual_seed(1)) + 1e4,
    "bad": torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 3.0]),
    "none": torch.full((4,), float("nan")),
    "empty": torch.zeros(0, 3),
    "whole": torch.arange(77),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_numpys(tmp_path, name):
    path = tmp_path / "a.safetensors"
    save_file(CASES, path)
    found = mk.tensor_statistics(path, name)
    values = CASES[name].double().numpy().ravel()
    finite = values[np.isfinite(values)]
    assert (found.values, found.nan) == (values.size, np.isnan(values).sum())
    assert found.inf == np.isinf(values).sum()
    if not finite.size:
        assert (found.min, found.max, found.mean, found.std) == (None, None, None, None)
        return
    expected = (finite.min(), finite.max(), finite.mean(), finite.std())
    assert (found.min, found.max, found.mean, found.std) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_another_name_is_refused(tmp_path):
    save_file(CASES, tmp_path / "a.safetensors")
    with pytest.raises(MissingTensors) as told:
        mk.tensor_statistics(tmp_path / "a.safetensors", "hal")
    assert told.value.hint == 'did you mean "half"?'
