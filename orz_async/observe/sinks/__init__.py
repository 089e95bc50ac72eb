"""The numbers of a run to TensorBoard, Weights & Biases, trackio and Prometheus, from a process of their own.

consumes  RUN/events as they grow, RUN/config.toml
produces  what each service keeps; RUN/events/sinks.jsonl: delivered and dropped counts, and why a sink ended

    process.py   started and let go by the learner, which never waits for it; __main__.py is its other end
    feed.py      a thread and a bounded queue for each sink: a slow one loses points, a broken one ends alone
    scalars.py   events as numbers by name and step
    writers.py   the four services

Training cannot notice any of this: it writes its event log and nothing else.
"""
