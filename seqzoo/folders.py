"""Where SeqZoo keeps on this machine what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder that ``SEQZOO_CACHE`` names, else ``seqzoo`` under ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: If the folder would be in a home that cannot be found.
    """
    given, caches = os.environ.get("SEQZOO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(given).expanduser() if given else Path(caches or Path.home() / ".cache") / "seqzoo"
