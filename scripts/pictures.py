"""Pictures of one run: luqrun-pictures, where luqrun is not installed.

python scripts/pictures.py RUN    a layer's gradients and the formats' levels; the health of all layers
"""

import sys

from luqrun.report.pictures import main

if __name__ == "__main__":
    sys.exit(main())
