"""DropConnect: each weight of a linear layer is zeroed independently."""

import torch
from torch import Tensor


def drop_weights(weight: Tensor, p: float | Tensor) -> Tensor:
    """Zeroes each weight with probability `p` and scales the others by `1 / (1 - p)`, so that the mean is the weight.

    Args:
        weight (`torch.Tensor` of any shape): floating point, in any layout.
        p (`float` or `torch.Tensor` of shape `()`):
            Probability in [0, 1). `torch.compile` does not recompile for another value of a tensor, which is not
            checked: that would synchronize the device.

    Returns:
        `torch.Tensor`: shape, dtype and device of `weight`. The same random state gives the same mask in every dtype.

    Raises:
        ValueError: if a number `p` is not in [0, 1).

    Source: Wan et al., Regularization of Neural Networks using DropConnect, ICML 2013, equation 3, with one mask for
    all samples of a batch and inverted scaling.

    Example:

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> drop_weights(torch.ones(2, 4), p=0.5)
    tensor([[0., 2., 0., 0.],
            [0., 2., 0., 2.]])
    """
    if not isinstance(p, Tensor) and not 0 <= p < 1:
        raise ValueError(
            f"`p` must be a number in [0, 1), got {p}: at 1 no weight is left to scale. Use a lower probability."
        )
    # In float32, because random numbers in half precision are too coarse for a small p.
    is_kept = torch.rand_like(weight, dtype=torch.float32) >= p
    return torch.where(is_kept, weight / (1 - p), 0.0)
