"""One page that needs nothing from elsewhere."""

import base64

from ..data.extras import require


def write(path, results, pictures):
    """Renders ``templates/demo.html``.

    Args:
        path: of the page.
        results: what ``results.json`` holds.
        pictures: PNG bytes by name, or lists of dicts with some.
    """
    jinja2 = require("jinja2")
    environment = jinja2.Environment(loader=jinja2.PackageLoader("mmkernels"), autoescape=True)
    environment.filters["inline"] = lambda data: "data:image/png;base64," + base64.b64encode(data).decode()
    page = environment.get_template("demo.html").render(
        r=results, pictures=pictures, verified=by_backend(results["verify"]), peers=PEERS
    )
    path.write_text(page, encoding="utf-8")


PEERS = {"ours": "fused", "sdpa": "PyTorch's SDPA", "hugging face": "Hugging Face's own"}


def by_backend(verified):
    """What was verified, a line a backend: ``[{backend, comparisons, operations, dtypes, failed, worst}]``; worst is
    the largest error, as a share of what is allowed."""
    lines = {}
    for row in (verified or {}).get("rows", []):
        line = lines.setdefault(
            row["backend"],
            {"backend": row["backend"], "comparisons": 0, "operations": [], "dtypes": [], "failed": 0, "worst": 0.0},
        )
        line["comparisons"] += row["cases"]
        line["failed"] += len(row["failures"])
        line["worst"] = max(line["worst"], row["ratio"])
        for key in ("operation", "dtype"):
            if row[key] not in line[f"{key}s"]:
                line[f"{key}s"].append(row[key])
    return list(lines.values())
