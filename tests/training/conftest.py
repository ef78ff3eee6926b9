"""Makes `training_harness` importable for the tests of this folder (they are no package)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
