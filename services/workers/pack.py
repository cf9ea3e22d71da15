"""`python -m services.workers.pack MODEL/VARIANT ...`: packs weights for this host's CPU before anybody waits for them.

Run by `calm models pull`, `calm models add` and `calm up`. What cannot be packed is left to the engines, which load it
the ordinary way.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from services.workers import device as devices
from services.workers.engine.loader import pack
from shared.errors import CalmError
from shared.models.manifest import artifact_name
from shared.models.store import ModelStore
from shared.settings import Settings


def pack_all(names: Sequence[str], settings: Settings) -> None:
    """Pack those of `names` that are not packed yet, if this host's engines run on its CPU.

    Raises:
        DeviceUnavailable: a device was asked for that this host does not have.
    """
    device = devices.probe(settings)
    if device.kind != "cpu":
        return
    store = ModelStore(settings.models_path)
    for name in names:
        model, _, variant = name.partition("/")
        with contextlib.suppress(CalmError):  # the engine says it better
            found = store.variant(model, variant)
            graph = store.path(model) / found.path / "model.onnx"
            pack(settings.weights_paths, artifact_name(model, variant), graph, found.weights_bytes, device)


def main() -> None:
    try:
        pack_all(sys.argv[1:], Settings.from_env())
    except CalmError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
