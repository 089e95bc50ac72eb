"""What a run did, written down by every process and read back by everyone else.

consumes  what the processes say of themselves: events and where their time goes (`events.py`)
produces  RUN/events/<process>.jsonl, and from these files alone: live view, RUN/summary.json, RUN/curve.png

    events.py    EventLog and Timeline: what every process writes
    process.py   the edge of every process: typed exits, exit records, stack dumps on SIGUSR1; versions.py
    tail.py      the event files as they grow
    history.py   the one fold over all events, resumed runs included; account.py sums its seconds and tokens
    summary.py   the numbers of a run; table.py prints them, curve.py draws them
    live.py      the live view of `orz run`, top.py the larger one of `orz top`; words.py what they say
    progress.py  a single piece of work
    clocks.py    one clock for the events of all processes
    sinks/       the same numbers to TensorBoard, Weights & Biases, trackio and Prometheus
    tokens.py    values, advantages, ratios and gaps of a few rollouts, token by token

Nothing here imports torch, and nothing here may stop a run: a full disk costs events, never training.
"""
