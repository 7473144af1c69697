#!/usr/bin/env bash
# Everything to do on a rented GPU, in one command; perf/gpu_session.py says what.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_session.py" "$@"
