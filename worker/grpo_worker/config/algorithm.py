"""`spec.algorithm`: how rewards become advantages, and how off-policy samples are corrected."""

from typing import Literal

from grpo_worker.config.base import Section, field

KLKind = Literal[
    "k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl", "k1+", "kl+", "abs+", "k2+", "mse+", "k3+", "low_var_kl+",
]  # fmt: skip
KLControllerType = Literal["fixed", "adaptive"]
CorrectionLevel = Literal["token", "sequence", "none"]
Preset = Literal["GRPO", "DrGRPO", "DAPO", "GSPO", "CISPO"]
RejectionCriterion = Literal[
    "token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3",
    "seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3",
]  # fmt: skip


class KLControl(Section):
    """Coefficient of the KL penalty in the reward."""

    type: KLControllerType = field(
        "fixed",
        "fixed keeps klCoef; adaptive steers it to targetKL (Ziegler et al. 2019).",
        verl="algorithm.kl_ctrl.type",
    )
    kl_coef: float = field(0.001, "Coefficient, or its first value.", verl="algorithm.kl_ctrl.kl_coef", ge=0)
    horizon: int = field(
        10000, "Time scale of the adaptive controller.", verl="algorithm.kl_ctrl.horizon", unit="samples", ge=1
    )
    target_kl: float = field(
        0.1, "KL that the adaptive controller steers to.", verl="algorithm.kl_ctrl.target_kl", unit="nats", gt=0
    )


class FilterGroups(Section):
    """Dynamic sampling (DAPO): groups whose samples all score the same carry no gradient and are replaced by fresh prompts."""

    enable: bool = field(False, "Replace groups without variance.", verl="algorithm.filter_groups.enable")
    metric: Literal["score", "accuracy"] = field(
        "score", "Value whose variance within the group decides.", verl="algorithm.filter_groups.metric"
    )
    max_num_gen_batches: int = field(
        10,
        "Bound: after so many generation batches for one step, the step trains on the groups that it has.",
        verl="algorithm.filter_groups.max_num_gen_batches", unit="batches", ge=1,
    )  # fmt: skip


class OverlongBuffer(Section):
    """Soft overlong punishment (DAPO, arXiv 2503.14476 eq. 13)."""

    enable: bool = field(
        False,
        "Subtract a penalty that grows over the last `length` tokens of the budget.",
        verl="reward_model.overlong_buffer.enable",
    )
    length: int | None = field(
        None,
        "Length of the buffer; default a fifth of data.maxResponseLength.",
        verl="reward_model.overlong_buffer.len",
        unit="tokens",
        ge=1,
    )
    penalty_factor: float = field(
        1.0, "Penalty at the full budget.", verl="reward_model.overlong_buffer.penalty_factor", ge=0
    )


class RolloutCorrection(Section):
    """Importance weights between the trainer's old policy and the policy that the engine sampled from."""

    rollout_is: CorrectionLevel = field(
        "token", "Level of the importance weights.", verl="algorithm.rollout_correction.rollout_is"
    )
    rollout_is_threshold: float = field(
        2.0, "Weights above are truncated to it (TIS).", verl="algorithm.rollout_correction.rollout_is_threshold", gt=0
    )
    rollout_is_lower_threshold: float | None = field(
        None,
        "When set, weights outside [lower, threshold] become 0 in place of truncation (IcePop, arXiv 2510.18855).",
        verl="algorithm.rollout_correction.rollout_is_threshold ('low_high')", ge=0,
    )  # fmt: skip
    rollout_is_batch_normalize: bool = field(
        False, "Divide the weights by their batch mean.", verl="algorithm.rollout_correction.rollout_is_batch_normalize"
    )
    rollout_rs: list[RejectionCriterion] = field(
        list,
        "Rejection criteria: tokens or sequences beyond the threshold leave the loss.",
        verl="algorithm.rollout_correction.rollout_rs",
        max_length=11,
    )
    rollout_rs_threshold: float = field(
        2.0,
        "Upper threshold of each criterion in rolloutRs: of k2 and k3 in nats, of k1 as a ratio.",
        verl="algorithm.rollout_correction.rollout_rs_threshold",
        gt=0,
    )
    rollout_rs_lower_threshold: float | None = field(
        None,
        "Lower threshold of the k1 criteria, as a ratio; default 1 / rolloutRsThreshold.",
        verl="algorithm.rollout_correction.rollout_rs_threshold ('low_high')",
        gt=0,
    )
    bypass_mode: bool = field(
        False,
        "Take the engine's log-probs as old log-probs: saves one forward pass, and the ratio then spans engine and trainer.",
        verl="algorithm.rollout_correction.bypass_mode",
    )

    @property
    def reads_engine(self) -> bool:
        """Whether the update depends on the engine's log-probs."""
        return self.rollout_is != "none" or bool(self.rollout_rs) or self.bypass_mode

    @property
    def of_each_sequence(self) -> bool:
        """Whether a sequence's weights are made of that sequence alone, and none is masked, which would change everyone's denominators."""
        return not self.rollout_rs and not (self.rollout_is != "none" and self.rollout_is_batch_normalize)


class Algorithm(Section):
    """Advantages, KL in the reward, dynamic sampling, off-policy correction."""

    preset: Preset | None = field(
        None,
        "Sets the defaults of a published recipe; a field that you set yourself wins. `grpo validate` prints the outcome.",
    )
    advantage_estimator: str = field(
        "grpo", "grpo, rloo, reinforce, reinforcePlusPlus, reinforcePlusPlusBaseline, or module:function.",
        verl="algorithm.adv_estimator", pattern=r"^(grpo|rloo|reinforce|reinforcePlusPlus|reinforcePlusPlusBaseline|[\w./\-]+:[A-Za-z_]\w*)$",
    )  # fmt: skip
    norm_adv_by_std: bool = field(
        True,
        "Divide group advantages by the group's standard deviation; false is Dr.GRPO (arXiv 2503.20783).",
        verl="algorithm.norm_adv_by_std_in_grpo",
    )
    gamma: float = field(
        1.0, "Discount of token rewards; used by reinforcePlusPlus.", verl="algorithm.gamma", gt=0, le=1
    )
    use_kl_in_reward: bool = field(
        False,
        "Subtract klCtrl.klCoef times the KL to the reference model from each token's reward.",
        verl="algorithm.use_kl_in_reward",
    )
    kl_penalty: KLKind = field(
        "k1",
        "Estimator of the KL in the reward (+ changes only a gradient, so nothing here).",
        verl="algorithm.kl_penalty",
    )
    kl_ctrl: KLControl = field(KLControl, "Coefficient of the KL in the reward.", verl="algorithm.kl_ctrl")
    filter_groups: FilterGroups = field(FilterGroups, "Dynamic sampling.", verl="algorithm.filter_groups")
    overlong_buffer: OverlongBuffer = field(
        OverlongBuffer, "Penalty on responses near the length limit.", verl="reward_model.overlong_buffer"
    )
    rollout_correction: RolloutCorrection = field(
        RolloutCorrection, "Correction of the mismatch between engine and trainer.", verl="algorithm.rollout_correction"
    )
