"""Policy and critic, PPO, checkpoints: the ranks that `torchrun -m orz_async.learner` starts.

consumes  B scored trajectories a step (broker), a Hugging Face directory to start from, prompts for the broker it hosts
produces  weights of version v + 1 after step v (weights), a "step" event, checkpoints, at the end a Hugging Face
          directory

The way of one step through the folder::

    start.py     from configuration, base model or checkpoint to a running loop
    loop.py      take ──► learn ──► publish ──► checkpoint ──► evaluate     rank 0 decides; the others: follower.py
       │
    trainer.py   values ──► advantages ──► policy update │ critic update    every rank, collectives in the same order
       │            batch.py        trajectories as flat arrays of the step, packed microbatches
       │            advantage.py    rewards, GAE, whitening, loss weights: pure functions
       │            correction.py   proximal policy, masks by mismatch: pure functions
       │            step.py         what a step, a round and an update's report hold
       │            model.py        policy and critic: backbone, response rows, head inside the root module
       │            head.py         the fused head, or chunks where the family caps its logits
       │            attention.py    packed tokens in, causal attention within each sequence; varlen.py: on a GPU
       │            fused.py       norms and gates by our ops, on a CPU
       │            loading.py      built without memory, sharded, then filled from the files
       │            optim.py        AdamW, warm-up, clipping, the check that nothing is infinite
       │            parallel.py     ranks: messages, sums, keepalive, FSDP2
       │
    alarms.py, kept.py                       what is alarming, and lowers S; rollouts of a step that went wrong
    memory.py                                memory of a GPU by part, without torch; census.py: parameters, with it
    lag_table.py, audit.py, report.py        what a step says of itself: by lag, engine against learner, the event
    sample.py                                a few rollouts of a step token by token, whichever rank trained them
    evaluations.py                           what a held-out evaluation says: avg@k, pass@k, a row for each problem
    checkpoint.py, compatibility.py, durable.py     whole or absent; may this configuration continue it; atomic files
    hf_directory.py, export.py               from and to a Hugging Face directory
    tensor_file.py                           shards into files, none of them whole anywhere
    replay.py                                the batches of a journal instead of a broker: `orz replay`
    services.py, signals.py                  what the loop needs from outside; how it is asked to stop

Beside the axes of the package: ``M`` response tokens of a packed microbatch, ``R`` response tokens of the whole step in
rollout order. Row M of a microbatch is the state before response token M: its hidden state predicts that token, and its
value is the value of the prefix without it.
"""
