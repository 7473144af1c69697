"""IoU: equal to its definition, over batches, ignored pixels left out."""

import pytest
import torch
from support import Later

metrics = Later("lmp_triton.segmentation.metrics", "torchmetrics")


def definition(predicted, target, classes, ignored):
    valid = target != ignored
    result = []
    for c in range(classes):
        p, t = (predicted == c) & valid, (target == c) & valid
        union = int((p | t).sum())
        result.append(int((p & t).sum()) / union if union else float("nan"))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("ignored", [255, -100, 1])
def test_iou_over_batches_is_its_definition(ignored):
    logits, target = torch.randn(5, 6, 7, 8), torch.randint(0, 4, (5, 7, 8))  # 4 is only predicted
    logits[:, 5] = -9  # neither in the target nor predicted
    target[torch.rand(target.shape) < 0.3] = ignored
    metric = metrics.IoU(6, ignored)
    metric.update(logits[:2], target[:2])
    metric.update(logits[2:].argmax(1), target[2:])
    result, expected = metric.compute(), definition(logits.argmax(1), target, 6, ignored)
    if ignored == 1:  # torchmetrics leaves an ignored class out of the matrix; whatever is predicted there is not valid
        assert torch.isnan(result["per_class"][5])
    torch.testing.assert_close(result["per_class"], expected, equal_nan=True, rtol=1e-12, atol=0)
    torch.testing.assert_close(result["mean"], expected.nanmean())
    metric.reset()
    assert metric.compute()["mean"].isnan()


def test_counts_decay():
    right = torch.zeros(1, 10, dtype=torch.long)
    metric = metrics.IoU(2, decay=0.9)
    metric.update(1 - right, right)
    metric.update(right, right)
    assert float(metric.compute()["per_class"][0]) == pytest.approx(10 / (10 + 9))
    with pytest.raises(ValueError, match="decay"):
        metrics.IoU(2, decay=0)


def test_two_ranks_are_added():
    """As torchmetrics adds them: the states of all ranks, summed."""
    target = torch.randint(0, 3, (4, 5, 5))
    predicted = torch.randint(0, 3, (4, 5, 5))
    whole, one, other = metrics.IoU(3), metrics.IoU(3), metrics.IoU(3)
    whole.update(predicted, target)
    one.update(predicted[:1], target[:1])
    other.update(predicted[1:], target[1:])
    both = metrics.IoU(
        3, dist_sync_fn=lambda x, group: [one.confmat, other.confmat], distributed_available_fn=lambda: True
    )
    both.update(predicted[:1], target[:1])
    assert torch.equal(both.compute()["per_class"], whole.compute()["per_class"])
