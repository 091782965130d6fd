"""Workers of other interpreters are scripts, which import the files beside them."""

import sys
from pathlib import Path

from pyggml_repkv.lab.bench import workers

sys.path.insert(0, str(Path(workers.__file__).parent))
