"""Did every test run? Reads what tests/conftest.py recorded of all runs (MMKERNELS_TEST_RECORD), and exits 1 where not.

    python tests/ran.py FILE

A test has run if it passed under some target. One that was only left out (by a mark, by a name) is run by no target;
one that was skipped everywhere must have a reason that this machine can do nothing about. And what the tests' table of
coverage counts was shown by at least one test that passed. What was left out as the machine is too slow
(MMKERNELS_TEST_UNTIL) is excused, and counted.
"""

import collections
import json
import re
import sys
from pathlib import Path

# What a machine may lack, and what a backend has not: the reference is no registered operation, a slow one takes no
# large case. A missing package isn't among them: whatever a test needs, the project's own files install.
LACKING = re.compile(
    r"GPU|CUDA device|this machine has \w+ at best|nvcc isn't installed|compute-sanitizer|needs virtual memory|is not on the CPU"
    r"|this system can't tell|a large case|not on meta tensors|not a registered operation|there is no GPU"
)
LATE = "no time left"  # conftest.py's reason


def main(file):
    outcomes = collections.defaultdict(set)
    reasons = {}
    seconds = collections.Counter()
    cells = collections.defaultdict(set)
    for line in Path(file).read_text().splitlines():
        row = json.loads(line)
        if LATE in row["reason"]:
            row["outcome"] = "late"
        outcomes[row["test"]].add(row["outcome"])
        reasons.setdefault(row["test"], row["reason"])
        seconds[row["test"].split("::")[0]] += row["seconds"]
        for cell in row["shown"]:
            cells[tuple(cell)].add(row["outcome"])
        if row["reason"]:
            reasons[row["test"]] = row["reason"]

    count = collections.Counter(
        next(o for o in ("failed", "passed", "late", "skipped", "deselected") if o in found)
        for found in outcomes.values()
    )
    ran_of = {
        test.split("::")[0] for test, found in outcomes.items() if "passed" in found
    }  # a file may be skipped as a whole under one target
    skipped = [
        test
        for test, found in outcomes.items()
        if found <= {"skipped", "deselected"} and "skipped" in found and test not in ran_of
    ]
    never = [test for test, found in outcomes.items() if found == {"deselected"}]
    print(
        "seconds of tests:", ", ".join(f"{name.removeprefix('tests/')} {s:.0f}" for name, s in seconds.most_common(12))
    )
    print(", ".join(f"{n} {outcome}" for outcome, n in count.items()), "over all targets")
    for reason, n in collections.Counter(reasons[test] for test in skipped).most_common():
        print(f"  {n} skipped everywhere: {reason}")

    unexcused = [test for test in skipped if not LACKING.search(reasons[test])]
    unshown = [" x ".join(filter(None, cell)) for cell, found in cells.items() if not found & {"passed", "late"}]
    late = collections.Counter(
        test.split("::")[0] for test, found in outcomes.items() if "late" in found and not found & {"passed", "failed"}
    )
    if late:
        files = ", ".join(f"{name.removeprefix('tests/')} {n}" for name, n in late.most_common())
        print(f"  {late.total()} late: left out, as this machine is too slow for all: {files}")
    print(
        f"{sum('passed' in found for found in cells.values())} of {len(cells)} properties of operations and backends shown"
    )
    for cell in unshown:
        print(f"no test that shows it passed: {cell}")
    for title, tests in (("run by no target", never), ("skipped for no good reason", unexcused)):
        for test in tests[:20]:
            print(f"{title}: {test}  {reasons[test]}")
    return 1 if never or unexcused or unshown or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
