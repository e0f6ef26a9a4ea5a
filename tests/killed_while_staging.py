"""Begins to write into a folder and waits to be killed."""

from __future__ import annotations

import sys
import time

from register_adapter.utils.staging import staged

with staged(sys.argv[1]) as scratch:
    (scratch / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
