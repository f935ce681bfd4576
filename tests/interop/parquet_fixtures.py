"""Writes parquet/: the same rows as Parquet by Arrow, once with each compression, and as jsonl.

    python tests/interop/parquet_fixtures.py

The rows cover several row groups, pages with and without a dictionary, nulls, lists of objects, an object of lists,
integers and floating-point numbers, and a date.
"""

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(__file__).parent / "parquet"

WORDS = ["good tea", "bad", "Ann likes tea", "Zoë's naïve café", "两杯茶", "", "a\nb\t\"c\""]


def row(i):
    return {
        "text": WORDS[i % len(WORDS)] + " good" * (i % 3),
        "label": i % 2,
        "score": None if i % 5 == 0 else i / 4,
        "half": i / 8,
        "turns": [{"role": "user", "content": WORDS[j]} for j in range(i % 4)],
        "answers": {"text": [WORDS[i % 3], "tea"], "answer_start": [i, i + 1]},
        "known": i % 3 == 0,
        "day": None if i % 2 else datetime.date(2020, 1, 1 + i % 28),
    }


SCHEMA = pa.schema([
    ("text", pa.string()), ("label", pa.int64()), ("score", pa.float64()), ("half", pa.float32()),
    ("turns", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("answers", pa.struct([("text", pa.list_(pa.large_string())), ("answer_start", pa.list_(pa.int32()))])),
    ("known", pa.bool_()), ("day", pa.date32()),
])

OUT.mkdir(exist_ok=True)
rows = [row(i) for i in range(40)]
table = pa.Table.from_pylist(rows, schema=SCHEMA)
for name in ["none", "snappy", "gzip", "zstd", "lz4"]:
    pq.write_table(table, OUT / f"{name}.parquet", compression=name, row_group_size=17, use_dictionary=name != "zstd")
lines = [json.dumps(row | {"day": row["day"] and row["day"].isoformat()}, ensure_ascii=False) for row in rows]
(OUT / "rows.jsonl").write_text("\n".join(lines) + "\n")
