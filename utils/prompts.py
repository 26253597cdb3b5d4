# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Read columns of a file as text: prompts of the training scripts, the evaluation and prepare_prompts.py.

Text stays what the file shows: `42`, `1.50` and `true` too. A table's rows must be as wide as its header.
"""

import csv
import io
import json
import pickle
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.parquet


SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")


def read_rows(path, *columns):
    """Yield the values of `columns`, text or None, of each row of a file; a .txt has one column, its lines.

    Empty lines of a table are no rows. A .tsv file has no quotation marks of its own: they are text.

    Raises OSError, or ValueError with the row's number and a remedy.
    """
    path = Path(path)
    if (kind := path.suffix.lower()) not in SUFFIXES:
        raise ValueError(f"{kind or 'a name without suffix'} is none of {', '.join(SUFFIXES)}")
    if kind == ".parquet":
        return read_parquet(path, columns)
    text = read_text(path)
    if kind == ".txt":
        if len(columns) > 1:
            raise ValueError(f"it has lines, not the columns {', '.join(columns)}")
        return ((line.strip(),) for line in text.split("\n"))
    return read_jsonl(text, columns) if kind == ".jsonl" else read_table(text, kind, columns)


def read_text(path):
    """Return a file's text, UTF-8 with or without a byte order mark; ValueError names the remedy."""
    content = Path(path).read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:1000]:
        raise ValueError(f"it is UTF-16 or no text; convert it: iconv -f UTF-16 -t UTF-8 {path}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8; convert it, for instance: iconv -f LATIN1 -t UTF-8"
                         f" {path}") from error


class TextUnpickler(pickle.Unpickler):
    """Read lists, numbers and text; refuse a pickle that names a class or function, which could run code."""

    def find_class(self, module, name):
        raise ValueError(f"it names {module}.{name}, but only a list of text is read")


def read_pickle(path):
    """Return a pickled list, the form in which DMD2 publishes its captions; not every entry need be text.

    Raises ValueError for anything but a list of plain values, and pickle's errors for a damaged file.
    """
    with open(path, "rb") as file:
        content = TextUnpickler(file).load()
    if not isinstance(content, list):
        raise ValueError(f"it is a pickle of a {type(content).__name__}, not of a list of text")
    return content


def check_columns(columns, held):
    """Raise ValueError unless each of `columns` is one of the `held` names, once."""
    for column in columns:
        if (count := list(held).count(column)) != 1:
            raise ValueError(f"its columns are {', '.join(map(str, held)) or 'none'}"
                             + f", so {column} is ambiguous" * (count > 1))


def read_table(text, kind, columns):
    given = {"quoting": csv.QUOTE_NONE, "delimiter": "\t"} if kind == ".tsv" else {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **given)
    rows = (row for row in reader if len(row) > 1 or row and row[0].strip())
    try:
        header = next(rows, [])
        check_columns(columns, header)
        places = [header.index(column) for column in columns]
        for row in rows:
            if len(row) != len(header):
                quotes = "quote text that has commas" if kind == ".csv" else "tabs divide fields"
                raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header {len(header)};"
                                 f" {quotes}, or use a .txt file, with a prompt per line")
            yield tuple(row[place] for place in places)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def read_jsonl(text, columns):
    found = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_int=str, parse_float=str)  # as the file shows them
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no object with columns")
        found.update(dict.fromkeys(row))
        yield tuple(json_text(row.get(column), number) for column in columns)
    check_columns(columns, found)


def json_text(value, number):
    """A value as text; NaN and null are None."""
    if isinstance(value, (list, dict)):
        raise ValueError(f"it holds lists or records, not text, in line {number}")
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None or value != value else str(value)


def read_parquet(path, columns):
    with pyarrow.parquet.ParquetFile(path) as file:
        check_columns(columns, file.schema_arrow.names)
        for batch in file.iter_batches(columns=list(columns)):
            yield from zip(*(arrow_text(batch.column(column)) for column in columns))


def arrow_text(values):
    """The values of an Arrow array as text; bytes are UTF-8, NaN is None."""
    if pyarrow.types.is_nested(values.type):
        raise ValueError("it holds lists or records, not text")
    if pyarrow.types.is_floating(values.type):
        values = pyarrow.compute.if_else(pyarrow.compute.is_nan(values), None, values)
    return values.cast(pyarrow.string()).to_pylist()


def read_prompts(path, column="text"):
    """The non-empty values of a column, stripped."""
    texts = (value.strip() for (value,) in read_rows(path, column) if value is not None)
    return list(filter(None, texts))
