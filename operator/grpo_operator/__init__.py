"""Control plane: the operator that runs GRPOJob objects on Kubernetes."""
