"""What every tier shares."""

import os

# Before torch is imported anywhere: tests run small kernels, and threads would only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
