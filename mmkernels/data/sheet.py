"""A CSV file, row by row, with the line of each and what is wrong with it."""

import csv
import re
from dataclasses import dataclass

COLUMNS = ("path", "text", "sound", "label")
DELIMITERS = ",;\t"
# What an undecodable byte is read as, and written back from.
_UNDECODABLE = re.compile("[\udc80-\udcff]")


@dataclass
class Row:
    """A row of a CSV file.

    Attributes:
        line, last: where it begins and ends, from 1.
        cells: as they are in the file.
        problem: why it can't be used, or None.
    """

    line: int
    last: int
    cells: list
    problem: str | None = None


@dataclass
class Sheet:
    """What :func:`read_sheet` returns: the names of the columns, and the rows in their order."""

    path: object
    header: list
    rows: list
    delimiter: str = ","

    def __post_init__(self):
        self.index = {name.strip().lower(): number for number, name in enumerate(self.header)}

    def __contains__(self, column):
        return column in self.index

    def cell(self, row, column):
        """What stands in a row's column, without space around; empty where the file has no such column."""
        return row.cells[self.index[column]].strip() if column in self.index else ""

    def write(self, path, columns):
        """Writes the rows with further columns, a dict of name -> a str for each row; one that was there is replaced.
        Undecodable bytes are written as they were read."""
        kept = [number for number, name in enumerate(self.header) if name not in columns]
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(
                file, delimiter=self.delimiter
            )  # ends lines with \r\n: only then it quotes a cell with \r
            writer.writerow([self.header[number] for number in kept] + list(columns))
            for row, *added in zip(self.rows, *columns.values()):
                cells = row.cells + [""] * (len(self.header) - len(row.cells))
                beyond = cells[len(self.header) :]
                writer.writerow([cells[number] for number in kept] + added + beyond)


def read_sheet(path, needed=()):
    """Reads a CSV file: UTF-8, a row of columns' names first, cells separated by comma, semicolon or tab, quoted as
    RFC 4180 has it. Empty lines are no rows. Whatever else the file holds, each row is returned, and says what is wrong
    with it: another number of cells than columns, bytes that aren't UTF-8, or what Python's csv refuses.

    Raises:
        OSError: the file can't be read.
        ValueError: it has no row of names, a name twice, not all columns of `needed`, or none of path, text, sound.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        delimiter = max(DELIMITERS, key=first.count)
        file.seek(0)
        rows = list(_rows(csv.reader(file, delimiter=delimiter)))
    if not rows or rows[0].problem:
        raise ValueError(f"{path} must begin with the columns' names: {rows[0].problem if rows else 'it is empty'}")
    header = rows[0].cells
    names = [name.strip().lower() for name in header]
    twice = sorted({name for name in names if name in COLUMNS and names.count(name) > 1})
    missing = [name for name in needed if name not in names]
    if twice or missing or not {"path", "text", "sound"} & set(names):
        wrong = f"{twice[0]} is there twice" if twice else f"{(missing or ['path, text or sound'])[0]} is missing"
        raise ValueError(f"{path} must have columns of {', '.join(COLUMNS)} in its first line: {wrong}, got {header}")
    for row in rows[1:]:
        if row.problem is None and len(row.cells) != len(header):
            row.problem = f"{len(row.cells)} cells, but {len(header)} columns"
            if row.last > row.line:
                row.problem += f", up to line {row.last}: is a quote left open?"
    return Sheet(path, header, rows[1:], delimiter)


def _rows(reader):
    while True:
        before = reader.line_num
        try:
            cells = next(reader)
            problem = None
        except StopIteration:
            return
        except csv.Error as error:
            cells, problem = [], str(error)
        if problem is None:
            if not cells:
                continue
            if any(map(_UNDECODABLE.search, cells)):
                problem = "it isn't UTF-8"
            elif any("\0" in cell for cell in cells):
                problem = "it holds a zero byte"
        yield Row(before + 1, reader.line_num, cells, problem)
