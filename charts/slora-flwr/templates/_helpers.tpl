{{/* The name of a part of this release: list $ "gate". */}}
{{- define "slora.name" -}}
{{- $name := printf "%s-%s" (index . 0).Release.Name (index . 1) -}}
{{- if gt (len $name) 52 -}}
{{- fail (printf "%s has %d characters; allowed: 52. Choose a shorter name of the release or the node" $name (len $name)) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* What selects a part's pods: list $ "gate". */}}
{{- define "slora.selector" -}}
app.kubernetes.io/name: {{ (index . 0).Chart.Name }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "slora.metadata" -}}
name: {{ include "slora.name" . }}
namespace: {{ (index . 0).Release.Namespace }}
labels:
  {{- include "slora.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end -}}

{{/* The beginning of each pod: list $ (more of the pod, from the values). */}}
{{- define "slora.pod" -}}
automountServiceAccountToken: false
# The first process of the pod reaps what runs leave behind, and passes signals on.
shareProcessNamespace: true
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with (index . 0).Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with index . 1 }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The beginning of each container. */}}
{{- define "slora.container" -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* The environment of a container that runs apps: its env, from the values. */}}
{{- define "slora.env" -}}
# The root file system is read-only: what Flower unpacks goes to /tmp.
- {name: HOME, value: /tmp}
- {name: FLWR_HOME, value: /tmp/.flwr}
- {name: HF_HOME, value: /state/huggingface}
- {name: SLORA_ASSETS, value: /assets}
{{- range $name, $value := . }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{/* The files of Secrets below /run/secrets: a Secret's name and keys. */}}
{{- define "slora.secrets" -}}
- secret:
    name: {{ first . }}
    items:
      {{- range rest . }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
{{- end -}}

{{/* The claim of a StatefulSet's /state: its storage, from the values. */}}
{{- define "slora.state" -}}
- metadata: {name: state}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with .storageClassName }}
    storageClassName: {{ . }}
    {{- end }}
    resources: {requests: {storage: {{ .size }}}}
{{- end -}}

{{/* The address at which this release's nodes reach the server. */}}
{{- define "slora.superlink" -}}
{{- if .Values.supernode.superlink -}}
{{- .Values.supernode.superlink -}}
{{- else if .Values.superlink.enabled -}}
{{- printf "%s:%d" (include "slora.name" (list . "gate")) (int .Values.gate.service.port) -}}
{{- else -}}
{{- fail "supernode.superlink is empty; allowed: the host:port of a server's gate, since superlink.enabled is false" -}}
{{- end -}}
{{- end -}}

{{/* Health by HTTP: a scheme and the name of a port. */}}
{{- define "slora.health" -}}
startupProbe:
  httpGet: {path: /health, port: {{ index . 1 }}, scheme: {{ index . 0 }}}
  periodSeconds: 5
  timeoutSeconds: 6
  failureThreshold: 60
readinessProbe:
  httpGet: {path: /health, port: {{ index . 1 }}, scheme: {{ index . 0 }}}
  periodSeconds: 10
  timeoutSeconds: 6
livenessProbe:
  httpGet: {path: /health, port: {{ index . 1 }}, scheme: {{ index . 0 }}}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- end -}}

{{/* Health of a SuperExec, by gRPC. */}}
{{- define "slora.alive" -}}
startupProbe:
  grpc: {port: 9097}
  periodSeconds: 5
  timeoutSeconds: 6
  failureThreshold: 60
livenessProbe:
  grpc: {port: 9097}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- end -}}
