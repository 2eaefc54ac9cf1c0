#!/usr/bin/env bash
# `datasets` keeps ten decimals of the floats of a JSON array, so that small ones become 0.0; JSON Lines keep them all.
#
# `load_dataset("json")` takes one array of objects as well as an object a line. It turns an array into lines first, by
# pandas' own encoder, whose default is ten digits after the point, whatever the size of the number: 3e-12 is 0.0 then, a
# probability loses half its digits, and the largest float is infinite. The same rows as lines are exact - unless one
# column holds values of different kinds (texts and lists, as messages of chats do): then every line is written anew, and
# the floats of all other columns are rounded with it. Integers stay exact. Nothing warns.
# Seen 2026-11-29 with datasets 5.2.0, pandas 3.0.6 and pyarrow 26.0.1:
#     in the file:                      3.25e-12  0.123456789012345  1.7976931348623157e+308
#     loaded from an object a line:     3.25e-12  0.123456789012345  1.7976931348623157e+308
#     from an array:                    0.0       0.123456789        inf
#     from lines, another column mixed: 0.0       0.123456789        inf
# What helps: an object a line and one kind of value in each column, or Parquet.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pandas==3.0.6 pyarrow==26.0.1
HF_HOME="$work/hub" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$work/venv/bin/python" - "$work" <<'PY'
import json
import math
import sys
from pathlib import Path

from datasets import load_dataset

numbers = [3.25e-12, 0.123456789012345, sys.float_info.max]
rows = [{"number": number, "content": "text"} for number in numbers]
mixed = [*rows, {"number": 1.0, "content": [{"type": "text"}]}]


def loaded(name, text):
    file = Path(sys.argv[1], f"{name}.json")
    file.write_text(text)
    found = load_dataset("json", data_files=str(file), split="train")["number"][:3]
    print(f"{name:6}", *found)
    return found


lines = loaded("lines", "".join(json.dumps(row) + "\n" for row in rows))
array = loaded("array", json.dumps(rows))
beside = loaded("mixed", "".join(json.dumps(row) + "\n" for row in mixed))
sys.exit(0 if lines == numbers and array == beside == [0.0, 0.123456789, math.inf] else "this has changed")
PY
