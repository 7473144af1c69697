"""The eager backend on the CPU, cut into slices: the same result however it is cut, and no memory beyond them."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from support import Later, labelled

import lmp_triton
from lmp_triton import slices

measure = Later("lmp_triton.perf.measure", "pandas")

SMALL = {"GRAIN": 48, "CACHE": 160, "WHOLE": 200}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: F.pad(x, (3, 2, 1, 0))[..., 1:, 3:-2],
    "classes": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:-1],
}


@pytest.fixture
def cut_small(monkeypatch):
    """cut_small(threads, images): so many threads, and limits that some hundred elements are above."""
    before = torch.get_num_threads()

    def change(threads, images):
        torch.set_num_threads(threads)
        for name, value in {**SMALL, "IMAGES": images}.items():
            monkeypatch.setattr(slices, name, value)

    yield change
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_however_it_is_cut(rng, cut_small, layout, dtype):
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
        cut_small(threads, images)
        for o, (loss, grad) in zip(options, expected, strict=True):
            found, found_grad = both(o)
            torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
            torch.testing.assert_close(found_grad, grad, rtol=rounding, atol=rounding * 1e-3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_slices_are_all_there_is(cut_small, threads):
    cut_small(threads, 600)
    for shape in ((1, 5, 7), (3, 5, 99), (2, 1, 400), (7, 5, 1), (400, 3, 1), (2, 300, 2), (0, 3, 5), (2, 3, 0)):
        x, seen = torch.zeros(shape), torch.zeros(shape[0], shape[2])
        for images in (600, sys.maxsize):
            for part, pixels in slices.cut(x, seen, images=images):
                part += 1
                pixels += 1
                assert images != 600 or part.numel() <= max(600, shape[1])
        for (pixels,) in slices.cut_pixels(seen):
            pixels += 1
            assert pixels.numel() <= 3 * 160
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
