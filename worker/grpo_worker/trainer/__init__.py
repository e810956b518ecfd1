"""The training role: one FSDP2 model over all ranks, log-probs and updates on packed batches, weights out, checkpoint
shards.

Blind to algorithms: it is given old log-probs, advantages and masks, and a loss by name. It never imports vllm.
"""
