"""`python benchmarks`: run every benchmark, then rewrite the README's tables."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sys.argv[1:] or ["tracing", "step_overhead", "compiled", "simulator", "shared_memory", "decoding",
                         "scale"]

for name in NAMES:
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)
subprocess.run([sys.executable, str(HERE.parent / "docs" / "make_readme.py")], check=True)
