"""The loop around the plan: the picture of the cluster, the queue, what carries a plan out, and what is told of it.

Invariant: nothing here decides about a job; nothing here knows kopf, and of the API only `api.py`.
"""
