"""The Triton kernels of loss max-pooling: one file a stage, a thin launcher beside each kernel, no policy.

A launcher fills the tensors it is given and allocates nothing. The order of the stages:

    cross_entropy.softmax_losses  or  given_losses.mark_losses  losses, labels, statistics of each segment
    select.solve_by_selection     or  sort.solve_by_sorting     α* and what backward needs, one solution a segment
    gradient.logits_gradient      or  weighting.pixel_weights   w*·grad_output, straight into the gradient buffer

For logits that are upsampled on the way, `upsampled_losses` and `upsampled_gradient` take the place of the first and
the last; what they share, and how pixels lie among logits there, is in upsampling.

`forward.losses_and_solution` does the first two stages in one cooperative launch. Under them: launcher (how), configs
(in what blocks), layout (over what strides), occupancy; device functions they share: logits (how logits are read),
softmax, workspace, bracket, solution, numerics.

Arguments travel in groups: a kernel is given one `Task` (NamedTuple of tensors, numbers and further groups) a stage and
one `Constants`; the same groups go on to the device functions, and more of them are made there (`Segment`, `Tile`). In
a name `programs` are those that share a row: the pixels of an image, or the losses of a segment.
"""

import triton
import triton.language as tl

if isinstance(tl.sum, triton.JITFunction) == bool(triton.knobs.runtime.interpret):
    # Its functions would be compiled and these interpreted, or the other way round; neither runs.
    raise ImportError("TRITON_INTERPRET was changed after Triton was imported: set it before, and keep it")
