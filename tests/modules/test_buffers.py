"""Large tensors whose memory is used again."""

import torch

from torchrec_cce.modules.buffers import Buffers

LARGE = (1 << 24,)  # 64 MB of float32


def test_memory_is_used_again_once_nobody_has_it() -> None:
    buffers = Buffers()
    first = buffers.empty(LARGE, torch.float32)
    place = first.data_ptr()
    views = [first.view(2, -1), first.numpy()]
    del first
    for view in (0, 0):
        second = buffers.empty(LARGE, torch.float32)
        assert second.data_ptr() != place
        del views[view], second
    assert buffers.empty(LARGE, torch.float32).data_ptr() == place


def test_what_fits_badly_is_given_up() -> None:
    buffers = Buffers()
    buffers.empty((1 << 27,), torch.uint8)
    num_bytes = (1 << 25) + 1
    tight = buffers.empty((num_bytes,), torch.uint8)
    assert tight.untyped_storage().nbytes() == num_bytes
    num_kept = len(buffers._storages)
    assert num_kept == 1
