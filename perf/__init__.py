"""How fast it is, what it is compared with, and how far it is from the limit; installed as lmp_triton.perf.

workloads, providers   what is timed: shapes and losses; this project's ways and its peers
measure, bench         how it is timed; the runner behind `lmp-triton bench run`
report                 tables, plots and comparisons of the results
catalogue, compiled, roofline, static   what can be known without a GPU: compiled code, and a model of the GPU
standin, launches      launches, compilations and host time, on a GPU that is not there
solvers, eager_cpu, host_cost           counts and times of single parts
stress, gpu_session    the whole session on a rented GPU, one command
"""
