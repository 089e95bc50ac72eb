"""Generator daemon: turns leases into scored trajectories with the weights the learner published last.

consumes   leases from the broker, weight snapshots from weights/
produces   trajectories (tokens, log-probs, per-token versions, reward) for the broker, each kept until it is acked

::

    broker -Grant-> daemon -submit-> engine -Sample-> daemon -text-> grader -Verdict-> daemon -Result-> broker
                       |               ^
    weights -Snapshot--+-----apply-----+

daemon.py   the loop; workload.py and held.py the leases on their way, incoming.py the weights on theirs, meter.py the
            speed, ports.py what the loop is connected to
engine.py   all that an inference engine has to offer
transformers_engine.py   the embedded one: continuous batching over any Hugging Face causal language model. It packs
            (batch.py) what its running sequences (rows.py) need into one forward (model.py) over a cache of slots
            (attention.py, kv_cache.py), samples (sampler.py) and looks for stop strings (stop.py). A small model on
            CPU is computed by one call of C++ (fused.py)
vllm_engine.py   vLLM, in processes of its own: vllm_loop.py runs its asyncio engine in a thread, vllm_weights.py hands
            it versions in flight, vllm_shim.py is all that is asked of it by name, vllm_options.py what may be set.
            vllm_plugin.py and vllm_transfer.py run inside vLLM's processes, which find them by entry point;
            vllm_readback.py is what these say they serve, vllm_labels.py puts versions on tokens where vLLM does not
parameters.py   which tensor is which parameter, for both
__main__.py `python -m orz_async.generator --connect tcp://HOST:PORT`
"""
