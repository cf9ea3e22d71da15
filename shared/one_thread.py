"""Imported before NumPy by the services that only decide: their matrices are small, and OpenBLAS keeps a thread a core
that spins for work it does not get (measured: 2.4 s of processor time for one decomposition of 384 columns, at the
expense of every query that came meanwhile)."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
