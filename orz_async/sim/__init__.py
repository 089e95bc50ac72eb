"""The whole pipeline in virtual time, around the real ledger: one seed is one history.

consumes  a scenario: the ledger's numbers, models of engine, learner and network, faults drawn from a seed
produces  a history (its hash is printed) with violations, if there are any, and the figures that `orz plan` shows

Real: `broker.ledger` with everything behind it, `broker.frontier` (snapshot and replay), `broker.leases`,
`broker.validate` and the messages. Modelled: time, engines, learner, network, disk, and the loops around the real
parts (daemon, broker thread), which do what their originals do with a call instead of a socket.

    clock.py      virtual time
    models.py     what is assumed of engines, learner, network and faults
    engine.py     continuous batching without tokens: who finishes when
    generator.py  a daemon: leases, results kept until acknowledged, weights fetched and swapped
    hub.py        the broker's thread: messages into the ledger, actions out of it, journal, checkpoints, restart
    learner.py    take, train the policy, publish, train the critic
    network.py    delay, loss, repetition, reordering, partitions;  faults.py  deaths, freezes, garbage, restarts
    oracle.py     counts for itself and objects;  history.py  the hash
    world.py      puts them together;  scenarios.py  what `orz sim` runs;  command.py  its command line

    rates.py      seconds per token, assumed or measured;  memory.py  bytes on a GPU;  shape.py  a model's sizes
    measured.py   what a finished run says;  planner.py  which split and which S;  plan_command.py  `orz plan`

Every figure from here is simulated, and says so. No torch here nor below.
"""
