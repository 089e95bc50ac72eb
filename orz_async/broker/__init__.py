"""The broker decides what may be generated, accepted, trained and retried; nobody else does.

consumes  prompts (a seeded order), results from generators, `take` / `published` / `evaluate` calls of the learner
produces  leases for generators, batches of trajectories for the learner, a funnel in which every attempt ends once

    transitions.py  what goes into the ledger and what comes out
    rollouts.py     one rollout's record and its states
    prompt_queue.py which prompt a rollout samples, and which prompts are quarantined
    ledger.py       the pure state machine: handle(event, now) -> actions; no I/O, no clock
    messages.py     what travels between generator and broker
    wire.py, crc.py one message, one checked frame
    validate.py     is this trajectory what its lease asked for?
    leases.py       ledger terms -> lease with prompt, seed and sampling
    server.py       Broker: what the learner calls
    service.py      the broker's thread: sockets around the ledger
    peers.py        the connections of the service
    client.py       BrokerClient: the generator's end
    journal.py      accepted trajectories and ledger decisions on disk

No torch here nor below.
"""
