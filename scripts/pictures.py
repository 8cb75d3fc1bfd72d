"""Pictures of one run: python scripts/pictures.py RUN   a layer's gradients and the formats' levels; its health."""

import sys

from luqrun.report.pictures import main

if __name__ == "__main__":
    sys.exit(main())
