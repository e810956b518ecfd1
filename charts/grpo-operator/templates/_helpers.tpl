{{/* Name of the release's objects; 48 characters leave room for the suffixes. */}}
{{- define "grpo-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 48 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" (.Release.Name | trunc 34 | trimSuffix "-") .Chart.Name -}}
{{- end -}}
{{- end -}}

{{/* What finds the operator's pod. The NetworkPolicy of each job admits the operator by app.kubernetes.io/name, so that name is fixed. */}}
{{- define "grpo-operator.selectorLabels" -}}
app.kubernetes.io/name: grpo-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{/* Labels of objects that are no pods. */}}
{{- define "grpo-operator.labels" -}}
{{- with .Values.commonLabels }}
{{- toYaml . }}
{{ end -}}
app.kubernetes.io/name: grpo-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: grpo-operator
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* metadata of an object: {root, name, namespace?, labels?, annotations?}; a namespace of "" makes it cluster-wide. */}}
{{- define "grpo-operator.metadata" -}}
name: {{ .name }}
{{- if not (hasKey . "namespace") }}
namespace: {{ .root.Release.Namespace }}
{{- else if .namespace }}
namespace: {{ .namespace }}
{{- end }}
labels:
  {{- include "grpo-operator.labels" .root | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "grpo-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "grpo-operator.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "grpo-operator.tokenKeySecret" -}}
{{- .Values.tokenKey.existingSecret | default (printf "%s-token-key" (include "grpo-operator.fullname" .)) -}}
{{- end -}}

{{/* Name of an image: {root, image}. A digest wins over a tag. */}}
{{- define "grpo-operator.image" -}}
{{- with .image.registry | default .root.Values.global.imageRegistry -}}
{{- trimSuffix "/" . }}/
{{- end -}}
{{- .image.repository -}}
{{- if .image.digest -}}
@{{ .image.digest }}
{{- else -}}
:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "grpo-operator.imagePullSecrets" -}}
{{- with concat .Values.global.imagePullSecrets .Values.imagePullSecrets | uniq -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Comma list of the namespaces that the operator watches; empty: all. */}}
{{- define "grpo-operator.watchedNamespaces" -}}
{{- if eq .Values.rbac.scope "namespaced" -}}
{{- .Values.rbac.namespaces | default (list .Release.Namespace) | join "," -}}
{{- end -}}
{{- end -}}
