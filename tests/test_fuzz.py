"""A fixed budget of the fuzzer, and what it found before."""

import pytest
from fuzz import CASES, check, examples
from hypothesis import given


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_fuzz(backend):
    @examples(150 if backend == "eager" else 60)
    @given(CASES)
    def cases(case):
        check(case, [backend])

    cases()
