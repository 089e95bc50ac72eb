"""One machine: starts the learner and the generators, watches them, ends all of them; knows them as a shell would.

consumes  a configuration, exits and exit records of its children, signals; RUN/address, where the learner listens
produces  RUN/config.toml, RUN/versions.json, RUN/logs/, the child processes, their restarts, and at the end the summary

    commands.py    the command line and environment of every child: what --dry-run prints
    inputs.py      are model and problems usable? looked at before anything is started
    run_folder.py  may this run use this folder? new, resumed, or refused with the way out
    children.py    one child: started, bound to our life, signalled, read back
    limits.py      how often, how long: every bound of the supervisor, and the backoff
    generators.py  the daemons: started, restarted, given up
    supervisor.py  the learner, the signals, and the order in which everything ends
    launch.py      all of it: `launch(config, ...)` is `orz run`

Nobody outlives the launcher: children ask the kernel to be killed with it (observe/process.py says why not a pipe or a
pid file), and it adopts and kills what a dead child leaves behind.
"""
