"""The broker decides what may be generated, accepted, trained and retried; nobody else does.

consumes  prompts (a seeded order), results from generators, `take` / `published` / `evaluate` calls of the learner
produces  leases for generators, batches of trajectories for the learner, a funnel in which every attempt ends once

What is decided, pure (no I/O, no clock):

    transitions.py   what goes into the ledger and what comes out
    rollouts.py      one rollout's record and its states; one generator's
    ledger.py        handle(event, now) -> actions, and the argument why nothing is stale, lost or trained twice
    book.py          the part of the ledger that outlives a process; frontier.py saves and replays it
    prompt_queue.py  which prompt a rollout samples, and which are quarantined
    lending.py       who is lent what next;  alarms.py, overtime.py  when a lease is overdue
    evaluations.py   rollouts that are scored and not trained on

What travels:

    messages.py      between generator and broker;  wire.py  one message, one checked frame
    validate.py      is this trajectory what its lease asked for?
    client.py        BrokerClient: the generator's end;  observer.py  who only looks
    standing.py      what a generator has earned: the door, or less credit

What runs:

    server.py        Broker: what the learner calls, and the thread behind it
    service.py       that thread: frames, calls and time in; frames, batches and events out
    switchboard.py   its socket and connections;  reception.py  what generators say, checked
    leases.py        ledger terms -> leases with prompt, seed and sampling;  outbox.py  what is said, once journaled
    journal.py       accepted trajectories and decisions on disk;  segments.py  its files, and how to read them
    shelf.py         accepted trajectories that wait;  recovery.py  checkpoint + journal -> ledger
    verify.py        `orz verify`, by checker.py: a second reading of the journal, sharing no code with the ledger
    words.py         what the learner waits for, in one line

No torch here nor below.
"""
