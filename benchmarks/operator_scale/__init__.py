"""The operator at scale, beside the Kubeflow training-operator: `python -m benchmarks.operator_scale`.

Each round has an API server of its own, with fake nodes and pods played by kwok. Both operators get the same nodes, pods, measurements
and sources of figures; the peer is built from its Go module, and nothing of it is in this project but the versions and hashes in
`training_operator/`.
"""
