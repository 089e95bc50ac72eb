"""A verifier process: compares two answers with math-verify, under limits the kernel enforces.

Run as a plain file (``python -I -B worker.py CPU_S``), never imported by the package: it starts with an empty
environment and no descriptors but its pipes, and needs math-verify alone.

consumes  JSON lines on standard input: {"id", "reference", "candidate"}
produces  JSON lines on standard output: first {"id": -1, "word": "ready"}, then one {"id", "word"} for each request,
          word being "correct", "wrong" or "error"
ends      when its input ends, or by a signal: SIGPROF after CPU_S seconds of CPU time on one request

The deadline is CPU time, not wall-clock time, so that a loaded machine grades like an idle one. Only LaTeX is parsed
(by a grammar); math-verify's parser of plain expressions is left out because it would execute them as Python.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

MEMORY_BYTES = 768 << 20
OPEN_FILES = 32
MAX_REQUEST_BYTES = 64 << 10


def limit_resources() -> None:
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def arm(cpu_s: float) -> None:
    """Let the kernel end this process when it has used `cpu_s` more seconds of CPU time."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    # The timer could be cleared by whatever runs here; this limit, in whole seconds, is enforced beside it.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime + cpu_s) + 2, hard))


def disarm() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)


def load_compare() -> Any:
    """math-verify's comparison as a function of two texts. Importing it is the slow part of a start."""
    from math_verify import LatexExtractionConfig, parse, verify

    # Reports of disabled timeouts and of answers that do not parse are of no use to anyone here.
    logging.disable(logging.CRITICAL)
    config = [LatexExtractionConfig()]

    def expressions(text: str) -> Any:
        text = " ".join(text.replace("\\$", " ").replace("$", " ").split())
        return parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)

    def compare(reference: str, candidate: str) -> bool:
        return bool(verify(expressions(reference), expressions(candidate), timeout_seconds=None))

    # The first comparisons import more of sympy: that must not count against the first request's deadline.
    compare("\\frac{x^2-1}{2}", "(x-1)(x+1)/2")
    compare("(1,2]", "\\{\\sqrt{3},\\pi\\}")
    return compare


def serve(requests: BinaryIO, replies: BinaryIO, cpu_s: float) -> None:
    compare = load_compare()
    send(replies, -1, "ready")
    while line := requests.readline(MAX_REQUEST_BYTES):
        arm(cpu_s)
        request = json.loads(line)
        try:
            word = "correct" if compare(request["reference"], request["candidate"]) else "wrong"
        # The edge of this process: whatever the algebra system raises on a model's text is a verdict, not a crash.
        except Exception:
            word = "error"
        disarm()
        send(replies, request["id"], word)


def send(replies: BinaryIO, number: int, word: str) -> None:
    replies.write(json.dumps({"id": number, "word": word}).encode() + b"\n")
    replies.flush()


def main() -> None:
    limit_resources()
    # Keep the pipe to ourselves: a library that prints must not write into the protocol.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    serve(sys.stdin.buffer, replies, float(sys.argv[1]))


if __name__ == "__main__":
    main()
