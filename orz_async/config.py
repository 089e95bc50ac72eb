"""The complete configuration of a run: frozen dataclasses, checked where they are built, nothing from the environment.

Times are in seconds, sizes in tokens unless the name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from orz_async.errors import ConfigError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    path: str = "runs/base/model"
    """Hugging Face directory (config.json, safetensors, tokenizer) that policy and critic both start from."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of policy and critic. Master weights and optimizer states are always float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    train: str = "runs/base/train.jsonl"
    """Prompts to train on: ORZ JSON, or JSONL with "prompt" and "answer"."""
    heldout: str = "runs/base/heldout.jsonl"
    """Prompts to evaluate on; they are removed from the training prompts. Empty: no evaluation."""
    template: Literal["orz", "chat", "plain"] = "chat"
    """How a problem becomes a prompt: the ORZ conversation, the tokenizer's own chat template, or as it is."""
    max_prompt_tokens: int = 2048
    """Longer prompts are left out, and counted."""

    def __post_init__(self) -> None:
        _require(self.max_prompt_tokens > 0, f"data.max_prompt_tokens must be positive, got {self.max_prompt_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    temperature: float = 1.0
    max_new_tokens: int = 8000
    stop: tuple[str, ...] = ("User:", "Human:", "Assistant:", "</answer>")
    """A response ends with the token that completes one of these; the text is kept."""

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"sampling.temperature must be positive, got {self.temperature}")
        _require(self.max_new_tokens > 0, f"sampling.max_new_tokens must be positive, got {self.max_new_tokens}")
        _require(all(self.stop), "sampling.stop must not hold an empty string")


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokerConfig:
    bind: str = "tcp://127.0.0.1:0"
    """Where generators connect; port 0 picks a free one. Only loopback is accepted without keys."""
    keys: str = ""
    """Folder of keys made by `orz keys`: connections are encrypted and only keys on its list get in. Empty: no keys."""
    prompts_per_step: int = 128
    samples_per_prompt: int = 64
    max_lag: int = 1
    """S: learner versions between the policy that sampled a token and the one that trains on it. 0 is synchronous."""
    window: int = 0
    """W: steps a straggling rollout may slip instead of holding its step; admission is at lag S - W."""
    lease_s: float = 30.0
    """A rollout without progress for this long is granted again to another generator."""
    heartbeat_s: float = 0.5
    """Period of a generator's progress reports."""
    max_attempts: int = 5
    """A prompt whose rollout failed this often is quarantined and replaced."""
    overtime: float = 4.0
    """While a step waits for a lease that is older than this many times what the other generators need (and than
    lease_s), it is lent to another one, whatever progress it reports. 0: never."""
    wait_generators_s: float = 600.0
    """The learner gives up when no rollout arrives for this long."""

    @property
    def rollouts_per_step(self) -> int:
        """B."""
        return self.prompts_per_step * self.samples_per_prompt

    def __post_init__(self) -> None:
        _require(self.rollouts_per_step > 0, "broker.prompts_per_step and broker.samples_per_prompt must be positive")
        _require(self.max_lag >= 0, f"broker.max_lag must be at least 0, got {self.max_lag}")
        _require(
            0 <= self.window <= self.max_lag,
            f"broker.window must be between 0 and broker.max_lag = {self.max_lag}, got {self.window}",
        )
        _require(0 < self.heartbeat_s * 4 <= self.lease_s, "broker.lease_s must be at least four broker.heartbeat_s")
        _require(
            self.overtime == 0 or self.overtime >= 1,
            f"broker.overtime must be 0 or at least 1, got {self.overtime}",
        )
        _require(self.max_attempts > 0, f"broker.max_attempts must be positive, got {self.max_attempts}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    engine: Literal["transformers", "vllm"] = "transformers"
    count: int = 1
    """Daemons `orz run` starts on this machine."""
    slots: int = 64
    """Sequences one daemon decodes at once."""
    queue: int = 64
    """Leases one daemon holds beyond its slots, so that a freed slot never waits for the network."""
    threads: int = 1
    """CPU threads of the engine."""
    device: str = "cpu"
    """Of the engines that `orz run` starts: cpu, cuda, cuda:1, ..."""
    keep_kv: bool = False
    """Keep keys and values computed by older weights after an update, instead of computing them anew."""
    tensor_parallel: int = 1
    """Devices that share each layer of one engine (vllm)."""
    data_parallel: int = 1
    """Copies of the model in one daemon (vllm). Further daemons do the same and may come and go."""
    kv_gb: float = 1.0
    """GiB for keys and values on a CPU (vllm); on a GPU vLLM measures what is free."""
    vllm: tuple[str, ...] = ()
    """Further engine arguments of vLLM, each NAME=VALUE; those that would bias training are refused."""
    python: str = ""
    """Interpreter of the daemons `orz run` starts, e.g. .venv-vllm/bin/python; empty: the launcher's own."""
    verifiers: int = 1
    """Processes that compare answers which the exact rules cannot settle."""
    reconnect_s: float = 600.0
    """A daemon whose learner stays away longer than this ends with exit code 7."""

    def __post_init__(self) -> None:
        _require(self.count > 0, f"generator.count must be positive, got {self.count}")
        for name in ("tensor_parallel", "data_parallel"):
            _require(getattr(self, name) > 0, f"generator.{name} must be positive, got {getattr(self, name)}")
            _require(
                getattr(self, name) == 1 or self.engine == "vllm",
                f"generator.{name} = {getattr(self, name)} needs generator.engine vllm; the embedded engine uses one "
                "device, and more daemons use more",
            )
        _require(not self.vllm or self.engine == "vllm", "generator.vllm needs generator.engine vllm")
        _require(self.kv_gb > 0, f"generator.kv_gb must be positive, got {self.kv_gb}")
        _require(self.slots > 0, f"generator.slots must be positive, got {self.slots}")
        _require(self.queue >= 0, f"generator.queue must be at least 0, got {self.queue}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerConfig:
    lr: float = 1e-6
    """Policy learning rate after warm-up."""
    critic_lr: float = 5e-6
    warmup_steps: int = 50
    """Learner steps over which both learning rates rise linearly from 0."""
    lr_final: float = 1.0
    """Fraction of both learning rates that is left at the end of the run; 1 keeps them constant."""
    lr_schedule: Literal["linear", "cosine"] = "linear"
    """How they fall towards lr_final."""
    policy_steps: int = 1
    """P: optimizer steps of the policy over the rollouts of one learner step."""
    critic_steps: int = 12
    """K: optimizer steps of the critic over the same rollouts, one K-th of them each."""
    critic_warmup_steps: int = 0
    """Learner steps at the start of the run that train the critic alone; the policy is frozen, its version goes on."""
    estimator: Literal["gae", "grpo", "reinforce"] = "gae"
    """Advantages: from the critic; or without one, for comparison: reward against the other samples of its prompt, in
    units of their spread (grpo), or against the mean of the step (reinforce)."""
    gamma: float = 1.0
    lam: float = 1.0
    objective: Literal["ppo", "decoupled"] = "ppo"
    """ppo clips around the policy that sampled; decoupled around the policy at the start of the step, and weighs by
    current / sampled. ppo at every S: decoupled learns faster from S = 4 on, and may then fall back (LOG)."""
    proximal: Literal["recomputed", "interpolated"] = "recomputed"
    """Decoupled with P > 1: the proximal log-probs by a forward pass of their own, or by a mix of sampled and current
    ones that leans to the current ones the staler a token is."""
    mismatch_mask: Literal["none", "token", "sequence"] = "none"
    """Leave out tokens, or whole rollouts by their mean, whose probability under the policy at the start of the step
    and under the engine differ by more than a factor of mismatch_mask_above. Costs a forward pass."""
    mismatch_mask_above: float = 2.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    behaviour_cap: float | None = None
    """Truncation of the weight current / sampled in the decoupled objective."""
    value_clip: float | None = 0.2
    loss_aggregation: Literal["token", "sequence", "pack"] = "token"
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    publish_early: bool = True
    """Publish the policy as soon as it is updated, so that its weights travel and generators work on while the critic
    trains. Off: at the end of the step; with broker.max_lag 0 nothing overlaps then, which is what to measure against.
    What a step computes of its rollouts is the same."""
    max_tokens: int = 16384
    """Tokens of one packed microbatch; a longer sequence gets a microbatch of its own."""
    shard_ranks: int = 0
    """Ranks that share one copy of weights and optimizer, the others replicate it: the GPUs of a node, where nodes are
    far apart. 0: all ranks share one copy."""
    activation_checkpointing: bool = False
    """A layer keeps only its input and is computed again for its gradient: a third more time, a tenth of the memory."""
    offload_optimizer: bool = False
    """Optimizer moments live in host memory between the optimizer's steps."""
    offload_critic: bool = False
    """The critic lives in host memory while the policy trains."""
    compile: bool = False
    """torch.compile each layer: minutes at the start, faster steps on a GPU."""
    threads: int = 1
    """CPU threads of one learner rank."""
    audit_rollouts: int = 4
    """Rollouts a step whose log-probs are recomputed under the versions that sampled them; 0 compares lag 0 only."""
    mismatch_warn: float = 1e-2
    """Largest |learner - engine| log-prob at equal weights that passes without a warning."""
    mismatch_stop: float | None = None
    """Above this the run stops: engine and learner do not compute the same model."""

    def __post_init__(self) -> None:
        for name in ("lr", "critic_lr"):
            _require(getattr(self, name) >= 0, f"learner.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("critic_warmup_steps", "shard_ranks"):
            _require(getattr(self, name) >= 0, f"learner.{name} must be at least 0, got {getattr(self, name)}")
        _require(
            self.mismatch_mask_above > 1, f"learner.mismatch_mask_above must exceed 1, got {self.mismatch_mask_above}"
        )
        _require(
            not (self.critic_warmup_steps and self.estimator != "gae"),
            f"learner.critic_warmup_steps must be 0 without a critic (learner.estimator = {self.estimator})",
        )
        for name in ("policy_steps", "critic_steps", "max_tokens", "threads"):
            _require(getattr(self, name) > 0, f"learner.{name} must be positive, got {getattr(self, name)}")
        for name in ("gamma", "lam", "lr_final"):
            _require(0 <= getattr(self, name) <= 1, f"learner.{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    transport: Literal["stream", "file", "nccl"] = "stream"
    """How weights reach generators: stream sends what changed over TCP, file writes whole versions to a shared folder,
    nccl broadcasts whole versions from GPU to GPU (gloo where neither side has one)."""
    port: int = 0
    """stream, nccl: where generators fetch weights, on the interface of broker.bind; 0 picks a free one."""
    relays: bool = False
    """stream: generators that `orz run` starts pass on what they have, so that the learner sends a version about once.
    Daemons started by hand do so with --relay."""
    history: int = 8
    """stream: versions back that a generator may lag and still be sent the difference only."""
    directory: str = ""
    """file: the folder, which every generator must see under the same path; empty means weights in the run's folder."""
    deadline_s: float = 15.0
    """nccl: a generator with which one operation takes longer is expelled; it joins again when it can. Generators
    hear of it from the learner and are as patient."""
    trusted_network: bool = False
    """nccl: allow it beyond loopback, where neither NCCL nor gloo authenticates or encrypts anything."""

    def __post_init__(self) -> None:
        _require(0 <= self.port < 65536, f"weights.port must be a port or 0, got {self.port}")
        _require(self.history >= 0, f"weights.history must be at least 0, got {self.history}")
        _require(self.deadline_s > 0, f"weights.deadline_s must be positive, got {self.deadline_s}")
        _require(
            not self.relays or self.transport == "stream",
            f"weights.relays goes with weights.transport = stream, got {self.transport}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What the learner does when its numbers are wrong, and which numbers are alarming. none switches an alarm off."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss, gradient, value or log-prob that is not finite: end with exit code 8, or leave the update out and go on.
    The rollouts of the step are kept in RUN/kept either way."""
    max_skips: int = 3
    """Steps in a row that may be left out before the run stops all the same."""
    truncated_above: float | None = 0.5
    """Alarm truncation_rate: share of rollouts that ran into the length limit."""
    length_drift_above: float | None = 2.0
    """Alarm length_drift: factor, up or down, between the mean length and its average over the last 20 steps."""
    entropy_below: float | None = 0.25
    """Alarm entropy_collapse: the policy's entropy as a fraction of its average over the last 20 steps."""
    mismatch_kl_above: float | None = 1e-2
    """Alarm mismatch_kl: KL(engine || learner) over tokens of equal weights."""
    clip_mass_above: float | None = 0.25
    """Alarm clip_mass: share of the tokens of one lag whose ratio is outside the clip range."""
    tighten: tuple[Literal["truncation_rate", "length_drift", "entropy_collapse", "mismatch_kl", "clip_mass"], ...] = ()
    """Alarms that lower the staleness bound S by one for the next tighten_steps learner steps."""
    tighten_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("max_skips", "tighten_steps"):
            _require(getattr(self, name) > 0, f"guard.{name} must be positive, got {getattr(self, name)}")
        for name in ("truncated_above", "length_drift_above", "entropy_below", "mismatch_kl_above", "clip_mass_above"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"guard.{name} must be at least 0 or none, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    every: int = 10
    """Learner steps between evaluations; the first and the last version are always evaluated. 0: never."""
    prompts: int = 200
    """Held-out prompts scored each time (the first ones of the file, always the same)."""
    samples: int = 1
    """Samples per held-out prompt; accuracy is their mean."""
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 50
    """Learner steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        _require(self.every > 0 and self.keep > 0, "checkpoint.every and checkpoint.keep must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalConfig:
    fsync: Literal["each", "interval", "none"] = "interval"
    """When accepted rollouts survive a power cut (a killed process never loses any): before each acknowledgement, every
    interval_s with acknowledgements held back until then, or when the operating system gets to it."""
    interval_s: float = 0.2
    segment_mb: int = 64
    """Size at which the next file is begun."""
    max_mb: int = 20_000
    """Above this the oldest files that no kept checkpoint needs are deleted; the run stops if all are needed."""
    min_free_mb: int = 256
    """The run stops rather than leave less free space than this."""

    def __post_init__(self) -> None:
        _require(self.interval_s > 0, f"journal.interval_s must be positive, got {self.interval_s}")
        _require(self.segment_mb > 0, f"journal.segment_mb must be positive, got {self.segment_mb}")
        _require(
            self.max_mb >= 2 * self.segment_mb,
            f"journal.max_mb must be at least two segments of {self.segment_mb} MB, got {self.max_mb}",
        )
        _require(self.min_free_mb >= 0, f"journal.min_free_mb must be at least 0, got {self.min_free_mb}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObserveConfig:
    """What is recorded beside the event log, and who else is told. Nothing here can hold or end training."""

    sample_rollouts: int = 16
    """Rollouts a step whose values, advantages, ratios and log-prob gaps are kept token by token; 0: none."""
    sample_tokens: int = 16_384
    """Response tokens a step kept for them: 16 bytes each, and one rollout more at most."""
    tensorboard: bool = False
    """Write RUN/tensorboard; needs the extra "tensorboard"."""
    wandb: str = ""
    """Project at Weights & Biases; needs the extra "wandb" and a login. Empty: not used."""
    trackio: str = ""
    """Project of trackio; needs the extra "trackio". Empty: not used."""
    prometheus: str = ""
    """127.0.0.1:PORT where the newest numbers can be scraped. Empty: not used."""
    sink_queue: int = 1000
    """Points that wait for one of these; beyond them points are dropped and counted."""

    def __post_init__(self) -> None:
        for name in ("sample_rollouts", "sample_tokens"):
            _require(getattr(self, name) >= 0, f"observe.{name} must be at least 0, got {getattr(self, name)}")
        _require(self.sink_queue > 0, f"observe.sink_queue must be positive, got {self.sink_queue}")
        if self.prometheus:
            loopback_port(self.prometheus)


def loopback_port(address: str) -> int:
    """The port of 127.0.0.1:PORT; anyone who can reach it could read it, so no other host is accepted."""
    host, _, port = address.rpartition(":")
    good = host in ("127.0.0.1", "localhost") and port.isdigit() and 0 < int(port) < 65536
    _require(good, f"observe.prometheus must be 127.0.0.1:PORT, got {address!r}; tunnel the port to reach it from afar")
    return int(port)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that decides a run. The resolved value is saved as config.toml in the run's folder."""

    run_dir: str = "runs/run"
    seed: int = 0
    steps: int = 1000
    """Learner steps; one step trains on prompts_per_step x samples_per_prompt rollouts."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    journal: JournalConfig = field(default_factory=JournalConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    def __post_init__(self) -> None:
        _require(self.steps > 0, f"steps must be positive, got {self.steps}")
        _require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")
