"""Whether the host may look at what a tensor holds."""

import torch
from torch import Tensor


def readable(x: Tensor, *, waiting: bool = False) -> bool:
    """Return whether entries can be looked at: not in compiled or captured graphs, without data, or in a transform.

    Args:
        x: the tensor.
        waiting: whether a device may be waited for; off the CPU nothing can be looked at without.
    """
    if torch.compiler.is_compiling() or x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if x.device.type == "cuda":
        return waiting and not torch.cuda.is_current_stream_capturing()
    return waiting or x.device.type == "cpu"
