"""The paper's tables and figures from run folders and summaries: the same as luqrun-tables, for a checkout.

python scripts/tables.py outputs/                   Markdown, CSV, JSON and figures of what is there, in outputs/tables/
python scripts/tables.py outputs/ --html --check    pages too; fails where the paper's ordering is not shown
python scripts/tables.py outputs/ outputs/published --out outputs/published    runs added to the published ones
"""

import sys

from luqrun.report.command import main

if __name__ == "__main__":
    sys.exit(main())
