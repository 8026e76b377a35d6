"""Prints, as one line of JSON, where this interpreter's PyTorch lies; exits 3 where it has none.

Run by setup.py (and by CMakeLists.txt when CMake is called by hand) as a subprocess of the interpreter that will
import linattn: inside an isolated build that is another environment than the one the build runs in.
"""

import json
import os
import sys

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(3)

root = os.path.dirname(os.path.abspath(torch.__file__))
facts = {
    "version": str(torch.__version__),
    "cuda": getattr(torch.version, "cuda", None) or "",
    "include": os.path.join(root, "include"),
    "lib": os.path.join(root, "lib"),
    "python": sys.executable,
}
print(json.dumps(facts))
