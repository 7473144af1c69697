"""The Triton kernels of loss max-pooling: one file a stage, a thin launcher beside each kernel, no policy.

A launcher fills the tensors it is given and allocates nothing. The order of the stages:

    cross_entropy.softmax_losses  or  losses.mark_losses     losses, labels, statistics of each segment
    select.select                 or  sort.sort              α* and what backward needs, one solution a segment
    gradient.logits_gradient      or  weights.pixel_weights  w*·grad_output, straight into the gradient buffer

`forward.forward` does the first two stages in one cooperative launch. Under them: launch (how), configs (in what
blocks), layout (over what strides), occupancy; workspace, bracket, solution, numerics: device functions they share.
"""
