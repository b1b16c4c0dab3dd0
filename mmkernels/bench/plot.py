"""Speed-ups as bars: a row of panels an operation, a panel a kind of call, a group of bars a shape."""

from . import report

# In the order of the bars and of the colours; peers that only a new operation has come after them.
PEERS = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "sdpa": "SDPA",
    "split": "eager PyTorch, its Linear split",
    "torchmil": "torchmil",
    "compiled flex": "compiled FlexAttention",
    "hugging face": "Hugging Face's",
    "multihead": "nn.MultiheadAttention",
}


def plot(found, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    panels = _panels(found)
    peers = _peers(panels)
    colours = {peer: f"C{i}" for i, peer in enumerate(dict.fromkeys([*PEERS, *peers]))}  # one everywhere
    columns = max(map(len, panels.values()), default=1)
    figure, axes = pyplot.subplots(
        max(1, len(panels)),
        columns,
        figsize=(5 * columns, 0.8 + 2.5 * len(panels)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (operation, kinds) in zip(axes, panels.items()):
        for axis, (kind, rows) in zip(line, kinds.items()):
            _bars(axis, rows, {peer: colours[peer] for peer in peers})
            axis.set_title(f"{operation}: {kind.removesuffix(', ms')}", fontsize=9)
        line[0].set_ylabel("times faster", fontsize=8)
    figure.suptitle(f"How many times faster than its peers\n{report.title(found['environment'])}", fontsize=9)
    figure.legend(
        handles=[Patch(color=colours[peer], label=PEERS.get(peer, peer)) for peer in peers],
        loc="outside lower center",
        ncols=max(1, len(peers)),
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panels(found):
    """operation -> kind -> its rows that have speed-ups; sorted by operation."""
    panels = {
        operation: {
            kind: rows
            for kind in dict.fromkeys(row["kind"] for row in result["rows"])
            if (rows := [row for row in result["rows"] if row["kind"] == kind and row.get("speed-up")])
        }
        for operation, result in sorted(found["operations"].items())
    }
    return {operation: kinds for operation, kinds in panels.items() if kinds}


def _peers(panels):
    """Whoever competes anywhere, in the order of the bars."""
    names = {name for kinds in panels.values() for rows in kinds.values() for row in rows for name in row}
    peers = {name.removeprefix("vs ") for name in names if name.startswith("vs ")}
    return [*(peer for peer in PEERS if peer in peers), *sorted(peers - PEERS.keys())]


def _bars(axis, rows, colours):
    axis.set_axis_on()
    peers = [peer for peer in colours if any(f"vs {peer}" in row for row in rows)]
    width = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        bars = axis.bar(
            [x + width * (i + 0.5) - 0.4 for x in range(len(rows))],
            [row.get(f"vs {peer}") or 0 for row in rows],
            0.95 * width,
            color=colours[peer],
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=6)
    axis.axhline(1, color="black", linewidth=0.8)
    turn = {"rotation": 12, "ha": "right", "rotation_mode": "anchor"} if len(rows) > 3 else {}  # else they meet
    axis.set_xticks(range(len(rows)), [row["shape"].replace("x", "\u00d7") for row in rows], fontsize=7, **turn)
    axis.tick_params("y", labelsize=7)
    axis.margins(y=0.12)  # room for the numbers
