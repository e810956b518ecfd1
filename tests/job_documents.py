"""GRPOJob documents for tests: a sound one, and what spoils it. `grpo validate` and a real API server are held to the same tables."""

DOCUMENT = """\
apiVersion: grpo.dev/v1alpha1
kind: GRPOJob
metadata:
  name: job
spec:
  model:
    path: model
  data:
    trainFiles: [train.parquet]
"""

# One field of the sound document above is set to a YAML value: the path that is blamed, and words of the message.
BAD_FIELDS = [
    # unknown fields, with hints
    ("batchSize=4", "spec.batchSize", "unknown field"),
    ("data.train_batch_size=4", "spec.data.train_batch_size", "Did you mean trainBatchSize?"),
    ("data.trainbatchsize=4", "spec.data.trainbatchsize", "Did you mean trainBatchSize?"),
    ("data.trainFile=[a]", "spec.data.trainFile", "Did you mean trainFiles"),
    ("data.valFiles=[a]", "spec.data.valFiles", "unknown field"),
    ("actor.optim.learningRate=1e-6", "spec.actor.optim.learningRate", "Known here: lr,"),
    ("actor.ppo_micro_batch_size_per_gpu=1", "spec.actor.ppo_micro_batch_size_per_gpu", "ppoMicroBatchSizePerGPU"),
    ("actor.ppoMicroBatchSizePerGpu=1", "spec.actor.ppoMicroBatchSizePerGpu", "Did you mean ppoMicroBatchSizePerGPU?"),
    ("actor.useKlLoss=true", "spec.actor.useKlLoss", "Did you mean useKLLoss?"),
    ("rollout.tensorModelParallelSize=2", "spec.rollout.tensorModelParallelSize", "tensorParallelSize"),
    ("trainer.criticWarmup=1", "spec.trainer.criticWarmup", "unknown field"),
    ("trainer.total_epoch=1", "spec.trainer.total_epoch", "totalEpochs"),
    ("critic.lr=1e-5", "spec.critic", "unknown field"),
    ("runtime.env=[{nme: A}]", "spec.runtime.env[0].nme", "Did you mean name?"),
    # wrong types
    ("actor.optim.lr='1e-6'", "spec.actor.optim.lr", "number without quotes"),
    ("actor.optim.lr=fast", "spec.actor.optim.lr", "number"),
    ("actor.optim.betas=0.9", "spec.actor.optim.betas", "list"),
    ("actor.optim.betas=[0.9, '0.99']", "spec.actor.optim.betas[1]", "number"),
    ("actor.optim=1e-6", "spec.actor.optim", "mapping"),
    ("actor=", "spec.actor", "mapping"),
    ("data.trainBatchSize='8'", "spec.data.trainBatchSize", "whole number"),
    ("data.trainBatchSize=8.5", "spec.data.trainBatchSize", "integer"),
    ("data.trainBatchSize=1e3", "spec.data.trainBatchSize", "whole number"),
    ("data.trainBatchSize=true", "spec.data.trainBatchSize", "integer"),
    ("data.trainFiles=train.parquet", "spec.data.trainFiles", "Write a list"),
    ("data.trainFiles=[1]", "spec.data.trainFiles[0]", "string"),
    ("data.shuffle=1", "spec.data.shuffle", "true or false"),
    ("data.shuffle='true'", "spec.data.shuffle", "true or false"),
    ("model.path=7", "spec.model.path", "quote it"),
    ("model.revision=1e10", "spec.model.revision", "text"),
    ("reward.options=[strict]", "spec.reward.options", "mapping"),
    ("runtime.env={A: b}", "spec.runtime.env", "list"),
    ("runtime.env=[{name: A, value: 1}]", "spec.runtime.env[0].value", "text"),
    ("metadata.labels={a: 1}", "metadata.labels.a", "text"),
    # ranges and choices
    ("actor.optim.lr=-1e-6", "spec.actor.optim.lr", "greater than or equal to 0"),
    ("actor.optim.lr=.inf", "spec.actor.optim.lr", "finite"),
    ("actor.optim.lr=.nan", "spec.actor.optim.lr", "finite"),
    ("actor.optim.betas=[0.9]", "spec.actor.optim.betas", "at least 2"),
    ("actor.optim.clipGrad=0", "spec.actor.optim.clipGrad", "greater than 0"),
    ("actor.optim.lrScheduler=step", "spec.actor.optim.lrScheduler", "'constant', 'cosine' or 'linear'"),
    ("actor.ppoMiniBatchSize=0", "spec.actor.ppoMiniBatchSize", "greater than or equal to 1"),
    ("actor.clipRatioC=1.0", "spec.actor.clipRatioC", "greater than 1"),
    ("actor.clipRatioLow=-0.1", "spec.actor.clipRatioLow", "greater than or equal to 0"),
    ("actor.lossAggMode=mean", "spec.actor.lossAggMode", "token-mean"),
    ("actor.lossMode=ppo", "spec.actor.lossMode", "vanilla, gspo, cispo, or module:function"),
    ("actor.klLossType=k4", "spec.actor.klLossType", "low_var_kl"),
    ("algorithm.preset=PPO", "spec.algorithm.preset", "'GRPO'"),
    ("algorithm.preset=[DAPO]", "spec.algorithm.preset", "'DAPO'"),
    ("algorithm.advantageEstimator=gae", "spec.algorithm.advantageEstimator", "Expected: grpo, rloo"),
    ("algorithm.advantageEstimator=mine", "spec.algorithm.advantageEstimator", "pattern"),
    ("algorithm.gamma=1.5", "spec.algorithm.gamma", "less than or equal to 1"),
    ("algorithm.klCtrl.type=linear", "spec.algorithm.klCtrl.type", "'fixed' or 'adaptive'"),
    ("algorithm.filterGroups.maxNumGenBatches=0", "spec.algorithm.filterGroups.maxNumGenBatches", "equal to 1"),
    ("algorithm.rolloutCorrection.rolloutIs=both", "spec.algorithm.rolloutCorrection.rolloutIs", "'sequence'"),
    ("algorithm.rolloutCorrection.rolloutRs=[seq_max_k1]", "spec.algorithm.rolloutCorrection.rolloutRs[0]", "seq_max_k2"),
    ("data.truncation=cut", "spec.data.truncation", "'middle'"),
    ("data.dataset=rows", "spec.data.dataset", "pattern"),
    ("reward.function=accuracy", "spec.reward.function", "pattern"),
    ("reward.timeoutSeconds=0", "spec.reward.timeoutSeconds", "greater than 0"),
    ("reward.maxFailureRatio=2", "spec.reward.maxFailureRatio", "less than or equal to 1"),
    ("model.path=''", "spec.model.path", "at least 1 character"),
    ("model.dtype=float64", "spec.model.dtype", "'bfloat16'"),
    ("rollout.n=0", "spec.rollout.n", "equal to 1"),
    ("rollout.temperature=0", "spec.rollout.temperature", "greater than 0"),
    ("rollout.topP=1.01", "spec.rollout.topP", "less than or equal to 1"),
    ("rollout.gpuMemoryUtilization=0", "spec.rollout.gpuMemoryUtilization", "greater than 0"),
    ("rollout.gpuMemoryUtilization=1", "spec.rollout.gpuMemoryUtilization", "less than 1"),
    ("rollout.maxStaleness=-1", "spec.rollout.maxStaleness", "equal to 0"),
    ("trainer.loggers=[mlflow]", "spec.trainer.loggers[0]", "'tensorboard'"),
    ("trainer.totalEpochs=0", "spec.trainer.totalEpochs", "equal to 1"),
    ("checkpoint.keepLast=0", "spec.checkpoint.keepLast", "equal to 1"),
    ("network.coordinatorPort=70000", "spec.network.coordinatorPort", "65535"),
    ("network.weightSyncStreams=65", "spec.network.weightSyncStreams", "64"),
    ("runtime.env=[{name: 1A}]", "spec.runtime.env[0].name", "pattern"),
    ("runtime.env=[{name: A-B}]", "spec.runtime.env[0].name", "pattern"),
    ("activeDeadlineSeconds=0", "spec.activeDeadlineSeconds", "equal to 1"),
    ("metadata.name=Job_1", "metadata.name", "pattern"),
    (f"metadata.name={'a' * 41}", "metadata.name", "40"),
    ("metadata.name=1a", "metadata.name", "pattern"),
    # what only a cluster uses
    ("suspend=1", "spec.suspend", "true or false"),
    ("ttlSecondsAfterFinished=-1", "spec.ttlSecondsAfterFinished", "equal to 0"),
    ("ttlSecondsAfterFinish=5", "spec.ttlSecondsAfterFinish", "Did you mean ttlSecondsAfterFinished"),
    ("rollout.maxReplicas=0", "spec.rollout.maxReplicas", "equal to 1"),
    ("runtime.image=''", "spec.runtime.image", "at least 1 character"),
    ("runtime.imagePullPolicy=always", "spec.runtime.imagePullPolicy", "'Always'"),
    ("runtime.imagePullSecrets=[Reg_1]", "spec.runtime.imagePullSecrets[0]", "pattern"),
    ("runtime.workspace={}", "spec.runtime.workspace.claimName", "Add it"),
    ("runtime.workspace={claimName: a, subPath: ../b}", "spec.runtime.workspace.subPath", "pattern"),
    ("runtime.workspace=claim", "spec.runtime.workspace", "mapping"),
    ("runtime.workspace={claim: a, claimName: a}", "spec.runtime.workspace.claim", "Did you mean claimName?"),
    ("runtime.volumes=[{name: a, claimName: b}]", "spec.runtime.volumes[0].mountPath", "Add it"),
    ("runtime.volumes=[{name: a, claimName: b, mountPath: data}]", "spec.runtime.volumes[0].mountPath", "pattern"),
    ("runtime.volumes=[{name: a, claimName: b, mountPath: /a/../workspace}]", "spec.runtime.volumes[0].mountPath", "pattern"),
    ("runtime.volumes=[{name: A, claimName: b, mountPath: /a}]", "spec.runtime.volumes[0].name", "pattern"),
    ("runtime.volumes=[{name: a, hostPath: /data, claimName: b, mountPath: /a}]", "spec.runtime.volumes[0].hostPath", "unknown field"),
    ("runtime.shmSize=8GiB", "spec.runtime.shmSize", "pattern"),
    ("runtime.shmSize=-1Gi", "spec.runtime.shmSize", "pattern"),
    ("runtime.resources.trainer.limits={memory: lots}", "spec.runtime.resources.trainer.limits.memory", "pattern"),
    ("runtime.resources.worker={}", "spec.runtime.resources.worker", "Known here: coordinator, trainer, rollout"),
    ("runtime.resources.trainer={cpu: 4}", "spec.runtime.resources.trainer.cpu", "Known here: requests, limits"),
    ("runtime.env=[{name: A, valueFrom: {secretKeyRef: {name: s}}}]", "spec.runtime.env[0].valueFrom.secretKeyRef.key", "Add it"),
    ("runtime.env=[{name: A, valueFrom: {fieldRef: {}}}]", "spec.runtime.env[0].valueFrom.fieldRef", "unknown field"),
    ("runtime.podTemplate.worker={}", "spec.runtime.podTemplate.worker", "Known here: all, coordinator"),
    ("runtime.podTemplate.all={hostNetwork: true}", "spec.runtime.podTemplate.all.hostNetwork", "Known here: metadata, spec"),
    ("runtime.terminationGracePeriodSeconds=0", "spec.runtime.terminationGracePeriodSeconds", "equal to 1"),
    ("scheduling.tolerations=[{key: a, effect: Never}]", "spec.scheduling.tolerations[0].effect", "'NoSchedule'"),
    ("scheduling.nodeSelector={gpu: true}", "spec.scheduling.nodeSelector.gpu", "quote it"),
    ("scheduling.affinity={}", "spec.scheduling.affinity", "unknown field"),
    ("network.rdma={resource: hca}", "spec.network.rdma.resource", "pattern"),
    ("network.rdma={resource: rdma/hca, count: 0}", "spec.network.rdma.count", "equal to 1"),
    ("network.rdma=true", "spec.network.rdma", "mapping"),
    ("failurePolicy.rules=[{roles: [rollout]}]", "spec.failurePolicy.rules[0].action", "Add it"),
    ("failurePolicy.rules=[{action: Restart, roles: [rollout]}]", "spec.failurePolicy.rules[0].action", "'RestartPod'"),
    ("failurePolicy.rules=[{action: FailJob, roles: [worker]}]", "spec.failurePolicy.rules[0].roles[0]", "'trainer'"),
    ("failurePolicy.rules=[{action: FailJob, exitCodes: [0]}]", "spec.failurePolicy.rules[0].exitCodes[0]", "equal to 1"),
    ("failurePolicy.rules=[{action: FailJob, exitCodes: [256]}]", "spec.failurePolicy.rules[0].exitCodes[0]", "equal to 255"),
    ("failurePolicy.rules=[{action: FailJob, onExitCodes: [1]}]", "spec.failurePolicy.rules[0].onExitCodes", "exitCodes"),
]  # fmt: skip

# Contradictions: all the overrides that make one, the field to change, words of the remedy.
CONTRADICTIONS = [
    (["algorithm.useKLInReward=true", "actor.useKLLoss=true"], "actor.useKLLoss", "count twice"),
    (["algorithm.useKLInReward=true", "algorithm.preset=GRPO"], "actor.useKLLoss", "preset GRPO turns useKLLoss on"),
    (["rollout.n=1"], "rollout.n", "at least 2"),
    (["rollout.n=1", "algorithm.advantageEstimator=rloo"], "rollout.n", "reinforce"),
    (["rollout.n=1", "algorithm.advantageEstimator=reinforcePlusPlusBaseline"], "rollout.n", "at least 2"),
    (["data.trainBatchSize=100", "actor.ppoMiniBatchSize=64"], "actor.ppoMiniBatchSize", "divisor"),
    (["data.trainBatchSize=8"], "actor.ppoMiniBatchSize", "does not divide"),
    (["rollout.minReplicas=2"], "rollout.minReplicas", "raise rollout.replicas"),
    (["data.trainFiles=[]"], "data.trainFiles", "exactly one"),
    (["data.dataset=rows:make"], "data.trainFiles", "exactly one"),
    (["algorithm.overlongBuffer.length=2000"], "algorithm.overlongBuffer.length", "longer than data.maxResponseLength"),
    (
        ["algorithm.rolloutCorrection.rolloutIsLowerThreshold=2.0"],
        "algorithm.rolloutCorrection.rolloutIsLowerThreshold",
        "not below",
    ),
    (["rollout.topK=0"], "rollout.topK", "no token"),
    (["actor.ppoMicroBatchSizePerGPU=1", "actor.ppoMaxTokenLenPerGPU=8"], "actor.ppoMicroBatchSizePerGPU", "Keep one"),
    (
        ["ref.logProbMicroBatchSizePerGPU=1", "ref.logProbMaxTokenLenPerGPU=8"],
        "ref.logProbMicroBatchSizePerGPU",
        "Keep one",
    ),
    (
        ["rollout.logProbMicroBatchSizePerGPU=1", "rollout.logProbMaxTokenLenPerGPU=8"],
        "rollout.logProbMicroBatchSizePerGPU",
        "Keep one",
    ),
    (["network.memberTimeoutSeconds=2"], "network.memberTimeoutSeconds", "three heartbeats"),
    (["rollout.maxReplicas=2", "rollout.replicas=3"], "rollout.maxReplicas", "lower rollout.replicas"),
    (
        ["rollout.minReplicas=3", "rollout.maxReplicas=2", "rollout.replicas=2"],
        "rollout.minReplicas",
        "Lower rollout.minReplicas",
    ),
    (["failurePolicy.rules=[{action: FailJob}]"], "failurePolicy.rules", "without any criterion"),
    (["failurePolicy.rules=[{action: FailJob, roles: []}]"], "failurePolicy.rules", "without any criterion"),
    (["failurePolicy.rules=[{action: RestartPod, exitCodes: [137]}]"], "failurePolicy.rules", "roles: [rollout]"),
    (
        ["failurePolicy.rules=[{action: RestartPod, roles: [rollout, trainer]}]"],
        "failurePolicy.rules",
        "roles: [rollout]",
    ),
    (["runtime.env=[{name: A}]"], "runtime.env", "exactly one of value"),
    (["runtime.env=[{name: A, valueFrom: {}}]"], "runtime.env", "exactly one of value"),
    (
        ["runtime.env=[{name: A, value: b, valueFrom: {secretKeyRef: {name: s, key: k}}}]"],
        "runtime.env",
        "exactly one of value",
    ),
    (
        ["runtime.env=[{name: A, valueFrom: {secretKeyRef: {name: s, key: k}, configMapKeyRef: {name: s, key: k}}}]"],
        "runtime.env",
        "exactly one of value",
    ),
    (["runtime.env=[{name: A, value: b}, {name: A, value: c}]"], "runtime.env", "twice"),
    (["runtime.envFrom=[{}]"], "runtime.envFrom", "exactly one of secretRef"),
    (
        ["runtime.envFrom=[{secretRef: {name: a}, configMapRef: {name: a}}]"],
        "runtime.envFrom",
        "exactly one of secretRef",
    ),
    (
        ["runtime.volumes=[{name: a, claimName: b, mountPath: /a}, {name: a, claimName: b, mountPath: /b}]"],
        "runtime.volumes",
        "has a name twice",
    ),
    (["runtime.volumes=[{name: shm, claimName: b, mountPath: /a}]"], "runtime.volumes", "operator's own"),
    (
        ["runtime.volumes=[{name: a, claimName: b, mountPath: /a}, {name: b, claimName: b, mountPath: /a}]"],
        "runtime.volumes",
        "mountPath twice",
    ),
    (["runtime.volumes=[{name: a, claimName: b, mountPath: /workspace}]"], "runtime.volumes", "/data"),
    (["runtime.volumes=[{name: a, claimName: b, mountPath: /etc/grpo/x}]"], "runtime.volumes", "/data"),
    (["runtime.podTemplate.all.spec.hostNetwork=true"], "runtime.podTemplate", "Leave it out"),
    (["runtime.podTemplate.trainer.spec.hostPID=true"], "runtime.podTemplate", "Leave it out"),
    (["runtime.podTemplate.all.spec.volumes=[{name: a, hostPath: {path: /}}]"], "runtime.podTemplate", "host"),
    (
        ["runtime.podTemplate.rollout.spec.containers=[{name: worker, securityContext: {privileged: true}}]"],
        "runtime.podTemplate",
        "privilege",
    ),
    (["runtime.podTemplate.coordinator.spec.restartPolicy=Always"], "runtime.podTemplate", "operator"),
    (["runtime.podTemplate.all.metadata.labels={grpo.dev/role: x}"], "runtime.podTemplate", "operator"),
    (["scheduling.tolerations=[{operator: Exists, value: a}]"], "scheduling.tolerations", "takes no value"),
    (["scheduling.tolerations=[{value: a}]"], "scheduling.tolerations", "needs operator Exists"),
    (["scheduling.tolerations=[{key: a, tolerationSeconds: 5}]"], "scheduling.tolerations", "NoExecute"),
]

# Overrides of the sound document that leave it sound.
GOOD = [
    [],
    ["actor.optim.lr=1e-6"],
    ["actor.optim.lr=1", "actor.clipRatioC=2", "algorithm.gamma=1"],
    ["network.heartbeatSeconds=1", "network.memberTimeoutSeconds=3", "network.weightSyncTimeoutSeconds=2.5"],
    ["data.trainFiles=[]", "data.dataset=rows.py:make"],
    ["rollout.n=1", "algorithm.advantageEstimator=reinforce"],
    ["rollout.replicas=2", "rollout.minReplicas=1", "rollout.maxReplicas=4"],
    [
        "rollout.engineArgs={enable_chunked_prefill: true, nested: {a: [1, 2.5, null, x]}}",
        "reward.options={method: strict}",
    ],
    ["algorithm.rolloutCorrection={rolloutIsLowerThreshold: 0.5, rolloutIsThreshold: 5, rolloutRs: [seq_max_k2]}"],
    ["suspend=true", "ttlSecondsAfterFinished=0", "activeDeadlineSeconds=3600"],
    ["runtime.workspace={claimName: grpo-workspace, subPath: team/a}", "runtime.device=cpu"],
    [
        "runtime.volumes=[{name: data, claimName: d, mountPath: /data}, {name: hf, claimName: d, mountPath: /home/grpo/.cache/huggingface, readOnly: false}]"
    ],
    [
        "runtime.resources={trainer: {requests: {cpu: 4, memory: 64Gi}, limits: {cpu: 500m, nvidia.com/gpu: '8'}}, coordinator: {}}"
    ],
    ["runtime.shmSize=16Gi"],
    ["runtime.shmSize=1000000000"],
    [
        "runtime.env=[{name: A, value: ''}, {name: B, valueFrom: {secretKeyRef: {name: s, key: k}}}, "
        "{name: C, valueFrom: {configMapKeyRef: {name: s, key: k.txt}}}]",
        "runtime.envFrom=[{secretRef: {name: a}}, {configMapRef: {name: b}}]",
    ],
    [
        "runtime.image=registry.example.com/grpo/worker:1",
        "runtime.imagePullPolicy=Always",
        "runtime.imagePullSecrets=[reg]",
    ],
    [
        "runtime.podTemplate={all: {metadata: {labels: {team: a}, annotations: {b: c}}}, trainer: {spec: {affinity: {}, hostNetwork: false, "
        "containers: [{name: worker, securityContext: {capabilities: {add: [SYS_PTRACE]}}}], volumes: [{name: a, emptyDir: {}}]}}}"
    ],
    ["runtime.terminationGracePeriodSeconds=30"],
    [
        "scheduling={nodeSelector: {gpu: h100}, priorityClassName: high, schedulerName: volcano, tolerations: [{operator: Exists}, "
        "{key: a, value: b, effect: NoExecute, tolerationSeconds: 5}]}"
    ],
    ["network.rdma={resource: rdma/hca_shared_devices_a}", "network.socketInterface=eth0"],
    [
        "failurePolicy.rules=[{name: preempted, podConditions: [DisruptionTarget], action: RestartJob, count: false}, "
        "{roles: [rollout], exitCodes: [137], action: RestartPod}, {reasons: [OOMKilled], action: FailJob}]"
    ],
    ["metadata.name=" + "a" * 40],
    ["metadata.labels={team: a}", "metadata.annotations={note: b}"],
]
