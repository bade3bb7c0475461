"""What vLLM's offline API answers and refuses, in one process: importing vLLM takes longer than most cases."""

import json
import sys
from pathlib import Path

from engines import CASES, LAST, inspect_here, run_all
from refusals import refuse_all

if __name__ == "__main__":
    folder, out, words = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    inspect_here()
    compared = run_all(folder, CASES, words)
    refused = [] if words else refuse_all(folder)
    compared = [result.row() for result in (*compared, *run_all(folder, LAST, words))]
    out.write_text(json.dumps({"compared": compared, "refused": refused}))
    sys.exit(not all([*(row["passed"] for row in compared), *(row["refused"] for row in refused)]))
