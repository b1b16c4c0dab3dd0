"""Times contestants so that only what differs between them shows.

All run in the same process in turn, round after round, so that the machine's other load and its clock hit all alike.
In a round each contestant runs once untimed, which gives it the cache as it leaves it itself, and then a few times
timed. Speed-ups are medians of the ratios inside a round.
"""

import statistics
import time
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """Seconds a call, one number a round."""

    rounds: list = field(default_factory=list)

    @property
    def median(self):
        return statistics.median(self.rounds)

    @property
    def best(self):
        return min(self.rounds)

    def over(self, other):
        """How many times longer than `other` it takes: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds))


def race(contestants, *, device="cpu", rounds=12, budget=4.0, burst=0.004, jobs=1):
    """Times functions of no argument: ``{name: Times}``.

    Args:
        contestants: name -> function. Compilation and the like happen in two calls that aren't timed.
        device: where they work; a GPU is timed by its own events.
        rounds: how many; at least 3 are run.
        budget: seconds after which no further round begins.
        burst: seconds of calls that one measurement should last at least.
        jobs: how many times a function does what is timed.
    """
    clock = _gpu_seconds if device == "cuda" else _cpu_seconds
    calls = {}
    for name, function in contestants.items():
        function(), function()
        calls[name] = max(1, min(50, round(burst / max(clock(function, 1), 1e-7))))
    times = {name: Times() for name in contestants}
    names = list(contestants)
    stop = time.perf_counter() + budget
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > stop:
            break
        for name in names[done % len(names) :] + names[: done % len(names)]:  # nobody always follows the same one
            contestants[name]()
            times[name].rounds.append(clock(contestants[name], calls[name]) / jobs)
    return times


def _cpu_seconds(function, calls):
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _gpu_seconds(function, calls):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def captured(functions):
    """The calls one after another as a CUDA graph: a function that replays it. A kernel takes microseconds, and Python
    longer to ask for it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and has every allocator and library warm
        for _ in range(2):
            functions[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function() for function in functions]  # alive together: each result has memory of its own
    del results

    def replay(functions=functions):  # what they hold is what the graph reads
        graph.replay()

    return replay


def beyond_the_cache(arguments):
    """Copies of the arguments, as many as fill a GPU's L2 cache three times: [arguments, ...]. A call that follows
    itself on the same data would time the cache."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    device = next(iter(tensors.values())).device
    wanted = 3 * torch.cuda.get_device_properties(device).L2_cache_size
    size = max(1, sum(tensor.nbytes for tensor in tensors.values()))
    copies = min(64, -(-wanted // size))
    return [arguments, *({**arguments, **{n: t.clone() for n, t in tensors.items()}} for _ in range(copies - 1))]


def keep_freed_memory():
    """Has malloc keep freed memory below 32 MB for the next call, as it mostly does; whom it doesn't is luck, and
    decides by page faults."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at the largest value that it takes by itself
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def peak_memory(function, device="cpu"):
    """Bytes that a call needs at most, beyond what was there before; None where the system can't tell."""
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _give_back_free_memory()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts from here (Linux)
        before = _status("VmHWM")
        function()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _give_back_free_memory():
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory, and would hide a new use of it
    if trim is not None:
        trim(0)


def _status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
