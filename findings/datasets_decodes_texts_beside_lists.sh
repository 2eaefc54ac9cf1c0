#!/usr/bin/env bash
# `datasets` turns a text that happens to be JSON into what that JSON means, as soon as any other row holds a list.
#
# Chats mix two shapes of a message: `"content": "text"` and `"content": [{"type": "text", ...}]`. Since the feature type
# `Json`, `load_dataset("json")` loads such a file without a word: the column is stored as JSON strings. But a string that
# can be parsed already is stored as it is and not quoted, so it comes back parsed. An answer "42" becomes a number, "null"
# nothing at all, a tool's output a dict, and a quotation loses its marks. One row with a list is enough; without it every
# text is loaded as it stands. Nothing warns.
# Seen 2026-11-29 with datasets 5.2.0, pandas 3.0.6 and pyarrow 26.0.1:
#     beside a row with a list: '42' -> 42, '007' -> 7, 'null' -> None, 'true' -> True, 'NaN' -> None,
#     ' 1e5 ' -> 100000.0, '[1, 2]' -> [1, 2], '{"degrees": 3}' -> {'degrees': 3}, '"To be"' -> 'To be'
#     without that row: each text as it was
# What helps: one shape for all rows, or `json.dumps` of each text before it is written, which gives the text back.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pandas==3.0.6 pyarrow==26.0.1
HF_HOME="$work/hub" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$work/venv/bin/python" - "$work" <<'PY'
import json
import sys
from pathlib import Path

from datasets import load_dataset

texts = ["hello", "42", "007", "null", "true", "NaN", " 1e5 ", "[1, 2]", '{"degrees": 3}', '"To be"']
parts = [{"type": "text", "text": "hello"}]


def loaded(name, contents):
    file = Path(sys.argv[1], f"{name}.jsonl")
    chats = [{"messages": [{"role": "assistant", "content": content}]} for content in contents]
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    rows = load_dataset("json", data_files=str(file), split="train")
    return [row["messages"][0]["content"] for row in rows]


alone, beside = loaded("alone", texts), loaded("beside", [*texts, parts])
quoted = loaded("quoted", [*map(json.dumps, texts), parts])
for text, found in zip(texts, beside):
    print(f"{text!r:20} {found!r}")
wanted = ["hello", 42, 7, None, True, None, 1e5, [1, 2], {"degrees": 3}, "To be", parts]
same = alone == texts and quoted == [*texts, parts]
kinds = [[type(content) for content in contents] for contents in (beside, wanted)]
sys.exit(0 if same and beside == wanted and kinds[0] == kinds[1] else "this has changed")
PY
