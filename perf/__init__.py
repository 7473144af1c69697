"""How fast it is, what it is compared with, and how far it is from the limit; installed as lmp_triton.perf.

workloads, providers   what is timed: shapes and losses; this project's ways and its peers
measure, timing, host  how it is timed: clocks and turns; on this device; the host's part, on a GPU that is not there
sets, bench            what is timed against what; the runner behind `lmp-triton bench`
table, report          the file of results; tables, plots and comparisons of it
catalogue, compiled, roofline, static   what can be known without a GPU: compiled code, and a model of the GPU
standin, launches      launches and compilations, on a GPU that is not there
solvers                rounds, passes, bytes and instructions of the two solvers
stress, gpu_session    the whole session on a rented GPU, one command
"""
