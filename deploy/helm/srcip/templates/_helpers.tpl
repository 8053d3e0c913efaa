{{- define "srcip.labels" -}}
{{ include "srcip.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "srcip.selector" -}}
app.kubernetes.io/name: srcip
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "srcip.serviceAccountName" -}}
{{ .Values.rbac.serviceAccountName | default .Release.Name }}
{{- end }}

{{- define "srcip.priorityClassName" -}}
{{ .Values.priorityClass.create | ternary .Release.Name .Values.priorityClass.name }}
{{- end }}

{{/* The scrape endpoint, for either kind of monitor. */}}
{{- define "srcip.endpoint" -}}
port: metrics
path: /metrics
interval: {{ .Values.monitor.interval }}s
# Where the target has labels of the same name, keep the agent's own (`service`, `node`).
honorLabels: true
{{- if .Values.tls.secretName }}
scheme: https
{{- end }}
{{- with .Values.monitor.tlsConfig }}
tlsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.monitor.authorization }}
authorization:
  {{- toYaml . | nindent 2 }}
{{- end }}
relabelings:
  - sourceLabels: [__meta_kubernetes_pod_node_name]
    targetLabel: instance
{{- end }}

{{/* What the three probes have in common. */}}
{{- define "srcip.probe" -}}
httpGet:
  path: {{ .path }}
  port: metrics
  {{- if .Values.tls.secretName }}
  scheme: HTTPS
  {{- end }}
  {{- if or (hasPrefix "127." .Values.agent.bind) (has .Values.agent.bind (list "::1" "localhost")) }}
  # The kubelet is in the same network namespace.
  host: {{ .Values.agent.bind | quote }}
  {{- end }}
timeoutSeconds: 5
{{- end }}
