import pytest
import torch

from kernels.checks import output, require

CPU = torch.device("cpu")


def test_what_is_as_required_passes():
    x = torch.zeros(3, 4, 8)
    require("x", x, torch.float32, (3, 4, 8))
    require("x", x[:, :2], torch.float32, (3, 2, 8), (8, 1))
    require("x", x[:, :, 1:], torch.float32, (3, 4, 7), (1,))


@pytest.mark.parametrize(
    ("x", "strides", "message"),
    [
        (None, None, r"^x must be torch.float32 \[3, 4\], contiguous, not None$"),
        (torch.zeros(3, 4).half(), None, r"^x must .* not torch.float16 \[3, 4\], strides \[4, 1\]$"),
        (torch.zeros(4, 3), None, r"^x must .* not torch.float32 \[4, 3\]"),
        (torch.zeros(12), (1,), r"^x must .*, last strides \[1\], not torch.float32 \[12\]"),
        (torch.tensor(0.0), None, r"^x must .* not torch.float32 \[\]"),
        (torch.zeros(4, 3).t(), None, r"^x must .*, contiguous, not .* \[3, 4\], strides \[1, 3\]$"),
        (torch.zeros(3, 8)[:, ::2], (1,), r"^x must .*, last strides \[1\], not .* strides \[8, 2\]$"),
        (torch.zeros(3, 5)[:, 1:], (4, 1), r"^x must .*, last strides \[4, 1\], not .* strides \[5, 1\]$"),
    ],
)
def test_what_is_otherwise_is_named(x, strides, message):
    with pytest.raises(ValueError, match=message):
        require("x", x, torch.float32, (3, 4), strides)


def test_an_output_is_made_or_checked():
    made = output(None, torch.bfloat16, (3, 4), (1,), CPU)
    assert (made.dtype, made.shape) == (torch.bfloat16, (3, 4))
    assert output(made, torch.bfloat16, (3, 4), (1,), CPU) is made
    with pytest.raises(ValueError, match=r"^out must be torch.float32"):
        output(made, torch.float32, (3, 4), (1,), CPU)
