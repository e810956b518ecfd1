"""Names of the environment variables by which a supervisor (the operator or `grpo run`) tells a process of a job what it is.

Invariant: a name stands here once; who sets it and who reads it import it.
"""

RUN_DIRECTORY = "GRPO_RUN_DIR"  # where the run keeps its files
JOB_TOKEN = "GRPO_JOB_TOKEN"  # guards every port of the job
COORDINATOR_URL = "GRPO_COORDINATOR_URL"
COORDINATOR_PORT = "GRPO_COORDINATOR_PORT"  # what the coordinator listens on, in place of network.coordinatorPort
LISTEN_HOST = "GRPO_LISTEN_HOST"  # address that servers bind; 0.0.0.0 in a pod
ADVERTISED_HOST = "GRPO_ADVERTISED_HOST"  # address under which the others reach this process; the pod's IP
MEMBER_NAME = "GRPO_MEMBER_NAME"  # for example rollout-0; the same after a restart
REPLICA_INDEX = "GRPO_REPLICA_INDEX"  # of a rollout server
ROLLOUT_PORT = "GRPO_ROLLOUT_PORT"  # what a rollout server listens on, in place of network.rolloutPort + its index
DEVICE_COUNT = "GRPO_DEVICE_COUNT"  # GPUs that the job has in all, where trainer and engines may share them
RESUME = "GRPO_RESUME"  # in place of checkpoint.resume, after a restart
TERMINATION_LOG = "GRPO_TERMINATION_LOG"  # file that takes the last word of a process
PARENT_PID = "GRPO_PARENT_PID"  # a local child dies with this process
ATTEMPT = "GRPO_ATTEMPT"  # how often the job's set of pods was started before
LOG_FORMAT = "GRPO_LOG_FORMAT"  # `json` for one object a line; a person's to set
LOG_FACTS = "GRPO_LOG_FACTS"  # what every JSON line of this process and its children carries, as JSON
