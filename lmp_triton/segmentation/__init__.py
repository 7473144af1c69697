"""The paper's system around the loss: sampling, metrics, tiled inference, baselines, models, data, training.

It stands on other libraries (`pip install "lmp-triton[segmentation]"`), and nothing in the core imports it. Import what
you need from its modules; this one imports none of them. What they agree on:

- A **dataset** has `classes` (names, in the order of their indices), `ignore_index` (255) and items (image, target):
  image float32 (channels, H, W), target int64 (H, W). `dataset[3]` is item 3; `dataset[draw]` the item, and the crop of
  it, that a sampler has drawn (`sampling.Draw`), augmented by `dataset.transform`: the same bits for the same draw, in
  whatever process. `datasets`: Cityscapes, PascalVOC, Folder, Arrays.
- A **sampler** is a torch Sampler that yields draws. `ClassIndex.build(dataset, cache=folder)` reads every file once,
  with a progress bar, complains of the first that is bad, and counts the pixels of each class;
  `ComplementarySampler(index, mode="inverse-iou", blend=0.5, seed=0)` goes into a DataLoader; after each step
  `sampler.observe(logits.argmax(1), target)`. `sampler.state_dict()` belongs into the checkpoint.
- A **model** maps images (N, channels, H, W) to logits (N, classes, h, w), which may be coarser than the images:
  `models.build("deeplabv2" or "unet", classes, **options)`.
- A **criterion** maps logits (N, classes, h, w), at whatever resolution, and target (N, H, W) to a loss:
  `baselines.build_criterion(name, ignore_index=255, **options)` with a name of `baselines.CRITERIA`. With
  `return_stats=True` it returns (loss, dict of 0-dim tensors to log).
- `metrics.IoU(classes, ignore_index)` is a torchmetrics Metric, updated with predictions or logits and target;
  `tiling.predict(model, images, tiling)` gives labels (N, H, W) at full resolution.
"""
