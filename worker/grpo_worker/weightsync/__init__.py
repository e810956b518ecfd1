"""The `store` transport of weights: trainer rank 0 serves a snapshot over TCP, a replica pulls it, verifies it, and
only then applies it.

Invariant: a replica holds either all bytes of one version, proven by the manifest's checksums, or it holds an error.
Nothing here imports vLLM.
"""
