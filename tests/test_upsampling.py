"""upsampled_loss_max_pooling is loss_max_pooling of F.interpolate, value and gradient, in all options and sizes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support import labelled
from torch.autograd import gradcheck

import lmp_triton
from lmp_triton import bilinear, dispatch, eager_upsampled

SIZES = [
    # (h, w) to (H, W)
    ((3, 4), (24, 32)),  # 8, and 8 without align_corners
    ((3, 3), (17, 17)),  # 8 with align_corners
    ((4, 5), (12, 9)),  # 3, and a ratio that is no integer
    ((5, 7), (13, 29)),
    ((2, 3), (40, 20)),  # cells wider than what a thread takes
    ((6, 5), (3, 4)),  # fewer pixels than logits
    ((4, 5), (4, 5)),  # as many
    ((1, 6), (7, 1)),
    ((2, 65), (9, 513)),  # 8 with align_corners, as networks have it
]


def interpolated(logits, target, align_corners=False, **options):
    """The loss in float64, by way of the large logits."""
    large = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=align_corners)
    if options.get("weight") is not None:
        options["weight"] = options["weight"].double()
    return lmp_triton.loss_max_pooling(large, target, backend="eager", **options)


def small_and_target(nodes, size, classes, device, images=2, ignored=0.1, scale=3.0, dtype=torch.float32):
    logits = (scale * torch.randn(images, classes, *nodes)).to(dtype).to(device)
    _, target = labelled((images, *size), classes, ignored=ignored, device=device)
    return logits, target


def compare(logits, target, backend, rtol=1e-5, **options):
    """Value and gradient against float64."""
    x, y = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    loss = lmp_triton.upsampled_loss_max_pooling(x, target, ignore_index=255, backend=backend, **options)
    expected = interpolated(y, target, ignore_index=255, **options)
    scales = torch.arange(1, loss.numel() + 1, device=loss.device).view_as(loss)
    (loss * scales).sum().backward()
    (expected * scales).sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-7)
    top = y.grad.abs().max().item()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=rtol, atol=10 * rtol * top)
    assert x.grad.dtype == x.dtype and x.grad.shape == x.shape


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("nodes, size", SIZES)
def test_against_float64(rng, backend, device, nodes, size, align_corners):
    classes = int(rng.choice([2, 3, 19]))
    print(classes)
    logits, target = small_and_target(nodes, size, classes, device)
    compare(logits, target, backend, align_corners=align_corners)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": "random"},
        {"label_smoothing": 0.1},
        {"weight": "random", "label_smoothing": 0.2, "scope": "batch"},
        {"scope": "batch", "reduction": "sum", "p": 1.05, "ratio": 0.3},
        {"reduction": "none", "p": 4.0},
        {"p": float("inf")},
    ],
)
@pytest.mark.parametrize("classes", [5, 33])  # all classes at once; a chunk at a time
def test_options(rng, backend, device, classes, options):
    options = dict(options)
    if "weight" in options:
        options["weight"] = torch.rand(classes, device=device) + 0.1
    compare(*small_and_target((3, 4), (12, 16), classes, device), backend, **options)


def test_p_and_ratio_as_tensors(rng, backend, device):
    logits, target = small_and_target((3, 4), (12, 16), 5, device)
    losses = [
        lmp_triton.upsampled_loss_max_pooling(logits, target, p=p, ratio=ratio, ignore_index=255, backend=backend)
        for p, ratio in ((1.7, 0.5), (torch.tensor(1.7, device=device), torch.tensor(0.5, device=device)))
    ]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_plain_cross_entropy(rng, backend, device, scope):
    """ratio=1: nothing is pooled, and what is left is the cross-entropy people use."""
    logits, target = small_and_target((4, 4), (16, 16), 6, device)
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    options = {"ratio": 1.0, "scope": scope, "ignore_index": 255, "backend": backend}
    loss = lmp_triton.upsampled_loss_max_pooling(x, target, **options)
    large = F.interpolate(y, target.shape[1:], mode="bilinear")
    if scope == "batch":
        expected = F.cross_entropy(large, target, ignore_index=255)
    else:
        expected = sum(F.cross_entropy(a[None], b[None], ignore_index=255) for a, b in zip(large, target, strict=True))
        expected = expected / len(target)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5 * y.grad.abs().max().item())


def test_statistics(rng, backend, device):
    logits, target = small_and_target((3, 4), (12, 16), 5, device)
    options = {"ignore_index": 255, "return_stats": True}
    _, stats = lmp_triton.upsampled_loss_max_pooling(logits, target, backend=backend, **options)
    _, expected = interpolated(logits.double(), target, **options)
    for found, other in zip(stats, expected, strict=True):
        torch.testing.assert_close(found.double(), other.double(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(rng, backend, device, dtype):
    """Interpolated in float32: the error is at most twice what PyTorch's own rounding leaves, and the gradient's one
    rounding."""
    logits, target = small_and_target((6, 6), (24, 24), 7, device, dtype=dtype)
    x, y, z = (logits.detach().to(kind).requires_grad_() for kind in (dtype, torch.float64, dtype))
    options = {"ratio": 1.0, "scope": "batch", "ignore_index": 255}
    loss = lmp_triton.upsampled_loss_max_pooling(x, target, backend=backend, **options)
    expected = interpolated(y, target, **options)
    other = F.cross_entropy(F.interpolate(z, target.shape[1:], mode="bilinear").float(), target, ignore_index=255)
    for value in (loss, expected, other):
        value.backward()
    assert loss.dtype == torch.float32
    assert (loss - expected).abs() <= 2 * (other - expected).abs() + 1e-6
    # A truncation, where Triton's interpreter makes one of it.
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "strided target", "uint8"])
def test_layouts(rng, backend, device, layout):
    logits, target = small_and_target((4, 6), (12, 18), 5, device)
    if layout == "channels_last":
        logits = logits.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        big = torch.full((2, 9, 7, 11), torch.nan, device=device)
        big[:, 1:6, 1:5, 2:8] = logits
        logits = big[:, 1:6, 1:5, 2:8]
    elif layout == "expanded":
        logits = logits[:1].expand(2, -1, -1, -1)
    elif layout == "strided target":
        target = torch.stack([target, target + 1000], -1).transpose(1, 2)[..., 0].transpose(1, 2)
    else:
        target = target.to(torch.uint8)
    before = logits.clone()
    x = logits.detach().requires_grad_()
    loss = lmp_triton.upsampled_loss_max_pooling(x, target, ignore_index=255, backend=backend)
    loss.backward()
    y = before.double().requires_grad_()
    expected = interpolated(y, target.long(), ignore_index=255)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5 * y.grad.abs().max().item())
    assert torch.equal(logits, before)
    if layout == "channels_last":
        assert x.grad.stride() == x.stride()


def test_masked_class(rng, backend, device):
    """−inf for a class that no pixel may have: F.interpolate makes NaN of it, where a weight is 0."""
    logits, target = small_and_target((3, 4), (12, 16), 5, device)
    target[target == 1] = 0
    expected = lmp_triton.upsampled_loss_max_pooling(
        torch.cat([logits[:, :1], logits[:, 2:]], 1),
        torch.where((target > 1) & (target != 255), target - 1, target),
        ignore_index=255,
        backend="eager",
    )
    logits[:, 1] = -torch.inf
    x = logits.requires_grad_()
    loss = lmp_triton.upsampled_loss_max_pooling(x, target, ignore_index=255, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0.0)
    assert x.grad.isfinite().all() and not x.grad[:, 1].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_logits(rng, backend, device, value):
    """The image is NaN, the other one is not; around ignored pixels a bad logit does no harm."""
    logits, target = small_and_target((3, 4), (12, 16), 5, device, ignored=0.0)
    bad = logits.clone()
    bad[0, 2, 1, 1] = value
    target[0, 6, 6] = 2  # at (1, 1), nearly
    options = {"reduction": "none", "ignore_index": 255, "backend": backend}
    x = bad.clone().requires_grad_()
    loss = lmp_triton.upsampled_loss_max_pooling(x, target, **options)
    loss.sum().backward()
    whole = lmp_triton.upsampled_loss_max_pooling(logits, target, **options)
    assert loss[0].isnan() and torch.equal(loss[1], whole[1])
    assert x.grad[0].isnan().any() and x.grad[1].isfinite().all()
    target[0, :12, :12] = 255
    x = bad.clone().requires_grad_()
    loss = lmp_triton.upsampled_loss_max_pooling(x, target, **options)
    loss.sum().backward()
    whole = lmp_triton.upsampled_loss_max_pooling(logits, target, **options)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0.0)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_translation(rng, backend, device, shift):
    logits, target = small_and_target((3, 4), (12, 16), 7, device, scale=1.0)
    logits = (logits * 64).round() / 64  # so that adding the shift is exact
    grads = []
    for x in (logits, logits + shift):
        x = x.requires_grad_()
        lmp_triton.upsampled_loss_max_pooling(x, target, ignore_index=255, backend=backend).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("difference", [50.0, 3000.0])
@pytest.mark.parametrize("along", [2, 3])
def test_neighbours_sure_of_different_classes(rng, backend, device, along, difference):
    """Between them every exponential relative to their largest classes is 0, and the softmax is none the less right."""
    logits, target = small_and_target((4, 4), (16, 16), 3, device, scale=1.0)
    moved = logits.movedim(along, -1)
    moved[:, 0, ..., ::2] += difference
    moved[:, 1, ..., 1::2] += difference
    compare(logits, target, backend, rtol=2e-4)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "nodes, size",
    [
        ((7, 13), (28, 104)),  # a span a cell: the program to the left has one of it, too
        ((7, 13), (21, 160)),  # two
        ((3, 5), (12, 170)),  # five: both sides of a node are kept apart
    ],
)
def test_programs_that_meet(rng, device, configure, nodes, size, align_corners):
    """Several programs a row of cells and several strips of them: what a node is given comes from all that touch it."""
    configure(upsampled={"lanes": 32, "height": 2, "per_multiprocessor": 1})
    logits, target = small_and_target(nodes, size, 3, device)
    compare(logits, target, "triton", align_corners=align_corners)


def test_determinism_and_retained_graph(rng, backend, device):
    logits, target = small_and_target((3, 5), (24, 37), 5, device)
    x = logits.requires_grad_()
    grads = []
    for _ in range(2):
        loss = lmp_triton.upsampled_loss_max_pooling(x, target, ignore_index=255, backend=backend)
        for retain in (True, False):
            loss.backward(retain_graph=retain)
            grads.append(x.grad)
            x.grad = None
    assert all(torch.equal(grad, grads[0]) for grad in grads)


@pytest.mark.parametrize("elements", [1, 200, 1 << 12])
def test_bands(rng, monkeypatch, elements):
    """The eager backend in bands of one row, of some, of several images."""
    monkeypatch.setattr(eager_upsampled, "BAND_ELEMENTS", elements)
    logits, target = small_and_target((5, 4), (23, 13), 3, "cpu", images=5)
    compare(logits, target, "eager", align_corners=bool(rng.integers(2)))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "scope": "batch", "p": 2.0}])
def test_gradcheck(rng, align_corners, options):
    logits, target = small_and_target((3, 4), (7, 8), 4, "cpu", dtype=torch.float64)
    assert gradcheck(
        lambda x: lmp_triton.upsampled_loss_max_pooling(
            x, target, align_corners=align_corners, ignore_index=255, backend="eager", **options
        ),
        logits.requires_grad_(),
    )


def test_second_derivative_is_refused(rng, backend, device):
    logits, target = small_and_target((3, 4), (12, 16), 3, device)
    x = logits.requires_grad_()
    loss = lmp_triton.upsampled_loss_max_pooling(x, target, ignore_index=255, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_autocast(rng, backend, device):
    """No product is rounded to half precision on the way."""
    logits, target = small_and_target((3, 4), (12, 16), 5, device)
    losses, grads = [], []
    for enabled in (False, True):
        x = logits.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            loss = lmp_triton.upsampled_loss_max_pooling(x, target, ignore_index=255, backend=backend)
            loss.backward()
        losses.append(loss.detach())
        grads.append(x.grad)
    assert torch.equal(*losses) and torch.equal(*grads)


def test_nothing(backend, device):
    logits = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    target = torch.full((2, 8, 8), 255, device=device)
    loss = lmp_triton.upsampled_loss_max_pooling(logits, target, ignore_index=255, backend=backend)
    loss.backward()
    assert loss == 0 and not logits.grad.any()
    empty = lmp_triton.upsampled_loss_max_pooling(logits[:0], target[:0], backend=backend)
    empty.backward()
    assert empty == 0


@pytest.mark.parametrize(
    "logits, target, options, error, says",
    [
        (
            (2, 3, 4),
            (2, 8),
            {},
            ValueError,
            r"logits that are upsampled must have shape \(N, C, h, w\), got \(2, 3, 4\)",
        ),
        ((2, 3, 4, 4, 4), (2, 8, 8, 8), {}, ValueError, "interpolation is of two spatial dimensions"),
        ((6, 3), (6,), {"scope": "batch"}, ValueError, r"shape \(N, C, h, w\), got \(6, 3\)"),
        ((6, 3), (6,), {}, ValueError, r"shape \(N, C, h, w\), got \(6, 3\)"),
        ((2, 3, 4, 4), (3, 8, 8), {}, ValueError, r"target must have shape \(N, H, W\) = \(2, H, W\)"),
        ((2, 3, 4, 4), (2, 8), {}, ValueError, r"target must have shape \(N, H, W\)"),
        ((2, 3, 0, 4), (2, 8, 8), {}, ValueError, r"shape \(N, C, h, w\)"),
        ((2, 3, 4, 4), (2, 8, 8), {"align_corners": None}, TypeError, "align_corners must be a bool, got NoneType"),
        ((2, 3, 4, 4), (2, 8, 8), {"weight": torch.ones(4)}, ValueError, "weight must have one entry a class"),
        ((2, 3, 4, 4), (2, 8, 8), {"p": 0.5}, ValueError, "p must be at least 1"),
    ],
)
def test_errors(logits, target, options, error, says):
    with pytest.raises(error, match=says):
        lmp_triton.upsampled_loss_max_pooling(torch.zeros(logits), torch.zeros(target, dtype=torch.long), **options)


def test_more_than_32_bits_reach():
    """Too many sums for the kernels, shown with no memory."""
    logits = torch.zeros(1).expand(1, 1024, 1024, 1024)
    target = torch.zeros(1, dtype=torch.long).expand(1, 2048, 2048)
    assert "2^31 sums for the small gradient" in dispatch.obstacle(logits, target=target)
    assert "2^31" not in (dispatch.obstacle(logits[:, :16], target=target) or "")
    with pytest.raises(ValueError, match=r"2\^31 sums"):
        dispatch.choose(logits, "triton", target=target)


def test_bad_label():
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    target[0, 3, 4] = 9
    with pytest.raises(IndexError, match=r"target\[0, 3, 4\] = 9 is not a class in \[0, 3\)"):
        lmp_triton.upsampled_loss_max_pooling(torch.zeros(1, 3, 4, 4), target)


def test_module(rng):
    logits, target = small_and_target((3, 4), (12, 16), 5, "cpu")
    weight = torch.rand(5)
    criterion = lmp_triton.UpsampledLossMaxPooling(1.5, 0.5, align_corners=True, weight=weight, ignore_index=255)
    assert "align_corners=True" in repr(criterion) and isinstance(criterion, lmp_triton.LossMaxPooling)
    expected = lmp_triton.upsampled_loss_max_pooling(
        logits, target, align_corners=True, p=1.5, ratio=0.5, weight=weight, ignore_index=255
    )
    assert torch.equal(criterion(logits, target), expected)


@pytest.mark.parametrize("align_corners", [False, True])
def test_axis(rng, align_corners):
    """The weights are those of F.interpolate, the cells partition the pixels, and no cell is longer than is said."""
    for nodes, pixels in [(1, 1), (1, 5), (5, 1), *(map(int, rng.integers(1, 40, 2)) for _ in range(20))]:
        axis = bilinear.axis(nodes, pixels, align_corners)
        one = torch.eye(nodes, dtype=torch.float64)[None, None]
        expected = F.interpolate(one, (pixels, nodes), mode="bilinear", align_corners=align_corners)[0, 0]
        found = bilinear.weights(axis, torch.float64, torch.device("cpu"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=f"{axis}")
        edges = [axis.first_pixel(cell) for cell in range(axis.first_cell, nodes + 1)]
        assert edges[0] == 0 and edges[-1] == pixels and edges == sorted(edges)
        assert max(b - a for a, b in itertools.pairwise(edges)) <= axis.longest_cell
        for pixel in range(pixels):
            cell = axis.cell_of(pixel)
            assert axis.first_pixel(cell) <= pixel < axis.first_pixel(cell + 1)


# --- real clients -------------------------------------------------------------------------------------------------


def matches_interpolation(small, large, target, parameter):
    """A training step with the fused loss is one with the large logits."""
    loss = lmp_triton.upsampled_loss_max_pooling(small, target, ignore_index=255)
    (grad,) = torch.autograd.grad(loss, parameter, retain_graph=True)
    expected = lmp_triton.loss_max_pooling(large, target, ignore_index=255)
    (expected_grad,) = torch.autograd.grad(expected, parameter)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5 * expected_grad.abs().max().item())


@pytest.mark.slow
def test_segformer(rng):
    """transformers' SegFormer: its logits have a quarter of the size."""
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 24], "num_attention_heads": [1, 1, 2, 2]}
    config = transformers.SegformerConfig(num_labels=5, decoder_hidden_size=16, **sizes)
    model = transformers.SegformerForSemanticSegmentation(config)
    _, target = labelled((2, 64, 96), 5)
    logits = model(pixel_values=torch.randn(2, 3, 64, 96)).logits
    assert logits.shape == (2, 5, 16, 24)
    large = F.interpolate(logits, target.shape[1:], mode="bilinear")
    matches_interpolation(logits, large, target, model.decode_head.classifier.weight)


@pytest.mark.slow
def test_deeplabv3(rng):
    """torchvision's deeplabv3: what its classifier makes before the last interpolation, an eighth of the size."""
    segmentation = pytest.importorskip("torchvision").models.segmentation
    model = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=4).eval()
    images, target = torch.randn(2, 3, 65, 96), labelled((2, 65, 96), 4)[1]
    small = model.classifier(model.backbone(images)["out"])
    assert small.shape == (2, 4, 9, 12)
    matches_interpolation(small, model(images)["out"], target, model.classifier[-1].weight)


class Head(torch.nn.Module):
    """What an mmsegmentation decode head does with its layers' output, with and without its resizing."""

    def __init__(self, align_corners, loss_decode, resizes):
        super().__init__()
        self.conv_seg = torch.nn.Conv2d(6, 3, 1)
        self.align_corners, self.loss_decode, self.resizes = align_corners, loss_decode, resizes

    def loss_by_feat(self, seg_logits, label):
        if self.resizes:
            seg_logits = F.interpolate(seg_logits, label.shape[1:], None, "bilinear", self.align_corners)
        return {self.loss_decode.loss_name: self.loss_decode(seg_logits, label, ignore_index=255)}


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("options", [{}, {"class_weight": [1.0, 2.0, 0.5]}, {"reduction": "none"}])
def test_decode_head(rng, align_corners, options):
    from lmp_triton.integrations.dropins import DecodeHeadLoss

    features, (_, label) = torch.randn(2, 6, 5, 7), labelled((2, 33, 49), 3)
    head = Head(align_corners, DecodeHeadLoss(**options), True)
    other = Head(align_corners, DecodeHeadLoss(align_corners=align_corners, **options), False)
    other.load_state_dict(head.state_dict())
    (expected,), (loss,) = (x.loss_by_feat(x.conv_seg(features), label).values() for x in (head, other))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(y.sum(), x.conv_seg.weight)[0] for x, y in ((head, expected), (other, loss))]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
