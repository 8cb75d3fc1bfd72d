"""The weights of a finished run as one file of safetensors; luqrun/report/export.py does the work.

python scripts/export.py RUN           packed 4-bit codes with their scales: RUN/packed.safetensors
python scripts/export.py RUN --full    the state_dict in full precision, under torchvision's names: RUN/full.safetensors
"""

import sys

from luqrun.report.export import main

if __name__ == "__main__":
    sys.exit(main())
