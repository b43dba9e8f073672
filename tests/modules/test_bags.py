"""Members of bags that are chosen, against a plain loop."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cce.modules.bags import members_of


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    choices=st.lists(st.integers(0, 100), max_size=10),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_members(lengths: list[int], choices: list[int], dtype: torch.dtype) -> None:
    bags = [choice % len(lengths) for choice in choices]
    found = members_of(torch.tensor(lengths, dtype=dtype), torch.tensor(bags, dtype=dtype))
    expected = [sum(lengths[:bag]) + i for bag in bags for i in range(lengths[bag])]
    assert found.tolist() == expected
    assert found.dtype == torch.int64
