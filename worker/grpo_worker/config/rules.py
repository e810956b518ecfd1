"""Contradictions between fields: each rule once, as a Python check and as the CEL expression of the CRD.

Invariant: `grpo validate` and the API server refuse the same documents, since both read this table. A rule's CEL runs on
`spec` after the schema's defaults are filled in; fields that a preset may set have no default there, hence `has()`.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from grpo_worker.config.base import LARGEST_COUNT
from grpo_worker.config.job import Spec
from grpo_worker.config.pod_template import (
    OWNED_VARIABLE_PREFIX,
    forbidden_pod_settings,
    no_owned_variable,
    owns_variable,
)
from grpo_worker.config.rollout import OWN_ENGINE_ARGS, instead_of_engine_arg
from grpo_worker.config.runtime import (
    RESERVED_MOUNT_PATHS,
    RESERVED_VOLUME_NAMES,
    EnvFromSource,
    EnvVar,
    is_reserved_mount_path,
)
from grpo_worker.config.scheduling import Toleration


@dataclass(frozen=True)
class Rule:
    """One contradiction. `path` is the field to change; `wrong` is what is wrong with a spec: nothing, true, or a list of it.

    `cel`, true for a sound spec, is empty where the schema below `path` says it itself (see `pod_template`).
    """

    path: str
    wrong: Callable[[Spec], Any]
    cel: str
    message: str
    remedy: str

    def shown(self, spec: Spec) -> Any:
        """What is told of a spec that breaks the rule: the list of what is wrong, or the field's value."""
        found = self.wrong(spec)
        return found if isinstance(found, list) else reduce(_field, self.path.split("."), spec)


def _field(section: Any, alias: str) -> Any:
    (name,) = (name for name, info in type(section).model_fields.items() if info.alias == alias)
    return getattr(section, name)


def _repeated(values: Iterable[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


def _unclear_variables(spec: Spec) -> list[str]:
    def sound(variable: EnvVar) -> bool:
        source = variable.value_from
        if source is None:
            return variable.value is not None
        return variable.value is None and (source.secret_key_ref is None) != (source.config_map_key_ref is None)

    return [variable.name for variable in spec.runtime.env if not sound(variable)]


def _engine_args(spec: Spec) -> list[str]:
    return [f"{name}: {instead_of_engine_arg(name)}" for name in spec.rollout.engine_args if name in OWN_ENGINE_ARGS]


def _trainer_ports(spec: Spec) -> list[int]:
    network = spec.network
    ports = (network.trainer_port, network.weight_sync_port, network.rendezvous_port)
    return [port for port, count in Counter(ports).items() if port and count > 1]


def _no_room_for_ratios(spec: Spec) -> bool:
    """Whether the k1 criteria, whose thresholds are ratios, have none between their bounds; or a lower bound is for nothing."""
    correction = spec.algorithm.rollout_correction
    low, high = correction.rollout_rs_lower_threshold, correction.rollout_rs_threshold
    if any(criterion.endswith("k1") for criterion in correction.rollout_rs):
        return (low or 1 / high) >= high
    return low is not None


def _unclear_sources(spec: Spec) -> list[int]:
    def sound(source: EnvFromSource) -> bool:
        return (source.secret_ref is None) != (source.config_map_ref is None)

    return [index for index, source in enumerate(spec.runtime.env_from) if not sound(source)]


def _volume_names(spec: Spec) -> list[str]:
    names = [volume.name for volume in spec.runtime.volumes]
    return [*_repeated(names), *(name for name in names if name in RESERVED_VOLUME_NAMES)]


def _mount_paths(spec: Spec) -> list[str]:
    paths = [volume.mount_path for volume in spec.runtime.volumes]
    return [*_repeated(paths), *(path for path in paths if is_reserved_mount_path(path))]


def _failure_rules(spec: Spec, *, without_criterion: bool) -> list[str]:
    """Names (or places) of the rules that match everything, or that restart more than a rollout pod alone can."""
    found = []
    for index, rule in enumerate(spec.failure_policy.rules):
        empty = not (rule.roles or rule.exit_codes or rule.pod_conditions or rule.reasons)
        wrong_role = rule.action == "RestartPod" and set(rule.roles) != {"rollout"}
        if empty if without_criterion else (wrong_role and not empty):
            found.append(rule.name or f"rules[{index}]")
    return found


def _tolerations(spec: Spec) -> list[int]:
    def sound(toleration: Toleration) -> bool:
        exists = toleration.operator == "Exists"
        return (
            not (exists and toleration.value)
            and (exists or toleration.key is not None)
            and (toleration.toleration_seconds is None or toleration.effect == "NoExecute")
        )

    return [index for index, toleration in enumerate(spec.scheduling.tolerations) if not sound(toleration)]


def _pod_settings(spec: Spec) -> list[str]:
    templates = spec.runtime.pod_template
    by_key = {
        "all": templates.all,
        "coordinator": templates.coordinator,
        "trainer": templates.trainer,
        "rollout": templates.rollout,
    }
    return [
        f"{key}.{setting}"
        for key, template in by_key.items()
        if template is not None
        for setting in forbidden_pod_settings(template.model_dump(by_alias=True, exclude_none=True))
    ]


def _cel_list(values: Iterable[str]) -> str:
    return "[" + ", ".join(f"'{value}'" for value in sorted(values)) + "]"


RULES: tuple[Rule, ...] = (
    Rule(
        "actor.useKLLoss",
        lambda s: s.algorithm.use_kl_in_reward and s.actor.use_kl_loss,
        "!(self.algorithm.useKLInReward && (has(self.actor.useKLLoss) ? self.actor.useKLLoss : "
        "has(self.algorithm.preset) && self.algorithm.preset == 'GRPO'))",
        "algorithm.useKLInReward and actor.useKLLoss are both on, so the KL would count twice",
        "Set one of them to false (preset GRPO turns useKLLoss on).",
    ),
    Rule(
        "rollout.n",
        lambda s: s.rollout.n < 2 and s.algorithm.advantage_estimator in {"grpo", "rloo", "reinforcePlusPlusBaseline"},
        "self.rollout.n >= 2 || (has(self.algorithm.advantageEstimator) && !(self.algorithm.advantageEstimator in ['grpo', 'rloo', 'reinforcePlusPlusBaseline']))",
        "the advantage estimator compares the samples of a group, so it needs at least 2",
        "Set rollout.n to 2 or more, or algorithm.advantageEstimator to reinforce or reinforcePlusPlus.",
    ),
    Rule(
        "actor.ppoMiniBatchSize",
        lambda s: s.data.train_batch_size % s.actor.ppo_mini_batch_size != 0,
        "self.data.trainBatchSize % self.actor.ppoMiniBatchSize == 0",
        "does not divide data.trainBatchSize",
        "Choose a divisor of data.trainBatchSize.",
    ),
    Rule(
        "actor.fsdp.shardSize",
        lambda s: s.actor.fsdp.shard_size == 0 or s.trainer.nodes * s.trainer.gpus_per_node % s.actor.fsdp.shard_size,
        "self.actor.fsdp.shardSize != 0 && self.trainer.nodes * self.trainer.gpusPerNode % self.actor.fsdp.shardSize == 0",
        "does not divide the trainer's ranks (trainer.nodes * trainer.gpusPerNode)",
        "Choose a divisor, e.g. trainer.gpusPerNode, or -1 for one copy over all ranks.",
    ),
    Rule(
        "actor.optim.lrWarmupSteps",
        lambda s: (
            s.actor.optim.lr_scheduler != "constant"
            and s.actor.updates_per_step(s.data.train_batch_size) * (s.trainer.total_steps or LARGEST_COUNT)
            <= s.actor.optim.lr_warmup_steps
        ),
        "self.actor.optim.lrScheduler == 'constant' || !has(self.trainer.totalSteps) || self.trainer.totalSteps * self.actor.ppoEpochs * "
        "((self.data.trainBatchSize - 1) / self.actor.ppoMiniBatchSize + 1) > self.actor.optim.lrWarmupSteps",
        "leaves none of trainer.totalSteps' updates for actor.optim.lrScheduler to decay over",
        "Shorten it, or set actor.optim.lrScheduler to constant.",
    ),
    Rule(
        "rollout.minReplicas",
        lambda s: (s.rollout.min_replicas or 0) > max(s.rollout.replicas, s.engines),
        "!has(self.rollout.minReplicas) || self.rollout.minReplicas <= self.rollout.replicas || (self.placement == 'Colocated' && "
        "self.rollout.minReplicas * self.rollout.tensorParallelSize <= self.trainer.nodes * self.trainer.gpusPerNode)",
        "is more than rollout.replicas, so generation could never start",
        "Lower rollout.minReplicas or raise rollout.replicas.",
    ),
    Rule(
        "data.trainFiles",
        lambda s: bool(s.data.train_files) == bool(s.data.dataset),
        "(size(self.data.trainFiles) > 0) != has(self.data.dataset)",
        "exactly one of data.trainFiles and data.dataset gives the prompts",
        "Set data.trainFiles to files, or data.dataset to module:function.",
    ),
    Rule(
        "reward.function",
        lambda s: bool(s.reward.function) == bool(s.reward.parts),
        "has(self.reward.function) != (size(self.reward.parts) > 0)",
        "exactly one of reward.function and reward.parts says who judges the responses",
        "Set reward.function to gsm8k, math, exactMatch, format, reasoningGym, judge, remote or your own module:function, or list several in reward.parts.",
    ),
    Rule(
        "reward.parts",
        lambda s: _repeated(part.name for part in s.reward.parts),
        "self.reward.parts.all(a, self.reward.parts.exists_one(b, b.name == a.name))",
        "names are not unique",
        "Give each part a name of its own.",
    ),
    Rule(
        "algorithm.overlongBuffer.length",
        lambda s: (s.algorithm.overlong_buffer.length or 0) > s.data.max_response_length,
        "!has(self.algorithm.overlongBuffer.length) || self.algorithm.overlongBuffer.length <= self.data.maxResponseLength",
        "is longer than data.maxResponseLength",
        "Choose a part of data.maxResponseLength; DAPO takes a fifth.",
    ),
    Rule(
        "algorithm.rolloutCorrection.rolloutIsLowerThreshold",
        lambda s: (c := s.algorithm.rollout_correction).rollout_is_threshold <= (c.rollout_is_lower_threshold or 0),
        "!has(self.algorithm.rolloutCorrection.rolloutIsLowerThreshold) || "
        "self.algorithm.rolloutCorrection.rolloutIsLowerThreshold < self.algorithm.rolloutCorrection.rolloutIsThreshold",
        "is not below rolloutIsThreshold, so every weight would be 0",
        "Choose lower < threshold, e.g. 0.5 and 5.0.",
    ),
    Rule(
        "algorithm.rolloutCorrection.rolloutRsLowerThreshold",
        _no_room_for_ratios,
        "self.algorithm.rolloutCorrection.rolloutRs.exists(c, c.endsWith('k1')) ? "
        "(has(self.algorithm.rolloutCorrection.rolloutRsLowerThreshold) ? self.algorithm.rolloutCorrection.rolloutRsLowerThreshold "
        ": 1.0 / self.algorithm.rolloutCorrection.rolloutRsThreshold) < self.algorithm.rolloutCorrection.rolloutRsThreshold "
        ": !has(self.algorithm.rolloutCorrection.rolloutRsLowerThreshold)",
        "(default 1 / rolloutRsThreshold) bounds the k1 criteria of rolloutRs from below, so it needs one of them and has to be less "
        "than rolloutRsThreshold",
        "Choose lower < rolloutRsThreshold, e.g. 0.5 and 2.0, or leave it out.",
    ),
    Rule(
        "algorithm.filterGroups.enable",
        lambda s: s.rollout.n < 2 and s.algorithm.filter_groups.enable,
        "self.rollout.n >= 2 || !(has(self.algorithm.filterGroups.enable) ? self.algorithm.filterGroups.enable : "
        "has(self.algorithm.preset) && self.algorithm.preset == 'DAPO')",
        "would filter every group: a single sample never differs from its group",
        "Set rollout.n to 2 or more, or algorithm.filterGroups.enable to false.",
    ),
    Rule(
        "rollout.temperature",
        lambda s: s.rollout.temperature != 1 and s.rollout.cuts and s.algorithm.rollout_correction.reads_engine,
        "self.rollout.temperature == 1.0 || (self.rollout.topP == 1.0 && self.rollout.topK == -1 && self.rollout.minP == 0.0) || "
        "(self.algorithm.rolloutCorrection.rolloutIs == 'none' && size(self.algorithm.rolloutCorrection.rolloutRs) == 0 && "
        "!self.algorithm.rolloutCorrection.bypassMode)",
        "is not 1 while topP, topK or minP cuts tokens off: the engine's log-probs are then of the cut distribution, and the weights that "
        "algorithm.rolloutCorrection makes of them would shrink with every token",
        "Set temperature to 1, or topP to 1, topK to -1 and minP to 0; or do without those weights: rolloutIs none, no rolloutRs, no bypassMode.",
    ),
    Rule(
        "rollout.topK",
        lambda s: s.rollout.top_k == 0,
        "self.rollout.topK != 0",
        "0 would leave no token to sample",
        "Set -1 for all tokens, or 1 and more.",
    ),
    Rule(
        "rollout.engineArgs",
        _engine_args,
        "",
        "sets what the run sets itself",
        "Leave it out.",
    ),
    Rule(
        "rollout.maxModelLen",
        lambda s: s.rollout.context_tokens(0, LARGEST_COUNT) < s.data.max_prompt_length + s.data.max_response_length,
        "!has(self.rollout.maxModelLen) || self.rollout.maxModelLen >= self.data.maxPromptLength + self.data.maxResponseLength",
        "does not hold data.maxPromptLength and data.maxResponseLength together",
        "Raise it, or leave it out.",
    ),
    Rule(
        "rollout.maxNumBatchedTokens",
        lambda s: (s.rollout.max_num_batched_tokens or LARGEST_COUNT) < s.rollout.max_num_seqs,
        "!has(self.rollout.maxNumBatchedTokens) || self.rollout.maxNumBatchedTokens >= self.rollout.maxNumSeqs",
        "is less than rollout.maxNumSeqs: an engine step makes a token for each sequence",
        "Raise it, or lower rollout.maxNumSeqs.",
    ),
    Rule(
        "actor.ppoMicroBatchSizePerGPU",
        lambda s: s.actor.ppo_micro_batch_size_per_gpu and s.actor.ppo_max_token_len_per_gpu,
        "!(has(self.actor.ppoMicroBatchSizePerGPU) && has(self.actor.ppoMaxTokenLenPerGPU))",
        "is set together with actor.ppoMaxTokenLenPerGPU",
        "Keep one: a number of sequences, or a token budget.",
    ),
    Rule(
        "ref.logProbMicroBatchSizePerGPU",
        lambda s: s.ref.log_prob_micro_batch_size_per_gpu and s.ref.log_prob_max_token_len_per_gpu,
        "!(has(self.ref.logProbMicroBatchSizePerGPU) && has(self.ref.logProbMaxTokenLenPerGPU))",
        "is set together with ref.logProbMaxTokenLenPerGPU",
        "Keep one: a number of sequences, or a token budget.",
    ),
    Rule(
        "rollout.logProbMicroBatchSizePerGPU",
        lambda s: s.rollout.log_prob_micro_batch_size_per_gpu and s.rollout.log_prob_max_token_len_per_gpu,
        "!(has(self.rollout.logProbMicroBatchSizePerGPU) && has(self.rollout.logProbMaxTokenLenPerGPU))",
        "is set together with rollout.logProbMaxTokenLenPerGPU",
        "Keep one: a number of sequences, or a token budget.",
    ),
    Rule(
        "rollout.maxStaleness",
        lambda s: s.colocated and s.rollout.max_staleness > 0,
        "self.placement != 'Colocated' || self.rollout.maxStaleness == 0",
        "overlaps generation with training, and with placement Colocated they have the devices in turn",
        "Set it to 0, or placement to Disaggregated.",
    ),
    Rule(
        "rollout.tensorParallelSize",
        lambda s: s.colocated and s.trainer.gpus_per_node % s.rollout.tensor_parallel_size,
        "self.placement != 'Colocated' || self.trainer.gpusPerNode % self.rollout.tensorParallelSize == 0",
        "does not divide trainer.gpusPerNode, whose devices the engines of placement Colocated take in turn with the trainer",
        "Choose a divisor of trainer.gpusPerNode.",
    ),
    Rule(
        "rollout.replicas",
        lambda s: s.colocated and s.rollout.replicas not in (1, s.engines),
        "self.placement != 'Colocated' || self.rollout.replicas == 1 || "
        "self.rollout.replicas * self.rollout.tensorParallelSize == self.trainer.nodes * self.trainer.gpusPerNode",
        "is not what placement Colocated makes of trainer.nodes * trainer.gpusPerNode / rollout.tensorParallelSize",
        "Leave it out: the engines are as many as the trainer's devices hold.",
    ),
    Rule(
        "network.weightSync",
        lambda s: s.network.weight_sync == ("nccl" if s.colocated else "ipc"),
        "self.network.weightSync != (self.placement == 'Colocated' ? 'nccl' : 'ipc')",
        "does not go with the placement: ipc is for trainer and engines on the same devices (Colocated), nccl for devices apart",
        "Set it to auto.",
    ),
    Rule(
        "actor.sharePrompts",
        lambda s: (
            s.actor.share_prompts
            and (not s.model.use_remove_padding or s.actor.ppo_micro_batch_size_per_gpu is not None)
        ),
        "!self.actor.sharePrompts || (self.model.useRemovePadding && !has(self.actor.ppoMicroBatchSizePerGPU))",
        "needs packed rows that are counted in tokens: model.useRemovePadding, and no actor.ppoMicroBatchSizePerGPU",
        "Set model.useRemovePadding to true and leave actor.ppoMicroBatchSizePerGPU out, or set actor.sharePrompts to false.",
    ),
    Rule(
        "network.memberTimeoutSeconds",
        lambda s: s.network.member_timeout_seconds < 3 * s.network.heartbeat_seconds,
        "self.network.memberTimeoutSeconds >= 3.0 * self.network.heartbeatSeconds",
        "is less than three heartbeats, so one late packet would lose a process",
        "Raise it to three times network.heartbeatSeconds or more.",
    ),
    Rule(
        "network.trainerPort",
        _trainer_ports,
        "[[self.network.trainerPort, self.network.weightSyncPort], [self.network.weightSyncPort, self.network.rendezvousPort], "
        "[self.network.rendezvousPort, self.network.trainerPort]].all(pair, pair[0] == 0 || pair[0] != pair[1])",
        "is one of weightSyncPort and rendezvousPort, or these are the same: they are servers of one process",
        "Choose three ports, or 0.",
    ),
    Rule(
        "network.rolloutPort",
        lambda s: s.network.rollout_port and s.network.rollout_port + s.engines > 65536,
        "self.network.rolloutPort == 0 || self.network.rolloutPort + (self.placement == 'Colocated' ? "
        "self.trainer.nodes * self.trainer.gpusPerNode / self.rollout.tensorParallelSize : self.rollout.replicas) <= 65536",
        "leaves no port for the last engine: engine i takes this port + i under `grpo run`",
        "Lower it, or set 0.",
    ),
    Rule(
        "trainer.loggers",
        lambda s: _repeated(s.trainer.loggers),
        "self.trainer.loggers.all(l, self.trainer.loggers.exists_one(m, m == l))",
        "names a logger twice, so each line would be written twice",
        "Name each once.",
    ),
    Rule(
        "rollout.maxReplicas",
        lambda s: s.rollout.replicas > (s.rollout.max_replicas or LARGEST_COUNT),
        "!has(self.rollout.maxReplicas) || self.rollout.replicas <= self.rollout.maxReplicas",
        "is less than rollout.replicas",
        "Raise rollout.maxReplicas or lower rollout.replicas.",
    ),
    Rule(
        "failurePolicy.rules",
        lambda s: _failure_rules(s, without_criterion=True),
        "self.failurePolicy.rules.all(r, size(r.roles) + size(r.exitCodes) + size(r.podConditions) + size(r.reasons) > 0)",
        "has a rule without any criterion, which would match every failure",
        "Give it roles, exitCodes, podConditions or reasons; all three roles match every failure on purpose.",
    ),
    Rule(
        "failurePolicy.rules",
        lambda s: _failure_rules(s, without_criterion=False),
        "self.failurePolicy.rules.all(r, r.action != 'RestartPod' || size(r.exitCodes) + size(r.podConditions) + size(r.reasons) "
        "+ size(r.roles) == 0 || (size(r.roles) > 0 && r.roles.all(role, role == 'rollout')))",
        "has a rule with action RestartPod that is not for roles: [rollout]: only rollout pods can be replaced alone",
        "Set roles: [rollout], or action RestartSet or RestartJob.",
    ),
    Rule(
        "runtime.env",
        _unclear_variables,
        "self.runtime.env.all(v, has(v.value) != has(v.valueFrom) && "
        "(!has(v.valueFrom) || has(v.valueFrom.secretKeyRef) != has(v.valueFrom.configMapKeyRef)))",
        "has a variable without exactly one of value, valueFrom.secretKeyRef and valueFrom.configMapKeyRef",
        "Keep one of them; value: '' is an empty variable.",
    ),
    Rule(
        "runtime.env",
        lambda s: _repeated(variable.name for variable in s.runtime.env),
        "self.runtime.env.all(v, self.runtime.env.exists_one(w, w.name == v.name))",
        "sets a variable twice",
        "Keep one entry of each name.",
    ),
    Rule(
        "runtime.env",
        lambda s: [variable.name for variable in s.runtime.env if owns_variable(variable.name)],
        f"self.runtime.env.all(v, {no_owned_variable('v')})",
        "sets a variable that `grpo run` and the operator set for each process",
        f"Leave it out: {OWNED_VARIABLE_PREFIX}* and ranks are theirs; MASTER_PORT is network.rendezvousPort; devices follow from "
        "trainer.gpusPerNode, rollout.tensorParallelSize and runtime.device; VLLM_CPU_KVCACHE_SPACE is rollout.cpuKVCacheGiB; for "
        "PYTHONPATH, name functions by path/to/file.py:function, whose folder is searched.",
    ),
    Rule(
        "runtime.envFrom",
        _unclear_sources,
        "self.runtime.envFrom.all(s, has(s.secretRef) != has(s.configMapRef))",
        "has an entry without exactly one of secretRef and configMapRef",
        "Keep one of them in each entry.",
    ),
    Rule(
        "runtime.volumes",
        _volume_names,
        "self.runtime.volumes.all(v, self.runtime.volumes.exists_one(w, w.name == v.name) && "
        f"!(v.name in {_cel_list(RESERVED_VOLUME_NAMES)}))",
        "has a name twice, or one of the operator's own",
        f"Give each volume its own name, none of {', '.join(sorted(RESERVED_VOLUME_NAMES))}.",
    ),
    Rule(
        "runtime.volumes",
        _mount_paths,
        "self.runtime.volumes.all(v, self.runtime.volumes.exists_one(w, w.mountPath == v.mountPath) && "
        f"!(v.mountPath in {_cel_list(RESERVED_MOUNT_PATHS)}) && "
        "!v.mountPath.startsWith('/etc/grpo/') && !v.mountPath.startsWith('/dev/shm/'))",
        "has a mountPath twice, or one of the operator's own",
        f"Mount each at its own path, e.g. /data; none of {', '.join(sorted(RESERVED_MOUNT_PATHS))}.",
    ),
    Rule(
        "runtime.podTemplate",
        _pod_settings,
        "",
        "sets what would reach outside the pod (host paths, host namespaces, privilege) or what the operator owns",
        "Leave it out; volumes come from claims (runtime.volumes), devices from resources.",
    ),
    Rule(
        "scheduling.tolerations",
        _tolerations,
        "self.scheduling.tolerations.all(t, "
        "(has(t.operator) && t.operator == 'Exists' ? !has(t.value) || t.value == '' : has(t.key)) && "
        "(!has(t.tolerationSeconds) || (has(t.effect) && t.effect == 'NoExecute')))",
        "has an entry that Kubernetes refuses",
        "operator Exists takes no value; a missing key needs operator Exists; tolerationSeconds needs effect NoExecute.",
    ),
)
