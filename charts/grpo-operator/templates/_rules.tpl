{{/*
What the operator may do in a namespace whose jobs it runs. Each verb is one that it uses; a test compares this list with its calls.

Secrets are created and patched, never read back: a job's token follows from the operator's key and the job's UID. ConfigMaps are known by
the pods that use them. Services, NetworkPolicies and PodDisruptionBudgets go with their job, by garbage collection.
*/}}
{{- define "grpo-operator.rules" -}}
- apiGroups: [grpo.dev]
  resources: [grpojobs]
  verbs: [get, list, watch, delete]
- apiGroups: [grpo.dev]
  resources: [grpojobs/status]
  verbs: [patch]
# Lets children name their job as the owner that waits for them, where the cluster checks that (OwnerReferencesPermissionEnforcement).
- apiGroups: [grpo.dev]
  resources: [grpojobs/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [create, patch, delete]
- apiGroups: [""]
  resources: [services, secrets]
  verbs: [create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [create, patch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end -}}
