"""Fails if a wheel weighs more than it may: ``python weigh_wheel.py WHEEL cpu=MIB cuda=MIB``.

The limit is that of the heaviest kind of kernels inside; a wheel without any has none to exceed and is refused.
"""

import sys
import zipfile
from pathlib import Path

wheel, *limits = sys.argv[1:]
allowed = {kind: float(mib) for kind, mib in (limit.split("=") for limit in limits)}
names = zipfile.ZipFile(wheel).namelist()
kinds = [kind for kind in allowed if any(name.startswith(f"fastsam/_{kind}.") for name in names)]
if not kinds:
    sys.exit(f"{wheel} holds no compiled kernels: was there a compiler?")
mib, limit = Path(wheel).stat().st_size / 2**20, max(allowed[kind] for kind in kinds)
print(f"{Path(wheel).name}: {mib:.2f} MiB with {' and '.join(kinds)} kernels, {limit:.2f} allowed")
if mib > limit:
    sys.exit(f"{Path(wheel).name} is heavier than {limit} MiB: drop an architecture, or raise the limit and say why")
