"""The oracle of this folder is imported by its name."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent))
