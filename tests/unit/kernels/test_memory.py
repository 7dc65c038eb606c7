import gc
import weakref

import torch

from kernels.cpu import memory


def test_tensors_are_aligned_and_do_not_overlap(dtype):
    tensors = [memory.empty(shape, dtype) for shape in ((3, 5), (1,), (7, 11, 2), (0,), (100,))]
    for value, tensor in enumerate(tensors):
        assert tensor.dtype is dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % memory.ALIGNMENT == 0 or not tensor.numel()
        tensor.fill_(value)
    for value, tensor in enumerate(tensors):
        assert (tensor == value).all()


def test_larger_than_a_chunk():
    size = memory.CHUNK_BYTES + 4096
    tensor = memory.empty((size,), torch.uint8)
    assert tensor.shape == (size,)
    tensor[-1] = 3
    assert tensor[-1] == 3


def test_a_chunk_goes_with_its_last_tensor():
    tensor = memory.empty((memory.CHUNK_BYTES,), torch.uint8)
    storage = weakref.ref(tensor.untyped_storage())
    del tensor
    memory.empty((memory.CHUNK_BYTES,), torch.uint8)
    gc.collect()
    assert storage() is None
