"""The page of what became of every mutant: docs/generated/mutants.md."""

from mutant import ROOT

PAGE = ROOT / "docs" / "generated" / "mutants.md"
HEAD = """\
# Planted bugs

Written by `make mutants`: small bugs that were planted in the kernels, one at a time, and the first test that failed.
[testing.md](../testing.md) tells how.
"""


def write(rows):
    lines = [HEAD]
    for backend in dict.fromkeys(row["backend"] for row in rows):
        lines += [f"## {backend}", "", "| operation | bug | in | caught by |", "|---|---|---|---|"]
        lines += [line(row) for row in rows if row["backend"] == backend]
        lines.append("")
    PAGE.write_text("\n".join(lines))


def line(row):
    by = f"`{row['test'].replace('|', ' ')}`" if row["verdict"] == "caught" else f"{row['verdict']}: {row['told']}"
    return f"| {row['operation']} | {row['name']} | {row['file']} | {by.splitlines()[0]} |"
