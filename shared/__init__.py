"""What every process shares. Imported before all else of ours, and so the place to say what libraries must know first.

Official Linux builds of ONNX Runtime from 1.29 on report to their maker what is run (names, graph, hashes of weights),
from a thread that starts with the import. A model and its use stay on this host unless its owner decides otherwise, by
setting the variable to 0.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# On CPUs, attention as matrix products: since 1.30 or so in tiles by default, which is up to a fifth slower at decoding
# (docs/decisions/0025-attention-on-cpus.md).
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
# CUDA numbers GPUs by their speed unless told otherwise; NVML and nvidia-smi by their place on the bus.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
