"""Faults on real processes: kill -9, SIGSTOP, a TCP proxy that lies, a full disk, poisoned results.

run.py       `make chaos`: all of it, with figures;  test_chaos.py  a small part, in the default suite
storm.py     one run under all faults at once;  scenes.py  launcher, full disk, retention
folder.py    a run folder, its processes, what was killed and when it was noticed
victim.py    a real learner that kills itself at a named point
lean.py      a generator without torch: the real client on the real wire, random trajectories
proxy.py     TCP between a generator and the learner: delay, drop, reset, black hole, flipped bits
saves.py     kill -9 at every file operation of a checkpoint
"""
