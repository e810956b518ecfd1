"""GRPO training: is it learning?"""

from charts.dashboards.panels import JOB, OF_JOB, Dashboard, Panel, tile

C = "grpo_coordinator"

DASHBOARD = Dashboard(
    uid="grpo-training",
    title="GRPO training",
    description="Is it learning? Rewards, groups, lengths, the policy's movement, and how far engine and trainer are apart.",
    jobs=f"{C}_step",
    questions={
        "How far is it?": [
            tile(
                "Steps",
                "Finished steps of all, in percent.",
                "It rises to 100.",
                {OF_JOB: f"100 * {C}_step{{{JOB}}} / {C}_total_steps{{{JOB}}}"},
                unit="percent",
            ),
            tile(
                "Reward",
                "Mean score of the last step's samples.",
                "Its scale is that of your reward function.",
                {OF_JOB: f"{C}_reward_mean{{{JOB}}}"},
                alerts=["GRPORewardCollapsed"],
            ),
            tile(
                "Validation accuracy",
                "Greedy answers to the validation prompts that were right.",
                "It should follow the training accuracy; when it falls behind, the policy learns the training prompts by heart.",
                {OF_JOB: f"{C}_validation_accuracy_ratio{{{JOB}}}"},
                unit="percentunit",
                empty="No validation was made: data.validationFiles and trainer.testFreq ask for one, and the reward function must give an accuracy.",
            ),
            tile(
                "Since the last step",
                "Time since the last step was finished.",
                "No more than a few times the length of a step.",
                {OF_JOB: f"time() - {C}_last_progress_timestamp_seconds{{{JOB}}}"},
                unit="s",
                alerts=["GRPOJobStalled"],
            ),
        ],
        "Is it learning?": [
            Panel(
                "Reward, best and worst",
                "Mean, largest and smallest score of the step's samples.",
                "The mean rises. When all three meet, there is nothing to learn from.",
                {
                    f"{OF_JOB} mean": f"{C}_reward_mean{{{JOB}}}",
                    f"{OF_JOB} max": f"{C}_reward_max{{{JOB}}}",
                    f"{OF_JOB} min": f"{C}_reward_min{{{JOB}}}",
                },
                alerts=["GRPORewardAllEqual", "GRPORewardCollapsed"],
            ),
            Panel(
                "Parts of the reward",
                "Means of the further numbers that the reward function returned, and the penalty for overlong answers.",
                "One part that rises while another falls shows what the policy trades.",
                {f"{OF_JOB} {{{{part}}}}": f"{C}_reward_part_mean{{{JOB}}}"},
                empty="The reward function returns a score alone.",
            ),
            Panel(
                "Accuracy",
                "Right answers among the samples of the step, and among greedy answers to the validation prompts.",
                "Both rise together.",
                {
                    f"{OF_JOB} training": f"{C}_train_accuracy_ratio{{{JOB}}}",
                    f"{OF_JOB} validation": f"{C}_validation_accuracy_ratio{{{JOB}}}",
                },
                unit="percentunit",
                empty="The reward function gives no accuracy.",
            ),
            Panel(
                "Groups that are all right or all wrong",
                "Share of groups whose samples are all right, and all wrong.",
                "All wrong falls, all right rises. Both teach nothing; what is between them does.",
                {f"{OF_JOB} {{{{solved}}}}": f"{C}_solved_groups_ratio{{{JOB}}}"},
                unit="percentunit",
                alerts=["GRPORewardAllEqual"],
            ),
            Panel(
                "Groups that teach nothing",
                "Share of the step's groups in which all samples scored the same.",
                "Below a half. Above, choose prompts that are neither too easy nor too hard, or algorithm.filterGroups.",
                {OF_JOB: f"{C}_zero_variance_groups_ratio{{{JOB}}}"},
                unit="percentunit",
            ),
            Panel(
                "Validation score",
                "Mean score of greedy answers to the validation prompts.",
                "It follows the reward of the training.",
                {OF_JOB: f"{C}_validation_score{{{JOB}}}"},
                empty="No validation was made yet: data.validationFiles, trainer.testFreq.",
            ),
        ],
        "What does it write?": [
            Panel(
                "Response length",
                "Tokens of a response: the mean, and the longest.",
                "It may grow while the policy learns to reason. Growth without more reward is padding.",
                {
                    f"{OF_JOB} mean": f"{C}_response_length_tokens{{{JOB}}}",
                    f"{OF_JOB} max": f"{C}_response_length_max_tokens{{{JOB}}}",
                },
            ),
            Panel(
                "Responses cut at the limit",
                "Share of responses that reached data.maxResponseLength.",
                "A few percent. Many cut answers are scored as wrong although they may not be.",
                {OF_JOB: f"{C}_response_clipped_ratio{{{JOB}}}"},
                unit="percentunit",
            ),
            Panel(
                "Entropy",
                "Mean entropy of the policy's distribution over the next token.",
                "It falls slowly. A fall to nearly nothing ends exploration, a steady rise is a policy that falls apart.",
                {OF_JOB: f"{C}_entropy{{{JOB}}}"},
                alerts=["GRPOEntropyCollapsed"],
            ),
        ],
        "How does the policy move?": [
            Panel(
                "KL",
                "KL divergence to the reference model, in the loss or in the reward, and of old and new policy within a step (k1 estimate).",
                "Small and smooth. A jump precedes most collapses.",
                {
                    f"{OF_JOB} loss": f"{C}_kl{{{JOB}}}",
                    f"{OF_JOB} reward": f"{C}_reward_kl{{{JOB}}}",
                    f"{OF_JOB} step": f"{C}_ppo_kl{{{JOB}}}",
                },
            ),
            Panel(
                "Clipped tokens",
                "Share of tokens whose probability ratio the clip range cut, and at which end.",
                "Below a few percent; 0 where a step is one update on fresh samples.",
                {
                    OF_JOB: f"{C}_clip_ratio{{{JOB}}}",
                    f"{OF_JOB} {{{{end}}}}": f"{C}_clip_end_ratio{{{JOB}}}",
                },
                unit="percentunit",
            ),
            Panel(
                "Gradient norm",
                "Global norm of the gradient before clipping.",
                "Steady. Growth over many steps, or spikes, ask for a lower learning rate.",
                {OF_JOB: f"{C}_grad_norm{{{JOB}}}"},
            ),
            Panel(
                "Policy loss",
                "Loss of the last step.",
                "Around 0; it says little about learning. Look at the reward.",
                {OF_JOB: f"grpo_trainer_policy_loss{{{JOB}}}"},
            ),
            Panel(
                "Learning rate",
                "Of the last update.",
                "It follows actor.optim.",
                {OF_JOB: f"grpo_trainer_learning_rate{{{JOB}}}"},
                unit="sci",
            ),
            Panel(
                "Skipped updates",
                "Updates without a sequence to learn from, or with a norm that is not finite, of the run so far.",
                "It stays where it is.",
                {OF_JOB: f"grpo_trainer_skipped_updates{{{JOB}}}"},
                alerts=["GRPOUpdatesSkipped"],
            ),
        ],
        "Are engine and trainer the same policy?": [
            Panel(
                "Mismatch",
                "Mean difference of the probabilities that engine and trainer give the sampled tokens, and the k3 estimate of their KL.",
                "A difference below 0.01 in bfloat16 for a well-trained model. Above, look at dtypes, and at algorithm.rolloutCorrection.",
                {
                    f"{OF_JOB} difference": f"{C}_probs_diff_mean{{{JOB}}}",
                    f"{OF_JOB} k3": f"{C}_mismatch_k3{{{JOB}}}",
                },
                alerts=["GRPOMismatchHigh"],
            ),
            Panel(
                "Staleness",
                "Versions of the weights between a sample and the update that uses it: the mean, the oldest, and the limit (rollout.maxStaleness).",
                "Never above the limit.",
                {
                    f"{OF_JOB} mean": f"{C}_staleness_mean{{{JOB}}}",
                    f"{OF_JOB} oldest": f"{C}_staleness_max{{{JOB}}}",
                    f"{OF_JOB} limit": f"{C}_staleness_limit{{{JOB}}}",
                },
                alerts=["GRPOStalenessHigh"],
            ),
            Panel(
                "Importance weights",
                "Effective sample size of the importance weights, and the share of tokens that rolloutRs rejected.",
                "Close to 1, and close to 0.",
                {
                    f"{OF_JOB} sample size": f"{C}_importance_sample_size_ratio{{{JOB}}}",
                    f"{OF_JOB} rejected": f"{C}_rejected_tokens_ratio{{{JOB}}}",
                },
                unit="percentunit",
                empty="algorithm.rolloutCorrection asks for neither weights nor rejection.",
            ),
        ],
        "Are samples lost?": [
            Panel(
                "Samples without a reward",
                "Samples a minute whose reward could not be computed, by what went wrong.",
                "None.",
                {f"{OF_JOB} {{{{kind}}}}": f"60 * rate({C}_reward_failures_total{{{JOB}}}[$__rate_interval])"},
                empty="No reward has failed.",
                alerts=["GRPORewardFunctionFailing"],
            ),
            Panel(
                "Prompts sent again or given up",
                "Prompts a minute that went to another engine after a failure, and that were given up.",
                "None, but while engines come and go.",
                {
                    f"{OF_JOB} sent again": f"60 * rate({C}_redispatched_prompts_total{{{JOB}}}[$__rate_interval])",
                    f"{OF_JOB} given up": f"60 * rate({C}_failed_prompts_total{{{JOB}}}[$__rate_interval])",
                },
            ),
            Panel(
                "Errors of engines",
                "Prompts and requests a minute that engines answered with an error, by kind.",
                "None, but while engines come and go.",
                {
                    f"{OF_JOB} {{{{kind}}}}": f"60 * sum by (namespace, grpojob, kind) (rate(grpo_rollout_errors_total{{{JOB}}}[$__rate_interval]))"
                },
                empty="No engine has answered with an error.",
            ),
        ],
    },
)
