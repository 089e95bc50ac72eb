"""Any run as one page, as numbers, as a trace.

consumes  RUN/events, RUN/journal, RUN/tokens, RUN/config.toml; nothing of a running process
produces  one self-contained HTML file (`orz report`), the same numbers as JSON, a Perfetto trace (`orz trace`)

    stream.py     all events of a run in order of time, in constant memory
    numbers.py    the events folded into what the page shows; timeline.py where each process's time went
    rollouts.py   a sample of rollouts from the journal, joined with the token sample; pieces.py tokens as text
    page.py       numbers and rollouts in one HTML file; assets/ its layout, style and scripts
    trace.py      the timeline as a Perfetto trace

What is too large is sampled, and the page says how much of it is shown. Model output is data: it is escaped when it
enters the page, is only ever set as text there, and a content security policy by hash lets no other script run.
"""
