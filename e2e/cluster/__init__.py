"""A Kubernetes of the project's own, built from Go modules: for tests an API server alone, for e2e a node that runs pods."""

from .control_plane import ControlPlane
from .errors import ClusterError

__all__ = ["ClusterError", "ControlPlane"]
