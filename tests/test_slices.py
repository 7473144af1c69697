"""The eager backend on the CPU, cut into slices: the same result however it is cut, and no memory beyond them."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import Later, cut_small, labelled, oracle

import lmp_triton
from lmp_triton import eager, search, slices, types

measure = Later("lmp_triton.perf.measure", "pandas")

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: F.pad(x, (3, 2, 1, 0))[..., 1:, 3:-2],
    "classes": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_however_it_is_cut(rng, layout, dtype):
    """Against all at once: one, two and three threads; whole images and parts of them; every form of the gradient."""
    logits, target = labelled((3, 9, 11), 5, dtype)
    logits[1, :, 2, 3] = torch.nan  # of a pixel that is ignored
    target[1, 2, 3] = 255
    options = [
        {},
        {"weight": torch.rand(5)},
        {"label_smoothing": 0.1},
        {"weight": torch.rand(5), "label_smoothing": 0.1},
    ]

    def both(options):
        x = LAYOUTS[layout](logits).detach().requires_grad_()
        loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend="eager", **options)
        return loss.detach(), *torch.autograd.grad(loss, x)

    expected = [both(o) for o in options]
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    for threads, images in itertools.product((1, 2, 3), (100, 600, 1200)):
        for o, (loss, grad) in zip(options, expected, strict=True):
            with cut_small(threads, images):
                found, found_grad = both(o)
            torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
            torch.testing.assert_close(found_grad, grad, rtol=rounding, atol=rounding * 1e-3)


@pytest.mark.parametrize("p", [1.0, 1.03, 1.06, 1.3, 3.0, 50.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy_does_what_pytorch_does(rng, monkeypatch, p, dtype):
    """Two threads, three, which take the general form, and the search in rounds: all the oracle's, of zeros, ties,
    ignored losses, some far apart; also for a ratio that makes m one."""
    far = 20 * 10 ** -torch.rand(2, 50)
    losses = torch.cat([torch.rand(2, 150), torch.zeros(2, 9), torch.full((2, 9), 0.7), far], 1).to(dtype)
    mask = torch.rand(losses.shape) < 0.9
    for ratio in (0.3, 0.001):
        solutions = [oracle(losses[row][mask[row]], p, ratio) for row in range(2)]
        loss = sum(solution.loss for solution in solutions) / 2
        for threads, arrays in ((2, search.gives_arrays), (3, search.gives_arrays), (3, lambda *_: False)):
            monkeypatch.setattr(search, "gives_arrays", arrays)
            x = losses.clone().requires_grad_()
            with cut_small(threads):
                value, stats = lmp_triton.pool_losses(x, mask, p=p, ratio=ratio, backend="eager", return_stats=True)
                value.backward()
            assert value.item() == pytest.approx(loss, rel=1e-6)
            for row, solution in enumerate(solutions):
                weights = 2 * x.grad[row][mask[row]].double().numpy()
                np.testing.assert_allclose(weights, solution.weights, rtol=0, atol=1e-6 * solution.tau)
            assert not x.grad[~mask].any()
            np.testing.assert_allclose(stats.tau.numpy(), [solution.tau for solution in solutions], rtol=1e-6)


@pytest.mark.parametrize("target_type", [torch.int64, torch.int16, torch.uint8])
@pytest.mark.parametrize("threads", [2, 3])
def test_marks(rng, threads, target_type):
    """Ignored pixels, labels out of range, infinite and undefined losses, in some blocks and not in others."""
    logits, target = labelled((2, 300), 5)
    target[target == 255] = 4
    target[0, :100:7], target[1, 3], logits[0, :, 200], logits[1, :, 150] = 255, 77, torch.nan, torch.nan
    target[1, 150] = 255
    logits[1, target[1, 260], 260] = -math.inf
    with cut_small(threads):
        pixels, minus = (
            eager.softmax_losses(logits, target.to(target_type), types.CrossEntropy(ignore_index=i), "image").losses
            for i in (255, -100)
        )
    ell = F.cross_entropy(logits, target.clamp(0, 4), reduction="none")
    ell[1, 3] = ell[1, 260] = torch.nan
    torch.testing.assert_close(pixels, ell.masked_fill(target == 255, -1.0), equal_nan=True)
    assert minus[target == 255].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_slices_are_all_there_is(threads):
    with cut_small(threads):
        for shape in ((1, 5, 7), (3, 5, 99), (2, 1, 400), (7, 5, 1), (400, 3, 1), (2, 300, 2), (0, 3, 5), (2, 3, 0)):
            x, seen = torch.zeros(shape), torch.zeros(shape[0], shape[2])
            for images in (600, sys.maxsize):
                for part, pixels in slices.cut(x, seen, images=images):
                    part += 1
                    pixels += 1
                    image = shape[1] * shape[2]
                    most = 160 if threads == 1 else images if image <= images else 200
                    assert part.numel() <= max(most, shape[1]) or x.numel() <= 200
            for (pixels,) in slices.cut_pixels(seen):
                pixels += 1
                assert pixels.numel() <= max(48, {1: 160, 2: 48, 3: 480}[threads])
            assert (x == 2).all() and (seen == 3).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_memory(rng, threads, options):
    """Above the inputs: backward the gradient and some bytes a pixel, forward at most as much."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits, target = labelled((4, 200, 300), 19)
        x = logits.requires_grad_()

        def run(x, target):
            loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend="eager", **options)
            torch.autograd.grad(loss, x)

        peak = measure.peak_bytes(run, (x, target))
    finally:
        torch.set_num_threads(before)
    # Losses, labels, weights, the two factors, and an index of 8 bytes.
    assert x.nbytes < peak <= x.nbytes + 27 * target.numel()
