"""Plants one bug after another in a copy of this tree and runs the tests: whatever none of them notices is a hole.

    python tools/mutants [--only cuda | --only cuda:additive] [--resume]        (make mutants ONLY=cuda)

The tables are cpu_mutants.py, cuda_mutants.py and triton_mutants.py. What was found is kept in build/mutants.json:
--resume leaves out what was caught before, unless its entry has changed. When all have a verdict, it is written to
docs/generated/mutants.md. Exits 1 where a mutant isn't caught and isn't listed as equivalent.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import table
from mutant import ROOT, SOURCES, NotFound, mutants
from tree import Tree, Unbuilt
from verdicts import confirm, judge

FOUND = ROOT / "build" / "mutants.json"
GOOD = ("caught", "equivalent")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a backend, or backend:text of an operation or a name")
    parser.add_argument("--resume", action="store_true", help="leave out what was caught before")
    asked = parser.parse_args()
    everything = [(backend, mutant) for backend in SOURCES for mutant in mutants(backend)]
    chosen = [each for each in everything if is_asked_for(asked.only, *each)]
    if not chosen:
        parser.error(f"no mutant is called {asked.only!r}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was planted is taken out again
    kept = {key(row): row for row in json.loads(FOUND.read_text())} if FOUND.exists() else {}
    before = time.monotonic()
    tree = Tree()
    print(f"copied and built in {time.monotonic() - before:.0f} s", flush=True)
    for backend, mutant in chosen:
        row = {"backend": backend, **vars(mutant)}
        if asked.resume and kept.get(key(row), {}).get("verdict") in GOOD:
            continue
        kept[key(row)] = row | try_out(tree, backend, mutant)
        keep(kept.values())
        print(line(kept[key(row)]), flush=True)

    rows = [kept[key({"backend": backend, **vars(mutant)})] for backend, mutant in chosen]
    confirm(tree, rows)
    keep(kept.values())
    found = [kept.get(key({"backend": backend, **vars(mutant)})) for backend, mutant in everything]
    if all(found):
        table.write(found)
    wrong = [row for row in rows if row["verdict"] not in GOOD]
    print(f"{len(rows)} mutants, {len(wrong)} not caught, {sum(row['seconds'] for row in rows):.0f} s")
    for row in wrong:
        print(line(row))
    return 1 if wrong else 0


def is_asked_for(only, backend, mutant):
    wanted, _, word = (only or "").partition(":")
    return wanted in ("", backend) and word in f"{mutant.operation}: {mutant.name}"


def key(row):
    """An entry of a table: another one must be tried out anew."""
    return tuple(row[name] for name in ("backend", "operation", "name", "find", "put", "tests", "equivalent"))


def keep(rows):
    FOUND.parent.mkdir(exist_ok=True)
    FOUND.write_text(json.dumps(list(rows), indent=2) + "\n")


def line(row):
    name = f"{row['operation']}: {row['name']}"
    told = " ".join(f"{row['test']} {row['told']}".split())
    return f"{row['backend']:7}{row['verdict']:11}{row['seconds']:6.1f} s  {name}  [{told[:300]}]"


def try_out(tree, backend, mutant):
    """What becomes of it: its file, verdict, the test that failed, the test's message, seconds."""
    before = time.monotonic()
    file, test = "", ""
    try:
        with tree.planted(backend, mutant) as path:
            file = str(path.relative_to(tree.root))
            verdict, test, told = judge(tree, backend, mutant)
    except (Unbuilt, NotFound) as error:
        verdict, told = "broken", str(error)
    if verdict == "survived" and mutant.equivalent:
        verdict, told = "equivalent", mutant.equivalent
    seconds = round(time.monotonic() - before, 1)
    return {"file": file, "verdict": verdict, "test": test, "told": told, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
