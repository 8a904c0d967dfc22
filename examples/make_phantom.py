"""Write one phantom chest CT with its truth: python examples/make_phantom.py SEED FOLDER"""

from __future__ import annotations

import sys

from vlm3d.datasets.phantom import generate_phantom
from vlm3d.datasets.phantom.writing import write_phantom

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(write_phantom(generate_phantom(int(sys.argv[1])), sys.argv[2]))
