"""DeepLabV2 as section 5.1 describes it, and the small network, behind one interface."""

import pytest
import torch
from support import Later
from torch import nn

models = Later("lmp_triton.segmentation.models", "torchvision")


@pytest.fixture(scope="module")
def deeplab():
    return models.build("deeplabv2", 5).eval()


def test_logits_have_an_eighth_of_the_resolution(deeplab):
    with torch.no_grad():
        assert deeplab(torch.randn(1, 3, 65, 49)).shape == (1, 5, 9, 7)


def test_the_backbone_is_resnet_101_with_its_last_stages_dilated(deeplab):
    convolutions = [m for m in deeplab.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 104  # the first, 3 in each of 33 blocks, a shortcut into each of 4 stages
    assert sum(x.numel() for x in deeplab.backbone.parameters()) == 42_500_160  # ResNet-101 without its classifier
    for stage, dilation in (("layer2", 1), ("layer3", 2), ("layer4", 4)):
        last = getattr(deeplab.backbone, stage)[-1].conv2
        assert last.dilation == (dilation, dilation)
        strides = {m.stride for m in getattr(deeplab.backbone, stage).modules() if isinstance(m, nn.Conv2d)}
        assert strides == ({(1, 1), (2, 2)} if stage == "layer2" else {(1, 1)})


def test_the_pyramid_is_the_sum_of_four_dilated_convolutions(deeplab):
    features = torch.randn(1, 2048, 60, 3)
    deeplab.backbone, kept = nn.Identity(), deeplab.backbone
    try:
        with torch.no_grad():
            logits = deeplab(features)
            # By hand: of a convolution dilated by r, tap (i, j) sees the features shifted by r·(i − 1), r·(j − 1).
            expected = torch.zeros(1, 5, 60, 3)
            for branch, rate in zip(deeplab.pyramid, (6, 12, 18, 24), strict=True):
                padded = nn.functional.pad(features, [rate] * 4)
                expected += branch.bias[:, None, None]
                for i in range(3):
                    for j in range(3):
                        shifted = padded[:, :, rate * i : rate * i + 60, rate * j : rate * j + 3]
                        expected += torch.einsum("nkhw,ck->nchw", shifted, branch.weight[:, :, i, j])
    finally:
        deeplab.backbone = kept
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_a_file_are_loaded_and_norms_frozen(tmp_path):
    import torchvision

    resnet = torchvision.models.resnet50(weights=None)
    with torch.no_grad():
        resnet.bn1.running_mean.uniform_()
    torch.save(resnet.state_dict(), tmp_path / "resnet50.pt")
    model = models.build("deeplabv2", 3, backbone="resnet50", weights=str(tmp_path / "resnet50.pt"))
    assert torch.equal(model.backbone.layer3[2].conv2.weight, resnet.layer3[2].conv2.weight)
    assert torch.equal(model.backbone.bn1.running_mean, resnet.bn1.running_mean)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    prefixed = {f"backbone.{name}": value for name, value in resnet.state_dict().items() if not name.startswith("fc")}
    torch.save({**prefixed, "classifier.0.weight": torch.zeros(1)}, tmp_path / "segmentation.pt")
    model = models.build(
        "deeplabv2", 3, backbone="resnet50", weights=str(tmp_path / "segmentation.pt"), freeze_norm=False
    )
    assert torch.equal(model.backbone.conv1.weight, resnet.conv1.weight)
    assert isinstance(model.backbone.bn1, nn.BatchNorm2d)
    with pytest.raises(ValueError, match=r"resnet50.pt are not of this ResNet: it lacks layer3.6"):
        models.build("deeplabv2", 3, weights=str(tmp_path / "resnet50.pt"))


def test_weights_that_are_not_there_are_named(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    with pytest.raises(ValueError, match=r"got ResNet50_Weights.NOPE"):
        models.build("deeplabv2", 3, weights="ResNet50_Weights.NOPE")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"IMAGENET1K_V2 could not be fetched from https://.*: no network"):
        models.build("deeplabv2", 3, backbone="resnet50", weights="ResNet50_Weights.IMAGENET1K_V2")


def test_the_small_network_has_the_same_interface():
    model = models.build("unet", 5, width=4)
    assert model(torch.randn(2, 3, 17, 22)).shape == (2, 5, 17, 22)
    assert models.build("unet", 5, channels=1, width=4)(torch.randn(1, 1, 16, 16)).shape == (1, 5, 16, 16)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="name must be one of"):
        models.build("alexnet", 3)
    with pytest.raises(ValueError, match="backbone must be one of"):
        models.build("deeplabv2", 3, backbone="resnet18")
    with pytest.raises(ValueError, match="rates must be"):
        models.build("deeplabv2", 3, rates=())
