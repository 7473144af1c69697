"""Programs to copy from: `python -m lmp_triton.examples.NAME`. Each runs on a CPU in seconds, on data it makes up."""
