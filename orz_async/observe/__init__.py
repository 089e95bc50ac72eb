"""What a run did, written down by every process and read back by everyone else.

consumes  what the processes say of themselves: events (`events.EventLog`) and where their time goes (`events.Timeline`)
produces  RUN/events/<process>.jsonl, and from these files alone: the live view (`view`, `live`), the summary
          (`summary`) and the picture (`curve`)

`process` is the edge of every process: typed exits, stack dumps on demand, versions. Nothing here imports torch, and
nothing here may stop a run: a full disk costs events, never training.
"""
