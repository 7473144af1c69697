"""How fast it is, what it is compared with, and how far it is from the limit; installed as lmp_triton.perf.

workloads, providers   what is timed: shapes and losses; this project's ways and its peers
measure, bench         how it is timed; the runner behind `lmp-triton bench run`
report                 tables, plots and comparisons of the results
catalogue, compiled, static, solvers    what can be known without a GPU
stress, gpu_session    the whole session on a rented GPU, one command
"""
