"""A block in training on the CPU, whose norms take their statistics from the batch.

What runs on the kernels of ``csrc/cpu/training`` and never writes an expanded tensor, and what follows from their sums
in float64. With M pixels of x, and ``^`` for normalised values::

    e = W x        a1 = norm1(e)   h1 = act(a1)
    d = K * h1     a2 = norm2(d)   h2 = act(a2)      p = P h2

norm1's statistics need no pass over e: its mean is W times x's, its variance the diagonal of W cov(x) W'. norm2's take
one pass that sums d up. Backward, one pass sums up the gradient of a2 and its products with d^, another one goes on to
x. What norm1 adds to the gradients of W and x has a closed form in cov(x) and the sums G of products of a1's gradient
with x.

Neither norm mixes channels: groups of expanded channels go through both passes of a direction one after the other, and
d of a group, backward h1 and q = P'g as well, stay in memory in between. Not so where a group's are large, where other
processes have to be asked in between, or a gate.

A squeeze-and-excite takes one pass more, which sums h2 up over each image; p = P (gate h2). Backward, five sums of each
image give the gate's gradient, and with it norm2's.

Kernels compute in float32 or float64. Tensors in half precision are converted where they are as wide as the block's own
input and result, and stay in half precision where they are kept for backward. Under autocast, too, every number inside
is a float32.

Norms of one process group take their statistics from the batches of all its processes: what they sum up is summed over
processes, in float64. Gradients of parameters are each process's part: their sum over processes is the gradient of the
sum of losses.
"""

from . import fakes  # noqa: F401, as it registers what the ops give
from .derivatives import DIFFERENTIATED, objection
from .norms import Norm, Statistics, normed
from .projection import projected
from .weights import Weights

__all__ = ["DIFFERENTIATED", "Norm", "Statistics", "Weights", "normed", "objection", "projected"]
