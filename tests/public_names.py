"""Run under any name: what the package imports at once, and what its public names bring."""

import json
import sys

import register_adapter

#: What registers the method with PEFT; the process may have imported PEFT itself before.
PART = "register_adapter.tuner"
report = {"at once": PART in sys.modules}
report["unknown name"] = hasattr(register_adapter, "no_such_name")
report["before names"] = PART in sys.modules
report["missing"] = [name for name in register_adapter.__all__ if not hasattr(register_adapter, name)]

from peft import PeftType  # noqa: E402

report["registered"] = "REGISTER_ADAPTER" in [kind.value for kind in PeftType]
report["same"] = register_adapter.audit is sys.modules["register_adapter.artifacts"].audit
sys.stdout.write(json.dumps(report))
