"""What every tier shares."""

import os

import pytest

# Before torch is imported anywhere: tests run small kernels, and threads would only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Helpers that assert: a failure is to say with what values.
pytest.register_assert_rewrite("tests.helpers.runs")
