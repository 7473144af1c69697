"""The paper's system around the loss: sampling, metrics, tiled inference, baselines, models, data, training.

It stands on other libraries (`pip install "lmp-triton[segmentation]"`), and nothing in the core imports it. Import what
you need from its modules; this one imports none of them.
"""
